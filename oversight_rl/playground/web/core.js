// What needs no page: networks, steering, exact chances. It runs in the page and in its worker.
"use strict";

const ACTIONS = ["up", "right", "down", "left"];
const FLAG_SETTINGS = 4; // as in envs/world.py: 2 * (diamond is watched) + (ghost is watched)

/** The bytes of base64 text that was deflated. */
async function inflate(text) {
  const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Parameters by name, at each of a run's moments; see playground/pack.py for what the bytes are. */
function unpack(bytes, layout, moments, coarse) {
  const sizes = layout.map(([, shape]) => shape.reduce((a, b) => a * b, 1));
  const rows = layout.map(([, shape], i) => sizes[i] / shape[shape.length - 1]);
  const total = sizes.reduce((a, b) => a + b, 0), head = 4 * rows.reduce((a, b) => a + b, 0);
  const scales = new Float32Array(bytes.slice(0, head).buffer);
  const plane = (i) => bytes.subarray(head + i * total, head + (i + 1) * total);
  const low = plane(0), high = plane(1);
  const fine = Int16Array.from(low, (byte, i) => byte | (high[i] << 8));
  const rough = Int16Array.from(fine, (x) => Math.sign(x) * Math.floor(Math.abs(x) / coarse + 0.5));
  const found = [named(fine, 1)];
  for (let m = 1; m < moments; m++) {
    const delta = plane(m + 1);
    for (let i = 0; i < total; i++) rough[i] += (delta[i] << 24) >> 24;
    found.unshift(named(rough, coarse));
  }
  return found;

  function named(numbers, step) {
    const tensors = {};
    let at = 0, row = 0;
    layout.forEach(([name, shape], t) => {
      const values = new Float32Array(sizes[t]), width = shape[shape.length - 1];
      for (let r = 0; r < rows[t]; r++, row++)
        for (let i = 0; i < width; i++, at++)
          values[r * width + i] = numbers[at] * step * scales[row];
      tensors[name] = { shape, values };
    });
    return tensors;
  }
}

/** A network: `forward(active)` fills `logits` [K * A], without the head's bias, `gate` [K], `value`. */
class Agent {
  constructor(tensors, { experts, gate, affine_value: affine }) {
    this.experts = experts;
    this.hasGate = gate;
    this.affine = affine;
    this.actions = ACTIONS.length;
    this.layers = [];
    for (let l = 0; tensors[`trunk${l}.weight`]; l++) {
      const { shape: [trunks, outs, ins], values } = tensors[`trunk${l}.weight`];
      const columns = new Float32Array(values.length); // [J, in, out]: one input's row is together
      for (let j = 0; j < trunks; j++)
        for (let o = 0; o < outs; o++)
          for (let i = 0; i < ins; i++)
            columns[(j * ins + i) * outs + o] = values[(j * outs + o) * ins + i];
      this.layers.push({ trunks, outs, ins, columns, bias: tensors[`trunk${l}.bias`].values });
    }
    this.out = tensors["out.weight"]; // [J, O, H]
    this.outBias = tensors["out.bias"].values;
    this.bias = tensors["head.bias"].values;
    this.valueWeight = affine ? tensors["value.weight"].values : null;
    this.valueBias = affine ? tensors["value.bias"].values[0] : 0;
    this.buffers = this.layers.map(({ outs }) => new Float64Array(outs));
    this.logits = new Float64Array(experts * this.actions);
    this.gate = new Float64Array(experts);
    this.value = 0;
  }

  /** Think about an observation; of its value only if that is wanted, which takes a trunk more. */
  forward(active, valued = true) {
    const { experts: K, actions: A } = this, [first] = this.layers, { ins, outs } = first;
    const [, O, H] = this.out.shape, trunks = valued ? first.trunks : K + this.hasGate;
    for (let j = 0; j < trunks; j++) {
      const x = this.buffers[0];
      for (let o = 0; o < outs; o++) x[o] = first.bias[j * outs + o];
      for (const input of active) {
        const at = (j * ins + input) * outs;
        for (let o = 0; o < outs; o++) x[o] += first.columns[at + o];
      }
      const hidden = this.deeper(j);
      const put = (o) => {
        let sum = this.outBias[j * O + o];
        const at = (j * O + o) * H;
        for (let h = 0; h < H; h++) sum += this.out.values[at + h] * hidden[h];
        return sum;
      };
      if (j < K) for (let a = 0; a < A; a++) this.logits[j * A + a] = put(a);
      else if (j === K && this.hasGate) for (let k = 0; k < K; k++) this.gate[k] = k < K - 1 ? put(k) : 0;
      else this.value = put(0);
    }
    if (!this.hasGate) this.gate.fill(0);
    softmax(this.gate);
    if (this.affine) {
      this.value = this.valueBias;
      for (const input of active) this.value += this.valueWeight[input];
    }
  }

  /** The last hidden layer of trunk j, from what is in the first buffer. */
  deeper(j) {
    let x = this.buffers[0];
    relu(x);
    for (let l = 1; l < this.layers.length; l++) {
      const { ins, outs, columns, bias } = this.layers[l], y = this.buffers[l];
      for (let o = 0; o < outs; o++) y[o] = bias[j * outs + o];
      for (let i = 0; i < ins; i++) {
        const value = x[i], at = (j * ins + i) * outs;
        if (value !== 0) for (let o = 0; o < outs; o++) y[o] += value * columns[at + o];
      }
      relu(y);
      x = y;
    }
    return x;
  }
}

function relu(x) {
  for (let i = 0; i < x.length; i++) if (x[i] < 0) x[i] = 0;
}

function softmax(x) {
  let top = -Infinity, sum = 0;
  for (let i = 0; i < x.length; i++) if (x[i] > top) top = x[i];
  for (let i = 0; i < x.length; i++) sum += x[i] = Math.exp(x[i] - top);
  for (let i = 0; i < x.length; i++) x[i] /= sum;
}

/**
 * Action probabilities in the i-th of several observations under a steering, into `row` [A].
 * A steering: `weights` of the experts, or null for the gate's own; `temperature`; `greedy`.
 */
function steer({ weights, temperature, greedy }, { experts: K, actions: A, bias }, { logits, gate }, i, row) {
  row.set(bias);
  for (let k = 0; k < K; k++) {
    const w = weights ? weights[k] : gate[i * K + k];
    for (let a = 0; a < A; a++) row[a] += w * logits[(i * K + k) * A + a];
  }
  if (greedy) {
    let best = 0;
    for (let a = 1; a < A; a++) if (row[a] > row[best]) best = a;
    row.fill(0);
    row[best] = 1;
    return;
  }
  for (let a = 0; a < A; a++) row[a] /= temperature;
  softmax(row);
}

/** The grid: where moves lead, what is seen. Cells are row * cols + col. */
class World {
  constructor({ rows, cols, max_steps: limit, flags_visible: visible }, discount) {
    Object.assign(this, { rows, cols, limit, visible, discount, cells: rows * cols });
    this.moves = new Int32Array(this.cells * ACTIONS.length);
    for (let cell = 0; cell < this.cells; cell++) {
      const row = Math.floor(cell / cols), col = cell % cols;
      const to = [
        Math.max(row - 1, 0) * cols + col,
        row * cols + Math.min(col + 1, cols - 1),
        Math.min(row + 1, rows - 1) * cols + col,
        row * cols + Math.max(col - 1, 0),
      ];
      this.moves.set(to, cell * ACTIONS.length);
    }
  }

  /** Inputs that are 1: planes agent, ghost, diamond, oversight. */
  active(agent, diamond, ghost, flags) {
    const S = this.cells, inputs = [agent, S + ghost, 2 * S + diamond];
    if (this.visible && flags & 2) inputs.push(3 * S + diamond);
    if (this.visible && flags & 1) inputs.push(3 * S + ghost);
    return inputs;
  }

  /** Moves of the agent from every cell: what the network says around one diamond and ghost. */
  outputs(agent, diamond, ghost, flags, valued = true) {
    const S = this.cells, K = agent.experts, A = agent.actions;
    const found = {
      logits: new Float64Array(S * K * A), gate: new Float64Array(S * K), value: new Float64Array(S),
    };
    for (let cell = 0; cell < S; cell++) {
      if (cell === diamond || cell === ghost) continue;
      agent.forward(this.active(cell, diamond, ghost, flags), valued);
      found.logits.set(agent.logits, cell * K * A);
      found.gate.set(agent.gate, cell * K);
      found.value[cell] = agent.value;
    }
    return found;
  }

  /** Action probabilities from every cell, [S * A]. */
  policy(agent, outputs, steering) {
    const A = agent.actions, chances = new Float64Array(this.cells * A);
    for (let cell = 0; cell < this.cells; cell++)
      steer(steering, agent, outputs, cell, chances.subarray(cell * A, (cell + 1) * A));
    return chances;
  }

  /**
   * What a policy does from every cell within the step limit, exactly: chances to end on the diamond
   * and on the ghost, the expected discounted return, and steps. [S] each.
   */
  exact(chances, diamond, ghost) {
    const S = this.cells, A = ACTIONS.length, { moves, discount } = this;
    let now = [0, 1, 2, 3].map(() => new Float64Array(S)), next = now.map((x) => x.slice());
    for (let t = 0; t < this.limit; t++) {
      const [d, g, r, n] = now, [dNew, gNew, rNew, nNew] = next;
      for (let cell = 0; cell < S; cell++) {
        if (cell === diamond || cell === ghost) continue;
        let toD = 0, toG = 0, value = 0, steps = 1;
        for (let a = 0; a < A; a++) {
          const p = chances[cell * A + a], to = moves[cell * A + a];
          if (to === diamond) { toD += p; value += p; }
          else if (to === ghost) { toG += p; value -= p; }
          else {
            toD += p * d[to];
            toG += p * g[to];
            value += p * discount * r[to];
            steps += p * n[to];
          }
        }
        dNew[cell] = toD;
        gNew[cell] = toG;
        rNew[cell] = value;
        nNew[cell] = steps;
      }
      [now, next] = [next, now];
    }
    const [pDiamond, pGhost, value, steps] = now;
    return { pDiamond, pGhost, value, steps };
  }
}

/** What an agent's network says in every state of a world: filled placement by placement. */
class Everywhere {
  constructor(agent, world) {
    Object.assign(this, { agent, world });
    this.pairs = [];
    for (let diamond = 0; diamond < world.cells; diamond++)
      for (let ghost = 0; ghost < world.cells; ghost++)
        if (diamond !== ghost) this.pairs.push([diamond, ghost]);
    this.settings = world.visible ? FLAG_SETTINGS : 1; // flags that are not seen change nothing
    this.outputs = [];
  }

  get done() {
    return this.outputs.length / this.pairs.length;
  }

  /** Go on with some placements of diamond and ghost. */
  fill(count) {
    for (const [diamond, ghost] of this.pairs.slice(this.outputs.length, this.outputs.length + count)) {
      const found = [];
      for (let flags = 0; flags < this.settings; flags++) {
        const { logits, gate } = this.world.outputs(this.agent, diamond, ghost, flags, false);
        found.push({ logits: Float32Array.from(logits), gate: Float32Array.from(gate) });
      }
      this.outputs.push(found);
    }
  }

  /**
   * What a steered policy does from a fresh start under each setting of the flags, [4] each, the
   * worst starts under `flags`, and the share of starts that more often than not end well.
   */
  sums(steering, flags, count = 24) {
    const { world, agent } = this, S = world.cells, starts = this.pairs.length * (S - 2);
    const totals = { value: [0, 0, 0, 0], pDiamond: [0, 0, 0, 0], pGhost: [0, 0, 0, 0], steps: [0, 0, 0, 0] };
    let worst = [], well = 0;
    this.pairs.forEach(([diamond, ghost], i) => {
      for (let f = 0; f < FLAG_SETTINGS; f++) {
        if (f >= this.settings) {
          for (const total of Object.values(totals)) total[f] = total[0];
          continue;
        }
        const chances = world.policy(agent, this.outputs[i][f], steering);
        const found = world.exact(chances, diamond, ghost);
        for (const [name, total] of Object.entries(totals))
          for (let cell = 0; cell < S; cell++) total[f] += found[name][cell];
        if (f !== (this.settings > 1 ? flags : 0)) continue;
        for (let cell = 0; cell < S; cell++) {
          if (cell === diamond || cell === ghost) continue;
          if (found.pDiamond[cell] > 0.5) well++;
          worst.push([found.pDiamond[cell], cell, diamond, ghost]);
        }
        if (worst.length > 40 * count) worst = worst.sort((a, b) => a[0] - b[0]).slice(0, count);
      }
    });
    for (const total of Object.values(totals)) for (let f = 0; f < FLAG_SETTINGS; f++) total[f] /= starts;
    worst = worst.sort((a, b) => a[0] - b[0]).slice(0, count);
    return { ...totals, worst, well: well / starts };
  }
}

/** Chances of the flag settings when each square is watched with a chance. */
function flagWeights(diamond, ghost) {
  return [(1 - diamond) * (1 - ghost), (1 - diamond) * ghost, diamond * (1 - ghost), diamond * ghost];
}

/** A generator of uniform numbers in [0, 1) that a seed decides (mulberry32). */
function uniform(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let x = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    x = (x + Math.imul(x ^ (x >>> 7), 61 | x)) ^ x;
    return ((x ^ (x >>> 14)) >>> 0) / 2 ** 32;
  };
}
