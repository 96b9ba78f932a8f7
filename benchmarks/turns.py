"""Processes that take turns on the same cores, one for each subject of a benchmark.

A subject's script calls `serve`, and whoever measures starts it as a `Subject`. Nothing but
Python's own library is needed, since a peer's script runs in an environment without ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

Work = Callable[[], int]  # does a little and returns the number of steps that it took
ONE_CORE = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
"""XLA's flags without which jax has threads for cores that it may not use."""


def rate(work: Work, seconds: float) -> float:
    """Steps per second over at least so long."""
    steps, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        steps += work()
    return steps / elapsed


def serve(work: Work, **facts: float) -> None:
    """Say what is known once `work` can be done, and then measure a rate whenever asked to."""
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        print(json.dumps({"rate": rate(work, float(line))}), flush=True)


def cores_at_hand() -> list[int]:
    """The cores that this process may use, by number."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


class Subject:
    """A script that serves, on so many cores, with as many threads; started, ready and waiting.

    Attributes:
        facts: what it said when it was ready, by name.
    """

    def __init__(self, command: Sequence[str], cores: int) -> None:
        threads = {"OMP_NUM_THREADS": str(cores)}
        if cores == 1:
            threads["XLA_FLAGS"] = ONE_CORE
        pin = None
        if hasattr(os, "sched_setaffinity"):
            pin = partial(os.sched_setaffinity, 0, cores_at_hand()[:cores])
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=pin,
            env=os.environ | threads,
        )  # fmt: skip
        self.facts = self._answer()

    def rate(self, seconds: float) -> float:
        """Steps per second in a turn of at least so many seconds."""
        assert self.process.stdin is not None
        print(seconds, file=self.process.stdin, flush=True)
        return float(self._answer()["rate"])

    def close(self) -> None:
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # libraries greet
                return dict(json.loads(line))
        command = " ".join(map(str, self.process.args))
        raise SystemExit(f"{command}: ended with {self.process.wait()}")
