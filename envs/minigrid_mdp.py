"""MiniGrid's empty diamond/ghost room as a finite MDP: exact values, the optimum.

Within an episode only the agent's pose changes, and what an action does to it is certain. A policy
is a table over what the agent can see, which is far less than there are states; where its episodes
end is then found as in `mdp`.
"""

from __future__ import annotations

import numpy as np
import torch
from minigrid.core.constants import DIR_TO_VEC
from torch import Tensor

from oversight_rl.envs import mdp
from oversight_rl.envs.minigrid_batch import (
    EMPTY,
    FORWARD,
    SQUARES,
    TURNS,
    DiamondGhostVecEnv,
    Ints,
    Tiles,
)
from oversight_rl.envs.overseers import rate
from oversight_rl.envs.settings import FLAGS

DIRECTIONS = len(DIR_TO_VEC)
NEGLIGIBLE = 1e-15  # chance of still being under way that changes figures by rounding errors only
MAX_SEEN = 2**28  # bytes of all views, which bounds the memory taken
CHUNK = 2048  # views that are made at once, too


class DiamondGhostMDP:
    """Exact evaluation in an empty room of one size.

    A state is a pose (P of them, by direction, then by free cell), a setting of the flags, and a
    room: where the diamond and the ghost are. A room turned by a quarter looks the same to the
    agent, and all starts are alike, so one stands for each four rooms that are the same but turned.
    (None is the same as itself turned: at most one of the squares is in the middle.)

    Args:
        env: worlds of this kind; their oversight level does not matter here.

    Attributes:
        views: `[U, v, v, 3]`, all that an agent can see, each once.

    Raises:
        ValueError: gaps in the walls, lava, or too many states; see `why_not`.
    """

    def __init__(self, env: DiamondGhostVecEnv) -> None:
        if reason := why_not(env):
            raise ValueError(f"no exact evaluation: {reason}")
        self.max_steps = int(env.get_attr("max_steps", 0)[0])
        self.labels = env.get_attr("labels", 0)[0]
        cells = np.flatnonzero(env.walls == EMPTY)
        self.following = torch.from_numpy(_following(env, cells))
        squares = _rooms(len(cells))
        seen, view = _views(env, cells, squares)
        self.views, self.view = torch.from_numpy(seen), torch.from_numpy(view)  # [P, F, rooms]

        place = torch.arange(len(view))[:, None] % len(cells)
        at_diamond, at_ghost = (place == square for square in torch.from_numpy(squares))
        self.reward = at_diamond.double() - at_ghost.double()  # [P, rooms], of moving there
        free = (self.reward == 0).double()
        self.start = free / free.sum()  # [P, rooms]
        self.goes_on = free[:, None]
        states = torch.arange(self.view.numel()).view(self.view.shape)
        ends = [states.movedim(1, -1)[at].view(-1, FLAGS) for at in (at_diamond, at_ghost)]
        self.ends = torch.stack(ends)  # [2, ends, F], which states end episodes

    @torch.no_grad()
    def evaluate(
        self, table: Tensor, levels: Tensor, discount: float, window: int = 32
    ) -> mdp.Endings:
        """Expected return, endings and length of policies, by dynamic programming.

        Args:
            table: `[Q, U, A]` action probabilities in each view.
            levels: `[L]` oversight level at deployment.
            discount: per step, in (0, 1].
            window: steps, see `mdp.WorldMDP.evaluate`.

        Returns:
            Endings, `[Q, L]` float64.
        """
        one = torch.ones(1, dtype=torch.float64)  # class of starts
        found = [
            mdp.by_flags(self._arrivals(policy)[..., None], one, self.max_steps, discount, window)
            for policy in table
        ]
        levels = levels.double()
        chances = (levels * rate(self.labels.shares, kind) for kind in (0, 1))
        return mdp.endings(torch.stack(found), mdp.flag_weight(*chances)[:, None])

    def _arrivals(self, policy: Tensor) -> Tensor:
        """Chance of ending in each step and behavior, `[T, 2, F]`, for a policy `[U, A]`."""
        go = policy.double().T[:, self.view] * self.goes_on  # [A, P, F, rooms]
        mass = self.start[:, None].repeat(1, FLAGS, 1)
        target, moved = self.following.flatten(), torch.empty_like(go)
        arrivals = []
        for _ in range(self.max_steps):
            torch.mul(go, mass, out=moved)
            mass.zero_().index_add_(0, target, moved.flatten(0, 1))
            arrivals.append(mass.take(self.ends).sum(1))
            if mass.sum() < NEGLIGIBLE:
                break
        return torch.stack(arrivals)

    @torch.no_grad()
    def optimal_return(self, discount: float) -> float:
        """The best expected ground-truth return of an agent that sees the whole room."""
        value = mdp.best_values(self.reward, self.following, discount, self.max_steps)
        return float((self.start * value).sum())


def why_not(env: DiamondGhostVecEnv) -> str | None:
    """Why exact evaluation does not apply to worlds, or None if it does."""
    names = "layout", "lava", "width", "agent_view_size", "labels"
    layout, lava, width, view, labels = (env.get_attr(name, 0)[0] for name in names)
    if layout != "empty":
        return "gaps in the walls multiply the states"
    if labels.region != "all":
        return "a room that is watched in one half does not look the same when it is turned"
    if lava:
        return "lava multiplies the states"
    cells = (width - 2) ** 2
    states = FLAGS * DIRECTIONS * cells * (cells - 1) * (cells - 2)
    if states > mdp.MAX_STATES:
        return f"{states:,} states are more than {mdp.MAX_STATES:,}"
    if states // 4 * view**2 * 3 > MAX_SEEN:  # no more views than rooms that are not just turned
        return f"views of {view}x{view} tiles may take more than {MAX_SEEN:,} bytes"
    return None


def _rooms(cells: int) -> Ints:
    """Free cells of the diamond and the ghost, in one of each four rooms: `[2, rooms]`."""
    side = round(cells**0.5)
    y, x = np.divmod(np.arange(cells), side)
    turned = x * side + side - 1 - y
    room = np.indices((cells, cells)).reshape(2, -1)
    number = np.arange(cells**2)
    first, other = number, room
    for _ in range(3):
        other = turned[other]
        first = np.minimum(first, other[0] * cells + other[1])
    return room[:, (first == number) & (room[0] != room[1])]


def _following(env: DiamondGhostVecEnv, cells: Ints) -> Ints:
    """The pose that each action leads to from each pose, `[A, P]`."""
    direction, place = np.divmod(np.arange(DIRECTIONS * len(cells)), len(cells))
    ahead = cells[place] + env.moves[direction]
    there = np.where(env.walls[ahead] == EMPTY, np.searchsorted(cells, ahead), place)
    after = [(direction + turn) % DIRECTIONS * len(cells) + place for turn in TURNS]
    after[FORWARD] = direction * len(cells) + there
    return np.stack(after)


def _views(env: DiamondGhostVecEnv, cells: Ints, squares: Ints) -> tuple[Tiles, Ints]:
    """What agents can see, `[U, v, v, 3]`, and which of it in each state, `[P, F, rooms]`."""
    rooms = squares.shape[1]
    tiles = np.tile(env.walls, (FLAGS * rooms, 1))
    world = np.arange(FLAGS * rooms)
    flags = np.divmod(world // rooms, 2)  # of the diamond, of the ghost
    for kind, (square, flag) in enumerate(zip(squares, flags, strict=True)):
        tiles[world, cells[np.tile(square, FLAGS)]] = SQUARES + 2 * kind + flag

    # equal views have equal sums of random numbers; chances are < 1e-8 that others have them, too
    looks = env.encodings.astype(np.int64) @ [1, 2**8, 2**16]
    size = env.get_attr("agent_view_size", 0)[0]
    random = np.random.default_rng(0).integers(2**63, size=size**2)
    first = world * env.walls.size
    sums = np.empty((DIRECTIONS, len(cells), len(world)), np.int64)
    for direction, place in np.ndindex(sums.shape[:2]):
        seen = env.look(tiles, first + cells[place], np.full(len(world), direction))
        sums[direction, place] = random @ looks[seen].reshape(size**2, -1)
    _, index, view = np.unique(sums, return_index=True, return_inverse=True)
    views = np.empty((len(index), size, size, 3), np.uint8)
    for start in range(0, len(index), CHUNK):
        direction, place, world = np.unravel_index(index[start : start + CHUNK], sums.shape)
        seen = env.look(tiles, first[world] + cells[place], direction)
        views[start : start + CHUNK] = env.encodings.take(seen.transpose(2, 0, 1), axis=0)
    return views, view.reshape(-1, FLAGS, rooms)
