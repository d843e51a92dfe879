// Two to four works side by side.

let picked = [];

function pickWork(work) {
  picked = picked.includes(work) ? picked.filter((other) => other !== work) : [...picked, work];
  if (picked.length === 2) openCompare(picked);
  selectionChanged();
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

function openCompare(works) {
  const dialog = document.getElementById("compare");
  const [left, right] = works;
  const two = works.length === 2;
  const title = make("h2", { id: "compared", text: two ? verdict(left, right) : sayCount("compared", works.length) });
  const close = iconButton("close", say("close"), () => dialog.close(), "quiet close");
  const lines = works.map(({ score }, place) => ({ score, className: ["first", "second", "third", "fourth"][place] }));
  const side = (work, place) => {
    const where = make("span", { class: `side ${lines[place].className}`, text: two ? say(place ? "right" : "left") : place + 1 });
    const better = make("button", { type: "button", class: "plain better", text: say("putFirst"), click: () => putFirst(work, works) });
    return make("figure", {}, make("div", { class: "stage" }, ...pictureAndOriginal(work), place ? null : zoomButton()),
      make("figcaption", {}, where, labelOf(work), two ? tierBars(work) : null, better));
  };
  dialog.setAttribute("aria-labelledby", "compared");
  dialog.replaceChildren(
    make("header", {}, title, close),
    make("div", { class: `pair of${works.length}` }, ...works.map(side)),
    ...(data.curves && two ? [make("footer", {}, curvesChart(lines))] : []),
  );
  if (!dialog.open) dialog.showModal();
  dialog.focus();
}

// The user finds it the best of those that are compared: it goes before all of them in their order.
function putFirst(work, works) {
  const best = works.filter((other) => other !== work).sort(ORDERS.mine)[0];
  if (ORDERS.mine(work, best) > 0) moveBeside(work, best, -1);
  byId("compared").textContent = say("nowFirst", { name: work.name });
}

document.getElementById("compare").addEventListener("close", () => {
  picked = [];
  selectionChanged();
  document.getElementById("compare").replaceChildren();
});
