"""How long a command takes until something is seen of it: `python benchmarks/start.py`.

CPU seconds of help and of a mistake, and wall seconds until the first update of training is saved.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STARTS = 5
COMMAND = [sys.executable, "-m", "oversight_rl"]


def cpu_seconds(*args: str) -> float:
    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    subprocess.run([*COMMAND, *args], capture_output=True, check=False)
    return spent() - before


def first_update() -> float:
    with tempfile.TemporaryDirectory() as folder:
        settings = ["--reinforce.updates", "1", "--evaluation.every", "1", "--no-pictures"]
        run = Path(folder, "run")
        since = time.perf_counter()
        process = subprocess.Popen(
            [*COMMAND, "train", *settings, "--run-dir", str(run)], stdout=subprocess.DEVNULL
        )
        saved = run / "checkpoints/update_00000001.json"
        while not saved.exists() and process.poll() is None:
            time.sleep(0.01)
        seconds = time.perf_counter() - since
        process.wait()
    if process.returncode:
        sys.exit(f"training failed with {process.returncode}")
    return seconds


def main() -> None:
    measures = {
        "help, CPU s": lambda: cpu_seconds("--help"),
        "a mistyped run folder, CPU s": lambda: cpu_seconds("evaluate", "no/such/run"),
        "first update saved, wall s": first_update,
    }
    for name, measure in measures.items():
        measure()  # files are read from the disk
        seconds = [measure() for _ in range(STARTS)]
        print(f"{name}: {statistics.median(seconds):.2f} ({min(seconds):.2f}..{max(seconds):.2f})")


if __name__ == "__main__":
    main()
