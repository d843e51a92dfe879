// Two works side by side.

let picked = [];

function pickWork(work) {
  picked = picked.includes(work) ? picked.filter((other) => other !== work) : [...picked, work];
  for (const [place, other] of shown.entries()) dressCard(other, place === current);
  if (picked.length === 2) openCompare(...picked);
  drawTray();
}

function dropPicks() {
  picked = [];
  for (const [place, work] of shown.entries()) dressCard(work, place === current);
  drawTray();
}

function drawTray() {
  const tray = document.getElementById("tray");
  tray.hidden = picked.length !== 1;
  tray.replaceChildren();
  if (tray.hidden) return;
  tray.append(pictureOf(picked[0]), make("span", { text: say("compareFirst") }),
    iconButton("close", say("cancel"), dropPicks));
}

// P(left is better): the logistic function of the difference of scores over the temperature.
function chanceOfLeft(left, right) {
  if (data.sharpness === null) return null;
  return 1 / (1 + Math.exp(-(left.score - right.score) * data.sharpness));
}

function verdict(left, right) {
  const chance = chanceOfLeft(left, right);
  if (chance === null) return say("verdictUnknown");
  if (chance === 0.5) return say("verdictEven");
  const side = say(chance > 0.5 ? "leftOne" : "rightOne");
  return say("verdict", { side, chance: percent(Math.max(chance, 1 - chance)) });
}

function openCompare(left, right) {
  const dialog = document.getElementById("compare");
  const title = make("h2", { id: "compared", text: verdict(left, right) });
  const close = iconButton("close", say("close"), () => dialog.close(), "quiet close");
  const marks = [{ score: left.score, className: "first" }, { score: right.score, className: "second" }];
  const side = (work, where) => {
    const figure = make("figure", {}, make("div", { class: "stage" }, ...pictureAndOriginal(work)),
      make("figcaption", {}, make("span", { class: `side ${where}`, text: say(where) }), labelOf(work), tierBars(work)));
    return figure;
  };
  dialog.setAttribute("aria-labelledby", "compared");
  dialog.replaceChildren(
    make("header", {}, title, close),
    make("div", { class: "pair" }, side(left, "left"), side(right, "right")),
    ...(data.curves ? [make("footer", {}, curvesChart(marks))] : []),
  );
  dialog.showModal();
  dialog.focus();
}

document.getElementById("compare").addEventListener("close", () => {
  dropPicks();
  document.getElementById("compare").replaceChildren();
});
