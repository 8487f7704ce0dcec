// Prompts to offer for what has been typed.

const MOST = 8;
const MOST_COLOURS = 12;
const PROMPTS = [
  "a lighthouse at dusk, oil painting",
  "a fox in fresh snow, photograph",
  "a teapot shaped like a whale",
  "an old library, warm light",
];

/** Prompts that go on with `typed`: { prompt, text, colour }, the last two where a word says it all. vocabulary: what the
 * embedded model knows; null where it is another model. */
export function suggestions(typed, vocabulary) {
  const found = vocabulary ? known(vocabulary, typed) : PROMPTS.map((prompt) => ({ prompt }));
  return found.filter(({ prompt }) => prompt !== typed).slice(0, MOST_COLOURS);
}

function known(vocabulary, typed) {
  const words = vocabulary.objects.map((object) => object.name);
  const colours = Object.keys(vocabulary.backgrounds);
  const text = typed.toLowerCase().replace(/^(an?|the)\s+/, "").trim();
  const object = words.filter((word) => text.startsWith(word)).sort((a, b) => b.length - a.length)[0];
  if (object) {
    const begun = text.slice(object.length).replace(/^[\s,]*(on|with)?\s*(an?\s)?\s*/, "").split(" ")[0];
    const matching = colours.filter((colour) => colour.startsWith(begun) && colour !== begun);
    return (matching.length ? matching : colours).map((colour) => ({
      prompt: sentence(object, colour),
      text: `on ${colour}`,
      colour: vocabulary.backgrounds[colour],
    }));
  }
  const matching = words.filter((word) => word.split(" ").some((part) => part.startsWith(text)));
  const some = text && matching.length ? matching : [...words].sort(() => Math.random() - 0.5);
  return some.slice(0, MOST).map((word, number) => ({
    prompt: sentence(word, colours[(number * 5 + word.length) % colours.length]),
  }));
}

const article = (word) => (/^[aeiou]/.test(word) ? "an" : "a");
const sentence = (object, colour) => `${article(object)} ${object} on ${article(colour)} ${colour} background`;
