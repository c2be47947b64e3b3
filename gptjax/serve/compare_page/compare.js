// The page on which a judge compares two replies. HTML of replies comes sanitised from the server.

const $ = (id) => document.getElementById(id);
const code = decodeURIComponent(location.hash.slice(1));
let judge = localStorage.getItem("judge") ?? "";
let unit = null;
let busy = false;

async function ask(path, body) {
  const options = { headers: { authorization: `Bearer ${code}` } };
  if (body) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  const response = await fetch(path, options);
  const content = await response.json();
  if (!response.ok) throw new Error(content.error.message);
  return content;
}

const of = (path) => ask(`${path}?judge=${encodeURIComponent(judge)}`);

// One thing at a time: a second key press must not vote on the pair that comes next.
async function alone(action) {
  if (busy) return;
  busy = true;
  try {
    $("notice").textContent = "";
    await action();
  } catch (error) {
    $("notice").textContent = error instanceof TypeError ? "The server does not answer. Try again." : error.message;
  } finally {
    busy = false;
  }
}

function show(state) {
  unit = state.unit ?? null;
  $("begin").hidden = true;
  $("judge-line").hidden = $("progress-line").hidden = false;
  $("judge").textContent = judge;
  $("counted").textContent = `${state.done} of ${state.count}`;
  $("progress").max = Math.max(state.count, 1);
  $("progress").value = state.done;
  $("pair").hidden = !unit;
  if (!unit) {
    $("notice").textContent = state.count ? "That was the last one. Thank you!" : "There is nothing to compare.";
    return;
  }
  $("prompt").replaceChildren(...state.prompt.map(message));
  $("left").innerHTML = state.left;
  $("right").innerHTML = state.right;
  for (const id of ["prompt", "left", "right"]) $(id).scrollTop = 0;
  for (const button of $("choices").children) button.ariaPressed = String(button.dataset.choice === state.choice);
  $("undo").disabled = !state.done;
}

function message({ role, html }) {
  const [element, label, text] = ["div", "div", "div"].map((name) => document.createElement(name));
  label.className = "role";
  label.textContent = role;
  text.innerHTML = html;
  element.append(label, text);
  return element;
}

const next = () => alone(async () => show(await of("next")));
const undo = () => alone(async () => show(await of("last")));
const vote = (choice) => alone(async () => {
  await ask("votes", { judge, unit, choice });
  show(await of("next"));
});

const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "tie", ArrowDown: "both bad" };

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || $("pair").hidden) return;
  if (event.target.closest?.("input, #prompt, .reply") && event.key !== "u") return; // these scroll
  if (KEYS[event.key]) {
    event.preventDefault();
    vote(KEYS[event.key]);
  } else if (event.key === "u" && !$("undo").disabled) {
    undo();
  }
});
for (const button of $("choices").children) button.onclick = () => vote(button.dataset.choice);
$("undo").onclick = undo;
$("judge").onclick = () => begin();
$("begin").onsubmit = (event) => {
  event.preventDefault();
  judge = $("name").value.trim();
  localStorage.setItem("judge", judge);
  if (judge) next();
};

function begin() {
  $("pair").hidden = $("judge-line").hidden = $("progress-line").hidden = true;
  $("begin").hidden = false;
  $("name").value = judge;
  $("name").focus();
}

if (judge) next();
else begin();
