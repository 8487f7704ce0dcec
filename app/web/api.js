// What the page asks of the server: requests with the key, problems as sentences, pictures with previews on their way.

const KEY = "sdxl-lightning-key";

/** A request that was not served. sentence: for a reader. seconds: until it may be sent again, if the server said so. */
export class Problem extends Error {
  constructor(status, sentence, seconds) {
    super(sentence);
    Object.assign(this, { status, sentence, seconds });
  }
}

export const key = {
  get: () => localStorage.getItem(KEY),
  set: (value) => localStorage.setItem(KEY, value),
};

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, "The server cannot be reached.", 3);
  }
  if (!answer.ok) throw await problemOf(answer);
  return answer;
}

async function problemOf(answer) {
  const body = await answer.json().catch(() => ({}));
  const detail = body.detail ?? body.error?.message ?? answer.statusText;
  const seconds = Number(answer.headers.get("retry-after")) || null;
  return new Problem(answer.status, asSentence(String(detail)), seconds);
}

function asSentence(text) {
  const trimmed = text.trim();
  return trimmed.charAt(0).toUpperCase() + trimmed.slice(1) + (/[.!?]$/.test(trimmed) ? "" : ".");
}

export const getJson = async (path) => (await ask(path)).json();

/** The JSON of a path, or null where the server has no such thing. */
export async function getIfThere(path) {
  try {
    return await getJson(path);
  } catch (problem) {
    if (problem.status === 404) return null;
    throw problem;
  }
}

/**
 * Draws. body: of POST /generate. onQueued(ahead, seconds), onPreview(index, blob): where body.stream is true. Returns
 * the answer's JSON. Aborting the signal takes the request out of the server.
 */
export async function draw(body, signal, { onQueued, onPreview }) {
  const headers = { "content-type": "application/json", accept: body.stream ? "text/event-stream" : "application/json" };
  const answer = await ask("generate", { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!body.stream) return answer.json();
  for await (const { event, data } of events(answer.body)) {
    if (event === "queued") onQueued(data.ahead, data.starts_in_s);
    if (event === "preview") onPreview(data.index, blobOf(data.b64_json, "image/png"));
    if (event === "result") return data;
    if (event === "error") throw new Problem(data.status, asSentence(data.detail), data.retry_after ?? null);
  }
  throw new Problem(0, "The server's answer ended early.", 1);
}

/** The events of a text/event-stream, with their data parsed. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value.replaceAll("\r", "");
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const lines = part.split("\n");
      const of = (name) => lines.filter((line) => line.startsWith(`${name}:`)).map((line) => line.slice(name.length + 1).trim());
      const data = of("data").join("\n");
      if (data) yield { event: of("event")[0] ?? "message", data: JSON.parse(data) };
    }
  }
}

export function blobOf(base64, type) {
  return new Blob([Uint8Array.from(atob(base64), (char) => char.charCodeAt(0))], { type });
}

export function base64Of(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
