// What the user says of works: stars, tags, a note, and a place in an order of their own. It is kept in this
// browser, or by `mirip-fast serve` where the page comes from there.

const FIELDS = {
  stars: (value) => Number.isInteger(value) && value >= 1 && value <= 5,
  tags: (value) => Array.isArray(value) && value.length > 0 && value.length <= 50 &&
    value.every((tag) => typeof tag === "string" && tag.trim() && tag.length <= 100),
  note: (value) => typeof value === "string" && value.trim() !== "" && value.length <= 5000,
  at: (value) => Number.isFinite(value), // in the own order, between the places of the model's
};
const STORED = `marks-${data.key}`;
const keyed = new Map(data.works.map((work) => [work.key, work]));
const undoing = []; // steps: [[key, fields before, fields after]]
const redoing = [];
let marks = {}; // key of a work → its fields; what says nothing is not there
let kept = true; // whether what was said last is kept
let own = null; // the works in the user's own order; null: to be sorted anew

const markOf = (work) => marks[work.key] ?? {};
const atOf = (work) => markOf(work).at ?? work.place;
const isMoved = (work) => markOf(work).at !== undefined;

// Puts {key: {field: value, or null for none}} into marks; what makes no sense is left out.
function merge(into, said) {
  for (const [key, fields] of Object.entries(said)) {
    if (!/^[0-9a-f]{16}$/.test(key) || typeof fields !== "object" || fields === null) continue;
    const merged = { ...into[key] };
    for (const [field, holds] of Object.entries(FIELDS)) {
      if (!(field in fields)) continue;
      if (fields[field] !== null && holds(fields[field])) merged[field] = fields[field];
      else delete merged[field];
    }
    if (Object.keys(merged).length) into[key] = merged;
    else delete into[key];
  }
  return into;
}

function parsed(text) {
  try {
    const found = JSON.parse(text ?? "{}");
    return typeof found === "object" && found !== null ? found : {};
  } catch {
    return {};
  }
}

// changes: [[work, {field: value}]], one step of undo.
function mark(changes) {
  const step = changes.map(([work, after]) => {
    const before = Object.fromEntries(Object.keys(after).map((field) => [field, markOf(work)[field] ?? null]));
    return [work.key, before, after];
  });
  if (step.length === 0) return;
  undoing.push(step);
  redoing.length = 0;
  keep(Object.fromEntries(step.map(([key, , after]) => [key, after])));
}

function undo(from = undoing, to = redoing, side = 1) {
  const step = from.pop();
  if (!step) return;
  to.push(step);
  keep(Object.fromEntries(step.map((change) => [change[0], change[side]])));
}

const redo = () => undo(redoing, undoing, 2);

function keep(said) {
  merge(marks, said);
  if (data.live) sendMarks(said);
  else {
    // Another window with the same page may have said something since.
    marks = merge(merge({}, parsed(remembered(STORED))), said);
    kept = remember(STORED, JSON.stringify(marks));
  }
  marksChanged();
}

// One request after the other, so that none overtakes another; what fails is sent again.
let toSend = {};
let sending = null;

function sendMarks(said) {
  for (const [key, fields] of Object.entries(said)) toSend[key] = { ...toSend[key], ...fields };
  sending ??= sendAll();
}

async function sendAll() {
  while (Object.keys(toSend).length) {
    const said = toSend;
    toSend = {};
    try {
      const answer = await fetch("marks", {
        method: "POST", body: JSON.stringify({ marks: said }),
        headers: { "content-type": "application/json", "x-mirip-token": location.pathname.split("/")[1] },
      });
      if (!answer.ok) throw new Error((await answer.json()).error);
      marks = merge(merge({}, (await answer.json()).marks), toSend);
      kept = true;
    } catch {
      toSend = Object.fromEntries(
        [...new Set([...Object.keys(said), ...Object.keys(toSend)])].map((key) => [key, { ...said[key], ...toSend[key] }]),
      );
      kept = false;
    }
    marksChanged();
    if (!kept) await new Promise((wake) => setTimeout(wake, 2000));
  }
  sending = null;
}

// What another browser said since.
async function readMarks() {
  try {
    const answer = await fetch("marks");
    if (!answer.ok || sending) return;
    const found = merge({}, (await answer.json()).marks);
    if (!sending && JSON.stringify(found) !== JSON.stringify(marks)) {
      marks = found;
      marksChanged();
    }
  } catch {
    // the next one may come through; what is said meanwhile is told as not kept
  }
}

function startMarks() {
  if (data.live) {
    readMarks().then(() => data.works.some(isMoved) && showOwnOrder());
    setInterval(readMarks, 5000);
  } else {
    marks = merge({}, parsed(remembered(STORED)));
    window.addEventListener("storage", (event) => {
      if (event.key !== `mirip-fast-${STORED}`) return;
      marks = merge({}, parsed(event.newValue));
      marksChanged();
    });
  }
  window.addEventListener("beforeunload", (event) => {
    if (!kept) event.preventDefault();
  });
}

// The own order: a moved work has a number between those of its neighbours.

function ownOrder() {
  own ??= [...data.works].sort((a, b) => atOf(a) - atOf(b) || a.place - b.place);
  return own;
}

const placed = (work, at) => [work, { at: at === work.place ? null : at }];

// Puts a work before (-1) or after (1) another one.
function moveBeside(work, other, side) {
  if (work === other) return;
  const order = ownOrder();
  const [from, to] = [order.indexOf(work), order.indexOf(other)];
  if (to - from === side) return mark([placed(work, atOf(other)), placed(other, atOf(work))]);
  const beyond = order[to + side];
  const at = beyond ? (atOf(other) + atOf(beyond)) / 2 : atOf(other) + side;
  if (!beyond || (at !== atOf(other) && at !== atOf(beyond))) return mark([placed(work, at)]);
  const rest = order.filter((one) => one !== work); // no number is left between the two
  rest.splice(rest.indexOf(other) + (side > 0 ? 1 : 0), 0, work);
  mark(rest.map((one, place) => placed(one, place)));
}

// place: from 1.
function moveTo(work, place) {
  const rest = ownOrder().filter((one) => one !== work);
  if (rest.length === 0) return;
  if (place <= 1) moveBeside(work, rest[0], -1);
  else moveBeside(work, rest[Math.min(place, data.works.length) - 2], 1);
}

// Controls for the marks of one work or of several; `update` shows what holds by now, and leaves alone the
// field that somebody writes in.
function markControls(works) {
  const same = (field) => {
    const all = new Set(works.map((work) => JSON.stringify(markOf(work)[field])));
    return all.size === 1 ? markOf(works[0])[field] : undefined;
  };
  const stars = [1, 2, 3, 4, 5].map((n) => make("button", {
    type: "button", "aria-label": sayCount("starsOf", n), click: () => setStars(works, same("stars") === n ? 0 : n),
  }));
  const known = make("datalist", { id: "knowntags" });
  const tags = make("input", { type: "text", list: "knowntags", placeholder: say("tagsHint"), maxlength: 1000 });
  tags.addEventListener("change", () => setTags(works, tags.value));
  const note = make("textarea", { rows: 2, maxlength: 5000 });
  note.addEventListener("change", () => mark(works.map((work) => [work, { note: note.value.trim() || null }])));
  const place = make("input", { type: "number", min: 1, max: data.works.length });
  place.addEventListener("change", () => {
    if (place.value !== "") moveTo(works[0], Number(place.value));
  });
  const step = (way) => () => {
    const order = ownOrder();
    const other = order[order.indexOf(works[0]) + way];
    if (other) moveBeside(works[0], other, way);
  };
  const labelled = (key, field) => make("label", { class: "field" }, make("span", { class: "soft", text: say(key) }), field);
  const section = make("div", { class: "marks" },
    make("div", { class: "stars", role: "group", "aria-label": say("stars") }, ...stars),
    labelled("tags", tags), known, labelled("note", note));
  if (works.length === 1) {
    section.append(make("div", { class: "ownplace" },
      make("label", { class: "choice" }, make("span", { text: say("ownPlace") }), place),
      iconButton("up", say("moveUp"), step(-1), "quiet up"), iconButton("down", say("moveDown"), step(1), "quiet down")));
  }
  section.update = () => {
    for (const [i, button] of stars.entries()) {
      button.textContent = i < (same("stars") ?? 0) ? "★" : "☆";
      button.setAttribute("aria-pressed", same("stars") === i + 1);
    }
    known.replaceChildren(...allTags().map((tag) => make("option", { value: tag })));
    const said = [[tags, (same("tags") ?? []).join(", ")], [note, same("note") ?? ""], [place, ownOrder().indexOf(works[0]) + 1]];
    for (const [field, value] of said) if (field !== document.activeElement) field.value = value;
  };
  section.update();
  return section;
}

const setStars = (works, n) => mark(works.map((work) => [work, { stars: n || null }]));

function setTags(works, text) {
  const tags = [...new Set(text.split(/[,，、]/).map((tag) => tag.trim().normalize("NFC")).filter(Boolean))];
  mark(works.map((work) => [work, { tags: tags.length ? tags.map((tag) => tag.slice(0, 100)).slice(0, 50) : null }]));
}

function allTags() {
  return [...new Set(data.works.flatMap((work) => markOf(work).tags ?? []))].sort(names.compare);
}

// Below the label of a card: what was said of the work.
function marksLine(work) {
  const { stars, tags, note } = markOf(work);
  const line = make("p", { class: "said" });
  if (stars) line.append(make("span", { class: "given-stars", text: "★".repeat(stars), "aria-label": sayCount("starsOf", stars) }));
  if (isMoved(work)) {
    line.append(make("span", { class: "moved", text: say("movedTo", { place: (ownOrder().indexOf(work) + 1).toLocaleString(language) }) }));
  }
  for (const tag of tags ?? []) line.append(make("bdi", { class: "tag", text: tag }));
  if (note) line.append(make("bdi", { class: "soft", text: note, title: note }));
  line.hidden = line.childElementCount === 0;
  return line;
}
