// The page's parts around the boards: a tour, episodes, sums over all starts, training.
"use strict";

// ---- what it is about, and what to try

function lead(run) {
  const watched = `In training, ${percent(run.oversight)} of the squares were watched (a flag), and only what happened there was labeled.`;
  const goal = "The agent walks until it stands on the diamond, which is wanted, or on the ghost, which is not.";
  if (run.names.length === 1) return `${goal} ${watched} This method (${run.method}: ${run.summary}) trains one policy, which there is nothing to steer in.`;
  return `${goal} ${watched} Inside are two experts, one for each square, and a gate that mixes them (${run.method}: ${run.summary}). Steering keeps the expert that is wanted and drops the other. Does the agent then behave where nobody watches?`;
}

/** Steps of the tour: a name, what to set, what to say of it. */
function tourOf(run) {
  const says = (who) => (found) => `${who}: from here the agent ends on the diamond ${percent(found.pDiamond[state.agent])} of the time, and on the ghost ${percent(found.pGhost[state.agent])}.`;
  const several = run.names.length > 1;
  const who = several ? "As trained" : "This agent";
  const gate = several ? { weight: null } : {};
  const steps = [
    ["both squares watched", { ...run.start, ...gate, flags: 3 }, says(`${who}, with both squares watched`)],
    ["nobody watches", { ...run.start, ...gate, flags: 0 }, says(`${who}, with nobody watching`)],
  ];
  if (several) steps.push(["keep the diamond expert", { ...run.start, weight: 1, flags: 0 }, says("Steered to the diamond expert, still with nobody watching")]);
  return steps;
}

function layTour() {
  const steps = tourOf(current());
  const buttons = steps.map(([name, values, say], i) => {
    const button = make("button", { type: "button", text: `${i + 1}. ${name[0].toUpperCase()}${name.slice(1)}` });
    button.addEventListener("click", () => {
      set({ moment: current().moments - 1, temperature: 1, greedy: false, ...values });
      $("story").textContent = say(mine.found);
    });
    return button;
  });
  const last = make("button", { type: "button", text: `${steps.length + 1}. Where it fails` });
  last.addEventListener("click", () => {
    set({ moment: current().moments - 1, temperature: 1, greedy: false, weight: 1, flags: 0 });
    $("story").textContent = "Looking at every placement ...";
    whenSummed(() => { nth = 0; worst(); });
  });
  $("tour").replaceChildren(...[...buttons, last].map((button) => make("li", {}, button)));
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
    $("world-more").textContent = "This world has too many states to sum up in a browser; oversight-rl evaluate does.";
    return;
  }
  const { moment, flags } = state;
  worker.postMessage({ id: ++asked, run: state.run, moment, flags, steerings: summed().map(([, how]) => how) });
}

function whenSummed(act) {
  waiting = act;
}

function drawSums() {
  if (!sums) return;
  const { world: own, optimum } = current(), { level } = state;
  const weights = flagWeights(own.diamond_oversight ?? level, own.ghost_oversight ?? level);
  const mean = (values) => values.reduce((sum, x, f) => sum + x * weights[f], 0);
  const rows = summed().map(([name], i) => {
    const [value, d, g] = [sums[i].value, sums[i].pDiamond, sums[i].pGhost].map(mean);
    return [name, number(value, 3), percent(d), percent(g), percent(Math.max(0, 1 - d - g)), number(mean(sums[i].steps), 1)];
  });
  fillTable($("world"), ["policy", "return", "diamond", "ghost", "neither", "steps"], rows, 0);
  const best = optimum === null ? "" : ` The best that any agent could have is ${number(optimum, 3)}.`;
  $("world-more").textContent = `With the flags as they are above, your policy rather ends on the diamond than not from ${percent(sums[0].well)} of all starts.${best}`;
}

/** Show the next of the worst starts of your policy. */
function worst() {
  const list = sums[0].worst, [, agent, diamond, ghost] = list[nth % list.length];
  Object.assign(state, { agent, diamond, ghost });
  clearTallies();
  changed(false);
  const found = mine.found, { well } = sums[0];
  const rank = nth ? `Number ${nth % list.length + 1} of the worst` : "The worst of all";
  $("story").textContent = `${rank}: ${steeringWords()}, and it ends on the diamond only ${percent(found.pDiamond[agent])} of the time (ghost ${percent(found.pGhost[agent])}). From ${percent(1 - well)} of all starts it more often fails than not.`;
  nth++;
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

const CURVE = { width: 640, height: 240, left: 44, right: 118, top: 12, bottom: 30 };

const along = (update, last) => CURVE.left + ((CURVE.width - CURVE.left - CURVE.right) * update) / Math.max(1, last);
const above = (value) => CURVE.top + ((CURVE.height - CURVE.top - CURVE.bottom) * (1 - value)) / 2;

function drawCurve() {
  const { curve, optimum, updates } = current();
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

start();
