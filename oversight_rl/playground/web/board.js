// A board: a grid in SVG with arrows, tints and pieces, which can be moved by pointer and by keys.
"use strict";

const CELL = 100;
const STEPS = [[0, -1], [1, 0], [0, 1], [-1, 0]]; // (x, y) of up, right, down, left

function svg(name, attributes = {}, parent = null) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (parent) parent.append(element);
  return element;
}

/** The pieces as in the pictures of envs/render.py, around the middle of a cell. */
const DRAWINGS = {
  diamond(group) {
    svg("polygon", { class: "diamond", points: "0,32 -32,-8 -16,-28 16,-28 32,-8" }, group);
    svg("path", { class: "facet", d: "M-32,-8H32M-12,-8L0,32L12,-8" }, group);
  },
  ghost(group) {
    svg("path", {
      class: "ghost",
      d: "M-26,24V-4A26,26 0 0 1 26,-4V24A8.7,8.7 0 0 1 8.7,24A8.7,8.7 0 0 1 -8.7,24A8.7,8.7 0 0 1 -26,24Z",
    }, group);
    for (const x of [-10, 10]) {
      svg("circle", { class: "eye", cx: x, cy: -6, r: 7 }, group);
      svg("circle", { class: "pupil", cx: x + 2, cy: -5, r: 3.5 }, group);
    }
  },
  agent(group) {
    svg("circle", { class: "agent", r: 20 }, group);
  },
};

class Board {
  /**
   * @param holder the element to draw into.
   * @param world the grid.
   * @param handlers `move(piece, cell)` where pieces can be moved, `look(cell or null)`.
   * @param keys whether pieces can be reached by keys, too.
   */
  constructor(holder, world, handlers, keys) {
    Object.assign(this, { world, handlers });
    const { rows, cols, cells } = world;
    this.svg = svg("svg", {
      viewBox: `-4 -4 ${cols * CELL + 8} ${rows * CELL + 8}`, class: "board", role: keys ? "group" : "img",
    });
    this.rects = [];
    this.arrows = [];
    this.texts = [];
    for (let cell = 0; cell < cells; cell++) {
      const [x, y] = this.corner(cell);
      this.rects.push(svg("rect", { class: "cell", x, y, width: CELL, height: CELL }, this.svg));
    }
    for (let cell = 0; cell < cells; cell++) {
      const [x, y] = this.middle(cell);
      this.arrows.push(["arrow", "arrow other"].map((kind) => svg("path", { class: kind }, this.svg)));
      this.texts.push(svg("text", { class: "number", x, y: y + 10, "text-anchor": "middle" }, this.svg));
    }
    this.mark = svg("rect", { class: "mark", width: CELL, height: CELL, visibility: "hidden" }, this.svg);
    this.trail = svg("polyline", { class: "trail" }, this.svg);
    this.pieces = {};
    this.flags = {};
    for (const name of ["diamond", "ghost", "agent"]) {
      const group = this.pieces[name] = svg("g", { class: "piece" }, this.svg);
      svg("rect", { class: "hold", x: -46, y: -46, width: 92, height: 92, rx: 10 }, group);
      DRAWINGS[name](group);
      if (name !== "agent")
        this.flags[name] = svg("path", { class: "flag", d: "M30,-42V-14M30,-42L47,-34L30,-26Z" }, group);
      if (keys) this.makeMovable(group, name);
    }
    this.runner = svg("g", { class: "runner", visibility: "hidden" }, this.svg);
    svg("circle", { class: "agent", r: 20 }, this.runner);
    this.ring = svg("circle", { class: "ring", r: 44, visibility: "hidden" }, this.svg);
    this.listen();
    holder.append(this.svg);
  }

  corner(cell) {
    return [(cell % this.world.cols) * CELL, Math.floor(cell / this.world.cols) * CELL];
  }

  middle(cell) {
    return this.corner(cell).map((x) => x + CELL / 2);
  }

  /** The cell under a pointer, or null. */
  under({ clientX, clientY }) {
    const box = this.svg.getBoundingClientRect(), { rows, cols } = this.world;
    const unit = (cols * CELL + 8) / box.width; // the board keeps its proportions
    const col = Math.floor(((clientX - box.left) * unit - 4) / CELL);
    const row = Math.floor(((clientY - box.top) * unit - 4) / CELL);
    return row >= 0 && col >= 0 && row < rows && col < cols ? row * cols + col : null;
  }

  listen() {
    let held = null;
    this.svg.addEventListener("pointerdown", (event) => {
      const cell = this.under(event);
      held = ["agent", "diamond", "ghost"].find((name) => this.shown && this.shown[name] === cell) ?? null;
      if (held) {
        this.svg.setPointerCapture(event.pointerId);
        this.svg.classList.add("holding");
      }
      this.handlers.look(cell);
    });
    this.svg.addEventListener("pointermove", (event) => {
      const cell = this.under(event);
      if (held === null) this.handlers.look(cell);
      else if (cell !== null && cell !== this.shown[held]) this.handlers.move(held, cell);
    });
    const drop = () => {
      held = null;
      this.svg.classList.remove("holding");
    };
    this.svg.addEventListener("pointerup", drop);
    this.svg.addEventListener("pointercancel", drop);
    this.svg.addEventListener("pointerleave", () => held === null && this.handlers.look(null));
  }

  makeMovable(group, name) {
    group.setAttribute("tabindex", "0");
    group.setAttribute("role", "button");
    group.addEventListener("keydown", (event) => {
      const way = ["ArrowUp", "ArrowRight", "ArrowDown", "ArrowLeft"].indexOf(event.key);
      if (way >= 0) {
        event.preventDefault();
        this.handlers.move(name, this.hop(this.shown[name], way));
      } else if ((event.key === "f" || event.key === " ") && name !== "agent") {
        event.preventDefault();
        this.handlers.flag(name);
      }
    });
  }

  /** The next cell in a direction that no piece is on. */
  hop(from, way) {
    const { moves } = this.world, taken = Object.values(this.shown);
    let cell = moves[from * ACTIONS.length + way];
    while (taken.includes(cell)) {
      const next = moves[cell * ACTIONS.length + way];
      if (next === cell) return from;
      cell = next;
    }
    return cell;
  }

  /**
   * Draw a placement and what is known of it.
   * `chances` [S * A] or null; `tint(cell)` in [-1, 1] or null; `text(cell)`.
   */
  draw({ agent, diamond, ghost, flags }, { chances, tint, text, label }) {
    this.shown = { agent, diamond, ghost };
    for (let cell = 0; cell < this.world.cells; cell++) {
      const square = cell === diamond || cell === ghost;
      const shade = square ? null : tint(cell);
      const rect = this.rects[cell];
      rect.style.fill = shade === null ? "" : color(shade);
      const arrows = square || !chances ? ["", ""] : this.arrowsFrom(cell, chances);
      arrows.forEach((path, i) => this.arrows[cell][i].setAttribute("d", path));
      const words = text && !square ? text(cell) : "";
      if (this.texts[cell].textContent !== words) this.texts[cell].textContent = words;
    }
    for (const [name, cell] of Object.entries(this.shown)) {
      const [x, y] = this.middle(cell), group = this.pieces[name];
      group.setAttribute("transform", `translate(${x} ${y})`);
      if (group.hasAttribute("tabindex")) group.setAttribute("aria-label", this.describe(name, cell, flags));
    }
    this.flags.diamond.setAttribute("visibility", flags & 2 ? "inherit" : "hidden");
    this.flags.ghost.setAttribute("visibility", flags & 1 ? "inherit" : "hidden");
    this.svg.setAttribute("aria-label", label);
  }

  describe(name, cell, flags) {
    const { cols } = this.world, place = `row ${Math.floor(cell / cols) + 1}, column ${(cell % cols) + 1}`;
    if (name === "agent") return `agent, ${place}; arrow keys move it`;
    const watched = flags & (name === "diamond" ? 2 : 1) ? "watched" : "not watched";
    return `${name}, ${place}, ${watched}; arrow keys move it, space watches it or not`;
  }

  /** Paths of the likeliest move's arrow and of all others, which start apart from each other. */
  arrowsFrom(cell, chances) {
    const [x, y] = this.middle(cell), A = ACTIONS.length;
    const moves = Array.from(STEPS.keys()), p = moves.map((a) => chances[cell * A + a]);
    const best = p.indexOf(Math.max(...p)), paths = ["", ""];
    for (const a of moves) {
      if (p[a] < 0.02) continue;
      const [dx, dy] = STEPS[a], from = 7, to = from + 38 * p[a];
      const tx = x + dx * to, ty = y + dy * to;
      let path = `M${x + dx * from},${y + dy * from}L${tx.toFixed(1)},${ty.toFixed(1)}`;
      if (p[a] > 0.15) {
        const wing = (side) => `${(tx - dx * 11 + side * dy * 9).toFixed(1)},${(ty - dy * 11 + side * dx * 9).toFixed(1)}`;
        path += `M${wing(1)}L${tx.toFixed(1)},${ty.toFixed(1)}L${wing(-1)}`;
      }
      paths[a === best ? 0 : 1] += path;
    }
    return paths;
  }

  look(cell) {
    this.mark.setAttribute("visibility", cell === null ? "hidden" : "visible");
    if (cell === null) return;
    const [x, y] = this.corner(cell);
    this.mark.setAttribute("x", x);
    this.mark.setAttribute("y", y);
  }

  /** The way of an episode so far; `ending` is diamond, ghost or timeout once it is over. */
  follow(path, ending) {
    const on = path.length > 0;
    this.runner.setAttribute("visibility", on ? "visible" : "hidden");
    this.ring.setAttribute("visibility", ending ? "visible" : "hidden");
    this.svg.classList.toggle("running", on);
    this.trail.setAttribute("points", path.map((cell) => this.middle(cell).join(",")).join(" "));
    if (!on) return;
    const [x, y] = this.middle(path[path.length - 1]);
    this.runner.style.transform = `translate(${x}px, ${y}px)`;
    if (ending) {
      this.ring.setAttribute("class", `ring ends-${ending}`);
      this.ring.setAttribute("cx", x);
      this.ring.setAttribute("cy", y);
    }
  }
}

/** Of a number in [-1, 1]: the ghost's color, the paper's, the diamond's. */
function color(shade) {
  const end = shade >= 0 ? "var(--tint-diamond)" : "var(--tint-ghost)";
  return `color-mix(in srgb, ${end} ${Math.round(Math.min(1, Math.abs(shade)) * 100)}%, var(--paper))`;
}
