"""Windows of experience, each distinct state of them evaluated once."""

from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from oversight_rl.agents.networks import Agent, Output, cumulative, sample
from oversight_rl.agents.reinforce.window import Window
from oversight_rl.envs.record import Record
from oversight_rl.envs.world import Seen, State, Truth, World

Acts: TypeAlias = tuple[slice | Tensor, ...]
"""Worlds, a part for each who acts."""
MOST_KEYS = 2**20
"""States up to which equal ones are merged (a table of them is kept for each run)."""


@dataclass(frozen=True)
class Rollout(Record):
    """A window of experience.

    The agent is evaluated once per distinct state of the window, while the window is collected;
    `output` keeps the graph for the loss. There are U such states; padding included, where the
    runs of a stack met different numbers of them.
    """

    active: Tensor  # [R, U, 5 or 3 + S], observations as active inputs
    output: Output  # [R, U], what the agent computed for them
    slot: Tensor  # [R, T, N], which of them each step started from
    action: Tensor  # [R, T, N]
    seen: Seen  # [R, T, N], what the learner may see
    truth: Truth  # [R, T, N], what only evaluation and oracle methods may see
    value_after: Tensor  # [R, N], value estimates after the window
    uniform: Tensor  # [R, T, N] in [0, 1): what labels go missing or wrong, what is replayed
    last: tuple[State, ...] = ()  # [R, N] each, what each of T steps led to, before any reset
    acts: Acts = (slice(None),)  # worlds where the mixture acts; each expert by itself
    led_to: Tensor | None = None  # [R, T, N, 5 or 3 + S], active inputs of it, if they are known

    @property
    def observation(self) -> Tensor:
        """What each step started from, as active inputs. [R, T, N, 5 or 3 + S]"""
        run = torch.arange(len(self.active), device=self.active.device)[:, None, None]
        return self.active[run, self.slot]

    def final(self, world: World) -> Tensor:
        """What each step led to, the last observations of episodes too. [R, T, N, 5 or 3 + S]"""
        if self.led_to is not None:
            return self.led_to
        return world.active(State.stack(list(self.last), dim=1))


def noise_channels(world: World) -> int:
    """Uniform random numbers per world and step: of a reset, the action, `uniform`."""
    return world.noise_channels + 2


def acting(worlds: int, experts: int, share: float) -> tuple[slice, ...]:
    """Which worlds the mixture acts in, and each expert by itself: as many, in a share of them."""
    alone = round(worlds * share)
    bounds = [0, *(worlds - alone + alone * k // experts for k in range(experts + 1))]
    return tuple(slice(*pair) for pair in pairwise(bounds))


EVERYWHERE: Acts = (slice(None),)


def collect(
    agent: Agent, world: World, state: State, noise: Tensor,
    acts: Acts = EVERYWHERE, besides: Tensor | None = None,
) -> tuple[Rollout, State]:  # fmt: skip
    """Step the worlds through one window under the agent's mixture, or one expert by itself.

    Args:
        agent: a stack of R agents.
        world: the worlds' dynamics.
        state: worlds `[R, N]`.
        noise: `[R, T, N, noise_channels(world)]`, uniform in [0, 1).
        acts: in which worlds who acts, see `acting`.
        besides: `[R, M, D]`, active inputs that the agent is evaluated for, too; the last slots.

    Returns:
        The window, and the worlds after it.
    """
    runs, steps, worlds, _ = noise.shape
    fresh = world.reset(noise[..., : world.noise_channels])
    forward = agent.prepare()
    states = _Distinct(world, runs, worlds)
    window = Window(forward)
    actor = _actors(acts, worlds, noise.device)
    edges = noise.new_empty(runs, steps * worlds, len(acts), agent.n_actions - 1)  # by slot
    slots, actions, taken = [], [], []
    run = torch.arange(runs, device=noise.device)[:, None]
    for t in range(steps):
        met = window.count
        slot, active, counts = states.look_up(state, met)
        if active.shape[1]:
            output = window.act(active, counts)
            alone = [output.alone(k) for k in range(len(acts) - 1)]
            chances = torch.stack([output.mixture, *alone], dim=2).softmax(-1)
            edges[:, met : met + active.shape[1]] = cumulative(chances)
        action = sample(edges[run, slot, actor], noise[:, t, :, -2])
        state, step = world.step(state, action, fresh[:, t])
        slots.append(slot)
        actions.append(action)
        taken.append(step)
    if besides is not None:
        window.act(besides, [besides.shape[1]] * runs)
    active, output = window.learning()
    with torch.no_grad():
        value_after = forward.value(world.active(state))
    rollout = Rollout(
        active=active,
        output=output,
        slot=torch.stack(slots, dim=1),
        action=torch.stack(actions, dim=1),
        seen=Seen.stack([step.seen for step in taken], dim=1),
        truth=Truth.stack([step.truth for step in taken], dim=1),
        value_after=value_after,
        uniform=noise[..., -1],
        last=tuple(step.last for step in taken),
        acts=acts,
    )
    return rollout, state


def _actors(acts: Acts, worlds: int, device: torch.device) -> Tensor:
    """Who acts in each world: 0 the mixture, k the expert k - 1. [N]"""
    actor = torch.zeros(worlds, dtype=torch.int64, device=device)
    for number, part in enumerate(acts):
        actor[part] = number
    return actor


class _Distinct:
    """The distinct states that worlds `[R, N]` have met, numbered in *slots* as they are met.

    On a GPU, where counting them would make the host wait, and in worlds with too many states,
    every state counts as new.
    """

    def __init__(self, world: World, runs: int, worlds: int) -> None:
        self.world, self.runs, self.worlds = world, runs, worlds
        self.merging = world.device.type == "cpu" and 0 < world.n_keys <= MOST_KEYS
        if self.merging:
            self.slots = torch.full((runs * world.n_keys,), -1)

    def look_up(self, state: State, met: int) -> tuple[Tensor, Tensor, list[int]]:
        """Slots `[R, N]` of states, when so many slots are in use.

        Also, active inputs `[R, new, ...]` of those not met before, and how many each run has.
        """
        if not self.merging:
            slot = torch.arange(self.worlds, device=self.world.device) + met
            return slot.expand(self.runs, -1), self.world.active(state), [self.worlds] * self.runs
        key = self.world.key(state)
        if self.runs > 1:
            key = key + torch.arange(self.runs)[:, None] * self.world.n_keys
        known = self.slots.take(key)
        new = key[known < 0].unique()  # sorted, so by run
        rank, counts = torch.arange(len(new)), [len(new)]
        active = self.world.active_by_key[new % self.world.n_keys].long()
        if self.runs > 1:
            run = new // self.world.n_keys
            per_run = run.bincount(minlength=self.runs)
            rank, counts = rank - (per_run.cumsum(0) - per_run)[run], per_run.tolist()
            padded = torch.full((self.runs, max(counts), active.shape[-1]), self.world.inputs)
            padded[run, rank] = active
            active = padded
        self.slots[new] = rank + met
        return self.slots.take(key), active.view(self.runs, -1, active.shape[-1]), counts
