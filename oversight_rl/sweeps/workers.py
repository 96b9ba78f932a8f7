"""Who trains the stacks: processes of this machine, or tasks of a Ray cluster."""

from __future__ import annotations

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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from oversight_rl.envs.settings import UserError
from oversight_rl.kinds import as_config
from oversight_rl.runs.experiment import experiment_of
from oversight_rl.runs.folder import RunFolder
from oversight_rl.runs.loop import Interrupted, fit
from oversight_rl.sweeps.plan import Run

ATTEMPTS = 3  # of a stack whose worker is lost
FAILED, STOPPED = 1, 130  # exit codes of a worker


def work(job: str) -> None:
    """Train one stack to its end, or go on with it.

    Args:
        job: JSON list of `[run folder, configuration]`.

    Raises:
        Interrupted: the worker was asked to stop; everything is saved.
    """
    runs = [Run(Path(path), as_config(config)) for path, config in json.loads(job)]
    resume = all(run.update >= 0 for run in runs)
    if not resume:
        experiment_of(runs[0].config).try_out(runs[0].config)
    for run in runs:
        if not resume and run.path.is_dir():  # broken off before its first checkpoint
            if any(not file.name.endswith(".tmp") for file in run.path.iterdir()):
                RunFolder.open(run.path)  # refuses to remove what is not a run
            shutil.rmtree(run.path)
    quiet = Console(file=sys.stderr, force_terminal=False)
    fit({run.path: run.config for run in runs}, quiet, resume, tell=False)


def _main() -> None:
    """A worker process: a job on the first line of standard input, the end of which stops it."""
    job = sys.stdin.readline()

    def stop_with_parent() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_with_parent, daemon=True).start()
    code = 0
    try:
        work(job)
    except Interrupted:
        code = STOPPED
    except UserError as error:
        print(error, file=sys.stderr)
        code = FAILED
    sys.stderr.flush()
    os._exit(code)  # the thread that waits for input would hold up an ordinary exit


class WorkerLost(Exception):
    """A worker went away (killed, out of memory); its stack can be gone on with."""


class WorkerFailed(Exception):
    """A stack cannot be trained; says why in one line."""


Submit = Callable[[str], "Future[None]"]


def stack_memory(gpu: bool, workers: int) -> float:
    """Bytes that a stack may take: its share of half of what is free."""
    if gpu:
        import torch  # takes a second to load

        return 0.5 * torch.cuda.mem_get_info()[0] / workers
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not told on this system
        return math.inf
    return 0.5 * free / workers


@contextmanager
def local_workers(count: int) -> Iterator[Submit]:
    """Run jobs in processes of this machine, `count` at a time."""
    running: set[subprocess.Popen[str]] = set()
    stopping = False

    def call(job: str) -> None:
        if stopping:
            raise WorkerLost("stopped")
        process = subprocess.Popen(
            [sys.executable, "-m", "oversight_rl.sweeps.workers"],
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
    """
    try:
        import ray  # an extra, which few have
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


if __name__ == "__main__":
    _main()
