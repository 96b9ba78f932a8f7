// Sums over the whole world, beside the page: the newest request is worked on, older ones are dropped.
"use strict";

const known = new Map(); // the last few agents that were asked about, by run and moment
const SLICE = 12, MOST_KNOWN = 3;
let runs = [], wanted = null, busy = false;

onmessage = ({ data }) => {
  if (data.runs) {
    runs = data.runs.map((run) => ({ ...run, tensors: null }));
    return;
  }
  wanted = data;
  if (!busy) work();
};

async function everywhere({ run: index, moment }) {
  const key = `${index} ${moment}`, run = runs[index];
  run.tensors ??= unpack(await inflate(run.data), run.layout, run.moments, run.coarse);
  const found = known.get(key) ?? new Everywhere(new Agent(run.tensors[moment], run.net), new World(run.world, run.discount));
  known.delete(key);
  known.set(key, found);
  if (known.size > MOST_KNOWN) known.delete(known.keys().next().value);
  return found;
}

async function work() {
  busy = true;
  while (wanted) {
    const asked = wanted, all = await everywhere(asked);
    while (all.done < 1 && asked === wanted) {
      all.fill(SLICE);
      postMessage({ id: asked.id, done: all.done });
      await new Promise((resume) => setTimeout(resume)); // a newer request may come in
    }
    const sums = [];
    for (const steering of asked.steerings) {
      if (asked !== wanted) break;
      sums.push(all.sums(steering, asked.flags));
      await new Promise((resume) => setTimeout(resume));
    }
    if (asked !== wanted) continue;
    postMessage({ id: asked.id, sums });
    wanted = null;
  }
  busy = false;
}
