"""The diamond/ghost world as a gymnasium Env, a gymnasium VectorEnv and an SB3 VecEnv.

All three are thin views on `world`; the specification is the docstring of `OversightGridEnv`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from oversight_rl.envs import render
from oversight_rl.envs.settings import ACTIONS, BEHAVIORS, NO_LABEL, PLANES, WorldConfig
from oversight_rl.envs.world import State, Step, World

Reward = Literal["reached", "ground_truth"]
FPS = 4


class OversightGridEnv(gym.Env[Any, Any]):
    """One diamond/ghost world (arXiv 2410.04332, section 4.3).

    Action: `Discrete(4)`: up, right, down, left; a move off the grid leaves the agent in place.

    Observation: `Box(0, 1, (4, rows, cols), float32)`, one-hot planes agent, ghost, diamond and
    the oversight flags (all zero if `flags_visible=False`).

    Reward: with `reward="reached"` (default) what a learner may see: +1 on reaching either square;
    with `reward="ground_truth"`: +1 diamond, -1 ghost. Always 0 on other steps.

    End: terminated on reaching a square, truncated after `max_steps` steps.

    Info at an episode's end: `label` ("diamond" or "ghost") where the square was flagged, and, for
    evaluation only, `behavior` (the square reached, flagged or not; None at a timeout) and
    `ground_truth_reward`.

    Args:
        oversight: chance per episode that each square is flagged.
        reward: see above.
        render_mode: "rgb_array", "ansi" or "human".
        world: settings of `WorldConfig`: `rows`, `cols`, `max_steps`, `flags_visible`, ...
    """

    metadata = {
        "render_modes": ["rgb_array", "ansi", "human"],
        "render_fps": FPS,
    }

    def __init__(
        self,
        oversight: float = 0.1,
        reward: Reward = "reached",
        render_mode: str | None = None,
        **world: Any,
    ) -> None:
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(
                f"render_mode must be one of {self.metadata['render_modes']}, got {render_mode!r}"
            )
        self.world, self.reward = _world(oversight, reward, world)
        self.oversight, self.flags_visible = oversight, self.world.config.flags_visible
        self.ghost_oversight, self.flags = self.world.config.ghost_oversight, _flags(self.world)
        self.has_task = has_task(self.reward)
        self.observation_space, self.action_space = _spaces(self.world)
        self.render_mode = render_mode
        self._state: State | None = None
        self._window: Any = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self._state = _start(self.world, self.np_random, 1)
        self._show()
        return self._observation(), {}

    def step(
        self, action: np.int64
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        if self._state is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        _, step = self.world.step(self._state, _actions([action], 1), self._state)
        self._state = step.last
        info = _infos(step).get(0, {})
        reward = _rewards(step, self.reward).item()
        self._show()
        terminated, truncated = step.seen.terminated.item(), step.seen.truncated.item()
        return self._observation(), reward, bool(terminated), bool(truncated), info

    def _observation(self) -> NDArray[np.float32]:
        assert self._state is not None
        observation: NDArray[np.float32] = self.world.observe(self._state)[0].numpy()
        return observation

    def render(self) -> Any:
        """The current state as an array (`rgb_array`) or text (`ansi`)."""
        if self._state is None:
            raise gym.error.ResetNeeded("call reset() before render()")
        if self.render_mode == "ansi":
            return render.text(self.world.config, self._state[0])
        if self.render_mode == "rgb_array":
            return render.frame(self.world.config, self._state[0])
        return None

    def _show(self) -> None:
        if self.render_mode != "human":
            return
        import pygame  # only a person watching needs it

        assert self._state is not None
        picture = render.frame(self.world.config, self._state[0])
        if self._window is None:
            pygame.display.init()
            self._window = pygame.display.set_mode((picture.shape[1], picture.shape[0]))
            pygame.display.set_caption("OversightGrid")
        self._window.blit(pygame.surfarray.make_surface(picture.swapaxes(0, 1)), (0, 0))
        pygame.event.pump()
        pygame.display.flip()
        pygame.time.wait(1000 // FPS)

    def close(self) -> None:
        if self._window is not None:
            import pygame

            pygame.display.quit()
            self._window = None


class OversightGridVectorEnv(gym.vector.VectorEnv[Any, Any, Any]):
    """Many worlds as a gymnasium VectorEnv, reset in the same step as an episode ends.

    `infos["final_obs"]` and `infos["final_info"]` hold the last observation and the info of ended
    episodes, as gymnasium's own vector environments have it. Arguments as `OversightGridEnv`.
    """

    metadata = {
        "autoreset_mode": AutoresetMode.SAME_STEP,
        "render_modes": ["rgb_array"],
    }

    def __init__(
        self,
        num_envs: int,
        oversight: float = 0.1,
        reward: Reward = "reached",
        render_mode: str | None = None,
        **world: Any,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        self.num_envs = num_envs
        self.world, self.reward = _world(oversight, reward, world)
        self.oversight, self.flags_visible = oversight, self.world.config.flags_visible
        self.single_observation_space, self.single_action_space = _spaces(self.world)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.render_mode = render_mode
        self._state: State | None = None

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self._state = _start(self.world, self.np_random, self.num_envs)
        return self.world.observe(self._state).numpy(), {}

    def step(
        self, actions: Any
    ) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        if self._state is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        fresh = _start(self.world, self.np_random, self.num_envs)
        self._state, step = self.world.step(self._state, _actions(actions, self.num_envs), fresh)
        ended = _infos(step)
        infos: dict[str, Any] = {}
        if ended:
            last = self.world.observe(step.last).numpy()
        for i, info in ended.items():
            infos = self._add_info(infos, {"final_obs": last[i], "final_info": info}, i)
        return (
            self.world.observe(self._state).numpy(),
            _rewards(step, self.reward).numpy().astype(np.float64),
            step.seen.terminated.numpy(),
            step.seen.truncated.numpy(),
            infos,
        )

    def render(self) -> Any:
        """A frame per world, if `render_mode` is "rgb_array"."""
        if self.render_mode is None or self._state is None:
            return None
        return tuple(render.frame(self.world.config, self._state[i]) for i in range(self.num_envs))


class OversightGridVecEnv(VecEnv):
    """Many worlds as a Stable-Baselines3 VecEnv. Arguments as `OversightGridEnv`.

    As SB3 has it, an ended world is reset in the same step; `info["terminal_observation"]` holds
    the old episode's last observation and `info["TimeLimit.truncated"]` whether it was truncated.
    """

    def __init__(
        self,
        num_envs: int,
        oversight: float = 0.1,
        reward: Reward = "reached",
        render_mode: str | None = None,
        **world: Any,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        self.world, self.reward = _world(oversight, reward, world)
        self.oversight, self.flags_visible = oversight, self.world.config.flags_visible
        self.ghost_oversight = self.world.config.ghost_oversight
        self.has_task = has_task(self.reward)
        self.render_mode = render_mode
        super().__init__(num_envs, *_spaces(self.world))
        self.flags = _flags(self.world)
        self._rng = np.random.default_rng()
        self._state: State | None = None
        self._action = torch.zeros(num_envs, dtype=torch.int64)

    def reset(self) -> NDArray[np.float32]:
        if self._seeds[0] is not None:
            self._rng = np.random.default_rng(self._seeds[0])
        self._reset_seeds()
        self._reset_options()
        self._state = _start(self.world, self._rng, self.num_envs)
        observation: NDArray[np.float32] = self.world.observe(self._state).numpy()
        return observation

    def step_async(self, actions: NDArray[Any]) -> None:
        self._action = _actions(actions, self.num_envs)

    def step_wait(self) -> Any:
        if self._state is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        fresh = _start(self.world, self._rng, self.num_envs)
        self._state, step = self.world.step(self._state, self._action, fresh)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        ended = _infos(step)
        if ended:
            last, truncated = self.world.observe(step.last).numpy(), step.seen.truncated.tolist()
        for i, info in ended.items():
            infos[i] = info | {
                "terminal_observation": last[i],
                "TimeLimit.truncated": truncated[i],
            }
        done = step.seen.terminated | step.seen.truncated
        observation = self.world.observe(self._state).numpy()
        return observation, _rewards(step, self.reward).numpy(), done.numpy(), infos

    def get_state(self) -> dict[str, NDArray[Any]]:
        """All that decides the future, as arrays.

        `random` is the state of a PCG64: its 128-bit state and increment as two int64 each, the
        low one first, then `has_uint32` and `uinteger`.
        """
        if self._state is None:
            raise gym.error.ResetNeeded("call reset() first")
        random = self._rng.bit_generator.state
        large = [random["state"][name].to_bytes(16, "little") for name in ("state", "inc")]
        words = np.frombuffer(b"".join(large), "<i8").tolist()
        words += [random["has_uint32"], random["uinteger"]]
        state = {name: value.numpy().copy() for name, value in vars(self._state).items()}
        return state | {"random": np.array(words, np.int64)}

    def set_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from a state of `get_state`, of as many worlds with the same settings.

        Raises:
            ValueError: an array is missing, unknown or not of this batch's shape and type, or
                holds what no world can be in.
        """
        like = _start(self.world, np.random.default_rng(0), self.num_envs)
        wanted = {name: _kind(value.numpy()) for name, value in vars(like).items()}
        wanted |= {"random": "int64[6]"}
        found = {name: _kind(value) for name, value in state.items()}
        if found != wanted:
            raise ValueError(f"expected a state of {wanted}, got {found}")
        random = state["random"].tolist()
        if not _possible(self.world, state) or not (
            random[2] % 2 and random[4] in (0, 1) and 0 <= random[5] < 2**32
        ):
            raise ValueError("no world can be in such a state")
        self._state = State(**{name: torch.from_numpy(state[name].copy()) for name in vars(like)})
        large = state["random"][:4].astype("<i8").tobytes()
        generator = np.random.PCG64()
        generator.state = {
            "bit_generator": "PCG64",
            "state": {
                "state": int.from_bytes(large[:16], "little"),
                "inc": int.from_bytes(large[16:], "little"),
            },
            "has_uint32": random[4],
            "uinteger": random[5],
        }
        self._rng = np.random.Generator(generator)

    def close(self) -> None:
        self._state = None

    def get_images(self) -> Sequence[NDArray[np.uint8] | None]:
        if self._state is None:
            return [None] * self.num_envs
        return [render.frame(self.world.config, self._state[i]) for i in range(self.num_envs)]

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        if list(self._get_indices(indices)) != list(range(self.num_envs)):
            raise ValueError("worlds of one batch share their attributes: set them for all")
        setattr(self, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list[Any]:
        raise AttributeError(f"a batch of worlds has no single world to call {method_name!r} on")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]


def _world(oversight: float, reward: str, world: dict[str, Any]) -> tuple[World, Reward]:
    if reward not in ("reached", "ground_truth"):
        raise ValueError(f"reward must be 'reached' or 'ground_truth', got {reward!r}")
    return World(WorldConfig(**world), oversight), reward  # type: ignore[return-value]


def has_task(reward: Reward) -> bool:
    """Whether a reward says more than that a behavior was reached, so that it is worth learning."""
    return reward != "reached"


def _spaces(world: World) -> tuple[gym.spaces.Box, gym.spaces.Discrete]:
    shape = (len(PLANES), world.config.rows, world.config.cols)
    return gym.spaces.Box(0.0, 1.0, shape, np.float32), gym.spaces.Discrete(len(ACTIONS))


def _flags(world: World) -> NDArray[np.bool_]:
    """Which entries of an observation show oversight flags."""
    flags = np.zeros(world.config.shape, np.bool_)
    flags[PLANES.index("oversight")] = True
    return flags


def _start(world: World, rng: np.random.Generator, n: int) -> State:
    return world.reset(torch.from_numpy(rng.random((n, world.noise_channels), dtype=np.float32)))


def _kind(array: NDArray[Any]) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _possible(world: World, state: Mapping[str, NDArray[Any]]) -> bool:
    """Whether worlds can be in such states within an episode."""
    agent, diamond, ghost = (state[name] for name in ("agent", "diamond", "ghost"))
    flags = [state[name] for name in ("diamond_flag", "ghost_flag", "spurious")]
    spurious, each = flags[2], np.arange(len(agent))
    return bool(
        all(((x >= 0) & (x < world.config.cells)).all() for x in (agent, diamond, ghost))
        and ((agent != diamond) & (agent != ghost) & (diamond != ghost)).all()
        and ((state["time"] >= 0) & (state["time"] < world.config.max_steps)).all()
        and all((x.view(np.uint8) <= 1).all() for x in flags)  # bytes of a file may be others
        and not (spurious.size and (spurious[each, diamond] | spurious[each, ghost]).any())
    )


def check_actions(actions: Any, n: int, choices: int) -> NDArray[np.int64]:
    """Actions as an array `[n]`.

    Raises:
        ValueError: there are not `n` of them, or one is not in `range(choices)`.
    """
    given = np.asarray(actions)
    valid = given.dtype.kind in "iu" and ((given >= 0) & (given < choices)).all()
    if given.shape != (n,) or not valid:
        raise ValueError(f"expected {n} actions from 0 to {choices - 1}, got {actions!r}")
    return given.astype(np.int64)


def _actions(actions: Any, n: int) -> torch.Tensor:
    return torch.from_numpy(check_actions(actions, n, len(ACTIONS)))


def _rewards(step: Step, reward: Reward) -> torch.Tensor:
    return step.truth.reward if reward == "ground_truth" else step.seen.terminated.float()


def _infos(step: Step) -> dict[int, dict[str, Any]]:
    """The info of each world whose episode ended, by its index."""
    ended = (step.seen.terminated | step.seen.truncated).nonzero()[:, 0].tolist()
    infos = {}
    for i in ended:
        info: dict[str, Any] = {"ground_truth_reward": float(step.truth.reward[i])}
        ending, label = int(step.truth.ending[i]), int(step.seen.label[i])
        info["behavior"] = None if ending == NO_LABEL else BEHAVIORS[ending]
        if label != NO_LABEL:
            info["label"] = BEHAVIORS[label]
        infos[i] = info
    return infos
