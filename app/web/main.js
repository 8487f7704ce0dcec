// The page: what is typed becomes requests, and what comes back is shown, kept and shared.

import { Problem, base64Of, blobOf, draw, getIfThere, getJson, key } from "./api.js";
import * as gallery from "./gallery.js";
import { fromLink } from "./share.js";
import { suggestions } from "./suggest.js";
import { onUse, view } from "./viewer.js";

const PAUSE_MS = 250; // after a keystroke, before the server is asked
const $ = (id) => document.getElementById(id);

const server = { steps: [4], variants: [], styles: [], vocabulary: null, streams: false, takesPictures: false };
let running = null; // AbortController of what is being drawn
let waiting = 0; // timer of the countdown
let dropped = null; // { base64, url } of a picture to start from

start();

async function start() {
  $("count").append(...[1, 2, 3, 4, 6, 8].map((n) => new Option(n, n)));
  listen();
  for (;;) {
    try {
      await meet();
      break;
    } catch (problem) {
      if (problem.status === 401) await askForKey();
      else {
        $("server").textContent = problem.sentence ?? "The server cannot be reached.";
        await new Promise((resolve) => setTimeout(resolve, 1500));
      }
    }
  }
  restore(fromLink(location.hash) ?? stored());
  suggest();
  await showKept();
  if ($("prompt").value.trim()) submit();
}

/** Learns what this server can do. */
async function meet() {
  const [models, schema, ready] = await Promise.all([getJson("v1/models"), getJson("openapi.json"), getJson("ready")]);
  const fields = schema.components.schemas.GenerateRequest.properties;
  server.streams = "stream" in fields;
  server.takesPictures = "image" in fields;
  server.variants = models.data.filter((card) => card.steps && card.state !== "failed");
  server.steps = [...new Set(server.variants.flatMap((card) => card.steps))].sort((a, b) => a - b);
  if ("loras" in fields) server.styles = (await getIfThere("v1/loras"))?.data ?? [];
  if (ready.family === "embedded") server.vocabulary = await getIfThere("web/vocabulary.json");
  $("server").textContent = `${ready.family} on ${ready.device}`;
  offer();
}

function offer() {
  const choice = (value, text) => {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "radio", name: "steps", value });
    const span = Object.assign(document.createElement("span"), { textContent: text });
    label.append(input, span);
    return label;
  };
  const compared = server.steps.length > 1 ? [choice("all", "compare")] : [];
  $("steps").replaceChildren(...compared, ...server.steps.map((steps) => choice(steps, steps)));
  const ids = server.styles.map((style) => style.id ?? style.name);
  $("style").replaceChildren(new Option("none", ""), ...ids.map((id) => new Option(id, id)));
  $("style-field").hidden = !ids.length;
  $("image-field").hidden = !server.takesPictures;
  const range = server.variants.map((card) => card.guidance ?? card.guidance_scale).find((each) => each?.maximum > 1);
  $("guidance-field").hidden = $("negative-field").hidden = !range;
  if (range) Object.assign($("guidance"), { min: range.minimum, max: range.maximum, value: range.default });
}

function listen() {
  let typing = 0;
  const later = () => {
    clearTimeout(typing);
    typing = setTimeout(submit, PAUSE_MS);
  };
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(typing);
    submit();
  });
  $("form").addEventListener("input", (event) => {
    if (event.target.id === "prompt") suggest();
    if (event.target.id === "image") return;
    $("scale-field").hidden = !$("style").value;
    later();
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      $("form").requestSubmit();
    }
  });
  $("image").addEventListener("change", () => takePicture($("image").files[0]));
  $("image-remove").addEventListener("click", () => takePicture(null));
  for (const kind of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      if (!server.takesPictures) return;
      event.preventDefault();
      $("image-field").classList.toggle("over", kind === "dragover");
      if (kind === "drop") takePicture(event.dataTransfer.files[0]);
    });
  }
  $("forget").addEventListener("click", async () => {
    await gallery.forgetAll();
    await showKept();
    $("prompt").focus();
  });
  onUse((chosen) => {
    restore(chosen);
    submit();
  });
  addEventListener("hashchange", () => {
    restore(fromLink(location.hash));
    submit();
  });
}

/** What the form says, so that it can be put back. */
function settings() {
  const chosen = { prompt: $("prompt").value, steps: document.querySelector("#steps :checked")?.value ?? "all" };
  for (const id of ["seed", "count", "style", "scale", "guidance", "negative", "strength"]) chosen[id] = $(id).value;
  return { ...chosen, lock: $("lock").checked };
}

function restore(chosen) {
  for (const id of ["prompt", "seed", "count", "style", "scale", "guidance", "negative", "strength"]) {
    if (chosen?.[id] !== undefined && chosen[id] !== "") $(id).value = chosen[id];
  }
  $("lock").checked = chosen?.lock ?? true;
  $("scale-field").hidden = !$("style").value;
  const radios = [...document.querySelectorAll("#steps input")];
  (radios.find((radio) => radio.value === String(chosen?.steps)) ?? radios[0]).checked = true;
  if (!$("seed").value) $("seed").value = newSeed();
  if (!$("count").value) $("count").value = "1";
}

function stored() {
  try {
    return JSON.parse(localStorage.getItem("sdxl-lightning-form"));
  } catch {
    return null;
  }
}

const newSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] >>> 1; // room above for the seeds of n pictures

/** One request per step count, or one for several pictures. */
function bodies(chosen) {
  const shared = { prompt: chosen.prompt.trim(), seed: Number(chosen.seed) };
  if (chosen.style) shared.loras = [{ name: chosen.style, scale: Number(chosen.scale) }];
  if (!$("guidance-field").hidden && chosen.guidance) shared.guidance_scale = Number(chosen.guidance);
  if (!$("negative-field").hidden && chosen.negative.trim()) shared.negative_prompt = chosen.negative.trim();
  if (dropped) Object.assign(shared, { image: dropped.base64, strength: Number(chosen.strength) });
  const n = Number(chosen.count);
  const steps = chosen.steps === "all" ? server.steps : [Number(chosen.steps)];
  return steps.map((each) => ({ ...shared, steps: each, ...(n > 1 ? { n } : {}) }));
}

/** Draws what the form says, in place of what is being drawn. */
async function submit() {
  running?.abort();
  stopCountdown();
  if (!$("lock").checked) $("seed").value = newSeed();
  const chosen = settings();
  localStorage.setItem("sdxl-lightning-form", JSON.stringify(chosen));
  if (!chosen.prompt.trim() || !$("form").checkValidity()) return;
  const mine = (running = new AbortController());
  const asked = bodies(chosen);
  const figures = place(asked);
  try {
    // One after the other, so that the times which are compared are each step count's own.
    for (const [number, body] of asked.entries()) await drawOne(body, figures[number], chosen, mine.signal);
  } catch (problem) {
    return mine.signal.aborted ? undefined : tell(problem);
  }
  if (mine.signal.aborted) return;
  $("told").textContent = `Drawn: ${chosen.prompt}`;
  await showKept();
}

/** Figures for all pictures; those there are stay until new ones come, so that nothing flickers. */
function place(asked) {
  const wanted = asked.map((body) => body.n ?? 1);
  const count = wanted.reduce((sum, n) => sum + n, 0);
  const grid = $("pictures");
  grid.dataset.count = count;
  while (grid.children.length > count) grid.lastChild.remove();
  while (grid.children.length < count) grid.append(newFigure());
  const figures = [...grid.children];
  figures.forEach((figure) => figure.classList.add("waits"));
  return wanted.map((n) => figures.splice(0, n));
}

function newFigure() {
  const figure = document.createElement("figure");
  const button = Object.assign(document.createElement("button"), { type: "button", disabled: true });
  button.append(Object.assign(document.createElement("span"), { className: "empty" }));
  button.setAttribute("aria-label", "A picture that is being drawn");
  const caption = document.createElement("figcaption");
  caption.append(document.createElement("span"), document.createElement("span"));
  figure.append(button, caption);
  return figure;
}

async function drawOne(body, figures, chosen, signal) {
  const captions = figures.map((figure) => figure.querySelectorAll("figcaption span"));
  captions.forEach(([left]) => (left.textContent = `${body.steps} step${body.steps > 1 ? "s" : ""}`));
  const sent = server.streams && body.steps > 1 ? { ...body, stream: true } : body;
  const began = performance.now();
  const answer = await draw(sent, signal, {
    onQueued(ahead, seconds) {
      const text = ahead ? `${ahead} ahead, about ${seconds.toFixed(1)} s` : "";
      captions.forEach(([, right]) => (right.textContent = text));
    },
    onPreview(index, blob) {
      if (signal.aborted || !figures[index]) return;
      captions[index][1].textContent = "";
      figures[index].classList.add("preview");
      show(figures[index], blob, "A preview");
    },
  });
  if (signal.aborted) return;
  const milliseconds = Math.round(answer.timings_ms?.total ?? performance.now() - began);
  for (const [index, image] of answer.images.entries()) {
    const blob = blobOf(image.b64_json, "image/png");
    const one = { ...body, seed: image.seed };
    delete one.n;
    const facts = { steps: body.steps, seed: image.seed, variant: answer.variant, milliseconds, size: `${answer.width} × ${answer.height}` };
    const picture = { blob, body: one, facts, settings: { ...chosen, seed: String(image.seed) } };
    figures[index].classList.remove("waits", "preview");
    show(figures[index], blob, `${body.prompt}, in ${body.steps} steps`);
    captions[index][1].textContent = `${milliseconds} ms`;
    const button = figures[index].querySelector("button");
    button.disabled = false;
    button.setAttribute("aria-label", `Look at: ${body.prompt}, in ${body.steps} steps`);
    button.onclick = () => view(picture);
    delete picture.body.image;
    await gallery.keep(picture).catch(() => {}); // a private window may keep nothing
  }
}

function show(figure, blob, alt) {
  const old = figure.querySelector("img");
  const image = old ?? document.createElement("img");
  const url = URL.createObjectURL(blob);
  const before = image.src;
  image.onload = () => before && URL.revokeObjectURL(before);
  Object.assign(image, { src: url, alt });
  if (!old) figure.querySelector("button").replaceChildren(image);
}

/** A problem as a sentence; where the server names a time, it is counted down, and the request is sent again. */
async function tell(problem) {
  for (const figure of [...$("pictures").children]) {
    figure.classList.remove("waits", "preview");
    if (!figure.querySelector("img")) figure.remove();
  }
  if (problem.status === 401) {
    await askForKey();
    return submit();
  }
  const sentence = problem instanceof Problem ? problem.sentence : "Something went wrong in this page.";
  let seconds = problem.seconds;
  const write = () => {
    const counted = `${sentence.replace(/; ask again( in \d+ s)?\.$/, ".")} Trying again in ${seconds} s.`;
    $("message").textContent = seconds ? counted : sentence;
    $("message").hidden = false;
  };
  write();
  if (!seconds) return;
  waiting = setInterval(() => {
    seconds -= 1;
    if (seconds > 0) return write();
    submit();
  }, 1000);
}

function stopCountdown() {
  clearInterval(waiting);
  $("message").hidden = true;
}

function askForKey() {
  const dialog = $("key-dialog");
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      if ($("key").value) key.set($("key").value);
      $("key").value = "";
      resolve();
    }, { once: true });
  });
}

/** Prompts that go on with what is typed, as buttons. */
function suggest() {
  const chips = suggestions($("prompt").value, server.vocabulary).map(({ prompt, text, colour }) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: text ?? prompt });
    if (colour) {
      button.title = prompt;
      button.prepend(Object.assign(document.createElement("i"), { ariaHidden: "true" }));
      button.firstChild.style.background = colour; // through the object model, which the policy allows
    }
    button.addEventListener("click", () => {
      $("prompt").value = prompt;
      suggest();
      $("prompt").focus();
      submit();
    });
    return button;
  });
  $("suggestions").replaceChildren(...chips);
}

async function takePicture(file) {
  if (dropped) URL.revokeObjectURL(dropped.url);
  dropped = file ? { base64: await base64Of(file), url: URL.createObjectURL(file) } : null;
  if (!file) $("image").value = "";
  if (dropped) $("image-shown").src = dropped.url;
  for (const id of ["image-shown", "strength-field", "image-remove"]) $(id).hidden = !dropped;
  submit();
}

async function showKept() {
  const pictures = await gallery.all().catch(() => []);
  $("kept").hidden = !pictures.length;
  for (const image of $("gallery").querySelectorAll("img")) URL.revokeObjectURL(image.src);
  $("gallery").replaceChildren(
    ...pictures.map((picture) => {
      const item = document.createElement("li");
      const button = Object.assign(document.createElement("button"), { type: "button" });
      const image = Object.assign(document.createElement("img"), { src: URL.createObjectURL(picture.blob) });
      image.alt = `${picture.body.prompt}, in ${picture.facts.steps} steps`;
      button.append(image);
      button.addEventListener("click", () => view(picture));
      item.append(button);
      return item;
    }),
  );
}
