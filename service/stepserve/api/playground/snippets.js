// A request as a command line, and as Python: both run as they are copied. A request that began
// with an image reads it from input.png (and mask.png), which its card downloads.

const KEY = "STEPSERVE_API_KEY";  // the key itself is never copied
const OWN = ["negative_prompt", "num_inference_steps", "guidance_scale", "scheduler", "seed", "adapters", "strength"];

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
const asText = (value) => (typeof value === "string" ? value : JSON.stringify(value));

function told(body) {
  const { stream, previews, ...rest } = body;
  return rest;
}

export function asCurl(body, files, hasKey) {
  const path = files.image ? "edits" : "generations";
  return [
    `curl -s ${location.origin}/v1/images/${path}`,
    ...(hasKey ? [`-H "Authorization: Bearer $${KEY}"`] : []),
    ...(files.image ? formOf(body, files) : [`-H 'Content-Type: application/json'`, `-d ${quoted(JSON.stringify(told(body)))}`]),
    "-o answer.json",
  ].join(" \\\n  ");
}

/** `--form-string`, as `-F` would take a prompt that begins with @ or < for a file. */
function formOf(body, files) {
  return [
    "-F image=@input.png",
    ...(files.mask ? ["-F mask=@mask.png"] : []),
    ...Object.entries(told(body)).map(([name, value]) => `--form-string ${quoted(`${name}=${asText(value)}`)}`),
  ];
}

function python(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${python(each)}`).join(", ")}}`;
  }
  return JSON.stringify(value);
}

export function asPython(body, files, hasKey) {
  const fields = Object.entries(told(body));
  const usual = fields.filter(([name]) => !OWN.includes(name)).map(([name, value]) => `${name}=${python(value)}`);
  // A form has no lists: its nested values are JSON.
  const own = fields.filter(([name]) => OWN.includes(name))
    .map(([name, value]) => [name, files.image && typeof value === "object" ? JSON.stringify(value) : value]);
  const given = [
    ...(files.image ? ['image=open("input.png", "rb")'] : []),
    ...(files.mask ? ['mask=open("mask.png", "rb")'] : []),
    ...usual,
    `extra_body=${python(Object.fromEntries(own))}`,
  ];
  const key = hasKey ? `os.environ["${KEY}"]` : '"unused"';
  return `import base64
${hasKey ? "import os\n" : ""}
import openai

client = openai.OpenAI(base_url=${JSON.stringify(`${location.origin}/v1`)}, api_key=${key})
answer = client.images.${files.image ? "edit" : "generate"}(
${given.map((line) => `    ${line},\n`).join("")})
for i, image in enumerate(answer.data):
    open(f"image-{i}.png", "wb").write(base64.b64decode(image.b64_json))
`;
}
