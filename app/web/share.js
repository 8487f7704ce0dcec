// A picture's request, for others: as a link, as curl, as Python.

/** The settings in a link's fragment, which no server is sent; null where there are none. */
export function fromLink(hash) {
  try {
    return hash.length > 1 ? JSON.parse(decodeURIComponent(hash.slice(1))) : null;
  } catch {
    return null;
  }
}

export const toHash = (settings) => `#${encodeURIComponent(JSON.stringify(settings))}`;

const place = () => new URL("generate", document.baseURI).href;

export function asCurl(body, withKey) {
  const quoted = JSON.stringify(plain(body)).replaceAll("'", String.raw`'\''`);
  const auth = withKey ? ` \\\n  -H "authorization: Bearer $KEY"` : "";
  return `curl -s ${place()} -H 'content-type: application/json' -H 'accept: image/png'${auth} \\\n  -d '${quoted}' -o picture.png`;
}

export function asPython(body, withKey) {
  const lines = Object.entries(plain(body)).map(([name, value]) => `    ${JSON.stringify(name)}: ${literal(value)},`);
  const headers = withKey ? `{"accept": "image/png", "authorization": f"Bearer {KEY}"}` : `{"accept": "image/png"}`;
  return `import httpx\n\nbody = {\n${lines.join("\n")}\n}\nanswer = httpx.post("${place()}", json=body, headers=${headers}, timeout=60)\nanswer.raise_for_status()\nopen("picture.png", "wb").write(answer.content)\n`;
}

/** One picture without previews. */
function plain({ stream, previews, n, image, mask, ...body }) {
  return image ? { ...body, image: "<the picture in base64>" } : body;
}

function literal(value) {
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (value && typeof value === "object") {
    return `{${Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${literal(each)}`).join(", ")}}`;
  }
  return value === true ? "True" : value === false ? "False" : value === null ? "None" : JSON.stringify(value);
}
