// The page's head, its controls and its keys.

function drawHead() {
  drawTools();
  byId("title").textContent = data.title;
  const made = new Date(data.made).toLocaleDateString(language, { dateStyle: "long" });
  const parts = [sayCount("works", data.works.length), say("sortedBy", { model: data.model }), made];
  byId("summary").textContent = parts.join(" · ");
  byId("curves").replaceChildren(
    ...(data.curves ? [make("figcaption", { text: say("curvesTitle") }), curvesChart()] : []),
  );
  byId("notes").replaceChildren(...notes().map((note) => make("li", {}, ...note)));
  drawControls();
  drawFailures();
}

// [what the page says, what the program said in English]
function notes() {
  const told = (text) => make("span", { lang: "en", class: "soft", text });
  const lines = [];
  const known = data.source !== null && data.works[0].percent !== null;
  if (known) lines.push([say(`noteSource_${data.source}`, { n: data.heldOut.toLocaleString(language) })]);
  else lines.push([say("noteNone")]);
  for (const remark of data.remarks) lines.push([told(remark)]);
  if (data.within !== null && known) lines.push([say("noteWithin", { column: data.within })]);
  if (data.noIntervals === null) {
    lines.push([say(data.byPairs ? "noteIntervalsPairs" : "noteIntervalsProcess", { confidence: percent(data.confidence) })]);
  } else {
    lines.push([say("noteNoIntervals"), " ", told(`(${data.noIntervals})`)]);
  }
  if (data.anchors !== null) {
    const counts = data.tiers.map((name, tier) => `${name} ${data.anchors.counts[tier]}`).join(", ");
    lines.push([say("noteWins", { counts })]);
    for (const remark of data.anchors.remarks) lines.push([told(remark)]);
  }
  if (data.seen > 0) lines.push([sayCount("noteSeen", data.seen)]);
  lines.push([say("noteUse")]);
  return lines;
}

function drawControls() {
  byId("sort").replaceChildren(
    ...possibleOrders().map((order) => make("option", { value: order, text: say(order) })),
  );
  byId("sort").value = view.sort;
  byId("stacking").hidden = data.works.every((work) => work.stack === null);
  byId("stack").checked = view.stacked;
  const known = data.works[0].chances !== null;
  byId("tiers").hidden = !known;
  if (known) byId("tiers").replaceChildren(...data.tiers.map(tierChip));
}

function tierChip(name, tier) {
  const count = data.works.filter((work) => work.tier === tier).length;
  const chip = make("button", {
    type: "button", class: "chip", "aria-pressed": view.tiers.has(tier),
    click: () => {
      if (!view.tiers.delete(tier)) view.tiers.add(tier);
      chip.setAttribute("aria-pressed", view.tiers.has(tier));
      drawGrid();
    },
  }, tierDot(tier), make("bdi", { text: name }), make("span", { class: "soft", text: count.toLocaleString(language) }));
  return chip;
}

function drawFailures() {
  const box = byId("failures");
  box.hidden = data.failures.length === 0;
  if (box.hidden) return;
  box.querySelector("summary").textContent = sayCount("unread", data.failures.length);
  box.querySelector("tbody").replaceChildren(
    ...data.failures.map(({ name, reason }) =>
      make("tr", {}, make("td", {}, make("bdi", { text: name })), make("td", { lang: "en", class: "soft", text: reason })),
    ),
  );
}

function drawAll() {
  cards.clear();
  drawHead();
  drawGrid();
  drawTray();
}

function toggleStacks() {
  view.stacked = !view.stacked;
  view.opened.clear();
  byId("stack").checked = view.stacked;
  drawGrid();
}

function openKeys() {
  const rows = [
    ["← ↑ → ↓", "keyArrows"], ["Home End", "keyEnds"], ["Enter", "keyEnter"], ["Esc", "keyEsc"],
    ["/", "keySearch"], ["c", "keyCompare"], ["s", "keyStack"], ["t", "keyTheme"], ["?", "keyHelp"],
  ];
  if (data.works.some((work) => work.map !== null)) rows.splice(-2, 0, ["m", "keyMap"]);
  const list = rows.map(([keys, text]) =>
    make("div", {}, make("dt", {}, ...keys.split(" ").map((key) => make("kbd", { text: key }))),
      make("dd", { text: say(text) })));
  const dialog = byId("keys");
  dialog.setAttribute("aria-labelledby", "keystitle");
  dialog.replaceChildren(
    make("header", {}, make("h2", { id: "keystitle", text: say("keysTitle") }),
      iconButton("close", say("close"), () => dialog.close(), "quiet close")),
    make("dl", {}, ...list),
  );
  dialog.showModal();
  dialog.focus();
}

// The key's sign in the keyboard's own layout; its Latin letter where the keyboard is set to Hangul.
function keyOf(event) {
  const hangul = event.key.length === 1 && event.key > "\u007f";
  if ((hangul || event.key === "Process") && /^Key[A-Z]$/.test(event.code)) return event.code[3].toLowerCase();
  return event.key.length === 1 ? event.key.toLowerCase() : event.key;
}

function inGrid(key) {
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns() };
  if (key in steps) {
    const there = document.activeElement.closest?.(".card");
    const next = current + steps[key];
    if (!there) focusCard(current);
    else if (next >= 0 && next < shown.length) focusCard(next);
  } else if (key === "Home") focusCard(0);
  else if (key === "End") focusCard(shown.length - 1);
  else if (key === "c" && shown[current]) pickWork(shown[current]);
  else if (key === "/") byId("search").focus();
  else if (key === "s" && !byId("stacking").hidden) toggleStacks();
  else if (key === "Escape" && picked.length) dropPicks();
  else return false;
  return true;
}

function inLargeView(key) {
  if (key === "ArrowLeft") stepLarge(-1);
  else if (key === "ArrowRight") stepLarge(1);
  else if (key === "c") compareFromLarge();
  else if (key === "m" && inLarge.map !== null) toggleMap();
  else return false;
  return true;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const field = event.target.closest?.("input:not([type=checkbox]), select");
  if (field) {
    if (event.key === "Escape" && field === byId("search")) {
      field.value = view.text = "";
      drawGrid();
      focusCard(current);
    } else if (event.key === "Enter" && field === byId("search")) focusCard(0);
    return;
  }
  const key = keyOf(event);
  const open = document.querySelector("dialog[open]");
  let used = false;
  if (open === large) used = inLargeView(key);
  else if (!open) used = inGrid(key);
  if (!used && key === "?" && !open) used = (openKeys(), true);
  if (!used && key === "t") used = (nextTheme(), true);
  if (used) event.preventDefault();
});

for (const dialog of document.querySelectorAll("dialog")) {
  dialog.tabIndex = -1; // so that opening it puts the focus on itself
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog && dialog.classList.contains("sheet")) dialog.close();
  });
}

byId("help").addEventListener("click", openKeys);
startTools(drawAll);
byId("search").addEventListener("input", (event) => {
  view.text = event.target.value;
  drawGrid();
});
byId("sort").addEventListener("change", (event) => {
  view.sort = event.target.value;
  drawGrid();
});
byId("stack").addEventListener("change", toggleStacks);
byId("size").addEventListener("input", (event) => {
  byId("grid").style.setProperty("--cell", `${event.target.value}px`);
  remember("size", event.target.value);
});

const narrow = matchMedia("(max-width: 700px)").matches;
byId("size").value = Number(remembered("size")) || 220;
if (!narrow) byId("grid").style.setProperty("--cell", `${byId("size").value}px`);
byId("about").open = !narrow;
drawAll();
