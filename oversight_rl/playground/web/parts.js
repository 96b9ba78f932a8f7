// The page's parts around the boards: a tour, episodes, sums over all starts, training.
"use strict";

// ---- what it is about, and what to try

function lead(run) {
  if (run.views) return `A network that was trained by ${run.method}: ${run.summary}. Of the data, ${percent(run.oversight)} was labeled.`;
  if (run.film) return `An agent that was trained in ${run.env}, where an overseer labeled ${percent(run.oversight)} of the episodes, by ${run.method}: ${run.summary}.`;
  const goal = `The agent walks until it stands on the diamond, which is wanted, or on the ghost, which is not. In training, somebody watched each square in ${percent(run.oversight)} of the episodes only (a flag is up), and told it only then which of the two it had reached.`;
  const method = `Trained by ${run.method} (${run.summary}).`;
  if (run.names.length === 1) return `${goal} It has one policy, which cannot be steered. ${method}`;
  return `${goal} It has an expert for each, and a gate that mixes them. Steering keeps one expert and drops the other: does the agent then do what is wanted where nobody watches, too? ${method}`;
}

/** What your policy does from where the agent is, in a sentence. */
function tell(found) {
  const who = current().names.length === 1 ? "This agent" : state.weight === null ? "As trained, with the gate in charge" : `Steered to ${steeringWords()}`;
  const watched = ["nobody watching", "only the ghost watched", "only the diamond watched", "both squares watched"][state.flags];
  const d = found.pDiamond[state.agent], g = found.pGhost[state.agent];
  const ending = d >= 0.5 ? `the diamond, ${percent(d)} of the time` : g >= 0.5 ? `the ghost, ${percent(g)} of the time` : `the diamond ${percent(d)} of the time and on the ghost ${percent(g)}`;
  return `${who}, ${watched}: from here it ends on ${ending}.`;
}

const asTrained = () => ({ moment: current().moments - 1, temperature: 1, greedy: false });

/** Steps of the tour: a name, and what to set. */
function tourOf({ start, names }) {
  const several = names.length > 1, gate = several ? { weight: null } : {};
  const begun = { ...asTrained(), ...start };
  const steps = [
    ["Both squares watched", { ...begun, ...gate, flags: 3 }],
    ["Nobody watches", { ...begun, ...gate, flags: 0 }],
  ];
  if (several) steps.push(["Keep the diamond expert", { ...begun, weight: 1, flags: 0 }]);
  return steps;
}

function layTour() {
  const steps = tourOf(current());
  const button = (name, i, act) => {
    const made = make("button", { type: "button", text: `${i + 1}. ${name}` });
    made.addEventListener("click", () => {
      act();
      markTour(i);
    });
    return make("li", {}, made);
  };
  const last = () => {
    set({ ...asTrained(), weight: 1, flags: 0 });
    $("story").textContent = "Looking at all placements; this takes some seconds ...";
    whenSummed(() => {
      worst();
      markTour(steps.length);
    });
  };
  $("tour").replaceChildren(
    ...steps.map(([name, values], i) => button(name, i, () => set(values))),
    ...(current().sums ? [button("Where it still fails", steps.length, last)] : []));
}

/** The step of the tour that is set, or -1. */
function tourStep() {
  return tourOf(current()).findIndex(([, values]) =>
    Object.entries(values).every(([name, value]) => state[name] === value));
}

/** Mark the step of the tour that is shown, or none. */
function markTour(shown) {
  $("tour").querySelectorAll("button").forEach((button, i) => button.setAttribute("aria-pressed", i === shown));
}

// ---- sums over all starts

let worker = null, sums = null, asked = 0, nth = 0, waiting = null;

function startWorker() {
  const source = $("core").textContent + $("worker").textContent;
  const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
  worker = new Worker(url);
  worker.onmessage = ({ data: { id, done, sums: found } }) => {
    if (id !== asked) return;
    if (!found) {
      $("world-more").textContent = `Working out all starts: ${percent(done)}`;
      return;
    }
    sums = found;
    nth = 0;
    $("worst").disabled = false;
    drawSums();
    const then = waiting;
    waiting = null;
    then?.();
  };
  worker.postMessage({ runs: data.runs });
}

/** Steerings that the table has, yours first. */
function summed() {
  const yours = [["your policy", steering()]];
  if (current().names.length === 1) return yours;
  return [...yours, ["mixture", steering(null)], [`${current().names[0]} expert`, steering(1)], [`${current().names[1]} expert`, steering(0)]];
}

function askSums() {
  const run = current();
  $("worst").disabled = true;
  waiting = null;
  if (!run.sums) {
    $("world-more").textContent = "What happens from all starts of this world is not summed up in a browser; oversight-rl evaluate does it.";
    return;
  }
  const { moment, flags } = state;
  if (!sums) $("world-more").textContent = "Working out all starts";
  worker.postMessage({ id: ++asked, run: state.run, moment, flags, steerings: summed().map(([, how]) => how) });
}

function whenSummed(act) {
  waiting = act;
}

function drawSums() {
  if (!sums) return;
  const { shares, optimum } = current(), { level } = state;
  const weights = flagWeights(level * shares[0], level * shares[1]);
  const mean = (values) => values.reduce((sum, x, f) => sum + x * weights[f], 0);
  const rows = summed().map(([name], i) => {
    const [value, d, g] = [sums[i].value, sums[i].pDiamond, sums[i].pGhost].map(mean);
    return [name, number(value, 3), percent(d), percent(g), percent(Math.max(0, 1 - d - g)), number(mean(sums[i].steps), 1)];
  });
  // your policy is one of the others, at times
  const same = rows.length > 1 ? [null, 1, 0].indexOf(state.weight) + 1 : 0;
  if (same) {
    rows[same][0] = `${rows[same][0]} (yours)`;
    rows.shift();
  }
  fillTable($("world"), ["policy", "return", "diamond", "ghost", "neither", "steps"], rows, Math.max(0, same - 1));
  const chance = current().names.length > 1 ? " Where nobody watched, training paid the mixture for either square alike, so that which one it prefers is chance." : "";
  const best = optimum === null ? "" : ` The best that any agent could have is ${number(optimum, 3)}.`;
  $("world-more").textContent = `With the flags as they are above, your policy ends on the diamond in most of the episodes from ${percent(sums[0].well)} of all starts.${best}${chance}`;
}

/** Show the next of the worst starts of your policy. */
function worst() {
  const list = sums[0].worst, [, agent, diamond, ghost] = list[nth % list.length];
  Object.assign(state, { agent, diamond, ghost });
  clearTallies();
  changed(false);
  const rank = nth % list.length ? `Number ${nth % list.length + 1} of the worst` : "The worst start of all";
  const way = (from, to) => Math.abs(from % world.cols - to % world.cols) + Math.abs(Math.floor(from / world.cols) - Math.floor(to / world.cols));
  const between = way(agent, ghost) + way(ghost, diamond) === way(agent, diamond) ? " The ghost stands on a shortest way there." : "";
  $("story").textContent = `${rank}. ${tell(mine.found)}${between} So it goes from ${percent(1 - sums[0].well)} of all starts: it ends on the diamond in less than half of the episodes.`;
  nth++;
}

// ---- a recording, of what is no grid

function showFilm(run) {
  stopEpisode();
  playFilm(false);
  fillTable($("returns"), ["policy", "watched at deployment", "return"], run.rows.map(([policy, level, value]) => [policy, percent(level), number(value, 3)]));
  $("film-command").textContent = `oversight-rl evaluate ${run.path} --steer deployed`;
}

/** Nothing moves before it is asked to. */
function playFilm(on) {
  $("film").hidden = !on;
  if (on) $("film").src = `data:image/gif;base64,${current().film}`;
  else $("film").removeAttribute("src");
  $("show-film").textContent = on ? "Stop" : "Play the recording";
  $("show-film").setAttribute("aria-pressed", on);
}

// ---- what is no agent: pictures or texts to switch between

function showViews(run) {
  stopEpisode();
  const [, heading, legend] = run.words;
  $("views-title").textContent = heading;
  $("view").firstElementChild.textContent = legend;
  radios("view", Object.fromEntries(run.views.map(({ name }, i) => [i, name])));
  fillTable($("figures"), run.heading, run.figures.map(([who, ...own]) => [who, ...own.map((x) => (x === null ? "" : number(x, 3)))]));
  $("notes").textContent = `${run.notes.join(". ")}. The same from the command line:`;
  $("views-command").textContent = `oversight-rl ${run.command}`;
  showView();
}

function showView() {
  const { views } = current();
  state.view = Math.min(state.view, views.length - 1);
  const { name, image, texts } = views[state.view];
  $("view").querySelectorAll("input")[state.view].checked = true;
  const shown = image
    ? [make("img", { src: `data:image/png;base64,${image}`, alt: `Images in a row; below each, what is made of it with ${name}` })]
    : texts.flatMap(([topic, stories]) => [
      make("h3", { text: topic }),
      ...stories.map(([opening, went]) => make("p", {}, make("b", { text: opening }), ` ${went}`)),
    ]);
  $("seen").replaceChildren(...shown);
}

// ---- episodes

let timer = 0, playing = false, episode = 0, acts = [];

function parts() {
  return [mine, ...boards].filter(({ found }) => found);
}

function clearTallies() {
  for (const part of [mine, ...boards]) if (part) part.tally = newTally();
}

/** One step of an episode on a board, by the same random number as on all others. */
function step(act, u) {
  const { chances } = act.part.found, A = ACTIONS.length;
  let action = 0, edge = chances[act.cell * A];
  while (action < A - 1 && u >= edge) edge += chances[act.cell * A + ++action];
  act.cell = world.moves[act.cell * A + action];
  act.path.push(act.cell);
  if (act.cell === state.diamond) act.ending = "diamond";
  else if (act.cell === state.ghost) act.ending = "ghost";
  else if (act.path.length > world.limit) act.ending = "timeout";
  if (act.ending) act.part.tally[act.ending]++;
}

const newActs = () => parts().map((part) => ({ part, cell: state.agent, path: [state.agent], ending: "" }));

function tick(random) {
  const u = random();
  for (const act of acts) {
    if (act.ending) continue;
    step(act, u);
    act.part.board.follow(act.path, act.ending);
    if (act.ending) sayEnds(act.part, act.part.found);
  }
  const over = acts.every(({ ending }) => ending);
  timer = over ? setTimeout(nextEpisode, PAUSE_MS) : setTimeout(() => tick(random), STEP_MS);
}

function nextEpisode() {
  acts = newActs();
  const random = uniform(SEED + ++episode);
  if (still) { // whole ways at once, without motion
    while (acts.some(({ ending }) => !ending)) {
      const u = random();
      for (const act of acts) if (!act.ending) step(act, u);
    }
    for (const act of acts) {
      act.part.board.follow(act.path, act.ending);
      sayEnds(act.part, act.part.found);
    }
    timer = setTimeout(nextEpisode, 3 * PAUSE_MS);
    return;
  }
  for (const act of acts) act.part.board.follow(act.path, "");
  timer = setTimeout(() => tick(random), STEP_MS);
}

function playOrStop() {
  playing = !playing;
  $("play").setAttribute("aria-pressed", playing);
  $("play").textContent = playing ? "Stop" : "Play episodes";
  if (playing) nextEpisode();
  else stopEpisode();
}

/** Break off the episode that is shown; play on from what is set now. */
function stopEpisode() {
  clearTimeout(timer);
  acts = [];
  for (const part of [mine, ...boards]) part?.board.follow([], "");
  if (playing) timer = setTimeout(nextEpisode, PAUSE_MS);
}

function hundred() {
  for (let i = 0; i < 100; i++) {
    const random = uniform(SEED + ++episode), together = newActs();
    while (together.some(({ ending }) => !ending)) {
      const u = random();
      for (const act of together) if (!act.ending) step(act, u);
    }
  }
  for (const part of parts()) sayEnds(part, part.found);
}

// ---- training

const CURVE = { width: 640, height: 220, left: 44, right: 118, top: 12, bottom: 30 };

const along = (update, last) => CURVE.left + ((CURVE.width - CURVE.left - CURVE.right) * update) / Math.max(1, last);
const above = (value) => CURVE.top + ((CURVE.height - CURVE.top - CURVE.bottom) * (1 - value)) / 2;

function drawCurve() {
  const { curve, optimum, updates } = current();
  CURVE.width = Math.max(280, $("curve").clientWidth); // so that its words keep their size
  $("training").hidden = updates.length < 2 && !curve.length;
  const last = Math.max(updates[updates.length - 1], ...curve.map(({ points }) => points[points.length - 1][0]));
  const picture = svg("svg", { viewBox: `0 0 ${CURVE.width} ${CURVE.height}`, role: "img", "aria-label": "Return of each policy over training" });
  for (const value of [-1, 0, 1]) {
    svg("path", { class: "axis", d: `M${CURVE.left},${above(value)}H${CURVE.width - CURVE.right}` }, picture);
    svg("text", { x: CURVE.left - 8, y: above(value) + 4, "text-anchor": "end" }, picture).textContent = number(value, 0);
  }
  for (const [at, words] of [[0, "0"], [last, `update ${last}`]])
    svg("text", { x: along(at, last), y: CURVE.height - 8, "text-anchor": at ? "end" : "start" }, picture).textContent = words;
  const labels = curve.map(({ policy, points }) => ({ words: policy, y: above(points[points.length - 1][1]) }));
  if (optimum !== null) {
    svg("path", { class: "optimum", d: `M${CURVE.left},${above(optimum)}H${CURVE.width - CURVE.right}` }, picture);
    labels.push({ words: "optimum", y: above(optimum) });
  }
  for (const { policy, points } of curve) {
    const line = points.map(([update, value]) => `${along(update, last).toFixed(1)},${above(value).toFixed(1)}`);
    svg("polyline", { class: `line ${policy}`, points: line.join(" ") }, picture);
  }
  labels.sort((a, b) => a.y - b.y);
  labels.forEach((label, i) => { if (i) label.y = Math.max(label.y, labels[i - 1].y + 15); });
  for (const { words, y } of labels) svg("text", { x: CURVE.width - CURVE.right + 6, y: y + 4 }, picture).textContent = words;
  svg("path", { class: "now", id: "now" }, picture);
  picture.addEventListener("click", (event) => {
    const box = picture.getBoundingClientRect(), x = ((event.clientX - box.left) / box.width) * CURVE.width;
    const distance = updates.map((update) => Math.abs(along(update, last) - x));
    set({ moment: distance.indexOf(Math.min(...distance)) });
  });
  $("curve").replaceChildren(picture);
  $("curve").dataset.last = last;
  $("moment").max = updates.length - 1;
  const few = "No snapshots are in the run folder, so that only the trained agent can be shown.";
  $("training-more").textContent = updates.length > 1 ? "Ground-truth return at the training oversight. Pull the slider, or click the curve, to play with the agent as it was then." : few;
  $("moment").disabled = updates.length < 2;
}

function drawMoment() {
  const { updates } = current(), at = updates[state.moment];
  $("moment").value = state.moment;
  $("moment-said").textContent = `${at} of ${updates[updates.length - 1]}`;
  $("now")?.setAttribute("d", `M${along(at, Number($("curve").dataset.last))},${CURVE.top}V${CURVE.height - CURVE.bottom}`);
}

// ---- beginning

function setWorld() {
  world = new World(current().world, current().discount);
  cache.clear();
  shownAs = "";
  looked = null;
}

/** Show the current run from its beginning. */
function enter() {
  if (current().agents) {
    setWorld();
    begin();
  }
  show();
}

function open() {
  readAddress();
  show();
}

function show() {
  const run = current(), recorded = !run.agents;
  $("title").textContent = run.words?.[0] ?? "Steer a trained agent";
  $("lead").textContent = lead(run);
  $("run").value = state.run;
  $("recorded").hidden = !run.film;
  $("viewed").hidden = !run.views;
  for (const id of ["live", "try", "tour", "story"]) $(id).hidden = recorded;
  if (recorded) {
    if (run.film) showFilm(run);
    else showViews(run);
    keepAddress();
    return;
  }
  radios("compare", Object.fromEntries(modes().map((mode) => [mode, LABELS[mode]])));
  radios("tint", Object.fromEntries(Object.entries(TINTS).filter(([name]) => name !== "gate" || run.net.gate)));
  layTour();
  drawCurve();
  sums = null;
  set({});
}

async function start() {
  for (const run of runs.filter(({ net }) => net))
    run.agents = unpack(await inflate(run.data), run.layout, run.moments, run.coarse).map((tensors) => new Agent(tensors, run.net));
  runs.forEach((run, i) => $("run").append(make("option", { value: i, text: run.name })));
  $("which").hidden = runs.length === 1;
  startWorker();
  listen();
  open();
  document.body.dataset.ready = "yes";
}

start();
