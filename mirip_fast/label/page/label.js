"use strict";
const find = (name) => document.getElementById(name);
const token = location.pathname.split("/")[1];
let state = null; // what the program said last
let busy = false; // a verdict is on its way
let order = []; // places of the four works that were chosen so far, the best first
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

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// A work is given its tier, two are compared, or four put in order.
const mode = () => (state.tiers ? "grade" : state.works.length > 2 ? "four" : "pair");

function showWorks() {
  looked = 0;
  lookingSince = null;
  order = [];
  const place = find("works");
  if (document.body.dataset.mode !== mode() || place.children.length !== state.works.length) rebuild(place);
  let missing = state.works.length;
  state.works.forEach((number, i) => {
    const image = place.children[i].querySelector("img");
    image.alt = mode() === "pair" ? [SAY.leftWork, SAY.rightWork][i] : SAY.work(i + 1);
    image.onload = () => {
      if (--missing === 0 && !document.hidden) clock(true);
    };
    image.onerror = () => warn(SAY.unreadable);
    image.src = `image/${number}`;
  });
  for (const number of state.ahead) new Image().src = `image/${number}`; // the next pair is there at once
  put("question", state.works.length ? SAY.question[mode()] : SAY.allGraded);
  document.title = `${SAY.question[mode()]} · mirip-fast`;
}

function rebuild(place) {
  document.body.dataset.mode = mode();
  place.replaceChildren(
    ...state.works.map((_, i) => {
      const work = make("button", { class: "work" }, make("img", { alt: "" }));
      if (mode() === "pair") work.id = ["left", "right"][i];
      work.addEventListener("click", () => pick(i));
      return work;
    }),
  );
  const verdict = (label, better, ...children) => {
    const button = make("button", { class: `verdict ${better}` }, ...children);
    button.addEventListener("click", () => judge(label));
    return button;
  };
  const words = (beside, stacked) => [make("span", { class: "beside" }, beside), make("span", { class: "stacked" }, stacked)];
  let buttons = [make("span", { class: "hint" }, SAY.inOrder)];
  if (mode() === "pair") {
    buttons = [
      verdict(1, "better", make("kbd", {}, "←"), ...words(SAY.left, SAY.upper)),
      verdict(0, "", make("kbd", {}, "0"), SAY.tie),
      verdict(-1, "better", ...words(SAY.right, SAY.lower), make("kbd", {}, "→")),
    ];
  } else if (mode() === "grade") {
    buttons = state.tiers.map((tier, i) => verdict(i, "", ...(i < 9 ? [make("kbd", {}, i + 1)] : []), tier));
  }
  find("verdicts").replaceChildren(...buttons);
  find("four").hidden = find("progress").hidden = mode() === "grade";
}

function take(next) {
  const other = state === null || next.number !== state.number;
  state = next;
  if (other) showWorks();
  showFigures();
}

function showShare(name, share) {
  const known = share && share.count;
  put(name, known ? percent(share.value) : "–");
  put(`${name}-note`, known ? SAY.share(share) : SAY.none);
}

function showAgreement() {
  const told = (state.agreement || []).map((two) => SAY.agree(two.first, two.second, two));
  if (state.grades) {
    const { alpha, overlap, pairs } = state.grades;
    if (overlap) told.push(SAY.alpha(alpha === null ? "–" : alpha.toFixed(2), overlap));
    for (const two of pairs) told.push(SAY.same(two.first, two.second, percent(two.same), two.works));
  }
  find("agreement").replaceChildren(...told.map((text) => make("li", {}, text)));
}

function showFigures() {
  put("judge", `${state.judge} ·`);
  find("undo").disabled = !state.undo;
  showAgreement();
  if (mode() === "grade") return put("judged", SAY.graded(state.judged, state.now, state.left));
  find("four").firstElementChild.textContent = state.four ? SAY.two : SAY.four;
  put("judged", SAY.judged(state.judged, state.now));
  find("training").hidden = !state.training;
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
  order = [];
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
  [...find("works").children].forEach((work, i) => {
    work.classList.toggle("chosen", mode() === "pair" && (label === 0 || label === [1, -1][i]));
    work.dataset.place = mode() === "four" && order.includes(i) ? order.indexOf(i) + 1 : "";
  });
}

function judge(label) {
  if (busy || state === null || !state.works.length) return;
  clock(false);
  mark(label);
  send("judge", { number: state.number, label, seconds: looked / 1000 });
}

// Of four works, the next best one; the last one follows from the others.
function rank(i) {
  if (busy || order.includes(i)) return;
  order.push(i);
  if (order.length === 3) order.push([0, 1, 2, 3].find((k) => !order.includes(k)));
  mark(null);
  if (order.length < 4) return;
  clock(false);
  send("judge", { number: state.number, order: order.map((k) => state.works[k]), seconds: looked / 1000 });
}

const pick = (i) => (mode() === "pair" ? judge([1, -1][i]) : mode() === "four" ? rank(i) : zoom());
const skip = () => state && state.works.length && send("skip", { number: state.number });
const zoom = () => document.body.classList.toggle("large");
const four = () => state && !state.tiers && send("four", { on: !state.four });

function undo() {
  if (order.length && !busy) {
    order.pop();
    mark(null);
  } else if (state && state.undo) send("undo", {});
}

// What was judged: thumbnails, verdict, judge; one's own can be taken back.
async function showList() {
  let rows;
  try {
    rows = await (await fetch("list")).json();
  } catch {
    return warn(SAY.gone);
  }
  const entry = (row) => {
    const works = row.works.map((number, i) => {
      const better = row.works.length > 1 && row.label === [1, -1][i];
      return make("img", { src: `thumb/${number}`, alt: SAY.work(i + 1), loading: "lazy", class: better ? "better" : "" });
    });
    const said = row.works.length > 1 ? SAY.verdict[row.label] : row.label;
    const item = make("li", {}, ...works, make("strong", {}, said), make("span", {}, row.judge));
    if (row.mine) {
      const back = make("button", {}, SAY.undo);
      back.addEventListener("click", async () => {
        await send("undo", { row: row.row });
        showList();
      });
      item.append(back);
    }
    return item;
  };
  find("listed").querySelector("ul").replaceChildren(...rows.map(entry));
  if (!find("listed").open) find("listed").showModal();
}

function showKeys() {
  const told = [...SAY.help[mode()], ...SAY.help.all].filter(([key]) => key !== "F" || mode() !== "grade");
  find("keys").querySelector("dl").replaceChildren(...told.flatMap(([key, what]) => [make("dt", {}, key), make("dd", {}, what)]));
  find("keys").showModal();
}

const BUTTONS = { skip, undo, zoom, four, list: showList, help: showKeys };
const COMMON = { " ": skip, u: undo, backspace: undo, z: zoom, f: four, l: showList, "?": showKeys };
const PAIR = { arrowleft: () => judge(1), arrowright: () => judge(-1), arrowdown: () => judge(0), 0: () => judge(0) };

function actionOf(key) {
  if (mode() === "pair" && key in PAIR) return PAIR[key];
  const digit = /^[1-9]$/.test(key) ? Number(key) - 1 : -1;
  if (mode() === "four" && digit in [0, 1, 2, 3]) return () => rank(digit);
  if (mode() === "grade") {
    const alike = [...state.tiers.keys()].filter((i) => state.tiers[i].toLowerCase().startsWith(key));
    const tier = digit in state.tiers ? digit : alike.length === 1 ? alike[0] : -1;
    if (tier >= 0) return () => judge(tier);
  }
  return COMMON[key];
}

document.addEventListener("keydown", (event) => {
  const control = event.ctrlKey || event.metaKey || event.altKey;
  // A Korean or Russian keyboard says ㅕ or г where U is.
  const typed = /^Key/.test(event.code) && !/^[ -~]$/.test(event.key) ? event.code.slice(3) : event.key;
  const key = typed.toLowerCase();
  if (state === null || document.querySelector("dialog[open]")) return;
  const act = control ? key === "z" && !event.altKey && undo : actionOf(key); // others are the browser's own
  if (!act) return;
  event.preventDefault(); // or the space bar would press the button that was clicked last
  if (!event.repeat) act();
});
document.addEventListener("keyup", (event) => {
  if (event.key === " ") event.preventDefault();
});
for (const [name, act] of Object.entries(BUTTONS)) find(name).addEventListener("click", act);
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.querySelector("button.close").addEventListener("click", () => dialog.close());
}
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
for (const element of document.querySelectorAll("[data-word]")) element.textContent = SAY[element.dataset.word];
put("training", SAY.training);
refresh();
// A head that is trained meanwhile shows without a key being pressed.
setInterval(() => state && state.training && !busy && refresh(), 3000);
