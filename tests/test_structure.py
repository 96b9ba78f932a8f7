"""The rules of structure: each is broken in a made-up tree, and found."""

import subprocess
import sys
from pathlib import Path

import pytest
import structure

ROOT = Path(__file__).parent.parent
FINE = {
    "oversight_rl/__init__.py": """
        from importlib import import_module
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from oversight_rl.high import top
        __all__ = ["top"]
        def __getattr__(name):
            return getattr(import_module("oversight_rl.high"), name)
        """,
    "oversight_rl/high.py": """
        from typing import TYPE_CHECKING
        from oversight_rl import low
        if TYPE_CHECKING:
            from oversight_rl.other import thing
        def top():
            # takes a second to load
            import torch
            from oversight_rl.low import (
                bottom,
            )
            import json  # only with files
            return torch, json, bottom, low
        """,
    "oversight_rl/low.py": """
        def bottom():
            return 0
        """,
    "oversight_rl/other.py": """
        from oversight_rl.high import top
        thing = top()
        """,
    "envs/__init__.py": "",
    "envs/world.py": "STEPS = 5",
    "train.py": "from oversight_rl.high import top\ntop()",
    "benchmarks/speed.py": "",
}


def written(root, files):
    """A tree of files, whose `envs` is linked into the package as ours is."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        first = text.lstrip("\n")
        indent = len(first) - len(first.lstrip(" "))
        path.write_text("\n".join(line[indent:] for line in first.rstrip().split("\n")) + "\n")
    (root / "oversight_rl/envs").symlink_to("../envs")
    return root


def test_a_tree_that_keeps_the_rules_is_fine(tmp_path):
    assert structure.problems(written(tmp_path, FINE)) == []


MODULE = "oversight_rl.envs.world"


@pytest.mark.parametrize(
    ("files", "lines"),
    [
        (
            {"oversight_rl/low.py": "from oversight_rl.other import thing\nx = 1"},
            "circle of imports: oversight_rl.high -> oversight_rl.low -> oversight_rl.other"
            " -> oversight_rl.high",
        ),
        (
            {"oversight_rl/low.py": "def f():\n    import oversight_rl.high  # slow"},
            "circle of imports: oversight_rl.high -> oversight_rl.low -> oversight_rl.high",
        ),
        (
            {
                "envs/world.py": "from .gym import x\ny = 1",
                "envs/gym.py": "from . import world\nx = 1",
            },
            "circle of imports: oversight_rl.envs.gym -> oversight_rl.envs.world"
            " -> oversight_rl.envs.gym",
        ),
        (
            {"oversight_rl/low.py": "import oversight_rl.low\nx = 1"},
            "circle of imports: oversight_rl.low -> oversight_rl.low",
        ),
        (
            {"envs/world.py": "x = 1\n" * 451},
            "oversight_rl.envs.world: has 451 lines, more than 450",
        ),
        ({"train.py": "x = 1\n" * 451}, "train.py: has 451 lines, more than 450"),
        (
            {"benchmarks/speed.py": "@f\n@g\ndef top():\n" + "    f()\n" * 58},
            "benchmarks/speed.py: top has 61 lines, more than 60",
        ),
        (
            {"envs/world.py": "class C:\n    def f(self):\n" + "        f()\n" * 60},
            "oversight_rl.envs.world: f has 61 lines, more than 60",
        ),
        (
            {"envs/world.py": "def f():\n    # why\n\n    import torch  # noqa: F401"},
            "oversight_rl.envs.world:4: an import inside a function without its reason",
        ),
        (
            {"envs/world.py": "def f():\n    import a  # why\n    f()\n    import torch"},
            "oversight_rl.envs.world:4: an import inside a function without its reason",
        ),
        (
            {"oversight_rl/low.py": f"from {MODULE} import STEPS\n__all__ = ['STEPS']"},
            "oversight_rl.low: only passes on what others define",
        ),
        (
            {"oversight_rl/low.py": "from oversight_rl.envs import world\nSTEPS = world.STEPS"},
            "oversight_rl.low: only passes on what others define",
        ),
        (
            {"envs/__init__.py": "from oversight_rl.envs.world import STEPS"},
            "oversight_rl.envs: only passes on what others define",
        ),
    ],
)
def test_what_breaks_a_rule_is_found(tmp_path, files, lines):
    assert structure.problems(written(tmp_path, FINE | files)) == [lines]


def test_what_is_just_short_enough_is_fine(tmp_path):
    files = {
        "envs/world.py": "x = 1\n" * 450,
        "envs/gym.py": "def f():\n" + "    f()\n" * 59,
    }
    assert structure.problems(written(tmp_path, FINE | files)) == []


def test_the_script_fails_and_says_what(tmp_path):
    written(tmp_path, FINE | {"envs/world.py": "x = 1\n" * 451})
    command = [sys.executable, ROOT / "tests/structure.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == "oversight_rl.envs.world: has 451 lines, more than 450\n"
