// The page's language and its colours, and the two buttons for them.

const byId = (id) => document.getElementById(id);
const THEMES = ["auto", "light", "dark"];
let theme = THEMES.includes(remembered("theme")) ? remembered("theme") : "auto";

function drawTools() {
  sayEverywhere();
  byId("language").textContent = say("language");
  byId("language").lang = language === "ko" ? "en" : "ko";
  byId("language").title = say("languageHint");
  drawTheme();
}

function drawTheme() {
  document.documentElement.dataset.theme = theme;
  const button = byId("theme");
  button.replaceChildren(icon(theme));
  button.title = say(`theme_${theme}`);
  button.setAttribute("aria-label", button.title);
}

function nextTheme() {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  remember("theme", theme);
  drawTheme();
}

// Gives the buttons their work; `redraw` says everything again.
function startTools(redraw) {
  byId("theme").addEventListener("click", nextTheme);
  byId("language").addEventListener("click", () => {
    const known = Object.keys(data.words);
    language = known[(known.indexOf(language) + 1) % known.length];
    remember("language", language);
    redraw();
  });
}
