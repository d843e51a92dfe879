"use strict";
const find = (name) => document.getElementById(name);
const token = location.pathname.split("/")[1];
let state = null; // what the program said last
let busy = false; // a verdict is on its way
let looked = 0; // milliseconds that the pair was looked at
let lookingSince = null;

function put(name, text) {
  find(name).textContent = text;
}

function warn(text) {
  find("alert").hidden = !text;
  put("alert", text || "");
}

// The clock of a pair runs while both pictures are there and the page is in sight.
function clock(runs) {
  if (lookingSince !== null) looked += performance.now() - lookingSince;
  lookingSince = runs ? performance.now() : null;
}

function showPair() {
  looked = 0;
  lookingSince = null;
  const wanted = [["left", state.left, SAY.leftWork], ["right", state.right, SAY.rightWork]];
  let missing = wanted.length;
  for (const [side, number, words] of wanted) {
    const image = find(side).querySelector("img");
    image.alt = words;
    image.onload = () => {
      if (--missing === 0 && !document.hidden) clock(true);
    };
    image.onerror = () => warn(SAY.unreadable);
    image.src = `image/${number}`;
  }
  for (const number of state.ahead) new Image().src = `image/${number}`; // the next pair is there at once
}

function take(next) {
  const other = state === null || next.number !== state.number;
  state = next;
  if (other) showPair();
  showFigures();
}

function showShare(name, share) {
  const known = share && share.count;
  put(name, known ? percent(share.value) : "–");
  put(`${name}-note`, known ? SAY.share(share) : SAY.none);
}

function showFigures() {
  put("judged", SAY.judged(state.judged, state.now));
  find("training").hidden = !state.training;
  find("undo").disabled = !state.undo;
  showShare("accuracy", state.measure.at(-1));
  showShare("chosen", state.teach.at(-1));
  showShare("consistency", state.consistency);
  drawChart(find("chart"), state);
  let remark = "";
  if (state.remark) remark = SAY.noHead(state.remark);
  else if (!state.heads.length && !state.measure.length) remark = SAY.firstHead(state.first_head);
  else {
    if (state.heads.length) remark = SAY.heads(state.heads.length, state.train_seconds.toFixed(0)) + " ";
    remark += SAY.unsure;
  }
  remark += ` ${state.chosen ? SAY.chosenPairs : SAY.randomPairs}`;
  put("remark", remark);
}

async function send(what, said) {
  if (busy || state === null) return;
  busy = true;
  document.body.classList.add("busy");
  try {
    const answer = await fetch(what, {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-Mirip-Token": token },
      body: JSON.stringify(said),
    });
    const next = await answer.json();
    if (answer.ok) {
      warn("");
      take(next);
    } else if (answer.status === 409) await refresh(); // judged in another tab
    else warn(SAY.notSaved(next.error));
  } catch {
    warn(SAY.gone);
  }
  busy = false;
  document.body.classList.remove("busy");
  mark(null);
}

async function refresh() {
  try {
    const answer = await fetch("state");
    if (answer.ok) take(await answer.json());
  } catch {
    // Told when something is to be saved.
  }
}

function mark(label) {
  find("left").classList.toggle("chosen", label === 1 || label === 0);
  find("right").classList.toggle("chosen", label === -1 || label === 0);
}

function judge(label) {
  if (busy || state === null) return;
  clock(false);
  mark(label);
  send("judge", { number: state.number, label, seconds: looked / 1000 });
}

const skip = () => state && send("skip", { number: state.number });
const undo = () => state && state.undo && send("undo", {});
const zoom = () => document.body.classList.toggle("large");

const KEYS = {
  ArrowLeft: () => judge(1), ArrowRight: () => judge(-1), ArrowDown: () => judge(0), 0: () => judge(0),
  " ": skip, u: undo, U: undo, Backspace: undo, z: zoom, Z: zoom,
};
document.addEventListener("keydown", (event) => {
  const key = event.key === "z" && (event.ctrlKey || event.metaKey) ? "u" : event.key;
  if ((event.ctrlKey || event.metaKey || event.altKey) && key === event.key) return; // the browser's own
  if (!(key in KEYS)) return;
  event.preventDefault(); // or the space bar would press the button that was clicked last
  if (!event.repeat) KEYS[key]();
});
document.addEventListener("keyup", (event) => {
  if (event.key === " ") event.preventDefault();
});
for (const button of document.querySelectorAll("[data-verdict]")) {
  button.addEventListener("click", () => judge(Number(button.dataset.verdict)));
}
find("skip").addEventListener("click", skip);
find("undo").addEventListener("click", undo);
find("zoom").addEventListener("click", zoom);
document.addEventListener("visibilitychange", () => clock(!document.hidden));

function shape(name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

// Share of right predictions over the number of judgements: a band with its 95 % interval, and a thin line.
function drawChart(place, { measure, teach }) {
  place.setAttribute("aria-label", SAY.chart);
  const all = [...measure, ...teach];
  place.hidden = all.length < 2;
  if (place.hidden) return place.replaceChildren();
  const [width, height, left, right, top, bottom] = [640, 200, 60, 10, 12, 30];
  const first = Math.min(...all.map((point) => point.at));
  const last = Math.max(...all.map((point) => point.at));
  const x = (at) => left + ((at - first) / Math.max(1, last - first)) * (width - left - right);
  const low = Math.min(0.4, ...all.filter((point) => point.count >= 10).map((point) => point.value - 0.05));
  const y = (share) => top + ((1 - Math.max(share, low)) / (1 - low)) * (height - top - bottom);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}` });
  for (const share of [0.25, 0.5, 0.75, 1]) {
    if (share < low) continue;
    svg.append(shape("line", { x1: left, x2: width - right, y1: y(share), y2: y(share), class: share === 0.5 ? "axis chance" : "axis" }));
    svg.append(shape("text", { x: left - 6, y: y(share) + 4, "text-anchor": "end" }, percent(share)));
  }
  svg.append(shape("text", { x: left + 4, y: y(0.5) - 4 }, SAY.chance));
  svg.append(shape("text", { x: left, y: height - 8 }, first));
  svg.append(shape("text", { x: width - right, y: height - 8, "text-anchor": "end" }, `${last} ${SAY.judgements}`));
  const path = (points, value) => points.map((point) => `${x(point.at).toFixed(1)},${y(value(point)).toFixed(1)}`).join(" ");
  // The first few predictions say nothing: their interval spans almost everything.
  const [random, picked] = [measure, teach].map((points) => points.filter((point) => point.count >= 5));
  const band = `${path(random, (point) => point.high)} ${path([...random].reverse(), (point) => point.low)}`;
  svg.append(shape("polygon", { points: band, class: "band" }));
  svg.append(shape("polyline", { points: path(picked, (point) => point.value), class: "picked" }));
  svg.append(shape("polyline", { points: path(random, (point) => point.value), class: "random" }));
  const legend = document.createElement("p");
  legend.className = "legend";
  for (const name of ["random", "picked"]) {
    const entry = document.createElement("span");
    entry.className = name;
    entry.textContent = SAY[name];
    legend.append(entry);
  }
  return place.replaceChildren(svg, legend);
}

document.documentElement.lang = LANGUAGE;
document.title = `${SAY.question} · mirip-fast`;
for (const element of document.querySelectorAll("[data-word]")) element.textContent = SAY[element.dataset.word];
put("training", SAY.training);
refresh();
// A head that is trained meanwhile shows without a key being pressed.
setInterval(() => state && state.training && !busy && refresh(), 3000);
