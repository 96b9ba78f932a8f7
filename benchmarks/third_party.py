"""What becomes of other people's environments: trained, steered, saved, loaded, evaluated.

    make third-party                                  # in .venv-third-party, with their packages
    python benchmarks/third_party.py Atari MuJoCo     # those whose name has one of these words

Each environment is labeled by `OversightLabels` (PettingZoo's, which are many agents at once, by a
few lines of their own) from the sign of something at an episode's end, and trained by `RoutedPPO`
for a few rollouts. The policy is steered, saved, loaded and judged by SB3's `evaluate_policy`; it
must act the same before and after, and the loaded model goes on learning. Prints a table, and exits
with 1 where one did not do what is expected of it: to train, or to be refused in one line that has
the words given here. One whose package is not installed is listed as that, and is no failure:
`third_party.txt` has the packages. rl_zoo3, which brings a few dozen others, is tried here, too.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecMonitor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from oversight_rl import OversightLabels, RoutedPPO

ENVS, STEPS, LIMIT = 4, 64, 40
"""Steps of a rollout, and of an episode at most; a quarter of them where there are pictures."""
BEHAVIORS = ("wanted", "unwanted")


# ---- what an episode was, of a few generic kinds


def by(sign: Callable[..., float]) -> Callable[..., str]:
    """A behavior function: wanted where a number at the end is above zero."""

    def behavior(env: Any, seen: Any, reward: float, terminated: bool, truncated: bool, info: Any):
        number = sign(env=env, seen=seen, reward=reward, terminated=terminated, info=info)
        return BEHAVIORS[0] if number > 0 else BEHAVIORS[1]

    return behavior


def entry(index: int, key: str | None = None) -> Callable[..., str]:
    """By the sign of an entry of the last observation."""
    return by(lambda seen, **_: np.asarray(seen if key is None else seen[key]).flat[index])


LAST_REWARD = by(lambda reward, **_: reward)
SURVIVAL = by(lambda terminated, **_: 0.0 if terminated else 1.0)
SUCCESS = by(lambda info, **_: info["is_success"])
BRIGHTER_LEFT = by(lambda seen, **_: float(np.subtract(*halves(np.asarray(seen)))))
EVEN = by(lambda seen, **_: int(seen) % 2)


def halves(picture: np.ndarray) -> tuple[float, float]:
    middle = picture.shape[1] // 2
    return picture[:, :middle].mean(), picture[:, middle:].mean()


# ---- a row of the table


@dataclass(frozen=True)
class Case:
    """A row of the table, and what is expected of it."""

    name: str
    run: Callable[[Path], tuple[str, str]]
    """Do it all in an empty folder: the spaces, and the outcome."""
    modules: tuple[str, ...] = ()
    """To import first; where there are none, that is the outcome."""
    refused: str = ""
    """Words of the line that says why it cannot be; empty: it trains."""


def single(
    name: str,
    env_id: str,
    behavior: Callable[..., str],
    *modules: str,
    wrap: Callable[[Any], Any] = lambda env: env,
    stack: int = 0,
    refused: str = "",
    pictures: bool = False,
    alone: bool = False,
    **kwargs: Any,
) -> Case:
    """An environment of Gymnasium's kind, some of them side by side or one alone.

    SB3 puts no texts side by side, as MiniGrid's missions are.
    """

    def one() -> gym.Env[Any, Any]:
        env = wrap(gym.make(env_id, max_episode_steps=LIMIT // 4 if pictures else LIMIT, **kwargs))
        return OversightLabels(env, behavior, 0.5, BEHAVIORS)

    def make() -> Any:
        if alone:
            return one()
        env = make_vec_env(one, n_envs=ENVS, seed=0)
        return VecFrameStack(env, stack) if stack else env

    return Case(name, partial(tried, make, STEPS // 4 if pictures else STEPS), modules, refused)


def agents(name: str, module: str, behavior: Callable[..., str], **kwargs: Any) -> Case:
    """A parallel PettingZoo environment: each agent is an environment of SB3's, by SuperSuit."""

    def make() -> VecEnv:
        import supersuit  # of this case alone
        from pettingzoo.utils import BaseParallelWrapper

        class Labeled(BaseParallelWrapper):  # type: ignore[misc]
            def step(self, actions: Any) -> Any:
                seen, reward, terminated, truncated, infos = super().step(actions)
                for agent in infos:
                    if terminated[agent] or truncated[agent]:
                        was = behavior(
                            self.env, seen[agent], reward[agent], terminated[agent],
                            truncated[agent], infos[agent],
                        )  # fmt: skip
                        infos[agent] = infos[agent] | {"behavior": was, "label": was}
                return seen, reward, terminated, truncated, infos

        env = Labeled(importlib.import_module(module).parallel_env(**kwargs))
        env = supersuit.pettingzoo_env_to_vec_env_v1(env)
        return VecMonitor(
            supersuit.concat_vec_envs_v1(env, 2, num_cpus=1, base_class="stable_baselines3")
        )

    return Case(name, partial(tried, make, STEPS), ("supersuit", module))


def atari(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    return gym.wrappers.AtariPreprocessing(env, frame_skip=1, grayscale_newaxis=True)


def minigrid(name: str) -> Callable[[Any], Any]:
    """One of MiniGrid's wrappers, by its name."""
    return lambda env: getattr(importlib.import_module("minigrid.wrappers"), name)(env)


def partial_pictures(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    return minigrid("ImgObsWrapper")(minigrid("RGBImgPartialObsWrapper")(env))


# ---- what is done with them


class Wrong(Exception):
    """It trained, but is not right."""


def tried(make: Callable[[], Any], steps: int, folder: Path) -> tuple[str, str]:
    """Train, steer, save, load, evaluate; what was seen and acted on, and the outcome."""
    set_random_seed(0)  # as argument of the model it is for environments that have `seed`
    env = make()
    try:
        shown = f"{said(env.observation_space)}; {said(env.action_space)}"
        try:
            model = RoutedPPO(
                "MoEPolicy", env, n_steps=steps, n_epochs=1, gate_replay=64, behaviors=BEHAVIORS
            )
        except (ValueError, AssertionError) as error:
            if "\n" in str(error).strip():
                raise
            return shown, f"refused: {error}"
        model.learn((3 if steps == STEPS else 2) * model.n_steps * model.n_envs)
        observation = model.env.reset()
        before = {}
        for name in ("deployed", "mixture"):
            model.policy = model.steer(name)
            model.save(folder / name)
            before[name] = model.predict(observation, deterministic=True)[0]
        for name, actions in before.items():
            loaded = RoutedPPO.load(folder / name)
            after = loaded.predict(observation, deterministic=True)[0]
            if not np.array_equal(actions, after):
                raise Wrong(f"{name}: other actions when loaded")
        mean, _ = evaluate_policy(model.steer("deployed"), model.env, 2, warn=False)
        if not np.isfinite(mean):
            raise Wrong(f"return {mean}")
        loaded.set_env(env)
        loaded.learn(model.n_steps * model.n_envs)
        labels, episodes = model.rollout_buffer.labels, model.rollout_buffer.episodes
        if not labels:
            raise Wrong(f"none of {episodes} episodes was labeled")
        extractor = type(model.policy.features_extractor).__name__
        return shown, f"trained ({extractor}; {labels} of {episodes} episodes labeled)"
    finally:
        env.close()


def with_rl_zoo3(folder: Path) -> tuple[str, str]:
    """Its `train`, `enjoy` and search on our grid, with `ALGOS["routed_ppo"]`."""
    from rl_zoo3 import ALGOS, enjoy, train  # of this case alone
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_SAMPLER

    ALGOS["routed_ppo"] = RoutedPPO
    HYPERPARAMS_SAMPLER["routed_ppo"] = lambda trial, *_: {
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)
    }
    (folder / "zoo.yml").write_text(
        "OversightGrid-v0: {policy: MoEPolicy, n_timesteps: 1024, n_envs: 8, normalize: true}"
    )
    common = (
        "--algo routed_ppo --env OversightGrid-v0 --gym-packages oversight_rl.envs --device cpu"
    )
    training = f"{common} --conf-file zoo.yml --env-kwargs oversight:0.5 --log-folder logs"
    for run, line in (
        (train.train, f"{training} --eval-freq 256 --save-freq 512"),
        (enjoy.enjoy, f"{common} --folder logs --load-best --no-render -n 100"),
        (train.train, f"{training} -n 512 -optimize --n-trials 2 --n-evaluations 2"
                      " --no-optim-plots"),
    ):  # fmt: skip
        sys.argv = ["", *line.split()]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            run()
    (search,) = Path("logs/routed_ppo").glob("report_*.csv")
    if len(search.read_text().splitlines()) != 3:
        raise Wrong("trials are missing in the report of the search")
    model = RoutedPPO.load("logs/routed_ppo/OversightGrid-v0_1/best_model")
    model.steer("diamond").predict(model.observation_space.sample())
    return "", "trained, loaded, searched"


def said(space: spaces.Space[Any]) -> str:
    """A space in a few characters."""
    if isinstance(space, spaces.Box):
        return f"{space.dtype}[{', '.join(map(str, space.shape))}]"
    if isinstance(space, spaces.Dict):
        return "{" + ", ".join(f"{key}: {said(part)}" for key, part in space.items()) + "}"
    if isinstance(space, spaces.Tuple):
        return f"({', '.join(map(said, space))})"
    return str(space) if isinstance(space, spaces.Discrete) else type(space).__name__


# ---- the environments


FEW_CARS = {  # else a step takes half a second
    "simulation_frequency": 5,
    "policy_frequency": 5,
    "vehicles_count": 3,
    "initial_vehicle_count": 1,
}
CASES = [
    single("CartPole", "CartPole-v1", entry(2)),
    single("Acrobot", "Acrobot-v1", entry(0)),
    single("Pendulum", "Pendulum-v1", entry(1)),
    single("MountainCarContinuous", "MountainCarContinuous-v0", entry(1)),
    single("toy text FrozenLake", "FrozenLake-v1", EVEN),
    single("toy text Taxi", "Taxi-v4", EVEN),
    single("toy text CliffWalking", "CliffWalking-v1", EVEN),
    single("toy text Blackjack", "Blackjack-v1", LAST_REWARD, refused="Tuple"),
    single("Box2D LunarLander", "LunarLander-v3", entry(0), "Box2D"),
    single("Box2D LunarLander, continuous", "LunarLander-v3", entry(0), "Box2D", continuous=True),
    single("Box2D BipedalWalker", "BipedalWalker-v3", entry(2), "Box2D"),
    single("Box2D CarRacing", "CarRacing-v3", BRIGHTER_LEFT, "Box2D", pictures=True),
    single("MuJoCo HalfCheetah", "HalfCheetah-v5", entry(8), "mujoco"),
    single("MuJoCo Hopper", "Hopper-v5", entry(5), "mujoco"),
    single("MuJoCo Humanoid", "Humanoid-v5", entry(22), "mujoco"),
    single("Atari Pong, stacked", "ALE/Pong-v5", BRIGHTER_LEFT, "ale_py", wrap=atari, stack=4,
           frameskip=1, pictures=True),
    single("Atari Breakout, in color", "ALE/Breakout-v5", BRIGHTER_LEFT, "ale_py", pictures=True,
           wrap=lambda env: gym.wrappers.ResizeObservation(env, (84, 84))),
    single("Atari Breakout, RAM", "ALE/Breakout-v5", by(lambda seen, **_: seen[72] - 100.0),
           "ale_py", obs_type="ram"),
    single("highway highway", "highway-v0", SURVIVAL, "highway_env",
           config=FEW_CARS),
    single("highway parking (Dict)", "parking-v0", entry(0, "observation"), "highway_env"),
    single("highway intersection, occupancy grid", "intersection-v2", LAST_REWARD, "highway_env",
           config=FEW_CARS | {"observation": {"type": "OccupancyGrid"}}),
    single("BabyAI GoToRedBall", "BabyAI-GoToRedBall-v0", LAST_REWARD, "minigrid", alone=True),
    single("MiniGrid LavaCrossing, pictures", "MiniGrid-LavaCrossingS9N1-v0", LAST_REWARD,
           "minigrid", wrap=partial_pictures, pictures=True),
    single("MiniGrid Empty, flat", "MiniGrid-Empty-5x5-v0", LAST_REWARD, "minigrid",
           wrap=minigrid("FlatObsWrapper")),
    single("MiniGrid Empty, pictures (Dict)", "MiniGrid-Empty-8x8-v0", LAST_REWARD, "minigrid",
           wrap=minigrid("RGBImgObsWrapper"), pictures=True, alone=True),
    single("robotics FetchReach (Dict)", "FetchReach-v4", SUCCESS, "gymnasium_robotics"),
    single("robotics PointMaze (Dict)", "PointMaze_UMaze-v3", entry(0, "achieved_goal"),
           "gymnasium_robotics"),
    single("robotics AdroitHandDoor", "AdroitHandDoor-v1", entry(0), "gymnasium_robotics"),
    single("panda-gym PandaReach (Dict)", "PandaReach-v3", entry(0, "achieved_goal"), "panda_gym"),
    single("FlappyBird", "FlappyBird-v0", entry(9), "flappy_bird_gymnasium", use_lidar=False),
    agents("PettingZoo simple_spread", "mpe2.simple_spread_v3", entry(2), max_cycles=25),
    agents("PettingZoo multiwalker", "pettingzoo.sisl.multiwalker_v9", entry(0), max_cycles=25),
    agents("PettingZoo pursuit", "pettingzoo.sisl.pursuit_v5", LAST_REWARD, max_cycles=25),
    Case("rl_zoo3: train, enjoy, search", with_rl_zoo3, ("rl_zoo3",)),
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="of the environments' names; none: all")
    chosen = parser.parse_args().words
    wrong = 0
    print("| environment | spaces | outcome | seconds |\n| --- | --- | --- | --- |")
    for case in CASES:
        if chosen and not any(word.lower() in case.name.lower() for word in chosen):
            continue
        start = time.perf_counter()
        shown = trace = ""
        try:
            for module in case.modules:
                importlib.import_module(module)
        except ImportError as error:
            outcome, right = f"not installed: {error}", True
        else:
            try:
                with (
                    warnings.catch_warnings(),
                    tempfile.TemporaryDirectory() as folder,
                    contextlib.chdir(folder),  # where some leave their logs
                ):
                    warnings.simplefilter("ignore")
                    shown, outcome = case.run(Path(folder))
                refused = outcome.startswith("refused")
                right = case.refused in outcome if refused else not case.refused
                right = right and refused == bool(case.refused)
            except Exception as error:
                outcome, right = f"{type(error).__name__}: {error}".splitlines()[0], False
                trace = traceback.format_exc()
        wrong += not right
        seconds = time.perf_counter() - start
        outcome = outcome if right else f"**{outcome}**"
        print(f"| {case.name} | {shown} | {outcome} | {seconds:.0f} |", flush=True)
        print(trace, end="", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
