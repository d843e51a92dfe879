// Making elements. Text is always text: nothing in this page is made from markup.

const SVG = "http://www.w3.org/2000/svg";

function make(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (value === undefined || value === null) continue;
    if (name === "class") element.className = value;
    else if (name === "text") element.textContent = value;
    else if (name === "click") element.addEventListener("click", value);
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function makeSvg(tag, options = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(options)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const ICONS = {
  close: "M5 5l14 14M19 5L5 19",
  previous: "M15 4l-8 8 8 8",
  next: "M9 4l8 8-8 8",
  compare: "M3 6h8v12H3zM13 6h8v12h-8z",
  tick: "M5 12.5l4.5 4.5L19 7.5",
  up: "M12 20V5M6 11l6-6l6 6",
  down: "M12 4v15M6 13l6 6l6-6",
  undo: "M8 5L4 9l4 4M4 9h10a6 6 0 0 1 0 12h-3",
  redo: "M16 5l4 4l-4 4M20 9H10a6 6 0 0 0 0 12h3",
  auto: "M12 3a9 9 0 1 0 0 18a9 9 0 1 0 0-18zM12 3v18M12 8h6M12 12h8.6M12 16h6",
  light: "M12 8a4 4 0 1 0 0 8a4 4 0 1 0 0-8zM12 2v3M12 19v3M2 12h3M19 12h3M5 5l2 2M17 17l2 2M5 19l2-2M17 7l2-2",
  dark: "M20 14.5A8.5 8.5 0 1 1 9.5 4a7 7 0 0 0 10.5 10.5z",
};

function icon(name) {
  const options = { class: "icon", viewBox: "0 0 24 24", "aria-hidden": "true" };
  return makeSvg("svg", options, makeSvg("path", { d: ICONS[name] }));
}

function iconButton(name, label, click, className = "quiet") {
  const options = { type: "button", class: className, "aria-label": label, title: label, click };
  return make("button", options, icon(name));
}

// A file's name: set apart, since letters written from right to left would move what stands beside it.
function nameOf(work, className = "name") {
  return make("bdi", { class: className, text: work.name, title: work.name });
}

function addressOf(work) {
  if (work.picture === null) return null;
  if (data.pictures !== null) return `${data.pictures}/${work.picture}`;
  return JSON.parse(document.getElementById(`picture-${work.picture}`).textContent);
}

// The small copy of a work; with lazy, its address is set by `watch` when it comes near.
function pictureOf(work, { lazy = false } = {}) {
  if (work.picture === null) return make("span", { class: "missing", text: say("noPicture") });
  const picture = make("img", { alt: work.name, decoding: "async", draggable: "false" });
  if (lazy) {
    picture.classList.add("waiting");
    lookedFor.set(picture, work);
    watch.observe(picture);
  } else {
    picture.src = addressOf(work);
  }
  return picture;
}

const lookedFor = new WeakMap();

const watch = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      watch.unobserve(target);
      target.src = addressOf(lookedFor.get(target));
      target.classList.remove("waiting");
    }
  },
  { rootMargin: "900px" },
);

function tierColour(tier) {
  const share = data.tiers.length > 1 ? tier / (data.tiers.length - 1) : 0;
  return `color-mix(in oklab, var(--lowest-tier) ${Math.round(100 * share)}%, var(--best-tier))`;
}

function tierDot(tier) {
  const dot = make("i", { class: "dot", "aria-hidden": "true" });
  dot.style.background = tierColour(tier);
  return dot;
}
