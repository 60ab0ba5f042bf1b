// The page: a form, a card for each request, and the running batch above them.

import { apiKey, cancel, getJson, ServiceError, stream } from "./api.js";
import * as easel from "./easel.js";
import * as gallery from "./gallery.js";
import { colour, watch } from "./loom.js";
import { asCurl, asPython } from "./snippets.js";

const $ = (id) => document.getElementById(id);
// Browsers keep six connections to a host; one is left for looking and cancelling.
const MOST_AT_ONCE = 5, PREVIEWS = 8, GOLDEN_ANGLE = 137.5;

const running = new Map();  // id -> card
const line = [];            // waiting for a connection
let models = [], made = 0;

const model = () => models.find((each) => each.id === $("model").value) ?? models[0];
const lookAtBatch = watch(() => model()?.id, () => running.size > 0, (request) => {
  running.get(request.id)?.step(request.step, request.steps);
});

// --- the form ---------------------------------------------------------------------------------

function say(problem) {
  $("problem").textContent = problem;
  $("problem").hidden = !problem;
}

function options(select, names, chosen) {
  select.replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
}

function sizesOf({ minimum, maximum, step, native }) {
  const sides = [];
  for (let side = minimum; side <= maximum; side += step) sides.push(side);
  const squares = sides.map((side) => `${side}x${side}`);
  const wide = sides.filter((side) => side > native).map((side) => `${side}x${native}`);
  const tall = sides.filter((side) => side > native).map((side) => `${native}x${side}`);
  return [...squares, ...wide, ...tall];
}

function showModel() {
  const m = model();
  if (!m) return;
  $("status").textContent = m.ready ? `${m.id} is ready · ${m.description}` : `${m.id} is not ready: ${m.detail}`;
  const { native } = m.sizes;
  options($("size"), sizesOf(m.sizes), `${native}x${native}`);
  options($("scheduler"), m.schedulers, m.default_scheduler);
  $("steps").max = Math.min(m.max_num_inference_steps, 150);
  $("steps").value = m.default_num_inference_steps;
  $("guidance").max = Math.min(m.max_guidance_scale, 20);
  $("guidance").value = m.default_guidance_scale;
  $("count").max = m.max_n;
  $("prompt").maxLength = $("negative").maxLength = m.max_prompt_characters;
  $("adapter-field").hidden = m.adapters.length === 0;
  options($("adapter"), ["none", ...m.adapters], "none");
  $("start-from").hidden = !m.tasks.includes("image-to-image");
  showValues();
}

function showValues() {
  for (const name of ["steps", "guidance", "strength"]) $(`${name}-out`).textContent = $(name).value;
}

async function findModels() {
  try {
    models = (await getJson("/v1/models")).data;
    const chosen = $("model").value;
    options($("model"), models.map((m) => m.id), chosen);
    $("key-field").hidden = !apiKey.get();
    showModel();
    if (!models.every((m) => m.ready)) setTimeout(findModels, 2000);
  } catch (error) {
    if (error.status === 401) {
      $("key-field").hidden = false;
      $("status").textContent = apiKey.get() ? error.message : "this service wants an API key";
      return;
    }
    $("status").textContent = "the service cannot be reached; trying again";
    setTimeout(findModels, 2000);
  }
}

function body() {
  const told = {
    prompt: $("prompt").value.trim(),
    model: $("model").value,
    size: $("size").value,
    n: Number($("count").value) || 1,
    num_inference_steps: Number($("steps").value),
    guidance_scale: Number($("guidance").value),
    scheduler: $("scheduler").value,
    seed: $("seed").value === "" ? draw() : Number($("seed").value),
    previews: PREVIEWS,
  };
  if ($("negative").value.trim()) told.negative_prompt = $("negative").value.trim();
  if (!$("adapter-field").hidden && $("adapter").value !== "none") told.adapters = [{ name: $("adapter").value }];
  if (easel.hasPicture()) told.strength = Number($("strength").value);
  return told;
}

const draw = () => crypto.getRandomValues(new Uint32Array(1))[0];

// --- a request and its card ---------------------------------------------------------------------

function newId() {
  return `playground-${Array.from(crypto.getRandomValues(new Uint8Array(9)), (b) => b.toString(36).padStart(2, "0")).join("")}`;
}

class Card {
  constructor(entry) {
    this.entry = entry;
    this.node = $("card-template").content.firstElementChild.cloneNode(true);
    this.node.style.setProperty("--hue", entry.hue);
    this.part(".caption").textContent = entry.body.prompt || "(no prompt)";
    const b = entry.body;
    this.part(".facts").textContent = [
      `${b.num_inference_steps} steps`, b.guidance_scale > 1 ? `guidance ${b.guidance_scale}` : "no guidance",
      b.scheduler.replace(/Scheduler$/, ""), b.size, `seed ${b.seed}`,
    ].join(" · ");
    this.wait("waiting");
  }

  part(selector) { return this.node.querySelector(selector); }

  wait(text) {
    const waiting = Object.assign(document.createElement("p"), { className: "waiting", textContent: text });
    this.part(".frames").replaceChildren(waiting);
  }

  step(step, steps) {
    if (!running.has(this.entry.id)) return;
    this.part(".bar i").style.width = `${(100 * step) / Math.max(steps, 1)}%`;
    this.part(".news").textContent = step ? `step ${step} of ${steps}` : "accepted";
  }

  picture(index, source) {
    const frames = this.part(".frames");
    if (frames.querySelector(".waiting")) frames.replaceChildren();
    while (frames.children.length <= index) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(new Image());
      button.addEventListener("click", () => this.enlarge(button.firstChild.src));
      frames.append(button);
    }
    const image = frames.children[index].firstChild;
    image.src = source;
    image.alt = `${this.entry.body.prompt}, picture ${index + 1}`;
  }

  enlarge(source) {
    const viewer = $("viewer");
    viewer.querySelector("img").src = source;
    viewer.querySelector("img").alt = this.entry.body.prompt;
    viewer.querySelector("p").textContent = `${this.entry.body.prompt} · ${this.part(".facts").textContent}`;
    viewer.showModal();
  }

  tell(text, isBad = false) {
    const news = this.part(".news");
    news.textContent = text;
    news.classList.toggle("bad", isBad);
  }

  actions(list) {
    this.part(".actions").replaceChildren(...list.map(([text, act]) => {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
      button.addEventListener("click", () => act(button));
      return button;
    }));
  }

  async copy(button, text) {
    const before = button.textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Cannot copy here";
    }
    setTimeout(() => { button.textContent = before; }, 1500);
  }

  showEnd() {
    const { entry } = this;
    entry.pictures.forEach((source, index) => this.picture(index, source));
    this.part(".bar i").style.width = entry.pictures.length ? "100%" : "0";
    this.actions([
      ["Again", () => enqueue(entry.body, entry.files)],
      ["New seed", () => enqueue({ ...entry.body, seed: draw() }, entry.files)],
      ...(entry.pictures.length ? [
        ["Start from it", async () => easel.put(await (await fetch(entry.pictures[0])).blob())],
        ["Download", () => this.download()],
      ] : []),
      ["curl", (button) => this.copy(button, asCurl(entry.body, Boolean(entry.files.image)))],
      ["Python", (button) => this.copy(button, asPython(entry.body, Boolean(entry.files.image)))],
      ["Remove", () => { gallery.forget(entry.id); this.node.remove(); }],
    ]);
  }

  download() {
    this.entry.pictures.forEach((source, index) => {
      const link = Object.assign(document.createElement("a"), {
        href: source, download: `${this.entry.body.prompt.replace(/\W+/g, "-")}-${this.entry.body.seed + index}.png`,
      });
      link.click();
    });
  }
}

function enqueue(request, files = {}) {
  const entry = {
    id: newId(), body: { ...request, previews: PREVIEWS }, files, pictures: [], made: Date.now(),
    hue: Math.round((made++ * GOLDEN_ANGLE + 12) % 360),
  };
  const card = new Card(entry);
  $("cards").prepend(card.node);
  card.abort = new AbortController();
  card.actions([["Cancel", () => stop(card)]]);
  line.push(card);
  advance();
  return card;
}

function advance() {
  while (running.size < MOST_AT_ONCE && line.length) run(line.shift());
}

async function run(card) {
  const { entry } = card;
  running.set(entry.id, card);
  colour(entry.id, entry.hue);
  lookAtBatch();
  try {
    for await (const [name, data] of stream(entry.id, entry.body, entry.files, card.abort.signal)) take(card, name, data);
    if (!entry.pictures.length) throw new Error("the service ended without a picture");
    await gallery.keep(entry);
  } catch (error) {
    fail(card, error);
  } finally {
    running.delete(entry.id);
    card.showEnd();
    advance();
  }
}

function take(card, name, data) {
  if (name === "error") throw new ServiceError(0, data.error, null);
  const source = `data:image/${data.output_format};base64,${data.b64_json}`;
  card.picture(data.image_index, source);
  if (name.endsWith("partial_image")) {
    card.step(data.step, data.steps);
    return;
  }
  card.entry.pictures[data.image_index] = source;
  const { total_s, batch_share } = data.timings;
  card.tell(`${total_s.toFixed(2)} s · had ${Math.round(batch_share * 100)} % of its forwards`);
}

function fail(card, error) {
  card.entry.pictures = [];
  if (error.name === "AbortError" || error.code === "request_cancelled") {
    card.wait("cancelled");
    card.tell("");
    return;
  }
  card.wait("no picture");
  const again = error.retryAfterS ? ` (try again in ${error.retryAfterS} s)` : "";
  card.tell(error.message + again, true);
}

async function stop(card) {
  const index = line.indexOf(card);
  if (index >= 0) {
    line.splice(index, 1);
    card.wait("cancelled");
    card.showEnd();
    return;
  }
  card.tell("cancelling");
  try {
    await cancel(card.entry.id);
  } catch {
    card.abort.abort();  // it has not been accepted yet: leaving does the same
  }
}

// --- putting it together ----------------------------------------------------------------------

async function submit() {
  say("");
  if (!model()?.ready) return say("The model is not ready yet.");
  if (!$("prompt").value.trim()) {
    $("prompt").focus();
    return say("Write what the picture should show.");
  }
  enqueue(body(), await easel.files());
}

const DEMO = [
  ["cat face", 60, "DDIMScheduler", 4], ["pizza", 12, "EulerDiscreteScheduler", 4],
  ["red heart on a yellow background", 35, "DPMSolverMultistepScheduler", 4],
  ["soccer ball", 8, "EulerAncestralDiscreteScheduler", 1], ["sunflower", 24, "UniPCMultistepScheduler", 5],
];

function demo() {
  const known = model()?.schedulers ?? [];
  for (const [prompt, steps, scheduler, guidance] of DEMO) {
    enqueue({
      ...body(), prompt, n: 1, seed: draw(), num_inference_steps: steps, guidance_scale: guidance,
      scheduler: known.includes(scheduler) ? scheduler : $("scheduler").value,
    });
  }
}

function setUpTheme() {
  const root = document.documentElement, kept = localStorage.getItem("theme");
  if (kept) root.dataset.theme = kept;
  $("theme").addEventListener("click", () => {
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = isDark ? "light" : "dark";
    localStorage.setItem("theme", root.dataset.theme);
  });
}

async function showGallery() {
  for (const entry of await gallery.all()) {
    const card = new Card(entry);
    $("cards").append(card.node);
    card.showEnd();
  }
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
$("form").addEventListener("input", showValues);
$("model").addEventListener("change", showModel);
$("dice").addEventListener("click", () => { $("seed").value = draw(); });
$("demo").addEventListener("click", demo);
$("key").addEventListener("change", () => { apiKey.set($("key").value.trim()); findModels(); });
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); submit(); }
  if (event.key === "Escape" && !$("viewer").open) {
    const latest = [...line, ...[...running.values()].reverse()][0];
    if (latest) stop(latest);
  }
});
easel.setUp(say);
setUpTheme();
showGallery();
findModels().then(lookAtBatch);
