// A request as a command line, and as Python: both run as they are copied.

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
const OWN = ["negative_prompt", "num_inference_steps", "guidance_scale", "scheduler", "seed", "adapters"];

export function asCurl(body, isEdit) {
  const { stream, previews, ...told } = body;
  if (isEdit) {
    const fields = Object.entries(told).map(([name, value]) =>
      `  -F ${quoted(`${name}=${typeof value === "string" ? value : JSON.stringify(value)}`)} \\\n`);
    return `curl -s ${location.origin}/v1/images/edits \\\n  -F image=@input.png \\\n${fields.join("")}  -o answer.json`;
  }
  return `curl -s ${location.origin}/v1/images/generations \\\n  -H 'Content-Type: application/json' \\\n  -d ${quoted(JSON.stringify(told))} \\\n  -o answer.json`;
}

function python(value) {
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (value && typeof value === "object") {
    return `{${Object.entries(value).map(([k, v]) => `${JSON.stringify(k)}: ${python(v)}`).join(", ")}}`;
  }
  return JSON.stringify(value);
}

export function asPython(body, isEdit) {
  const { stream, previews, strength, ...told } = body;
  const usual = Object.entries(told).filter(([name]) => !OWN.includes(name));
  const own = Object.fromEntries(Object.entries({ ...told, ...(isEdit ? { strength } : {}) })
    .filter(([name]) => OWN.includes(name) || name === "strength"));
  const lines = usual.map(([name, value]) => `    ${name}=${python(value)},\n`);
  if (isEdit) lines.unshift('    image=open("input.png", "rb"),\n');
  return `import base64\nimport openai\n\nclient = openai.OpenAI(base_url=${JSON.stringify(`${location.origin}/v1`)}, api_key="unused")\nanswer = client.images.${isEdit ? "edit" : "generate"}(\n${lines.join("")}    extra_body=${python(own)},\n)\nfor i, image in enumerate(answer.data):\n    open(f"picture-{i}.png", "wb").write(base64.b64decode(image.b64_json))\n`;
}
