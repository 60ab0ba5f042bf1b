// Requests of this page: the line they wait in, and what becomes of each.

import { cancel, ServiceError, stream } from "./api.js";
import { Card } from "./card.js";
import * as easel from "./easel.js";
import { askForKey } from "./form.js";
import * as gallery from "./gallery.js";
import * as loom from "./loom.js";
import { $, announce, draw } from "./page.js";
import * as viewer from "./viewer.js";

// Browsers keep six connections to a host; one is left for looking and cancelling.
const MOST_AT_ONCE = 5, PREVIEWS = 8;
/** Told apart on black and on white, neighbours most of all. */
const HUES = [230, 75, 0, 150, 300, 45, 190, 270, 120, 335];

const running = new Map();  // id -> card
const line = [];            // cards that wait for a connection

export const isBusy = () => running.size > 0;
export const progress = ({ id, step, steps }) => running.get(id)?.step(step, steps);

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
    enqueue(isNew ? { ...entry.body, seed: draw() } : entry.body, entry.files);
  },
  startFrom: async (source) => {
    viewer.close();
    await easel.put(await (await fetch(source)).blob());
    $("start-from").scrollIntoView({ block: "nearest" });
  },
  remove: (card) => {
    gallery.forget(card.entry.id);
    card.node.remove();
  },
  stop,
};

/** Puts a request in line, with a card of its own. */
export function enqueue(request, files = {}) {
  const card = new Card({ id: newId(), body: request, files, images: [], made: Date.now(), hue: freeHue() }, does);
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
  loom.colour(entry.id, entry.hue, entry.body.prompt);
  loom.look();
  try {
    const asked = { ...entry.body, previews: PREVIEWS };
    for await (const [name, data] of stream(entry.id, asked, entry.files, card.abort.signal)) take(card, name, data);
    if (!entry.images.length) throw new Error("the service ended without an image");
    if (entry.withheld) entry.news += ` · ${entry.withheld} withheld by the safety checker`;
    card.end();
    announce(`finished: ${entry.body.prompt}`);
    await gallery.keep(entry);
  } catch (error) {
    fail(card, error);
  } finally {
    running.delete(entry.id);
    advance();
  }
}

function take(card, name, data) {
  if (name === "error") throw new ServiceError(0, data.error, null);
  const { entry } = card;
  if (data.content_filtered) {
    entry.withheld = (entry.withheld ?? 0) + 1;
    return;
  }
  const source = `data:image/${data.output_format};base64,${data.b64_json}`;
  card.image(data.image_index, source);
  if (name.endsWith("partial_image")) {
    card.step(data.step, data.steps);
    return;
  }
  entry.images[data.image_index] = source;
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
