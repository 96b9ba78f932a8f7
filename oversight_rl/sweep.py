"""Sweeps: a run for every combination of settings, packed into stacks, on this machine or on Ray.

A sweep is a list of ordinary run folders. Those that are finished are skipped, those that have a
checkpoint go on from it, and the others start: that is all there is to resuming.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from oversight_rl import checkpoint
from oversight_rl.agents.methods import METHODS
from oversight_rl.config import Config, as_asked, as_yaml, read_yaml
from oversight_rl.envs.settings import Settings, UserError, as_sequence, nearest
from oversight_rl.files import write_atomically, writing
from oversight_rl.tracking import CHECKPOINTS, CONFIG, RESULT, RunFolder, deployed_row, locked
from oversight_rl.training import Interrupted, fit, stack_key, try_out

SWEEP = "sweep.yaml"
CPU_STACK, GPU_STACK = 5, 96  # runs per stack
MOST_RUNS = 100_000  # of a sweep
ATTEMPTS = 3  # of a stack whose worker is lost
FAILED, STOPPED = 1, 130  # exit codes of a worker

Values = Annotated[tuple[Any, ...], BeforeValidator(as_sequence), Field(min_length=1)]


class SweepConfig(Settings):
    """A sweep: a run for every combination of the values in `grid`."""

    section: ClassVar[str] = "sweep"

    settings: dict[str, Any] = {}
    """What all runs share, as in a configuration file of one run."""
    grid: dict[str, Values] = Field(min_length=1)
    """Values to combine, by setting: method, oversight, seeds, or any other by its dotted name."""
    methods: dict[str, dict[str, Any]] = {}
    """What some methods do otherwise, by method, as in a configuration file of one run."""
    stack: int | None = Field(None, ge=1)
    """Most runs that train as one stack; None: 5 on CPUs, 96 on a GPU."""


@dataclass(frozen=True)
class Run:
    """One run of a sweep."""

    path: Path
    config: Config

    @property
    def finished(self) -> bool:
        """Whether it came to its end."""
        return (self.path / RESULT).is_file()

    @property
    def update(self) -> int:
        """Update of its newest checkpoint, -1 if there is none."""
        return max(checkpoint.updates(self.path / CHECKPOINTS), default=-1)


def plan(sweep: SweepConfig, out: Path) -> list[Run]:
    """The runs of a sweep, a folder for each: `out/SETTINGS/seed_N`.

    Raises:
        UserError: a setting is unknown or bad.
    """
    for method, own in sweep.methods.items():
        if method not in METHODS:
            raise UserError(f"sweep.methods: unknown method {method!r}{nearest(method, METHODS)}")
        if wrong := {"method", "oversight", "seeds"} & set(own):
            raise UserError(f"sweep.methods: {method} cannot set {', '.join(wrong)} of its own")
    grid = {"seeds": as_sequence(sweep.settings.get("seeds", 0))} | sweep.grid
    seeds = grid.pop("seeds")
    planned = math.prod(map(len, grid.values())) * len(seeds)
    if planned > MOST_RUNS:
        raise UserError(f"sweep.grid: combines to {planned:,} runs, more than {MOST_RUNS:,}")
    runs = []
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        settings: dict[str, Any] = {}
        _merge(settings, sweep.settings)
        for name, value in chosen.items():
            for part in reversed(name.split(".")):
                value = {part: value}
            _merge(settings, value)
        method = settings.get("method", Config().method)
        if isinstance(method, str):
            _merge(settings, sweep.methods.get(method, {}), under=chosen)
        config = Config.model_validate(settings | {"seeds": list(seeds)})
        config.refuse_words()
        name = "-".join(
            _text(value) if key in ("method", "oversight") else f"{key}={_text(value)}"
            for key, value in chosen.items()
        )
        runs += [Run(out / name / f"seed_{seed}", config.single(seed)) for seed in config.seeds]
    if len({run.path for run in runs}) < len(runs):
        raise UserError("sweep.grid: values of a setting must be distinct")
    return runs


def _merge(into: dict[str, Any], more: Mapping[str, Any], under: Mapping[str, Any] = {}) -> None:
    """Set nested settings; those whose dotted names are in `under` stay."""
    for key, value in more.items():
        if key in under:
            continue
        if isinstance(value, Mapping):
            inner = into.setdefault(key, {})
            if not isinstance(inner, dict):
                raise UserError(f"sweep: {key} is set to {inner!r} and to {dict(value)!r}")
            prefix = f"{key}."
            below = {k.removeprefix(prefix): v for k, v in under.items() if k.startswith(prefix)}
            _merge(inner, value, below)
        else:
            into[key] = value


def _text(value: Any) -> str:
    """A value as part of a folder's name."""
    return "".join(c if c.isalnum() or c in "._+" else "_" for c in str(value))


def fitting(config: Config, memory: float) -> int:
    """How many runs of a configuration train as one stack in `memory` bytes, at least one.

    Activations and their gradients take nearly all: a few copies of every unit for each sample.
    """
    if config.algo == "ppo":
        return 1  # such runs train one after another anyway
    training, agent = config.training, config.agent
    samples = training.worlds * training.steps
    trunks = 3 if METHODS[config.method].experts == "one" else agent.experts + 2
    each = 4 * samples * (4 * trunks * sum(agent.hidden) + 100) + 2**25
    return max(1, int(min(memory / each, 2**20)))


def stacks(runs: Sequence[Run], most: int) -> list[list[Run]]:
    """Pack runs that are not finished into stacks of at most `most` runs.

    Runs go together that train alike and are equally far, so that they can go on together.
    """
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        if not run.finished:
            groups.setdefault((stack_key(run.config).model_dump_json(), run.update), []).append(run)
    packed = []
    for group in groups.values():
        parts = math.ceil(len(group) / most)
        bounds = [round(i * len(group) / parts) for i in range(parts + 1)]
        packed += [group[start:end] for start, end in itertools.pairwise(bounds)]
    return packed


# ---- in a worker


def work(job: str) -> None:
    """Train one stack to its end, or go on with it.

    Args:
        job: JSON list of `[run folder, configuration]`.

    Raises:
        Interrupted: the worker was asked to stop; everything is saved.
        UserError: the runs cannot be trained.
    """
    runs = [Run(Path(path), Config.model_validate(config)) for path, config in json.loads(job)]
    resume = all(run.update >= 0 for run in runs)
    if not resume:
        try_out(runs[0].config)
    for run in runs:
        if not resume and run.path.is_dir():  # broken off before its first checkpoint
            if any(not file.name.endswith(".tmp") for file in run.path.iterdir()):
                RunFolder.open(run.path)  # refuses to remove what is not a run
            shutil.rmtree(run.path)
    quiet = Console(file=sys.stderr, force_terminal=False)
    fit([run.config for run in runs], [run.path for run in runs], quiet, resume)


def _main() -> None:
    """A worker process: a job on the first line of standard input, the end of which stops it."""
    job = sys.stdin.readline()

    def stop_with_parent() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_with_parent, daemon=True).start()
    try:
        work(job)
    except Interrupted:
        code = STOPPED
    except UserError as error:
        print(error, file=sys.stderr)
        code = FAILED
    else:
        code = 0
    sys.stderr.flush()
    os._exit(code)  # the thread that waits for input would hold up an ordinary exit


# ---- in the driver


class WorkerLost(Exception):
    """A worker went away (killed, out of memory); its stack can be gone on with."""


class WorkerFailed(Exception):
    """A stack cannot be trained; says why in one line."""


Submit = Callable[[str], "Future[None]"]


@contextmanager
def local_workers(count: int) -> Iterator[Submit]:
    """Run jobs in processes of this machine, `count` at a time."""
    running: set[subprocess.Popen[str]] = set()
    stopping = False

    def call(job: str) -> None:
        if stopping:
            raise WorkerLost("stopped")
        process = subprocess.Popen(
            [sys.executable, "-m", "oversight_rl.sweep"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C reaches the driver alone, which stops them once
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        running.add(process)
        assert process.stdin is not None
        assert process.stderr is not None
        with suppress(BrokenPipeError):
            process.stdin.write(job + "\n")
            process.stdin.flush()
        errors = process.stderr.read()  # until it ends
        code = process.wait()
        process.stdin.close()
        running.discard(process)
        if code < 0 or code == STOPPED:
            raise WorkerLost(f"worker ended by signal {-code}" if code < 0 else "stopped")
        if code:
            raise WorkerFailed((errors.strip().splitlines() or [f"exit code {code}"])[-1])

    with ThreadPoolExecutor(count) as pool:
        try:
            yield lambda job: pool.submit(call, job)
        finally:
            stopping = True
            for process in list(running):
                with suppress(ProcessLookupError):
                    process.terminate()


@contextmanager
def ray_workers(address: str, gpu: bool = False) -> Iterator[Submit]:
    """Run jobs as tasks of a Ray cluster, which runs those of lost workers again.

    Args:
        address: of the cluster, or `local` to start one on this machine. All of its machines must
            reach the run folders under the same paths.
        gpu: whether each job takes a GPU of the cluster.

    Raises:
        UserError: Ray is not installed, or there is no such cluster.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--ray: Ray is not installed; pip install 'oversight-rl[ray]'") from None

    def call(job: str) -> None:
        try:
            work(job)
        except Exception as error:  # one line, that the driver can read without our classes
            raise RuntimeError(f"{type(error).__name__}: {error}") from None

    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=5).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--ray: no cluster at {address} ({error})") from None
    task = ray.remote(num_cpus=1, num_gpus=int(gpu), max_retries=ATTEMPTS)(call)

    def submit(job: str) -> Future[None]:
        done: Future[None] = Future()

        def copy(theirs: Future[None]) -> None:
            error = theirs.exception()
            if error is None:
                done.set_result(None)
            elif isinstance(error, ray.exceptions.RayTaskError):
                done.set_exception(WorkerFailed(str(error.cause)))
            else:
                done.set_exception(WorkerLost(str(error).splitlines()[0]))

        task.remote(job).future().add_done_callback(copy)
        return done

    try:
        yield submit
    finally:
        ray.shutdown()


def sweep(
    config: SweepConfig,
    out: Path,
    workers: AbstractContextManager[Submit],
    console: Console,
    memory: float = math.inf,
) -> dict[Path, str]:
    """Bring every run of a sweep to its end.

    Args:
        config: the sweep.
        out: folder of the runs, new or of the same sweep with a smaller grid.
        workers: who runs the jobs: `local_workers` or `ray_workers`.
        console: shows the overview.
        memory: bytes that a stack may take.

    Returns:
        Why runs failed, by folder; empty if all are finished.

    Raises:
        UserError: the folder holds another sweep, a setting is bad, or an environment does not fit.
    """
    out = out.resolve()  # workers may run in other folders
    runs = plan(config, out)
    unlike = {run.config.env: run.config for run in reversed(runs) if not run.finished}
    for first in unlike.values():
        try_out(first)
    _claim(config, out, runs)
    gpu = runs[0].config.torch_device().type == "cuda"
    most = config.stack or (GPU_STACK if gpu else CPU_STACK)
    most = min([most, *(fitting(run.config, memory) for run in runs)])
    overview = _Overview(runs, console)
    failed: dict[Path, str] = {}
    with locked(out), workers as submit, overview:
        attempts = [(stack, 1) for stack in stacks(runs, most)]
        pending: dict[Future[None], tuple[list[Run], int]] = {}
        while attempts or pending:
            while attempts:
                stack, attempt = attempts.pop(0)
                pending[submit(_job(stack))] = stack, attempt
            done, _ = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in done:
                stack, attempt = pending.pop(future)
                error = future.exception()
                overview.finished([run for run in stack if run.finished])
                rest = [run for run in stack if not run.finished]
                if error is None or not rest:
                    continue
                lost = isinstance(error, WorkerLost)
                if lost and attempt < ATTEMPTS:
                    attempts += [(part, attempt + 1) for part in stacks(rest, most)]
                elif len(rest) > 1:  # the others shall not fail with the one that does
                    attempts += [([run], ATTEMPTS) for run in rest]
                elif attempt < ATTEMPTS:
                    attempts.append((rest, ATTEMPTS))
                else:
                    failed[rest[0].path] = str(error)
                    overview.failed(rest[0], str(error))
            overview.refresh([stack for stack, _ in pending.values()])
    return failed


def _job(stack: Sequence[Run]) -> str:
    return json.dumps([[str(r.path), r.config.model_dump(mode="json")] for r in stack])


def _claim(config: SweepConfig, out: Path, runs: Sequence[Run]) -> None:
    """Write the sweep into its folder, in which every run must be one of its own.

    So a sweep may be given more values, and nothing else.
    """
    path = out / SWEEP
    planned = {run.path: run.config for run in runs}
    if path.exists():
        for found in sorted(out.rglob(CONFIG)):
            theirs = planned.get(found.parent)
            if theirs is None or RunFolder.open(found.parent).config() != theirs:
                name = found.parent.relative_to(out)
                raise UserError(f"{out}: holds another sweep ({name}); choose another --out")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is not empty and holds no sweep; choose another --out")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(path, as_yaml(config.model_dump(mode="json")).encode())


def load_sweep(path: Path) -> SweepConfig:
    """Read a sweep from YAML.

    Raises:
        UserError: it cannot be read, or holds unknown or bad settings.
    """
    content = read_yaml(path)
    if "grid" not in content:
        raise UserError(
            f"{path}: has no grid, so is no sweep; train it with --config {as_asked(path)}"
        )
    try:
        return SweepConfig.model_validate(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


@dataclass
class _Overview:
    """What is done so far: by method and level, and how much in all."""

    runs: Sequence[Run]
    console: Console
    _returns: dict[tuple[str, float], list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._total: dict[tuple[str, float], int] = {}
        for run in self.runs:
            self._total[self._cell(run)] = self._total.get(self._cell(run), 0) + 1
        self._progress = Progress(
            TextColumn("{task.completed:.1f} of {task.total:.0f} runs"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._progress.add_task("", total=len(self.runs))
        self._live = Live(console=self.console, get_renderable=self._render, auto_refresh=False)

    @staticmethod
    def _cell(run: Run) -> tuple[str, float]:
        return run.config.method, run.config.oversight

    def __enter__(self) -> _Overview:
        for run in self.runs:
            if run.finished:
                self._count(run)
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.console.is_terminal:
            self.refresh([])
            self._live.stop()

    def _count(self, run: Run) -> None:
        try:
            row = deployed_row(RunFolder.open(run.path).result())
        except UserError as error:
            self._say(str(error))
            return
        self._returns.setdefault(self._cell(run), []).append(row.ground_truth_return)

    def finished(self, stack: Sequence[Run]) -> None:
        """Runs of a stack came to their end."""
        for run in stack:
            self._count(run)
        if stack and not self.console.is_terminal:
            first = stack[0]
            seeds = ", ".join(str(run.config.seeds[0]) for run in stack)
            self._say(f"{first.path.parent.name}, seed {seeds}: done")

    def failed(self, run: Run, why: str) -> None:
        """A run failed for good."""
        self._say(f"{run.path}: failed ({why})")

    def _say(self, line: str) -> None:
        done = sum(len(returns) for returns in self._returns.values())
        self.console.print(
            f"{done} of {len(self.runs)} runs; {line}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    def refresh(self, pending: Sequence[Sequence[Run]]) -> None:
        """Show how far things are, stacks under way included."""
        if self.console.is_terminal:
            done = sum(len(returns) for returns in self._returns.values())
            shares = [
                len(stack) * max(0, stack[0].update) / stack[0].config.learner.updates
                for stack in pending
            ]
            self._progress.update(self._task, completed=done + sum(shares))
            self._live.refresh()

    def _render(self) -> Group:
        table = Table(box=None, padding=(0, 1))
        methods = list(dict.fromkeys(method for method, _ in self._total))
        levels = sorted({level for _, level in self._total})
        table.add_column("deployed return")
        for level in levels:
            table.add_column(f"{100 * level:.3g}%", justify="right")
        for method in methods:
            cells = []
            for level in levels:
                returns = self._returns.get((method, level), [])
                total = self._total.get((method, level), 0)
                mean = f"{sum(returns) / len(returns):+.2f}" if returns else "     "
                cells.append(f"{mean} {len(returns)}/{total}" if total else "")
            table.add_row(method, *cells)
        return Group(table, self._progress)


if __name__ == "__main__":
    _main()
