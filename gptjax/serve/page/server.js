// The server: replies that live there and are read as events, and Markdown as HTML.

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export class Down extends Error {}

let key = localStorage.getItem("gptjax.key") ?? "";
export const getKey = () => key;
export function setKey(value) {
  key = value;
  localStorage.setItem("gptjax.key", value);
}

async function call(method, path, body) {
  let reply;
  const headers = { ...(key && { authorization: `Bearer ${key}` }), ...(body && { "content-type": "application/json" }) };
  try {
    reply = await fetch(path, { method, headers, body: body && JSON.stringify(body) });
  } catch {
    throw new Down("The server does not answer.");
  }
  if (reply.ok) return reply;
  const said = await reply.json().catch(() => null);
  if (reply.status >= 502) throw new Down(said?.error?.message ?? "The server does not answer."); // stopping, or a proxy's
  throw new Refused(reply.status, said?.error?.message ?? `status ${reply.status}`);
}

const json = async (...call_) => (await call(...call_)).json();

export const models = async () => (await json("GET", "v1/models")).data;
export const start = (fields) => json("POST", "page/replies", fields);
export const stop = (reply) => call("POST", `page/replies/${reply}/stop`);
export const forget = (reply) => call("DELETE", `page/replies/${reply}`);
export const isUp = () => call("GET", "ready").then(() => true, (error) => !(error instanceof Down));

export async function* events(reply, from) {
  // [number of the next event, event]. Throws `Down` when the connection is lost, `Refused` for an unknown reply.
  const response = await call("GET", `page/replies/${reply}?from=${from}`);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch(() => ({ done: true }));
    if (done) throw new Down("The connection was lost.");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const found = /^id: (\d+)\ndata: (.*)$/s.exec(part);
      if (!found) continue;
      const event = JSON.parse(found[2]);
      yield [Number(found[1]), event];
      if ("finish" in event || "error" in event) return;
    }
  }
}

// Markdown -> HTML of whole texts; those that are asked for together are sent together

const rendered = new Map();
let asked = [];

export const htmlNow = (text) => rendered.get(text);

export function keepHtml(text, html) {
  rendered.set(text, html);
}

export function html(text) {
  if (rendered.has(text)) return Promise.resolve(rendered.get(text));
  return new Promise((resolve, reject) => {
    if (asked.push({ text, resolve, reject }) === 1) queueMicrotask(ask);
  });
}

const AT_ONCE = 150_000; // characters

async function ask() {
  const waiting = asked;
  asked = [];
  while (waiting.length) {
    let size = waiting[0].text.length, count = 1;
    while (count < waiting.length && (size += waiting[count].text.length) < AT_ONCE) count++;
    const batch = waiting.splice(0, count);
    try {
      const made = await json("POST", "page/markdown", { texts: batch.map((one) => one.text) });
      batch.forEach((one, i) => {
        rendered.set(one.text, made.html[i].join(""));
        one.resolve(rendered.get(one.text));
      });
    } catch (error) {
      batch.forEach((one) => one.reject(error));
    }
  }
}
