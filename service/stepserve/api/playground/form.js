// The form: what the model allows, and the request it stands for.

import { apiKey, getJson } from "./api.js";
import * as inputs from "./inputs.js";
import { $, draw } from "./page.js";
import { FROM_NOTHING } from "./tasks.js";

const LOOK_AGAIN_MS = 2000, MOST_STEPS = 150, MOST_GUIDANCE = 20, CUSTOM = "custom", AUTO = "auto", OFF = "off", UPSCALING = "upscaling";
const SCALES = [0.5, 0.75, 1, 1.5, 2], RATIOS = [[4, 3], [3, 2], [16, 9]];

let models = [], again = null, onModels = () => {};

/** The chosen model, undefined until one is known. */
export const model = () => models.find((each) => each.id === $("model").value) ?? models[0];

export function say(problem) {
  $("problem").textContent = problem;
  $("problem").hidden = !problem;
}

function tell(text, state) {
  if ($("status").textContent !== text) $("status").textContent = text;
  $("status").dataset.state = state;
}

function options(select, names, chosen) {
  select.replaceChildren(...names.map((name) => new Option(name.replace(/(?<=.)Scheduler$/, ""), name, false, name === chosen)));
}

/** A few sizes that suit the model, by shape; any other can be typed. */
function sizesOf({ minimum, maximum, step, native }) {
  const near = (side) => Math.min(maximum, Math.max(minimum, Math.round(side / step) * step));
  const unique = (sizes) => [...new Set(sizes)];
  const wide = RATIOS.map(([a, b]) => [near(native * Math.sqrt(a / b)), near(native * Math.sqrt(b / a))]).filter(([w, h]) => w > h);
  return {
    Square: unique(SCALES.map((scale) => near(native * scale)).map((side) => `${side}x${side}`)),
    Wide: unique(wide.map(([w, h]) => `${w}x${h}`)),
    Tall: unique(wide.map(([w, h]) => `${h}x${w}`)),
  };
}

/** What begins with an image has its size, unless another one is asked for. */
function showSizes({ sizes, tasks }) {
  const hasImages = tasks.some((task) => !FROM_NOTHING.includes(task)), isOfImages = !tasks.some((task) => FROM_NOTHING.includes(task));
  const chosen = isOfImages ? AUTO : `${sizes.native}x${sizes.native}`;
  const groups = Object.entries(sizesOf(sizes)).filter(([, names]) => names.length).map(([label, names]) => {
    const group = Object.assign(document.createElement("optgroup"), { label });
    group.append(...names.map((name) => new Option(name.replace("x", " × "), name, false, name === chosen)));
    return group;
  });
  const own = hasImages ? [new Option("As the image", AUTO, false, chosen === AUTO)] : [];
  // Upscalers decide on it themselves.
  $("size-field").hidden = tasks.every((task) => task === UPSCALING);
  $("size").replaceChildren(...own, ...groups, new Option("Other …", CUSTOM));
  for (const name of ["width", "height"]) {
    Object.assign($(name), { min: sizes.minimum, max: sizes.maximum, step: sizes.step, value: sizes.native });
  }
}

function showModel() {
  const m = model();
  if (!m) return;
  showSizes(m);
  options($("scheduler"), m.schedulers, m.default_scheduler);
  showSteps();
  $("steps").value = m.default_num_inference_steps;
  Object.assign($("guidance"), { max: Math.min(m.max_guidance_scale, MOST_GUIDANCE), value: m.default_guidance_scale });
  $("count").max = m.max_n;
  $("negative").maxLength = m.max_prompt_characters;
  $("adapter-field").hidden = m.adapters.length === 0;
  options($("adapter"), ["none", ...m.adapters], "none");
  showStepCache(m);
  inputs.show(m);
  showReadiness();
  showValues();
}

function showStepCache({ step_cache_methods: methods, default_step_cache: usual }) {
  $("step-cache-field").hidden = methods.length === 0;
  options($("step-cache"), [OFF, ...methods], usual?.method ?? OFF);
  $("threshold").value = usual?.threshold ?? "";
}

/** How many steps the chosen scheduler can do. */
export function stepsOf(m, scheduler) {
  return m.scheduler_steps[scheduler] ?? { minimum: m.min_num_inference_steps, maximum: m.max_num_inference_steps };
}

function showSteps() {
  const { minimum, maximum } = stepsOf(model(), $("scheduler").value);
  Object.assign($("steps"), { min: minimum, max: Math.max(minimum, Math.min(maximum, MOST_STEPS)) });
}

/** What the model makes nothing of is not offered. */
function showGuidance() {
  const { kind, negative_prompt, above } = model().guidance;
  const isGuided = Number($("guidance").value) > above;
  $("guidance-field").hidden = kind === "none";
  $("negative-field").hidden = !negative_prompt;
  $("negative").disabled = !negative_prompt || (kind !== "none" && !isGuided);
  $("negative").placeholder = $("negative").disabled ? "needs guidance" : "what it should not show";
}

function showReadiness() {
  const m = model();
  showGuidance();
  const text = m.ready ? `${m.id} is ready · ${m.description}` : `${m.id} is loading · ${m.detail || "it is not ready yet"}`;
  tell(text, m.ready ? "ready" : "waiting");
  for (const option of $("model").options) {
    const { id, ready } = models.find((each) => each.id === option.value);
    option.textContent = ready ? id : `${id} (loading)`;
  }
}

function showValues() {
  for (const name of ["steps", "guidance", "strength", "scale", "brush"]) $(`${name}-out`).textContent = $(name).value;
  $("custom-size").hidden = $("size").value !== CUSTOM;
  $("threshold").disabled = $("step-cache").value === OFF;
  if (model()) showGuidance();
  showPrompt();
}

function showPrompt() {
  const isOneALine = inputs.isOneALine(), m = model();
  $("prompt-key").textContent = isOneALine || $("prompt-field").hidden ? "Ctrl+Enter" : "Enter";
  $("prompt").rows = isOneALine ? 6 : 3;
  if (m) $("prompt").maxLength = m.max_prompt_characters * (isOneALine ? m.max_prompts : 1);
}

/** Learns what is served, and looks again while that can change. What was filled in stays. */
export async function findModels() {
  clearTimeout(again);
  try {
    const known = new Set(models.map((m) => m.id));
    models = (await getJson("/v1/models")).data;
    $("key-field").hidden = !apiKey.get();
    if (models.length !== known.size || models.some((m) => !known.has(m.id))) {
      options($("model"), models.map((m) => m.id), $("model").value);
      showModel();
    }
    if (models.length) showReadiness();
    onModels();
    if (!models.every((m) => m.ready)) lookAgain();
  } catch (error) {
    if (error.status === 401) return askForKey(error.message);
    tell("the service cannot be reached; trying again", "waiting");
    lookAgain();
  }
}

function lookAgain() { again = setTimeout(findModels, LOOK_AGAIN_MS); }

/** Shows where a key goes, with what the service said of the last one. */
export function askForKey(message) {
  $("key-field").hidden = false;
  tell(apiKey.get() ? message : "this service wants an API key", "waiting");
}

/** The body of the request that is filled in, for the task that it stands for. */
export function body(choice) {
  const told = { ...inputs.body(choice), ...settings() };
  if (choice.task === UPSCALING) delete told.size;
  return told;
}

/** The part of a body that no task differs in. */
export function settings() {
  const told = {
    model: model().id,
    size: $("size").value === CUSTOM ? `${$("width").value}x${$("height").value}` : $("size").value,
    n: Number($("count").value),
    num_inference_steps: Number($("steps").value),
    scheduler: $("scheduler").value,
    seed: $("seed").value === "" ? draw() : Number($("seed").value),
  };
  if (!$("guidance-field").hidden) told.guidance_scale = Number($("guidance").value);
  if ($("negative").value.trim() && !$("negative").disabled) told.negative_prompt = $("negative").value.trim();
  if (model().adapters.includes($("adapter").value)) {
    told.adapters = [{ name: $("adapter").value, scale: Number($("scale").value) }];
  }
  const stepCache = chosenStepCache();
  if (stepCache) told.step_cache = stepCache;
  return told;
}

/** Nothing where it is off and would be anyway. */
function chosenStepCache() {
  const { step_cache_methods: methods, default_step_cache: usual } = model(), method = $("step-cache").value;
  if (methods.includes(method)) return { method, ...($("threshold").value && { threshold: Number($("threshold").value) }) };
  return usual && OFF;
}

/** `heard` is called whenever it was heard how the models are. */
export function setUp(heard) {
  onModels = heard;
  // A phone shows images first; what is seldom changed is folded away.
  if (matchMedia("(max-width: 900px)").matches) $("settings").open = false;
  $("scheduler").addEventListener("change", () => { showSteps(); showValues(); });
  $("form").addEventListener("input", showValues);
  $("model").addEventListener("change", () => { showModel(); onModels(); });
  $("dice").addEventListener("click", () => { $("seed").value = draw(); });
  $("key").addEventListener("change", () => { apiKey.set($("key").value.trim()); findModels(); });
  showValues();
}
