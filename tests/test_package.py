"""The package as others get it: built, installed elsewhere, beside folders of the same names."""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import structure

from oversight_rl.cli import main, train
from oversight_rl.runs import checkpoint
from oversight_rl.settings import settings_file
from oversight_rl.sweeps.plan import load_sweep

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
ZIP = "zips/routing-OversightGrid-v0"  # of version 0.1
NOT_OURS = ("*.egg-info", ".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "build",
            "dist")  # fmt: skip

# an experiment of somebody whose repository has its own envs and agents
MINE = """
import sys

import numpy as np

import agents
import envs
from oversight_rl import OversightLabels, RoutedPPO

kept = np.load("zip.npz")
model = RoutedPPO.load("zip.zip").steer("diamond")
actions, _ = model.predict(kept["observation"], deterministic=True)
assert np.array_equal(actions, kept["diamond"])
assert envs.WHOSE == agents.WHOSE == "mine"
assert not {"envs.world", "agents.ppo"} & set(sys.modules)
print(sys.modules["oversight_rl.envs.labels"].__file__)
"""
TYPED = """
from oversight_rl import OversightLabels, RoutedPPO

reveal_type(RoutedPPO)
reveal_type(OversightLabels)
"""
# packages that are slow to look through and not ours
MYPY = """
[mypy]
strict = true
[mypy-torch.*,stable_baselines3.*,numpy.*,gymnasium.*,pydantic.*,tensorboard.*]
follow_imports = skip
"""


def run(*command, cwd, fails=False):
    """What a command prints, in an environment that knows nothing of this checkout."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV"))}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout


def not_ours(folder, names):
    """What of a folder is no part of the source; `runs` at the top are a user's."""
    ignored = shutil.ignore_patterns(*NOT_OURS)(folder, names)
    return ignored | ({"runs"} if Path(folder) == ROOT else set())


def pip(*args, cwd):
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", *args, cwd=cwd)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT, folder / "ours", True, not_ours)
    build = "import setuptools.build_meta as build; build.build_sdist('..')"
    run(sys.executable, "-c", build, cwd=folder / "ours")
    with tarfile.open(folder / f"oversight_rl-{PROJECT['version']}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"oversight_rl-{PROJECT['version']}"


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """The wheel, built from the source distribution without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(source, folder / "source", True)
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "./source", cwd=folder)
    return next(folder.glob("*.whl"))


def environment(folder, *package):
    """A second environment with the dependencies of this one and a package; its commands."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    bin_ = folder / "bin"
    paths = run(bin_ / "python", "-c", "import sysconfig as s; print(s.get_path('purelib'))",
                cwd=folder)  # fmt: skip
    ours = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    # whose own .pth files, that of an editable install among them, have no effect there
    (Path(paths.strip()) / "dependencies.pth").write_text("\n".join(ours))
    pip("--python", bin_ / "python", "install", "--no-deps", "--no-build-isolation", "--no-index",
        *package, cwd=folder)  # fmt: skip
    return bin_


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    return environment(tmp_path_factory.mktemp("installed"), wheel)


@pytest.fixture
def mine(tmp_path):
    """A user's repository with its own `envs` and `agents`, and a model of version 0.1."""
    folder = tmp_path / "mine"
    for name in ("envs", "agents"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("WHOSE = 'mine'\n")
    (folder / "experiment.py").write_text(MINE)
    (folder / "typed.py").write_text(TYPED)
    (folder / "mypy.ini").write_text(MYPY)
    with tarfile.open(ROOT / "tests/data/version_0_1.tar.xz") as archive:
        for kind in ("zip", "npz"):
            content = archive.extractfile(f"out/{ZIP}.{kind}").read()
            (folder / f"zip.{kind}").write_bytes(content)
    return folder


# ---- what is in it


def test_the_wheel_holds_one_package_with_presets_and_types(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    named = f"oversight_rl-{PROJECT['version']}.dist-info"
    assert {name.split("/")[0] for name in files} == {"oversight_rl", named}
    modules = {str(source.path.relative_to(ROOT)) for source in structure.sources(ROOT)[0]}
    assert {name for name in files if name.endswith(".py")} == modules
    assert "oversight_rl/agents/ppo/algorithm.py" in modules
    presets = {name: text for name, text in files.items() if "/configs/" in name}
    assert presets == {f"oversight_rl/configs/{p.name}": p.read_bytes() for p in CONFIGS}
    assert "oversight_rl/py.typed" in files

    about = Parser().parsestr(files[f"{named}/METADATA"].decode())
    assert about["License-Expression"] == "MIT"
    assert b"MIT License" in files[f"{named}/licenses/LICENSE"]
    assert about["Project-URL"]
    assert about["Keywords"]
    assert "Typing :: Typed" in about.get_all("Classifier")


def test_the_readme_of_an_index_has_no_link_into_the_repository(wheel):
    links = r"\]\(([^)]*)\)"
    assert "docs/environments.md" in re.findall(links, (ROOT / "README.md").read_text())
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        shown = Parser().parsestr(archive.read(name).decode()).get_payload()
    assert shown.count("\n## ") == (ROOT / "README.md").read_text().count("\n## ")
    assert "docs/environments.md" in shown  # named, as a file of the source
    targets = re.findall(links, shown)
    assert targets
    assert all(target.startswith("https://") for target in targets)
    assert "![" not in shown


def test_the_source_has_all_once_and_its_tests_run(source):
    for name in ("envs", "agents", "configs"):
        link, folder = source / name, source / "oversight_rl" / name
        assert link.is_symlink()
        assert not folder.is_symlink()
        assert link.resolve() == folder
    for kind in ("*.py", "*.yaml", "*.md", "*.png", "*.xz"):
        for folder in ("oversight_rl", "envs", "agents", "configs", "tests", "benchmarks", "docs"):
            for path in (ROOT / folder).rglob(kind):
                assert (source / path.relative_to(ROOT)).read_bytes() == path.read_bytes(), path
    for name in ("Makefile", "pyproject.toml", "train.py", "CITATION.cff", "CHANGELOG.md"):
        assert (source / name).read_bytes() == (ROOT / name).read_bytes()
    tests = ["tests/test_world.py", "tests/test_statistics.py"]
    assert "100%" in run(sys.executable, "-m", "pytest", *tests, cwd=source)


# ---- used elsewhere


def test_in_a_repository_with_envs_and_agents_of_its_own(installed, mine):
    there = run(installed / "python", "experiment.py", cwd=mine)
    assert str(installed.parent) in there
    types = run(sys.executable, "-m", "mypy", "--cache-dir", mine / "cache",
                "--python-executable", installed / "python", "typed.py", cwd=mine)  # fmt: skip
    assert "oversight_rl.agents.ppo.algorithm.RoutedPPO" in types
    assert "oversight_rl.envs.labels.OversightLabels" in types


def test_an_editable_install_leaves_the_names_alone_too(source, mine, tmp_path):
    shutil.copytree(source, tmp_path / "source", True)
    bin_ = environment(tmp_path / "venv", "--editable", tmp_path / "source")
    assert str(tmp_path / "source") in run(bin_ / "python", "experiment.py", cwd=mine)
    for name in ("envs", "agents", "tests", "configs"):
        run(bin_ / "python", "-c", f"import {name}.world", cwd=tmp_path, fails=True)


def test_the_command_trains_stops_and_goes_on_by_what_it_said(installed, mine):
    """With a preset by its name, where there is no checkout but another `envs`."""
    command = installed / "oversight-rl"
    assert run(command, "--version", cwd=mine) == f"oversight-rl {PROJECT['version']}\n"
    small = ["--config", "smoke", "--device", "cpu", "--no-pictures"]
    steady = ["--reinforce.learning-rate", "1e-3", "--reinforce.entropy-coef", "0.02"]
    long = ["--run-dir", "run", "--reinforce.updates", "20000", *steady]
    process = subprocess.Popen([command, "train", *small, *long], cwd=mine,
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    kept = mine / "run" / "checkpoints"
    while process.poll() is None and max(checkpoint.updates(kept), default=0) < 10:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    (said,) = re.findall("go on with: (.*)", output)
    assert said == "oversight-rl train --resume run"
    config = mine / "run" / "config.yaml"
    updates = checkpoint.updates(kept)[-1] + 5
    config.write_text(config.read_text().replace("updates: 20000", f"updates: {updates}"))
    run(installed / said.split()[0], *said.split()[1:], cwd=mine)
    assert (mine / "run" / "result.json").exists()


# ---- presets by name, in a checkout


def test_presets_are_known_by_name_and_files_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in CONFIGS:
        assert settings_file(Path(path.stem)).read_bytes() == path.read_bytes()
        assert settings_file(path) == path
    Path("minigrid").mkdir()  # of environments, say: it is no file of settings
    assert (
        settings_file(Path("minigrid")).read_bytes()
        == (ROOT / "configs/minigrid.yaml").read_bytes()
    )
    Path("smoke").write_text("oversight: 0.5")
    assert settings_file(Path("smoke")) == Path("smoke")
    assert len(load_sweep(settings_file(Path("compare_quick"))).grid[0]) == 3


@pytest.mark.parametrize(
    ("command", "near"),
    [
        (["train", "--config", "minigird"], "minigrid"),
        (["train", "--config", "configs/minigrid.yaml"], "minigrid"),
        (["sweep", "compare_quik", "--out", "sweep"], "compare_quick"),
    ],
)
def test_a_mistyped_preset_is_refused_with_the_nearest(
    command, near, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"did you mean {near!r}?" in error
    assert not list(tmp_path.iterdir())


def test_a_preset_of_the_other_kind_says_which_command_takes_it(capsys):
    for command, args, other in (
        (train, ["--config", "compare_quick"], "oversight-rl sweep"),
        (main, ["sweep", "minigrid", "--out", "sweep"], "--config"),
    ):
        with pytest.raises(SystemExit):
            command(args)
        assert other in capsys.readouterr().err
