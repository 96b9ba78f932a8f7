"""The commands: `train.py`, and `oversight-rl` with its subcommands.

What is slow to load (torch takes a second, Stable-Baselines3 and pandas most of another) is loaded
by the command that needs it, once what was asked for is known to be there: help and mistakes come
at once.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain, groupby
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from oversight_rl.config import Config, Probability, load_yaml, settings_file
from oversight_rl.envs.settings import UserError
from oversight_rl.files import check_there, writing
from oversight_rl.terminal import STOPPED, run, sigterm_interrupts

if TYPE_CHECKING:
    from oversight_rl.agents.steering import Steering
    from oversight_rl.checkpoint import Saved
    from oversight_rl.evaluation import Row

DEFAULTS = Config()
DESCRIPTION = "Train under partial oversight, steer, evaluate, compare. --version: which this is."


@dataclass(frozen=True)
class Train:
    """Train an agent under partial oversight, then show what steering it does.

    Settings come from the defaults, then the --config file, then the flags below.
    """

    config: Path | None = None
    """YAML file of settings, or a preset by its name, like minigrid."""
    run_dir: Path | None = None
    """Folder to write, new or empty; None: a new one under runs/. With several seeds, one run
    folder for each lies below it."""
    resume: Path | None = None
    """Run folder to go on with, with its own settings; takes no other flag."""
    settings: Annotated[Config, tyro.conf.arg(name="")] = DEFAULTS


@dataclass(frozen=True)
class _Sources:
    """The flags that decide where settings come from, read before all others."""

    config: Path | None = None
    resume: Path | None = None
    algo: str | None = None


def train(args: Sequence[str] | None = None) -> None:
    """The command `train.py`."""
    run(
        lambda given: _train(given, "python train.py"), list(sys.argv[1:] if args is None else args)
    )


def _train(args: list[str], command: str) -> None:
    """Train, or go on; `command` is what the user typed for it."""
    if "--help" in args or "-h" in args:
        sources, others = _Sources(), args
    else:
        sources, others = tyro.cli(_Sources, args=args, return_unknown_args=True)
    console = Console()
    if sources.resume is not None:
        if others or sources.config or sources.algo:
            raise UserError("--resume: takes its settings from the run folder; drop other flags")
        _resume(sources.resume, console, command)
        return
    # the learner first, since other defaults are its own
    learner = {"algo": sources.algo} if sources.algo in ("reinforce", "ppo") else {}
    if sources.config:
        default = Train(settings=load_yaml(settings_file(sources.config), **learner))
    else:
        default = Train(settings=Config.model_validate(learner))
    chosen = tyro.cli(Train, prog=command.removeprefix("python "), args=args, default=default)
    config = chosen.settings
    config.refuse_unused()
    config.refuse_words()
    # with torch, which takes a second to load
    from oversight_rl.tracking import begin_seeds, check_free
    from oversight_rl.training import try_out

    if chosen.run_dir is not None:
        check_free(chosen.run_dir)
    try_out(config)
    with _run_dir(chosen.run_dir, config) as path:
        runs = begin_seeds(path, config) if len(config.seeds) > 1 else {path: config}
        _fit(list(runs.values()), list(runs), path, console, command)


def _resume(path: Path, console: Console, command: str) -> None:
    check_there(path)
    # with torch, which takes a second to load
    from oversight_rl.tracking import RunFolder, find_runs, open_runs, planned_seeds
    from oversight_rl.training import stack_key

    planned = planned_seeds(path)
    begun = find_runs(path) if planned else [folder.path for folder in open_runs(path)]
    runs = planned | {run: RunFolder.open(run).config() for run in begun}
    configs, folders = list(runs.values()), [RunFolder(run) for run in runs]
    if len({stack_key(config).model_dump_json() for config in configs}) > 1:
        raise UserError(f"{path}: its runs differ in more than seed, oversight and method")
    if all(folder.finished for folder in folders):
        raise UserError(f"{path}: this run is finished; see it with oversight-rl evaluate {path}")
    _fit(configs, list(runs), path, console, command, resume=True)


def _fit(
    configs: list[Config],
    paths: list[Path],
    path: Path,
    console: Console,
    command: str,
    resume: bool = False,
) -> None:
    from oversight_rl.training import Interrupted, fit  # with torch, which takes a second to load

    first = configs[0]
    _say(
        console,
        f"training {first.method} at {first.oversight:.2%} oversight, "
        f"seed {', '.join(str(c.seeds[0]) for c in configs)}, in {path}",
    )
    try:
        tables = fit(configs, paths, console, resume)
    except Interrupted:
        _say(console, f"stopped and saved; go on with: {command} --resume {path}")
        raise SystemExit(STOPPED) from None
    _print_summary(tables, first, console)
    _say(console, f"results in {path}")
    _say(console, f"pictures and curves: tensorboard --logdir {path}")


def _say(console: Console, line: str) -> None:
    """A line as it is, so that a command in it can be copied."""
    console.print(line, soft_wrap=True, markup=False, highlight=False)


@contextmanager
def _run_dir(asked: Path | None, config: Config) -> Iterator[Path]:
    """The folder to write: as asked, or a new one under runs/, gone again if nothing came into it.

    A new one is made at once, so that no run that starts in the same second gets it too.
    """
    if asked is not None:
        yield asked
        return
    first, *more = config.seeds
    seeds = f"seeds_{first}_to_{more[-1]}" if more else f"seed_{first}"
    name = f"{config.method}-{config.oversight:g}-{seeds}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    with writing(Path("runs")):
        path = next(path for path in map(Path("runs").joinpath, names) if _is_new(path))
    try:
        yield path
    finally:
        with suppress(OSError):  # which says that it is not empty
            os.removedirs(path)


def _is_new(path: Path) -> bool:
    """Make a folder, if there is none."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def evaluate(
    run_dir: Annotated[Path, tyro.conf.Positional],
    steer: tuple[str, ...] = (),
    oversight: tuple[Probability, ...] = (),
    greedy: bool = False,
    temperature: float = 1.0,
    json: Path | None = None,
    export: Path | None = None,
    pictures: Path | None = None,
) -> None:
    """Evaluate trained agents, steered as you like, at any oversight level.

    Args:
        run_dir: A run folder, a folder of runs by seed, or an exported policy file.
        steer: Policies: mixture, an expert's name, NAME=WEIGHT,NAME=WEIGHT (a blend) or
            without:NAME (an ablation). Default: the mixture and each expert.
        oversight: Probabilities in [0, 1] that a square is flagged at deployment, where the world
            does not set a square apart (world.ghost_oversight). Default: the training level.
        greedy: Take the likeliest action always.
        temperature: Divides the logits, from 0.001 to 1000; below 1 is greedier.
        json: File to write the rows to.
        export: File to write the steered policy to (one run, one --steer), for later evaluation.
        pictures: Folder to draw the policies (policies.png) and rollouts (rollouts.gif) of one run
            into.
    """
    for level in oversight:
        if not 0 <= level <= 1:
            raise UserError(f"--oversight: must lie in [0, 1], got {level:g}")
    check_there(run_dir)
    # with torch, which takes a second to load
    from oversight_rl import checkpoint
    from oversight_rl.agents.steering import parse, standard
    from oversight_rl.agents.threads import on_threads
    from oversight_rl.evaluation import Subject, evaluator_of
    from oversight_rl.tracking import open_runs, write_json

    console = Console()
    if run_dir.is_dir():
        loaded = [run.load() for run in open_runs(run_dir)]
    else:
        loaded = [checkpoint.read_policy(run_dir)]
    rows: list[Row] = []
    for saved in loaded:
        experts = saved.agent.n_experts
        if saved.steering is not None and not steer:
            policies: list[Steering] = [saved.steering]
            if greedy or temperature != 1.0:
                policies = [saved.steering.with_options(greedy, temperature)]
        else:
            names = experts, saved.behaviors
            chosen = [parse(text, *names) for text in steer] or standard(*names)
            policies = [policy.with_options(greedy, temperature) for policy in chosen]
        if export is not None and (len(loaded) > 1 or len(policies) > 1):
            raise UserError("--export: takes one run and one --steer")
        if pictures is not None and len(loaded) > 1:
            raise UserError("--pictures: takes one run")
        config = saved.config
        evaluator = evaluator_of(config)
        subject = Subject(
            config.method, config.seeds[0], config.oversight, saved.env_steps, saved.wall_seconds
        )
        levels = [list(oversight) or [config.oversight]]
        with on_threads(config.threads):
            rows += evaluator.evaluate(saved.agent, [subject], policies, levels)[0]
            if pictures is not None:
                _draw(pictures, saved, policies)
        if export is not None:
            checkpoint.write_policy(export, policies[0], saved)
    _print_rows(rows, loaded[0].config, console)
    if json is not None:
        with writing(json):
            write_json(json, rows)


def _draw(folder: Path, saved: Saved, policies: Sequence[Steering]) -> None:
    from oversight_rl import pictures as drawing
    from oversight_rl.agents.networks import Agent
    from oversight_rl.envs import render
    from oversight_rl.envs.world import World

    if isinstance(saved.agent, Agent):
        world = World(saved.config.world, saved.config.oversight)
        files = {
            "policies.png": render.png(drawing.policies(saved.agent, world, policies)),
            "rollouts.gif": drawing.rollouts(saved.agent, world, policies),
        }
    else:
        animation = drawing.env_rollouts(saved.agent, saved.config, policies)
        files = {} if animation is None else {"rollouts.gif": animation}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)


def import_reference(
    state_dict: Annotated[Path, tyro.conf.Positional],
    run_dir: Annotated[Path, tyro.conf.Positional],
    oversight: float,
    method: str | None = None,
    seed: int = 0,
) -> None:
    """Turn a policy of the paper's published code into a run folder that evaluate accepts.

    Args:
        state_dict: File of a state dict saved by torch; only tensors are read from it.
        run_dir: Folder to write, new or empty.
        oversight: Probability in [0, 1] that it was trained at.
        method: What it was trained with; guessed from its networks if not given.
        seed: To tell runs apart in tables.
    """
    from oversight_rl import reference  # with torch, which takes a second to load

    folder = reference.import_state_dict(state_dict, run_dir, oversight, method, seed)
    _say(Console(), f"imported; evaluate it with: oversight-rl evaluate {folder.path}")


def run_sweep(
    config: Annotated[Path, tyro.conf.Positional],
    out: Path,
    workers: int | None = None,
    ray: str | None = None,
) -> None:
    """Train every combination of settings in a sweep file; a stopped sweep goes on where it was.

    Args:
        config: YAML file of the sweep, or a preset by its name, like compare_quick.
        out: Folder of its run folders: new, or of the same sweep, to go on with or to add values.
        workers: Processes on this machine, one thread each unless the setting threads says
            otherwise. Default: one per core; one on a GPU.
        ray: Address of a Ray cluster to run on instead, or "local" to start one here.
    """
    # with torch, which takes a second to load
    from oversight_rl.sweeps.drive import sweep
    from oversight_rl.sweeps.plan import load_sweep
    from oversight_rl.sweeps.workers import local_workers, ray_workers, stack_memory

    plan = load_sweep(settings_file(config))
    console = Console()
    gpu = Config.model_validate({"device": "auto"} | plan.settings).torch_device().type == "cuda"
    count = (1 if gpu else os.cpu_count() or 1) if workers is None else workers
    if count < 1:
        raise UserError(f"--workers: must be at least 1, got {count}")
    pool = local_workers(count) if ray is None else ray_workers(ray, gpu)
    begun = time.perf_counter()
    with sigterm_interrupts():
        try:
            failed = sweep(plan, out, pool, console, stack_memory(gpu, count))
        except KeyboardInterrupt:
            _say(
                console,
                f"stopped; the same command goes on: oversight-rl sweep {config} --out {out}",
            )
            raise SystemExit(STOPPED) from None
    for path, why in failed.items():
        _say(console, f"failed: {path}: {why}")
    if failed:
        raise SystemExit(1)
    _say(console, f"all runs are finished ({time.perf_counter() - begun:,.0f} s)")
    _say(console, f"figures and tables: oversight-rl report {out}")


def run_report(directory: Annotated[Path, tyro.conf.Positional]) -> None:
    """Write tables, statistics and figures of all finished runs below a folder into it.

    Makes report.html (one file, for any browser), summary.csv, and figures/ as PNG and SVG.

    Args:
        directory: Folder of run folders: a sweep's, or any other. Links are followed.
    """
    check_there(directory, "folder")
    from oversight_rl.reports import (
        page,  # with pandas, matplotlib and scipy, which take two seconds
    )

    console = Console()
    found, verdict = page.write(directory)
    for line in found.missing:
        _say(console, f"note: {line}")
    _say(console, verdict)
    _say(console, f"written: {directory / 'report.html'}, summary.csv and figures/ beside it")


def main(args: Sequence[str] | None = None) -> None:
    """The command `oversight-rl`."""
    given = list(sys.argv[1:] if args is None else args)
    if given == ["--version"]:
        run(lambda _: print(f"oversight-rl {version('oversight-rl')}"), [])
        return
    if given[:1] == ["train"]:
        run(lambda flags: _train(flags, "oversight-rl train"), given[1:])
        return
    commands: dict[str, Callable[..., Any]] = {
        "train": Train,  # for the help
        "evaluate": evaluate,
        "sweep": run_sweep,
        "report": run_report,
        "import-reference": import_reference,
    }
    run(
        lambda flags: tyro.extras.subcommand_cli_from_dict(
            commands, prog="oversight-rl", args=flags, description=DESCRIPTION
        ),
        given,
    )


def _endings(config: Config) -> tuple[str, ...]:
    """Headings of what an episode was; a stranger's behaviors have names of their own."""
    return (*(("diamond", "ghost") if config.ours else ("wanted", "unwanted")), "timeout", "steps")


def _print_summary(tables: list[list[Row]], config: Config, console: Console) -> None:
    """The steering table at the training level: means over the runs, and the return's range."""
    from oversight_rl.tracking import deployed_policy

    rows = [
        row
        for row in chain(*tables)
        if row.deploy_oversight == row.train_oversight and "=" not in row.policy
    ]
    table = _table(f"ground truth at {rows[0].train_oversight:.2%} oversight")
    several = len(tables) > 1
    for heading in ("return", *(["range"] if several else []), "greedy", *_endings(config)):
        table.add_column(heading, justify="right")
    deployed = deployed_policy(rows[0].method, [row.policy for row in rows])
    for policy in dict.fromkeys(row.policy for row in rows):
        sampled = [r for r in rows if r.policy == policy and not r.greedy]
        greedy = [r for r in rows if r.policy == policy and r.greedy]
        returns = [r.ground_truth_return for r in sampled]
        table.add_row(
            f"{policy} (deployed)" if policy == deployed else policy,
            f"{fmean(returns):.3f}",
            *([f"{min(returns):.2f}..{max(returns):.2f}"] if several else []),
            f"{fmean([r.ground_truth_return for r in greedy]):.3f}",
            f"{fmean([r.p_diamond for r in sampled]):.1%}",
            f"{fmean([r.p_ghost for r in sampled]):.1%}",
            f"{fmean([r.p_timeout for r in sampled]):.1%}",
            f"{fmean([r.episode_length for r in sampled]):.1f}",
            style="bold" if policy == deployed else None,
        )
    optimum = rows[0].optimal_return
    if not math.isnan(optimum):
        table.add_row("optimum", f"{optimum:.3f}", style="dim")
    console.print(table)


def _table(title: str) -> Table:
    """A table that fits 80 columns."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("policy")
    return table


def _print_rows(rows: Sequence[Row], config: Config, console: Console) -> None:
    """A table for each run."""
    between = "±" if console.encoding.startswith("utf") else "+-"
    windows = not all(math.isnan(row.window_return) for row in rows)  # no other world has any
    for (method, seed, level), own in groupby(
        rows, key=lambda row: (row.method, row.seed, row.train_oversight)
    ):
        table = _table(f"{method} trained at {level:.2%}, seed {seed}")
        for heading in ("oversight", "return", *(["window"] if windows else []), *_endings(config)):
            table.add_column(heading, justify="right")
        for row in own:
            error = f" {between} {row.return_se:.3f}" if row.return_se > 0 else ""
            table.add_row(
                f"{row.policy}{' (greedy)' if row.greedy else ''}",
                f"{row.deploy_oversight:.2%}",
                f"{row.ground_truth_return:.3f}{error}",
                *([f"{row.window_return:.3f}"] if windows else []),
                f"{row.p_diamond:.1%}",
                f"{row.p_ghost:.1%}",
                f"{row.p_timeout:.1%}",
                f"{row.episode_length:.1f}",
            )
        console.print(table)
    optimum = rows[0].optimal_return
    if math.isnan(optimum):
        _say(console, "no exact evaluation of this world: figures are from rollouts")
    else:
        _say(
            console, f"return: exact, per episode from a fresh start; the optimum is {optimum:.4f}"
        )
    if windows:
        _say(console, "window: the published metric, mean discounted return per visited step")
