// The mask, painted over the first image: white is to be repainted.

import { $ } from "./page.js";

const PAINT = "#ff5fa2", READ_OFTEN = { willReadFrequently: true };

let shown = null, mayPaint = false, painted = false, isErasing = false, last = null, told = () => "";

/** Shows an image, or none, to be painted over where the model takes a mask. Over another image nothing is painted. */
export async function show(entry, isMaskTaken) {
  mayPaint = isMaskTaken;
  for (const node of document.querySelectorAll(".of-mask")) node.hidden = !isMaskTaken;
  $("editor").hidden = !entry;
  if (entry && entry !== shown) {
    shown = entry;
    painted = false;
    const image = $("input"), canvas = $("mask");
    image.src = entry.url;
    await image.decode();
    if (shown !== entry) return;
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    clear();
  }
  shown = entry ?? null;
  explain();
}

function clear() {
  const canvas = $("mask");
  canvas.getContext("2d", READ_OFTEN).clearRect(0, 0, canvas.width, canvas.height);
  changed();
}

export const isPainted = () => painted && shown !== null && mayPaint;

/** After each stroke, as it may have erased what was painted. Large images take a while. */
function look() {
  const canvas = $("mask");
  const { data } = canvas.getContext("2d", READ_OFTEN).getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 3; i < data.length; i += 4) if (data[i] > 127) return true;
  return false;
}

function explain() { $("mask-hint").textContent = told(isPainted()); }

function changed() {
  painted = look();
  explain();
  $("mask").dispatchEvent(new Event("input", { bubbles: true }));
}

export function maskFile() {
  const painted = $("mask");
  const canvas = new OffscreenCanvas(painted.width, painted.height);
  const context = canvas.getContext("2d", READ_OFTEN);
  context.drawImage(painted, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    pixels.data.fill(pixels.data[i + 3] > 127 ? 255 : 0, i, i + 3);
    pixels.data[i + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
  return canvas.convertToBlob({ type: "image/png" });
}

function place(event) {
  const canvas = $("mask"), box = canvas.getBoundingClientRect();
  const scale = canvas.width / box.width;
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale, scale];
}

function dab(event) {
  const [x, y, scale] = place(event);
  const context = $("mask").getContext("2d", READ_OFTEN);
  context.globalCompositeOperation = isErasing ? "destination-out" : "source-over";
  context.strokeStyle = PAINT;
  context.lineCap = "round";
  context.lineWidth = Number($("brush").value) * scale;
  context.beginPath();
  context.moveTo(...(last ?? [x, y]));
  context.lineTo(x, y);
  context.stroke();
  last = [x, y];
}

function choose(erasing) {
  isErasing = erasing;
  $("paint").setAttribute("aria-pressed", String(!erasing));
  $("erase").setAttribute("aria-pressed", String(erasing));
}

/** `explained` says what happens with the image if something is painted, or if nothing is. */
export function setUp(explained) {
  told = explained;
  const canvas = $("mask");
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    last = null;
    dab(event);
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, changed);
  canvas.addEventListener("pointermove", (event) => { if (event.buttons) dab(event); });
  $("paint").addEventListener("click", () => choose(false));
  $("erase").addEventListener("click", () => choose(true));
  $("unmask").addEventListener("click", clear);
}
