// A list of images that people fill, each with fields of its own: images, controls, references.

import { $, announce } from "./page.js";

/** What the elements within `root` that have a name say; nothing of those left empty or hidden. */
export function values(root) {
  const named = [...root.querySelectorAll("[name]")].filter((each) => each.value !== "" && !each.closest("[hidden]"));
  return Object.fromEntries(named.map((each) => [each.name, each.type === "number" ? Number(each.value) : each.value]));
}

/** The options of a list to choose from: `[value, text]`. What was chosen stays, where it can. */
export function fill(select, options) {
  const before = select.value;
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  if (options.some(([value]) => value === before)) select.value = before;
}

async function checked(blob) {
  const url = URL.createObjectURL(blob);
  const image = Object.assign(new Image(), { src: url });
  try {
    await image.decode();
  } catch (error) {
    URL.revokeObjectURL(url);
    throw error;
  }
  return url;
}

export class Slot {
  /** `field` names its files in a form, `stem` on a disk; `changed` is called with the slot. */
  constructor({ place, template, field, stem, name, prepare = () => {}, changed = () => {} }) {
    Object.assign(this, { place: $(place), template: $(template), field, stem, name, prepare, changed });
    this.list = this.place.querySelector(".entries");
    this.drop = this.place.querySelector(".drop");
    this.limit = 0;
    this.kept = [];  // {blob, url, node}
    this.listen();
  }

  /** Those that the chosen model takes. */
  get entries() { return this.kept.slice(0, this.limit); }

  get isShown() { return !this.place.hidden; }

  /** Shows the slot as a model with `limit` of these has it. */
  allow(limit) {
    this.limit = limit;
    this.place.hidden = limit === 0;
    this.drop.querySelector("input").multiple = limit > 1;
    this.kept.forEach(({ node }) => this.prepare(node));
    this.show();
  }

  /** Takes files that a person chose, dropped or pasted. A single image gives way to another one. */
  async add(blobs) {
    const images = [...blobs].filter((each) => each.type.startsWith("image/"));
    if (!images.length) throw new Error("no image");
    const urls = await Promise.all(images.map(checked));
    urls.forEach((url, index) => this.put(images[index], url));
    this.show();
    announce(`${this.entries.length} of at most ${this.limit}: ${this.name}`);
  }

  put(blob, url) {
    this.kept.slice(this.limit).forEach((entry) => this.discard(entry));
    if (this.kept.length >= this.limit) this.discard(this.kept.at(-1));
    const node = this.template.content.firstElementChild.cloneNode(true);
    const entry = { blob, url, node };
    node.querySelector("img").src = url;
    for (const button of node.querySelectorAll("[data-do]")) {
      button.addEventListener("click", () => this.act(button.dataset.do, entry));
    }
    this.prepare(node);
    this.kept.push(entry);
  }

  discard(entry) {
    URL.revokeObjectURL(entry.url);
    this.kept.splice(this.kept.indexOf(entry), 1);
  }

  act(what, entry) {
    const from = this.kept.indexOf(entry);
    this.kept.splice(from, 1);
    if (what === "remove") URL.revokeObjectURL(entry.url);
    else this.kept.splice(what === "earlier" ? from - 1 : from + 1, 0, entry);
    this.show();
    // Whoever uses the keyboard goes on from where they were.
    const next = what === "remove" ? this.entries[Math.min(from, this.entries.length - 1)] : entry;
    const buttons = [...(next?.node.querySelectorAll("[data-do]") ?? [])].filter((button) => !button.disabled);
    (buttons.find((button) => button.dataset.do === what) ?? buttons[0] ?? this.drop.querySelector("input")).focus();
    announce(what === "remove" ? `removed ${this.name}` : `moved ${what}, now ${this.kept.indexOf(entry) + 1}`);
  }

  show() {
    const { entries } = this;
    this.list.replaceChildren(...entries.map(({ node }) => node));
    entries.forEach(({ node }, index) => this.number(node, index, entries.length));
    this.drop.hidden = this.limit > 0 && entries.length >= this.limit;
    this.changed(this);
  }

  /** Several images are told apart by their number, as prompts do. */
  number(node, index, all) {
    const label = `${this.name} ${index + 1}`;
    node.setAttribute("aria-label", label);
    node.querySelector("img").alt = label;
    for (const button of node.querySelectorAll("[data-do]")) {
      const { do: what } = button.dataset;
      button.setAttribute("aria-label", what === "remove" ? `Remove ${label}` : `Move ${label} ${what}`);
      button.title = button.getAttribute("aria-label");
      button.hidden = what !== "remove" && all < 2;
      button.disabled = (what === "earlier" && index === 0) || (what === "later" && index === all - 1);
    }
  }

  /** The files as a form has them: `{field, file, name}`. */
  files() {
    const { entries, field, stem } = this;
    return entries.map(({ blob }, index) =>
      ({ field, file: blob, name: entries.length > 1 ? `${stem}-${index + 1}.png` : `${stem}.png` }));
  }

  listen() {
    const input = this.drop.querySelector("input");
    input.addEventListener("change", () => {
      this.take(input.files);
      input.value = "";
    });
    for (const name of ["dragover", "dragleave", "drop"]) {
      this.place.addEventListener(name, (event) => {
        event.preventDefault();
        this.drop.classList.toggle("over", name === "dragover");
        if (name === "drop") this.take(event.dataTransfer.files);
      });
    }
  }

  /** As `add`, and tells the person what is wrong with a file. */
  take(files) {
    if (!this.isShown || !files?.length) return;
    this.add(files).then(() => this.say(""), () => this.say("That file cannot be read as an image."));
  }

  say() { /* set by whoever shows problems */ }
}
