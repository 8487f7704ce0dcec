// The JavaScript clients, one by its name: node clients.mjs NAME URL. Prints one line of JSON for the test to judge.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { InferenceClient } from "@huggingface/inference";
import { generateImage } from "ai";
import OpenAI from "openai";

const [name, url] = process.argv.slice(2);
const prompt = "a red apple on a blue background";
const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const size = (base64) => Buffer.from(base64, "base64").readUInt32BE(16); // a PNG's width

const clients = {
  async openai() {
    const { data } = await openai.images.generate({ prompt, model: "gpt-image-1", size: "1024x1024", n: 2, user: "x" });
    return data.map((image) => size(image.b64_json));
  },
  async stream() {
    const events = [];
    for await (const event of await openai.images.generate({ prompt, stream: true, partial_images: 2 })) {
      events.push([event.type, size(event.b64_json)]);
    }
    return events;
  },
  async refused() {
    try {
      await openai.images.generate({ prompt, num_inference_steps: 50 });
    } catch (error) {
      return [error.status, error.code, error.param, error.requestID.length > 0];
    }
  },
  async models() {
    const found = [];
    for await (const model of openai.models.list()) found.push(model.id);
    return found;
  },
  async ai() {
    const model = createOpenAICompatible({ name: "sdxl", baseURL: `${url}/v1` }).imageModel("4step-unet");
    const { images } = await generateImage({ model, prompt, n: 2, size: "1024x1024", providerOptions: { sdxl: { seed: 7 } } });
    return images.map((image) => [image.mediaType, size(image.base64)]);
  },
  async huggingface() {
    const client = new InferenceClient("none").endpoint(url);
    const blob = await client.textToImage({ inputs: prompt, parameters: { seed: 7, num_inference_steps: 2 } });
    return [blob.type, size(Buffer.from(await blob.arrayBuffer()).toString("base64"))];
  },
  async huggingfaceRefused() {
    try {
      await new InferenceClient("none").endpoint(url).textToImage({ inputs: prompt, parameters: { num_inference_steps: 50 } });
    } catch (error) {
      return error.message;
    }
  },
};

console.log(JSON.stringify(await clients[name]()));
