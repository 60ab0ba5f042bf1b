// What users of OpenAI's client in JavaScript do with images. Prints what came of it as JSON.
import OpenAI, { toFile } from "openai";
const ai = new OpenAI({ baseURL: process.env.URL, apiKey: "unused", maxRetries: 0 });
const bytes = Buffer.from(process.env.IMAGE, "base64");
const file = () => toFile(bytes, "a.png", { type: "image/png" });
const told = {};
const answer = await ai.images.generate({ prompt: "cat", n: 2, seed: 5 });
told.generated = answer.data.map((image) => atob(image.b64_json));
told.streamed = [];
const stream = await ai.images.generate({ prompt: "cat", stream: true, partial_images: 2 });
for await (const event of stream) told.streamed.push(event.type);
const edited = await ai.images.edit({ image: await file(), mask: await file(), prompt: "blue" });
told.edited = edited.data.length;
told.editStreamed = [];
const edits = await ai.images.edit({ image: await file(), prompt: "blue", stream: true });
for await (const event of edits) told.editStreamed.push(event.type);
const varied = await ai.images.createVariation({ image: await file(), response_format: "url" });
told.varied = varied.data[0].url.includes("/v1/results/");
told.models = (await ai.models.list()).data.map((model) => model.id);
try {
  await ai.images.generate({ prompt: "cat", n: 99 });
} catch (error) {
  told.refused = [error.status, error.code, error.param];
}
console.log(JSON.stringify(told));
