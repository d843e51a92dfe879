// The keys, and the list of them.

function openKeys() {
  const parts = {
    keysGo: [["← ↑ → ↓", "keyArrows"], ["Home End", "keyEnds"], ["Enter", "keyEnter"], ["Esc", "keyEsc"], ["/", "keySearch"], ["f", "keyFilter"]],
    keysSelect: [["x", "keySelect"], ["Shift ← →", "keyRange"], ["Ctrl A", "keyAll"], ["c", "keyCompare"], ["e", "export"]],
    keysMark: [["0 … 5", "keyStars"], ["n", "keyNote"], ["[ ]", "keyMove"], ["Ctrl Z", "keyUndo"], ["Ctrl Y", "keyRedo"]],
    keysLook: [["z", "keyZoom"], ["+ -", "keyStepZoom"], ["Shift ← ↑ → ↓", "keyPan"], ["s", "keyStack"], ["t", "keyTheme"], ["?", "keyHelp"]],
  };
  if (data.works.some((work) => work.map !== null)) parts.keysLook.splice(3, 0, ["m", "keyMap"]);
  const lists = Object.entries(parts).map(([title, rows]) => part(say(title), make("dl", {}, ...rows.map(([keys, text]) =>
    make("div", {}, make("dt", {}, ...keys.split(" ").map((key) => (key === "…" ? "–" : make("kbd", { text: key })))),
      make("dd", { text: say(text) }))))));
  const dialog = byId("keys");
  dialog.setAttribute("aria-labelledby", "keystitle");
  dialog.replaceChildren(
    make("header", {}, make("h2", { id: "keystitle", text: say("keysTitle") }),
      iconButton("close", say("close"), () => dialog.close(), "quiet close")),
    ...lists,
  );
  dialog.showModal();
  dialog.focus();
}

// The key's sign in the keyboard's own layout; its Latin letter where the keyboard is set to Hangul.
function keyOf(event) {
  const hangul = event.key.length === 1 && event.key > "\u007f";
  if ((hangul || event.key === "Process") && /^Key[A-Z]$/.test(event.code)) return event.code[3].toLowerCase();
  return event.key.length === 1 ? event.key.toLowerCase() : event.key;
}

function inGrid(key, shift) {
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns() };
  if (key in steps) {
    const there = document.activeElement.closest?.(".card");
    const next = current + steps[key];
    if (shift && !selected.has(shown[current])) anchor = shown[current];
    if (!there) focusCard(current);
    else if (next >= 0 && next < shown.length) focusCard(next);
    if (shift && shown[current]) selectTo(shown[current]);
  } else if (key === "Home") focusCard(0);
  else if (key === "End") focusCard(shown.length - 1);
  else if (key === "x" && shown[current]) select(shown[current]);
  else if (key === "c" && selected.size > 1) compareSelected();
  else if (key === "c" && shown[current]) pickWork(shown[current]);
  else if (key === "/") byId("search").focus();
  else if (key === "f") openFilters();
  else if (key === "e") openExport();
  else if (key === "n") openMarks();
  else if (key === "[" || key === "]") moveShown(key === "[" ? -1 : 1);
  else if (/^[0-5]$/.test(key)) setStars(targets(), Number(key));
  else if (key === "s" && !byId("stacking").hidden) toggleStacks();
  else if (key === "Escape" && (picked.length || selected.size)) selectNone();
  else return false;
  return true;
}

function openFilters() {
  byId("filters").open = true;
  byId("filterboxes").querySelector("select").focus();
}

function inLargeView(key, shift) {
  if (shift && key in panKeys) panByKey(key);
  else if (key === "ArrowLeft") stepLarge(-1);
  else if (key === "ArrowRight") stepLarge(1);
  else if (key === "c") compareFromLarge();
  else if (key === "m" && inLarge.map !== null) toggleMap();
  else if (key === "x") select(inLarge);
  else if (key === "n") large.querySelector(".marks textarea").focus();
  else if (key === "[" || key === "]") large.querySelector(key === "[" ? ".ownplace .up" : ".ownplace .down").click();
  else if (/^[0-5]$/.test(key)) setStars([inLarge], Number(key));
  else return inZoom(key, false);
  return true;
}

function inZoom(key, shift) {
  if (key === "z") toggleZoom();
  else if (key === "+" || key === "=") stepZoom(1.25);
  else if (key === "-") stepZoom(0.8);
  else if (shift && key in panKeys) panByKey(key);
  else return false;
  return true;
}

function withCtrl(event, open) {
  const key = keyOf(event);
  if (key === "z") (event.shiftKey ? redo : undo)();
  else if (key === "y") redo();
  else if (key === "a" && !open) selectShown();
  else return;
  event.preventDefault();
}

document.addEventListener("keydown", (event) => {
  if (event.altKey || event.isComposing) return;
  const field = event.target.closest?.("input:not([type=checkbox]), select, textarea");
  if (field) {
    if (event.key === "Escape" && field === byId("search")) {
      field.value = view.text = "";
      drawGrid();
      focusCard(current);
    } else if (event.key === "Enter" && field === byId("search")) focusCard(0);
    return;
  }
  const open = document.querySelector("dialog[open]");
  if (event.ctrlKey || event.metaKey) return withCtrl(event, open);
  const key = keyOf(event);
  let used = false;
  if (open === large) used = inLargeView(key, event.shiftKey);
  else if (open === byId("compare")) used = inZoom(key, event.shiftKey);
  else if (!open) used = inGrid(key, event.shiftKey);
  if (!used && key === "?" && !open) used = (openKeys(), true);
  if (!used && key === "t") used = (nextTheme(), true);
  if (used) event.preventDefault();
});
