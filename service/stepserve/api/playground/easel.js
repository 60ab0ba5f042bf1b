// The image to start from, and the mask painted over it: white is to be repainted.

import { $ } from "./page.js";

const PAINT = "#ff5fa2", READ_OFTEN = { willReadFrequently: true };

let file = null, isErasing = false, last = null;

export function hasImage() { return file !== null; }

/** The image and, if something is painted, the mask: as files. */
export async function files() {
  if (!file) return {};
  return { image: file, mask: isPainted() ? await maskFile() : null };
}

export function remove() {
  file = null;
  $("file").value = "";
  $("editor").hidden = true;
  $("drop").hidden = false;
}

export async function put(blob) {
  const url = URL.createObjectURL(blob);
  const image = $("input");
  image.src = url;
  try {
    await image.decode();
  } finally {
    URL.revokeObjectURL(url);
  }
  file = blob;
  const canvas = $("mask");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  clear();
  $("editor").hidden = false;
  $("drop").hidden = true;
}

function clear() {
  const canvas = $("mask");
  canvas.getContext("2d", READ_OFTEN).clearRect(0, 0, canvas.width, canvas.height);
  explain();
}

/** Looked up, not kept: what was painted may have been erased again. */
function isPainted() {
  const canvas = $("mask");
  const { data } = canvas.getContext("2d", READ_OFTEN).getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 3; i < data.length; i += 4) if (data[i] > 127) return true;
  return false;
}

function explain() {
  $("mask-hint").textContent = isPainted()
    ? "Only what is painted changes."
    : "Nothing is painted: the whole image changes. Paint to change only a part.";
}

function maskFile() {
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

/** `say` tells the person what is wrong with a file. */
export function setUp(say) {
  const take = (files) => {
    if ($("start-from").hidden || !files?.length) return;
    const image = [...files].find((each) => each.type.startsWith("image/"));
    const taken = image ? put(image) : Promise.reject(new Error("no image"));
    taken.then(() => say(""), () => {
      remove();
      say("That file cannot be read as an image.");
    });
  };
  const drop = $("start-from"), canvas = $("mask");
  $("file").addEventListener("change", (event) => take(event.target.files));
  for (const name of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      $("drop").classList.toggle("over", name === "dragover");
      if (name === "drop") take(event.dataTransfer.files);
    });
  }
  addEventListener("paste", (event) => take(event.clipboardData?.files));
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    last = null;
    dab(event);
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, explain);
  canvas.addEventListener("pointermove", (event) => { if (event.buttons) dab(event); });
  $("paint").addEventListener("click", () => choose(false));
  $("erase").addEventListener("click", () => choose(true));
  $("unmask").addEventListener("click", clear);
  $("no-input").addEventListener("click", remove);
}
