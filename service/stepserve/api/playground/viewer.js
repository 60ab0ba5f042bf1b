// One image, enlarged, with everything that made it. Arrow keys go to its neighbours.

import { $ } from "./page.js";

const SHOWN = {
  model: "Model", negative_prompt: "Without", size: "Size", num_inference_steps: "Steps", guidance_scale: "Guidance",
  scheduler: "Scheduler", adapters: "Adapter", strength: "Strength",
};

let frame = null;

function lines(body, index) {
  const told = Object.entries(SHOWN).filter(([name]) => body[name] !== undefined)
    .map(([name, label]) => [label, name === "adapters" ? body[name].map((a) => `${a.name} × ${a.scale ?? 1}`).join(", ") : body[name]]);
  return [...told, ["Seed", body.seed + index]];
}

/** Shows image `index` of a card, which may still be on its way. */
export function view(card, index, source) {
  const viewer = $("viewer"), { body } = card.entry;
  frame = card.part(".frames").children[index];
  Object.assign(viewer.querySelector("img"), { src: source, alt: body.prompt });
  $("viewer-title").textContent = body.prompt;
  viewer.querySelector("dl").replaceChildren(...lines(body, index).flatMap(([label, value]) => [
    Object.assign(document.createElement("dt"), { textContent: label }),
    Object.assign(document.createElement("dd"), { textContent: value }),
  ]));
  const isDone = card.entry.images.length > 0;
  viewer.querySelector(".actions").replaceChildren(...(isDone ? [...card.reruns(), ...card.uses(index)] : []));
  if (!viewer.open) viewer.showModal();
}

function neighbour(by) {
  const frames = [...document.querySelectorAll(".frames button")];
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
