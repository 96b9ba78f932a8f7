// The page: what is set by hand, what is drawn from it.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const TINTS = { chance: "chance of the diamond", gate: "gate", value: "value net", none: "none" };
const LABELS = { policies: "the policies", watched: "watched or not", runs: "the runs" };
const STEP_MS = 190, PAUSE_MS = 650, SEED = 7;
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;

const percent = (p) => `${p > 0 && p < 0.005 ? "<1" : p < 1 && p > 0.995 ? ">99" : Math.round(100 * p)}%`;
const number = (x, digits = 2) => `${x < -0.5 * 10 ** -digits ? "−" : ""}${Math.abs(x).toFixed(digits)}`;

/** A new element with text and children; nothing is ever read as HTML. */
function make(name, { text, ...attributes } = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  element.append(...children);
  return element;
}

// ---- what is set

/** All that can be set by hand; in the page's address, too. */
const state = {
  run: 0, moment: 0, agent: 0, diamond: 0, ghost: 0, flags: 0,
  weight: null, temperature: 1, greedy: false, tint: "chance", compare: "policies", level: 0, view: 0,
};
let world, looked = null;
const runs = data.runs.map((run) => ({ ...run, agents: null }));
const current = () => runs[state.run];
const agentOf = (run = current(), moment = run === current() ? state.moment : run.moments - 1) => run.agents[moment];

/** The steering that the slider says, or else: a name and weights, see core.js. */
function steering(weight = state.weight) {
  const { names } = current(), { temperature, greedy } = state;
  if (names.length === 1) return { weights: [1], temperature, greedy };
  const weights = weight === null ? null : names.map((_, k) => (k === 0 ? weight : k === 1 ? 1 - weight : 0));
  return { weights, temperature, greedy };
}

function steeringName(weight = state.weight) {
  const { names } = current();
  if (names.length === 1) return names[0];
  if (weight === null) return "mixture";
  if (weight === 1) return names[0];
  if (weight === 0) return names[1];
  return `${names[0]}=${+weight.toFixed(2)},${names[1]}=${+(1 - weight).toFixed(2)}`;
}

function steeringWords(weight = state.weight) {
  const { names } = current();
  if (names.length === 1) return "its only policy";
  if (weight === null) return "mixture: the gate decides";
  if (weight === 1 || weight === 0) return `the ${names[weight ? 0 : 1]} expert alone`;
  return `${percent(weight)} diamond expert, ${percent(1 - weight)} ghost expert`;
}

/** Start as the method deploys its agent, where the mixture and the deployed expert differ most. */
function begin() {
  const run = current(), { start } = run;
  Object.assign(state, start, asTrained(), { flags: 0, level: run.oversight, tint: "chance" });
  state.weight = run.names.length > 1 ? null : 1;
  state.compare = run.names.length > 1 ? "policies" : "watched";
}

// ---- the address

const KEYS = { run: "r", moment: "m", agent: "a", diamond: "d", ghost: "g", flags: "f", level: "l",
  weight: "w", temperature: "t", greedy: "y", tint: "c", compare: "v", view: "s" };

function address() {
  const said = (value) => (value === null ? "gate" : value === true ? 1 : value === false ? 0 : value);
  return Object.entries(KEYS).map(([name, key]) => `${key}=${said(state[name])}`).join("&");
}

/** Set what an address says, as far as it makes sense. */
function readAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const within = (name, low, high, whole = true) => {
    const x = Number(asked.get(KEYS[name]) ?? NaN);
    if (x >= low && x <= high && (!whole || Number.isInteger(x))) state[name] = x;
  };
  within("run", 0, runs.length - 1);
  within("view", 0, (current().views ?? [0]).length - 1);
  if (!current().agents) return;
  setWorld();
  begin();
  within("moment", 0, current().moments - 1);
  for (const name of ["agent", "diamond", "ghost"]) within(name, 0, world.cells - 1);
  if (new Set([state.agent, state.diamond, state.ghost]).size < 3) Object.assign(state, current().start);
  within("flags", 0, FLAG_SETTINGS - 1);
  within("level", 0, 1, false);
  within("temperature", 0.1, 10, false);
  if (asked.get(KEYS.weight) === "gate") state.weight = null;
  else within("weight", 0, 1, false);
  state.greedy = asked.get(KEYS.greedy) === "1";
  if (Object.hasOwn(TINTS, asked.get(KEYS.tint) ?? "")) state.tint = asked.get(KEYS.tint);
  if (modes().includes(asked.get(KEYS.compare))) state.compare = asked.get(KEYS.compare);
}

const modes = () => [
  ...(current().names.length > 1 ? ["policies"] : []), "watched", ...(runs.length > 1 ? ["runs"] : []),
];

// ---- what follows from it

const cache = new Map(); // what networks say around two squares, of the newest few

/** Around the squares as they are: chances of moves and of endings, of a run under a steering. */
function around(run, moment, how, flags = state.flags) {
  const { diamond, ghost } = state;
  const shown = run.world.flags_visible ? flags : 0;
  const key = [runs.indexOf(run), moment, diamond, ghost, shown].join(" ");
  const outputs = cache.get(key) ?? world.outputs(run.agents[moment], diamond, ghost, shown);
  cache.delete(key);
  cache.set(key, outputs);
  if (cache.size > 40) cache.delete(cache.keys().next().value);
  const chances = world.policy(run.agents[moment], outputs, how);
  return { run, outputs, chances, how, flags, ...world.exact(chances, diamond, ghost) };
}

/** The boards to compare: a name, a word, what is found there. */
function compared() {
  const run = current(), { moment } = state;
  if (state.compare === "policies") {
    const kept = `${run.names[0]} expert, as deployed`;
    return [
      { name: "mixture, as trained", found: around(run, moment, steering(null)) },
      { name: kept, found: around(run, moment, steering(1)) },
      { name: `${run.names[1]} expert`, found: around(run, moment, steering(0)) },
    ];
  }
  if (state.compare === "watched") {
    const [no, yes] = [0, 3].map((flags) => around(run, moment, steering(), flags));
    const change = Array.from(no.pDiamond, (p, cell) => yes.pDiamond[cell] - p);
    return [
      { name: "nobody watches", found: no },
      { name: "both are watched", found: yes },
      { name: "what watching changes", change },
    ];
  }
  return runs.filter(fits).slice(0, 9).map((other) => {
    const { temperature, greedy } = state, single = other.names.length === 1;
    const weights = single ? [1] : other.names.map((_, k) => (k ? 0 : 1));
    return { name: `${other.name}, as deployed`, found: around(other, other.moments - 1, { weights, temperature, greedy }) };
  });
}

const fits = ({ world: other }) => other?.rows === world.rows && other.cols === world.cols;

function tintOf(found) {
  const K = found.run.names.length;
  if (state.tint === "chance") return (cell) => 2 * found.pDiamond[cell] - 1;
  if (state.tint === "gate") return found.how.weights ? () => null : (cell) => 2 * found.outputs.gate[cell * K] - 1;
  if (state.tint === "value") return (cell) => Math.max(-1, Math.min(1, found.outputs.value[cell]));
  return () => null;
}

// ---- drawing

let mine, boards = [], shownAs = "";

/** New boards, where another number of them, or another world, is shown. */
function layBoards(list) {
  const as = [state.run, state.compare, list.length].join(" ");
  if (as === shownAs) return;
  shownAs = as;
  const handlers = { move, flag: toggle, look };
  $("mine").replaceChildren();
  mine = { board: new Board($("mine"), world, handlers, true), ...ends(), tally: newTally() };
  $("mine").append(mine.bar, mine.said);
  $("boards").replaceChildren();
  boards = list.map(() => {
    const figure = make("figure"), board = new Board(figure, world, handlers, false);
    const name = make("b"), parts = ends();
    figure.append(make("figcaption", {}, name, parts.bar, parts.said));
    $("boards").append(figure);
    return { board, name, ...parts, tally: newTally() };
  });
}

function ends() {
  const bar = make("div", { class: "bar" }, make("i", { class: "to-diamond" }), make("i", { class: "to-ghost" }));
  return { bar, said: make("span") };
}

const newTally = () => ({ diamond: 0, ghost: 0, timeout: 0 });

function sayEnds({ bar, said, tally }, found) {
  const d = found.pDiamond[state.agent], g = found.pGhost[state.agent];
  bar.children[0].style.width = `${100 * d}%`;
  bar.children[1].style.width = `${100 * g}%`;
  const neither = 1 - d - g > 0.005 ? `, neither ${percent(1 - d - g)}` : "";
  const played = tally.diamond + tally.ghost + tally.timeout;
  const count = played ? `; played ${played}: ${tally.diamond} diamond, ${tally.ghost} ghost, ${tally.timeout} neither` : "";
  said.textContent = `ends on the diamond ${percent(d)}, ghost ${percent(g)}${neither}${count}`;
}

/** Draw all that depends on the placement and the steering. */
function draw() {
  const own = around(current(), state.moment, steering()), list = compared();
  layBoards(list);
  const place = (flags) => ({ ...state, flags });
  mine.found = own;
  sayEnds(mine, own);
  mine.board.draw(place(state.flags), { chances: own.chances, tint: tintOf(own), label: `your policy; ${mine.said.textContent}` });
  list.forEach(({ name, found, change }, i) => {
    const part = boards[i];
    part.found = found ?? null;
    part.name.textContent = name;
    part.bar.hidden = !found;
    if (found) {
      sayEnds(part, found);
      part.board.draw(place(found.flags), { chances: found.chances, tint: tintOf(found), label: `${name}; ${part.said.textContent}` });
      return;
    }
    const signed = (x) => {
      const points = Math.round(100 * x);
      return `${points > 0 ? "+" : points < 0 ? "−" : ""}${Math.abs(points)}`;
    };
    part.said.textContent = `in points of the chance to end on the diamond; from the agent's cell ${signed(change[state.agent])}`;
    const tint = (cell) => change[cell], text = (cell) => (cell === state.agent ? "" : signed(change[cell]));
    part.board.draw(place(0), { chances: null, tint, text, label: `${name}: ${part.said.textContent}` });
  });
  drawLegend(list.some(({ change }) => change));
  drawCell();
  $("command").textContent = command();
}

function drawLegend(change) {
  const words = {
    chance: ["0%: never the diamond", "100%: always the diamond"],
    gate: ["gate trusts the ghost expert", "the diamond expert"],
    value: ["value net: −1", "+1"],
  }[state.tint];
  $("legend").hidden = !words;
  if (!words) return;
  const more = change ? "On the last board: 100 points worse to 100 points better when watched." : "";
  const [low, high] = words, key = low + high + more;
  if ($("legend").dataset.key === key) return;
  $("legend").dataset.key = key;
  const line = make("div", { class: "ends" }, make("span", { text: low }), make("span", { text: high }));
  $("legend").replaceChildren(make("div", { class: "scale" }), line, make("div", { text: more }));
}

/** The table of moves from the cell that is pointed at, or the agent's. */
function drawCell() {
  const squares = [state.diamond, state.ghost];
  const cell = looked === null || squares.includes(looked) ? state.agent : looked;
  const run = current(), { names } = run, A = ACTIONS.length, own = mine.found;
  $("cell-name").textContent = cell === state.agent ? "the agent's cell" : `row ${Math.floor(cell / world.cols) + 1}, column ${(cell % world.cols) + 1}`;
  const alone = names.map((_, k) => {
    const weights = names.map((__, j) => (j === k ? 1 : 0));
    const at = new Float64Array(A);
    steer({ ...steering(), weights }, agentOf(), own.outputs, cell, at);
    return at;
  });
  const columns = [["your policy", own.chances.subarray(cell * A, (cell + 1) * A)],
    ...(names.length > 1 ? names.map((name, k) => [`${name} expert`, alone[k]]) : [])];
  fillTable($("cell"), ["move", ...columns.map(([name]) => name)],
    ACTIONS.map((action, a) => [action, ...columns.map(([, chances]) => percent(chances[a]))]));
  const said = [];
  if (run.net.gate) said.push(`The gate trusts the ${names[0]} expert ${percent(own.outputs.gate[cell * names.length])} here.`);
  said.push(`Your policy's exact return from here is ${number(own.value[cell])}.`);
  if (state.tint === "value")
    said.push(`The value net expects ${number(own.outputs.value[cell])} of the agent as trained, by the rewards of training, which are not always the truth.`);
  $("cell-more").textContent = said.join(" ");
  for (const { board } of [mine, ...boards]) board.look(cell === state.agent ? null : cell);
}

/** Rows of text into a table, in the elements that are there. */
function fillTable(table, heading, rows, marked = -1) {
  const wanted = JSON.stringify([heading.length, rows.length]);
  if (table.dataset.size !== wanted) {
    table.dataset.size = wanted;
    const line = (first, n, scope) => make("tr", {}, make("th", { scope: first }), ...Array.from({ length: n - 1 }, () => make(scope ? "th" : "td", scope ? { scope } : {})));
    table.replaceChildren(make("thead", {}, line("col", heading.length, "col")), make("tbody", {}, ...rows.map(() => line("row", heading.length))));
  }
  [heading, ...rows].forEach((row, r) => {
    table.rows[r].className = r - 1 === marked ? "yours" : "";
    row.forEach((words, c) => { table.rows[r].cells[c].textContent = words; });
  });
}

function command() {
  const { temperature, greedy, level } = state;
  const more = (greedy ? " --greedy" : "") + (temperature !== 1 ? ` --temperature ${temperature}` : "");
  return `oversight-rl evaluate ${current().path} --steer ${steeringName()} --oversight ${level}${more}`;
}

function drawControls() {
  const run = current(), several = run.names.length > 1;
  $("steering").hidden = !several;
  $("weight").value = state.weight ?? 0.5;
  $("weight-said").textContent = steeringWords();
  $("gate").checked = state.weight === null;
  $("watch-diamond").checked = Boolean(state.flags & 2);
  $("watch-ghost").checked = Boolean(state.flags & 1);
  $("temperature").value = Math.log10(state.temperature);
  $("temperature").disabled = state.greedy;
  $("temperature-said").textContent = state.greedy ? "none, greedy" : `${state.temperature}${state.temperature === 1 ? ", as trained" : ""}`;
  $("greedy").checked = state.greedy;
  $("level").value = state.level;
  $("level-said").textContent = percent(state.level) + (state.level === run.oversight ? ", as in training" : "");
  $("run").value = state.run;
  for (const [id, value] of [["compare", state.compare], ["tint", state.tint]])
    for (const input of $(id).querySelectorAll("input")) input.checked = input.value === value;
  drawMoment();
}

function radios(id, choices) {
  const [legend] = $(id).children;
  $(id).replaceChildren(legend, ...Object.entries(choices).map(([value, words]) =>
    make("label", { class: "check" }, make("input", { type: "radio", name: id, value }), words)));
}

// ---- what is done by hand

let written = 0;

/** Something was set: draw it, ask for the sums again, and keep it in the address. */
function changed(world_too = true) {
  stopEpisode();
  drawControls();
  draw();
  $("story").textContent = tell(mine.found);
  markTour(tourStep());
  if (world_too) askSums();
  keepAddress();
}

function keepAddress() {
  clearTimeout(written);
  written = setTimeout(() => history.replaceState(null, "", `#${address()}`), 120);
}

function move(piece, cell) {
  const others = ["agent", "diamond", "ghost"].filter((name) => name !== piece);
  if (others.some((name) => state[name] === cell)) return;
  state[piece] = cell;
  clearTallies();
  changed(false);
}

function toggle(piece) {
  state.flags ^= piece === "diamond" ? 2 : 1;
  set({});
}

function look(cell) {
  if (cell === looked) return;
  looked = cell;
  drawCell();
}

function set(values) {
  Object.assign(state, values);
  clearTallies();
  changed();
}

function listen() {
  const on = (id, kind, act) => $(id).addEventListener(kind, act);
  on("weight", "input", () => set({ weight: Number($("weight").value) }));
  on("gate", "change", () => set({ weight: $("gate").checked ? null : Number($("weight").value) }));
  on("watch-diamond", "change", () => toggle("diamond"));
  on("watch-ghost", "change", () => toggle("ghost"));
  on("temperature", "input", () => set({ temperature: Number((10 ** Number($("temperature").value)).toPrecision(2)) }));
  on("greedy", "change", () => set({ greedy: $("greedy").checked }));
  on("level", "input", () => {
    state.level = Number($("level").value);
    drawControls();
    drawSums();
    changed(false);
  });
  on("moment", "input", () => set({ moment: Number($("moment").value) }));
  on("run", "change", () => {
    state.run = Number($("run").value);
    enter();
  });
  on("compare", "change", (event) => set({ compare: event.target.value }));
  on("view", "change", (event) => {
    state.view = Number(event.target.value);
    showView();
    keepAddress();
  });
  on("tint", "change", (event) => set({ tint: event.target.value }));
  on("reset", "click", () => enter());
  on("worst", "click", worst);
  on("play", "click", playOrStop);
  on("hundred", "click", hundred);
  on("copy", "click", copy);
  on("show-film", "click", () => playFilm($("film").hidden));
  addEventListener("resize", () => {
    if (!current().agents) return;
    drawCurve();
    drawMoment();
  });
  addEventListener("hashchange", () => location.hash.slice(1) !== address() && open());
}

async function copy() {
  const range = document.createRange();
  range.selectNodeContents($("command"));
  getSelection().removeAllRanges();
  getSelection().addRange(range);
  try {
    await navigator.clipboard.writeText($("command").textContent);
    $("copy").textContent = "Copied";
  } catch {
    $("copy").textContent = "Selected: copy it"; // the browser does not let a page from disk do it
  }
  setTimeout(() => { $("copy").textContent = "Copy"; }, 2000);
}
