"""A rollout buffer that learns at an episode's end, or later, what the episode was."""

from collections.abc import Generator, Hashable, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer

from oversight_rl.agents.memory import MOST_BYTES
from oversight_rl.agents.ppo.held import Held, LateLabel, Steps, Window
from oversight_rl.agents.ppo.targets import Samples, Targets
from oversight_rl.agents.ppo.views import Views
from oversight_rl.envs.labels import LabelError, behavior_index
from oversight_rl.envs.settings import NO_LABEL


class RoutedRolloutBuffer(RolloutBuffer):
    """A rollout buffer that learns at an episode's end, or later, what the episode was.

    Args:
        args: as SB3's RolloutBuffer.
        behaviors: names that labels may have.
        solo_share: share of the episodes in which an expert acts by itself.
        soloists: number of the experts that take turns in that, the first ones.
        label_reach: steps before a rollout's end that labels reach, as far as MOST_BYTES allow.
        kwargs: as SB3's RolloutBuffer.
    """

    views: Views
    """Observations that were met since the rollout began, and what the policy says of them."""
    view: NDArray[np.int64]
    """Which of these each step saw. [T, N]"""
    samples: Samples | None = None
    """What there is to learn from, once the rollout is whole."""

    def __init__(
        self,
        *args: Any,
        behaviors: Sequence[str],
        solo_share: float,
        soloists: int,
        label_reach: int,
        **kwargs: Any,
    ) -> None:
        self.behaviors = tuple(behaviors)
        self.solo_share, self.soloists = solo_share * (soloists > 0), soloists
        self.episodes = self.labels = self.explained = 0  # labels with the episode's behavior
        super().__init__(*args, **kwargs)
        self.turn = np.arange(self.n_envs)  # each environment's episodes take turns
        nothing = np.zeros_like(self.values)
        steps = self._steps(nothing, nothing, nothing)
        self.held = Held(steps, min(label_reach, MOST_BYTES // steps.row_bytes))

    def reset(self) -> None:
        """Forget the rollout, but not what labels still reach."""
        super().reset()
        shape = (self.buffer_size, self.n_envs)
        self.ended, self.done = (np.zeros(shape, bool) for _ in range(2))
        self.actor = np.zeros(shape, np.int64)
        self.label, self.truth = np.full((2, *shape), NO_LABEL)
        self.cuts: list[tuple[int, int, Any]] = []  # (step, environment, last observation)
        self.names: dict[tuple[int, Hashable], int] = {}  # environment, episode's id: its last step
        self.late: list[LateLabel] = []
        self.view = np.zeros(shape, np.int64)
        self.samples = None

    @property
    def acts(self) -> NDArray[np.int64]:
        """Who acts in each environment now: 0 the mixture, k + 1 expert k by itself. [N]

        Episodes take turns, the first of four (at three quarters) being the mixture's.
        """
        before, after = (np.floor(turn * self.solo_share) for turn in (self.turn, self.turn + 1))
        expert = before.astype(np.int64) % max(1, self.soloists)
        return np.where(after > before, expert + 1, 0)

    @property
    def alone(self) -> NDArray[np.bool_]:
        """Where an expert acted by itself. [T, N]"""
        return self.actor > 0

    def note(
        self, infos: Sequence[dict[str, Any]], dones: NDArray[np.bool_], view: NDArray[np.int64]
    ) -> None:
        """Keep what the current step saw `[N]`, and what infos say of episodes that ended.

        An episode that ended in some behavior has it as `info["behavior"]` (only oracle methods
        look at which one it was), and as `info["label"]` too where an overseer saw it. Without
        either, a terminated episode counts as one that nobody saw, a truncated one as a timeout.
        A label may come later: the episode's end then says `info["episode_id"]`, and a later step
        of the same environment `info["late_labels"] = [(episode_id, label), ...]`.

        Raises:
            LabelError: a behavior is unknown.
        """
        self.view[self.pos], self.actor[self.pos] = view, self.acts
        self.done[self.pos] = dones
        for env in np.flatnonzero(dones).tolist():
            info = infos[env]
            behavior, label = info.get("behavior"), info.get("label")
            cut = bool(info.get("TimeLimit.truncated", False))
            shown = label is not None or behavior is not None
            ended = shown or ("behavior" not in info and not cut)
            self.ended[self.pos, env] = ended
            if cut and not ended:
                self.cuts.append((self.pos, env, info["terminal_observation"]))
            self.label[self.pos, env] = self._index(label, "label")
            self.truth[self.pos, env] = self._index(behavior, "behavior")
            if label is None and info.get("episode_id") is not None:
                self._name(env, info["episode_id"])
            else:
                self.episodes += 1
            self.labels += label is not None
            self.explained += label is not None and behavior is not None
        for env, info in enumerate(infos):
            late = info.get("late_labels") if info else None  # most say nothing
            for name, label in _pairs(late) if late is not None else ():
                self._note_late(LateLabel(env, name, self._index(label, "late_labels")))

    def _name(self, env: int, name: Any) -> None:
        """Keep the id of an episode whose label may come later."""
        try:
            taken = (env, name) in self.names or (env, name) in self.held.ended
        except TypeError:
            raise LabelError(f"info['episode_id'] must be hashable, got {name!r}") from None
        if taken:
            raise LabelError(
                f"info['episode_id'] must be another one for each episode of an environment; "
                f"{name!r} of environment {env} still waits for its label"
            )
        self.names[env, name] = self.pos

    def _note_late(self, label: LateLabel) -> None:
        env, name, _ = label
        step = self.names.pop((env, name), None)
        if step is None:
            self.late.append(label)
            return
        self.label[step, env], self.ended[step, env] = label.behavior, True
        self.cuts = [cut for cut in self.cuts if cut[:2] != (step, env)]
        self._count_late(self.truth[step, env])

    def _count_late(self, truth: np.int64) -> None:
        self.episodes, self.labels = self.episodes + 1, self.labels + 1
        self.explained += int(truth != NO_LABEL)

    def pass_on(self, dones: NDArray[np.bool_]) -> None:
        """Let the next episode have its turn, where one is done."""
        self.turn = self.turn + dones

    def _index(self, name: Any, key: str) -> int:
        if name is None:
            return NO_LABEL
        try:
            return behavior_index(name, self.behaviors, f"info[{key!r}]")
        except LabelError as error:
            raise LabelError(f"{error}; RoutedPPO takes others as behaviors=(...)") from None

    def look_back(
        self, own_value: NDArray[Any], task_value: NDArray[Any], task_reward: NDArray[Any]
    ) -> tuple[Window, list[LateLabel]]:
        """The window of a rollout that is whole, and labels of episodes that are not kept.

        What the networks say of the rollout's steps, and their rewards in the task's scale of now,
        are given, `[T, N]` each.
        """
        now = self._steps(own_value, task_value, task_reward)
        goes_on = ~self.episode_starts[0].astype(bool)  # not where environments were reset since
        window, missed = self.held.window(now, goes_on, self.late)
        for truth in window.steps.truth[window.late & window.steps.ended]:
            self._count_late(truth)
        return window, missed

    def _steps(
        self, own_value: NDArray[Any], task_value: NDArray[Any], task_reward: NDArray[Any]
    ) -> Steps:
        taken = self.observations, self.actions, self.log_probs, self.actor, self.values
        known = self.ended, self.done, self.label, self.truth
        learned = np.zeros_like(self.done)
        return Steps(*taken, own_value, task_value, task_reward, learned, *known)

    def hold(self, window: Window, due: NDArray[np.bool_], waits: bool) -> None:
        """Keep the window's steps that labels may still reach; the due ones `[W, C]` were learned
        from now, the others wait for their episode's end, if the method has them wait.
        """
        ended = [(step, env, name) for (env, name), step in self.names.items()]
        self.episodes += self.held.keep(window, due, ended, waits)

    def minibatches(self, batch_size: int | None = None) -> int:
        """How many `get` yields: as many as make their size the nearest to what is asked for."""
        assert self.samples is not None
        count = len(self.samples.actor)  # none, where all steps wait
        return max(round(count / (batch_size or max(1, count))), min(count, 1))

    def get(self, batch_size: int | None = None) -> Generator[Any, None, None]:
        """Minibatches of `Targets` about so large and all alike, in random order."""
        assert self.samples is not None
        parts, order = self.minibatches(batch_size), np.random.permutation(len(self.samples.actor))
        if not parts:
            return
        at = torch.as_tensor(order, device=self.device)
        whole = (torch.as_tensor(x, device=self.device).index_select(0, at) for x in self.samples)
        yield from map(Targets, *(x.tensor_split(parts) for x in whole))


class RoutedDictRolloutBuffer(RoutedRolloutBuffer, DictRolloutBuffer):
    """The same for Dict observations, kept as SB3 keeps them: an array for each entry."""


def _pairs(late: Any) -> list[tuple[Hashable, Any]]:
    """What an environment says of earlier episodes, as pairs of an id and a label."""
    pairs = late if isinstance(late, list | tuple) else [None]
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or pair[1] is None:
            raise LabelError(
                f"info['late_labels'] must be a list of (episode_id, label), got {late!r}"
            )
    return cast("list[tuple[Hashable, Any]]", pairs)
