// Drawings with axes. Text stays text beside them, so that it keeps its size on every screen.

// About n round numbers between two ends.
function roundMarks(low, high, n) {
  const rough = (high - low) / n;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((k) => k * power).find((size) => size >= rough);
  const marks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) marks.push(i * step);
  return marks.map((value) => Number(value.toPrecision(12)));
}

// x, y: {low, high, marks, write, name}; lines: [{points: [[x, y]], className}]; dots: [{x, y, className, title}].
function chart({ x, y, lines, dots = [], label, className = "" }) {
  const share = (axis, value) => (value - axis.low) / (axis.high - axis.low || 1);
  const at = ([a, b]) => `${(WIDTH * share(x, a)).toFixed(1)} ${(WIDTH * (1 - share(y, b))).toFixed(1)}`;
  const path = (points, name) => makeSvg("path", { d: `M${points.map(at).join("L")}`, class: name });
  const grid = y.marks.map((mark) => path([[x.low, mark], [x.high, mark]], "grid-line"));
  const drawn = makeSvg("svg",
    { viewBox: `0 0 ${WIDTH} ${WIDTH}`, preserveAspectRatio: "none", role: "img", "aria-label": label },
    ...grid, ...lines.map(({ points, className: name }) => path(points, name)));
  const area = make("div", { class: "area-of" }, drawn, ...dots.map((dot) => {
    const point = make("i", { class: dot.className, title: dot.title });
    point.style.left = `${100 * share(x, dot.x)}%`;
    point.style.bottom = `${100 * share(y, dot.y)}%`;
    return point;
  }));
  const writeMarks = (axis, side) => make("div", { class: side === "left" ? "x" : "y", "aria-hidden": "true" },
    ...axis.marks.map((mark) => {
      const text = make("span", { text: axis.write(mark) });
      text.style[side] = `${100 * share(axis, mark)}%`;
      return text;
    }));
  return make("div", { class: `chart ${className}` }, make("div", { class: "yname", text: y.name }),
    writeMarks(y, "bottom"), area, writeMarks(x, "left"), make("div", { class: "xname", text: x.name }));
}

function key(...entries) {
  return make("div", { class: "key" }, ...entries.map(([className, text]) =>
    make("span", {}, make("i", { class: className, "aria-hidden": "true" }), text)));
}

function learningChart(what) {
  const fits = data.learning;
  const values = fits.flatMap((fit) => [...fit[`train_${what}`], ...fit[`val_${what}`]]).filter(Number.isFinite);
  const ends = what === "accuracy" ? [Math.min(0.5, ...values), 1] : [Math.min(0, ...values), Math.max(...values)];
  const last = Math.max(2, ...fits.flatMap((fit) => fit.epochs));
  const faint = fits.length > 1 ? "faint" : "";
  const lines = fits.flatMap((fit) => [["train", "train"], ["val", ""]].map(([part, name]) => ({
    points: fit.epochs.map((epoch, i) => [epoch, fit[`${part}_${what}`][i]]), className: `${name} ${faint}`,
  })));
  if (what === "accuracy") lines.push({ points: [[1, 0.5], [last, 0.5]], className: "chance" });
  const dots = fits.filter((fit) => fit.best !== null && fit.epochs.includes(fit.best)).map((fit) => ({
    x: fit.best, y: fit[`val_${what}`][fit.epochs.indexOf(fit.best)], className: "best",
    title: [fit.name, say("bestEpoch", { n: fit.best })].filter(Boolean).join(": "),
  }));
  const x = { low: 1, high: last, marks: roundMarks(1, last, 5).filter((mark) => mark % 1 === 0), write: String, name: say("epoch") };
  const y = { low: ends[0], high: ends[1], marks: roundMarks(ends[0], ends[1], 5), name: say(what),
    write: what === "accuracy" ? percent : (value) => String(value) };
  return chart({ x, y, lines, dots, label: say(what) });
}

// Each pair counts half in each orientation: the left half mirrors the right one.
function reliabilityChart(bins) {
  const lines = [{ points: [[0, 0], [1, 1]], className: "chance" }];
  const dots = [];
  for (const bin of bins.filter(({ predicted }) => predicted !== null)) {
    for (const turn of [(value) => value, (value) => 1 - value]) {
      const x = turn(bin.predicted);
      if (bin.interval !== null) {
        lines.push({ points: [[x, turn(bin.interval.low)], [x, turn(bin.interval.high)]], className: "" });
      }
      dots.push({ x, y: turn(bin.observed), className: "",
        title: say("binHint", { said: percent(x), true: percent(turn(bin.observed)), n: bin.pairs.toLocaleString(language) }) });
    }
  }
  const axis = (name) => ({ low: 0, high: 1, marks: [0, 0.25, 0.5, 0.75, 1], write: percent, name });
  return chart({ x: axis(say("saidAxis")), y: axis(say("trueAxis")), lines, dots, label: say("reliability"), className: "square" });
}

function violins({ low, high, tiers }) {
  const place = (score) => (WIDTH * (score - low)) / (high - low);
  const middle = HEIGHT / 2;
  const rows = tiers.map((tier, number) => {
    const edge = (sign) => tier.curve.map((y, i) =>
      `${((WIDTH * i) / (tier.curve.length - 1)).toFixed(1)} ${(middle + sign * y * (middle - 1)).toFixed(1)}`);
    const shape = `M${[...edge(-1), ...edge(1).reverse()].join("L")}Z`;
    const area = makeSvg("path", { d: shape, class: "area" });
    area.style.fill = tierColour(number);
    area.style.opacity = 0.4;
    const single = makeSvg("path", { d: ticks(tier.ticks.map(place), middle - 6, middle + 6), class: "single" });
    single.style.stroke = tierColour(number);
    const drawn = [area, single];
    if (tier.ticks.length) {
      drawn.push(makeSvg("path", { d: ticks([place(tier.median)], 2, HEIGHT - 2), class: "mark" }));
    }
    return curveRow(tier.name, `n = ${tier.count.toLocaleString(language)}`, drawn);
  });
  const axis = make("div", { class: "axis" },
    make("span", { text: `← ${say("lower")} (${low.toPrecision(3)})` }), make("span", { text: `(${high.toPrecision(3)}) ${say("higher")} →` }));
  return make("div", { class: "curves violins", role: "img", "aria-label": say("violins") }, ...rows, axis);
}
