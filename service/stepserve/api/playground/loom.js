// The running batch, drawn: a column for each forward of the denoiser, a cell for each of its rows.

import { getJson } from "./api.js";
import { $ } from "./page.js";

const BUSY_MS = 250, IDLE_MS = 1000, COLUMN = 10, GAP = 2, MOST_COLUMNS = 400, KEPT_BY_SERVICE = 64, CELL_PX = 14;
/** What a replica tries before it serves is nobody's request. */
const WARM_UP = /^warm-up-/;
const NOT_THE_DENOISER = /^(text_encoder|image_encoder|vae)/;

const OF_OTHERS = "#6b7582", FAINT = "rgb(255 255 255 / .18)";

const columns = [];        // {requests: [{id, rows}], padded, skipped: [id]}
const seen = new Map();    // model and replica -> number of the latest forward
const own = new Map();     // id -> {hue, prompt}
let timer = null, isLooking = false, pointedAt = null;
let page = { model: () => null, isBusy: () => false, progress: () => {}, lost: () => {} };

/** Own requests have a colour and a name; those of others are grey. */
export function colour(id, hue, prompt) { own.set(id, { hue, prompt }); }

const tint = (id) => (own.has(id) ? `oklch(0.76 0.15 ${own.get(id).hue})` : OF_OTHERS);

function take(batch) {
  const news = { requests: [], limit: 0, last: null };
  batch.replicas.forEach((replica, index) => {
    const key = `${batch.model} ${index}`;
    const fresh = replica.forwards.filter(({ number }) => isNew(key, number));
    if (replica.forwards.length) seen.set(key, replica.forwards.at(-1).number);
    for (const forward of fresh.filter(isOfRequests)) {
      columns.push({ requests: forward.requests, padded: forward.padded_rows, skipped: forward.skipped });
      news.last = forward;
    }
    news.requests.push(...replica.requests);
    news.limit = Math.max(news.limit, replica.row_limit);
  });
  columns.splice(0, Math.max(0, columns.length - MOST_COLUMNS));
  return news;
}

const isOfRequests = ({ module, requests }) =>
  !NOT_THE_DENOISER.test(module) && !requests.every(({ id }) => WARM_UP.test(id ?? ""));

/** A replica that started anew counts from 1 again. */
function isNew(key, number) {
  const before = seen.get(key) ?? 0;
  return number > before || number + KEPT_BY_SERVICE <= before;
}

function prepare(canvas) {
  const scale = devicePixelRatio || 1, { width, height } = canvas.getBoundingClientRect();
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  return [context, width, height];
}

function drawAll() {
  const [context, width, height] = prepare($("weave"));
  const shown = columns.slice(-Math.floor(width / (COLUMN + GAP)));
  const cell = Math.min(CELL_PX, height / Math.max(8, ...shown.map(cellsOf)));
  drawRuling(context, width, height, cell);
  shown.forEach((column, index) => {
    drawColumn(context, column, width - (shown.length - index) * (COLUMN + GAP), height, cell);
  });
}

const cellsOf = ({ requests, padded, skipped }) => requests.reduce((sum, { rows }) => sum + rows, padded + skipped.length);

/** An empty grid, so that it is seen where rows would be. */
function drawRuling(context, width, height, cell) {
  context.fillStyle = "rgb(255 255 255 / .045)";
  const inner = Math.max(cell - 2, 1);
  for (let x = width - COLUMN - GAP; x > -COLUMN; x -= COLUMN + GAP) {
    for (let y = height - cell; y > -1; y -= cell) context.fillRect(x, y, COLUMN, inner);
  }
}

/** Rows are filled, steps that took none are hollow, and what only fills the forward up is hollow and faint. */
function drawColumn(context, { requests, padded, skipped }, x, height, cell) {
  const inner = Math.max(cell - 2, 1);
  let y = height;
  const hollow = (colour) => {
    context.strokeStyle = colour;
    context.strokeRect(x + 0.5, (y -= cell) + 0.5, COLUMN - 1, inner - 1);
  };
  const of = (id) => (context.globalAlpha = pointedAt && pointedAt !== id ? 0.22 : 1);
  for (const { id, rows } of requests) {
    of(id);
    context.fillStyle = tint(id);
    for (let row = 0; row < rows; row++) context.fillRect(x, (y -= cell), COLUMN, inner);
  }
  for (const id of skipped) {
    of(id);
    hollow(tint(id));
  }
  context.globalAlpha = 1;
  for (let row = 0; row < padded; row++) hollow(FAINT);
}

function lane({ id, state, step, steps, rows, skipped }) {
  const item = Object.assign(document.createElement("li"), { className: "lane" });
  const name = document.createElement("span"), told = document.createElement("b");
  name.textContent = own.get(id)?.prompt ?? "somebody else's";
  told.textContent = state === "running" ? `${step}/${steps} ×${rows}${skipped ? ` · ${skipped} skipped` : ""}` : state;
  told.title = `step ${step} of ${steps}, ${skipped} of them skipped, ${rows} rows of a forward`;
  item.append(name, told, document.createElement("i"));
  item.style.setProperty("--tint", tint(id));
  item.style.setProperty("--done", `${(100 * step) / Math.max(steps, 1)}%`);
  return item;
}

function tell({ requests, last, limit }) {
  $("lanes").replaceChildren(...requests.map(lane));
  if (!requests.length) return void ($("loom-facts").textContent = "nothing is running");
  if (!last) return;
  const many = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
  $("loom-facts").textContent = `${many(last.requests.length, "request")} · ${last.rows} of ${limit} rows · ${(last.seconds * 1000).toFixed(0)} ms`;
}

const mayLook = () => !document.hidden && page.model()?.ready && (page.isBusy() || $("loom").open);

/** Looks now, and goes on while there is something to see. */
export async function look() {
  clearTimeout(timer);
  timer = null;
  if (isLooking || !mayLook()) return;
  isLooking = true;
  let isActive = false;
  try {
    const news = take(await getJson(`/v1/models/${encodeURIComponent(page.model().id)}/batch`));
    for (const request of news.requests) if (request.id) page.progress(request);
    isActive = news.requests.length > 0;
    tell(news);
    drawAll();
  } catch {
    page.lost();  // errors of requests are told where they are made
  } finally {
    isLooking = false;
    timer = setTimeout(look, isActive || page.isBusy() ? BUSY_MS : IDLE_MS);
  }
}

/** Looks soon, unless that is going to happen anyway. */
export function wake() { if (!timer) look(); }

/** Points one request out, or none. */
export function point(id) {
  const shown = columns.some(({ requests }) => requests.some((request) => request.id === id)) ? id : null;
  if (pointedAt === shown) return;
  pointedAt = shown;
  drawAll();
}

/** `parts`: the model looked at, whether own requests run, who hears of progress and of failure. */
export function setUp(parts) {
  page = parts;
  addEventListener("resize", drawAll);
  document.addEventListener("visibilitychange", look);
  $("loom").addEventListener("toggle", () => { drawAll(); look(); });
  drawAll();
}
