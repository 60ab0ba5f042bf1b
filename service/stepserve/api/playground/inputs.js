// What a request brings along: a slot for each role that a task of the chosen model takes.

import * as easel from "./easel.js";
import { prepareControl, prepareReference } from "./entries.js";
import { $, draw } from "./page.js";
import { fill, Slot, values } from "./slots.js";
import { choose, most, problemOf } from "./tasks.js";

/** Numbers that most models have a usual value of, by the element that holds them. */
const NUMBERS = { strength: "strength", image_guidance_scale: "image-guidance", noise_level: "noise-level" };
const ALL_PAINTED = "Only what is painted changes.", NOT_PAINTED = "Nothing is painted: the whole image changes. Paint to change only a part.";

let model = null, slots = {};


/** Numbers and names of the classes that a model tells names of. */
const namedClasses = () => (model.classes ?? []).filter(({ names }) => names.length).map(({ class_label: number, names }) => [number, names.join(", ")]);

/** Shows what a model takes. What was filled in stays, and is sent where it is taken. */
export function show(chosen) {
  model = chosen;
  const takes = (role) => most(model, role) > 0;
  $("prompt-field").hidden = !takes("prompt");
  $("lines-field").hidden = !model.inputs["text-to-image"]?.prompt;
  for (const node of document.querySelectorAll("[data-role]")) node.hidden = !takes(node.dataset.role);
  showClasses();
  slots.image.allow(most(model, "image"));
  slots.controls.allow(most(model, "controls"));
  slots.references.allow(most(model, "references"));
  $("images-legend").textContent = slots.image.limit > 1 ? `Images (at most ${slots.image.limit})` : "Start from an image";
  $("noise-level").max = model.max_noise_level ?? "";
}

function showClasses() {
  const known = namedClasses(), all = (model.classes ?? []).length;
  $("class-number").hidden = known.length > 0;
  $("class-name").hidden = known.length === 0;
  $("class-label-for").htmlFor = known.length ? "class-name" : "class-number";
  const isNeeded = Object.values(model.inputs).some(({ class_label: taken }) => taken?.least);
  fill($("class-name"), [...(isNeeded ? [] : [["", "any"]]), ...known.map(([number, name]) => [String(number), `${number} · ${name}`])]);
  $("class-number").max = all ? all - 1 : "";
}

/** What the class of a request is called. */
export function className(number) {
  return namedClasses().find(([each]) => each === number)?.[1] ?? `class ${number}`;
}

/** A class, drawn at random, or undefined where the model has none. */
export function anyClass() {
  if (!most(model, "class_label")) return undefined;
  return draw() % Math.max((model.classes ?? []).length, 1);
}

/** The prompts: one, or one a line. */
function prompts() {
  const text = $("prompt").value.trim();
  if ($("prompt-field").hidden || !text) return [];
  return isOneALine() ? text.split("\n").map((line) => line.trim()).filter(Boolean) : [text];
}

export const isOneALine = () => $("lines").checked && !$("lines-field").hidden;

function chosenClass() {
  if ($("class-field").hidden) return undefined;
  const { value } = $("class-name").hidden ? $("class-number") : $("class-name");
  return value === "" ? undefined : Number(value);
}

const isEnlarged = () => !$("hires").hidden && $("enlarge").checked;

/** How many inputs of each role are filled in. */
export function given() {
  return {
    prompt: Math.min(prompts().length, 1), class_label: Number(chosenClass() !== undefined), hires: Number(isEnlarged()),
    image: slots.image.entries.length, mask: Number(easel.isPainted()),
    controls: slots.controls.entries.length, references: slots.references.entries.length,
  };
}

/** The task that the form stands for, and what keeps it from being sent. */
export function plan() {
  const counts = given(), choice = choose(model, counts);
  const several = isOneALine() && prompts().length > 1 && choice.url !== "generations";
  return { ...choice, problem: several ? "Several prompts begin with no image: leave one, or remove the image." : problemOf(model, choice, counts) };
}

/** The part of a body that says what the request brings along. */
export function body({ inputs }) {
  const written = prompts(), told = {};
  if (isOneALine() && written.length > 1) told.prompts = written;
  else if (written.length) told.prompt = written[0];
  if (chosenClass() !== undefined) told.class_label = chosenClass();
  for (const [role, id] of Object.entries(NUMBERS)) if (inputs[role]?.most && $(id).value !== "" && !$(id).disabled) told[role] = Number($(id).value);
  if (isEnlarged()) told.hires = values($("hires"));
  for (const role of ["controls", "references"]) {
    const used = slots[role].entries;
    if (used.length) told[role] = used.map(({ node }) => values(node));
  }
  return told;
}

/** The files that the request brings along, as `{field, file, name}`. */
export async function files() {
  const mask = easel.isPainted() ? [{ field: "mask", file: await easel.maskFile(), name: "mask.png" }] : [];
  return [...slots.image.files(), ...mask, ...slots.controls.files(), ...slots.references.files()];
}

/** Begins with this image, if the model begins with any. */
export async function startFrom(blob) {
  if (!slots.image.isShown) throw new Error(`${model.id} starts from no image.`);
  await slots.image.add([blob]);
}

function showImages({ entries, limit, list }) {
  if (!model) return;
  const isMasked = most(model, "mask") > 0, isSingle = limit === 1;
  list.hidden = isSingle;
  $("no-input").hidden = !isSingle;
  easel.show(isSingle || isMasked ? entries[0] : null, isMasked).catch(() => {});
  $("image-options").hidden = entries.length === 0;
  showPlan();
}

/** Numbers that the task at hand does not take cannot be changed. */
export function showPlan() {
  if (!model) return;
  const { task, inputs } = choose(model, given());
  if ($("task").textContent !== task) $("task").textContent = task;
  for (const [role, id] of Object.entries(NUMBERS)) $(id).disabled = !inputs[role]?.most;
  for (const node of $("hires").querySelectorAll("[name]")) node.disabled = !$("enlarge").checked;
}

function explained(isPainted) {
  if (isPainted) return ALL_PAINTED;
  const needsMask = model && !["edit", "image-to-image", "upscaling"].some((task) => model.inputs[task]);
  return needsMask ? "Paint over what should change." : NOT_PAINTED;
}

/** What is pasted goes where the keyboard is, or else to the first slot with room for it. */
function pasted(event) {
  const open = Object.values(slots).filter((slot) => slot.isShown);
  const here = open.find((slot) => slot.place.contains(document.activeElement));
  const slot = here ?? open.find((each) => !each.drop.hidden) ?? open[0];
  slot?.take(event.clipboardData?.files);
}

/** `say` tells the person what is wrong with a file. */
export function setUp(say) {
  slots = {
    image: new Slot({ place: "start-from", template: "image-template", field: "image", stem: "input", name: "image", changed: showImages }),
    controls: new Slot({
      place: "controls", template: "control-template", field: "control_image", stem: "control", name: "control", changed: showPlan,
      prepare: (node) => prepareControl(node, model),
    }),
    references: new Slot({
      place: "references", template: "reference-template", field: "reference_image", stem: "reference", name: "reference", changed: showPlan,
      prepare: (node) => prepareReference(node, model),
    }),
  };
  for (const slot of Object.values(slots)) slot.say = say;
  easel.setUp(explained);
  addEventListener("paste", pasted);
  $("no-input").addEventListener("click", () => slots.image.act("remove", slots.image.entries[0]));
  $("form").addEventListener("input", showPlan);
  $("form").addEventListener("change", showPlan);
}
