// Which works are selected, and the tray with what can be done with them.

const selected = new Set();
let anchor = null; // where a range starts

const inOrder = (works) => ownOrder().filter((work) => works.has(work));

// What a key acts on: the selected works, or the one that has the focus.
function targets() {
  if (selected.size) return inOrder(selected);
  return shown[current] ? [shown[current]] : [];
}

function select(work, on = !selected.has(work)) {
  if (on) selected.add(work);
  else selected.delete(work);
  anchor = work;
  selectionChanged();
}

function selectTo(work) {
  const [from, to] = [shown.indexOf(anchor), shown.indexOf(work)];
  if (from < 0 || to < 0) return select(work, true);
  for (const one of shown.slice(Math.min(from, to), Math.max(from, to) + 1)) selected.add(one);
  selectionChanged();
}

function selectShown() {
  for (const work of fitting) selected.add(work);
  selectionChanged();
}

function selectNone() {
  selected.clear();
  anchor = null;
  picked = [];
  selectionChanged();
}

function selectionChanged() {
  for (const [work, card] of cards) {
    card.classList.toggle("selected", selected.has(work));
    card.querySelector(".tick").setAttribute("aria-pressed", selected.has(work));
    card.querySelector(".pick").setAttribute("aria-pressed", picked.includes(work));
  }
  drawTray();
}

function drawTray() {
  const tray = byId("tray");
  tray.hidden = selected.size === 0 && picked.length !== 1;
  if (tray.hidden) return tray.replaceChildren();
  if (selected.size === 0) {
    return tray.replaceChildren(pictureOf(picked[0]), make("span", { text: say("compareFirst") }),
      iconButton("close", say("cancel"), selectNone));
  }
  const button = (key, click, off = false) => {
    const it = make("button", { type: "button", class: "plain", text: say(key), click });
    it.disabled = off;
    return it;
  };
  tray.replaceChildren(
    make("b", { role: "status", text: sayCount("selected", selected.size) }),
    button("markThem", openMarks),
    iconButton("up", say("moveUp"), () => moveShown(-1)),
    iconButton("down", say("moveDown"), () => moveShown(1)),
    button("compare", compareSelected, selected.size < 2 || selected.size > 4),
    button("export", openExport),
    iconButton("close", say("selectNone"), selectNone));
}

// One place up (-1) or down (1) among the works that are shown, for each of the targets.
function moveShown(way) {
  if (view.sort !== "mine") showOwnOrder();
  const works = targets().filter((work) => shown.includes(work));
  const moving = new Set(works);
  const ends = shown[current];
  for (const work of way < 0 ? works : works.reverse()) {
    const other = shown[shown.indexOf(work) + way];
    if (!other || moving.has(other)) {
      moving.add(work);
      continue;
    }
    moveBeside(work, other, way);
  }
  if (ends && !document.activeElement.closest(".tray")) focusCard(shown.indexOf(ends));
}

function showOwnOrder() {
  view.sort = "mine";
  drawControls();
  drawGrid();
}

function compareSelected() {
  if (selected.size >= 2 && selected.size <= 4) openCompare(inOrder(selected));
}

function openMarks() {
  const works = targets();
  if (works.length === 0) return;
  const dialog = byId("marks");
  const title = works.length === 1 ? works[0].name : sayCount("works", works.length);
  dialog.setAttribute("aria-label", say("yourMarks"));
  dialog.replaceChildren(
    make("header", {}, make("h2", { text: say("yourMarks") }), make("p", { class: "soft filename" }, make("bdi", { text: title })),
      iconButton("close", say("close"), () => dialog.close(), "quiet close")),
    markControls(works),
    make("p", { class: "soft legend", text: say(data.live ? "keptThere" : "keptHere") }));
  if (!dialog.open) dialog.showModal();
  dialog.querySelector("input[type=text]").focus();
}

// After anything was said: the cards, the controls that are open, what is filtered and sorted by it.
function marksChanged() {
  own = null;
  byId("undo").disabled = undoing.length === 0;
  byId("redo").disabled = redoing.length === 0;
  byId("unkept").hidden = kept;
  for (const [work, card] of cards) card.lastChild.replaceWith(marksLine(work));
  const sorts = byId("sort").options.length;
  if (sorts !== possibleOrders().length || filtersMarks()) drawFilters();
  if (view.sort === "mine" || view.text || filtersMarks()) {
    const focused = document.activeElement.closest?.("#grid .card") !== null;
    drawGrid();
    if (focused && shown.length) focusCard(current);
  }
  for (const section of document.querySelectorAll("dialog[open] .marks")) section.update();
}
