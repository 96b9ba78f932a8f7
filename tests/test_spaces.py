"""What RoutedPPO takes of what SB3's PPO takes, and the table of it in docs/environments.md."""

import io
import re
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import onnxruntime
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import FilterObservation, FlattenObservation, TimeLimit
from minigrid.wrappers import ImgObsWrapper, RGBImgPartialObsWrapper
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.torch_layers import CombinedExtractor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnvWrapper,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)

import oversight_rl.envs  # noqa: F401  (registers the ids)
from oversight_rl import RoutedPPO, SteeredEvalCallback
from oversight_rl.agents import memory
from oversight_rl.agents.ppo import algorithm, losses
from oversight_rl.agents.ppo.extractors import EntryExtractor, SymbolicCNN
from oversight_rl.agents.ppo.observations import (
    as_rows,
    flags_found,
    from_rows,
    named,
    row_type,
    row_width,
    unnamed,
)
from oversight_rl.cli import train
from oversight_rl.envs.labels import OversightLabels
from oversight_rl.envs.vector import make_vec

PAGE = Path(__file__).parent.parent / "docs" / "environments.md"
EMPTY, OURS = "MiniGrid-Empty-5x5-v0", "MiniGrid-DiamondGhost-5x5-v0"
pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")


def box(*shape, low=-1, high=1, dtype=np.float32):
    return spaces.Box(low, high, shape, dtype)


def picture(*shape):
    return box(*shape, low=0, high=255, dtype=np.uint8)


VECTOR, TWO = box(3), spaces.Discrete(2)
MIXED = {"img": picture(36, 36, 1), "vec": box(2), "discrete": spaces.Discrete(4)}
FEW = {"a": VECTOR, "b": spaces.MultiDiscrete([3, 2]), "c": box(2, low=0, high=9, dtype=np.uint16)}


class World(gym.Env):
    """Random observations; episodes of three steps, of a behavior that is labeled half the time."""

    behaviors, oversight = ("good", "bad"), 0.5

    def __init__(self, observation=VECTOR, action=TWO):
        self.observation_space, self.action_space = observation, action

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action, self.action_space.dtype)[()])
        self.time += 1
        ends, name = self.time == 3, self.behaviors[int(self.np_random.random() < 0.5)]
        info = {"behavior": name} if ends else {}
        if ends and self.np_random.random() < 0.5:
            info["label"] = name
        return self.observation_space.sample(), 1.0, ends, False, info


def many(make, count=2):
    return DummyVecEnv([make] * count)


def tiny(env, **more):
    sizes = {"n_steps": 8, "batch_size": 16, "n_epochs": 1, "seed": 0}
    return RoutedPPO("MoEPolicy", env, **(sizes | {"policy_kwargs": {"net_arch": [8]}} | more))


def trained(env, **more):
    """A model after two rollouts, which steers, saves, loads and acts."""
    model = tiny(env, **more)
    model.learn(2 * 8 * model.n_envs)
    observation, (wanted, unwanted) = model.env.reset(), model.behaviors[:2]
    for text in ("mixture", unwanted, f"without:{wanted}"):
        actions, _ = model.steer(text).predict(observation)
        assert len(actions) == model.n_envs
        assert all(model.action_space.contains(action) for action in actions)
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    loaded = RoutedPPO.load(file, env=model.env)
    again, first = (
        m.steer(wanted).predict(observation, deterministic=True)[0] for m in (loaded, model)
    )
    assert np.array_equal(again, first)
    loaded.learn(8 * model.n_envs)
    return model


def observed(*seen):
    return [lambda space=space: World(observation=space) for space in seen]


def acted(*taken):
    return [lambda space=space: World(action=space) for space in taken]


class Foreign(VecEnvWrapper):
    """As SuperSuit's for PettingZoo: set up without SB3's constructor, over what is no VecEnv."""

    class Base:
        def __init__(self, venv):
            self._reset, self.close = venv.reset, venv.close
            self.step_async, self.step_wait = venv.step_async, venv.step_wait

        def reset(self):
            return self._reset(), [{}, {}]

        @property
        def unwrapped(self):
            return self

    def __init__(self, venv):
        self.venv = self.Base(venv)
        self.num_envs, self.render_mode = venv.num_envs, None
        self.observation_space, self.action_space = venv.observation_space, venv.action_space

    def reset(self):
        return self.venv.reset()[0]

    def step_wait(self):
        observations, rewards, dones, infos = self.venv.step_wait()
        return observations, rewards, dones.astype(np.uint8), infos

    def get_attr(self, attr_name, indices=None):
        return self.venv.get_attr(attr_name)

    def getattr_recursive(self, name):
        raise AttributeError(name)

    def getattr_depth_check(self, name, already_found):
        return None


def dictionaries():
    return World(spaces.Dict(FEW))


def stacked_by_name():
    env = DummyVecEnv([lambda: SimpleMultiObsEnv(channel_last=True)])
    return VecFrameStack(env, 3, channels_order={"vec": None, "img": "last"})


INTEGERS = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64, bool]
SHIFTED = spaces.Discrete(5, start=3)
NO = {"behaviors": ("good", "bad")}  # for environments that say nothing

ROWS = {  # each row of the page's table: environments and their arguments
    "`Box` of float16, float32, float64, bounded or not": observed(
        *(box(3, dtype=kind) for kind in (np.float16, np.float32, np.float64)),
        box(3, low=-np.inf, high=np.inf),
    ),
    "`Box` of bool, int8 to int64, uint8 to uint64": observed(
        *(box(3, low=0, high=1 if k is bool else 100, dtype=k) for k in INTEGERS)
    ),
    "`Box` of several axes": observed(box(4, 3), box(2, 2, 2, 2)),
    "`Box` of shape `()`": observed(box()),
    "`Box` with no numbers": observed(box(0)),
    "`Discrete`": observed(spaces.Discrete(5), spaces.Discrete(300)),
    "`MultiDiscrete`, `MultiBinary`": observed(
        spaces.MultiDiscrete([4, 3]), spaces.MultiBinary(8), spaces.MultiBinary((3, 2))
    ),
    "`MultiDiscrete` of two axes": observed(spaces.MultiDiscrete([[4, 3], [2, 2]])),
    "`Discrete`, `MultiDiscrete` with a start": observed(
        SHIFTED, spaces.MultiDiscrete([4, 3], start=[1, 0]), spaces.Dict({"a": SHIFTED})
    ),
    "images, channels first or last": [
        *observed(picture(36, 36, 3), picture(3, 36, 36)),
        lambda: many(lambda: World(picture(36, 36, 3))),
        lambda: VecTransposeImage(many(lambda: World(picture(36, 36, 3)))),
        lambda: (FakeImageEnv(screen_height=40, screen_width=40), NO),
    ],
    "images below 36 pixels, of floats, or with channels in the middle": [
        *observed(picture(32, 32, 3), picture(1, 10, 10), box(36, 36, 3, low=0, high=255)),
        *observed(picture(40, 3, 40)),
        lambda: many(lambda: World(picture(32, 32, 3))),
    ],
    "grids of symbols": [
        *observed(box(5, 5, 2, low=0, high=3, dtype=np.uint8)),
        lambda: many(lambda: World(box(5, 5, 2, low=0, high=3, dtype=np.uint8))),
    ],
    "`Dict` of these": [
        *observed(spaces.Dict(MIXED), spaces.Dict(MIXED | {"img": picture(1, 36, 36)})),
        *observed(spaces.Dict(FEW), spaces.Dict({"a": VECTOR, "b": box(2, dtype=np.float64)})),
        *observed(spaces.Dict({"small": picture(8, 8, 3), "n": spaces.Discrete(4)})),
        lambda: (BitFlippingEnv(n_bits=4), NO),
    ],
    "`Dict` with a text": observed(spaces.Dict(FEW | {"note": spaces.Text(5)})),
    "`Dict` of nothing else, or of nothing": observed(
        spaces.Dict({"note": spaces.Text(5)}), spaces.Dict({})
    ),
    "`Dict` in a `Dict`": observed(spaces.Dict({"a": spaces.Dict({"b": TWO})})),
    "`Dict` of images first and last": observed(
        spaces.Dict({"a": picture(1, 36, 36), "b": picture(36, 36, 1)})
    ),
    "`Tuple`, `Text`, `Graph`, `Sequence`, `OneOf`": observed(
        spaces.Tuple([TWO, VECTOR]), spaces.Text(5), spaces.Graph(box(2), None),
        spaces.Sequence(box(2)), spaces.OneOf([TWO, VECTOR]),
    ),
    "actions: `Discrete`, `MultiDiscrete`, `MultiBinary`": acted(
        spaces.Discrete(1), spaces.Discrete(300), spaces.MultiDiscrete([2, 3]),
        spaces.MultiBinary(3),
    ),
    "actions: `Box` of floats, of any shape": acted(
        box(2), box(2, 3), box(), box(2, dtype=np.float64), box(2, dtype=np.float16),
        box(3, low=0), box(3, low=-1000, high=1000), box(2, low=1, high=1),
    ),
    "actions: `Box` of integers": acted(box(2, low=-5, high=5, dtype=np.int32)),
    "actions: `Box` without bounds": acted(box(2, low=-np.inf), box(2, high=np.inf)),
    "actions: `Discrete`, `MultiDiscrete` with a start (SB3 sends wrong ones)": acted(
        SHIFTED, spaces.Discrete(3, start=-1), spaces.MultiDiscrete([2, 3], start=[1, 1])
    ),
    "actions: `MultiDiscrete`, `MultiBinary` of two axes": acted(
        spaces.MultiDiscrete([[2, 3], [2, 2]]), spaces.MultiBinary((2, 3))
    ),
    "actions: `Tuple`, `Dict`, `Text`": acted(
        spaces.Tuple([TWO, TWO]), spaces.Dict({"a": TWO}), spaces.Text(3)
    ),
    "MiniGrid's dictionary": [
        lambda: (gym.make(EMPTY), NO),
        lambda: (RGBImgPartialObsWrapper(gym.make(EMPTY), tile_size=6), NO),
        lambda: (EMPTY, NO | {"n_envs": 2}),
    ],
    "`DummyVecEnv`, `VecMonitor`, `VecCheckNan`": [
        lambda: VecMonitor(many(World)), lambda: VecCheckNan(many(dictionaries)),
    ],
    "`SubprocVecEnv`": [lambda: SubprocVecEnv([dictionaries] * 2, start_method="fork")],
    "`VecNormalize`": [
        lambda: VecNormalize(many(World)),
        lambda: VecNormalize(many(dictionaries), norm_obs_keys=["a"]),
        lambda: VecNormalize(many(lambda: World(spaces.Dict(MIXED))), norm_obs_keys=["img"]),
    ],
    "`VecFrameStack`": [
        lambda: VecFrameStack(many(World), 2),
        lambda: VecFrameStack(many(lambda: World(picture(40, 40, 1))), 4),
        lambda: (stacked_by_name(), NO),
    ],
    "`VecExtractDictObs`, `FilterObservation`, `FlattenObservation`": [
        lambda: VecExtractDictObs(many(dictionaries), "a"),
        lambda: FilterObservation(dictionaries(), ["a", "b"]),
        lambda: FlattenObservation(dictionaries()),
    ],
    "VecEnvs that are not SB3's (SuperSuit)": [
        lambda: (Foreign(many(lambda: TimeLimit(World(), 2))), NO | {"seed": None})
    ],
}  # fmt: skip


def test_environments_that_take_no_seed_are_told_of():
    with pytest.raises(ValueError, match="seed: these environments cannot be seeded"):
        RoutedPPO("MoEPolicy", Foreign(many(World)), **NO | {"seed": 0})


def page_rows():
    """Outcome of each row of the page's table of spaces."""
    page = PAGE.read_text()
    table = re.search(r"\| space or wrapper \| outcome \|\n\| --- \| --- \|\n((?:\|.*\n)+)", page)
    return dict(line.strip("| ").split(" | ") for line in table[1].splitlines())


@pytest.mark.filterwarnings("ignore:.*is left out of the observations", "ignore:Treating image")
@pytest.mark.parametrize("row", ROWS)
def test_the_pages_table_of_spaces_is_right(row, monkeypatch):
    monkeypatch.setattr(memory, "CAPACITY", 64)  # a memory of images is long in saving,
    monkeypatch.setattr(algorithm, "ENDINGS", 8)  # and a lesson from it in reading
    monkeypatch.setattr(losses, "LESSONS", 1)
    outcome = page_rows()[row]
    for make in ROWS[row]:
        made = make()
        env, more = made if isinstance(made, tuple) else (made, {})
        if outcome.startswith("refused: "):
            with pytest.raises(ValueError, match=re.escape(outcome.removeprefix("refused: "))) as e:
                tiny(env, **more)
            assert "\n" not in str(e.value)
            continue
        assert outcome.startswith("trains")
        model = trained(env, gate_replay=8, **more)
        model.env.close()


def test_the_pages_table_has_all_rows():
    assert list(page_rows()) == list(ROWS)


# ---- dictionaries


class Matching(gym.Env):
    """One step: the good action is the one that an entry of the observation names."""

    observation_space = spaces.Dict({"noise": box(2), "which": spaces.Discrete(2)})
    action_space, behaviors, oversight = TWO, ("good", "bad"), 0.5

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.which = int(self.np_random.integers(2))
        return self._seen(), {}

    def _seen(self):
        noise = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return {"noise": noise, "which": self.which}

    def step(self, action):
        name = self.behaviors[int(action != self.which)]
        info = {"behavior": name} | ({"label": name} if self.np_random.random() < 0.5 else {})
        return self._seen(), 0.0, True, False, info


def test_experts_learn_from_an_entry_of_a_dictionary():
    model = tiny(many(Matching, 16), n_steps=32, batch_size=128, n_epochs=4)
    model.learn(16 * 32 * 16)
    seen = {"noise": np.zeros((2, 2), np.float32), "which": np.array([0, 1])}
    for name, actions in {"good": [0, 1], "bad": [1, 0]}.items():
        assert model.steer(name).predict(seen, deterministic=True)[0].tolist() == actions


class Seeded(World):
    """Observations that a seed repeats, in a dictionary or not."""

    def __init__(self, by_name):
        super().__init__(spaces.Dict({"vec": VECTOR}) if by_name else VECTOR)
        self.by_name = by_name

    def reset(self, *, seed=None, options=None):
        _, info = super().reset(seed=seed)
        return self._seen(), info

    def step(self, action):
        return self._seen(), *super().step(action)[1:]

    def _seen(self):
        vector = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        return {"vec": vector} if self.by_name else vector


@pytest.mark.parametrize("method", ["imputed_routing", "contrastive_routing", "filtering"])
def test_a_dictionary_of_a_vector_is_learned_from_as_the_vector(method):
    """SB3's `test_consistency`, to the bit: every loss, memory and value reads the same numbers."""
    learned = []
    for by_name in (False, True):
        model = tiny(many(lambda by_name=by_name: TimeLimit(Seeded(by_name), 5)), method=method)
        model.learn(8 * 2 * 8)
        learned.append(model.policy.state_dict())
        assert not model.memory or int(model.memory.count)
    flat, named = learned
    assert flat.keys() == named.keys()
    assert all(torch.equal(flat[name], named[name]) for name in flat)


def test_flags_that_are_found_stand_in_their_entries():
    """By their place in a row, and none of them where a number only names a category."""
    space = spaces.Dict(
        a=spaces.Box(0, 1, (2, 2)), b=spaces.Discrete(4), c=spaces.MultiBinary(3),
        d=spaces.MultiDiscrete([2, 3]),
    )  # fmt: skip
    telling = torch.zeros(1, row_width(space), dtype=torch.bool)
    telling[0, [1, 4, 7, 8]] = True  # row by row: a's second, b, c's last, d's first
    found = flags_found(telling, space)
    assert {name: part[0].tolist() for name, part in found.items()} == {
        "a": [[False, True], [False, False]], "b": [False], "c": [False, False, True],
        "d": [False, False],
    }  # fmt: skip


def test_rows_hold_what_observations_were_made_of_them():
    space = spaces.Dict(MIXED | FEW | {"bits": spaces.MultiBinary((2, 2))})
    space.seed(0)
    samples = [space.sample() for _ in range(5)]
    batch = {name: np.stack([sample[name] for sample in samples]) for name in space}
    batch["discrete"] = batch["discrete"][:, None]  # as SB3's buffers keep it
    rows = torch.as_tensor(as_rows(batch))
    assert rows.shape == (5, row_width(space))
    back = from_rows(rows.to(row_type(space)), space)
    assert list(back) == list(space)
    for name, part in back.items():
        assert np.array_equal(part.numpy(), batch[name].astype(part.numpy().dtype))
    assert row_type(spaces.Dict({"img": picture(4, 4, 3), "n": spaces.Discrete(9)})) is torch.uint8
    assert row_type(FEW["c"]) is torch.int32


@pytest.mark.parametrize("kept", [np.ones(2), {"a.b": np.ones(2), "since": np.zeros(3)}])
def test_observations_keep_their_names_in_files(kept):
    saved = named("last", kept) | {"since": np.zeros(1), "lasting": np.zeros(1)}
    found = unnamed("last", saved)
    assert str(found) == str(kept)


def test_entries_have_the_extractors_that_they_would_have_alone():
    seen = {"img": picture(3, 36, 36), "small": picture(3, 8, 8), "vec": VECTOR,
            "symbols": box(5, 5, 2, low=0, high=3, dtype=np.uint8)}  # fmt: skip
    extractor = tiny(many(lambda: World(spaces.Dict(seen)))).policy.features_extractor
    assert isinstance(extractor, EntryExtractor)
    assert isinstance(extractor.extractors["symbols"], SymbolicCNN)
    plain = {name: seen[name] for name in ("img", "vec")}
    ours, sb3s = EntryExtractor(spaces.Dict(plain)), CombinedExtractor(spaces.Dict(plain))
    assert str(ours.extractors) == str(sb3s.extractors)
    assert ours.features_dim == sb3s.features_dim
    for space, kind in ((spaces.Dict(seen), EntryExtractor), (spaces.Dict(plain), EntryExtractor)):
        cnn = kind(space, cnn_output_dim=32)
        batch = {name: torch.zeros(2, *part.shape) for name, part in space.items()}
        assert cnn(batch).shape == (2, cnn.features_dim)


FLAGGED = spaces.Dict({"img": picture(36, 36, 3), "lamps": spaces.MultiBinary(2), "vec": VECTOR})


def flagged(flags):
    class Flagged(World):
        pass

    Flagged.flags = flags
    return many(lambda: Flagged(FLAGGED))


def test_flags_of_a_dictionary_hide_the_entries_that_they_name():
    shown = np.zeros((36, 36, 3), bool)
    shown[0, 1, 2] = True
    policy = tiny(flagged({"lamps": np.ones(2, bool), "img": shown})).policy
    seen = {name: torch.zeros(1, *space.shape) for name, space in policy.observation_space.items()}
    action = torch.zeros(1, dtype=torch.long)

    def told(**changed):
        return policy.behavior_log_probabilities(seen | changed, action)

    lit, other = seen["img"].clone(), seen["img"].clone()
    lit[0, 2, 0, 1], other[0, 1, 0, 2] = 255, 255  # channels first, as the policy sees them
    assert torch.equal(told(), told(lamps=torch.ones(1, 2), img=lit))
    assert not torch.equal(told(), told(img=other))
    assert not torch.equal(told(), told(vec=torch.ones(1, 3)))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"lamp": np.ones(2, bool)}, "did you mean 'lamps'"),
        ({"lamps": np.ones(3, bool)}, r"flags have shape \(3,\), its observations \(2,\)"),
        (np.ones(2, bool), "must be a dictionary of boolean arrays"),
    ],
)
def test_flags_that_fit_no_entry_are_refused(flags, words):
    with pytest.raises(ValueError, match=words):
        tiny(flagged(flags))


def test_a_dictionary_trains_into_a_run_folder_and_goes_on(tmp_path):
    class Registered(Matching):
        observation_space = spaces.Dict(
            {"observation": box(2), "which": spaces.Discrete(2), "note": spaces.Text(9)}
        )

        def __init__(self, oversight=0.5):
            self.oversight = oversight

        def _seen(self):
            seen = super()._seen()
            return {"observation": seen["noise"], "which": seen["which"], "note": "hello"}

    gym.register("Matching-v0", entry_point=Registered)
    folder = str(tmp_path / "run")
    small = ["--ppo.worlds", "4", "--ppo.steps", "8", "--ppo.updates", "2", "--evaluation.every",
             "1", "--evaluation.episodes", "8", "--oversight", "0.5"]  # fmt: skip
    try:
        with pytest.warns(UserWarning, match="'note' is left out"):
            train(["--env", "Matching-v0", "--algo", "ppo", "--run-dir", folder, *small])
        saved = (tmp_path / "run" / "result.json").read_bytes()
        (tmp_path / "run" / "result.json").unlink()
        for newest in (tmp_path / "run" / "checkpoints").glob("update_00000002.*"):
            newest.unlink()
        with pytest.warns(UserWarning, match="'note' is left out"):
            train(["--resume", folder])
    finally:
        del gym.registry["Matching-v0"]
    assert saved
    assert (tmp_path / "run" / "result.json").exists()


# ---- MiniGrid


def test_a_mission_is_left_out_and_said_once():
    env = RGBImgPartialObsWrapper(gym.make(EMPTY), tile_size=6)
    with pytest.warns(UserWarning, match="it is a text") as caught:
        model = trained(env, **NO)
    said = [str(w.message) for w in caught if "'mission' is left out" in str(w.message)]
    assert len(said) == 2  # by the model, and by the one that was loaded
    observation, _ = env.reset(seed=0)
    assert "mission" in observation  # which does not harm
    assert model.predict(observation)[0].shape == ()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*left out")  # ours is the same every time
        tiny(gym.make(OURS))


@pytest.mark.filterwarnings("ignore:.*is left out of the observations")
@pytest.mark.parametrize("wrap", [ImgObsWrapper, lambda env: env])
def test_symbols_are_symbols_in_processes_and_monitors_too(wrap):
    def make():
        return wrap(gym.make(OURS))

    alone = tiny(make())
    others = [SubprocVecEnv([make] * 2, start_method="fork")]
    others += [VecMonitor(many(make))] if wrap is ImgObsWrapper else []
    for env in others:
        model = tiny(env)
        assert model.observation_space == alone.observation_space
        assert np.array_equal(model.policy.flags, alone.policy.flags)
        assert model.policy.flags.any()
        model.learn(16)
        model.env.close()


def test_a_callback_judges_on_the_dictionary():
    def make():
        return RGBImgPartialObsWrapper(gym.make(OURS, oversight=1.0), tile_size=6)

    with pytest.warns(UserWarning, match="'mission' is left out"):
        model = tiny(make())
    callback = SteeredEvalCallback(Monitor(make()), eval_freq=8, n_eval_episodes=2, verbose=0)
    model.learn(16, callback=callback)
    assert np.isfinite(callback.best_score)


# ---- ONNX


class Exported(torch.nn.Module):
    """The wrapper of SB3's documentation, "Exporting models"."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, observation):
        return self.policy(observation, deterministic=True)


@pytest.mark.filterwarnings("ignore")  # of exporters, about themselves
@pytest.mark.parametrize(
    ("make", "steering", "dynamo"),
    [
        (lambda: many(World), "good", True),
        (lambda: many(World), "good", False),
        (lambda: many(lambda: World(action=box(2, 2))), "good=0.7,bad=0.3", False),
        (lambda: many(lambda: World(action=spaces.MultiDiscrete([2, 3]))), "without:bad", False),
        (lambda: many(lambda: World(action=spaces.MultiBinary(3))), "mixture", False),
        (lambda: many(lambda: World(picture(3, 36, 36))), "bad", False),
        (lambda: make_vec(OURS, 2, oversight=0.5), "ghost", False),
    ],
)
def test_a_steered_policy_exports_to_onnx(make, steering, dynamo, tmp_path):
    model = tiny(make(), method="routing")
    policy, space = model.steer(steering), model.observation_space
    space.seed(0)
    seen = np.stack([space.sample() for _ in range(16)])
    file, first = str(tmp_path / "policy.onnx"), torch.as_tensor(seen[:1]).float()
    torch.onnx.export(
        Exported(policy), first, file, opset_version=17, input_names=["input"], dynamo=dynamo
    )
    session = onnxruntime.InferenceSession(file)
    for observation in seen:
        action, value, _ = session.run(None, {"input": observation[None].astype(np.float32)})
        expected, _ = policy.predict(observation, deterministic=True)
        if isinstance(model.action_space, spaces.Box):  # clipping is left to whoever acts
            action = np.clip(action, -1, 1)
        assert action[0] == pytest.approx(expected, abs=1e-5)
        known = policy.predict_values(torch.as_tensor(observation[None]))
        assert value == pytest.approx(known.detach().numpy(), abs=1e-5)


# ---- what environments say


def test_sb3s_monitors_keep_the_behavior(tmp_path):
    for name in ("OversightGrid-v0", OURS):
        file = str(tmp_path / name)
        env = Monitor(gym.make(name, max_steps=3), file, info_keywords=("behavior",))
        for episode in range(6):
            env.reset(seed=episode)
            while not any(env.step(env.action_space.sample())[2:4]):
                pass
        env.close()
    assert len(load_results(str(tmp_path))) == 12
    for name in ("OversightGrid-v0", OURS):
        file = str(tmp_path / f"many_{name}")
        env = VecMonitor(make_vec(name, 4, max_steps=3), file, info_keywords=("behavior",))
        env.reset()
        infos = [info for _ in range(6) for info in env.step(np.zeros(4, int))[3]]
        ended = [info["episode"]["behavior"] for info in infos if "episode" in info]
        assert len(ended) >= 8
        assert set(ended) <= {None, "diamond", "ghost"}


def test_an_environment_that_says_nothing_is_told_of_after_the_first_rollouts():
    class Says(World):
        def __init__(self, *keys):
            super().__init__()
            self.keys, self.oversight = keys, None

        def step(self, action):
            *rest, info = super().step(action)
            return *rest, {key: info[key] for key in self.keys if key in info}

    causes = {(): "neither label nor behavior", ("behavior",): "a behavior and no label"}
    for keys, cause in causes.items():
        with pytest.warns(UserWarning, match=cause) as caught:
            tiny(many(lambda keys=keys: Says(*keys), 8)).learn(8 * 8 * 3)
        assert len([w for w in caught if "was labeled" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tiny(many(lambda: Says("behavior", "label"), 8)).learn(8 * 8 * 3)


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("Good", "got 'Good'; did you mean 'good'"),
        ("GOOD", "got 'GOOD'; did you mean 'good'"),
        (" good", "got ' good'; did you mean 'good'"),
        (b"bad", "got b'bad'; did you mean 'bad'"),
        (1, "got 1; did you mean 'bad'"),
        (np.int64(0), "did you mean 'good'"),
        (True, "one of good, bad"),
        (np.array(["good"]), "one of good, bad"),
        (["good"], "one of good, bad"),
        ("", "one of good, bad, got ''"),
    ],
)
@pytest.mark.parametrize("key", ["label", "behavior"])
def test_labels_in_a_spelling_of_their_own_are_refused(label, words, key):
    class Spelled(World):
        def step(self, action):
            *rest, info = super().step(action)
            return *rest, info and info | {key: label}

    with pytest.raises(ValueError, match=words):
        tiny(many(Spelled)).learn(16)
    wrapped = OversightLabels(World(), lambda *_: label, 1.0, ("good", "bad"))
    wrapped.reset(seed=0)
    with pytest.raises(ValueError, match=words):
        [wrapped.step(0) for _ in range(3)]


def test_numpys_strings_are_names():
    class Spelled(World):
        def step(self, action):
            *rest, info = super().step(action)
            return *rest, {key: np.str_(name) for key, name in info.items()}

    assert tiny(many(Spelled)).learn(32).rollout_buffer.labels


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"behaviors": "good, bad"}, r"did you mean \('good', 'bad'\)"),
        ({"behaviors": "ab"}, "two or more distinct names, got 'ab'"),
        ({"behaviors": (0, 1)}, "two or more distinct names"),
        ({"behaviors": ("good", "")}, "two or more distinct names"),
        ({"behaviors": None}, "two or more distinct names"),
        ({"behavior_fn": None}, "behavior_fn must be a function of .*, got None"),
        ({"behavior_fn": "good"}, "behavior_fn must be a function"),
        ({"oversight_probability": "0.1"}, "must lie in"),
        ({"oversight_probability": float("nan")}, "must lie in"),
    ],
)
def test_oversight_labels_refuses_what_names_no_behaviors(arguments, words):
    with pytest.raises(ValueError, match=words):
        OversightLabels(World(), **({"behavior_fn": lambda *_: None} | arguments))
    if arguments.get("behaviors"):
        with pytest.raises(ValueError, match=words):
            tiny(many(World), behaviors=arguments["behaviors"])
