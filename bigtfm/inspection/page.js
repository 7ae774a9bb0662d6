
"use strict";
// Words come from texts that nobody has checked: they are only ever set as textContent.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const state = { kind: 0, layer: 0, view: "0", scale: "row", row: null, side: data.last, norm: "features" };

function make(tag, parent, text = "", className = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  if (className) element.className = className;
  if (parent) parent.append(element);
  return element;
}

// --- numbers and colours ---------------------------------------------------------------------------------

const percent = (p) => (p >= 0.9995 ? "100 %" : p >= 0.001 ? `${(100 * p).toPrecision(3)} %` : p === 0 ? "0" : "< 0.1 %");
const short = (x) => (x === 0 ? "0" : x >= 1e5 || x < 1e-3 ? x.toExponential(1) : String(Number(x.toPrecision(3))));

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
const ramps = {}, tables = {}; // a ramp's three colours; 1024 of its colours as pixels
function readColours() {
  for (const name of ["map", "loss"]) {
    ramps[name] = [0, 1, 2].map((n) => rgb(css(`--${name}-${n}`)));
    tables[name] = Uint32Array.from({ length: 1024 }, (_, n) => new Uint32Array(new Uint8Array([...colour(name, n / 1023), 255]).buffer)[0]);
  }
}
function colour(name, share) {
  const t = 2 * Math.min(1, Math.max(0, share)), stop = t < 1 ? 0 : 1, [from, to] = ramps[name].slice(stop);
  return from.map((c, n) => Math.round(c + (to[n] - c) * (t - stop)));
}
function picture(shares, columns, name = "map") {
  const image = new ImageData(columns, shares.length / columns), pixels = new Uint32Array(image.data.buffer), table = tables[name];
  for (let n = 0; n < shares.length; n++) pixels[n] = table[Math.round(1023 * shares[n])];
  return image;
}
function paint(element, name, share) {
  const [r, g, b] = colour(name, share);
  element.style.background = `rgb(${r} ${g} ${b})`;
  element.style.color = 0.2126 * r ** 2.2 + 0.7152 * g ** 2.2 + 0.0722 * b ** 2.2 > 0.2 * 255 ** 2.2 ? "#111" : "#fff";
}
function legend(id, name, ticks, note) {
  const bar = ramps[name].map(([r, g, b]) => `rgb(${r} ${g} ${b})`).join(", "), box = $(id);
  box.replaceChildren();
  const scale = make("span", box);
  make("span", scale, "", "bar").style.background = `linear-gradient(to right, ${bar})`;
  const labels = make("span", scale, "", "ticks");
  for (const tick of ticks) make("span", labels, tick);
  make("span", box, note);
}

// --- the note at the pointer -----------------------------------------------------------------------------

function tip(event, title, lines = [], expected = []) {
  const box = $("tip");
  box.replaceChildren();
  make("b", box, title);
  for (const line of lines) make("div", box, line);
  const table = make("table", box);
  for (const [word, p] of expected) {
    const row = make("tr", table);
    make("td", row, word);
    make("td", row, percent(p));
  }
  box.hidden = false;
  const at = event.target.getBoundingClientRect(), own = box.getBoundingClientRect();
  const x = event.clientX || at.left, y = event.clientY || at.bottom;
  box.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - own.width - 8))}px`;
  box.style.top = `${y + 18 + own.height > innerHeight ? Math.max(4, y - own.height - 12) : y + 18}px`;
}
const hideTip = () => ($("tip").hidden = true);
function onHover(element, show) {
  for (const name of ["pointermove", "focus"]) element.addEventListener(name, show);
  for (const name of ["pointerleave", "blur"]) element.addEventListener(name, hideTip);
}

// --- words in a row, and a grid of numbers ---------------------------------------------------------------

function strip(id, words) {
  const box = $(id);
  box.replaceChildren();
  return words.map((word, place) => {
    const token = make("span", box, "", "token");
    token.tabIndex = 0;
    token.dataset.place = place;
    const blanks = word.length > 1 ? word.match(/^·*/)[0].length : 0;
    if (blanks) make("span", token, word.slice(0, blanks), "blank");
    token.append(word.slice(blanks));
    if (word.endsWith("↵")) make("br", box);
    return token;
  });
}

// A canvas with a coloured cell for each value, words along both sides; every n-th where there is no room.
class Grid {
  constructor(id, shown) {
    this.canvas = $(id);
    this.over = null;
    this.canvas.addEventListener("pointermove", (event) => {
      const cell = this.at(event);
      this.over = cell;
      this.draw();
      cell ? shown.hover(event, ...cell) : hideTip();
    });
    this.canvas.addEventListener("pointerleave", () => { this.over = null; hideTip(); this.draw(); });
    this.canvas.addEventListener("click", (event) => { const cell = this.at(event); if (cell && shown.click) shown.click(...cell); });
  }
  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left - this.left) / this.width);
    const row = Math.floor((event.clientY - box.top - this.top) / this.height);
    return row >= 0 && row < this.rows.length && column >= 0 && column < this.columns.length ? [row, column] : null;
  }
  show(rows, columns, shares, height = null, marked = null) {
    Object.assign(this, { rows, columns, marked });
    this.image = new OffscreenCanvas(columns.length, rows.length);
    this.image.getContext("2d").putImageData(picture(shares, columns.length), 0, 0);
    this.fixedHeight = height;
    this.draw();
  }
  draw() {
    if (!this.rows) return;
    const { rows, columns, canvas } = this, pen = canvas.getContext("2d"), font = "12px system-ui, sans-serif";
    pen.font = font;
    const longest = (words) => Math.min(110, 10 + Math.max(...words.map((word) => pen.measureText(word).width)));
    this.left = longest(rows);
    this.top = longest(columns);
    const room = canvas.parentElement.clientWidth - this.left - 2;
    this.width = Math.max(1, Math.min(28, room / columns.length));
    this.height = this.fixedHeight || this.width;
    const dots = devicePixelRatio, wide = this.left + this.width * columns.length + 1, high = this.top + this.height * rows.length + 1;
    canvas.width = Math.ceil(wide * dots);
    canvas.height = Math.ceil(high * dots);
    canvas.style.width = `${wide}px`;
    canvas.style.height = `${high}px`;
    pen.scale(dots, dots);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(this.image, this.left, this.top, this.width * columns.length, this.height * rows.length);
    pen.strokeStyle = css("--line");
    pen.strokeRect(this.left, this.top, this.width * columns.length, this.height * rows.length);
    const [row, column] = this.over || [this.marked, null];
    pen.font = font;
    pen.textBaseline = "middle";
    this.label(pen, rows, row, this.height, (at) => [this.left - 6, this.top + at, 0, "right"]);
    this.label(pen, columns, column, this.width, (at) => [this.left + at, this.top - 6, -Math.PI / 2, "left"]);
    pen.strokeStyle = css("--accent");
    if (row !== null) pen.strokeRect(this.left, this.top + row * this.height, this.width * columns.length, this.height);
    if (column !== null) pen.strokeRect(this.left + column * this.width, this.top, this.width, this.height * rows.length);
  }
  label(pen, words, marked, size, place) {
    const step = Math.ceil(13 / size), near = (n) => marked !== null && n !== marked && Math.abs(n - marked) * size < 13;
    words.forEach((word, n) => {
      if ((n % step && n !== marked) || near(n)) return;
      const [x, y, turn, align] = place((n + 0.5) * size);
      pen.save();
      pen.translate(x, y);
      pen.rotate(turn);
      pen.textAlign = align;
      pen.fillStyle = css(n === marked ? "--accent" : "--ink");
      let text = word;
      while (text.length > 1 && pen.measureText(text).width > 100) text = `${[...text].slice(0, -2).join("")}…`;
      pen.fillText(text, 0, 0);
      pen.restore();
    });
  }
}

// --- loss ------------------------------------------------------------------------------------------------

function showLoss() {
  const losses = Object.values(data.judged).map((one) => one.loss);
  const how = data.family === "bert"
    ? "What each token costs where it alone is hidden"
    : `What each token costs ${data.last === "decoder" && data.words.encoder ? "the decoder" : "the model"}, which has read those before it`;
  $("loss-note").textContent = losses.length
    ? `${how}: -log p, in nats. The mean is ${data.meanLoss.toFixed(3)}, a perplexity of ${short(Math.exp(data.meanLoss))}.`
    : "No token of this text can be judged.";
  const most = Math.max(...losses, 1e-9);
  strip("loss-strip", data.said).forEach((token, place) => {
    const one = data.judged[place];
    if (one) paint(token, "loss", one.loss / most);
    const about = one ? [`loss ${one.loss.toFixed(3)}, p ${percent(Math.exp(-one.loss))}, rank ${one.rank}`, "expected here:"] : ["not judged"];
    onHover(token, (event) => tip(event, data.said[place], about, one ? one.expected : []));
  });
  if (losses.length) legend("loss-legend", "loss", ["0", short(most / 2), short(most)], "nats");
}

// --- attention -------------------------------------------------------------------------------------------

const KINDS = { encoder: "encoder", decoder: "decoder", cross: "decoder to encoder" };
const kind = () => data.maps[state.kind];
const sizes = (map) => [data.words[map.queries].length, data.words[map.keys].length];
const viewName = (view) => (view === "mean" ? "mean of all heads" : view === "rollout" ? "rollout" : `head ${view}`);

async function unpack(text) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let n = 0; n < raw.length; n++) bytes[n] = raw.charCodeAt(n);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint16Array(await new Response(stream).arrayBuffer());
}
function plane(map, layer, view) {
  const [rows, columns] = sizes(map), size = rows * columns, at = map.views.indexOf(view) * size;
  return map.values[layer].subarray(at, at + size);
}
const largest = (values) => values.reduce((most, value) => Math.max(most, value), 1);

// Where on the ramp each weight is: the square root, so that small ones can be told apart too.
function shares(values, columns) {
  const found = new Float32Array(values.length), whole = state.scale === "map" && largest(values);
  for (let start = 0; start < values.length; start += columns) {
    const row = values.subarray(start, start + columns), most = whole || largest(row);
    for (let n = 0; n < columns; n++) found[start + n] = Math.sqrt(row[n] / most);
  }
  return found;
}

const mapGrid = new Grid("map", {
  hover: (event, row, column) => {
    const map = kind(), value = plane(map, state.layer, state.view)[row * sizes(map)[1] + column] / 65535;
    tip(event, `${data.words[map.queries][row]} (${row})`, [`looks at ${data.words[map.keys][column]} (${column})`, value.toFixed(4)]);
  },
  click: (row) => { state.row = row; showAttention(); },
});

function showAttention() {
  const map = kind(), [rows, columns] = sizes(map), values = plane(map, state.layer, state.view);
  const most = largest(values), names = [data.words[map.queries], data.words[map.keys]];
  state.row = Math.min(state.row ?? rows - 1, rows - 1);
  mapGrid.show(...names, shares(values, columns), null, state.row);
  $("map").setAttribute("aria-label", `attention, layer ${map.layers[state.layer]}, ${viewName(state.view)}`);
  const top = state.scale === "row" ? ["0", "1/4", "1"] : ["0", short(most / 65535 / 4), short(most / 65535)];
  legend("map-legend", "map", top, state.scale === "row" ? "of the row's largest weight" : "weight");
  readers(map, names, values);
  choosers(map);
  location.replace(`#kind=${map.name}&layer=${map.layers[state.layer]}&head=${state.view}`);
}
function readers(map, names, values) {
  const crossed = map.queries !== map.keys, columns = names[1].length;
  $("reader-note").textContent = "Hover over a token to see what it looks at; click to stay there.";
  $("queries-title").textContent = crossed ? "What the decoder reads" : "";
  $("keys-title").textContent = crossed ? "What the encoder has read" : "";
  $("keys").hidden = !crossed;
  const queries = strip("queries", names[0]), keys = crossed ? strip("keys", names[1]) : queries;
  const light = (row) => {
    const weights = values.subarray(row * columns, (row + 1) * columns), most = largest(weights);
    keys.forEach((token, column) => { paint(token, "map", Math.sqrt(weights[column] / most)); token.dataset.weight = (weights[column] / 65535).toFixed(4); });
    queries.forEach((token, place) => token.classList.toggle("chosen", place === row));
  };
  queries.forEach((token, row) => {
    const weights = values.subarray(row * columns, (row + 1) * columns);
    const best = Array.from(weights.keys()).sort((a, b) => weights[b] - weights[a]).slice(0, 5);
    const looked = best.map((column) => [`${names[1][column]} (${column})`, weights[column] / 65535]);
    onHover(token, (event) => { light(row); tip(event, `${names[0][row]} (${row})`, ["looks at:"], looked); });
    token.addEventListener("click", () => { state.row = row; mapGrid.marked = row; mapGrid.draw(); });
  });
  $("queries").onpointerleave = () => light(state.row);
  light(state.row);
  $("queries").scrollTop = queries[state.row].offsetTop - $("queries").offsetTop - 60;
}
function choosers(map) {
  fill($("layer"), map.layers.map(String), String(map.layers[state.layer]));
  fill($("view"), map.views, state.view, viewName);
  $("kinds").querySelectorAll("button").forEach((tab, n) => tab.setAttribute("aria-selected", n === state.kind));
  $("overview").querySelectorAll("button").forEach((button) =>
    button.setAttribute("aria-pressed", button.dataset.at === `${state.layer} ${state.view}`));
}
function fill(select, values, chosen, name = (value) => value) {
  select.replaceChildren();
  for (const value of values) make("option", select, name(value)).value = value;
  select.value = chosen;
}
function tabs(id, names, choose) {
  if (names.length > 1) names.forEach((name, n) => {
    const tab = make("button", $(id), name);
    tab.setAttribute("role", "tab");
    tab.onclick = () => choose(n);
  });
}
function showOverview() {
  const map = kind(), table = $("overview"), [rows, columns] = sizes(map), room = $("overview").parentElement.clientWidth - 70;
  const size = Math.max(24, Math.min(64, Math.floor(room / map.views.length) - 10));
  table.replaceChildren();
  const head = make("tr", table);
  make("th", head);
  for (const view of map.views) make("th", head, view);
  map.layers.forEach((number, layer) => {
    const line = make("tr", table);
    make("th", line, `layer ${number}`);
    for (const view of map.views) {
      const button = make("button", make("td", line)), canvas = make("canvas", button), values = plane(map, layer, view);
      button.title = `layer ${number}, ${viewName(view)}`;
      button.dataset.at = `${layer} ${view}`;
      button.onclick = () => { Object.assign(state, { layer, view }); showAttention(); };
      if (columns <= size && rows <= size) canvas.className = "large";
      canvas.width = columns;
      canvas.height = rows;
      canvas.style.width = `${Math.round(size * Math.min(1, columns / rows))}px`;
      canvas.style.height = `${Math.round(size * Math.min(1, rows / columns))}px`;
      canvas.getContext("2d").putImageData(picture(shares(values, columns), columns), 0, 0);
    }
  });
}
function chooseKind(n) {
  const view = data.maps[n].views.includes(state.view) ? state.view : data.maps[n].views[0];
  Object.assign(state, { kind: n, layer: Math.min(state.layer, data.maps[n].layers.length - 1), view, row: null });
  showOverview();
  showAttention();
}
function fromAddress() {
  const asked = new URLSearchParams(location.hash.slice(1)), n = data.maps.findIndex((map) => map.name === asked.get("kind"));
  state.kind = Math.max(0, n);
  state.view = kind().views.includes(asked.get("head")) ? asked.get("head") : kind().views[0];
  state.layer = Math.max(0, kind().layers.indexOf(Number(asked.get("layer") ?? -1)));
}

// --- logit lens ------------------------------------------------------------------------------------------

function showLens() {
  $("lens").hidden = !data.lens.length;
  if (!data.lens.length) return;
  const words = data.words[data.last], bert = data.family === "bert", table = $("lens-table");
  $("lens-note").textContent = `What the model would ${bert ? "put into each place" : "say after each token"}, had it ended at that layer: `
    + "the residual stream there goes through the final norm and the output layer. Hover for more.";
  table.replaceChildren();
  const head = make("tr", make("thead", table)), body = make("tbody", table);
  make("th", head, bert ? "place" : "after");
  for (const word of words) make("th", head, word);
  data.lens.forEach((row, n) => {
    const line = make("tr", body), name = n ? `layer ${n - 1}` : "embedding";
    make("th", line, name);
    row.forEach((expected, place) => {
      const [word, p] = expected[0], cell = make("td", line, word);
      cell.tabIndex = 0;
      paint(cell, "map", p);
      onHover(cell, (event) => tip(event, `${words[place]} (${place})`, [name], expected));
    });
  });
  if (!bert) {
    const foot = make("tr", make("tfoot", table));
    make("th", foot, "it goes on");
    words.forEach((_, place) => make("th", foot, data.said[place + 1] ?? ""));
  }
  legend("lens-legend", "map", ["0", "1/2", "1"], "probability of the likeliest token");
}

// --- norms -----------------------------------------------------------------------------------------------

const NORMS = { features: "residual stream", neurons: "neurons", gradients: "gradient by the residual stream" };
const median = (values) => { const sorted = [...values].sort((a, b) => a - b), n = sorted.length; return (sorted[(n - 1) >> 1] + sorted[n >> 1]) / 2; };
const normRows = () => data.norms[state.side][state.norm];
const rowName = (n, rows) => (rows > data.norms[state.side].neurons.length ? (n ? `layer ${n - 1}` : "embedding") : `layer ${n}`);
const normGrid = new Grid("norm-map", {
  hover: (event, row, column) => tip(event, `${data.words[state.side][column]} (${column})`, [rowName(row, normRows().length), `${NORMS[state.norm]}: ${short(normRows()[row][column])}`]),
});

function showNorms() {
  const norms = data.norms[state.side], table = $("norm-table"), layers = norms.neurons.length;
  const columns = [["residual stream, median", norms.features.map(median)], ["neurons, median", [null, ...norms.neurons.map(median)]]];
  if (norms.parameters) columns.push(["gradient by the weights", [null, ...norms.parameters]]);
  table.replaceChildren();
  const head = make("tr", table);
  for (const name of ["", ...columns.map(([name]) => name)]) make("th", head, name);
  for (let n = 0; n <= layers; n++) {
    const line = make("tr", table);
    make("th", line, rowName(n, layers + 1));
    for (const [, values] of columns) {
      const cell = make("td", line);
      if (values[n] === null) continue;
      make("span", cell, "", "bar").style.width = `${Math.round((60 * values[n]) / Math.max(...values, 1e-300))}%`;
      cell.append(short(values[n]));
    }
  }
  const shown = Object.keys(NORMS).filter((name) => norms[name]);
  if (!shown.includes(state.norm)) state.norm = "features";
  fill($("norm"), shown, state.norm, (name) => NORMS[name]);
  const rows = normRows(), logs = rows.flat().map(Math.log), finite = logs.filter(Number.isFinite);
  const low = finite.reduce((least, value) => Math.min(least, value), Infinity);
  const span = finite.reduce((most, value) => Math.max(most, value), -Infinity) - low || 1;
  const share = logs.map((value) => (Number.isFinite(value) ? (value - low) / span : 0));
  normGrid.show(rows.map((_, n) => rowName(n, rows.length)), data.words[state.side], share, 20);
  $("norm-map").setAttribute("aria-label", `${NORMS[state.norm]} by layer and token`);
  if (finite.length) legend("norm-legend", "map", [Math.exp(low), Math.exp(low + span / 2), Math.exp(low + span)].map(short), "L2 norm, in logarithmic steps");
  $("norm-sides").querySelectorAll("button").forEach((tab) => tab.setAttribute("aria-selected", tab.textContent === state.side));
}

// --- all of it -------------------------------------------------------------------------------------------

function showAll() {
  readColours();
  showLoss();
  showOverview();
  showAttention();
  showLens();
  showNorms();
}
async function start() {
  for (const map of data.maps) map.values = await Promise.all(map.planes.map(unpack));
  for (const [name, fact] of data.facts) {
    const pair = make("div", $("facts"));
    make("dt", pair, name);
    make("dd", pair, fact);
  }
  tabs("kinds", data.maps.map((map) => KINDS[map.name]), chooseKind);
  tabs("norm-sides", Object.keys(data.norms), (n) => { state.side = Object.keys(data.norms)[n]; showNorms(); });
  $("layer").onchange = () => { state.layer = kind().layers.indexOf(Number($("layer").value)); showAttention(); };
  $("view").onchange = () => { state.view = $("view").value; showAttention(); };
  $("scale").onchange = () => { state.scale = $("scale").value; showOverview(); showAttention(); };
  $("norm").onchange = () => { state.norm = $("norm").value; showNorms(); };
  fromAddress();
  showAll();
  let width = innerWidth;
  addEventListener("resize", () => { if (width !== innerWidth) { width = innerWidth; mapGrid.draw(); normGrid.draw(); } });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showAll);
  document.body.dataset.ready = "yes";
}
start().catch((error) => { $("facts").textContent = `This page needs a browser of 2023 or later: ${error.message}`; });
