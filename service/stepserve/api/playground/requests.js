// Requests of this page: the line they wait in, and what becomes of each.

import { cancel, ServiceError, stream } from "./api.js";
import { Card } from "./card.js";
import { askForKey, say } from "./form.js";
import * as gallery from "./gallery.js";
import * as inputs from "./inputs.js";
import * as loom from "./loom.js";
import { $, announce, draw } from "./page.js";
import * as viewer from "./viewer.js";

// Browsers keep six connections to a host; one is left for looking and cancelling.
const MOST_AT_ONCE = 5, PREVIEWS = 8, PROMPT_MARK = ":";
/** Told apart on black and on white, neighbours most of all. */
const HUES = [230, 75, 0, 150, 300, 45, 190, 270, 120, 335];

const running = new Map();  // id -> card
const line = [];            // cards that wait for a connection

export const isBusy = () => running.size > 0;
/** `id` is a request's, or that of one of its prompts. */
export const progress = ({ id, step, steps }) => {
  const [call, prompt] = id.split(PROMPT_MARK);
  running.get(call)?.step(step, steps, Number(prompt ?? 0));
};

function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(9));
  return `playground-${Array.from(bytes, (byte) => byte.toString(36).padStart(2, "0")).join("")}`;
}

/** The first hue that no request in flight has. */
function freeHue() {
  const taken = new Set([...running.values(), ...line].map((card) => card.entry.hue));
  return HUES.find((hue) => !taken.has(hue)) ?? HUES[(running.size + line.length) % HUES.length];
}

function showNextHue() { $("run").querySelector(".swatch").style.setProperty("--hue", freeHue()); }

const does = {
  run: (entry, isNew = false) => {
    viewer.close();
    enqueue({ ...entry, body: isNew ? { ...entry.body, seed: draw() } : entry.body });
  },
  startFrom: async (source) => {
    viewer.close();
    try {
      await inputs.startFrom(await (await fetch(source)).blob());
      $("start-from").scrollIntoView({ block: "nearest" });
    } catch (error) {
      say(error.message);
    }
  },
  remove: (card) => {
    gallery.forget(card.entry.id);
    card.node.remove();
  },
  stop,
};

/** Puts a request to a URL in line, with a card of its own under a title. */
export function enqueue({ url, body, files, title }) {
  const card = new Card({ id: newId(), url, body, files, title, images: [], made: Date.now(), hue: freeHue() }, does);
  card.abort = new AbortController();
  card.begin();
  $("cards").prepend(card.node);
  line.push(card);
  advance();
}

function advance() {
  while (running.size < MOST_AT_ONCE && line.length) run(line.shift());
  showNextHue();
}

async function run(card) {
  const { entry } = card;
  running.set(entry.id, card);
  for (const [id, prompt] of parts(entry)) loom.colour(id, entry.hue, prompt);
  loom.look();
  try {
    const asked = { ...entry.body, previews: PREVIEWS };
    for await (const [name, data] of stream(entry.id, { ...entry, body: asked }, card.abort.signal)) take(card, name, data);
    if (!entry.images.length) throw new Error(entry.failed?.[0] ?? "the service ended without an image");
    if (entry.withheld) entry.news += ` · ${entry.withheld} withheld by the safety checker`;
    if (entry.failed) entry.news += ` · ${entry.failed.length} of ${entry.body.prompts.length} failed: ${entry.failed[0]}`;
    card.end();
    announce(`finished: ${entry.title}`);
    await gallery.keep(entry);
  } catch (error) {
    fail(card, error);
  } finally {
    running.delete(entry.id);
    advance();
  }
}

/** Names of what runs for a request: itself, or one for each of its prompts. */
function parts({ id, title, body }) {
  return body.prompts ? body.prompts.map((prompt, index) => [`${id}${PROMPT_MARK}${index}`, prompt]) : [[id, title]];
}

function take(card, name, data) {
  const { entry } = card, { prompt_index: prompt = 0 } = data;
  if (name === "error" && data.prompt_index === undefined) throw new ServiceError(0, data.error, null);
  if (name === "error") {
    entry.failed = [...(entry.failed ?? []), data.error.message];
    return;
  }
  if (data.content_filtered) {
    entry.withheld = (entry.withheld ?? 0) + 1;
    return;
  }
  const source = `data:image/${data.output_format};base64,${data.b64_json}`;
  const index = prompt * entry.body.n + data.image_index;
  card.image(index, source);
  if (name.endsWith("partial_image")) {
    card.step(data.step, data.steps, prompt);
    return;
  }
  entry.images[index] = source;
  entry.size = data.size;
  const { total_s, batch_share } = data.timings;
  entry.news = `${total_s.toFixed(2)} s · ${Math.round(batch_share * 100)} % of the batch`;
}

function fail(card, error) {
  card.entry.images = [];
  card.entry.news = "";
  const isCancelled = error.name === "AbortError" || error.code === "request_cancelled";
  card.wait(isCancelled ? "cancelled" : "no image");
  card.tell(isCancelled ? "" : error.message, !isCancelled);
  card.end();
  announce(isCancelled ? "cancelled" : `failed: ${error.message}`);
  if (error.status === 429) card.offerRetry(error.retryAfterS ?? 1);
  if (error.status === 401) askForKey(error.message);
}

export async function stop(card) {
  const index = line.indexOf(card);
  if (index >= 0) {
    line.splice(index, 1);
    fail(card, { name: "AbortError" });
    showNextHue();
    return;
  }
  card.tell("cancelling");
  try {
    await cancel(card.entry.id);
  } catch {
    card.abort.abort();  // it has not been accepted yet: leaving does the same
  }
}

/** Stops the request that was started last. */
export function stopLatest() {
  const latest = line.at(-1) ?? [...running.values()].at(-1);
  if (latest) stop(latest);
}

export async function showGallery() {
  for (const entry of await gallery.all()) {
    const card = new Card(entry, does);
    $("cards").append(card.node);
    card.end();
  }
  showNextHue();
}
