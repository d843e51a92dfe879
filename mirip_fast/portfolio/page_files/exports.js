// Files for other programs, made in the page: tables, a list, ratings, and the marks themselves.

const scopes = {
  selected: () => inOrder(selected),
  shown: () => fitting,
  all: () => ownOrder(),
};

const FORMATS = {
  xlsx: (works) => ["xlsx", SHEET_TYPE, [zipOf(workbookOf(works))]],
  csv: (works) => ["csv", "text/csv", [`\ufeff${csvOf(works)}`]],
  list: (works) => ["txt", "text/plain", [works.map((work) => `${fileOf(work)}\n`).join("")]],
  xmp: (works) => ["xmp.zip", "application/zip", [zipOf(sidecars(works))]],
  json: (works) => ["json", "application/json", [JSON.stringify(jsonOf(works), null, 1)]],
  marks: () => ["marks.json", "application/json", [JSON.stringify({ marksOf: data.title, marks: namedMarks() }, null, 1)]],
};

const fileOf = (work) => work.file ?? work.name;

// Every work's row: the model's numbers, the user's marks, the user's own columns.
function rowOf(work) {
  const { stars, tags, note } = markOf(work);
  const row = {
    own_rank: ownOrder().indexOf(work) + 1, rank: work.rank, rank_low: work.low, rank_high: work.high, settled: work.settled,
    score: work.score, score_100: work.percent === null ? null : Math.round(100 * work.percent) / 100, tier: work.tier === null ? null : data.tiers[work.tier],
    stars, tags: tags?.join(", "), note, file: fileOf(work), image_id: work.id,
  };
  for (const column of data.columns) row[column in row ? `given_${column}` : column] = valueOf(work, column);
  return row;
}

// A cell that no spreadsheet takes for a formula, but for numbers.
function cellOf(value) {
  if (value === null || value === undefined) return "";
  let text = String(value);
  if (typeof value === "string" && /^[=+\-@\t\r\n]/.test(text) && !/^[+-]?[\d.]+$/.test(text)) text = `'${text}`;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

// The names of the columns, then a row per work.
function tableOf(works) {
  const rows = works.map(rowOf);
  const columns = Object.keys(rows[0] ?? {});
  return [columns, ...rows.map((row) => columns.map((column) => row[column]))];
}

function csvOf(works) {
  return tableOf(works)
    .map((cells) => `${cells.map(cellOf).join(",")}\r\n`).join("");
}

function jsonOf(works) {
  return { title: data.title, model: data.model, made: data.made, works: works.map(rowOf) };
}

function namedMarks() {
  return Object.fromEntries(Object.entries(marks).map(([key, fields]) =>
    [key, keyed.has(key) ? { name: keyed.get(key).name, ...fields } : fields]));
}

const xml = (text) => text.replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]/g, "")
  .replace(/[<>&"]/g, (sign) => `&#${sign.charCodeAt(0)};`);

// A sidecar file of a work, as Lightroom, Bridge, digiKam and exiftool read it: rating, keywords, description.
function sidecarOf({ stars, tags, note }) {
  const rating = stars ? ` xmp:Rating="${stars}"` : "";
  const subject = tags ? `<dc:subject><rdf:Bag>${tags.map((tag) => `<rdf:li>${xml(tag)}</rdf:li>`).join("")}</rdf:Bag></dc:subject>` : "";
  const description = note ? `<dc:description><rdf:Alt><rdf:li xml:lang="x-default">${xml(note)}</rdf:li></rdf:Alt></dc:description>` : "";
  return `<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="${RDF}"><rdf:Description rdf:about="" xmlns:xmp="${XMP}" xmlns:dc="${DC}"${rating}>${subject}${description}</rdf:Description></rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>`;
}

// Names of name spaces, which nothing is ever fetched from.
const [RDF, XMP, DC, OFFICE, PACKAGE] = ["www.w3.org/1999/02/22-rdf-syntax-ns#", "ns.adobe.com/xap/1.0/", "purl.org/dc/elements/1.1/",
  "schemas.openxmlformats.org/officeDocument/2006/relationships", "schemas.openxmlformats.org/package/2006"].map((name) => `${"http"}://${name}`);
const SHEET = OFFICE.replace("officeDocument", "spreadsheetml").replace("relationships", "main");
const SHEET_TYPE = "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet";

// A cell of a workbook: text is never a formula, and a number only where Excel shows it as it is written.
function sheetCell(value) {
  if (value === null || value === undefined || value === "") return "<c/>";
  if (typeof value === "boolean") return `<c t="b"><v>${Number(value)}</v></c>`;
  if (String(Number(value)) === String(value) && Math.abs(value) < 1e15) return `<c><v>${value}</v></c>`;
  const text = xml(String(value).slice(0, 32767)).replace(/_(?=x[0-9a-f]{4}_)/gi, "_x005F_");
  return `<c t="inlineStr"><is><t xml:space="preserve">${text}</t></is></c>`;
}

function columnName(place) {
  return (place < 26 ? "" : columnName(Math.floor(place / 26) - 1)) + String.fromCharCode(65 + (place % 26));
}

// [name, text] of the parts of a workbook with one sheet (ECMA-376), whose header stays and has filters.
function workbookOf(works) {
  const head = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n';
  const rows = tableOf(works);
  const ends = `A1:${columnName(Math.max(0, rows[0].length - 1))}${rows.length}`;
  const relation = (type, target) => `${head}<Relationships xmlns="${PACKAGE}/relationships"><Relationship Id="r1" Type="${OFFICE}/${type}" Target="${target}"/></Relationships>`;
  const main = SHEET_TYPE.replace(/sheet$/, "");
  return [
    ["[Content_Types].xml", `${head}<Types xmlns="${PACKAGE}/content-types"><Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/><Override PartName="/xl/workbook.xml" ContentType="${main}sheet.main+xml"/><Override PartName="/xl/sheet.xml" ContentType="${main}worksheet+xml"/></Types>`],
    ["_rels/.rels", relation("officeDocument", "xl/workbook.xml")],
    ["xl/workbook.xml", `${head}<workbook xmlns="${SHEET}" xmlns:r="${OFFICE}"><sheets><sheet name="ranking" sheetId="1" r:id="r1"/></sheets></workbook>`],
    ["xl/_rels/workbook.xml.rels", relation("worksheet", "sheet.xml")],
    ["xl/sheet.xml", `${head}<worksheet xmlns="${SHEET}"><sheetViews><sheetView workbookViewId="0"><pane ySplit="1" topLeftCell="A2" activePane="bottomLeft" state="frozen"/></sheetView></sheetViews><sheetData>${rows.map((cells) => `<row>${cells.map(sheetCell).join("")}</row>`).join("")}</sheetData><autoFilter ref="${ends}"/></worksheet>`],
  ];
}

// [name, text] of each work that has a mark to tell; a.png beside a.jpg gets a.png.xmp.
function sidecars(works) {
  const taken = new Set();
  return works.filter(hasRating).map((work) => {
    const file = fileOf(work).replace(/^([./\\]|[a-z]:)+/i, "").replaceAll("../", "");
    let name = `${file.replace(/\.[^./\\]*$/, "")}.xmp`;
    if (taken.has(name.toLowerCase())) name = `${file}.xmp`;
    taken.add(name.toLowerCase());
    return [name, sidecarOf(markOf(work))];
  });
}

const hasRating = (work) => Boolean(markOf(work).stars || markOf(work).tags || markOf(work).note);

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? (n >>> 1) ^ 0xedb88320 : n >>> 1;
  return n;
});

const crc32 = (bytes) => ~bytes.reduce((crc, byte) => CRC[(crc ^ byte) & 255] ^ (crc >>> 8), -1) >>> 0;

// A zip file whose files are stored as they are (APPNOTE 6.3.9), with names in UTF-8.
function zipOf(files) {
  const encode = (text) => new TextEncoder().encode(text);
  const parts = [], directory = [];
  let at = 0;
  for (const [name, text] of files) {
    const [path, content] = [encode(name), encode(text)];
    const about = new DataView(new ArrayBuffer(26)); // what both headers say
    [[0, 20], [2, 0x0800], [4, 0], [6, 0], [8, 0x21]].forEach(([where, value]) => about.setUint16(where, value, true));
    about.setUint32(10, crc32(content), true);
    about.setUint32(14, content.length, true);
    about.setUint32(18, content.length, true);
    about.setUint16(22, path.length, true);
    const offset = new DataView(new ArrayBuffer(14));
    offset.setUint32(10, at, true);
    directory.push(encode("PK\x01\x02\x14\x00"), about, offset, path);
    parts.push(encode("PK\x03\x04"), about, path, content);
    at += 30 + path.length + content.length;
  }
  const size = directory.reduce((sum, part) => sum + part.byteLength, 0);
  const end = new DataView(new ArrayBuffer(18));
  end.setUint16(4, files.length, true);
  end.setUint16(6, files.length, true);
  end.setUint32(8, size, true);
  end.setUint32(12, at, true);
  return new Blob([...parts, ...directory, encode("PK\x05\x06"), end]);
}

function download(format, works) {
  const [ending, type, content] = FORMATS[format](works);
  const link = make("a", { href: URL.createObjectURL(new Blob(content, { type })), download: `${data.title}.${ending}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

function openExport() {
  const dialog = byId("export");
  let scope = selected.size ? "selected" : fitting.length < data.works.length ? "shown" : "all";
  const told = make("p", { class: "soft legend", role: "status" });
  const choice = make("select", {}, ...Object.keys(scopes).filter((key) => key !== "selected" || selected.size)
    .map((key) => make("option", { value: key, text: `${say(`scope_${key}`)} (${scopes[key]().length.toLocaleString(language)})` })));
  choice.value = scope;
  choice.addEventListener("change", () => (scope = choice.value));
  const buttons = Object.keys(FORMATS).map((format) => make("li", {},
    make("button", { type: "button", class: "plain", text: say(`as_${format}`), click: () => {
      const works = scopes[scope]();
      const without = works.filter((work) => !hasRating(work)).length;
      if (format === "xmp" && without === works.length) return (told.textContent = say("nothingMarked"));
      download(format, works);
      told.textContent = format === "xmp" && without ? sayCount("withoutMarks", without) : "";
    } }), make("span", { class: "soft", text: say(`for_${format}`) })));
  const file = make("input", { type: "file", accept: ".json,application/json", id: "import" });
  file.addEventListener("change", async () => {
    const found = parsed(await file.files[0].text()).marks;
    told.textContent = found && typeof found === "object" ? takeMarks(merge({}, found)) : say("noMarksFile");
    file.value = "";
  });
  dialog.setAttribute("aria-label", say("export"));
  dialog.replaceChildren(
    make("header", {}, make("h2", { text: say("export") }), iconButton("close", say("close"), () => dialog.close(), "quiet close")),
    make("label", { class: "choice" }, make("span", { text: say("scope") }), choice),
    make("ul", { class: "formats" }, ...buttons),
    make("label", { class: "field" }, make("span", { text: say("importMarks") }), file),
    told, make("p", { class: "soft legend", text: `${say(data.live ? "keptThere" : "keptHere")} ${say("excelFrom")}` }));
  dialog.showModal();
}

// Marks of a file, over those that are there; one step of undo.
function takeMarks(found) {
  const known = Object.entries(found).filter(([key]) => keyed.has(key));
  mark(known.map(([key, fields]) => [keyed.get(key), fields]));
  return say("imported", { n: known.length.toLocaleString(language), others: (Object.keys(found).length - known.length).toLocaleString(language) });
}
