"""Steps that a label may still reach: of episodes that outlast a rollout, and of ended ones.

What a label decides (weights, routes, signs) is not known before it comes, and a step that was
learned from without it was learned from wrongly. So where a method asks for labels, a step waits:
until its episode has ended, or until it is as old as labels reach. By then it was taken by an
older policy, and PPO is corrected for that: see `targets.Experience.share`.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oversight_rl.agents.memory import Memory
from oversight_rl.agents.methods import LABELED, UNFINISHED
from oversight_rl.agents.ppo.observations import as_rows, each, named, unnamed
from oversight_rl.agents.telling import Tally
from oversight_rl.envs.settings import NO_LABEL

Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]


class LateLabel(NamedTuple):
    """A label that came after its episode's end."""

    environment: int
    episode: Hashable  # its id in that environment
    behavior: int


class Steps(NamedTuple):
    """Steps `[W, C]`: rows in time; a column is an environment, or an episode that ended before."""

    observations: Any  # [W, C, ...]
    actions: NDArray[Any]  # [W, C, A]
    log_prob: Floats  # under the policy that took them
    actor: NDArray[np.int64]  # 0 the mixture, k + 1 expert k by itself
    value: Floats  # as the networks saw it then
    own_value: Floats
    task_value: Floats
    task_reward: Floats  # in the scale of then
    learned: Bools  # learned from already
    ended: Bools  # the episode ends with this step in a behavior, seen or not
    done: Bools  # the same, or in none
    label: NDArray[np.int64]
    truth: NDArray[np.int64]

    def each(self, function: Callable[[NDArray[Any]], NDArray[Any]]) -> Self:
        """A function of each part."""
        return type(self)(*(each(function, part) for part in self))

    def part(self, rows: slice, columns: slice) -> Self:
        """A copy of some of them."""
        return self.each(lambda x: x[rows, columns].copy())

    def joined(self, others: Sequence[Self], axis: int) -> Self:
        """These steps and others, below (axis 0) or beside them (axis 1)."""
        return type(self)(
            *(
                each(lambda *x: np.concatenate(x, axis), *parts)
                for parts in zip(self, *others, strict=True)
            )
        )

    @property
    def alone(self) -> Bools:
        """Where an expert acted by itself."""
        return self.actor > 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        parts = (part.values() if isinstance(part, dict) else [part] for part in self)
        return sum(part[:1].nbytes for several in parts for part in several)

    def last(self, rows: int) -> Self:
        """The last rows, copied; where there are fewer, empty ones above them."""
        lacking = rows - len(self.done)
        if lacking <= 0:
            return self.part(slice(-lacking, None), slice(None))
        return self.each(lambda x: np.pad(x, [(lacking, 0)] + [(0, 0)] * (x.ndim - 1)))


LASTING = Steps._fields[: Steps._fields.index("ended")]
"""What is known of steps before their episode's end."""


Apart = tuple[Steps, Steps | None]  # an episode, and its last step where it was cut


class Cut(NamedTuple):
    """Where an episode that did not go on was left: its last step is not learned from."""

    row: int
    column: int
    last: Steps  # [1, 1], whose values stand for what would have followed


@dataclass(frozen=True)
class Window:
    """A rollout, below the earlier steps of its episodes, and beside it what else is due."""

    steps: Steps  # [W, C], the rollout being the last rows of the first columns
    age: NDArray[np.int64]  # [W, 1], of each row, 1 being the last one
    exists: Bools  # [W, C], the last rows of each column; all others are padding
    older: Bools  # [W, C], taken before the rollout
    late: Bools  # [W, C], of episodes whose label came late; they were learned from without it
    cuts: list[Cut]
    earlier: int  # rows above the rollout
    environments: int  # columns that are environments; others hold one episode below another

    def of_rollout(self, x: NDArray[Any]) -> NDArray[Any]:
        """What belongs to the rollout of something of the window: `[W, C, ...]` -> `[T, N, ...]`"""
        return x[self.earlier :, : self.environments]

    def due(self, outcome: NDArray[np.int64], reach: int, waits: bool) -> Bools:
        """Which steps are to be learned from now. `[W, C]`

        Where the method asks what an episode was, steps within reach wait for its end: all but
        those where an expert acted by itself, of which nothing is routed.
        """
        if not waits:
            return ~self.older
        ready = (outcome != UNFINISHED) | self.steps.alone | (self.age > reach)
        again = self.late & (outcome >= LABELED)
        due: Bools = self.exists & (~self.steps.learned & ready | again)
        return due

    def remember(
        self,
        outcome: NDArray[np.int64],
        memory: Memory | None,
        endings: Memory | None,
        every_ending: Memory | None,
        tally: Tally | None,
    ) -> None:
        """Keep labeled observations, those of earlier rollouts whose label came now, too.

        Of endings, their actions are kept as well; those without a label where they are asked for,
        under the number that follows the behaviors'. A tally counts them where one is asked for.
        """
        steps, labeled = self.steps, outcome >= LABELED
        if memory is not None:
            known = self.exists & labeled
            memory.keep(_rows(steps.observations, known), outcome[known] - LABELED)
        known = steps.ended & labeled
        if endings is not None and known.any():
            endings.keep(self._endings(known), outcome[known] - LABELED)
        known = steps.ended & ~self.older
        if every_ending is not None and known.any():
            labels = np.where(labeled, outcome - LABELED, every_ending.kinds)[known]
            every_ending.keep(self._endings(known), labels)
        if tally is not None:
            kinds = range(tally.labeled.shape[1])
            told = [self._on(steps.ended & (outcome == LABELED + kind)) for kind in kinds]
            others = self._on(steps.ended & ~self.older & ~labeled)
            before = self._on(steps.ended & self.late & labeled)  # among others when they ended
            tally.add(
                torch.stack([on.sum(0) for on in told])[None],
                torch.tensor([[len(on) for on in told]]),
                (others.sum(0) - before.sum(0))[None],
                torch.tensor([len(others) - len(before)]),
            )

    def _on(self, chosen: Bools) -> Tensor:
        """Which numbers of observations are not 0. [B, D]"""
        return torch.as_tensor(_rows(self.steps.observations, chosen) != 0)

    def _endings(self, chosen: Bools) -> NDArray[Any]:
        """Observations before endings, and the actions taken there. [B, D]"""
        rows = [_rows(x, chosen) for x in (self.steps.observations, self.steps.actions)]
        return np.concatenate(rows, axis=-1)


class Held:
    """What is kept of earlier rollouts of N environments.

    Args:
        like: steps of that many environments.
        reach: steps before a rollout's end that are kept at most.
    """

    def __init__(self, like: Steps, reach: int) -> None:
        self.environments, self.reach = like.done.shape[1], reach
        self.steps = like.last(0)  # [P, N], the last ones before the rollout
        self.length = np.zeros(self.environments, np.int64)  # how many are of the same episode
        self.goes_on = True
        # of episodes that ended unlabeled, by environment and id: steps since, and theirs [L, 1]
        self.ended: dict[tuple[int, Hashable], tuple[int, Steps]] = {}

    def interrupt(self) -> None:
        """No episode goes on from here, as after a rollout that was stopped on the way."""
        self.goes_on = False

    def window(
        self, now: Steps, goes_on: Bools, late: Sequence[LateLabel]
    ) -> tuple[Window, list[LateLabel]]:
        """A rollout `[T, N]` with what labels reach besides, and labels of episodes not kept.

        It is told whether the rollout's first steps follow the steps before `[N]`, and what labels
        came late in it.
        """
        steps, apart, missed = len(now.done), list[Apart](), []
        goes_on = goes_on & self.goes_on
        for env in np.flatnonzero((self.length > 1) & ~goes_on):
            whole = self.steps.part(slice(-self.length[env], None), slice(env, env + 1))
            episode = whole.part(slice(-1), slice(None))
            episode.done[-1] = True
            apart.append((episode, whole.last(1)))
        self.length, self.goes_on = self.length * goes_on, True
        for label in late:
            key = label.environment, label.episode
            if key not in self.ended:
                missed.append(label)
                continue
            _, episode = self.ended.pop(key)
            episode = episode.last(len(episode.done))
            episode.label[-1], episode.ended[-1] = label.behavior, True
            apart.append((episode, None))
        tallest = max([steps + int(self.length.max()), *(len(e.done) for e, _ in apart)])
        columns = _packed(apart, tallest)
        heights = [sum(len(episode.done) for episode, _ in column) for column in columns]
        lengths = np.concatenate([steps + self.length, np.array(heights, np.int64)])
        whole = now
        if tallest > steps:
            whole = self.steps.last(tallest - steps).joined([now], axis=0)
        if columns:
            stacked = [
                column[0][0].joined([e for e, _ in column[1:]], axis=0).last(tallest)
                for column in columns
            ]
            whole = whole.joined(stacked, axis=1)
        age = np.arange(tallest, 0, -1)[:, None]
        exists = age <= lengths
        older = (age > steps) | (np.arange(len(lengths)) >= self.environments)
        # what is above a column's episodes is of others
        whole = whole._replace(done=whole.done & exists, ended=whole.ended & exists)
        is_late, cuts = np.zeros_like(exists), []
        for number, column in enumerate(columns, start=self.environments):
            row = tallest - heights[number - self.environments]
            for episode, last in column:
                end = row + len(episode.done)
                if last is None:
                    is_late[row:end, number] = True
                else:
                    cuts.append(Cut(end - 1, number, last))
                row = end
        earlier = tallest - steps
        return Window(whole, age, exists, older, is_late, cuts, earlier, self.environments), missed

    def keep(
        self, window: Window, due: Bools, ended: Sequence[tuple[int, int, Hashable]], waits: bool
    ) -> int:
        """Keep what labels may still reach after a rollout; how many unlabeled episodes are lost.

        Args:
            window: of the rollout.
            due: which of its steps were learned from now, `[W, C]`.
            ended: row of the rollout, environment and id of the episodes that ended unlabeled.
            waits: whether to keep steps of episodes that go on.
        """
        rows = len(window.exists)
        taken, before = rows - window.earlier, len(self.ended)
        aged = {key: (since + taken, episode) for key, (since, episode) in self.ended.items()}
        self.ended = {
            key: (since, self._within_reach(since, episode))
            for key, (since, episode) in aged.items()
            if since < self.reach
        }
        lost = before - len(self.ended)
        steps = window.steps._replace(learned=window.steps.learned | due)
        begun = np.where(steps.done, np.arange(1, rows + 1)[:, None], 0)[:, : self.environments]
        first = np.argmax(window.exists, axis=0)[: self.environments]
        for row, env, name in ended:
            end = window.earlier + row
            start = max(int(begun[:end, env].max(initial=0)), int(first[env]), rows - self.reach)
            if start <= end:
                episode = steps.part(slice(start, end + 1), slice(env, env + 1))
                self.ended[env, name] = rows - 1 - end, episode
        self.length = np.minimum(rows - np.maximum(begun.max(0), first), self.reach) * waits
        kept = slice(rows - int(self.length.max()), None)
        self.steps = steps.part(kept, slice(self.environments))
        return lost

    def _within_reach(self, since: int, episode: Steps) -> Steps:
        """The steps of an episode that are not too old; it ended so many steps ago."""
        most = self.reach - since
        return episode.last(most) if len(episode.done) > most else episode

    def state(self) -> dict[str, NDArray[Any]]:
        """The steps of episodes that go on, in arrays of one shape, by name."""
        steps = self.steps.last(self.reach)
        kept = [name for name in LASTING if name != "observations"]
        parts = {name: getattr(steps, name) for name in kept}
        return {"length": self.length} | parts | named("observations", steps.observations)

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from a state."""
        self.length = state["length"].copy()
        parts = {name: unnamed(name, state) for name in LASTING}
        nothing = np.zeros(state["actor"].shape, bool)
        unknown = np.full(nothing.shape, NO_LABEL)
        steps = Steps(**parts, ended=nothing, done=nothing, label=unknown, truth=unknown)
        self.steps = steps.last(int(self.length.max()))


def _rows(x: Any, chosen: Bools) -> NDArray[Any]:
    """Those that are chosen `[W, C]` of observations or actions `[W, C, ...]`. [B, D]"""
    return as_rows(each(lambda part: part[chosen], x))


def _packed(episodes: Sequence[Apart], rows: int) -> list[list[Apart]]:
    """Episodes in columns, one below another, each column at most so many rows high."""
    columns: list[list[Apart]] = []
    free = 0
    for episode in episodes:
        height = len(episode[0].done)
        if height > free:
            columns.append([])
            free = rows
        columns[-1].append(episode)
        free -= height
    return columns
