// Conversations in the browser's storage. Each is a tree of messages: an edit or another reply is a branch beside the old.
//
// {version, id, title, created, changed, model, settings, messages: {id: message}, chosen: {parent or "": child}}
// message: {id, parent, role, text, reply, finish, ...}; reply: its id on the server; finish: null while it is written.
//
// Every change reads, changes and writes in one step, so that two tabs do not undo each other's.

const VERSION = 1;
const PREFIX = "gptjax.chat.";
const cache = new Map(); // id -> [stored text, value]

export const newId = () => crypto.getRandomValues(new Uint32Array(3)).reduce((id, part) => id + part.toString(36), "");

function peek(id) {
  const text = localStorage.getItem(PREFIX + id);
  if (text === null) return null;
  if (cache.get(id)?.[0] !== text) {
    try {
      cache.set(id, [text, check(JSON.parse(text))]);
    } catch {
      return null; // of another version, or damaged: left alone
    }
  }
  return cache.get(id)[1];
}

export const get = (id) => structuredClone(peek(id)); // to be changed and written

export function all() {
  // To be read only: many conversations are not copied.
  const ids = Object.keys(localStorage).filter((key) => key.startsWith(PREFIX)).map((key) => key.slice(PREFIX.length));
  return ids.map(peek).filter(Boolean).sort((a, b) => b.changed - a.changed);
}

export function create(model, settings) {
  const now = Date.now();
  return { version: VERSION, id: newId(), title: "", created: now, changed: now, model, settings, messages: {}, chosen: {} };
}

export function write(conversation) {
  try {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
  } catch {
    throw new Error("The browser's storage is full: export and delete some conversations.");
  }
}

export function update(id, change) {
  const conversation = get(id);
  if (!conversation) return null; // deleted in another tab
  change(conversation);
  write(conversation);
  return conversation;
}

export const updateMessage = (id, message, fields) =>
  update(id, (conversation) => conversation.messages[message] && Object.assign(conversation.messages[message], fields));

export const remove = (id) => localStorage.removeItem(PREFIX + id);
export const idOf = (key) => (key?.startsWith(PREFIX) ? key.slice(PREFIX.length) : null);

// The tree

export const children = (conversation, parent) =>
  Object.values(conversation.messages).filter((m) => m.parent === parent).sort((a, b) => a.created - b.created);

export function path(conversation, last = null) {
  // From the first message to the last of the chosen branch, or to the message `last`.
  const found = [];
  if (last !== null) {
    for (let m = conversation.messages[last]; m; m = conversation.messages[m.parent]) found.unshift(m);
    return found;
  }
  for (let parent = ""; ; parent = found.at(-1).id) {
    const below = children(conversation, parent);
    if (!below.length) return found;
    found.push(below.find((m) => m.id === conversation.chosen[parent]) ?? below.at(-1));
  }
}

export function add(conversation, fields) {
  const message = { id: newId(), created: Date.now(), ...fields };
  conversation.messages[message.id] = message;
  conversation.chosen[message.parent] = message.id;
  conversation.changed = message.created;
  if (!conversation.title && message.role === "user") conversation.title = message.text.trim().split("\n")[0].slice(0, 80);
  return message;
}

export function cut(conversation, id) {
  // Remove a message with everything below it.
  for (const below of children(conversation, id)) cut(conversation, below.id);
  const { parent } = conversation.messages[id];
  delete conversation.messages[id];
  delete conversation.chosen[id];
  if (conversation.chosen[parent] === id) delete conversation.chosen[parent];
}

export const matches = (conversation, words) =>
  words.every((word) =>
    [conversation.title, ...Object.values(conversation.messages).map((m) => m.text)].some((text) => text.toLowerCase().includes(word)),
  );

// Files

export const exported = (conversations) =>
  JSON.stringify({ format: "gptjax conversations", version: VERSION, conversations }, null, 1);

export function imported(text) {
  // Write the conversations of an exported file; one that is here with other content gets a new id.
  const file = JSON.parse(text);
  if (file?.format !== "gptjax conversations" || file.version !== VERSION || !Array.isArray(file.conversations))
    throw new Error("not a file of exported conversations");
  const found = file.conversations.map(check);
  for (const conversation of found) {
    for (const message of Object.values(conversation.messages))
      if (message.role === "assistant") Object.assign(message, { reply: null, finish: message.finish ?? "lost" }); // another server's
    const here = get(conversation.id);
    if (here && JSON.stringify(here) !== JSON.stringify(conversation)) conversation.id = newId();
    write(conversation);
  }
  return found;
}

const is = (value, type) => value !== null && typeof value === type;
const ID = /^[A-Za-z0-9]{1,40}$/;
const FIELDS = { // of a message, beside id, parent and role
  text: "string", created: "number", model: "string", thought: "string", finish: "string", error: "string",
  seconds: "number", first: "number", left_out: "number",
};

function check(c) {
  // The known fields of a conversation, each of its type. Throws for what is none.
  const good =
    c?.version === VERSION && ID.test(c.id) && is(c.title, "string") && is(c.created, "number") && is(c.changed, "number") &&
    is(c.model, "string") && is(c.settings, "object") && is(c.messages, "object") && is(c.chosen, "object");
  if (!good) throw new Error("not a conversation of this version");
  const messages = {};
  for (const [id, m] of Object.entries(c.messages)) messages[id] = checkMessage(id, m);
  for (const m of Object.values(messages)) {
    const seen = new Set();
    for (let at = m; at.parent !== ""; at = messages[at.parent]) {
      if (seen.has(at.id)) throw new Error("messages in a circle");
      if (!Object.hasOwn(messages, at.parent)) throw new Error("a message without its parent");
      seen.add(at.id);
    }
  }
  const chosen = Object.fromEntries(Object.entries(c.chosen).filter(([, child]) => Object.hasOwn(messages, child)));
  const { version, id, title, created, changed, model, settings } = c;
  return { version, id, title, created, changed, model, settings, messages, chosen };
}

function checkMessage(id, m) {
  const good = ID.test(id) && m?.id === id && ["user", "assistant"].includes(m.role) && is(m.text, "string") && is(m.created, "number");
  if (!good || !is(m.parent, "string")) throw new Error("a message that is not one");
  const found = { id, parent: m.parent, role: m.role };
  for (const [name, type] of Object.entries(FIELDS)) if (is(m[name], type)) found[name] = m[name];
  if (m.role === "assistant") {
    found.finish ??= m.finish === null ? null : "lost"; // null: it is being written
    found.reply = is(m.reply, "string") && /^[\w-]{1,64}$/.test(m.reply) ? m.reply : null;
    const { prompt_tokens, completion_tokens } = m.usage ?? {};
    if (is(prompt_tokens, "number") && is(completion_tokens, "number")) found.usage = { prompt_tokens, completion_tokens };
  }
  return found;
}
