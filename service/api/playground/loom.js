// The running batch, drawn: a column for each forward of the denoiser, a cell for each of its rows.

import { getJson } from "./api.js";

const POLL_MS = 250, COLUMN = 11, GAP = 2, MOST_COLUMNS = 400;

const columns = [];        // {key, requests: [{id, rows}], padded}
const seen = new Map();    // replica -> latest forward number
let hues = new Map(), timer = null, limit = 32;

/** Which hue an own request has. */
export function colour(id, hue) { hues.set(id, hue); }

function take(batch, onProgress) {
  let rows = 0, requests = 0, share = 0;
  batch.replicas.forEach((replica, index) => {
    limit = Math.max(replica.row_limit, 1);
    const before = seen.get(index) ?? -1;
    for (const forward of replica.forwards) {
      // A replica that started anew counts from 1 again.
      if (forward.number <= before && forward.number + 64 > before) continue;
      seen.set(index, forward.number);
      if (!/^(unet|transformer)\./.test(forward.module)) continue;
      columns.push({ requests: forward.requests, padded: forward.padded_rows });
      rows = forward.rows;
      share = forward.requests.length;
    }
    requests += replica.requests.length;
    for (const request of replica.requests) if (request.id) onProgress(request);
  });
  columns.splice(0, Math.max(0, columns.length - MOST_COLUMNS));
  return { rows, requests, share };
}

function draw() {
  const canvas = document.getElementById("weave");
  const scale = devicePixelRatio || 1, box = canvas.getBoundingClientRect();
  canvas.width = Math.round(box.width * scale);
  canvas.height = Math.round(box.height * scale);
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  const fit = Math.floor(box.width / (COLUMN + GAP));
  const shown = columns.slice(-fit);
  const tallest = Math.max(8, ...shown.map((c) => c.requests.reduce((n, r) => n + r.rows, c.padded)));
  const cell = Math.min(14, (box.height - 8) / tallest);
  const other = getComputedStyle(canvas).getPropertyValue("--soft");
  shown.forEach((column, index) => {
    const x = box.width - (shown.length - index) * (COLUMN + GAP);
    let y = box.height - 4;
    for (const { id, rows } of column.requests) {
      context.fillStyle = hues.has(id) ? `hsl(${hues.get(id)} 82% 56%)` : other;
      for (let row = 0; row < rows; row++) {
        y -= cell;
        context.fillRect(x, y + 1, COLUMN, Math.max(cell - 1, 1));
      }
    }
    context.fillStyle = other;
    context.globalAlpha = 0.25;
    for (let row = 0; row < column.padded; row++) context.fillRect(x, (y -= cell) + 1, COLUMN, cell - 1);
    context.globalAlpha = 1;
  });
}

function tell({ rows, requests, share }) {
  const many = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
  const facts = document.getElementById("loom-facts");
  facts.textContent = requests === 0 ? "nothing is running"
    : `${many(requests, "request")} in hand` + (rows ? ` · last step: ${many(rows, "row")} of ${many(share, "request")} in one forward (room for ${limit})` : "");
}

/** Looks at the batch while `isBusy()`; `onProgress` hears of own requests. */
export function watch(modelOf, isBusy, onProgress) {
  const look = async () => {
    timer = null;
    try {
      const news = take(await getJson(`/v1/models/${modelOf()}/batch`), onProgress);
      tell(news);
      draw();
    } catch { /* the next look may succeed; errors are told where requests are made */ }
    if (isBusy() && !document.hidden) timer = setTimeout(look, POLL_MS);
  };
  addEventListener("resize", draw);
  document.addEventListener("visibilitychange", () => { if (!document.hidden && isBusy() && !timer) look(); });
  return () => { if (!timer) timer = setTimeout(look, 0); };
}
