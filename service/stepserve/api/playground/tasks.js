// Which task the filled-in form stands for, and which URL does it: the service decides in the same way.

/** What needs no image to begin with. */
export const FROM_NOTHING = ["text-to-image", "class-to-image", "unconditional"];

const URLS = {
  generations: FROM_NOTHING,
  edits: ["edit", "image-to-image", "inpainting"],
  variations: ["image-to-image"],
  upscale: ["upscaling"],
};
const NONE = { least: 0, most: 0 };
const NAMES = {
  prompt: "prompt", class_label: "class", image: "image", mask: "mask", controls: "control image",
  references: "reference image", hires: "enlargement",
};
const WANTED = {
  prompt: "Write what the image should show.",
  class_label: "Say which class to draw.",
  mask: "Paint over what should change.",
};

/** Most inputs of a role that any task of the model takes. */
export const most = (model, role) => Math.max(0, ...Object.values(model.inputs).map((inputs) => inputs[role]?.most ?? 0));

/** Whether a task of the model can be asked for with no more than `given`: how many inputs of each role. */
export const canDo = (model, given) => misfits(choose(model, given), given).length === 0;

/** Which task of which URL fits best what is given, as `{url, task, inputs}`. */
export function choose(model, given) {
  const offered = Object.entries(URLS).flatMap(([url, tasks]) =>
    tasks.filter((task) => model.inputs[task]).map((task) => ({ url, task, inputs: inputsOf(model, task, url) })));
  const wrong = offered.map((choice) => misfits(choice, given).length);
  return offered[wrong.indexOf(Math.min(...wrong))] ?? { url: "generations", task: model.tasks[0], inputs: {} };
}

function inputsOf(model, task, url) {
  const inputs = model.inputs[task];
  // Edits want a prompt; without one they are variations.
  return url === "edits" ? { ...inputs, prompt: { least: 1, most: 1 } } : inputs;
}

/** The roles of which too few or too many are given. */
function misfits({ inputs }, given) {
  return Object.keys(NAMES).filter((role) => {
    const { least, most: limit } = inputs[role] ?? NONE, count = given[role] ?? 0;
    return count < least || count > limit;
  });
}

/** What keeps the form from being sent, in words; empty where nothing does. */
export function problemOf(model, choice, given) {
  const [role] = misfits(choice, given);
  if (!role) return "";
  const { least, most: limit } = choice.inputs[role] ?? NONE, name = NAMES[role];
  if ((given[role] ?? 0) < least) return WANTED[role] ?? (least > 1 ? `Add at least ${least} ${name}s.` : `Add the ${name}.`);
  return limit ? `Leave at most ${limit} ${name}${limit > 1 ? "s" : ""}.` : `Remove the ${name}: ${choice.task} with ${model.id} takes none.`;
}
