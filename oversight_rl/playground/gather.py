"""What a page is told of runs: their agents over training, worlds, curves, where to begin."""

from __future__ import annotations

import base64
import csv
import io
import math
import shlex
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from oversight_rl.agents.networks import Agent
from oversight_rl.agents.steering import MIXTURE, Steering, expert_names, keep, standard
from oversight_rl.envs.overseers import rate
from oversight_rl.envs.settings import BEHAVIORS, FLAGS, UserError
from oversight_rl.envs.world import State, World
from oversight_rl.experiments.oversight.config import GRID, Config
from oversight_rl.experiments.oversight.evaluation import Evaluator
from oversight_rl.experiments.oversight.policies import fill, kind_of, read_run
from oversight_rl.experiments.oversight.runs import OversightRuns
from oversight_rl.files import as_text, read_text
from oversight_rl.playground.pack import COARSE, pack, tensors_of
from oversight_rl.runs import snapshots
from oversight_rl.runs.experiment import Experiment, experiment_of
from oversight_rl.runs.folder import METRICS, RunFolder
from oversight_rl.runs.loop import judged_again
from oversight_rl.settings import RunConfig

MOST_CELLS = 100  # of a world that is shown
MOST_NUMBERS = 2**22  # parameters of an agent
MOST_STATES = 300_000  # that a browser sums over
MOST_MOMENTS = 13  # of a run, the last one included
MOST_PAIRS = 200  # of a diamond and a ghost that are looked at for a start
MOST_TABLE = 2**24  # bytes of metrics.csv
WATCHED = FLAGS - 1  # both squares


def shows(config: RunConfig) -> bool:
    """Whether runs of a configuration have a playground."""
    kind = experiment_of(config)
    return issubclass(kind, OversightRuns) and getattr(config, "env", None) == GRID


def run_of(folder: RunFolder, history: bool) -> dict[str, Any]:
    """What the page is told of a run: of one on the grid, its agents, or else a recording.

    With the `history` of its training, or as it is now. Of what is no agent, views.
    """
    config: Any = folder.config()
    kind = experiment_of(config)
    level = f"{100 * config.oversight:.3g}%"
    common = {
        "name": f"{config.method} at {level}, seed {config.seeds[0]}",
        "method": config.method,
        "oversight": config.oversight,
        "path": shlex.quote(as_text(folder.path)),
    }
    common["summary"] = kind.methods[config.method].summary
    if not issubclass(kind, OversightRuns):
        return common | _views(folder, kind)
    return common | (_agents if shows(config) else _recording)(folder, config, history)


def _views(folder: RunFolder, kind: type[Experiment]) -> dict[str, Any]:
    """What there is to switch between, as it is after the newest checkpoint, and figures."""
    if not kind.has_page():
        raise UserError(f"{folder.path}: runs of {folder.config().algo} show nothing on a page")
    with judged_again(folder, final=False) as (run, rows):
        views = run.views(0)
    shown = [kind.shown_of(row) for row in rows]
    names = [name for name in shown[0] if not all(math.isnan(own[name]) for own in shown)]
    return {
        "views": [
            {"name": name, "image": base64.b64encode(view).decode()}
            if isinstance(view, bytes)
            else {"name": name, "texts": list(view.items())}
            for name, view in views.items()
        ],
        "words": kind.page,
        "notes": kind.notes(rows),
        "command": f"evaluate {shlex.quote(as_text(folder.path))} {kind.looks}".rstrip(),
        "heading": ["", *names],
        "figures": [
            [row.policy, *(None if math.isnan(own[name]) else own[name] for name in names)]
            for row, own in zip(rows, shown, strict=True)
        ],
    }


def _recording(folder: RunFolder, config: Config, history: bool) -> dict[str, Any]:
    """Episodes of each policy on the same starts, as an animation, and what it returned."""
    saved = read_run(folder)
    policies = standard(*saved.kind.names(saved.agent))
    film = saved.pictures(policies).get("rollouts")
    if film is None:
        raise UserError(f"{folder.path}: {config.env} draws no pictures of itself")
    rows = [row for row in (folder.result() if folder.finished else []) if not row.greedy]
    known = {policy.name for policy in policies}
    return {
        "film": base64.b64encode(film).decode(),
        "env": config.env,
        "rows": [
            [row.policy, row.deploy_oversight, row.figures[saved.kind.score]]
            for row in rows
            if row.policy in known
        ],
    }


def _agents(folder: RunFolder, config: Config, history: bool) -> dict[str, Any]:
    """Agents over training, their world, and where to begin."""
    if config.world.cells > MOST_CELLS:
        size = f"{config.world.rows}x{config.world.cols}"
        raise UserError(f"{folder.path}: worlds of {MOST_CELLS} cells at most, got {size}")
    updates, agents = _moments(folder, config, history)
    agent, discount = agents[-1], config.learner.discount
    if sum(parameter.numel() for parameter in agent.parameters()) > MOST_NUMBERS:
        raise UserError(f"{folder.path}: agents of {MOST_NUMBERS:,} numbers at most")
    packed = pack([tensors_of(one) for one in agents])
    optimum = Evaluator(config.world, discount).optimal_return
    cells = config.world.cells
    names = expert_names(agent.n_experts)
    return {
        "world": config.world.model_dump(),
        "shares": [rate(config.labels.shares, behavior) for behavior in range(len(BEHAVIORS))],
        "discount": discount,
        "optimum": None if math.isnan(optimum) else optimum,
        "sums": FLAGS * cells**3 <= MOST_STATES
        and not config.world.spurious_oversight
        and config.labels.region == "all",
        "names": names,
        "net": {
            "experts": agent.n_experts,
            "gate": agent.has_gate,
            "affine_value": agent.affine_value,
        },
        "updates": updates,
        "curve": _curve(folder, ["mixture", *names]),
        "start": _start(agent, config),
        "coarse": COARSE,
        **vars(packed),
    }


def _moments(folder: RunFolder, config: Config, history: bool) -> tuple[list[int], list[Agent]]:
    """The deployed agents of the newest checkpoint, and of snapshots before it; with updates."""
    kind = kind_of(config)
    agent, facts = fill(config, kind.prefix(config), folder.load)
    newest = facts["update"]
    before = [n for n in snapshots.updates(folder.snapshots) if n < newest] if history else []
    few = min(len(before), MOST_MOMENTS - 1)
    before = [before[i * (len(before) - 1) // max(1, few - 1)] for i in range(few)]
    agents = [_snapshot(folder, config, update) for update in before]
    for update, one in zip([*before, newest], [*agents, agent], strict=True):
        if not all(parameter.isfinite().all() for parameter in one.parameters()):
            raise UserError(f"{folder.path}: its agent's numbers are not finite, update {update}")
    return [*before, newest], [kind.networks(one) for one in [*agents, agent]]


def _snapshot(folder: RunFolder, config: Config, update: int) -> Any:
    def load(like: Any) -> tuple[dict[str, Tensor], None]:
        return snapshots.load(folder.snapshots, update, like), None

    return fill(config, "", load)[0]


def _curve(folder: RunFolder, policies: Sequence[str]) -> list[dict[str, Any]]:
    """The return of each policy over training, as `[update, return]`; without what is no number."""
    path = folder.path / METRICS
    text = read_text(path, MOST_TABLE) if path.is_file() else ""
    points: dict[str, list[tuple[int, float]]] = {name: [] for name in policies}
    for row in csv.DictReader(io.StringIO(text)):
        try:
            update, value = int(row["update"]), float(row[OversightRuns.score])
            own = points[row["policy"]]
        except (KeyError, ValueError, TypeError):
            raise UserError(f"{path}: is damaged") from None
        if 0 <= update <= 2**31 and abs(value) <= 1:
            own.append((update, value))
    return [{"policy": name, "points": own} for name, own in points.items() if own]


@torch.no_grad()
def _start(agent: Agent, config: Config) -> dict[str, int]:
    """A placement that shows what the run is about.

    There the agent as trained does well when watched and badly when not, and, if it has several
    experts, the deployed one alone does well.
    """
    world = World(config.world)
    cell = torch.arange(world.config.cells)
    pairs = torch.cartesian_prod(cell, cell)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    generator = torch.Generator().manual_seed(0)
    pairs = pairs[torch.randperm(len(pairs), generator=generator)[:MOST_PAIRS]]
    several = agent.n_experts > 1
    kept = keep("diamond", agent.n_experts) if several else MIXTURE
    (good,) = _p_diamond(agent, world, pairs, [MIXTURE], WATCHED)
    bad, alone = _p_diamond(agent, world, pairs, [MIXTURE, kept], 0)
    gain = (torch.minimum(good, alone) if several else good) - bad
    free = (cell != pairs[:, :1]) & (cell != pairs[:, 1:])
    pair, start = divmod(int(gain.where(free, torch.tensor(-2.0)).argmax()), len(cell))
    diamond, ghost = pairs[pair].tolist()
    return {"agent": start, "diamond": diamond, "ghost": ghost}


def _p_diamond(
    agent: Agent, world: World, pairs: Tensor, steerings: Sequence[Steering], flags: int
) -> Tensor:
    """Chance to end on the diamond from each cell, around pairs `[P, 2]` of squares. `[Q, P, S]`"""
    cells = world.config.cells
    diamond, ghost = (part[:, None].expand(-1, cells) for part in pairs.unbind(1))
    on = torch.ones_like(diamond, dtype=torch.bool)
    state = State(
        agent=torch.arange(cells).expand_as(diamond),
        diamond=diamond,
        ghost=ghost,
        diamond_flag=on & bool(flags & 2),
        ghost_flag=on & bool(flags & 1),
        spurious=on[..., None].expand(-1, -1, cells) & False,
        time=torch.zeros_like(diamond),
    )
    active = world.active(state).flatten(0, 1)[None]
    output = agent.prepare()(active)
    steered = torch.cat([steering.probabilities(output) for steering in steerings])
    chances = steered.view(len(steerings), len(pairs), cells, -1)
    to = world.moves.view(cells, -1)
    at_diamond, at_ghost = (to == pairs[:, i, None, None] for i in (0, 1))  # [P, S, A]
    found = torch.zeros(len(steerings), len(pairs), cells)
    for _ in range(min(world.config.max_steps, 2 * cells)):
        after = torch.where(at_diamond, 1.0, found[..., to].masked_fill(at_ghost, 0.0))
        found = (chances * after).sum(-1)
    return found
