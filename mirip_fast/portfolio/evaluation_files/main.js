// The page from top to bottom.

function lead() {
  const { report, judgedPairs } = data;
  const told = [];
  if (report) {
    const inside = report.withinColumn !== null && report.measures.within.value !== null;
    const measure = report.measures[inside ? "within" : "accuracy"];
    told.push(leadLine(inside ? "leadWithin" : "lead", measure, { column: report.withinColumn }));
    told.push(make("p", { text: intervalLine(measure, report.confidence) }));
  }
  if (judgedPairs) {
    if (judgedPairs.value === null) told.push(make("p", { text: say("noJudgedPairs") }));
    else {
      told.push(leadLine("leadJudged", judgedPairs, {}));
      told.push(make("p", { text: `${intervalLine(judgedPairs, 0.95)} ${say("judgedCount", {
        n: judgedPairs.pairs.toLocaleString(language), ties: judgedPairs.ties.toLocaleString(language) })}` }));
    }
  }
  return make("section", { id: "lead" }, ...told, notes());
}

// What the program said in English, in the page's language where there is a translation.
function spoken(text) {
  const said = (data.spoken[language] || {})[text];
  return make("li", said && said !== text ? { text: said } : { lang: language === "en" ? null : "en", text });
}

function leadLine(name, measure, values) {
  const [before, after] = say(name, { ...values, n: "\u0000" }).split("\u0000");
  return make("p", { class: "lead" }, before, make("b", { text: ofHundred(measure.value) }), after);
}

function intervalLine(measure, confidence) {
  if (measure.low === null) return say("leadUnknown");
  return say("leadInterval", { low: ofHundred(measure.low), high: ofHundred(measure.high), confidence: percent(confidence) });
}

// Whether the model is better than chance, than ridge regression, than the last run.
function baselineLine({ name, word, value, low, high, unknown }, confidence) {
  const what = say(`baseline_${name}`);
  if (word === "unknown") return [say("baselineUnknown", { what }), " ", make("span", { lang: "en", class: "soft", text: `(${unknown})` })];
  const points = (share) => (share < 0 ? "−" : "+") + Math.abs(100 * share).toFixed(1);
  return [say(`baseline_${word}`, { what, points: points(value), low: points(low), high: points(high), confidence: percent(confidence) })];
}

function notes() {
  const { report } = data;
  const lines = [];
  const line = (text, className) => lines.push(make("li", { class: className, text }));
  if (!report) line(say("noteNoTiers"));
  else {
    if (report.seen > 0) line(say("noteSeenHere", { n: report.seen.toLocaleString(language), all: report.images.toLocaleString(language) }), "warning");
    line(say(data.tiers.length ? "noteCounts" : "noteCountsFiner", {
      images: report.images.toLocaleString(language), pairs: report.pairs.toLocaleString(language), groups: report.groupCount.toLocaleString(language),
      tiers: data.tiers.map((name, i) => `${name} ${report.counts[i].toLocaleString(language)}`).join(", "),
    }));
    const human = report.agreement?.figures.humanCeiling;
    if (human && human.value !== null) line(say("noteCeiling", { n: ofHundred(human.value), model: ofHundred(report.agreement.figures.modelOnSame.value) }));
    for (const baseline of report.baselines) lines.push(make("li", {}, ...baselineLine(baseline, report.confidence)));
    line(say("noteIntervalsHere"));
    if (report.fewGroups) line(say("noteFewGroups", { n: report.groupCount.toLocaleString(language) }), "warning");
    if (report.unknown) lines.push(spoken(`Probabilities ${report.unknown}`));
    for (const warning of report.probabilities?.warnings ?? []) lines.push(spoken(warning));
  }
  line(say("noteUse"));
  return make("ul", { class: "notes" }, ...lines);
}

function* sections() {
  const { report } = data;
  yield lead();
  if (report) {
    yield part("measures", measureTable(report));
    if (data.tiers.length) {
      yield part("violins", violins(report.violins));
      yield part("confusion", confusionMatrix(report));
      yield part("tierPairs", tierPairRows(report));
    }
    if (report.agreement) yield part("graders", graderTables(report), { overlap: report.agreement.overlap.toLocaleString(language), works: report.agreement.works.toLocaleString(language) });
    if (report.groups.length > 1) yield part("groups", groupRows(report));
    if (report.within.length > 1) yield part("within", withinRows(report), { column: report.withinColumn });
    const known = report.probabilities;
    if (known && known.bins.some(({ predicted }) => predicted !== null)) {
      yield part("reliability", [key(["", say("cameTrue")], ["chance", say("perfect")]), reliabilityChart(known.bins)],
        { n: known.images.toLocaleString(language), source: say(`source_${known.source}`) });
    }
  }
  if (data.learning.length) {
    yield part("learning", [
      key(["train", say("training")], ["", say("validation")], ["best", say("bestKept")], ["chance", say("chance")]),
      make("div", { class: "twocharts" }, learningChart("loss"), learningChart("accuracy")),
    ]);
  }
  if (report?.mistakes.length) yield part("mistakes", make("ul", { class: "mistakes" }, ...report.mistakes.map(mistakeCard)));
}

function drawPage() {
  drawTools();
  byId("title").textContent = data.title;
  const made = new Date(data.made).toLocaleDateString(language, { dateStyle: "long" });
  byId("summary").textContent = [say("evaluation"), data.about && ((data.spoken[language] || {})[data.about] || data.about), made].filter(Boolean).join(" · ");
  byId("report").replaceChildren(...sections());
}

startTools(drawPage);
drawPage();
