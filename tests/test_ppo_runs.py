"""PPO runs: the same folders, commands, sweeps and reports as the grid world's."""

import json
import math
import shutil
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from oversight_rl import load_policy
from oversight_rl.agents.steering import keep
from oversight_rl.cli import main, train
from oversight_rl.envs.settings import UserError
from oversight_rl.experiments.oversight.environments import EnvJudge, PPORuns, new_learner
from oversight_rl.experiments.oversight.policies import read
from oversight_rl.kinds import load_config
from oversight_rl.runs import checkpoint
from oversight_rl.runs.folder import RunFolder
from oversight_rl.runs.loop import _Training
from oversight_rl.runs.rows import Facts
from oversight_rl.settings import EvaluationConfig

ROOT = Path(__file__).parent.parent
TINY = """
env: MiniGrid-DiamondGhost-5x5-v0
algo: ppo
oversight: 0.5
device: cpu
pictures: false
agent: {hidden: [8, 8]}
ppo: {updates: 5, worlds: 8, steps: 8, batch_size: 32, epochs: 1}
evaluation: {every: 2, episodes: 32, oversight: [1.0]}
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny):
    path = tmp_path_factory.mktemp("runs") / "run"
    train(["--config", tiny, "--run-dir", str(path), "--pictures"])
    return path


def timeless(path):
    rows = json.loads((path / "result.json").read_text())
    return [{k: v for k, v in row.items() if k != "wall_seconds"} for row in rows]


def tensors(path):
    """Update of the newest checkpoint, and the policy's parameters in it."""
    (saved,) = read(path)
    return checkpoint.updates(path / "checkpoints")[-1], dict(saved.agent.named_parameters())


def test_a_run_leaves_the_same_things_as_the_grids(run):
    rows = json.loads((run / "result.json").read_text())
    named = {(r["policy"], r["greedy"], r["deploy_oversight"]) for r in rows}
    assert {(p, g, x) for p in ("mixture", "diamond", "ghost")
            for g in (False, True) for x in (0.5, 1.0)} <= named  # fmt: skip
    assert sum("=" in row["policy"] for row in rows) == 9  # the steering curve
    for row in rows:
        assert row["evaluator"] == "exact"
        assert row["env_steps"] == 5 * 8 * 8
        assert row["return_se"] == 0
        assert row["optimal_return"] == pytest.approx(0.9287, abs=5e-5)
        assert row["p_diamond"] + row["p_ghost"] + row["p_timeout"] == pytest.approx(1)
    metrics = pd.read_csv(run / "metrics.csv")
    assert metrics["update"].unique().tolist() == [0, 2, 4, 5]
    log = EventAccumulator(str(run), size_guidance={"images": 0})
    log.Reload()
    diamond = EventAccumulator(str(run / "curves/diamond")).Reload()
    assert [e.step for e in diamond.Scalars("evaluation/return")] == [0, 2, 4, 5]
    assert "pictures/rollouts" in log.Tags()["images"]
    assert log.Images("pictures/rollouts")[0].encoded_image_string[:3] == b"GIF"


def test_training_curves_are_written(tmp_path, tiny):
    train(["--config", tiny, "--run-dir", str(tmp_path / "r"), "--ppo.updates", "21",
           "--ppo.steps", "64", "--method", "imputed_routing"])  # fmt: skip
    table = pd.read_csv(tmp_path / "r" / "training.csv")
    assert table["update"].tolist() == [10, 20]
    assert {"loss/value", "loss/gate", "loss/policy_gradient", "endings/labeled_ghost"} <= set(
        table
    )
    assert table["gate/labeled_diamond"].between(0, 1, inclusive="neither").all()
    assert table["reward_model/accuracy_labeled"].between(0.5, 1).all()
    shares = [c for c in table if c.startswith("endings/")]
    assert table[shares].sum(axis=1).tolist() == pytest.approx([1.0, 1.0])


class Asked(Exception):
    pass


def stopped_at_the_third_asking(monkeypatch, arguments):
    """Train until the loop asks whether to stop the third time; its exit code."""
    asked, honest = iter([False, False, True]), _Training.__init__

    def init(self, runs, folders, console, stopping):
        honest(self, runs, folders, console, lambda: next(asked, False))

    with monkeypatch.context() as patch:
        patch.setattr(_Training, "__init__", init)
        with pytest.raises(SystemExit) as stop:
            train(arguments)
    return stop.value.code


def test_a_resumed_classifier_of_endings_goes_on(tiny, tmp_path, monkeypatch):
    arguments = ["--config", tiny, "--method", "imputed_routing", "--run-dir"]
    train([*arguments, str(tmp_path / "whole")])
    stopped_at_the_third_asking(monkeypatch, [*arguments, str(tmp_path / "run")])
    train(["--resume", str(tmp_path / "run")])
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")
    names = {name.split(".")[0] for name in tensors(tmp_path / "run")[1]}
    assert {"agent", "endings", "features_extractor"} <= names


@pytest.mark.parametrize("stop_at", [0, 1, 3])
def test_a_resumed_run_ends_as_the_uninterrupted_one(run, tiny, tmp_path, monkeypatch, stop_at):
    path, honest = tmp_path / "run", _Training._update

    def killed(self):
        if self.learner.updates == stop_at:
            raise Asked
        honest(self)

    monkeypatch.setattr(_Training, "_update", killed)
    with pytest.raises(Asked):
        train(["--config", tiny, "--run-dir", str(path), "--pictures"])
    monkeypatch.undo()
    train(["--resume", str(path)])
    assert (path / "metrics.csv").read_bytes() == (run / "metrics.csv").read_bytes()
    assert timeless(path) == timeless(run)
    (n, ours), (m, theirs) = tensors(path), tensors(run)
    assert n == m
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_asked_to_stop_it_saves_and_goes_on(run, tiny, tmp_path, monkeypatch):
    path = tmp_path / "run"
    arguments = ["--config", tiny, "--run-dir", str(path), "--pictures"]
    assert stopped_at_the_third_asking(monkeypatch, arguments) == 130
    assert checkpoint.updates(path / "checkpoints") == [0, 2]
    train(["--resume", str(path)])
    assert timeless(path) == timeless(run)


def test_seeds_train_one_after_another_as_they_would_alone(run, tiny, tmp_path):
    train(["--config", tiny, "--run-dir", str(tmp_path / "two"), "--seeds", "1", "0", "--pictures"])
    assert timeless(tmp_path / "two" / "seed_0") == timeless(run)
    assert timeless(tmp_path / "two" / "seed_1") != timeless(run)


def test_evaluate_steers_exports_and_draws(run, tmp_path, capsys):
    file = tmp_path / "rows.json"
    arguments = ["evaluate", str(run), "--steer", "diamond", "diamond=0.5,ghost=0.5", "--oversight",
                 "0", "1", "--json", str(file), "--pictures", str(tmp_path / "drawn")]  # fmt: skip
    main(arguments)
    rows = json.loads(file.read_text())
    assert [(r["policy"], r["deploy_oversight"]) for r in rows] == [
        (p, x) for p in ("diamond", "diamond=0.5,ghost=0.5") for x in (0, 1)
    ]
    assert rows[0]["p_diamond_flagged"] == 0
    assert rows[1]["p_diamond_flagged"] == pytest.approx(rows[1]["p_diamond"])
    assert (tmp_path / "drawn" / "rollouts.gif").read_bytes()[:3] == b"GIF"
    assert "return: exact" in capsys.readouterr().out
    main(["evaluate", str(run), "--steer", "diamond", "--export", str(tmp_path / "p.safetensors")])
    main(["evaluate", str(tmp_path / "p.safetensors"), "--json", str(file)])
    (again,) = json.loads(file.read_text())
    wanted = ("diamond", False, 0.5)
    (trained,) = (
        row
        for row in json.loads((run / "result.json").read_text())
        if (row["policy"], row["greedy"], row["deploy_oversight"]) == wanted
    )
    assert again["ground_truth_return"] == trained["ground_truth_return"]


def test_a_run_is_a_policy_that_predicts(run, tmp_path):
    policy = load_policy(run)
    assert policy.steering.name == "diamond"
    env = gym.make("MiniGrid-DiamondGhost-5x5-v0")
    observation, _ = env.reset(seed=0)
    action, _ = policy.predict(observation["image"], deterministic=True)
    assert env.action_space.contains(int(action))
    chances = policy.get_distribution(policy.obs_to_tensor(observation["image"])[0])
    assert action == chances.distribution.probs.argmax()
    main(["evaluate", str(run), "--steer", "ghost", "--export", str(tmp_path / "ghost")])
    exported, ghost = load_policy(tmp_path / "ghost"), policy.steer("ghost")
    assert exported.steering.name == ghost.steering.name == "ghost"
    many = np.stack([observation["image"]] * 100)
    torch.manual_seed(0)
    drawn, _ = ghost.predict(many)
    torch.manual_seed(0)
    assert np.array_equal(exported.predict(many)[0], drawn)


@pytest.mark.parametrize("face", ["exact", "side by side", "one by one"])
def test_figures_agree_with_a_plain_loop(run, face):
    (saved,) = read(run)
    config, facts = saved.config, [Facts("routing", 0, 0.5)]
    many = config.model_copy(update={"evaluation": EvaluationConfig(episodes=2000)})
    judge = EnvJudge(many)
    judge.room = judge.room if face == "exact" else None
    judge.one = judge.one if face != "one by one" else None
    ((row,),) = judge.tables(saved.agent, facts, [keep("diamond", 2)], [[0.5]])
    assert row.evaluator == ("exact" if face == "exact" else "rollout")
    env = gym.make(config.env, oversight=0.5)
    policy, returns, wanted = saved.agent.steer("diamond"), [], 0
    torch.manual_seed(0)
    for seed in range(300):
        observation, _ = env.reset(seed=seed)
        steps, done = 0, False
        while not done:
            action, _ = policy.predict(observation["image"])
            observation, _, terminated, truncated, info = env.step(int(action))
            steps, done = steps + 1, terminated or truncated
        returns.append(0.97 ** (steps - 1) * info.get("ground_truth_reward", 0.0))
        wanted += info.get("behavior") == "diamond"
    found = row.figures
    error = math.hypot(found["return_se"], np.std(returns) / 300**0.5)
    assert abs(found["ground_truth_return"] - np.mean(returns)) < 4 * error
    assert abs(found["p_diamond"] - wanted / 300) < 4 * (0.25 / 300) ** 0.5


def test_sweeps_and_reports_take_ppo_runs(tmp_path, capsys):
    grid = {"method": ["routing", "filtering"], "oversight": [0.5], "seeds": [0, 1]}
    settings = {k: v for k, v in yaml.safe_load(TINY).items() if k != "oversight"}
    sweep = {"settings": settings, "grid": grid}
    (tmp_path / "s.yaml").write_text(json.dumps(sweep))
    main(["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"), "--workers", "2"])
    main(["report", str(tmp_path / "out")])
    summary = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert summary[["method", "n_seeds"]].values.tolist() == [["routing", 2], ["filtering", 2]]
    assert summary["evaluator"].tolist() == ["exact", "exact"]
    assert summary["iqm"].notna().all()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Return against oversight" in page
    assert "next to the paper" not in page  # which has no such world
    assert "Ghosts on the shortest path" not in page
    assert " nan" not in page.lower()


# ---- environments that are not ours


class Lamp(gym.Env):
    """One step; action 1 is wanted. No pictures, no state to save."""

    observation_space = spaces.Box(0, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)
    behaviors = ("on", "off")

    def __init__(self, oversight=0.5):
        self.oversight = oversight

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        name = self.behaviors[1 - int(action)]
        watched = self.np_random.random() < self.oversight
        info = {"behavior": name} | ({"label": name} if watched else {})
        return np.zeros(2, np.float32), 1.0, True, False, info


gym.register("Lamp-v0", Lamp)
LAMP = ["--env", "Lamp-v0", "--algo", "ppo", "--device", "cpu", "--agent.hidden", "8",
        "--ppo.updates", "4", "--ppo.worlds", "4", "--ppo.steps", "8", "--ppo.batch-size", "16",
        "--evaluation.every", "2", "--evaluation.episodes", "16"]  # fmt: skip


def test_any_registered_environment_trains_steers_and_resumes(tmp_path, capsys):
    path = tmp_path / "run"
    train([*LAMP, "--run-dir", str(path)])
    rows = json.loads((path / "result.json").read_text())
    ends = {"p_on", "p_off", "p_timeout", "p_on_flagged", "p_off_flagged"}
    for names in (rows[0], pd.read_csv(path / "metrics.csv")):
        assert {name for name in names if name.startswith("p_")} == ends
        assert not {"window_return", "p_ghost_on_path"} & set(names)
    assert {row["policy"] for row in rows if row["deployed"]} == {"on"}
    log = EventAccumulator(str(path / "curves/on")).Reload()
    tags = {tag.split("/")[1] for tag in log.Tags()["scalars"]}
    assert tags == {"return", "p_on", "p_off", "p_timeout", "steps"}
    assert {row["policy"] for row in rows if "=" not in row["policy"]} == {"mixture", "on", "off"}
    assert "on (deployed)" in capsys.readouterr().out
    main(["evaluate", str(path), "--steer", "on"])
    main(["report", str(tmp_path)])
    (path / "result.json").unlink()
    train(["--resume", str(path)])


class Spoilt(Lamp):
    """A lamp of which a reward, or the start of an episode, is not a number once."""

    def __init__(self, oversight=0.5, what="reward", at=13):
        super().__init__(oversight)
        self.what, self.left = what, at

    def reset(self, **kwargs):
        observation, info = super().reset(**kwargs)
        if self.what == "start" and self.left == 0:
            self.left, observation = -1, observation + np.float32(np.nan)
        return observation, info

    def step(self, action):
        self.left -= 1
        observation, reward, *rest = super().step(action)
        return observation, np.nan if self.what == "reward" and self.left == 0 else reward, *rest


gym.register("Spoilt-v0", Spoilt)
SPOILT = ["--env", "Spoilt-v0", *LAMP[2:], "--evaluation.every", "1", "--no-pictures",
          "--env-settings", "what"]  # fmt: skip
BAD = {"reward": "environment's reward", "start": "policy's output"}


@pytest.mark.parametrize("what", BAD)
def test_an_update_with_a_bad_number_stops_the_run(tmp_path, capsys, what):
    with pytest.raises(SystemExit) as stop:
        train([*SPOILT, what, "--run-dir", str(tmp_path / "run")])
    assert stop.value.code == 2
    (told,) = (x for x in capsys.readouterr().err.splitlines() if not x.startswith("warning: "))
    assert f"update 2: the {BAD[what]} is nan; stopped there" in told
    assert "the checkpoint of update 1 is kept (on_nan: skip" in told
    assert checkpoint.updates(tmp_path / "run/checkpoints") == [0, 1]


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("method", ["routing", "imputed_routing", "reward_model"])
def test_an_update_with_a_bad_number_is_left_out(tmp_path, capsys, what, method):
    """Nothing is learned from it, nor is it remembered in what the next updates learn from."""
    path = tmp_path / "run"
    flags = ["--on-nan", "skip", "--method", method, "--run-dir", str(path)]
    train([*SPOILT, what, *flags])
    assert capsys.readouterr().out.count(f"update 2: the {BAD[what]} is nan; left out") == 1
    assert (path / "result.json").exists()
    config = load_config(path / "config.yaml")
    training = _Training(PPORuns([config]), [], Console(quiet=True), lambda: False)
    for update in (1, 2, 3):
        before = [x.clone() for x in training.learner.learned()]
        training._update()
        after = training.learner.learned()
        same = [torch.equal(x, y) for x, y in zip(before, after, strict=True)]
        assert all(same) == (update == 2)
    state = training.learner.state()
    assert all(x.isfinite().all() for x in state.values())
    assert {"policy.task_square", "adam.step.agent.head.weight"} <= set(state)
    ended = checkpoint.load(path / "checkpoints", 4, state)[0]
    training._update()
    assert all(torch.equal(x, ended[name]) for name, x in training.learner.state().items())


def named(*behaviors):
    """A lamp whose behaviors have these names."""
    return type("Named", (Lamp,), {"behaviors": behaviors})


@pytest.mark.parametrize(
    "behaviors", [("on", "timeout"), ("on", "on_flagged"), ("on", "off\nand on")]
)
def test_behaviors_after_which_figures_cannot_be_named_are_refused(
    tmp_path, capsys, monkeypatch, behaviors
):
    monkeypatch.setitem(gym.registry, "Named-v0", EnvSpec("Named-v0", named(*behaviors)))
    with pytest.raises(SystemExit) as stop:
        train(["--env", "Named-v0", *LAMP[2:], "--run-dir", str(tmp_path / "run")])
    assert stop.value.code == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert "behaviors must give figures names of their own" in told
    assert not (tmp_path / "run").exists()


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--env", "MiniGrid-DiamondGhost-8x8-v0"], "needs --algo ppo"),
        (["--algo", "ppo", "--env", "MiniGrid-DiamondGhost-8x9-v0"],
         "did you mean 'MiniGrid-DiamondGhost-8x8-v0'"),
        (["--algo", "ppo", "--env", "CartPole-v1"], "oversight"),
        (["--algo", "ppo", "--env", "os:CartPole-v1"], "must be an id that gymnasium knows"),
        (["--algo", "ppo", "--method", "naive_early_stop"], "with --algo ppo must be one of"),
        (["--algo", "ppo", "--reinforce.steps", "9"], "reinforce: not used with --algo ppo"),
        (["--ppo.steps", "9"], "ppo: not used with --algo reinforce, whose settings"),
        (["--env", "MiniGrid-DiamondGhost-5x5-v0", "--algo", "ppo", "--world.rows", "4"],
         "world: is OversightGrid-v0's"),
        (["--env", "MiniGrid-DiamondGhost-5x5-v0", "--algo", "ppo",
          "--env-settings", "oversight", "0.2"], "env_settings: leave that to oversight"),
        (["--algo", "ppo", "--ppo.worlds", "4096", "--ppo.steps", "8192"], "at most 16,777,216"),
        (["--algo", "ppo", "--agent.hidden", "16384", "16384"], "parameters"),
        (["--algo", "ppo", "--ppo.worlds", "0"], "ppo.worlds"),
        (["--algo", "ppo", "--agent.hidden", "8", "--env", "MiniGrid-DiamondGhost-5x5-v0",
          "--env-settings", "lava", "100"], "no room"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(tmp_path, capsys, arguments, rule):
    with pytest.raises(SystemExit) as stop:
        train([*arguments, "--run-dir", str(tmp_path / "run"), "--device", "cpu"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert rule in line
    assert not (tmp_path / "run").exists()


def test_damaged_checkpoints_are_refused(run, tmp_path, capsys):
    path = tmp_path / "run"
    shutil.copytree(run, path)
    for file in (path / "checkpoints").glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-100] ^= 255
        file.write_bytes(content)
    (path / "result.json").unlink()
    with pytest.raises(UserError, match="damaged"):
        checkpoint_of_all(path)


def checkpoint_of_all(path):
    like = new_learner(load_config(path / "config.yaml")).state()
    newest = checkpoint.updates(path / "checkpoints")[-1]
    return checkpoint.load(path / "checkpoints", newest, like)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("world.agent", 10**6, "no world"),
        ("world.direction", 9, "no world"),
        ("world.tiles", 0, "no world"),
        ("last.observation", 250, "cannot be"),
        ("memory.observation", 250, "cannot be"),
        ("memory.label", 7, "cannot be"),
    ],
)
def test_forged_checkpoints_are_refused(run, tmp_path, capsys, name, value, rule):
    path = tmp_path / "run"
    shutil.copytree(run, path)
    (path / "result.json").unlink()
    tensors, facts = checkpoint_of_all(path)
    tensors[name] = torch.full_like(tensors[name], value)
    newest = facts.pop("update")
    checkpoint.drop_after(path / "checkpoints", -1)
    checkpoint.save(path / "checkpoints", newest, tensors, facts)
    with pytest.raises(SystemExit) as stop:
        train(["--resume", str(path)])
    assert stop.value.code == 2
    assert rule in capsys.readouterr().err


def test_numbers_that_go_bad_stop_the_run(tiny, tmp_path, capsys):
    args = ["--config", tiny, "--run-dir", str(tmp_path / "r"), "--method", "routing"]
    with pytest.raises(SystemExit) as stop:
        train([*args, "--ppo.learning-rate", "1e12"])
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert "update 2: the policy's output is nan; stopped" in told  # 1 has one minibatch
    assert checkpoint.updates(tmp_path / "r" / "checkpoints") == [0]


def test_numbers_that_go_bad_at_once_begin_no_run(tiny, tmp_path, capsys):
    args = ["--config", tiny, "--run-dir", str(tmp_path / "r"), "--method", "routing"]
    with pytest.raises(SystemExit) as stop:
        train([*args, "--ppo.learning-rate", "1e30"])
    assert stop.value.code == 2
    assert "no first update (the parameters' norm is not finite)" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


class Ends(gym.Env):
    """Every episode ends in one of three behaviors, and none by a limit."""

    behaviors = ("right", "left", "down")
    observation_space, action_space = spaces.Box(0, 1, (1,), np.float32), spaces.Discrete(2)

    def __init__(self, oversight=1.0, fails=10**9, errs=10**9):
        self.oversight, self.fails, self.errs = oversight, fails, errs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.fails -= 1
        if self.fails == 0:
            raise RuntimeError("the simulator broke")
        behavior = self.behaviors[self.np_random.integers(3)]
        self.errs -= 1
        info = {"behavior": behavior, "label": behavior if self.errs else "rigth"}
        return np.zeros(1, np.float32), 0.0, True, False, info


@pytest.fixture
def ends():
    gym.register("Ends-v0", Ends)
    yield
    del gym.registry["Ends-v0"]


ENDS = ["--env", "Ends-v0", "--algo", "ppo", "--oversight", "1", "--ppo.updates", "5",
        "--ppo.worlds", "4", "--ppo.steps", "16", "--ppo.batch-size", "32", "--agent.hidden", "8",
        "--device", "cpu", "--no-pictures", "--run-dir"]  # fmt: skip


def test_runs_of_which_no_episode_times_out_are_read(ends, tmp_path, capsys):
    train([*ENDS, str(tmp_path / "r"), "--evaluation.episodes", "49"])
    rows = RunFolder.open(tmp_path / "r").result()
    assert len(rows) > 8
    assert {row.figures["p_timeout"] for row in rows} == {0.0}
    shown = capsys.readouterr().out
    assert {"right", "left", "down", "timeout"} <= set(shown.split())
    assert "diamond" not in shown
    assert "-0.0%" not in shown


def test_an_environment_that_breaks_later_says_how_to_go_on(ends, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train([*ENDS, str(tmp_path / "r"), "--evaluation.episodes", "40", "--env-settings",
               "fails", "50"])  # fmt: skip
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert "step failed (RuntimeError: the simulator broke" in told
    assert f"go on with --resume {tmp_path / 'r'}" in told


def test_an_environment_that_errs_later_is_told_of_in_one_line(ends, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train([*ENDS, str(tmp_path / "r"), "--evaluation.episodes", "40", "--env-settings",
               "errs", "50"])  # fmt: skip
    assert stop.value.code == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert "must be one of right, left, down" in told
    assert "got 'rigth'; did you mean 'right'?" in told
    assert told.endswith(f"stopped there, go on with --resume {tmp_path / 'r'}")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("env", ["OversightGrid-v0", "MiniGrid-DiamondGhost-5x5-v0"])
def test_a_gpu_trains_evaluates_and_leaves_updates_out(tiny, tmp_path, env):
    path = tmp_path / "r"
    train(["--config", tiny, "--env", env, "--device", "cuda", "--on-nan", "skip", "--run-dir",
           str(path)])  # fmt: skip
    main(["evaluate", str(path)])
    assert RunFolder.open(path).finished
