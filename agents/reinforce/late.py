"""Labels that come some episodes late: past windows wait for them, to be learned from once more."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from oversight_rl.agents.reinforce.collect import Rollout
from oversight_rl.envs.record import Record
from oversight_rl.envs.settings import NO_LABEL, UserError
from oversight_rl.envs.world import Seen, Truth, World

MOST_BYTES = 2**28  # that a run's windows take while they wait


@dataclass(frozen=True)
class Late(Record):
    """A past window of each run whose labels have come; nothing else of it is learned from."""

    active: Tensor  # [R, T * N, D], what each step started from
    action: Tensor  # [R, T, N]
    seen: Seen  # [R, T, N], terminated where an episode got a label that was late

    def led_to(self, world: World) -> Tensor:
        """What each step led to, as active inputs. [R, T, N, D]"""
        before = self.active.unflatten(1, self.action.shape[1:])
        return world.after(before, self.action)


class Waiting(nn.Module):
    """The windows of R runs whose labels have not come yet, the oldest first in line.

    Args:
        delay: episodes of a run that end before a label comes.
        limit: steps of an episode at most.
        shape: R, T, N, D: runs, steps, worlds, active inputs.

    Raises:
        UserError: they would take too much memory.
    """

    active: Tensor  # [R, W, T * N, D] int16
    action: Tensor  # [R, W, T, N] uint8
    label: Tensor  # [R, W, T, N] int8
    ended: Tensor  # [R, W, T, N] bool
    count: Tensor  # [R, W] int64, episodes that had ended at a window's end
    episodes: Tensor  # [R] int64, that have ended so far
    served: Tensor  # [R] int64, windows whose labels have come
    windows: Tensor  # [R] int64, that there were

    def __init__(self, delay: int, limit: int, shape: tuple[int, int, int, int]) -> None:
        super().__init__()
        runs, steps, worlds, width = shape
        self.delay = delay
        # in each of `limit` steps every world ends an episode at least once
        self.room = -(-delay * limit // (steps * worlds)) + -(-limit // steps) + 1
        if self.room * steps * worlds * (2 * width + 3) > MOST_BYTES:
            most = MOST_BYTES // (2 * width + 3) // limit
            raise UserError(f"labels.delay: must be at most about {most:,} here, got {delay:,}")
        kept = runs, self.room, steps, worlds
        self.register_buffer(
            "active", torch.zeros(runs, self.room, steps * worlds, width, dtype=torch.int16)
        )
        self.register_buffer("action", torch.zeros(kept, dtype=torch.uint8))
        self.register_buffer("label", torch.full(kept, NO_LABEL, dtype=torch.int8))
        self.register_buffer("ended", torch.zeros(kept, dtype=torch.bool))
        self.register_buffer("count", torch.zeros(kept[:2], dtype=torch.int64))
        for name in ("episodes", "served", "windows"):
            self.register_buffer(name, torch.zeros(runs, dtype=torch.int64))

    def due(self) -> Late:
        """The oldest window of each run, if all its labels have come; else one without labels."""
        run, place = torch.arange(len(self.served)), self.served % self.room
        come = self.served < self.windows
        come &= self.episodes - self.count[run, place] >= self.delay
        self.served += come
        label = self.label[run, place].long()
        label = torch.where(come[:, None, None], label, NO_LABEL)
        labeled = label != NO_LABEL
        ended = self.ended[run, place] & ~labeled  # as by the limit: not learned from, see `lesson`
        seen = Seen(terminated=labeled, truncated=ended, label=label)
        return Late(self.active[run, place].long(), self.action[run, place].long(), seen)

    def put(self, rollout: Rollout, waits: Tensor) -> Rollout:
        """Keep a window with its labels; returned without them, in the runs `[R]` that wait."""
        waits, seen = waits[:, None, None], rollout.seen
        place = int(self.windows[0]) % self.room  # all runs are equally far
        done = seen.terminated | seen.truncated
        self.episodes += done.sum((1, 2))
        self.windows += 1
        self.active[:, place] = rollout.observation.flatten(1, 2).to(torch.int16)
        self.action[:, place] = rollout.action.to(torch.uint8)
        self.label[:, place] = torch.where(waits, seen.label, NO_LABEL).to(torch.int8)
        self.ended[:, place] = done
        self.count[:, place] = self.episodes
        shown = torch.where(waits, NO_LABEL, seen.label)
        return replace(rollout, seen=replace(seen, label=shown))


def lesson(rollout: Rollout, late: Late, world: World) -> Rollout:
    """A window, and beside it the late one, whose states are the window's last slots. `[R, T, 2N]`

    Of the late one, only steps of labeled episodes shall count.
    """
    steps, worlds = rollout.action.shape[1:]
    first = rollout.active.shape[1] - steps * worlds
    slot = torch.arange(steps * worlds, device=rollout.slot.device).view(steps, worlds) + first
    own = torch.arange(worlds, device=slot.device)
    nothing = torch.full_like(late.seen.label, NO_LABEL)

    def both(ours: Tensor, theirs: Tensor) -> Tensor:
        return torch.cat([ours, theirs], dim=-1)

    return replace(
        rollout,
        slot=both(rollout.slot, slot.expand_as(rollout.slot)),
        action=both(rollout.action, late.action),
        seen=Seen(*map(both, vars(rollout.seen).values(), vars(late.seen).values())),
        truth=Truth(both(rollout.truth.ending, nothing)),
        value_after=both(rollout.value_after, torch.zeros_like(rollout.value_after)),
        uniform=both(rollout.uniform, rollout.uniform),
        led_to=torch.cat([rollout.final(world), late.led_to(world)], dim=2),
        acts=tuple(torch.cat([own[part], worlds + own[part]]) for part in rollout.acts),
    )
