"""The benchmark of PPO against its peers: what it prints and writes, without the peers."""

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from peers import why_no_peers
from turns import Subject, rate

ROOT = Path(__file__).parent.parent


def test_ours_is_measured_and_missing_peers_are_said_in_a_line(tmp_path):
    file, python = tmp_path / "figures.json", tmp_path / "none/bin/python"
    command = [sys.executable, "benchmarks/peers.py", "--quick", "--cores", "1"]
    command += ["--only", "rejax", "naive", "sb3", "--python", str(python)]
    done = subprocess.run(
        [*command, "--json", str(file)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    said = f"rejax is left out: there is no {python}; `make peers` installs it"
    assert done.stdout.splitlines()[0] == said
    figures = json.loads(file.read_text())
    rates = {f"steps_per_second_{name}_1core" for name in ("naive", "sb3")}
    names = {*rates, "naive_over_sb3_1core"}
    assert set(figures) == {name + part for name in names for part in ("", "_q25", "_q75")}
    for name in names:
        assert 0 < figures[f"{name}_q25"] <= figures[name] <= figures[f"{name}_q75"]


def test_an_environment_without_the_peers_says_which_is_missing(tmp_path):
    venv.create(tmp_path, symlinks=True)
    found = why_no_peers(tmp_path / "bin/python")
    assert found == "ModuleNotFoundError: No module named 'rejax'"


def test_a_subject_serves_turns_with_the_threads_it_may_use(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\n"
        f"sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        "from turns import cores_at_hand, serve\n"
        "print('hello from a library')\n"
        "threads = int(os.environ['OMP_NUM_THREADS'])\n"
        "def work():\n    time.sleep(0.01)\n    return 5\n"
        "serve(work, threads=threads, cores=len(cores_at_hand()))\n"
    )
    subject = Subject([sys.executable, str(script)], cores=1)
    assert subject.facts == {"threads": 1, "cores": 1}
    assert 100 < subject.rate(0.1) <= 500
    subject.close()
    assert subject.process.returncode == 0


def test_a_subject_that_fails_is_no_slow_subject():
    with pytest.raises(SystemExit, match=r"-c raise SystemExit\(3\): ended with 3"):
        Subject([sys.executable, "-c", "raise SystemExit(3)"], cores=1)


def test_a_rate_counts_all_steps_of_all_its_time(monkeypatch):
    clock = iter((0.0, 0.0, 2.0, 4.0))
    monkeypatch.setattr("turns.time.perf_counter", lambda: next(clock))
    assert rate(lambda: 6, 3.0) == 12 / 4
