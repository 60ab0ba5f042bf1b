// Talking to the service: JSON, streams of events, and errors in its own words.

import { recall, remember } from "./page.js";

const KEY = "stepserve-key";

export class ServiceError extends Error {
  constructor(status, detail, retryAfterS) {
    super(detail.message);
    this.status = status;
    this.code = detail.code;
    this.retryAfterS = retryAfterS;
  }
}

let keyOfThisPage = "";

export const apiKey = {
  get: () => recall("sessionStorage", KEY) ?? keyOfThisPage,
  set: (key) => {
    keyOfThisPage = key;
    remember("sessionStorage", KEY, key);
  },
};

function headers(more = {}) {
  const key = apiKey.get();
  return key ? { Authorization: `Bearer ${key}`, ...more } : more;
}

async function checked(answer) {
  if (answer.ok) return answer;
  let detail = { message: `the service answered ${answer.status}`, code: "unknown" };
  try {
    detail = (await answer.json()).error ?? detail;
  } catch { /* not ours: a proxy's page, perhaps */ }
  throw new ServiceError(answer.status, detail, Number(answer.headers.get("Retry-After")) || null);
}

export async function getJson(path) {
  return (await checked(await fetch(path, { headers: headers() }))).json();
}

export async function cancel(id) {
  await checked(await fetch(`/v1/requests/${encodeURIComponent(id)}`, { method: "DELETE", headers: headers() }));
}

/** What a request sends, as `fetch` takes it: JSON, or a form where it brings files along. */
function content(body, files) {
  if (!files.length) return [{ "Content-Type": "application/json" }, JSON.stringify(body)];
  const form = new FormData();
  for (const [name, value] of Object.entries(body)) {
    form.append(name, typeof value === "string" ? value : JSON.stringify(value));
  }
  for (const { field, file, name } of files) form.append(field, file, name);
  return [{}, form];
}

/** Yields the events of a streamed request to `/v1/images/{url}`: `[name, data]`. */
export async function* stream(id, { url, body, files }, signal) {
  const [kind, sent] = content({ ...body, stream: true }, files);
  const answer = await checked(await fetch(`/v1/images/${url}`, {
    method: "POST", body: sent, signal, headers: headers({ "X-Request-ID": id, ...kind }),
  }));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const event = parse(block);
      if (event) yield event;
    }
  }
}

function parse(block) {
  let name = "message", data = "";
  for (const line of block.split("\n")) {
    if (line.startsWith("event:")) name = line.slice(6).trim();
    if (line.startsWith("data:")) data += line.slice(5).trim();
  }
  return data ? [name, JSON.parse(data)] : null;
}
