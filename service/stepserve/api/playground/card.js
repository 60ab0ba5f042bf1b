// One request on the page: its images as they appear, where it stands, and what can be done with it.

import { apiKey } from "./api.js";
import { $, announce, button, copy, download } from "./page.js";
import { asCurl, asPython } from "./snippets.js";
import { titleOf } from "./titles.js";
import { view } from "./viewer.js";

const COPIED_MS = 1500;

/** What a request asks for, in a few words. */
function facts(b) {
  const guidance = b.guidance_scale === undefined ? [] : [b.guidance_scale > 1 ? `guidance ${b.guidance_scale}` : "no guidance"];
  return [`${b.num_inference_steps} steps`, ...guidance, b.scheduler.replace(/(?<=.)Scheduler$/, "")].join(" · ");
}

export class Card {
  /** `does` has what leads beyond the card: run, startFrom, remove, stop. */
  constructor(entry, does) {
    this.entry = entry;
    this.does = does;
    this.node = $("card-template").content.firstElementChild.cloneNode(true);
    this.node.style.setProperty("--hue", entry.hue);
    this.node.dataset.id = entry.id;
    this.part(".caption").textContent = entry.title;
    this.part(".caption").title = entry.body.prompts?.join("\n") ?? entry.title;
    this.part(".facts").textContent = facts(entry.body);
  }

  part(selector) { return this.node.querySelector(selector); }

  begin() {
    this.wait("waiting for its turn");
    this.node.classList.add("running");
    this.actions([button("Cancel", () => this.does.stop(this))]);
  }

  wait(text) {
    const waiting = Object.assign(document.createElement("p"), { className: "waiting", textContent: text });
    this.part(".frames").replaceChildren(waiting);
  }

  /** Of several prompts each has its own steps; the one that is told of last is shown. */
  step(step, steps, prompt = 0) {
    if (!this.node.classList.contains("running")) return;
    this.done = Object.assign(this.done ?? [], { [prompt]: step / Math.max(steps, 1) });
    const bar = this.part(".bar");
    const { prompts } = this.entry.body;
    const share = this.done.reduce((sum, each) => sum + each, 0) / (prompts?.length ?? 1);
    bar.setAttribute("aria-valuemax", 100);
    bar.setAttribute("aria-valuenow", Math.round(100 * share));
    bar.firstChild.style.width = `${100 * share}%`;
    this.tell(step ? `${prompts ? `prompt ${prompt + 1}: ` : ""}step ${step} of ${steps}` : "accepted");
  }

  image(index, source) {
    const frames = this.part(".frames");
    if (frames.querySelector(".waiting")) frames.replaceChildren();
    while (frames.children.length <= index) frames.append(this.frame(frames.children.length));
    const frame = frames.children[index], image = frame.firstChild;
    frame.disabled = false;
    image.src = source;
    image.alt = `${titleOf(this.entry, index)}, image ${index + 1}`;
  }

  frame(index) {
    const frame = Object.assign(document.createElement("button"), { type: "button", title: "Enlarge", disabled: true });
    frame.append(new Image());
    frame.addEventListener("click", () => view(this, index, frame.firstChild.src));
    return frame;
  }

  tell(text, isBad = false) {
    const news = this.part(".news");
    news.textContent = text;
    news.classList.toggle("bad", isBad);
  }

  actions(buttons) { this.part(".actions").replaceChildren(...buttons); }

  end() {
    const { entry } = this;
    this.node.classList.remove("running");
    entry.images.forEach((source, index) => this.image(index, source));
    this.part(".bar i").style.width = entry.images.length ? "100%" : "0";
    if (entry.news) this.tell(entry.news);
    this.actions([...this.reruns(), ...this.uses(), button("Remove", () => this.does.remove(this), { icon: "remove" })]);
  }

  reruns() {
    return [
      button("Again", () => this.does.run(this.entry), { icon: "again" }),
      button("New seed", () => this.does.run(this.entry, true), { icon: "dice" }),
    ];
  }

  /** What can be done with image `index`. */
  uses(index = 0) {
    const { images } = this.entry;
    if (!images.length) return [];
    return [
      button("Start from it", () => this.does.startFrom(images[index]), { icon: "input" }),
      button("Download", () => this.download(), { icon: "download" }),
      button("Copy as curl", (b) => this.copy(b, asCurl(this.entry, Boolean(apiKey.get()))), { word: "curl" }),
      button("Copy as Python", (b) => this.copy(b, asPython(this.entry, Boolean(apiKey.get()))), { word: "py" }),
    ];
  }

  async copy(copier, text) {
    const before = copier.textContent;
    try {
      await copy(text);
      copier.textContent = "copied";
    } catch {
      copier.textContent = "cannot copy";
    }
    announce(copier.textContent);
    setTimeout(() => { copier.textContent = before; }, COPIED_MS);
  }

  /** The images, and what they began with under the names that copied commands read. */
  download() {
    const { body, files, images } = this.entry;
    images.forEach((source, index) => {
      download(source, `${titleOf(this.entry, index).replace(/\W+/g, "-").slice(0, 60)}-${body.seed + index}.png`);
    });
    for (const { file, name } of files) {
      const url = URL.createObjectURL(file);
      download(url, name);
      setTimeout(() => URL.revokeObjectURL(url), 60_000);
    }
  }

  /** Offers to try again, once the service wants to be asked again. */
  offerRetry(waitS) {
    const retry = button("Try again", () => this.does.run(this.entry));
    this.actions([retry, button("Remove", () => this.does.remove(this), { icon: "remove" })]);
    this.countDown(retry, waitS);
  }

  countDown(retry, leftS) {
    retry.disabled = leftS > 0;
    retry.textContent = leftS > 0 ? `Try again in ${leftS} s` : "Try again";
    if (leftS > 0) setTimeout(() => this.countDown(retry, leftS - 1), 1000);
  }
}
