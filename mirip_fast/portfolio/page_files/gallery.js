// The sorted works: which are shown, in which order, and the card of each.

// Names from a Mac hold Hangul in parts: both they and what is searched for are put together.
const folded = (text) => text.normalize("NFC").toLowerCase();

data.works.forEach((work, place) => (work.place = place));

// What a search looks at.
function foundIn(work) {
  work.found ??= folded([work.name, work.id, ...work.given.map(([, value]) => value)].join(" "));
  const { tags, note } = markOf(work);
  return tags || note ? `${work.found} ${folded(`${(tags ?? []).join(" ")} ${note ?? ""}`)}` : work.found;
}

const view = {
  text: "", tiers: new Set(), sort: "best", stacked: true, opened: new Set(),
  columns: new Map(), marked: "", unsettled: false, // see filters.js
};
let fitting = []; // works that pass the filters, in order
let shown = []; // those with a card
let leaderOf = new Map(); // stack → [shown work, others of the stack that fit]
let current = 0; // place in `shown` of the card that has the focus, or had it last

const names = new Intl.Collator(language, { numeric: true });
const ORDERS = {
  best: (a, b) => a.place - b.place,
  mine: (a, b) => atOf(a) - atOf(b) || a.place - b.place,
  lowest: (a, b) => b.place - a.place,
  name: (a, b) => names.compare(a.name, b.name) || a.place - b.place,
  unsure: (a, b) => a.chances[a.tier] - b.chances[b.tier] || a.place - b.place,
  applicant: byApplicant,
  widest: (a, b) => b.high - b.low - (a.high - a.low) || a.place - b.place,
};

function possibleOrders() {
  const known = ["best", "lowest", "name"];
  if (data.works[0].chances !== null) known.push("unsure");
  if (data.works[0].low !== null) known.push("widest");
  if (data.applicants) known.push("applicant");
  if (data.works.some(isMoved) || view.sort === "mine") known.unshift("mine");
  return known;
}

function arrange() {
  const words = folded(view.text).split(/\s+/).filter(Boolean);
  const fits = (work) =>
    (view.tiers.size === 0 || view.tiers.has(work.tier)) &&
    passesFilters(work) &&
    ofApplicant(work) &&
    words.every((word) => foundIn(work).includes(word));
  fitting = data.works.filter(fits).sort(ORDERS[view.sort]);
  leaderOf = new Map();
  shown = fitting.filter((work) => {
    if (!view.stacked || work.stack === null || view.opened.has(work.stack)) return true;
    const first = leaderOf.get(work.stack);
    if (first) first.others.push(work);
    else leaderOf.set(work.stack, { work, others: [] });
    return !first;
  });
}

const cards = new Map(); // work → its card, kept so that pictures stay decoded
const BLOCK = 60; // works whose cards are made together, when they come near: no page lays out thousands
const near = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) if (isIntersecting) fillBlock(target);
  },
  { rootMargin: "1500px" },
);
addEventListener("beforeprint", () => [...byId("grid").children].forEach(fillBlock));
let perRow = 1;
let rowHeight = 320;

function drawGrid() {
  const focused = shown[current];
  arrange();
  current = Math.max(0, shown.indexOf(focused));
  const grid = document.getElementById("grid");
  perRow = columns();
  grid.style.setProperty("--columns", perRow);
  near.disconnect();
  const size = blockSize();
  const blocks = Array.from({ length: Math.ceil(shown.length / size) }, (_, place) => {
    const block = make("ul", { class: "block" });
    block.works = shown.slice(place * size, (place + 1) * size);
    block.style.minHeight = `${Math.ceil(block.works.length / perRow) * rowHeight}px`;
    return block;
  });
  grid.replaceChildren(...blocks);
  for (const place of new Set([0, Math.floor(current / size)])) if (blocks[place]) fillBlock(blocks[place]);
  for (const block of blocks) if (!block.firstChild) near.observe(block);
  document.getElementById("nothing").hidden = shown.length > 0;
  const all = sayCount("works", data.works.length);
  const count = document.getElementById("count");
  count.textContent =
    fitting.length === data.works.length ? all : say("shown", { shown: fitting.length.toLocaleString(language), all });
}

const blockSize = () => perRow * Math.ceil(BLOCK / perRow);

function fillBlock(block) {
  near.unobserve(block);
  if (block.firstChild) return;
  block.append(...block.works.map(cardOf));
  for (const work of block.works) dressCard(work, work === shown[current]);
  block.style.minHeight = "";
  rowHeight = block.offsetHeight / Math.ceil(block.works.length / perRow) || rowHeight;
}

function cardOf(work) {
  if (!cards.has(work)) cards.set(work, newCard(work));
  return cards.get(work);
}

function newCard(work) {
  const name = work.name;
  const open = make("button", {
    type: "button", class: "open", "aria-label": say("open", { name }),
    click: (event) => {
      if (event.shiftKey) selectTo(work);
      else if (event.ctrlKey || event.metaKey) select(work);
      else openLarge(work);
    },
  }, make("span", { class: "frame" }, pictureOf(work, { lazy: true })));
  const pick = iconButton("compare", say("comparePick", { name }), () => pickWork(work), "pick");
  const more = make("button", { type: "button", class: "more", click: () => openStack(work) });
  const tick = iconButton("tick", say("selectOne", { name }), (event) => (event.shiftKey ? selectTo(work) : select(work)), "tick");
  tick.setAttribute("aria-pressed", selected.has(work));
  for (const button of [pick, more, tick]) button.tabIndex = -1; // keys do the same
  return make("li", { class: selected.has(work) ? "card selected" : "card" },
    make("div", { class: "work" }, open, tick, pick, more, labelOf(work)), marksLine(work));
}

// What changes from one drawing to the next.
function dressCard(work, isCurrent) {
  const card = cards.get(work);
  const others = leaderOf.get(work.stack)?.others.length ?? 0;
  card.classList.toggle("stacked", others > 0);
  const more = card.querySelector(".more");
  more.hidden = others === 0;
  if (others > 0) {
    more.textContent = say("more", { n: others });
    more.title = sayCount("stackOpen", others);
    more.setAttribute("aria-label", more.title);
  }
  card.querySelector(".pick").setAttribute("aria-pressed", picked.includes(work));
  card.querySelector(".open").tabIndex = isCurrent ? 0 : -1;
}

// The label below a picture: rank and interval, 0–100, tier, name.
function labelOf(work) {
  const range = work.low === null ? "± ?" : `${work.low}–${work.high}${work.settled ? "" : " ~"}`;
  const hint = intervalText(work) + (work.settled === false ? `. ${say("unsettled")}` : "");
  const rank = make("span", { class: "rank" },
    make("b", { text: work.rank }), make("span", { class: "range soft", text: range, title: hint }));
  return make("div", { class: "label" }, rank, percentOf(work), tierOf(work), nameOf(work));
}

function percentOf(work) {
  if (work.percent === null) return make("span", { class: "percent soft", text: say("percentUnknown") });
  const n = Math.round(work.percent);
  return make("span", { class: "percent", title: say("percentHint", { n }) },
    make("b", { text: n }), ` ${say("ofHundred")}`);
}

function tierOf(work) {
  if (data.tiers.length === 0) return null;
  if (work.tier === null) return make("span", { class: "tier soft", text: say("tierUnknown") });
  return make("span", { class: "tier" }, tierDot(work.tier),
    make("bdi", { text: data.tiers[work.tier] }),
    make("span", { class: "soft", text: percent(work.chances[work.tier]) }));
}

function openStack(work) {
  view.opened.add(work.stack);
  drawGrid();
  focusCard(shown.indexOf(work));
}

function focusCard(place) {
  if (shown.length === 0) return;
  const next = Math.min(Math.max(place, 0), shown.length - 1);
  fillBlock(byId("grid").children[Math.floor(next / blockSize())]);
  if (shown[current]) cards.get(shown[current])?.querySelector(".open").setAttribute("tabindex", -1);
  current = next;
  const button = cards.get(shown[current]).querySelector(".open");
  button.tabIndex = 0;
  button.focus({ preventScroll: true });
  cards.get(shown[current]).scrollIntoView({ block: "nearest" });
}

function columns() {
  return getComputedStyle(document.getElementById("grid")).gridTemplateColumns.split(" ").length;
}

document.getElementById("grid").addEventListener("focusin", (event) => {
  const card = event.target.closest(".card");
  const place = shown.findIndex((work) => cards.get(work) === card);
  if (place < 0 || place === current) return;
  if (shown[current]) cards.get(shown[current])?.querySelector(".open").setAttribute("tabindex", -1);
  current = place;
  card.querySelector(".open").tabIndex = 0;
});
