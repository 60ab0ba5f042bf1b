// What users of Vercel's AI SDK do with images. Prints what came of it as JSON.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateImage } from "ai";

const baseURL = process.env.URL;
const file = Buffer.from(process.env.IMAGE, "base64");
const openai = createOpenAI({ baseURL, apiKey: "unused" });
const compatible = createOpenAICompatible({ name: "stepserve", baseURL, apiKey: "unused" });
const told = { generated: [], edited: [], warnings: [] };

async function draw(model, prompt, options = {}) {
  const answer = await generateImage({ model, prompt, maxRetries: 0, ...options });
  told.warnings.push(...answer.warnings.map((warning) => warning.type));
  return answer.images.map((image) => image.base64);
}

for (const models of [openai, compatible]) {
  const image = (name) => (models.image ?? models.imageModel)(name);
  for (const name of ["gpt-image-1", "dall-e-3"]) {
    const options = { size: "64x64", n: 2 };
    if (models === openai) options.providerOptions = { openai: { quality: "high", user: "u" } };
    told.generated.push((await draw(image(name), "cat", options)).length);
  }
  const edited = await draw(image("gpt-image-1"), { text: "blue", images: [file], mask: file });
  told.edited.push(edited.length);
}
const own = { seed: 5, num_inference_steps: 4, unheard_of: 1 };
told.own = (
  await draw(compatible.imageModel("emoji"), "cat", { providerOptions: { stepserve: own } })
).length;
try {
  await draw(openai.image("gpt-image-1"), "cat", { size: "7x7" });
} catch (error) {
  told.refused = [error.statusCode, /size 7x7 is not accepted/.test(error.message)];
}
console.log(JSON.stringify(told));
