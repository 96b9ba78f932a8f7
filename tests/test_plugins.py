"""Environments of a package of the user's, installed for real, from the command line."""

import json
import os
import subprocess
import sys
import tomllib
import warnings
from importlib.metadata import EntryPoint
from pathlib import Path

import gymnasium as gym
import pytest

from oversight_rl.cli import main, train
from oversight_rl.envs import plugins
from oversight_rl.envs.vector import make_vec

ROOT = Path(__file__).parent.parent
PACKAGE = '''
import gymnasium as gym
import numpy as np

from oversight_rl import OversightLabels


class Corridor(gym.Env):
    """Walk to one of two ends."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, fails=""):
        self.fails = fails
        if fails == "when made":
            raise RuntimeError("there is\\nno display")
        if fails == "by its space":
            self.action_space = gym.spaces.Text(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cell = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.cell += 2 * int(action) - 1
        if self.fails == "in a step":
            raise KeyError("nothing here")
        ended = abs(self.cell) == 3
        return np.array([self.cell / 3], np.float32), 0.0, ended, False, {}


def end(env, observation, *others):
    if env.unwrapped.fails == "by its label":
        return "middle"
    return "right" if observation[0] > 0 else "left"


def make(oversight, **settings):
    return OversightLabels(
        Corridor(**settings), end, oversight_probability=oversight, behaviors=("right", "left")
    )


def register():
    gym.register("Corridor-v0", make)
    gym.register("Unwrapped-v0", Corridor)
    gym.register("Missing-v0", "own_envs.not_there:Env")
'''
METADATA = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "own-envs"
version = "1"

[project.entry-points."gymnasium.envs"]
__root__ = "own_envs:register"
own = "own_envs:register"
broken = "own_envs.broken:register"
"""
SMALL = [
    *("--algo", "ppo", "--ppo.updates", "1", "--ppo.worlds", "2", "--ppo.steps", "32"),
    *("--ppo.batch-size", "32", "--evaluation.episodes", "10", "--evaluation.oversight", "0.5"),
    *("--agent.hidden", "8", "--device", "cpu", "--no-pictures"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder of installed packages with the user's in it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    (source / "own_envs").mkdir()
    (source / "own_envs/__init__.py").write_text(PACKAGE)
    (source / "own_envs/broken.py").write_text("import a_library_that_is_not_installed\n")
    (source / "pyproject.toml").write_text(METADATA)
    offline = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", *offline, "--target", target, source],
        check=True,
    )
    return target


def command(site, cwd, *args):
    """Run a command where the package is installed; returns its output."""
    path = os.pathsep.join([str(site), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *args], cwd=cwd, env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def installed(site, monkeypatch):
    """The package, installed for this process."""
    before = set(gym.registry)
    monkeypatch.syspath_prepend(site)
    plugins.register_plugins.cache_clear()
    yield
    plugins.register_plugins.cache_clear()
    for name in set(gym.registry) - before:
        del gym.registry[name]


def test_a_users_own_environment_from_the_command_line(site, tmp_path):
    """Trained, evaluated, and swept by workers: each a process that has to find it."""
    _, warned = command(
        site, tmp_path, ROOT / "train.py", "--env", "Corridor-v0", *SMALL, "--run-dir", "run"
    )
    (line,) = [line for line in warned.splitlines() if "own-envs" in line]
    assert line.startswith("warning: ")
    assert "a_library_that_is_not_installed" in line
    assert "Traceback" not in warned
    own = ["-m", "oversight_rl"]
    command(site, tmp_path, *own, "evaluate", "run", "--steer", "left", "--json", "rows.json")
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["policy"] == "left"
    ppo = {"updates": 1, "worlds": 2, "steps": 32, "batch_size": 32}
    shared = {"algo": "ppo", "ppo": ppo, "agent": {"hidden": 8}, "pictures": False}
    shared |= {"evaluation": {"episodes": 10, "oversight": [0.5]}, "device": "cpu"}
    plan = {"settings": shared, "grid": {"env": ["own/Corridor-v0"], "seeds": [0]}}
    (tmp_path / "sweep.yaml").write_text(json.dumps(plan))
    for where in ([], ["--ray", "local"]):
        out = f"swept{len(where)}"
        command(site, tmp_path, *own, "sweep", "sweep.yaml", "--out", out, *where)
        assert len(list((tmp_path / out).rglob("result.json"))) == 1


@pytest.mark.parametrize(
    ("env", "fails", "message"),
    [
        ("Corridr-v0", "", "no environment 'Corridr-v0'; did you mean 'Corridor-v0'?; gymnasium"),
        ("own_envs:Corridor-v0", "", "must be an id that gymnasium knows"),
        ("Missing-v0", "", "cannot be made (ModuleNotFoundError: No module named 'own_envs.not_"),
        ("Unwrapped-v0", "", "does not take the argument oversight; wrap it in OversightLabels"),
        (
            "Corridor-v0",
            "when made",
            "be made (RuntimeError: there is no display, own_envs/__",
        ),
        ("Corridor-v0", "by its space", "Text"),
        ("Corridor-v0", "in a step", "step failed (KeyError: 'nothing here', own_envs/__init__.py"),
        ("Corridor-v0", "by its label", "'middle'"),
    ],
)
@pytest.mark.usefixtures("installed")
def test_what_cannot_be_trained_on_is_refused(tmp_path, capsys, monkeypatch, env, fails, message):
    """In one line, before anything is written: alone, with several seeds, and in a sweep."""
    monkeypatch.chdir(tmp_path)
    settings = ["--env-settings", "fails", fails] if fails else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the package's broken part
        for more in ([], ["--seeds", "0", "1"], ["--run-dir", "run"]):
            with pytest.raises(SystemExit) as stop:
                train(["--env", env, *settings, *SMALL, *more])
            error = capsys.readouterr().err
            assert stop.value.code == 2
            assert message in error
            assert error.count("\n") == 1
            assert list(tmp_path.iterdir()) == []
        plan = {"settings": {"algo": "ppo", "env": env}, "grid": {"seeds": [0, 1]}}
        plan["settings"] |= {"env_settings": {"fails": fails}} if fails else {}
        (tmp_path / "sweep.yaml").write_text(json.dumps(plan))
        with pytest.raises(SystemExit) as stop:
            main(["sweep", "sweep.yaml", "--out", "swept"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "swept").exists()


@pytest.mark.usefixtures("installed")
def test_what_a_package_declares_is_found_by_our_functions():
    with pytest.warns(UserWarning, match="own-envs could not be loaded .ModuleNotFoundError"):
        env = make_vec("own/Corridor-v0", 2, oversight=0.5)
    assert env.get_attr("behaviors") == [("right", "left")] * 2
    assert gym.spec("own/Corridor-v0").namespace == "own"
    assert gym.envs.registration.current_namespace is None


def test_our_own_ids_are_declared_the_same_way():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    ((name, value),) = declared[plugins.GROUP].items()
    before = dict(gym.registry)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as at an id that is registered a second time
        EntryPoint(name, value, plugins.GROUP).load()()
    assert name in plugins.ROOT
    assert dict(gym.registry) == before
