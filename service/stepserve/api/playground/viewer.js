// One image, enlarged, with everything that made it. Arrow keys go to its neighbours.

import { $ } from "./page.js";
import { titleOf } from "./titles.js";

const SHOWN = {
  model: "Model", negative_prompt: "Without", size: "Size", num_inference_steps: "Steps", guidance_scale: "Guidance",
  scheduler: "Scheduler", adapters: "Adapter", strength: "Strength", class_label: "Class", image_guidance_scale: "Image guidance",
  noise_level: "Noise level", controls: "Control", references: "Reference", hires: "Enlarged", step_cache: "Step cache",
};
/** Values that are not shown as they are. */
const WORDS = {
  adapters: (used) => used.map(scaled).join(", "),
  controls: (used) => used.map((each) => `${scaled(each)}, ${each.start ?? 0} to ${each.end ?? 1}${each.preprocessor ? `, ${each.preprocessor}` : ""}`).join("; "),
  references: (used) => used.map(({ adapter, scale }) => scaled({ name: adapter ?? "image", scale })).join(", "),
  hires: ({ scale, strength }) => `× ${scale}, strength ${strength}`,
  step_cache: (used) => (used.method ? `${used.method}, threshold ${used.threshold ?? "as usual"}` : used),
};

let frame = null;

const scaled = ({ name, scale }) => `${name} × ${scale ?? 1}`;

function lines(entry, index) {
  const body = { ...entry.body, size: entry.size ?? entry.body.size };
  const told = Object.entries(SHOWN).filter(([name]) => body[name] !== undefined)
    .map(([name, label]) => [label, WORDS[name]?.(body[name]) ?? body[name]]);
  return [...told, ["Seed", body.seed + index]];
}

/** Shows image `index` of a card, which may still be on its way. */
export function view(card, index, source) {
  const viewer = $("viewer");
  frame = card.part(".frames").children[index];
  const title = titleOf(card.entry, index);
  Object.assign(viewer.querySelector("img"), { src: source, alt: title });
  $("viewer-title").textContent = title;
  viewer.querySelector("dl").replaceChildren(...lines(card.entry, index).flatMap(([label, value]) => [
    Object.assign(document.createElement("dt"), { textContent: label }),
    Object.assign(document.createElement("dd"), { textContent: value }),
  ]));
  const isDone = card.entry.images.length > 0;
  viewer.querySelector(".actions").replaceChildren(...(isDone ? [...card.reruns(), ...card.uses(index)] : []));
  if (!viewer.open) viewer.showModal();
}

function neighbour(by) {
  const frames = [...document.querySelectorAll(".frames button:not(:disabled)")];
  frames[frames.indexOf(frame) + by]?.click();
}

export function setUp() {
  const viewer = $("viewer");
  viewer.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") neighbour(-1);
    if (event.key === "ArrowRight") neighbour(1);
  });
  viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
}

export const isOpen = () => $("viewer").open;
export const close = () => $("viewer").close();
