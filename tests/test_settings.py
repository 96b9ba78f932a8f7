"""What a file of settings says is what it looks like, or it is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from oversight_rl.agents.ppo.algorithm import RoutedPPO
from oversight_rl.agents.reinforce.learner import ReinforceLearner
from oversight_rl.agents.settings import ReinforceConfig
from oversight_rl.agents.threads import on_threads
from oversight_rl.cli import main, train
from oversight_rl.envs.settings import UserError
from oversight_rl.experiments.oversight.config import Config
from oversight_rl.experiments.oversight.evaluation import Evaluator
from oversight_rl.kinds import load_config
from oversight_rl.settings import dump_yaml, read_yaml
from oversight_rl.sweeps.plan import load_sweep, plan
from oversight_rl.sweeps.workers import work

ROOT = Path(__file__).parent.parent
SMALL = ["--config", str(ROOT / "configs/smoke.yaml"), "--device", "cpu", "--no-pictures"]
SMALL += ["--reinforce.updates", "4", "--evaluation.every", "2", "--evaluation.oversight", "0.1"]
SMALL += ["--world.rows", "3", "--world.cols", "3", "--world.max-steps", "6"]

TWICE = [
    ("reinforce:\n  updates: 2\nagent: {hidden: [8]}\nreinforce:\n  steps: 8\n", "'reinforce'", 4),
    ("agent: {hidden: [8], hidden: [9]}\n", "'hidden'", 1),
    ("reinforce:\n  updates: 2\n  'updates': 2\n", "'updates'", 3),
    ("grid:\n  seeds: [{a: {b: 1,\n    b: 2}}]\n", "'b'", 3),
    ("1: a\n1: b\n", "1", 2),
]


def read(tmp_path, text):
    (tmp_path / "settings.yaml").write_text(text)
    return read_yaml(tmp_path / "settings.yaml")


def loaded(tmp_path, text):
    (tmp_path / "settings.yaml").write_text(text)
    return load_config(tmp_path / "settings.yaml")


@pytest.mark.parametrize(("text", "key", "line"), TWICE)
@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_a_key_that_stands_twice_is_refused(tmp_path, capsys, kind, text, key, line):
    file, out = tmp_path / "settings.yaml", str(tmp_path / "out")
    file.write_text(text)
    command, args = (train, ["--config", str(file), "--run-dir", out])
    if kind == "sweep":
        command, args = (main, ["sweep", str(file), "--out", out])
    with pytest.raises(SystemExit) as stop:
        command(args)
    (error,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert f"{key} is set a second time in line {line}" in error
    assert not Path(out).exists()


def test_the_same_name_in_two_places_is_no_second_time(tmp_path):
    assert read(tmp_path, "a: {x: 1}\nb: {x: 1}\nx: [{x: 1}, {x: 1}]\n")["b"] == {"x": 1}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1:30", "1:30"), ("1:30.5", "1:30.5"), ("010", "010"), ("0x10", "0x10")),
        *(("0b11", "0b11"), ("2024-01-01", "2024-01-01"), ("2024-01-01 10:00:00",) * 2),
        *((word, word) for word in ("yes", "No", "on", "OFF", "y", "=", "<<", "1_000")),
        *(("7", 7), ("-7", -7), ("+7", 7), ("0", 0), ("1e-3", 1e-3), ("1E3", 1000.0)),
        *(("1.5e3", 1500.0), (".5", 0.5), ("5.", 5.0), ("-.inf", -math.inf), (".INF", math.inf)),
        *(("true", True), ("FALSE", False), ("null", None), ("~", None), ("", None)),
        *(("'7'", "7"), ('"true"', "true"), ("1e", "1e"), (".", "."), ("e5", "e5")),
    ],
)
def test_plain_words_are_read_as_they_look(tmp_path, text, value):
    found = read(tmp_path, f"x: {text}\n")["x"]
    assert (type(found), found) == (type(value), value)
    assert math.isnan(read(tmp_path, "x: .nan")["x"])


@pytest.mark.parametrize("text", ["!!int 010", "!!float 1:30", "!!str 1", "!!set {a}", "!own 1"])
def test_tags_are_refused(tmp_path, text):
    with pytest.raises(UserError, match=r"not valid YAML \(tags"):
        read(tmp_path, f"x: {text}\n")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seeds: 1:30", "seeds: should be a valid integer, .*, got '1:30'"),
        ("reinforce: {updates: true}", "reinforce.updates: must be a number, got True"),
        ("oversight: yes", "oversight: should be a valid number, .*, got 'yes'"),
        ("oversight: true", "oversight: must be a number, got True"),
        ("seeds: [1, true]", r"seeds: must be numbers, got \[1, True\]"),
        ("reinforce: {learning_rate: [1.0, false]}", "reinforce.learning_rate: must be numbers"),
        ("agent: {hidden: false}", "agent.hidden: must be a number, got False"),
        ("reinforce: {updates: 2024-01-01}", "reinforce.updates: .* got '2024-01-01'"),
        ("reinforce: {updates: 0x10}", "reinforce.updates: .* got '0x10'"),
        ("method: on", "method: must be one of .* got 'on'"),
    ],
)
def test_what_is_no_number_is_not_made_one(tmp_path, text, told):
    with pytest.raises(UserError, match=told):
        loaded(tmp_path, text)


def test_numbers_mean_what_they_say(tmp_path):
    config = loaded(tmp_path, "reinforce: {updates: 010, learning_rate: 1e-3}\noversight: 1e-1\n")
    assert config.reinforce.updates == 10
    assert config.reinforce.learning_rate == (1e-3,)
    assert config.oversight == 0.1


@pytest.mark.parametrize(
    "text",
    ["settings: {training: {updates: 2}}\ngrid: {seeds: 2}", "grid: {training.updates: [2]}"],
)
def test_a_sweep_is_told_the_new_name_of_a_section(tmp_path, text):
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(UserError, match=r"training: is called reinforce since version 0\.2"):
        plan(load_sweep(tmp_path / "sweep.yaml"), tmp_path / "out")


def test_what_a_run_wrote_is_read_by_the_names_of_its_version(tmp_path):
    """As a run folder's settings are; a file without provenance is a user's."""
    text = "training: {updates: 7}\nprovenance: {versions: {oversight-rl: 0.1.0}}\n"
    assert loaded(tmp_path, text).reinforce.updates == 7
    with pytest.raises(UserError, match="is called reinforce"):
        loaded(tmp_path, "training: {updates: 7}")


@pytest.mark.parametrize("word", ["true", "on", "Yes", "false", "off", "NO"])
def test_words_for_true_and_false_stay(tmp_path, word):
    config = loaded(tmp_path, f"pictures: {word}\n")
    assert config.pictures is (word.lower() in ("true", "on", "yes"))


def test_true_is_no_number_however_it_comes(tmp_path):
    with pytest.raises(UserError, match=r"reinforce\.updates: must be a number, got True"):
        ReinforceConfig(updates=True)
    with pytest.raises(UserError, match="oversight: must be a number"):
        Config.model_validate({"oversight": True})
    (tmp_path / "sweep.yaml").write_text("grid: {reinforce.updates: [2, true]}\n")
    with pytest.raises(UserError, match="must be a number, got True"):
        plan(load_sweep(tmp_path / "sweep.yaml"), tmp_path)
    (tmp_path / "sweep.yaml").write_text("stack: true\ngrid: {seeds: [2]}\n")
    with pytest.raises(UserError, match="stack: must be a number"):
        load_sweep(tmp_path / "sweep.yaml")


def test_words_that_an_environment_would_take_for_true_are_refused(tmp_path, capsys):
    """Nobody knows the types of its arguments, and `off` is as true as any word."""
    text = "algo: ppo\nenv: MiniGrid-DiamondGhost-5x5-v0\nenv_settings: {lava: off}\n"
    (tmp_path / "run.yaml").write_text(text)
    told = "env_settings: lava must be True or False, not a word for it, got "
    for args in (
        ["--config", str(tmp_path / "run.yaml")],
        ["--algo", "ppo", "--env", "MiniGrid-DiamondGhost-5x5-v0", "--env-settings", "lava", "off"],
    ):
        with pytest.raises(SystemExit):
            train([*args, "--run-dir", str(tmp_path / "run")])
        assert f"{told}'off'" in capsys.readouterr().err
    sweep = "settings: {algo: ppo, env: MiniGrid-DiamondGhost-5x5-v0}\n"
    sweep += "grid: {env_settings.lava: [yes]}\n"
    (tmp_path / "sweep.yaml").write_text(sweep)
    with pytest.raises(UserError, match=f"{told}'yes'"):
        plan(load_sweep(tmp_path / "sweep.yaml"), tmp_path)
    assert load_config(tmp_path / "run.yaml").env_settings == {"lava": "off"}  # of an old run, say


numbers = st.floats(allow_nan=False) | st.integers(-(2**62), 2**62)
words = st.text() | st.from_regex(r"[-+]?[0-9.:_eE-]+|0[xbo]?[0-9]+", fullmatch=True)


@given(st.dictionaries(st.text(), numbers | st.booleans() | words))
def test_what_is_written_is_read_back(tmp_path_factory, values):
    config = Config.model_construct(env_settings=values)
    path = tmp_path_factory.mktemp("written") / "config.yaml"
    path.write_text(dump_yaml(config, provenance={"commit": "123e4567"}))
    found = read_yaml(path)
    assert repr(found["env_settings"]) == repr(values)
    assert found["provenance"] == {"commit": "123e4567"}
    assert yaml.safe_load(path.read_text()) == found  # nor does another reader see anything else


@given(st.recursive(numbers | st.booleans() | st.none(), lambda x: st.lists(x) | st.dictionaries(
    st.sampled_from(["method", "oversight", "n1"]), x), max_leaves=8))  # fmt: skip
def test_old_files_read_as_before(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("old") / "config.yaml"
    path.write_text(yaml.safe_dump({"x": value}, sort_keys=False))
    assert repr(read_yaml(path)) == repr(yaml.safe_load(path.read_text()))


# ---- threads

PPO = ["--ppo.updates", "1", "--ppo.worlds", "4", "--ppo.steps", "16", "--ppo.batch-size", "16"]
PPO += ["--agent.hidden", "8", "--evaluation.episodes", "50", *SMALL[-6:]]


@pytest.fixture
def threads(monkeypatch):
    """How many threads torch was told to use at each update and evaluation.

    It is not really told: on a busy machine two threads wait for each other for ages.
    """
    seen, told = [], [7]
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: told[-1])

    def watch(owner, name):
        honest = getattr(owner, name)

        def watched(*args, **more):
            seen.append(torch.get_num_threads())
            return honest(*args, **more)

        monkeypatch.setattr(owner, name, watched)

    watch(ReinforceLearner, "update")
    watch(RoutedPPO, "train")
    watch(Evaluator, "evaluate")
    yield seen
    assert told[-1] == 7


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), on_threads(before + 1):
        raise KeyError
    assert torch.get_num_threads() == before
    with on_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("algo", ["reinforce", "ppo"])
def test_a_run_uses_the_threads_that_its_settings_say(tmp_path, threads, algo):
    path = tmp_path / "run"
    args = SMALL if algo == "reinforce" else [*SMALL[2:5], "--algo", "ppo", *PPO]
    train([*args, "--run-dir", str(path), "--threads", "2"])
    assert set(threads) == {2}
    threads.clear()
    assert load_config(path / "config.yaml").threads == 2
    main(["evaluate", str(path)])
    assert threads == [2]
    threads.clear()
    train([*args, "--run-dir", str(tmp_path / "plain")])
    assert set(threads) == {1}


def test_a_stopped_run_goes_on_with_its_threads(tmp_path, threads, monkeypatch):
    path, update = tmp_path / "run", ReinforceLearner.update
    with monkeypatch.context() as patch:
        patch.setattr(
            ReinforceLearner, "update", lambda self: update(self) if self.updates < 3 else 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            train([*SMALL, "--run-dir", str(path), "--threads", "2"])
    train(["--resume", str(path)])
    assert (path / "result.json").exists()
    assert set(threads) == {2}


@pytest.mark.parametrize("count", [1, 2])
def test_a_worker_of_a_sweep_uses_as_many(tmp_path, threads, count):
    (tmp_path / "sweep.yaml").write_text(
        "settings: {pictures: off, world: {rows: 3, cols: 3}, reinforce: {updates: 2, worlds: 8}}\n"
        f"grid: {{threads: {count}}}\n"
    )
    (run,) = plan(load_sweep(tmp_path / "sweep.yaml"), tmp_path / "out")
    run.path.parent.mkdir(parents=True)
    work(json.dumps([[str(run.path), run.config.model_dump(mode="json")]]))
    assert set(threads) == {count}


@pytest.mark.parametrize("count", [0, -1, 10**6, 10**30, 1.5, True])
def test_threads_that_cannot_be_are_refused(count):
    with pytest.raises(UserError, match="threads: "):
        Config.model_validate({"threads": count})
