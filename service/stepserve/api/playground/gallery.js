// What was made, kept in this browser; without IndexedDB the page works and forgets.

const NAME = "stepserve", STORE = "made", MOST = 60;

function open() {
  return new Promise((resolve, reject) => {
    const asked = indexedDB.open(NAME, 1);
    asked.onupgradeneeded = () => asked.result.createObjectStore(STORE, { keyPath: "id" });
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });
}

async function within(mode, work) {
  try {
    const database = await open();
    return await new Promise((resolve, reject) => {
      const transaction = database.transaction(STORE, mode);
      const asked = work(transaction.objectStore(STORE));
      transaction.oncomplete = () => { database.close(); resolve(asked?.result); };
      transaction.onerror = transaction.onabort = () => { database.close(); reject(transaction.error); };
    });
  } catch {
    return undefined;
  }
}

/** What was kept before there were other inputs than an image and a mask. */
function asToday(entry) {
  if (Array.isArray(entry.files)) return entry;
  const files = Object.entries(entry.files ?? {}).filter(([, file]) => file)
    .map(([field, file]) => ({ field, file, name: field === "image" ? "input.png" : "mask.png" }));
  return { ...entry, files, url: files.length ? "edits" : "generations", title: entry.body.prompt };
}

/** Everything kept, the latest first. */
export async function all() {
  const kept = (await within("readonly", (store) => store.getAll())) ?? [];
  return kept.map(asToday).sort((a, b) => b.made - a.made);
}

export async function keep(entry) {
  await within("readwrite", (store) => store.put(entry));
  for (const old of (await all()).slice(MOST)) await forget(old.id);
}

export function forget(id) {
  return within("readwrite", (store) => store.delete(id));
}
