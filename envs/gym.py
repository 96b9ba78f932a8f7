"""The diamond/ghost world as a gymnasium Env, a gymnasium VectorEnv and an SB3 VecEnv.

All three are thin views on `world`; the specification is the docstring of `OversightGridEnv`. The
VectorEnv is what `gymnasium.make_vec` makes of the id, eighty times as fast as single worlds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from oversight_rl.envs import render
from oversight_rl.envs.overseers import Labels, flags_of
from oversight_rl.envs.settings import ACTIONS, BEHAVIORS, NO_LABEL, PLANES, WorldConfig
from oversight_rl.envs.world import State, Step, World

Reward = Literal["reached", "ground_truth"]


class _View:
    """N worlds in a state: made, asked and stepped alike for all libraries.

    Arguments as `OversightGridEnv`, which become attributes that learners ask for.

    Raises:
        ValueError: an argument is out of range.
    """

    _state: State | None = None

    def __init__(
        self,
        num_envs: int,
        oversight: float = 0.1,
        reward: Reward = "reached",
        render_mode: str | None = None,
        overseer: str | Mapping[str, Any] | Labels = "uniform",
        **world: Any,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        config = WorldConfig(**world)
        self.labels = flags_of(overseer, len(BEHAVIORS))
        self.world = World(config, labels=self.labels)
        self.behaviors, self._n, self.render_mode = BEHAVIORS, num_envs, render_mode
        self.oversight, self.reward = oversight, reward
        self.flags_visible = config.flags_visible
        self.flags = np.zeros(config.shape, np.bool_)  # entries of an observation that show flags
        self.flags[PLANES.index("oversight")] = True

    @property
    def oversight(self) -> Any:
        """The oversight level: a number, or one for each world. It holds from the next start on."""
        return self._oversight

    @oversight.setter
    def oversight(self, level: Any) -> None:
        levels = levels_of(level, self._n)
        self.world.watch(torch.from_numpy(levels))
        self._oversight = levels if levels.ndim else float(levels)

    @property
    def reward(self) -> Reward:
        """What is paid at an episode's end."""
        return self._reward

    @reward.setter
    def reward(self, reward: Reward) -> None:
        self._reward, self.has_task = reward, has_task(reward)

    def _spaces(self) -> tuple[gym.spaces.Box, gym.spaces.Discrete]:
        shape = self.world.config.shape
        return gym.spaces.Box(0.0, 1.0, shape, np.float32), gym.spaces.Discrete(len(ACTIONS))

    def _started(self) -> State:
        if self._state is None:
            raise gym.error.ResetNeeded("call reset() first")
        return self._state

    def _start(self, rng: np.random.Generator) -> State:
        noise = rng.random((self._n, self.world.noise_channels), dtype=np.float32)
        return self.world.reset(torch.from_numpy(noise))

    def _begin(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """Start all worlds; returns their observations."""
        self._state = self._start(rng)
        return self._seen(self._state)

    def _advance(self, actions: Any, rng: np.random.Generator | None) -> tuple[Step, Tensor]:
        """What happened, and rewards `[N]`; ended worlds begin anew, or stay without `rng`."""
        state = self._started()
        chosen = torch.from_numpy(check_actions(actions, self._n, len(ACTIONS)))
        fresh = state if rng is None else self._start(rng)
        following, step = self.world.step(state, chosen, fresh)
        self._state = step.last if rng is None else following
        true = self.reward == "ground_truth"
        return step, step.truth.reward if true else step.seen.terminated.float()

    def _ended(self, step: Step) -> Iterator[tuple[int, dict[str, Any], NDArray[np.float32]]]:
        """Each world whose episode ended: its index, its info, and its last observation."""
        ended = (step.seen.terminated | step.seen.truncated).nonzero()[:, 0]
        if not len(ended):
            return
        last = self._seen(step.last)
        for i in ended.tolist():
            info: dict[str, Any] = {"ground_truth_reward": float(step.truth.reward[i])}
            info["distance"] = int(self.world.distance(step.last.diamond[i], step.last.ghost[i]))
            ending, label = int(step.truth.ending[i]), int(step.seen.label[i])
            info["behavior"] = None if ending == NO_LABEL else BEHAVIORS[ending]
            if label != NO_LABEL:
                info["label"] = BEHAVIORS[label]
            yield i, info, last[i]

    def _seen(self, state: State) -> NDArray[np.float32]:
        observations: NDArray[np.float32] = self.world.observe(state).numpy()
        return observations

    def _frame(self, i: int) -> render.Picture:
        return render.frame(self.world.config, self._started()[i])


class OversightGridEnv(_View, gym.Env[Any, Any]):
    """One diamond/ghost world (arXiv 2410.04332, section 4.3).

    Action: `Discrete(4)`: up, right, down, left; a move off the grid leaves the agent in place.

    Observation: `Box(0, 1, (4, rows, cols), float32)`, one-hot planes agent, ghost, diamond and
    the oversight flags (all zero if `flags_visible=False`).

    Reward: with `reward="reached"` (default) what a learner may see: +1 on reaching either square;
    with `reward="ground_truth"`: +1 diamond, -1 ghost. Always 0 on other steps.

    End: terminated on reaching a square, truncated after `max_steps` steps.

    Info at an episode's end: `label` ("diamond" or "ghost") where the square was flagged, and, for
    evaluation only, `behavior` (the square reached, flagged or not; None at a timeout) and
    `ground_truth_reward`; `distance`, the moves between the squares.

    Args:
        oversight: chance per episode that each square is flagged.
        reward: see above.
        render_mode: "rgb_array", "ansi" or "human".
        overseer: whose `shares` and `region` say which squares are flagged.
        world: settings of `WorldConfig`: `rows`, `cols`, `max_steps`, `flags_visible`, ...
    """

    metadata = {"render_modes": ["rgb_array", "ansi", "human"], "render_fps": render.FPS}

    def __init__(
        self,
        oversight: float = 0.1,
        reward: Reward = "reached",
        render_mode: str | None = None,
        overseer: str | Mapping[str, Any] | Labels = "uniform",
        **world: Any,
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(
                f"render_mode must be one of {self.metadata['render_modes']}, got {render_mode!r}"
            )
        super().__init__(1, oversight, reward, render_mode, overseer, **world)
        self.observation_space, self.action_space = self._spaces()
        self._window: Any = None

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        (observation,) = self._begin(self.np_random)
        self._show()
        return observation, {}

    def step(self, action: np.int64) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        step, reward = self._advance([action], None)
        (observation,) = self._seen(step.last)
        self._show()
        terminated, truncated = step.seen.terminated.item(), step.seen.truncated.item()
        info = next((info for _, info, _ in self._ended(step)), {})
        return observation, reward.item(), bool(terminated), bool(truncated), info

    def render(self) -> Any:
        """The current state as an array (`rgb_array`) or text (`ansi`)."""
        state = self._started()[0]
        if self.render_mode == "ansi":
            return render.text(self.world.config, state)
        return self._frame(0) if self.render_mode == "rgb_array" else None

    def _show(self) -> None:
        if self.render_mode != "human":
            return
        import pygame  # only a person watching needs it

        picture = self._frame(0)
        if self._window is None:
            pygame.display.init()
            self._window = pygame.display.set_mode((picture.shape[1], picture.shape[0]))
            pygame.display.set_caption("OversightGrid")
        self._window.blit(pygame.surfarray.make_surface(picture.swapaxes(0, 1)), (0, 0))
        pygame.event.pump()
        pygame.display.flip()
        pygame.time.wait(1000 // render.FPS)

    def close(self) -> None:
        if self._window is not None:
            import pygame  # as above

            pygame.display.quit()
            self._window = None


class OversightGridVectorEnv(_View, gym.vector.VectorEnv[Any, Any, Any]):
    """Many worlds as a gymnasium VectorEnv, reset in the same step as an episode ends.

    `infos["final_obs"]` and `infos["final_info"]` hold the last observation and the info of ended
    episodes, as gymnasium's own vector environments have it. Arguments as `OversightGridEnv`.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": ["rgb_array"]}

    def __init__(self, num_envs: int, *args: Any, **settings: Any) -> None:
        super().__init__(num_envs, *args, **settings)
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = self._spaces()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._begin(self.np_random), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        step, reward = self._advance(actions, self.np_random)
        infos: dict[str, Any] = {}
        for i, info, last in self._ended(step):
            infos = self._add_info(infos, {"final_obs": last, "final_info": info}, i)
        seen, terminated = self._seen(self._started()), step.seen.terminated.numpy()
        return seen, reward.double().numpy(), terminated, step.seen.truncated.numpy(), infos

    def render(self) -> Any:
        """A frame per world, if `render_mode` is "rgb_array"."""
        if self.render_mode is None or self._state is None:
            return None
        return tuple(self._frame(i) for i in range(self.num_envs))


class Batch(VecEnv):
    """Many worlds that share their attributes and a stream of random numbers.

    `seed` and then `reset` start the stream.
    """

    _frame: Callable[[int], NDArray[np.uint8]]  # draws a world
    _arrays: Callable[[], dict[str, NDArray[Any]]]  # what worlds are in
    _kinds: Callable[[], dict[str, str]]  # types and shapes of those, as of `_kind`
    _possible: Callable[[Mapping[str, NDArray[Any]]], bool]  # whether worlds can be in a state
    _go_on: Callable[[Mapping[str, NDArray[Any]]], None]  # from such arrays
    bits: ClassVar[type[np.random.BitGenerator]]  # kind of stream
    oversight: Any  # a number, or one for each world
    watched: ClassVar[tuple[Any, ...]] = ()  # wrappers whose work the batch does itself
    changeable: ClassVar[tuple[str, ...]]  # attributes that may change between steps

    def __init__(self, num_envs: int, observation: gym.Space[Any], action: Any) -> None:
        super().__init__(num_envs, observation, action)
        self._choices, self._action = int(action.n), np.zeros(num_envs, np.int64)
        self._rng = np.random.Generator(self.bits())

    def _reseed(self) -> None:
        if self._seeds[0] is not None:
            self._rng = np.random.Generator(self.bits(self._seeds[0]))
        self._reset_seeds()
        self._reset_options()

    def step_async(self, actions: ArrayLike) -> None:
        self._action = check_actions(actions, self.num_envs, self._choices)

    def get_state(self) -> dict[str, NDArray[Any]]:
        """All that decides the future, as arrays; the clock of `episode` records is not part.

        `random` is the state of the stream: 256 bits as four int64 (of a PCG64 its state and its
        increment, each the low one first), then `has_uint32` and `uinteger`.
        """
        kept = self._rng.bit_generator.state
        parts = kept["state"].values()  # two integers of a PCG64, an array of a SFC64
        bits = b"".join(x.to_bytes(16, "little") if type(x) is int else x.tobytes() for x in parts)
        words = [*np.frombuffer(bits, "<i8"), kept["has_uint32"], kept["uinteger"]]
        state = {name: value.copy() for name, value in self._arrays().items()}
        return state | {"random": np.array(words, np.int64)}

    def set_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from a state of `get_state`, of as many worlds with the same settings.

        Raises:
            ValueError: an array is missing, unknown or not of this batch's shape and type, or
                holds what no world can be in.
        """
        wanted = self._kinds() | {"random": "int64[6]"}
        found = {name: _kind(value) for name, value in state.items()}
        if found != wanted:
            raise ValueError(f"expected a state of shapes {wanted}, got {found}")
        words, kept = state["random"], self._rng.bit_generator.state
        flag, rest = words[4:].tolist()
        if not (flag in (0, 1) and 0 <= rest < 2**32 and self._possible(state)):
            raise ValueError("no world can be in such a state")
        self._go_on({name: state[name].copy() for name in wanted if name != "random"})
        bits = words[:4].astype("<i8")
        for i, (name, part) in enumerate(kept["state"].items()):
            large = int.from_bytes(bits[2 * i : 2 * i + 2].tobytes(), "little")
            kept["state"][name] = large if type(part) is int else bits.view("<u8")
        self._rng.bit_generator.state = {**kept, "has_uint32": flag, "uinteger": rest}

    def get_images(self) -> Sequence[NDArray[np.uint8] | None]:
        try:
            return [self._frame(i) for i in range(self.num_envs)]
        except gym.error.ResetNeeded:
            return [None] * self.num_envs

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        chosen = list(self._get_indices(indices))
        if attr_name == "oversight":
            return list(np.broadcast_to(self.oversight, self.num_envs)[chosen].tolist())
        return [getattr(self, attr_name) for _ in chosen]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of all worlds; `oversight` may be a number for each of them.

        Raises:
            AttributeError: it is none that can be set.
            ValueError: it is set for some of the worlds, or out of range.
        """
        if attr_name not in self.changeable:
            raise AttributeError(
                f"of a batch of worlds only {self.changeable} can be set, not {attr_name}"
            )
        if list(self._get_indices(indices)) != list(range(self.num_envs)):
            raise ValueError("worlds of one batch share their attributes: set them for all")
        self._set(attr_name, value)

    def _set(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def env_method(self, method_name: str, *_: Any, indices: Any = None, **__: Any) -> list[Any]:
        raise AttributeError(f"a batch of worlds has no single world to call {method_name!r} on")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [wrapper_class in self.watched for _ in self._get_indices(indices)]


class OversightGridVecEnv(_View, Batch):
    """Many worlds as a Stable-Baselines3 VecEnv. Arguments as `OversightGridEnv`.

    As SB3 has it, an ended world is reset in the same step; `info["terminal_observation"]` holds
    the old episode's last observation and `info["TimeLimit.truncated"]` whether it was truncated.
    """

    bits = np.random.PCG64
    changeable = ("oversight", "reward")

    def __init__(self, num_envs: int, *args: Any, **settings: Any) -> None:
        _View.__init__(self, num_envs, *args, **settings)
        Batch.__init__(self, num_envs, *self._spaces())

    def reset(self) -> NDArray[np.float32]:
        self._reseed()
        return self._begin(self._rng)

    def step_wait(self) -> Any:
        step, reward = self._advance(self._action, self._rng)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for i, info, last in self._ended(step):
            truncated = bool(step.seen.truncated[i])
            infos[i] = info | {"terminal_observation": last, "TimeLimit.truncated": truncated}
        done = step.seen.terminated | step.seen.truncated
        return self._seen(self._started()), reward.numpy(), done.numpy(), infos

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {name: value.numpy() for name, value in vars(self._started()).items()}

    def _kinds(self) -> dict[str, str]:
        like = self._start(np.random.default_rng(0))
        return {name: _kind(value.numpy()) for name, value in vars(like).items()}

    def _possible(self, state: Mapping[str, NDArray[Any]]) -> bool:
        agent, diamond, ghost = (state[name] for name in ("agent", "diamond", "ghost"))
        flags = [state[name] for name in ("diamond_flag", "ghost_flag", "spurious")]
        spurious, each, config = flags[2], np.arange(len(agent)), self.world.config
        return bool(
            state["random"][2] % 2  # as any increment of a PCG64
            and all(((x >= 0) & (x < config.cells)).all() for x in (agent, diamond, ghost))
            and ((agent != diamond) & (agent != ghost) & (diamond != ghost)).all()
            and ((state["time"] >= 0) & (state["time"] < config.max_steps)).all()
            and all((x.view(np.uint8) <= 1).all() for x in flags)  # bytes of a file may be others
            and not (spurious.size and (spurious[each, diamond] | spurious[each, ghost]).any())
        )

    def _go_on(self, state: Mapping[str, NDArray[Any]]) -> None:
        self._state = State(**{name: torch.from_numpy(value) for name, value in state.items()})

    def close(self) -> None:
        self._state = None


def has_task(reward: Reward) -> bool:
    """Whether a reward says more than that a behavior was reached, so that it is worth learning.

    Raises:
        ValueError: there is no such reward.
    """
    if reward not in ("reached", "ground_truth"):
        raise ValueError(f"reward must be 'reached' or 'ground_truth', got {reward!r}")
    return reward != "reached"


def levels_of(oversight: Any, worlds: int = 1) -> NDArray[np.float64]:
    """Oversight levels as an array of their own: a number, or one for each of the worlds.

    Raises:
        ValueError: it is neither, or out of range.
    """
    try:
        levels = np.array(oversight, np.float64)
    except (TypeError, ValueError):
        levels = np.array(np.nan)
    if levels.shape not in ((), (worlds,)) or not ((levels >= 0) & (levels <= 1)).all():
        each = f", or be such a number for each of {worlds} worlds" if worlds > 1 else ""
        raise ValueError(f"oversight must lie in [0, 1]{each}, got {oversight}")
    return levels


def _kind(array: NDArray[Any]) -> str:
    return f"{array.dtype}{list(array.shape)}"


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
