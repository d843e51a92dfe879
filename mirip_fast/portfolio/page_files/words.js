// What the page says, in the reader's language.

const data = JSON.parse(document.getElementById("data").textContent);

// Browsers may refuse storage to pages opened as files: then nothing is remembered.
function remembered(key) {
  try {
    return localStorage.getItem(`mirip-fast-${key}`);
  } catch {
    return null;
  }
}

// Whether it is remembered.
function remember(key, value) {
  try {
    localStorage.setItem(`mirip-fast-${key}`, value);
    return true;
  } catch {
    return false;
  }
}

function firstLanguage() {
  const known = Object.keys(data.words);
  const wanted = [remembered("language"), ...navigator.languages].filter(Boolean);
  return wanted.map((tag) => tag.split("-")[0]).find((tag) => known.includes(tag)) ?? "en";
}

let language = firstLanguage();

function say(key, values = {}) {
  return data.words[language][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

function sayCount(key, n, values = {}) {
  const form = new Intl.PluralRules(language).select(n);
  return say(`${key}_${form}`, { n: n.toLocaleString(language), ...values });
}

function percent(share) {
  if (share > 0 && share < 0.005) return "<1%";
  if (share < 1 && share > 0.995) return ">99%";
  return `${Math.round(100 * share)}%`;
}

// Fills in the texts of the elements that the page starts with.
function sayEverywhere() {
  document.documentElement.lang = language;
  for (const element of document.querySelectorAll("[data-say]")) {
    element.textContent = say(element.dataset.say);
  }
  for (const element of document.querySelectorAll("[data-say-label]")) {
    element.setAttribute("aria-label", say(element.dataset.sayLabel));
    element.title = say(element.dataset.sayLabel);
  }
  for (const element of document.querySelectorAll("[data-say-hint]")) {
    element.placeholder = say(element.dataset.sayHint);
  }
}
