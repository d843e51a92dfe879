// What is shown: a filter for each column of the user's table that tells works apart, for marks, and for
// works whose order is not settled.

const MOST_VALUES = 300; // of a column that gets a filter; names of works are found by searching

const columnFilters = data.columns
  .map((column) => {
    const counts = new Map();
    for (const work of data.works) {
      const value = valueOf(work, column);
      counts.set(value, (counts.get(value) ?? 0) + 1);
    }
    return { column, counts };
  })
  .filter(({ counts }) => counts.size > 1 && counts.size <= MOST_VALUES && counts.size < data.works.length);

function valueOf(work, column) {
  return work.given.find(([name]) => name === column)?.[1] ?? "";
}

const MARKED = {
  marked: (work) => Object.keys(markOf(work)).length > 0,
  unmarked: (work) => Object.keys(markOf(work)).length === 0,
  ...Object.fromEntries([1, 2, 3, 4, 5].map((n) => [`stars${n}`, (work) => (markOf(work).stars ?? 0) >= n])),
  noted: (work) => markOf(work).note !== undefined,
  moved: isMoved,
};

function passesFilters(work) {
  if (view.unsettled && work.settled !== false) return false;
  if (view.marked.startsWith("tag ")) {
    if (!(markOf(work).tags ?? []).includes(view.marked.slice(4))) return false;
  } else if (view.marked && !MARKED[view.marked](work)) return false;
  for (const [column, value] of view.columns) if (valueOf(work, column) !== value) return false;
  return true;
}

const filtersMarks = () => view.marked !== "";

function chooser(label, value, options, chosen) {
  const select = make("select", {}, make("option", { value: "", text: say("all") }),
    ...options.map(([key, text]) => make("option", { value: key, text })));
  select.value = value;
  if (select.selectedIndex < 0) select.append(make("option", { value, text: value })), (select.value = value);
  select.addEventListener("change", () => {
    chosen(select.value);
    drawFilterState();
    drawGrid();
  });
  return make("label", { class: "choice" }, make("bdi", { class: "what", text: label, title: label }), select);
}

function drawFilters() {
  drawSorts();
  const boxes = columnFilters.map(({ column, counts }) => {
    const values = [...counts].sort(([a], [b]) => names.compare(a, b));
    // The value "" is «all»: each value has a letter before it.
    const options = values.map(([value, count]) => [`=${value}`, `${value || say("emptyCell")} (${count.toLocaleString(language)})`]);
    const now = view.columns.has(column) ? `=${view.columns.get(column)}` : "";
    return chooser(column, now, options, (value) => {
      if (value) view.columns.set(column, value.slice(1));
      else view.columns.delete(column);
    });
  });
  const marked = Object.keys(MARKED).map((key) =>
    [key, /^stars/.test(key) ? say("starsAtLeast", { stars: "★".repeat(Number(key[5])) }) : say(key)]);
  const tags = allTags().map((tag) => [`tag ${tag}`, say("taggedWith", { tag })]);
  boxes.push(chooser(say("yourMarks"), view.marked, [...marked, ...tags], (value) => (view.marked = value)));
  if (data.works.some((work) => work.settled === false)) {
    const box = make("input", { type: "checkbox" });
    box.checked = view.unsettled;
    box.addEventListener("change", () => {
      view.unsettled = box.checked;
      drawFilterState();
      drawGrid();
    });
    boxes.push(make("label", { class: "choice" }, box, make("span", { text: say("onlyUnsettled") })));
  }
  boxes.push(make("button", { type: "button", class: "plain", text: say("noFilter"), click: dropFilters }));
  byId("filterboxes").replaceChildren(...boxes);
  drawFilterState();
}

function drawFilterState() {
  const count = view.columns.size + (view.marked ? 1 : 0) + (view.unsettled ? 1 : 0);
  byId("filters").querySelector("summary").textContent = count ? say("filtersOn", { n: count }) : say("filters");
}

function dropFilters() {
  view.columns.clear();
  view.tiers.clear();
  view.marked = view.text = byId("search").value = "";
  view.unsettled = false;
  onlyApplicant = null;
  drawApplicants();
  drawControls();
  drawGrid();
}
