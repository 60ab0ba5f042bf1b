// A request as a command line, and as Python: both run as they are copied. Files that a request
// brings along are read under the names that its card downloads them with.

const KEY = "STEPSERVE_API_KEY";  // the key itself is never copied
const OWN = [
  "negative_prompt", "num_inference_steps", "guidance_scale", "scheduler", "seed", "adapters", "strength", "class_label",
  "image_guidance_scale", "hires", "step_cache",
];
/** OpenAI's client has a call for these, with files in these fields. */
const CALLS = { generations: "generate", edits: "edit", variations: "create_variation" };
const THEIR_FILES = { generations: [], edits: ["image", "mask"], variations: ["image"] };

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
const asText = (value) => (typeof value === "string" ? value : JSON.stringify(value));

function told(body) {
  const { stream, previews, ...rest } = body;
  return rest;
}

export function asCurl({ url, body, files }, hasKey) {
  return [
    `curl -s ${location.origin}/v1/images/${url}`,
    ...(hasKey ? [`-H "Authorization: Bearer $${KEY}"`] : []),
    ...(files.length ? formOf(body, files) : [`-H 'Content-Type: application/json'`, `-d ${quoted(JSON.stringify(told(body)))}`]),
    "-o answer.json",
  ].join(" \\\n  ");
}

/** `--form-string`, as `-F` would take a prompt that begins with @ or < for a file. */
function formOf(body, files) {
  return [
    ...files.map(({ field, name }) => `-F ${field}=@${name}`),
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

/** With OpenAI's client where that has a call for it, else as plain HTTP. */
export function asPython(entry, hasKey) {
  const { url, body, files } = entry;
  const isTheirs = url in CALLS && files.every(({ field }) => THEIR_FILES[url].includes(field)) && (body.prompt || url === "variations");
  return isTheirs ? withOpenai(entry, hasKey) : withHttpx(entry, hasKey);
}

/** A form has no lists: its nested values are JSON. */
const inForm = (fields) => fields.map(([name, value]) => [name, typeof value === "object" ? JSON.stringify(value) : value]);

const imports = (hasKey, library) => `import base64\n${hasKey ? "import os\n" : ""}\nimport ${library}\n\n`;

const opened = ({ name }) => `open(${JSON.stringify(name)}, "rb")`;

/** One file, or a list where there are several in a field. */
function filesOf(files, field) {
  const own = files.filter((file) => file.field === field).map(opened);
  if (!own.length) return [];
  return [`${field}=${own.length > 1 ? `[${own.join(", ")}]` : own[0]}`];
}

function withOpenai({ url, body, files }, hasKey) {
  const fields = Object.entries(told(body));
  const own = fields.filter(([name]) => OWN.includes(name));
  const given = [
    ...filesOf(files, "image"), ...filesOf(files, "mask"),
    ...fields.filter(([name]) => !OWN.includes(name)).map(([name, value]) => `${name}=${python(value)}`),
    `extra_body=${python(Object.fromEntries(files.length ? inForm(own) : own))}`,
  ];
  const key = hasKey ? `os.environ["${KEY}"]` : '"unused"';
  return `${imports(hasKey, "openai")}client = openai.OpenAI(base_url=${JSON.stringify(`${location.origin}/v1`)}, api_key=${key})
answer = client.images.${CALLS[url]}(
${given.map((line) => `    ${line},\n`).join("")})
for i, image in enumerate(answer.data):
    open(f"image-{i}.png", "wb").write(base64.b64decode(image.b64_json))
`;
}

function withHttpx({ url, body, files }, hasKey) {
  const fields = Object.entries(told(body));
  const given = [
    JSON.stringify(`${location.origin}/v1/images/${url}`),
    ...(hasKey ? [`headers={"Authorization": f"Bearer {os.environ['${KEY}']}"}`] : []),
    files.length ? `data=${python(Object.fromEntries(inForm(fields)))}` : `json=${python(Object.fromEntries(fields))}`,
    ...(files.length ? [`files=[${files.map((file) => `("${file.field}", ${opened(file)})`).join(", ")}]`] : []),
    "timeout=None",
  ];
  return `${imports(hasKey, "httpx")}answer = httpx.post(
${given.map((line) => `    ${line},\n`).join("")})
answer.raise_for_status()
for i, image in enumerate(answer.json()["data"]):
    if "b64_json" in image:
        open(f"image-{i}.png", "wb").write(base64.b64decode(image["b64_json"]))
`;
}
