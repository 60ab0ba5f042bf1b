// Small things every part of the page needs.

export const $ = (id) => document.getElementById(id);

/** A seed, drawn at random. */
export const draw = () => crypto.getRandomValues(new Uint32Array(1))[0];

/** Told to those who listen instead of look. */
export function announce(text) { $("live").textContent = text; }

/** Browsers may forbid a page to keep anything; it works then, and forgets. */
export function recall(kind, key) {
  try { return window[kind].getItem(key); } catch { return null; }
}

export function remember(kind, key, value) {
  try { window[kind].setItem(key, value); } catch { /* forgets */ }
}

/** Copies where the clipboard may be used, and the older way where it may not (plain http). */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = Object.assign(document.createElement("textarea"), { value: text });
  (document.querySelector("dialog[open]") ?? document.body).append(area);
  area.select();
  const isCopied = document.execCommand("copy");
  area.remove();
  if (!isCopied) throw new Error("copying is not allowed here");
}

/** A button with an image of `icons.svg`, or with a word where `icon` is null. */
export function button(label, act, { icon = null, word = null } = {}) {
  const made = Object.assign(document.createElement("button"), { type: "button" });
  made.addEventListener("click", () => act(made));
  if (!icon && !word) {
    made.className = "plain";
    made.textContent = label;
    return made;
  }
  made.className = word ? "icon word" : "icon";
  made.title = label;
  made.setAttribute("aria-label", label);
  if (word) made.textContent = word;
  else made.append(drawing(icon));
  return made;
}

function drawing(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `/playground/icons.svg#${name}`);
  svg.append(use);
  return svg;
}

export function download(href, name) {
  Object.assign(document.createElement("a"), { href, download: name }).click();
}

export function setUpTheme() {
  const root = document.documentElement, kept = recall("localStorage", "theme");
  if (kept) root.dataset.theme = kept;
  $("theme").addEventListener("click", () => {
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = isDark ? "light" : "dark";
    remember("localStorage", "theme", root.dataset.theme);
  });
}
