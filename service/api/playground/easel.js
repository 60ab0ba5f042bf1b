// The picture to start from, and the mask painted over it: white is to be repainted.

const $ = (id) => document.getElementById(id);
const PAINT = "#ff7a59";

let file = null, isErasing = false, isPainted = false, last = null;

export function hasPicture() { return file !== null; }

/** The picture and, if something is painted, the mask: as files. */
export async function files() {
  if (!file) return {};
  return { image: file, mask: isPainted ? await maskFile() : null };
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
  await image.decode();
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
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
  isPainted = false;
}

function maskFile() {
  const painted = $("mask");
  const canvas = new OffscreenCanvas(painted.width, painted.height);
  const context = canvas.getContext("2d");
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
  const context = $("mask").getContext("2d");
  context.globalCompositeOperation = isErasing ? "destination-out" : "source-over";
  context.strokeStyle = PAINT;
  context.lineCap = "round";
  context.lineWidth = Number($("brush").value) * scale;
  context.beginPath();
  context.moveTo(...(last ?? [x, y]));
  context.lineTo(x, y);
  context.stroke();
  last = [x, y];
  isPainted = true;
}

function choose(erasing) {
  isErasing = erasing;
  $("paint").setAttribute("aria-pressed", String(!erasing));
  $("erase").setAttribute("aria-pressed", String(erasing));
}

/** `say` tells the person what is wrong with a file. */
export function setUp(say) {
  const take = (files) => {
    const picture = [...(files ?? [])].find((each) => each.type.startsWith("image/"));
    if (picture) put(picture).catch(() => say("That file cannot be read as a picture."));
  };
  const drop = $("drop"), canvas = $("mask");
  $("file").addEventListener("change", (event) => take(event.target.files));
  for (const name of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", name === "dragover");
      if (name === "drop") take(event.dataTransfer.files);
    });
  }
  addEventListener("paste", (event) => take(event.clipboardData?.files));
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    last = null;
    dab(event);
  });
  canvas.addEventListener("pointermove", (event) => { if (event.buttons) dab(event); });
  $("paint").addEventListener("click", () => choose(false));
  $("erase").addEventListener("click", () => choose(true));
  $("unmask").addEventListener("click", clear);
  $("no-input").addEventListener("click", remove);
}
