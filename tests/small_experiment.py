"""An experiment of its own, as small as one can be: climbers look for a peak in the mist.

At some steps (their share is the oversight level) a climber is told whether it would go up.
"""

from concurrent.futures import Future
from contextlib import contextmanager
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch

from oversight_rl.agents.learner import Learner
from oversight_rl.envs.settings import Settings
from oversight_rl.kinds import Kind
from oversight_rl.runs.experiment import Experiment
from oversight_rl.runs.rows import Row
from oversight_rl.settings import RunConfig
from oversight_rl.sweeps.workers import work

PEAK = torch.tensor([3.0, -2.0])


class ClimberConfig(Settings):
    """The learner's settings."""

    section: ClassVar[str] = "climb"
    updates: int = 40
    stride: float = 0.5


class ClimbConfig(RunConfig):
    """A run's."""

    algo: str = "climb"
    method: Literal["careful", "careless"] = "careful"
    climb: ClimberConfig = ClimberConfig()


class Climber(Learner):
    """R climbers, a learner as `Learner` has it."""

    def __init__(self, config, seeds):
        self.runs, self.updates, self.total = len(seeds), 0, config.climb.updates
        self.config, self.seeds = config, seeds
        self.place = torch.zeros(self.runs, 2, dtype=torch.float64)

    @property
    def height(self):  # [R], 0 at the peak
        return -(self.place - PEAK).norm(dim=-1)

    def update(self):
        draws = [np.random.default_rng((seed, self.updates)).random(3) for seed in self.seeds]
        *step, chance = torch.tensor(np.array(draws)).unbind(-1)
        before, low = self.place.clone(), self.height
        self.place += self.config.climb.stride * (2 * torch.stack(step, -1) - 1)
        if self.config.method == "careful":
            stays = (chance >= self.config.oversight) | (self.height < low)
            self.place[stays] = before[stays]
        self.updates += 1

    def curves(self):
        return [{"height": float(height)} for height in self.height]

    def learned(self):
        return [self.place]


class Way(NamedTuple):
    summary: str
    assumes: str


class Climb(Experiment):
    """What is climbed, and how high that was."""

    score = "height"
    methods = {
        "careful": Way("takes the steps that it is told lead up", "labels"),
        "careless": Way("takes every step", "labels"),
    }

    def __init__(self, configs):
        self.configs = configs
        self.learner = Climber(configs[0], [config.seeds[0] for config in configs])

    def evaluate(self, facts):
        found = zip(facts, self.learner.height, self.learner.place, strict=True)
        return [
            [Row.of(f, "climber", {"height": float(height), "east": float(place[0])})]
            for f, height, place in found
        ]


KIND = Kind(f"{__name__}:ClimbConfig", f"{__name__}:Climb", "careful")  # a line of `kinds.KINDS`


@contextmanager
def in_here():
    """The worker of its sweeps: this process, for others do not know the experiment."""

    def submit(job):
        done = Future()
        work(job)
        done.set_result(None)
        return done

    yield submit
