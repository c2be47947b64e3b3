// The tokens of a reply, coloured by their probability; hovering or the arrow keys show what else was likely.

export function tokenView(tokens) {
  const view = document.createElement("div");
  view.className = "tokens";
  view.tabIndex = 0;
  view.setAttribute("role", "group");
  view.setAttribute("aria-label", "Tokens with their probabilities; arrow keys go through them");
  const parts = tokens.map(([text, p]) => {
    const part = document.createElement("span");
    part.className = `p${Math.min(9, Math.floor(p * 10))}`;
    part.textContent = text;
    return part;
  });
  const card = document.createElement("div");
  card.className = "card";
  card.hidden = true;
  card.setAttribute("role", "status");
  let at = -1;

  function show(i) {
    parts[at]?.classList.remove("at");
    at = i;
    card.hidden = at < 0;
    if (at < 0) return;
    parts[at].classList.add("at");
    const [text, p, likely] = tokens[at];
    const rows = likely.some(([other]) => other === text) ? likely : [[text, p], ...likely];
    card.replaceChildren(...rows.map(([other, q]) => row(other, q, other === text)));
    const box = parts[at].getBoundingClientRect(), frame = view.getBoundingClientRect();
    card.style.left = `${Math.max(0, Math.min(box.left - frame.left, frame.width - card.offsetWidth))}px`;
    card.style.top = `${box.bottom - frame.top + 4}px`;
  }

  view.addEventListener("pointerover", (event) => parts.includes(event.target) && show(parts.indexOf(event.target)));
  view.addEventListener("pointerleave", () => show(-1));
  view.addEventListener("blur", () => show(-1));
  view.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    show(Math.max(0, Math.min(parts.length - 1, at + step)));
  });
  view.append(...parts, card);
  return view;
}

function row(text, p, chosen) {
  const made = document.createElement("div");
  const word = document.createElement("code");
  word.textContent = text.replaceAll("\n", "↵").replaceAll(" ", "·") || "∅";
  const value = document.createElement("span");
  value.textContent = p < 0.0005 ? "< 0.1 %" : `${(p * 100).toFixed(1)} %`;
  made.className = chosen ? "chosen" : "";
  made.append(word, value);
  return made;
}
