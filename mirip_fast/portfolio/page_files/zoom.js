// Looking closely: the pictures of the open dialog at 1:1 or larger, moved together.

const zoom = { by: 0, x: 0.5, y: 0.5 }; // by: 0 = fitted, 1 = a pixel of the picture for one of the screen; x, y: what is in the middle
const pointers = new Map();

const stages = () => [...document.querySelectorAll("dialog[open] .stage")];
const wholeOf = (stage) => stage.querySelector("img.whole") ?? stage.querySelector("img");

// Size of the fitted picture on the screen, and by how much 1:1 is larger.
function fitOf(image) {
  const { offsetWidth: width, offsetHeight: height, naturalWidth, naturalHeight } = image;
  const fit = Math.min(width / naturalWidth, height / naturalHeight);
  return { width: fit * naturalWidth, height: fit * naturalHeight, actual: 1 / (fit * devicePixelRatio) };
}

function drawZoom() {
  for (const stage of stages()) {
    const image = wholeOf(stage);
    stage.classList.toggle("zoomed", zoom.by > 0);
    if (!image?.naturalWidth) continue;
    const { width, height, actual } = fitOf(image);
    const scale = zoom.by * actual;
    const way = zoom.by ? `translate(${(0.5 - zoom.x) * width * scale}px, ${(0.5 - zoom.y) * height * scale}px) scale(${scale})` : "";
    for (const each of stage.querySelectorAll("img")) each.style.transform = way;
  }
  for (const button of document.querySelectorAll("dialog[open] .zoom")) button.setAttribute("aria-pressed", zoom.by > 0);
}

function zoomTo(by, x = zoom.x, y = zoom.y) {
  const inside = (value) => Math.min(1, Math.max(0, value));
  Object.assign(zoom, { by: Math.min(8, by), x: inside(x), y: inside(y) });
  drawZoom();
}

const fitAgain = () => zoomTo(0, 0.5, 0.5);

// The place in the picture that is under a point of the screen, 0 to 1.
function under(stage, clientX, clientY) {
  const image = wholeOf(stage);
  const box = stage.getBoundingClientRect();
  const { width, height, actual } = fitOf(image);
  const scale = zoom.by ? zoom.by * actual : 1;
  return [zoom.x + (clientX - box.x - box.width / 2) / (width * scale), zoom.y + (clientY - box.y - box.height / 2) / (height * scale)];
}

// Changes the size so that the place under a point stays there.
function zoomAt(stage, clientX, clientY, by) {
  const image = wholeOf(stage);
  if (!image?.naturalWidth) return;
  const { width, height, actual } = fitOf(image);
  const [x, y] = under(stage, clientX, clientY);
  if (by * actual <= 1 && by < 1) return fitAgain(); // it fits
  const box = stage.getBoundingClientRect();
  const scale = by * actual;
  zoomTo(by, x - (clientX - box.x - box.width / 2) / (width * scale), y - (clientY - box.y - box.height / 2) / (height * scale));
}

// What there is now, in units of 1:1.
const zoomNow = (stage) => zoom.by || 1 / fitOf(wholeOf(stage)).actual;

function toggleZoom() {
  if (zoom.by) fitAgain();
  else zoomTo(1, 0.5, 0.5);
}

function stepZoom(factor) {
  const stage = stages()[0];
  if (!stage || !wholeOf(stage)?.naturalWidth) return;
  const box = stage.getBoundingClientRect();
  zoomAt(stage, box.x + box.width / 2, box.y + box.height / 2, zoomNow(stage) * factor);
}

function panBy(stage, right, down) {
  const { width, height, actual } = fitOf(wholeOf(stage));
  zoomTo(zoom.by, zoom.x + right / (width * zoom.by * actual), zoom.y + down / (height * zoom.by * actual));
}

const panKeys = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function panByKey(key) {
  const stage = stages()[0];
  if (zoom.by && stage) panBy(stage, ...panKeys[key].map((step) => step * 0.2 * stage.clientWidth));
}

for (const dialog of [byId("large"), byId("compare")]) {
  dialog.addEventListener("wheel", (event) => {
    const stage = event.target.closest(".stage");
    if (!stage || !wholeOf(stage)?.naturalWidth) return;
    event.preventDefault();
    zoomAt(stage, event.clientX, event.clientY, zoomNow(stage) * (event.deltaY < 0 ? 1.25 : 0.8));
  }, { passive: false });
  dialog.addEventListener("dblclick", (event) => {
    const stage = event.target.closest(".stage");
    if (!stage || event.target.closest("button")) return;
    if (zoom.by) fitAgain();
    else zoomAt(stage, event.clientX, event.clientY, 1);
  });
  dialog.addEventListener("pointerdown", (event) => {
    const stage = event.target.closest(".stage");
    if (!stage || event.target.closest("button") || !wholeOf(stage)?.naturalWidth) return;
    pointers.set(event.pointerId, event);
    if (zoom.by) stage.setPointerCapture(event.pointerId);
  });
  dialog.addEventListener("pointermove", (event) => {
    const last = pointers.get(event.pointerId);
    const stage = event.target.closest(".stage");
    if (!last || !stage) return;
    if (pointers.size === 2) { // two fingers
      const [other] = [...pointers.values()].filter((one) => one.pointerId !== event.pointerId);
      const apart = (one) => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY);
      zoomAt(stage, (event.clientX + other.clientX) / 2, (event.clientY + other.clientY) / 2,
        (zoomNow(stage) * apart(event)) / Math.max(1, apart(last)));
    } else if (zoom.by) panBy(stage, last.clientX - event.clientX, last.clientY - event.clientY);
    pointers.set(event.pointerId, event);
  });
  for (const end of ["pointerup", "pointercancel"]) dialog.addEventListener(end, (event) => pointers.delete(event.pointerId));
  dialog.addEventListener("close", () => (pointers.clear(), fitAgain()));
}
addEventListener("resize", drawZoom);
