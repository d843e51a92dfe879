// One work, as large as there is room, and all that is known of it.

let inLarge = null;

// The page's copy at once, and the original over it as soon as it is there.
function stageOf(work) {
  return [...pictureAndOriginal(work), ...(work.map === null ? [] : [mapOf(work)])];
}

let mapShown = false; // what raises and what lowers the score, over the picture

function mapOf(work) {
  const map = make("img", { alt: data.attention ? say("attentionTitle") : say("mapTitle"), class: "map", src: addressOf({ picture: work.map }) });
  map.hidden = !mapShown;
  return map;
}

function toggleMap() {
  mapShown = !mapShown;
  for (const map of document.querySelectorAll("dialog[open] .map")) map.hidden = !mapShown;
  for (const box of document.querySelectorAll("#mapshown")) box.checked = mapShown;
}

function whyOf(work) {
  if (work.map === null) return null;
  const box = make("input", { type: "checkbox", id: "mapshown" });
  box.checked = mapShown;
  box.addEventListener("change", toggleMap);
  const likes = work.likes.map((like) =>
    make("li", {}, make("figure", { title: like.name }, pictureOf(like),
      make("figcaption", { class: "soft" }, make("bdi", { text: like.tier }), ` · ${say("cosine", { cosine: like.cosine.toFixed(2) })}`))));
  return part(data.attention ? say("attentionTitle") : say("mapTitle"),
    make("label", { class: "choice" }, box, make("span", { text: say("mapShow") })),
    make("p", { class: "soft legend", text: data.attention ? say("attentionLegend") : say("mapLegend") }),
    ...(likes.length ? [make("h3", { text: say("likes") }), make("ul", { class: "strip" }, ...likes)] : []));
}

function pictureAndOriginal(work) {
  const small = pictureOf(work);
  const note = make("p", { class: "nooriginal", hidden: "", text: say("noOriginal") });
  if (work.original === null) {
    note.hidden = false;
    return [small, note];
  }
  const whole = make("img", { alt: work.name, class: "whole", draggable: "false" });
  whole.addEventListener("load", () => {
    small.replaceWith(whole);
    drawZoom();
  });
  whole.addEventListener("error", () => (note.hidden = false));
  whole.src = work.original;
  return [small, note];
}

function openLarge(work) {
  const dialog = document.getElementById("large");
  inLarge = work;
  const place = shown.indexOf(work);
  if (place >= 0) current = place;
  const arrow = (name, step) => {
    const button = iconButton(name, say(name), () => stepLarge(step), `turn ${name}`);
    button.disabled = place < 0 || !shown[place + step];
    return button;
  };
  dialog.setAttribute("aria-label", work.name);
  dialog.replaceChildren(
    make("div", { class: "stage" }, ...stageOf(work), arrow("previous", -1), arrow("next", 1), zoomButton()),
    make("aside", {}, ...panelOf(work).filter(Boolean)),
    iconButton("close", say("close"), () => dialog.close(), "quiet close"),
  );
  if (!dialog.open) dialog.showModal();
  dialog.focus();
  fitAgain();
}

function zoomButton() {
  return make("button", { type: "button", class: "plain zoom", text: "1:1", title: say("keyZoom"), "aria-label": say("keyZoom"), click: toggleZoom });
}

function stepLarge(step) {
  const place = shown.indexOf(inLarge);
  if (place >= 0 && shown[place + step]) openLarge(shown[place + step]);
}

function part(title, ...content) {
  return make("section", {}, make("h3", { text: title }), ...content);
}

function panelOf(work) {
  const all = data.works.length.toLocaleString(language);
  const interval = make("p", { class: "soft", text: intervalText(work) });
  if (work.settled === false) interval.append(` · ~ ${say("unsettled")}`);
  const head = make("header", {},
    make("h2", { text: say("rankOf", { rank: work.rank.toLocaleString(language), all }) }),
    interval, rankLine(work), make("p", { class: "filename" }, nameOf(work)));
  const score = part(say("scoreTitle"),
    make("p", { class: "big" }, percentOf(work), make("span", { class: "soft", text: say("rawScore", { score: work.score.toPrecision(4) }) })),
    data.curves ? curvesChart([{ score: work.score, className: "first" }]) : null);
  const compare = make("button", { type: "button", class: "plain", text: say("compare"), click: () => compareFromLarge() });
  const links = make("p", { class: "links" }, compare);
  if (work.original !== null) {
    links.append(make("a", { class: "plain", href: work.original, target: "_blank", rel: "noopener", text: say("original") }));
  }
  const tiers = data.tiers.length ? part(say("tiersTitle"), tierBars(work)) : null;
  const said = part(say("yourMarks"), markControls([work]));
  return [head, said, givenOf(work), tiers, comparedOf(work), score, whyOf(work), alikeOf(work), links];
}

// What the user's own table says of it.
function givenOf(work) {
  if (work.given.length === 0) return null;
  return make("dl", { class: "given" }, ...work.given.flatMap(([name, value]) =>
    [make("dt", { class: "soft" }, make("bdi", { text: name })), make("dd", {}, make("bdi", { text: value }))]));
}

// How it does against graded works of each tier.
function comparedOf(work) {
  if (work.wins === null) return null;
  return part(say("winsTitle"), make("p", { class: "soft legend", text: say("winsLegend") }), winBars(work));
}

function alikeOf(work) {
  const others = data.works.filter((other) => work.stack !== null && other.stack === work.stack && other !== work);
  if (others.length === 0) return null;
  return part(say("alike"), make("ul", { class: "strip" }, ...others.map((other) =>
    make("li", {}, make("button", { type: "button", click: () => openLarge(other), title: other.name },
      pictureOf(other),
      make("span", { text: `${other.rank} · ${other.exact ? say("exact") : say("cosine", { cosine: other.cosine.toFixed(2) })}` }))))));
}

function compareFromLarge() {
  const work = inLarge;
  document.getElementById("large").close();
  pickWork(work);
}

const large = document.getElementById("large");
large.addEventListener("close", () => {
  large.replaceChildren();
  // Not where it was opened, which the browser returns to, but where one has gone since.
  const place = shown.indexOf(inLarge);
  focusCard(place < 0 ? current : place);
});

let touchedAt = null;
large.addEventListener("touchstart", (event) => {
  const swipes = event.touches.length === 1 && zoom.by === 0;
  touchedAt = swipes && event.target.closest(".stage") ? event.touches[0] : null;
}, { passive: true });
large.addEventListener("touchend", (event) => {
  if (touchedAt === null) return;
  const across = event.changedTouches[0].clientX - touchedAt.clientX;
  const down = event.changedTouches[0].clientY - touchedAt.clientY;
  if (Math.abs(across) > 60 && Math.abs(across) > 2 * Math.abs(down)) stepLarge(across < 0 ? 1 : -1);
  touchedAt = null;
});
