"""Whether the lower bounds in pyproject.toml work: tests in an environment of exactly these.

`make lowest`, or `python benchmarks/lowest.py [DIR]`: makes an environment in DIR (default:
.venv-lowest), with every requirement at its lower bound, and runs the tests there that between
them use all of what we depend on. It takes a quarter of an hour and, where the lowest PyTorch comes
with CUDA, seven gigabytes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
import venv
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("settings", "gym", "minigrid", "ppo_runs", "commands", "tracking", "report", "sweep",
         "deployment", "old_runs", "properties", "lock")  # fmt: skip
NEWER = "tests/test_old_runs.py::test_zips"  # pickled by NumPy 2, which 1 cannot read


def lower_bounds(project: dict) -> list[str]:
    """The least version of every requirement that names one, `name==version`."""
    texts = chain(project["dependencies"], *project["optional-dependencies"].values())
    bounds = []
    for requirement in map(Requirement, texts):
        least = [part.version for part in requirement.specifier if part.operator == ">="]
        bounds += [f"{requirement.name}=={version}" for version in least]
    return bounds


def main(folder: Path) -> None:
    """Make the environment and run the tests in it; exits as they do."""
    bounds = lower_bounds(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])
    print("\n".join(bounds), flush=True)
    venv.create(folder, clear=True, with_pip=True)
    python = folder.resolve() / "bin" / "python"
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(bounds))
        constraints.flush()
        install = ["-m", "pip", "install", "--quiet", "--constraint", constraints.name]
        subprocess.run([python, *install, "--editable", ".[dev]"], cwd=ROOT, check=True)
    tests = [f"tests/test_{name}.py" for name in TESTS]
    command = [python, "-m", "pytest", *tests, f"--deselect={NEWER}"]
    raise SystemExit(subprocess.run(command, cwd=ROOT).returncode)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".venv-lowest"))
