// The page: conversations are the browser's (store.js), replies are the server's (replies.js), view.js shows them.

import { begin, current, resumeAll, state, stopAll, whenUp } from "./replies.js";
import * as server from "./server.js";
import * as store from "./store.js";
import { $, draw, el, say, toEnd, warn } from "./view.js";

const stored = (name) => JSON.parse(localStorage.getItem(`gptjax.${name}`) ?? "null");
const keep = (name, value) => localStorage.setItem(`gptjax.${name}`, JSON.stringify(value));

Object.assign(state, { id: location.hash.slice(1) || null, settings: stored("settings") ?? {}, refresh, openSettings, loadModels });

// Drawing

function refresh() {
  const conversation = current();
  const messages = conversation ? store.path(conversation) : [];
  const running = messages.some((m) => m.finish === null);
  drawModels(conversation);
  draw(conversation, state, act);
  $("title").textContent = conversation?.title || "New conversation";
  document.title = conversation?.title ? `${conversation.title} · gptjax` : "gptjax";
  for (const id of ["rename", "export", "delete"]) $(id).disabled = !conversation;
  const label = running ? "Stop" : "Send";
  Object.assign($("send"), { title: label, ariaLabel: label, className: running ? "stop" : "" });
  $("send").querySelector("use").setAttribute("href", running ? "#i-stop" : "#i-send");
  drawList();
}

function drawList() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const today = new Date().setHours(0, 0, 0, 0), day = 86_400_000;
  let group = "";
  const items = store.all().filter((one) => store.matches(one, words)).flatMap((one) => {
    const age = one.changed >= today ? "Today" : one.changed >= today - day ? "Yesterday" : one.changed >= today - 7 * day ? "This week" : "Earlier";
    const head = age === group ? [] : [el("li", { className: "age" }, age)];
    group = age;
    const link = el("a", { href: `#${one.id}`, title: one.title }, one.title || "Untitled");
    if (one.id === state.id) link.setAttribute("aria-current", "page");
    return [...head, el("li", {}, link)];
  });
  $("list").replaceChildren(...items);
}

function drawModels(conversation) {
  const names = state.models.map((model) => model.id), chosen = conversation?.model || stored("model") || names[0];
  const known = names.includes(chosen);
  const options = names.map((name) => new Option(name, name, false, name === chosen));
  if (!known && conversation && names.length) options.unshift(new Option(`${chosen} (not served)`, chosen, true, true));
  if ([...$("model").options].map(String).join() !== options.map(String).join() || $("model").value !== chosen)
    $("model").replaceChildren(...options);
  const model = state.models.find((one) => one.id === chosen);
  state.about = model ? `${model.id} reads up to ${model.max_model_len.toLocaleString("en")} tokens.` : "";
}

// Replies

function send(text) {
  const conversation = current() ?? store.create($("model").value, state.settings);
  const parent = store.path(conversation).at(-1)?.id ?? "";
  ask(conversation, parent, text);
}

function ask(conversation, parent, text) {
  const said = store.add(conversation, { parent, role: "user", text });
  reply(conversation, said.id);
}

function reply(conversation, parent) {
  const message = store.add(conversation, { parent, role: "assistant", text: "", finish: null, reply: null, model: conversation.model });
  store.write(conversation);
  if (state.id !== conversation.id) location.hash = state.id = conversation.id;
  begin(conversation, message, false);
  refresh();
  toEnd();
}

async function loadModels() {
  try {
    state.models = await server.models();
  } catch (error) {
    if (error instanceof server.Down) whenUp();
    else if (error.status === 401) openSettings(error.message);
  }
  refresh();
}

// What the buttons of a message do

const act = {
  choose(message) {
    store.update(state.id, (conversation) => (conversation.chosen[message.parent] = message.id));
    refresh();
  },
  edit(message) {
    state.editing = message?.id ?? null;
    refresh();
    if (!message) $("text").focus();
  },
  edited(message, text) {
    state.editing = null;
    const conversation = current();
    if (!text.trim() || text === message.text) return refresh();
    if (message.role === "user") return ask(conversation, message.parent, text);
    store.add(conversation, { parent: message.parent, role: "assistant", text, finish: "edited", reply: null, model: message.model });
    store.write(conversation);
    refresh();
  },
  regenerate(message) {
    const conversation = current();
    if (message.error && !message.text) store.cut(conversation, message.id);
    reply(conversation, message.parent);
  },
  resume(message) {
    const conversation = current();
    Object.assign(conversation.messages[message.id], { finish: null, reply: null, error: undefined, usage: undefined });
    state.tokens.delete(message.id);
    store.write(conversation);
    begin(conversation, conversation.messages[message.id], true);
    refresh();
  },
  compare(message) {
    state.comparing = message?.parent ?? null;
    refresh();
  },
  cut(message) {
    if (!confirm("Delete this message and everything after it?")) return;
    store.update(state.id, (conversation) => store.cut(conversation, message.id));
    refresh();
  },
  async tokens(message) {
    if (state.tokens.delete(message.id)) return refresh();
    const found = [];
    try {
      for await (const [, event] of server.events(message.reply, 0)) found.push(...(event.tokens ?? []));
      state.tokens.set(message.id, found);
      refresh();
    } catch (error) {
      say(error.status === 404 ? "The server keeps probabilities for an hour, and no longer has these." : error.message);
      alert($("status").textContent);
    }
  },
};

// The rest of the page

function go(id) {
  Object.assign(state, { id: id && store.get(id) ? id : null, editing: null, comparing: null });
  state.tokens.clear();
  refresh();
  toEnd();
  openSide(false);
}

function openSide(open) {
  document.body.classList.toggle("side-open", open);
  $("open-side").setAttribute("aria-expanded", String(open));
  $("shade").hidden = !open;
}

function openSettings(why = "") {
  const settings = current()?.settings ?? state.settings;
  $("system").value = settings.system ?? "";
  for (const input of document.querySelectorAll("#settings input[name]")) input.value = settings[input.name] ?? "";
  $("key").value = server.getKey();
  $("theme").value = stored("theme") ?? "";
  if (!$("settings").open) $("settings").showModal();
  if (why) $("key").focus(), say(why);
}

function saveSettings() {
  const settings = $("system").value.trim() ? { system: $("system").value } : {};
  for (const input of document.querySelectorAll("#settings input[name]")) if (input.value !== "") settings[input.name] = Number(input.value);
  state.settings = settings;
  keep("settings", settings);
  if (state.id) store.update(state.id, (conversation) => (conversation.settings = settings));
  keep("theme", $("theme").value);
  theme();
  server.setKey($("key").value.trim());
  loadModels().then(resumeAll);
}

const theme = () => (document.documentElement.dataset.theme = stored("theme") ?? "");

function download(conversations, name) {
  const url = URL.createObjectURL(new Blob([store.exported(conversations)], { type: "application/json" }));
  el("a", { href: url, download: `${name}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

function submit() {
  const text = $("text").value;
  const running = current() && store.path(current()).some((m) => m.finish === null);
  if (running || !text.trim()) return;
  try {
    send(text);
    $("text").value = "";
  } catch (error) {
    warn(error.message); // the browser's storage is full: the text stays
  }
}

const on = (id, event, action) => $(id).addEventListener(event, action);

on("form", "submit", (event) => {
  event.preventDefault();
  if ($("send").className === "stop") stopAll();
  else submit();
});
on("text", "keydown", (event) => {
  if (event.isComposing || event.keyCode === 229) return; // Enter chooses a word of Chinese or Japanese
  const phone = matchMedia("(pointer: coarse)").matches;
  if (event.key === "Enter" && !event.shiftKey && !phone) {
    event.preventDefault();
    submit();
  } else if (event.key === "ArrowUp" && !$("text").value && current()) {
    const mine = store.path(current()).findLast((m) => m.role === "user");
    if (mine) event.preventDefault(), act.edit(mine);
  }
});
on("fresh", "click", () => {
  location.hash = "";
  go(null);
  $("text").focus();
});
on("search", "input", drawList);
on("model", "change", () => {
  keep("model", $("model").value);
  if (state.id) store.update(state.id, (conversation) => (conversation.model = $("model").value));
  refresh();
});
on("list", "click", () => openSide(false));
on("open-side", "click", () => openSide(!document.body.classList.contains("side-open")));
on("shade", "click", () => openSide(false));
on("open-settings", "click", () => openSettings());
document.querySelector("#settings form").addEventListener("submit", saveSettings);
on("rename", "click", () => {
  $("actions").hidePopover();
  const title = prompt("Title", current().title);
  if (title?.trim()) store.update(state.id, (conversation) => (conversation.title = title.trim().slice(0, 200)));
  refresh();
});
on("export", "click", () => download([current()], current().title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60) || "conversation"));
on("export-all", "click", () => download(store.all(), "conversations"));
on("delete", "click", () => {
  $("actions").hidePopover();
  const conversation = current();
  if (!confirm(`Delete "${conversation.title}"?`)) return;
  for (const message of Object.values(conversation.messages)) if (message.reply) server.forget(message.reply).catch(() => {});
  store.remove(conversation.id);
  location.hash = "";
  go(null);
});
on("import", "click", () => $("file").click());
on("file", "change", async () => {
  try {
    const found = store.imported(await $("file").files[0].text());
    say(`${found.length} conversations imported`);
    if (found.length) location.hash = found[0].id;
  } catch (error) {
    alert(`Not imported: ${error.message}`);
  }
  $("file").value = "";
  refresh();
});
addEventListener("hashchange", () => location.hash.slice(1) !== (state.id ?? "") && go(location.hash.slice(1)));
addEventListener("storage", (event) => {
  if (event.key === "gptjax.theme") theme();
  if (store.idOf(event.key) === null) return;
  if (state.id && !store.get(state.id)) go(null);
  resumeAll();
  refresh();
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    if (document.body.classList.contains("side-open")) openSide(false);
    else stopAll();
  }
  if ((event.ctrlKey || event.metaKey) && event.key === "k") {
    event.preventDefault();
    openSide(true);
    $("search").focus();
  }
});

theme();
navigator.serviceWorker?.register("assets/offline.js", { scope: "./" }).catch(() => {});
go(state.id);
loadModels();
resumeAll();
