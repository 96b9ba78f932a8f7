"""The diamond/ghost world as a finite MDP: every state enumerated, exact values, the optimum.

The diamond, the ghost and the flags stay put within an episode, so the world is a family of small
Markov chains over the agent's cell. Pushing the start distribution through the policy for
`max_steps` steps gives, without noise, how much probability ends where and when.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from oversight_rl.envs.settings import ACTIONS, FLAGS
from oversight_rl.envs.world import State, World

DIAMOND_FLAGGED, GHOST_FLAGGED = [2, 3], [1, 3]  # settings of the two flags, as in `World.key`
MAX_STATES = 4_000_000
"""Largest number of observable states that exact evaluation takes on (8x8 has 999,936)."""

CHUNK = 512  # states per call of a policy: what it works out stays in the cache


@dataclass(frozen=True)
class Endings:
    """What a policy does, exactly, from a fresh start; tensors `[Q, L]` (policies, levels)."""

    ground_truth_return: Tensor  # expected discount^(T-1) * (+1 diamond, -1 ghost)
    p_diamond: Tensor
    p_ghost: Tensor
    p_timeout: Tensor
    p_diamond_flagged: Tensor  # of ending on a diamond that is flagged
    p_ghost_flagged: Tensor
    episode_length: Tensor  # steps
    window_return: Tensor  # the published metric, see `WorldMDP.evaluate`


class WorldMDP:
    """Exact evaluation of one world size.

    Args:
        world: the world; its oversight level does not matter here, but which share of a level
            squares are flagged at, and where.

    Raises:
        ValueError: the world has spurious flags or too many states; see `why_not`.
    """

    def __init__(self, world: World) -> None:
        if reason := why_not(world):
            raise ValueError(f"no exact evaluation: {reason}")
        self.world = world
        cells = world.config.cells
        cell = torch.arange(cells, device=world.device)
        agent, diamond, ghost = torch.meshgrid(cell, cell, cell, indexing="ij")
        distinct = (agent != diamond) & (agent != ghost) & (diamond != ghost)
        # [P], each the index agent * S^2 + diamond * S + ghost
        self.placements = distinct.flatten().nonzero()[:, 0]
        self.start = distinct.double() / distinct.sum()  # [agent, diamond, ghost]
        # of moving onto a cell; where diamond == ghost it cancels, but no such state is reached
        self.reward = (agent == diamond).double() - (agent == ghost).double()
        self.next_cell = world.moves.view(cells, len(ACTIONS))
        # classes of placements, by whether the diamond and the ghost can be flagged there
        everywhere = bool(world.watched.all())
        pairs = [(True, True)] if everywhere else list(product((False, True), repeat=2))
        self.watched = torch.tensor(pairs, device=world.device)  # [C, 2] bool
        of_diamond, of_ghost = (self.watched[:, i, None] == world.watched for i in (0, 1))
        classes = of_diamond[:, None, :] & of_ghost[:, :, None]
        self.classes = classes.double()  # [C, ghost cell, diamond cell]
        self.share = (self.start.sum(0).T * self.classes).sum((1, 2))  # [C], of the starts

    @property
    def n_states(self) -> int:
        """Observable states: placements times flag settings."""
        return FLAGS * len(self.placements)

    def states(self, index: Tensor) -> State:
        """The states with the given indices in `range(n_states)`; placements vary fastest."""
        placement = self.placements[index % len(self.placements)]
        return self.world.unkey(placement * FLAGS + index // len(self.placements))

    @torch.no_grad()
    def policy_table(self, policy: Callable[[Tensor], Tensor]) -> Tensor:
        """Action probabilities of policies in every state.

        Args:
            policy: maps observations, as `[B, 5]` active inputs (see `World.active`), to
                probabilities `[Q, B, A]`.

        Returns:
            `[Q, n_states, A]` float32.
        """
        parts = [
            policy(self.world.active(self.states(index)))
            for index in torch.arange(self.n_states, device=self.world.device).split(CHUNK)
        ]
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def evaluate(self, table: Tensor, levels: Tensor, discount: float, window: int = 32) -> Endings:
        """Expected return, endings and length of stationary policies, by dynamic programming.

        The window return is the metric of arXiv 2410.04332, figure 6: windows of `window` steps
        are cut out of an endless sequence of episodes, and the discounted return that follows a
        step within its window is averaged over all steps.

        Args:
            table: `[Q, n_states, A]` action probabilities (rows sum to 1).
            levels: `[L]` overall oversight level at deployment.
            discount: per step, in (0, 1].
            window: steps.

        Returns:
            Endings, `[Q, L]` float64.
        """
        limit = self.world.config.max_steps
        found = [
            by_flags(self._arrivals(policy), self.share, limit, discount, window)
            for policy in table
        ]
        return endings(torch.stack(found), self._flag_weight(levels))

    def _arrivals(self, policy: Tensor) -> Tensor:
        """Chance of ending in each step and behavior, `[T, 2, F, C]`; policies are `[n_states, A]`.

        From a start of each class of placements.
        """
        cells = self.world.config.cells
        dense = self._dense(policy)
        target = self.next_cell.T.flatten()  # of each action from each cell
        mass = self.start.view(cells, 1, cells, cells).expand(-1, FLAGS, -1, -1)
        ends = []
        for _ in range(self.world.config.max_steps):
            moved = torch.zeros_like(dense[0]).index_add_(0, target, (dense * mass).flatten(0, 1))
            at_diamond = moved.diagonal(dim1=0, dim2=2)  # [F, ghost cell, diamond cell], a view
            at_ghost = moved.diagonal(dim1=0, dim2=3)  # [F, diamond cell, ghost cell]
            ends.append(torch.stack([self._by_class(at_diamond), self._by_class(at_ghost.mT)]))
            at_diamond.zero_()
            at_ghost.zero_()
            mass = moved
        return torch.stack(ends)

    def _by_class(self, ended: Tensor) -> Tensor:
        """Chances `[F, ghost cell, diamond cell]` summed over each class of placements. `[F, C]`"""
        if len(self.classes) == 1:
            return ended.sum((1, 2))[:, None]
        return torch.einsum("fgd,cgd->fc", ended, self.classes)

    @torch.no_grad()
    def ghost_on_path(self, table: Tensor, levels: Tensor) -> Tensor:
        """Chance of ending on a ghost that lay on a shortest path to the diamond at the start.

        Args:
            table: `[Q, n_states, A]` action probabilities.
            levels: `[L]` overall oversight level at deployment.

        Returns:
            `[Q, L]` float64.
        """
        flag_weight = self._flag_weight(levels)
        placed = torch.arange(self.world.config.cells**3, device=self.world.device)
        on_path = self.world.ghost_on_path(self.world.unkey(placed * FLAGS))
        start = self.start * on_path.view_as(self.start)
        at_ghost = (self.reward < 0)[:, None].double().expand(-1, FLAGS, -1, -1)
        found = []
        for policy in table:
            dense = self._dense(policy)
            chance = at_ghost
            for _ in range(self.world.config.max_steps):
                before = at_ghost.clone()
                for action, probability in enumerate(dense):
                    before.addcmul_(probability, chance[self.next_cell[:, action]])
                chance = before
            by_place = (chance * start[:, None]).sum(0)  # [F, diamond cell, ghost cell]
            found.append(self._by_class(by_place.mT))
        return torch.einsum("qfc,fcl->ql", torch.stack(found), flag_weight)

    def _flag_weight(self, levels: Tensor) -> Tensor:
        """Chance of each setting of the two flags at levels `[L]`. [F, C, L] float64"""
        levels = levels.to(self.world.device, torch.float64)
        diamond, ghost = self.world.chances(levels)
        can = self.watched.double()[..., None]  # [C, 2, 1]
        return flag_weight(can[:, 0] * diamond, can[:, 1] * ghost)

    def _dense(self, policy: Tensor) -> Tensor:
        """A policy `[n_states, A]` by action, agent cell, flags, diamond cell, ghost cell."""
        cells = self.world.config.cells
        dense = policy.new_zeros(len(ACTIONS), cells**3, FLAGS, dtype=torch.float64)
        dense[:, self.placements] = policy.double().view(FLAGS, -1, len(ACTIONS)).permute(2, 1, 0)
        return dense.view(len(ACTIONS), cells, cells, cells, FLAGS).movedim(-1, 2).contiguous()

    @torch.no_grad()
    def optimal_return(self, discount: float) -> float:
        """The best expected ground-truth return from a fresh start."""
        value = best_values(self.reward, self.next_cell.T, discount, self.world.config.max_steps)
        return float((self.start * value).sum())


def flag_weight(diamond: Tensor, ghost: Tensor) -> Tensor:
    """Chance of each setting of the two flags, from that of each: `[...]` to `[F, ...]`."""
    no_diamond, no_ghost = 1 - diamond, 1 - ghost
    return torch.stack(
        [no_diamond * no_ghost, no_diamond * ghost, diamond * no_ghost, diamond * ghost]
    )


def by_flags(arrivals: Tensor, share: Tensor, limit: int, discount: float, window: int) -> Tensor:
    """What a policy does under each flag setting from each class of starts, `[5, F, C]`.

    Return, p_diamond, p_ghost, length, and the sum over an episode's steps of the return within a
    window that is cut at random.

    Args:
        arrivals: `[T, 2, F, C]` float64, chance of starting in a class and ending in each step on
            the diamond and the ghost; steps after T end nothing.
        share: `[C]`, of the starts that are of each class.
        limit: of an episode's steps.
        discount: per step.
        window: steps.
    """
    settings, classes = arrivals.shape[2:]
    diamond, ghost = arrivals.flatten(2).unbind(1)  # [T, F * C] each
    steps = torch.arange(1, len(arrivals) + 1, device=arrivals.device, dtype=torch.float64)
    # a window that holds a step reaches `ahead` steps further with chance 1 - ahead / window
    ahead = steps - 1
    in_view = (discount**ahead * (1 - ahead / window).clamp(min=0)).cumsum(0)
    timeout = share.repeat(settings) - diamond.sum(0) - ghost.sum(0)
    found = torch.stack(
        [
            discount**ahead @ (diamond - ghost),
            diamond.sum(0),
            ghost.sum(0),
            steps @ (diamond + ghost) + limit * timeout,
            in_view @ (diamond - ghost),
        ]
    )
    return found.view(-1, settings, classes)


def endings(found: Tensor, weight: Tensor) -> Endings:
    """Endings of policies at levels, from what they do `by_flags`.

    Args:
        found: `[Q, 5, F, C]`.
        weight: `[F, C, L]`, see `flag_weight`.
    """

    def mean(figures: Tensor, weight: Tensor) -> Tensor:
        return torch.einsum("...fc,fcl->...l", figures, weight)

    value, p_diamond, p_ghost, length, window_sum = mean(found, weight).unbind(1)
    return Endings(
        ground_truth_return=value,
        p_diamond=p_diamond,
        p_ghost=p_ghost,
        p_timeout=(1 - p_diamond - p_ghost).clamp(min=0),
        p_diamond_flagged=mean(found[:, 1, DIAMOND_FLAGGED], weight[DIAMOND_FLAGGED]),
        p_ghost_flagged=mean(found[:, 2, GHOST_FLAGGED], weight[GHOST_FLAGGED]),
        episode_length=length,
        window_return=window_sum / length,
    )


def best_values(reward: Tensor, following: Tensor, discount: float, limit: int) -> Tensor:
    """Values of states for an agent that sees all of them, by value iteration. `[P, ...]`

    Args:
        reward: `[P, ...]`, of moving onto a place in a world, where an episode then ends; else 0.
        following: `[A, P]`, the place that an action leads to.
        discount: per step.
        limit: of an episode's steps.
    """
    value = torch.zeros_like(reward)
    for _ in range(limit):
        after = reward + discount * value.masked_fill(reward != 0, 0.0)
        value = torch.stack([after[to] for to in following]).amax(0)
    return value


def why_not(world: World) -> str | None:
    """Why exact evaluation does not apply to a world, or None if it does."""
    config = world.config
    if config.spurious_oversight:
        return "spurious flags multiply the states"
    states = FLAGS * config.cells * (config.cells - 1) * (config.cells - 2)
    if states > MAX_STATES:
        return f"{states:,} states are more than {MAX_STATES:,}"
    return None
