"""The commands: `train.py`, and `oversight-rl` with its subcommands; the tables that they print.

What is slow to load (torch takes a second, Stable-Baselines3 and pandas most of another) is loaded
by the command that needs it, once what was asked for is known to be there: help and mistakes come
at once.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar, cast

import tyro
from rich.console import Console

from oversight_rl.envs.settings import UserError
from oversight_rl.evaluate import evaluate
from oversight_rl.files import check_there, writing
from oversight_rl.kinds import as_config, load_config, settings_of
from oversight_rl.printed import (
    print_grid,
    print_next,
    print_summary,
    print_train_help,
)
from oversight_rl.settings import RunConfig, settings_file
from oversight_rl.terminal import STOPPED, run, say, sigterm_interrupts

if TYPE_CHECKING:
    pass

C = TypeVar("C", bound=RunConfig)
DESCRIPTION = "Train under partial oversight, steer, evaluate, compare. --version: which this is."


@dataclass(frozen=True, kw_only=True)
class Train(Generic[C]):
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
    settings: Annotated[C, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class _Sources:
    """The flags that decide where settings come from, read before all others."""

    config: Path | None = None
    resume: Path | None = None
    algo: str | None = None
    env: str | None = None
    method: str | None = None
    overseer: str | None = None

    @property
    def named(self) -> dict[str, str]:
        """What other defaults, and other settings, follow from."""
        names = {k: v for k, v in vars(self).items() if k not in ("config", "resume")}
        return {name: value for name, value in names.items() if value is not None}


def train(args: Sequence[str] | None = None) -> None:
    """The command `train.py`."""
    given = list(sys.argv[1:] if args is None else args)
    run(lambda flags: _train(flags, "python train.py"), given)


def _train(args: list[str], command: str) -> None:
    """Train, or go on; `command` is what the user typed for it."""
    if args and set(args) <= {"--help", "-h"}:
        print_train_help(command)
        return
    helps = {"--help", "-h", "--help-all"} & set(args)
    others = [arg for arg in args if arg not in helps]
    sources, others = tyro.cli(_Sources, args=others, return_unknown_args=True)
    args = ["--help" if arg == "--help-all" else arg for arg in args]
    console = Console()
    if sources.resume is not None and not helps:
        if others or sources.config or sources.named:
            raise UserError("--resume: takes its settings from the run folder; drop other flags")
        _resume(sources.resume, console, command)
        return
    if sources.config:
        default = load_config(settings_file(sources.config), **sources.named)
    else:
        default = as_config(sources.named)
    for (old, new), arg in itertools.product(default.renamed.items(), others):
        if f"{arg.replace('-', '_')}.".startswith((f"__{old}.", f"__{old}=")):
            raise UserError(f"{arg}: {old} is called {new} since version 0.2")
    model: Any = Train[type(default)]  # type: ignore[misc]
    prog = command.removeprefix("python ")
    chosen = tyro.cli(model, prog=prog, args=args, default=Train(settings=default))
    config = chosen.settings
    config.refuse_unused()
    config.refuse_words()
    # with torch, which takes a second to load
    from oversight_rl.runs.experiment import experiment_of
    from oversight_rl.runs.folder import begin_seeds, check_free

    if chosen.run_dir is not None:
        check_free(chosen.run_dir)
    experiment_of(config).try_out(config)
    with _run_dir(chosen.run_dir, config) as path:
        runs = begin_seeds(path, config) if len(config.seeds) > 1 else {path: config}
        _fit(runs, path, console, command)


def _resume(path: Path, console: Console, command: str) -> None:
    check_there(path)
    # with torch, which takes a second to load
    from oversight_rl.runs.folder import RunFolder, find_runs, planned_seeds

    planned = planned_seeds(path)
    begun = find_runs(path) or ([] if planned else [path])
    runs = planned | {run: RunFolder.open(run).config() for run in begun}
    if len({config.stack_key() for config in runs.values()}) > 1:
        raise UserError(f"{path}: its runs differ in more than seed, oversight and method")
    if all(RunFolder(run).finished for run in runs):
        raise UserError(f"{path}: this run is finished; see it with oversight-rl evaluate {path}")
    _fit(runs, path, console, command, resume=True)


def _fit(
    runs: Mapping[Path, RunConfig], path: Path, console: Console, command: str, resume: bool = False
) -> None:
    # with torch, which takes a second to load
    from oversight_rl.runs.experiment import experiment_of
    from oversight_rl.runs.loop import Interrupted, fit

    first, seeds = next(iter(runs.values())), [str(config.seeds[0]) for config in runs.values()]
    what = f"{first.method} at {first.oversight:.2%} oversight, seed {', '.join(seeds)}"
    say(console, f"training {what}, in {path}")
    try:
        tables = fit(runs, console, resume)
    except Interrupted:
        say(console, f"stopped and saved; go on with: {command} --resume {path}")
        raise SystemExit(STOPPED) from None
    print_summary(tables, experiment_of(first), console)
    if first.pictures:
        _add_playground(path, first, console)
    print_next(path, experiment_of(first), console)


def _add_playground(path: Path, config: RunConfig, console: Console) -> None:
    """Write the playground of what was trained, where there is one; the run is finished anyhow."""
    # with torch, which takes a second to load
    from oversight_rl.playground import page
    from oversight_rl.playground.gather import shows

    if shows(config):
        try:
            page.write([path], path / page.PAGE)
        except UserError as error:
            say(console, f"no playground: {error}")
        else:
            say(console, f"steer it by hand, in any browser: {path / page.PAGE}")


@contextmanager
def _run_dir(asked: Path | None, config: RunConfig) -> Iterator[Path]:
    """The folder to write: as asked, or a new one under runs/, gone again if it stays empty."""
    if asked is not None:
        yield asked
        return
    # made at once, so that no run that starts in the same second gets it too
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


def play(
    run_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional], out: Path | None = None
) -> None:
    """Write a playground: a page to steer trained agents by hand, in any browser, offline.

    Runs in other worlds show episodes there, digits what each part restores, stories how a model
    goes on before and after it forgot.

    Args:
        run_dirs: Run folders, or folders of runs by seed, to stand side by side.
        out: File to write. Default: play.html in the run folder; of several, here.
    """
    if not run_dirs:
        raise UserError("play: name a run folder, like runs/x")
    for path in run_dirs:
        check_there(path)
    # with torch, which takes a second to load
    from oversight_rl.playground import page

    target = out or (run_dirs[0] if len(run_dirs) == 1 else Path()) / page.PAGE
    page.write(run_dirs, target)
    say(Console(), f"written: {target}; open it in any browser")


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
    # with torch, which takes a second to load
    from oversight_rl.experiments.oversight import reference

    folder = reference.import_state_dict(state_dict, run_dir, oversight, method, seed)
    say(Console(), f"imported; evaluate it with: oversight-rl evaluate {folder.path}")


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
    from oversight_rl.sweeps.plan import load_sweep, plan
    from oversight_rl.sweeps.workers import local_workers, ray_workers, stack_memory

    asked = load_sweep(settings_file(config))
    console = Console()
    gpu = plan(asked, out)[0].config.torch_device().type == "cuda"
    count = (1 if gpu else os.cpu_count() or 1) if workers is None else workers
    if count < 1:
        raise UserError(f"--workers: must be at least 1, got {count}")
    pool = local_workers(count) if ray is None else ray_workers(ray, gpu)
    begun = time.perf_counter()
    with sigterm_interrupts():
        try:
            failed = sweep(asked, out, pool, console, stack_memory(gpu, count))
        except KeyboardInterrupt:
            again = f"oversight-rl sweep {config} --out {out}"
            say(console, f"stopped; the same command goes on: {again}")
            raise SystemExit(STOPPED) from None
    for path, why in failed.items():
        say(console, f"failed: {path}: {why}")
    if failed:
        raise SystemExit(1)
    say(console, f"all runs are finished ({time.perf_counter() - begun:,.0f} s)")
    say(console, f"figures and tables: oversight-rl report {out}")


def run_report(directory: Annotated[Path, tyro.conf.Positional]) -> None:
    """Write tables, statistics and figures of all finished runs below a folder into it.

    Makes report.html (one file, for any browser; one for each overseer, if there are several),
    summary.csv, and figures/ as PNG and SVG.

    Args:
        directory: Folder of run folders: a sweep's, or any other. Links are followed.
    """
    check_there(directory, "folder")
    from oversight_rl.reports import page  # with pandas, matplotlib, scipy: two seconds

    console = Console()
    pages = page.write(directory)
    for line in pages[0].found.missing:
        say(console, f"note: {line}")
    for each in pages:
        if len(pages) > 1:
            say(console, f"{each.found.kind.panel} {each.panel} ({each.file}):")
        for line in each.verdict.lines:
            say(console, line)
        print_grid(each.verdict.grid, console)
    say(console, f"written: {directory / 'report.html'}, summary.csv and figures/ beside it")


# ---- which command


def _subcommand(args: list[str]) -> None:
    commands: dict[str, Callable[..., Any]] = {
        "train": cast(Any, Train)[settings_of({})],  # for the help
        "evaluate": evaluate,
        "play": play,
        "sweep": run_sweep,
        "report": run_report,
        "import-reference": import_reference,
    }
    tyro.extras.subcommand_cli_from_dict(
        commands, prog="oversight-rl", args=args, description=DESCRIPTION
    )


def main(args: Sequence[str] | None = None) -> None:
    """The command `oversight-rl`."""
    given = list(sys.argv[1:] if args is None else args)
    if given == ["--version"]:
        run(lambda _: print(f"oversight-rl {version('oversight-rl')}"), [])
    elif given[:1] == ["train"]:
        run(lambda flags: _train(flags, "oversight-rl train"), given[1:])
    else:
        run(_subcommand, given)
