// Replies: asked for, followed through reloads and lost connections to their end, and stopped.

import * as server from "./server.js";
import * as store from "./store.js";
import { atEnd, grow, say, toEnd, warn } from "./view.js";

export const state = {
  id: null, // the conversation on the screen; null: a new one
  models: [],
  settings: {}, // of new conversations
  live: new Map(), // message id -> {text, thought, html, rest, tokens, next}: replies that are being written
  tokens: new Map(), // message id -> tokens, where they are shown
  editing: null,
  comparing: null,
  about: "",
}; // and refresh, openSettings and loadModels, the page's own (main.js)

export const current = () => (state.id ? store.get(state.id) : null);

export async function begin(conversation, message, further) {
  // Ask the server for a reply, or to continue one.
  const { system, ...sampling } = conversation.settings;
  const before = store.path(conversation, further ? message.id : message.parent).filter((m) => m.text);
  const said = before.map((m) => ({ role: m.role, content: m.text, ...(m.thought && { reasoning_content: m.thought }) }));
  const seed = crypto.getRandomValues(new Uint32Array(1))[0];
  const fields = { model: conversation.model, messages: said, seed, ...sampling, continue: further };
  if (system) said.unshift({ role: "system", content: system });
  state.live.set(message.id, { text: "", html: "", rest: further ? message.text : "", thought: "", tokens: [], next: 0 });
  try {
    const started = await server.start(fields);
    store.updateMessage(conversation.id, message.id, { reply: started.id, left_out: started.left_out });
    if (state.live.get(message.id)?.stopped) server.stop(started.id).catch(() => {});
    follow(conversation.id, message.id, started.id);
  } catch (error) {
    end(conversation.id, message.id, { finish: "error", error: error.message });
    if (error.status === 401) state.openSettings(error.message);
    if (error instanceof server.Down) whenUp();
  }
}

const followed = new Set();

async function follow(conversation, message, reply) {
  // Show a reply as it is written, through lost connections, to its end.
  if (followed.has(reply)) return;
  followed.add(reply);
  const live = { text: "", thought: "", html: "", rest: "", tokens: [], next: 0, saved: Date.now() };
  state.live.set(message, live);
  state.refresh();
  for (;;) {
    try {
      for await (const [next, event] of server.events(reply, live.next)) {
        live.next = next;
        if ("error" in event) return end(conversation, message, { finish: "error", error: event.error, ...whole(live) });
        if ("finish" in event) {
          server.keepHtml(live.text, live.html);
          return end(conversation, message, { ...event, ...whole(live) });
        }
        apply(conversation, message, live, event);
      }
    } catch (error) {
      if (!(error instanceof server.Down)) {
        const lost = error.status === 404;
        return end(conversation, message, lost ? { finish: "lost" } : { finish: "error", error: error.message });
      }
      await whenUp();
    }
  }
}

const whole = (live) => ({ text: live.text, ...(live.thought && { thought: live.thought }) });

function apply(conversation, message, live, event) {
  const stay = atEnd();
  if ("text" in event) {
    live.text += event.text;
    live.thought += event.thought ?? "";
    live.rest += event.text;
    live.tokens.push(...event.tokens);
  } else {
    live.html += event.html;
    live.rest = event.rest;
  }
  if (live.saved && Date.now() - live.saved > 1000) {
    live.saved = Date.now();
    keep(conversation, message, whole(live));
  }
  grow(message, event, live);
  if (stay) toEnd();
}

function keep(conversation, message, fields) {
  try {
    store.updateMessage(conversation, message, fields);
  } catch (error) {
    warn(error.message); // the browser's storage is full
  }
}

function end(conversation, message, fields) {
  const stay = atEnd();
  state.live.delete(message);
  keep(conversation, message, fields);
  if (conversation === state.id) say(fields.error ?? `Reply finished. ${(fields.text ?? "").slice(0, 1000)}`);
  state.refresh();
  if (stay) toEnd();
}

export function resumeAll() {
  // Follow what was being written when the page was closed, or is in another tab.
  for (const conversation of store.all())
    for (const message of Object.values(conversation.messages)) {
      if (message.finish !== null || state.live.has(message.id)) continue;
      if (message.reply) follow(conversation.id, message.id, message.reply);
      else if (Date.now() - message.created > 60_000) store.updateMessage(conversation.id, message.id, { finish: "lost" });
    }
}

export function stopAll() {
  for (const message of store.path(current() ?? { messages: {}, chosen: {} })) {
    if (message.finish !== null) continue;
    if (message.reply) server.stop(message.reply).catch(() => {});
    else if (state.live.has(message.id)) state.live.get(message.id).stopped = true;
  }
}

let waiting = null;

export function whenUp() {
  // Wait until the server answers, and say so if it takes a while.
  waiting ??= (async () => {
    for (let pause = 200; ; pause = 1500) {
      await new Promise((resolve) => setTimeout(resolve, pause));
      if (await server.isUp()) break;
      warn("The server does not answer. Your conversations can be read; trying again …");
    }
    warn("");
    waiting = null;
    if (!state.models.length) state.loadModels();
    state.refresh();
  })();
  return waiting;
}
