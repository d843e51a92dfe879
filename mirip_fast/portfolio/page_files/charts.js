// Small drawings: scores by tier, the interval of a rank, the probability of each tier.

const WIDTH = 1000; // of a drawing, in its own units; it is stretched to the room there is
const HEIGHT = 40;

function stretched(label, ...children) {
  const options = { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", class: "plot" };
  if (label) Object.assign(options, { role: "img", "aria-label": label });
  else options["aria-hidden"] = "true";
  return makeSvg("svg", options, ...children);
}

function ticks(positions, from, to) {
  return positions.map((x) => `M${x.toFixed(1)} ${from}V${to}`).join("");
}

// Scores of graded works, a row per tier, with a line for each marked work: [{score, colour}].
function curvesChart(marks = []) {
  const { low, high, tiers } = data.curves;
  const place = (score) => (WIDTH * (score - low)) / (high - low);
  const lines = () =>
    marks.map(({ score, className }) =>
      makeSvg("path", { d: `M${place(score).toFixed(1)} 0V${HEIGHT}`, class: `mark ${className}` }),
    );
  const rows = tiers.map((tier, number) => {
    const base = HEIGHT - 7;
    const points = tier.curve.map((y, i) => {
      const x = (WIDTH * i) / (tier.curve.length - 1);
      return `${x.toFixed(1)} ${(base - y * (base - 3)).toFixed(1)}`;
    });
    const area = makeSvg("path", { d: `M0 ${base}L${points.join("L")}L${WIDTH} ${base}Z`, class: "area" });
    area.style.fill = tierColour(number);
    const line = makeSvg("path", { d: `M${points.join("L")}`, class: "line" });
    line.style.stroke = tierColour(number);
    const single = makeSvg("path", { d: ticks(tier.ticks.map(place), base + 2, HEIGHT), class: "single" });
    single.style.stroke = tierColour(number);
    return curveRow(tier.name, tier.count.toLocaleString(language), [area, line, single, ...lines()]);
  });
  const here = ticks(data.works.map((work) => place(work.score)), HEIGHT - 22, HEIGHT - 2);
  const own = [makeSvg("path", { d: here, class: "single here" }), ...lines()];
  rows.push(curveRow(say("these"), data.works.length.toLocaleString(language), own));
  const axis = make("div", { class: "axis" },
    make("span", { text: `← ${say("lower")}` }), make("span", { text: `${say("higher")} →` }));
  return make("div", { class: "curves", role: "img", "aria-label": say("curvesTitle") }, ...rows, axis);
}

function curveRow(name, count, drawn) {
  return make("div", { class: "curve" },
    make("bdi", { class: "what", text: name, title: name }), stretched("", ...drawn),
    make("span", { class: "many", text: count }));
}

// Where the rank and its interval lie between the first and the last.
function rankLine(work) {
  const last = Math.max(2, data.works.length);
  const place = (rank) => (100 * (rank - 1)) / (last - 1);
  const line = make("div", { class: "rankline", "aria-hidden": "true" });
  if (work.low !== null) {
    const range = make("i", { class: "between" });
    range.style.left = `${place(work.low)}%`;
    range.style.width = `${place(work.high) - place(work.low)}%`;
    line.append(range);
  }
  const point = make("i", { class: "point" });
  point.style.left = `${place(work.rank)}%`;
  line.append(point);
  return line;
}

function tierBars(work) {
  if (work.chances === null) return make("p", { class: "soft", text: say("unknown") });
  return make("ul", { class: "bars" }, ...work.chances.map((chance, tier) => {
    const full = make("i", { class: "full" });
    full.style.width = `${100 * chance}%`;
    full.style.background = tierColour(tier);
    return make("li", { class: tier === work.tier ? "chosen" : "" },
      make("bdi", { class: "what", text: data.tiers[tier], title: data.tiers[tier] }),
      make("span", { class: "room", "aria-hidden": "true" }, full),
      make("span", { class: "many", text: percent(chance) }));
  }));
}

// How many of each tier's anchors a work beats.
function winBars(work) {
  return make("ul", { class: "bars" }, ...work.wins.map((rate, tier) => {
    const full = make("i", { class: "full" });
    full.style.width = `${100 * (rate ?? 0)}%`;
    full.style.background = tierColour(tier);
    return make("li", { class: tier === work.tier ? "chosen" : "" },
      make("bdi", { class: "what", text: data.tiers[tier], title: data.tiers[tier] }),
      make("span", { class: "room half", "aria-hidden": "true" }, full),
      make("span", { class: "many", text: rate === null ? "?" : percent(rate) }));
  }));
}

function intervalText(work) {
  if (work.low === null) return say("intervalUnknown");
  return say("interval", { confidence: percent(data.confidence), low: work.low, high: work.high });
}
