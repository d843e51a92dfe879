// Applicants in order, each with their works; a name shows that applicant's works alone.

const applicantOf = new Map(); // work → its applicant
for (const [place, person] of (data.applicants ?? []).entries()) {
  for (const work of person.works) applicantOf.set(data.works[work], { ...person, place });
}
let onlyApplicant = null; // its place, where its works are shown alone

const byApplicant = (a, b) =>
  (applicantOf.get(a)?.place ?? Infinity) - (applicantOf.get(b)?.place ?? Infinity) || a.place - b.place;
const ofApplicant = (work) => onlyApplicant === null || applicantOf.get(work)?.place === onlyApplicant;

function showApplicant(place) {
  onlyApplicant = onlyApplicant === place ? null : place;
  for (const button of byId("people").querySelectorAll("[aria-pressed]")) {
    button.setAttribute("aria-pressed", Number(button.dataset.place) === onlyApplicant);
  }
  drawGrid();
}

function applicantRow(person, place) {
  const range = person.low === null ? "± ?" : `${person.low}–${person.high}${person.settled ? "" : " ~"}`;
  const name = make("button", {
    type: "button", class: "chip", "aria-pressed": place === onlyApplicant, "data-place": place,
    title: say("applicantShow"), click: () => showApplicant(place),
  }, make("bdi", { text: person.name }));
  const works = person.works.map((work) =>
    make("button", {
      type: "button", class: "their", "aria-label": say("open", { name: data.works[work].name }),
      click: () => openLarge(data.works[work]),
    }, pictureOf(data.works[work], { lazy: true })));
  return make("li", {}, make("b", { text: person.rank }), make("span", { class: "soft", text: [range, person.tier].filter(Boolean).join(" · ") }),
    make("span", {}, person.within ? make("bdi", { class: "soft", text: `${person.within} ` }) : null, name),
    make("span", { class: "theirs" }, ...works));
}

function drawApplicants() {
  const box = byId("applicants");
  box.hidden = !data.applicants;
  if (box.hidden) return;
  box.querySelector("summary").textContent = sayCount("applicants", data.applicants.length);
  byId("portfolio").replaceChildren(...data.portfolio.said.map((text) => make("p", { ...inWords(text), class: "soft" })));
  const fill = () => box.open && byId("people").replaceChildren(...data.applicants.map(applicantRow));
  box.ontoggle = fill; // thousands of rows wait until they are looked at
  fill();
}
