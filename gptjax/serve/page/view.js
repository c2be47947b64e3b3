// The messages on the screen. Their HTML is the server's, which sanitised it; everything else is made as text.

import { children, path } from "./store.js";
import { html, htmlNow } from "./server.js";
import { tokenView } from "./tokens.js";

export const $ = (id) => document.getElementById(id);

export function warn(text) {
  // Say something above the messages until `warn("")`.
  $("warning").textContent = text;
  $("warning").hidden = !text;
}

export const say = (text) => ($("status").textContent = text); // to screen readers

export function toEnd() {
  $("talk").scrollTop = $("talk").scrollHeight;
}

export function atEnd() {
  return $("talk").scrollHeight - $("talk").scrollTop - $("talk").clientHeight < 80;
}

export function el(tag, fields = {}, ...inside) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(fields)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made && name !== "list") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...inside.filter((one) => one !== null));
  return made;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

export const iconButton = (name, label, onclick, fields = {}) =>
  el("button", { type: "button", className: "icon", title: label, "aria-label": label, onclick, ...fields }, icon(name));

// Blocks of HTML, with a copy button at code

export function blocks(code) {
  const template = document.createElement("template");
  template.innerHTML = code; // the only place where text becomes elements
  for (const pre of template.content.querySelectorAll("pre")) {
    pre.tabIndex = 0; // so that the keyboard can scroll it
    const bar = el("div", { className: "code-bar" }, el("span", {}, pre.dataset.language || "text"));
    const copy = el("button", { type: "button", onclick: () => copyText(pre.innerText, copy) }, "Copy");
    bar.append(copy);
    const figure = el("div", { className: "code" }, bar);
    pre.replaceWith(figure);
    figure.append(pre);
  }
  for (const table of template.content.querySelectorAll("table")) {
    const frame = el("div", { className: "table", tabIndex: 0 });
    table.replaceWith(frame);
    frame.append(table);
  }
  return template.content;
}

export async function copyText(text, button) {
  await navigator.clipboard.writeText(text).catch(() => {
    const area = el("textarea", { value: text }); // no clipboard without HTTPS
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  });
  button.classList.add("done");
  setTimeout(() => button.classList.remove("done"), 1200);
  say("Copied");
}

// Messages

const shown = new Map(); // message id -> {element, signature}

export function draw(conversation, state, act) {
  const messages = $("messages"), way = conversation ? path(conversation) : [];
  const wanted = way.map((message) => element(conversation, message, message === way.at(-1), state, act));
  if (!way.length) wanted.push(el("div", { className: "hello" }, el("h2", {}, "Hello."), el("p", {}, state.about)));
  wanted.forEach((one, i) => messages.children[i] !== one && messages.insertBefore(one, messages.children[i] ?? null));
  while (messages.children.length > wanted.length) messages.lastChild.remove();
  for (const id of shown.keys()) if (!way.some((message) => message.id === id)) shown.delete(id);
}

function element(conversation, message, last, state, act) {
  const siblings = children(conversation, message.parent);
  const comparing = state.comparing === message.parent && siblings.length > 1;
  const live = state.live.get(message.id);
  const now = { last, comparing, live: Boolean(live), editing: state.editing === message.id, tokens: state.tokens.get(message.id) };
  const facts = comparing ? siblings : { ...message, ...(live && { text: "", thought: "" }) };
  const signature = JSON.stringify([facts, siblings.map((one) => one.id), { ...now, tokens: now.tokens?.length }]);
  const before = shown.get(message.id);
  if (before?.signature === signature) return before.element;
  const name = message.role === "user" ? "You" : message.model || "Assistant";
  const made = el("article", { className: message.role, "aria-label": name, "data-id": message.id });
  if (comparing) made.append(compare(siblings, message, state, act));
  else if (now.editing) made.append(editor(message, act));
  else {
    made.append(body(message, state));
    if (message.left_out) made.prepend(el("p", { className: "note" }, `The oldest ${message.left_out} messages no longer fit and were left out.`));
    if (message.error) made.append(el("p", { className: "error" }, message.error));
    made.append(footer(message, siblings, now, act));
  }
  shown.set(message.id, { element: made, signature });
  return made;
}

function body(message, state) {
  const made = el("div", { className: "body" });
  const tokens = state.tokens.get(message.id);
  if (tokens) made.append(tokenView(tokens));
  else if (message.role === "user") made.append(el("p", { className: "plain" }, message.text));
  else fill(made, message.text, state.live.get(message.id));
  const thought = state.live.get(message.id)?.thought || message.thought;
  if (thought) think(made, thought, !message.text && message.finish === null);
  return made;
}

function think(body, thought, open) {
  // Show a reply's reasoning before its text; it is open while there is nothing else.
  const before = body.querySelector(":scope > .thought");
  if (before) before.lastChild.textContent = thought;
  else body.prepend(el("details", { className: "thought", open }, el("summary", {}, "Thinking"), el("p", { className: "plain" }, thought)));
}

function fill(made, text, live) {
  const ready = live ? live.html : htmlNow(text);
  const open = el("p", { className: "plain open" }, live ? live.rest : "");
  if (ready !== undefined) return made.replaceChildren(blocks(ready), open);
  made.replaceChildren(el("p", { className: "plain" }, text)); // readable also without the server
  const again = () => shown.delete(made.closest("article")?.dataset.id);
  const plain = made.lastChild;
  html(text).then((code) => plain.replaceWith(blocks(code)), again);
}

export function grow(id, event, live) {
  // Show an event of a reply that is being written.
  const at = shown.get(id)?.element;
  const open = at?.querySelector(".body > .open");
  if (!open) return;
  if (event.thought) think(open.parentNode, live.thought, true);
  if (event.html) open.before(blocks(event.html));
  open.textContent = live.rest;
  if (live.tokens.length) at.querySelector(".facts").textContent = `${live.tokens.length} tokens`;
}

const ENDS = { length: "stopped at the maximum", cancelled: "stopped", lost: "interrupted", content_filter: "stopped by a filter" };

function factsOf(message) {
  if (!message.usage) return message.finish === "lost" ? "interrupted" : "";
  const count = message.usage.completion_tokens, seconds = message.seconds - message.first;
  const speed = count > 1 && seconds > 0 ? `${((count - 1) / seconds).toPrecision(3) * 1} tokens/s` : "";
  return [`${count} token${count === 1 ? "" : "s"}`, speed, ENDS[message.finish]].filter(Boolean).join(" · ");
}

function footer(message, siblings, now, act) {
  const made = el("div", { className: "foot" });
  if (siblings.length > 1) {
    const at = siblings.findIndex((one) => one.id === message.id);
    made.append(
      iconButton("back", "Previous version", () => act.choose(siblings[at - 1]), { disabled: at === 0 }),
      el("span", { className: "count" }, `${at + 1}/${siblings.length}`),
      iconButton("forth", "Next version", () => act.choose(siblings[at + 1]), { disabled: at === siblings.length - 1 }),
    );
  }
  const tools = el("span", { className: "tools" });
  if (message.finish !== null) {
    const copy = iconButton("copy", "Copy", () => copyText(message.text, copy));
    tools.append(copy, iconButton("edit", "Edit", () => act.edit(message)));
    if (message.role === "assistant") {
      tools.append(iconButton("again", "Reply again", () => act.regenerate(message)));
      if (now.last && message.text) tools.append(iconButton("continue", "Continue", () => act.resume(message)));
      if (siblings.length > 1) tools.append(iconButton("compare", "Compare versions", () => act.compare(message)));
      if (message.reply)
        tools.append(iconButton("chart", "Probabilities", () => act.tokens(message), { "aria-pressed": String(Boolean(now.tokens)) }));
    }
    tools.append(iconButton("trash", "Delete from here", () => act.cut(message)));
  }
  if (message.role === "assistant") {
    const facts = el("span", { className: "facts" }, factsOf(message));
    if (message.usage) facts.title = `${message.usage.prompt_tokens} tokens read, ${message.first} s to the first token`;
    made.append(facts);
  }
  made.append(tools);
  return made;
}

function editor(message, act) {
  const area = el("textarea", { value: message.text, rows: 3, "aria-label": "Edit the message" });
  const done = () => act.edited(message, area.value);
  const form = el(
    "form",
    { className: "editor", onsubmit: (event) => (event.preventDefault(), done()) },
    area,
    el(
      "p",
      { className: "row" },
      el("button", { type: "button", onclick: () => act.edit(null) }, "Cancel"),
      el("button", { className: "main" }, message.role === "user" ? "Send" : "Save"),
    ),
  );
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape") act.edit(null), event.stopPropagation();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) done();
  });
  queueMicrotask(() => area.focus());
  return form;
}

function compare(siblings, chosen, state, act) {
  const columns = siblings.map((message, i) => {
    const keep = el("button", { type: "button", onclick: () => (act.compare(null), act.choose(message)) }, "Keep this one");
    const label = `Version ${i + 1}${message.model ? `, ${message.model}` : ""}`;
    const head = el("p", { className: "row" }, el("strong", {}, label), keep);
    const facts = el("p", { className: "facts" }, factsOf(message));
    return el("section", { "aria-label": label, className: message === chosen ? "chosen" : "" }, head, body(message, state), facts);
  });
  return el("div", { className: "compare", tabIndex: 0, role: "group", "aria-label": "Versions" }, ...columns);
}
