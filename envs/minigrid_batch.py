"""Many MiniGrid diamond/ghost worlds as arrays, stepped together behind an SB3 VecEnv.

The same rules, starts and observations as `minigrid.DiamondGhostEnv`, whose docstring is the
specification, at about a hundred times its speed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from minigrid.core.constants import DIR_TO_VEC, OBJECT_TO_IDX
from minigrid.core.grid import Grid
from minigrid.core.world_object import Wall
from numpy.typing import NDArray
from stable_baselines3.common.monitor import Monitor

from oversight_rl.envs.gym import Batch, Reward, levels_of
from oversight_rl.envs.minigrid import (
    KINDS,
    DiamondGhostEnv,
    Layout,
    SymbolicObservation,
    walls,
    watched,
)
from oversight_rl.envs.overseers import Labels, rate

UNSEEN, EMPTY, WALL = (OBJECT_TO_IDX[name] for name in ("unseen", "empty", "wall"))
SQUARES = 3  # from here on a tile is a square: of each kind one without and one with a flag
FORWARD = 2
TURNS = np.array([-1, 1, 0])  # of the direction, per action
MOST_SIGHTS = 2**18  # a quarter of the entries of a table of what is seen from where
OFF_GRID = np.array([UNSEEN, EMPTY], np.uint8)  # beside cells: what is hidden; under the agent

Tiles = NDArray[np.uint8]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class DiamondGhostVecEnv(Batch):
    """Many `DiamondGhostEnv`s as a Stable-Baselines3 VecEnv, seen as by `SymbolicObservation`.

    As SB3 has it, an ended world is reset in the same step; its info holds, besides what
    `DiamondGhostEnv` says, the old episode's last observation as `terminal_observation`,
    `TimeLimit.truncated`, and the record of SB3's Monitor as `episode`. All worlds draw from one
    stream of random numbers, which `seed` and then `reset` start. The attribute `oversight` may be
    set to a number for each world, `[N]`.

    Args:
        num_envs: number of worlds N; the others as of `DiamondGhostEnv`.
        agent_view_size: tiles v along a side of the view, odd.
        render_mode: None or "rgb_array".

    Attributes:
        encodings: `[tile, 3]`, what is seen of each kind of tile.
        moves: `[direction]`, from a cell to the one ahead.
        walls: `[size * size]`, the tiles of a world without its squares.

    Raises:
        ValueError: an argument is out of range.
    """

    bits = np.random.SFC64
    changeable = ("oversight", "paid", "max_steps")
    watched = (Monitor,)  # whose record the infos hold

    def __init__(
        self,
        num_envs: int,
        size: int = 8,
        layout: Layout = "empty",
        oversight: float = 0.1,
        flags_visible: bool = True,
        lava: int = 0,
        reward: Reward = "reached",
        max_steps: int | None = None,
        agent_view_size: int = 7,
        render_mode: str | None = None,
        overseer: str | Mapping[str, Any] | Labels = "uniform",
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode must be None or 'rgb_array', got {render_mode!r}")
        # [N, size * size + 2], the tile of cell y * size + x; beside these OFF_GRID
        self._tiles: Tiles | None = None
        self._one = DiamondGhostEnv(  # checks and holds the settings
            size, layout, oversight, flags_visible, lava, reward, max_steps, overseer,
            agent_view_size=agent_view_size, render_mode=render_mode,
        )  # fmt: skip
        self._levels = np.full(num_envs, self._one.oversight)  # [N]
        seen = SymbolicObservation(self._one)
        self.flags = seen.flags
        super().__init__(num_envs, seen.observation_space, self._one.action_space)

        squares = [kind(flag, flags_visible).encode() for kind in KINDS for flag in (False, True)]
        encodings = [(UNSEEN, 0, 0), (EMPTY, 0, 0), Wall().encode(), *squares]
        self.encodings = np.array(encodings, np.uint8)
        self.moves = np.array([x + y * size for x, y in DIR_TO_VEC])
        self._view = _view(self.moves, agent_view_size)
        wall, self._gaps = walls(size, layout)
        self.walls = np.where(wall.ravel(), WALL, EMPTY).astype(np.uint8)
        self._watched = np.tile(watched(self._one.labels, size), size)  # [size * size] bool
        self._sights: Ints | None = None  # [cells * 4, v * v], where walls are the same always
        if not self._gaps and self.walls.size * agent_view_size**2 <= MOST_SIGHTS:
            self._sights = self._sights_of_all()
        self._all = np.arange(num_envs)
        self._first = self._all * (size**2 + len(OFF_GRID))  # each world's first tile
        self._agent, self._direction, self._steps = np.zeros((3, num_envs), np.int64)
        self._clock = time.time()

    def reset(self) -> Tiles:
        self._reseed()
        self._tiles = _with_off_grid(np.empty((self.num_envs, self.walls.size), np.uint8))
        self._start(self._all)
        return self._observe(self._all)

    def step_wait(self) -> tuple[Tiles, NDArray[np.float32], Bools, list[dict[str, Any]]]:
        tiles, one = self._started(), self._one
        ahead = self._agent + self.moves[self._direction]
        moved = (self._action == FORWARD) & (tiles.take(self._first + ahead) != WALL)
        self._agent = np.where(moved, ahead, self._agent)
        self._direction = (self._direction + TURNS[self._action]) % 4
        self._steps = self._steps + 1

        kind, flag = np.divmod(tiles.take(self._first + self._agent).astype(np.int64) - SQUARES, 2)
        terminated = kind >= 0
        truth = np.where(kind == 0, 1, -1)
        paid = truth if one.paid == "ground_truth" else 1
        reward = np.where(terminated, paid, 0).astype(np.float32)
        done = terminated | (self._steps >= one.max_steps)

        observation = self._observe(self._all)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        ended = np.flatnonzero(done)
        if not ended.size:
            return observation, reward, done, infos
        elapsed = round(time.time() - self._clock, 6)
        distance = self._distances(ended, kind[ended])
        for i, last in zip(ended.tolist(), observation[ended], strict=True):
            record = {"r": float(reward[i]), "l": int(self._steps[i]), "t": elapsed}
            infos[i] = {"terminal_observation": last, "TimeLimit.truncated": not terminated[i]}
            infos[i] |= {"episode": record, "behavior": None}
            if terminated[i]:
                behavior = one.behaviors[kind[i]]
                infos[i] |= {"behavior": behavior, "ground_truth_reward": float(truth[i])}
                infos[i]["distance"] = distance[i]
                if flag[i]:
                    infos[i]["label"] = behavior
        self._start(ended)
        observation[ended] = self._observe(ended)
        return observation, reward, done, infos

    def _distances(self, worlds: Ints, kind: Ints) -> dict[int, int]:
        """Moves, walls aside, from each world's agent to the nearest square of another kind."""
        size = self._one.width
        cells = np.arange(size * size)
        tiles = self._started()[worlds, : len(cells)].astype(np.int64)
        other = (tiles >= SQUARES) & ((tiles - SQUARES) // 2 != kind[:, None])
        (y, x), (i, j) = np.divmod(self._agent[worlds, None], size), np.divmod(cells, size)
        moves = np.where(other, np.abs(y - i) + np.abs(x - j), 2 * size).min(axis=1)
        return dict(zip(worlds.tolist(), moves.tolist(), strict=True))

    def _arrays(self) -> dict[str, NDArray[Any]]:
        worlds = {"agent": self._agent, "direction": self._direction, "steps": self._steps}
        return {"tiles": self._started()[:, : self.walls.size]} | worlds

    def _kinds(self) -> dict[str, str]:
        worlds = dict.fromkeys(("agent", "direction", "steps"), f"int64[{self.num_envs}]")
        return {"tiles": f"uint8[{self.num_envs}, {self.walls.size}]"} | worlds

    def _possible(self, state: Mapping[str, NDArray[Any]]) -> bool:
        tiles, agent, steps = state["tiles"], state["agent"], state["steps"]
        grid = tiles.reshape(self.num_envs, self._one.height, self._one.width)
        inner = grid[:, 1:-1, 1:-1] == WALL
        squares = range(SQUARES, SQUARES + 2 * len(self._one.behaviors))
        return bool(
            np.isin(tiles, [EMPTY, WALL, *squares]).all()
            and (grid == WALL).sum() - inner.sum() == grid[0].size * len(grid) - inner.size
            and ((agent >= 0) & (agent < tiles.shape[1])).all()
            and (tiles[self._all, agent] != WALL).all()
            and np.isin(state["direction"], range(4)).all()
            and ((steps >= 0) & (steps < self._one.max_steps)).all()
        )

    def _go_on(self, state: Mapping[str, NDArray[Any]]) -> None:
        self._tiles, self._agent = _with_off_grid(state["tiles"]), state["agent"]
        self._direction, self._steps = state["direction"], state["steps"]

    def world(self, i: int) -> DiamondGhostEnv:
        """World `i` as it is now, as an environment of its own."""
        tiles, size = self._started()[i, : self.walls.size], self._one.width
        env = copy.copy(self._one)
        env.grid = Grid(size, size)
        for cell in np.flatnonzero(tiles != EMPTY).tolist():
            y, x = divmod(cell, size)
            if tiles[cell] == WALL:
                env.grid.set(x, y, Wall())
            else:
                kind, flag = divmod(int(tiles[cell]) - SQUARES, 2)
                env.put_obj(KINDS[kind](bool(flag), env.flags_visible), x, y)
        y, x = divmod(int(self._agent[i]), size)
        env.agent_pos, env.agent_dir = (x, y), int(self._direction[i])
        env.step_count = int(self._steps[i])
        env.oversight = float(self._levels[i])
        return env

    def _frame(self, i: int) -> Tiles:
        picture: Tiles = self.world(i).get_frame()
        return picture

    def close(self) -> None:
        self._tiles = None

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        if attr_name in ("flags", "oversight"):
            return super().get_attr(attr_name, indices)
        started, chosen = self._tiles is not None, self._get_indices(indices)
        return [getattr(self.world(i) if started else self._one, attr_name) for i in chosen]

    @property
    def oversight(self) -> NDArray[np.float64]:
        """The oversight level of each world from its next episode on, `[N]`."""
        return self._levels

    @oversight.setter
    def oversight(self, level: Any) -> None:
        self._levels = np.broadcast_to(levels_of(level, self.num_envs), self.num_envs)

    def _set(self, name: str, value: Any) -> None:
        setattr(self if name == "oversight" else self._one, name, value)

    def _started(self) -> Tiles:
        if self._tiles is None:
            raise gym.error.ResetNeeded("call reset() first")
        return self._tiles

    def _start(self, worlds: Ints) -> None:
        """Start an episode in each of the worlds, `[n]`."""
        rng, each = self._rng, np.arange(len(worlds))
        tiles = np.repeat(self.walls[None], len(worlds), axis=0)  # [n, size * size]
        for gap in self._gaps:
            tiles[each, rng.choice(gap, len(worlds))] = EMPTY
        rank = np.where(tiles == EMPTY, rng.random(tiles.shape), -1)
        for kind in (None, 0, 1, *[2] * self._one.lava):  # the agent, then the squares
            cell = rank.argmax(axis=1)
            rank[each, cell] = -1
            if kind is None:
                self._agent[worlds] = cell
            else:
                chance = self._levels[worlds] * rate(self._one.labels.shares, kind)
                flagged = (rng.random(len(worlds)) < chance) & self._watched[cell]
                tiles[each, cell] = SQUARES + 2 * kind + flagged
        self._started()[worlds, : tiles.shape[1]] = tiles
        self._direction[worlds] = rng.integers(len(DIR_TO_VEC), size=len(worlds))
        self._steps[worlds] = 0

    def _observe(self, worlds: Ints) -> Tiles:
        """What the agents of these worlds see: `[n]` to `[n, v, v, 3]`."""
        tiles, v = self._started(), self._one.agent_view_size
        agent, direction = self._agent[worlds], self._direction[worlds]
        if self._sights is None:
            seen = self.look(tiles, self._first[worlds] + agent, direction).transpose(2, 0, 1)
        else:
            cells = self._sights.take(agent * len(DIR_TO_VEC) + direction, axis=0)
            seen = tiles.take(cells + self._first[worlds, None]).reshape(-1, v, v)
        return self.encodings.take(seen, axis=0)

    def _sights_of_all(self) -> Ints:
        """Which tile of its world each tile of a view is, from every place and direction."""
        agent, direction = np.divmod(np.arange(self.walls.size * len(DIR_TO_VEC)), len(DIR_TO_VEC))
        cells, v = self._view.take(direction, axis=2) + agent, self._one.agent_view_size
        cells[self.look(self.walls, agent, direction) == UNSEEN] = self.walls.size
        cells[v // 2, v - 1] = self.walls.size + 1  # what the agent stands on
        return cells.reshape(v * v, -1).T

    def look(self, tiles: Tiles, at: Ints, direction: Ints) -> Tiles:
        """The tiles that agents see, `[v, v, n]`.

        Args:
            tiles: `[N, size * size]`, of worlds.
            at: `[n]`, where each agent is in the flat `tiles`.
            direction: `[n]`, where it faces.
        """
        cells = self._view.take(direction, axis=2) + at
        # An index beyond the outer wall meets some other tile; walls hide it.
        seen = tiles.take(cells, mode="clip")
        seen = np.where(_seen(seen != WALL), seen, np.uint8(UNSEEN))
        v = self._one.agent_view_size
        seen[v // 2, v - 1] = EMPTY  # what the agent stands on
        return seen


def _with_off_grid(tiles: Tiles) -> Tiles:
    """Worlds' tiles with those beside them: `[n, cells]` to `[n, cells + 2]`."""
    return np.hstack([tiles, np.broadcast_to(OFF_GRID, (len(tiles), len(OFF_GRID)))])


def _view(moves: Ints, v: int) -> Ints:
    """Steps from the agent's cell to those of its view, `[v, v, direction]`.

    The agent is in the middle of the bottom row; the first axis goes to its right, the second
    back towards it.
    """
    right, back, direction = np.ogrid[:v, :v, : len(moves)]
    ahead, aside = moves[direction], np.roll(moves, -1)[direction]
    offset: Ints = ahead * (v - 1 - back) + aside * (right - v // 2)
    return offset


def _seen(clear: Bools) -> Bools:
    """Which tiles of a view are seen: MiniGrid's `Grid.process_vis`, `[v, v, n]` to the same.

    From the agent's tile on, a clear tile that is seen shows its neighbors to the left and right,
    and the three ahead.
    """
    seen = np.zeros_like(clear)
    seen[len(clear) // 2, -1] = True
    while True:
        light = seen & clear
        wide = light.copy()
        wide[1:] |= light[:-1]
        wide[:-1] |= light[1:]
        more = seen | wide
        more[:, :-1] |= wide[:, 1:]
        if np.array_equal(more, seen):
            return seen
        seen = more
