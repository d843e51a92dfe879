// Tables, rows of shares, and the worst mistakes.

const SHOWN_ROWS = 20;
const MANY_TIERS = 7;

const oneDecimal = (value) => (100 * value).toLocaleString(language, { minimumFractionDigits: 1, maximumFractionDigits: 1 });
const asPercent = (value) => `${oneDecimal(value)}%`;
const asNumber = (value) => value.toLocaleString(language, { minimumFractionDigits: 3, maximumFractionDigits: 3 });

// «84», and «99.7» where 100 would say too much.
function ofHundred(value) {
  const whole = Math.round(100 * value);
  return (whole === 100 && value < 1) || (whole === 0 && value > 0) ? oneDecimal(value) : String(whole);
}

function spanOf({ low, high }, write) {
  return low === null ? say("unknown") : `${write(low)}–${write(high)}`;
}

function part(name, content, values = {}) {
  return make("section", { class: "part", id: name }, make("h2", { text: say(name, values) }),
    make("p", { class: "caption", text: say(`${name}Text`, values) }), ...[content].flat());
}

function measureTable(report) {
  const percents = ["accuracy", "macro", "within", "tierAccuracy", "macroF1"];
  const rows = Object.entries(report.measures).filter(([, measure]) => measure.value !== null);
  const head = [say("measure"), say("value"), say("intervalOf", { confidence: percent(report.confidence) }), say("meaning")];
  return make("table", { class: "measures" },
    make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col", text })))),
    make("tbody", {}, ...rows.map(([name, measure]) => {
      const write = percents.includes(name) ? asPercent : asNumber;
      const values = { column: report.withinColumn ?? "", n: report.gradedFiner.toLocaleString(language) };
      return make("tr", { "data-measure": name },
        make("th", { scope: "row", text: say(`m_${name}`, values) }), make("td", { text: write(measure.value) }),
        make("td", { text: spanOf(measure, write) }), make("td", { text: say(`mText_${name}`, values) }));
    })));
}

function table(name, head, rows) {
  return make("table", { class: name },
    make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col", text })))),
    make("tbody", {}, ...rows.map(([name, ...cells]) => make("tr", {},
      make("th", { scope: "row" }, make("bdi", { text: name })), ...cells.map((text) => make("td", { text }))))));
}

function graderTables({ agreement, confidence }) {
  const or = (value, write) => (value === null ? say("unknown") : write(value));
  const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toLocaleString(language, { minimumFractionDigits: 2, maximumFractionDigits: 2 });
  const figures = Object.entries(agreement.figures).filter(([, measure]) => measure.value !== null).map(([name, measure]) => {
    const write = name === "alpha" ? asNumber : asPercent;
    return [say(`m_${name}`), write(measure.value), spanOf(measure, write), say(`mText_${name}`)];
  });
  const graders = agreement.graders.map(({ grader, works, strictness, ceiling, model }) =>
    [`${grader} (${sayCount("works", works)})`, or(strictness, signed), or(ceiling, asPercent), or(model, asPercent)]);
  return [table("measures", [say("measure"), say("value"), say("intervalOf", { confidence: percent(confidence) }), say("meaning")], figures),
    make("div", { class: "scroll" }, table("graders", [say("grader"), say("strictness"), say("byOthers"), say("modelByThis")], graders))];
}

function matrix(rows, columns, cell, { rowName, columnName }) {
  const many = columns.length > MANY_TIERS ? " many" : "";
  const name = (text) => make("bdi", { text, title: text });
  const axes = make("p", { class: "axes", text: `↓ ${rowName}  ·  → ${columnName}` });
  const table = make("table", { class: `matrix${many}` },
    make("thead", {}, make("tr", {}, make("th"), ...columns.map((text) => make("th", { scope: "col" }, name(text))))),
    make("tbody", {}, ...rows.map((text, i) => make("tr", {}, make("th", { scope: "row" }, name(text)),
      ...columns.map((_, j) => {
        const { text: shown, share, title, right } = cell(i, j);
        const box = make("td", { text: shown, title, class: right ? "right" : "" });
        // Never so dark that the number in it could not be read.
        if (share > 0) box.style.background = `color-mix(in oklab, var(--accent) ${Math.round(45 * share)}%, var(--empty))`;
        return box;
      })))));
  return [axes, make("div", { class: "scroll" }, table)];
}

function confusionMatrix(report) {
  const rows = data.tiers.map((name, i) => `${name} (n = ${report.counts[i].toLocaleString(language)})`);
  return matrix(rows, data.tiers, (i, j) => {
    const row = report.confusion[i];
    const all = row.reduce((sum, count) => sum + count, 0);
    const share = all ? row[j] / all : 0;
    const many = data.tiers.length > MANY_TIERS;
    return { text: all === 0 || (many && row[j] === 0) ? "" : row[j].toLocaleString(language), share, right: i === j,
      title: all ? percent(share) : say("noWork") };
  }, { rowName: say("trueTier"), columnName: say(report.byQuota ? "quotaTier" : "likelyTier") });
}

function tierPairMatrix(report) {
  const found = new Map(report.tierPairs.map((row) => [`${row.better}\n${row.worse}`, row]));
  return matrix(data.tiers, data.tiers, (i, j) => {
    const row = found.get(`${data.tiers[i]}\n${data.tiers[j]}`);
    return row ? { text: ofHundred(row.value), share: row.value, title: spanOf(row, asPercent) } : { text: "", share: 0 };
  }, { rowName: say("betterTier"), columnName: say("worseTier") });
}

// rows: {name, small, pairs, value, low, high}; overall: marked by a line.
function shareRows(rows, overall) {
  const lowest = Math.min(0.5, overall, ...rows.map((row) => Math.min(row.value, row.low ?? 1)));
  const from = Math.max(0, Math.floor(10 * lowest - 0.2) / 10);
  const place = (share) => `${(100 * (share - from)) / (1 - from)}%`;
  const mark = (className, share) => {
    const it = make("i", { class: className });
    it.style.left = place(share);
    return it;
  };
  const drawn = rows.map((row) => {
    const track = make("div", { class: "track", "aria-hidden": "true" }, mark("chance", 0.5), mark("all", overall));
    if (row.low !== null) {
      const range = mark("range", row.low);
      range.style.right = `${100 - parseFloat(place(row.high))}%`;
      track.append(range);
    }
    track.append(mark("value", row.value));
    return make("li", { class: "share" },
      make("span", { class: "name" }, ...row.names, " ", make("small", { text: `n = ${row.pairs.toLocaleString(language)}` })),
      track, make("span", { class: "value", text: asPercent(row.value) }),
      make("span", { class: "span", text: spanOf(row, asPercent) }));
  });
  const list = (items) => make("ul", { class: "shares" }, ...items);
  const lines = [key(["chance", say("chance")], ["all", say("allPairs", { value: asPercent(overall) })]), list(drawn.slice(0, SHOWN_ROWS))];
  if (drawn.length > SHOWN_ROWS) {
    lines.push(make("details", { class: "more" }, make("summary", { text: say("restOf", { n: (drawn.length - SHOWN_ROWS).toLocaleString(language) }) }),
      list(drawn.slice(SHOWN_ROWS))));
  }
  return lines;
}

const named = (text) => make("bdi", { text });

function tierPairRows(report) {
  const rows = report.tierPairs.map((row) => ({ ...row, names: [named(row.better), ` ${say("over")} `, named(row.worse)] }));
  const drawn = shareRows(rows, report.measures.accuracy.value);
  if (data.tiers.length <= MANY_TIERS) return drawn;
  return [...tierPairMatrix(report), make("details", { class: "more" }, make("summary", { text: say("asRows") }), ...drawn)];
}

function groupRows(report) {
  const rows = report.groups.map((row) => ({ ...row, names: [named(row.name), ` (${sayCount("works", row.works)})`] }));
  return shareRows(rows, report.measures.accuracy.value);
}

function withinRows(report) {
  return shareRows(report.within.map((row) => ({ ...row, names: [named(row.name)] })), report.measures.within.value);
}

function mistakeCard({ better, worse, chance }, number) {
  const side = (work, text) => make("figure", {}, pictureOf(work),
    make("figcaption", {}, make("div", { class: "soft", text: say(text) }),
      make("div", {}, work.tier === null ? null : tierDot(work.tier), make("bdi", { text: work.grade }), ` · ${say("rawScore", { score: work.score.toPrecision(3) })}`),
      nameOf(work)));
  const verdict = chance === null ? say("mistakeNoChance") : say("mistakeChance", { chance: percent(chance) });
  return make("li", { class: "mistake" }, make("h3", { text: `${number + 1}. ${verdict}` }),
    make("div", { class: "two" }, side(better, "gradedBetter"), side(worse, "scoredHigher")));
}
