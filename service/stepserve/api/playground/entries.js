// The fields of one control or reference image: what the chosen model's control or adapter takes.

import { fill } from "./slots.js";

/** What the service makes control images with; a control may have one of its own. */
const PREPROCESSORS = [["canny", "edges (canny)"], ["grey", "shades of grey"], ["invert", "inverted"], ["tile", "blurred (tile)"]];
const AS_IT_IS = "none";

const options = (names = []) => names.map((name) => [name, name]);
const field = (node, name) => node.querySelector(`[name=${name}]`);

/** Shows a field of an entry, or hides it, so that nothing is sent of it. */
function offer(node, name, isTaken) { field(node, name).closest("label").hidden = !isTaken; }

export function prepareControl(node, { controls = [] }) {
  fill(field(node, "name"), options(controls.map(({ name }) => name)));
  const show = () => showControl(node, controls.find(({ name }) => name === field(node, "name").value));
  field(node, "name").onchange = show;
  show();
}

function showControl(node, control) {
  if (!control) return;
  const own = PREPROCESSORS.find(([name]) => name === control.preprocessor)?.[1];
  fill(field(node, "preprocessor"), [["", own ? `as usual: ${own}` : "as usual: taken as it is"], [AS_IT_IS, "taken as it is"], ...PREPROCESSORS]);
  offer(node, "scale", control.takes_scale);
  for (const name of ["start", "end"]) offer(node, name, control.takes_interval);
}

export function prepareReference(node, { ip_adapters: adapters = [] }) {
  fill(field(node, "adapter"), options(adapters));
  offer(node, "adapter", adapters.length > 1);
}
