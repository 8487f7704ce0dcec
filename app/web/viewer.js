// One picture, large, with what drew it, and ways to pass it on.

import { key } from "./api.js";
import { asCurl, asPython, toHash } from "./share.js";

const $ = (id) => document.getElementById(id);
let shown = null;

$("close").addEventListener("click", () => $("viewer").close());
$("copy-curl").addEventListener("click", () => copy(asCurl(shown.body, !!key.get()), "The curl command"));
$("copy-python").addEventListener("click", () => copy(asPython(shown.body, !!key.get()), "The Python code"));
$("copy-link").addEventListener("click", () => {
  const one = { ...shown.settings, steps: String(shown.body.steps), count: "1" };
  copy(location.href.split("#")[0] + toHash(one), "The link");
});

/** Calls back with a picture's settings when they are to be used again. */
export function onUse(callback) {
  $("use").addEventListener("click", () => {
    $("viewer").close();
    callback(shown.settings);
  });
}

/** Shows { blob, body, facts, settings }. */
export function view(picture) {
  shown = picture;
  const { facts, body } = picture;
  const url = URL.createObjectURL(picture.blob);
  $("viewer-title").textContent = body.prompt;
  Object.assign($("viewer-picture"), { src: url, alt: body.prompt });
  const told = { Steps: facts.steps, Seed: facts.seed, Variant: facts.variant, Size: facts.size, Time: `${facts.milliseconds} ms` };
  $("viewer-facts").replaceChildren(...Object.entries(told).map(([name, value]) => pair(name, value)));
  Object.assign($("download"), { href: url, download: `${facts.variant}-${facts.seed}.png` });
  $("copied").textContent = "";
  $("viewer").addEventListener("close", () => URL.revokeObjectURL(url), { once: true });
  $("viewer").showModal();
}

function pair(name, value) {
  const both = document.createElement("div");
  const of = (kind, text) => Object.assign(document.createElement(kind), { textContent: text });
  both.append(of("dt", name), of("dd", value));
  return both;
}

async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    $("copied").textContent = `${what} is on the clipboard.`;
  } catch {
    $("copied").textContent = text; // without https there is no clipboard
  }
}
