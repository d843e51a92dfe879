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
  drawApplicants();
  drawControls();
  drawFailures();
}

// What the program said, in the page's language where there is a translation.
function inWords(text) {
  const said = (data.spoken[language] || {})[text] || text;
  return { lang: said === text ? "en" : language, text: said };
}

// [what the page says, what the program said]
function notes() {
  const told = (text) => make("span", { ...inWords(text), class: "soft" });
  const lines = [];
  const known = data.source !== null && data.works[0].percent !== null;
  byId("legend").hidden = !known;
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

function drawSorts() {
  byId("sort").replaceChildren(
    ...possibleOrders().map((order) => make("option", { value: order, text: say(order) })),
  );
  byId("sort").value = view.sort;
}

function drawControls() {
  drawFilters();
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
      make("tr", {}, make("td", {}, make("bdi", { text: name })), make("td", { ...inWords(reason), class: "soft" })),
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

for (const dialog of document.querySelectorAll("dialog")) {
  dialog.tabIndex = -1; // so that opening it puts the focus on itself
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog && dialog.classList.contains("sheet")) dialog.close();
  });
}

byId("help").addEventListener("click", openKeys);
for (const [name, click] of [["undo", () => undo()], ["redo", redo], ["exportopen", openExport]]) byId(name).addEventListener("click", click);
byId("undo").append(icon("undo"));
byId("redo").append(icon("redo"));
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
  if (columns() !== perRow) drawGrid();
});
addEventListener("resize", () => {
  if (columns() !== perRow) drawGrid();
});

const narrow = matchMedia("(max-width: 700px)").matches;
byId("size").value = Number(remembered("size")) || 220;
if (!narrow) byId("grid").style.setProperty("--cell", `${byId("size").value}px`);
byId("about").open = !narrow;
// A card that gets the focus must not lie below the bar.
new ResizeObserver(() => {
  document.documentElement.style.scrollPaddingTop = narrow ? "" : `${byId("bar").offsetHeight + 12}px`;
}).observe(byId("bar"));
startMarks();
if (data.works.some(isMoved)) view.sort = "mine";
drawAll();
marksChanged();
