"""Whole episodes of steered policies, in environments that step many at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from oversight_rl.agents.networks import cumulative, sample
from oversight_rl.agents.ppo.policy import MoEPolicy
from oversight_rl.agents.steering import Steering
from oversight_rl.experiments.oversight.evaluation import no_policy
from oversight_rl.runs.rows import Facts

Act = Callable[[Any], NDArray[Any]]
"""Actions `[N, ...]` for the observations of N worlds."""


def play(
    env: VecEnv, act: Act, episodes: NDArray[np.int64]
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Play a number of episodes in each world, so that short ones are not over-represented.

    Args:
        env: N worlds.
        act: what to do in them.
        episodes: `[N]`, how many to play in each.

    Yields:
        Of an ended episode: its world, its steps, and its last info.
    """
    torch.manual_seed(0)
    env.seed(0)
    observation = env.reset()
    played, steps = np.zeros((2, env.num_envs), np.int64)
    while (played < episodes).any():
        observation, _, dones, infos = env.step(act(observation))
        steps += 1
        for i in np.flatnonzero(dones).tolist():
            if played[i] < episodes[i]:
                yield i, int(steps[i]), infos[i]
            played[i] += 1
            steps[i] = 0


def acting(policy: MoEPolicy, facts: Facts) -> Act:
    """What a policy of a run does; `UserError` where its action probabilities are not finite."""

    def act(observation: Any) -> NDArray[Any]:
        try:
            return policy.predict(observation)[0]
        except FloatingPointError:
            raise no_policy(facts, policy.steering) from None

    return act


class SideBySide:
    """Steered policies of one agent, each in some of many worlds, where observations are symbols.

    What the agent does where it sees the same again is looked up.

    Args:
        agent: to steer; its actions are `Discrete`.
        facts: of its run.
        policies: Q of them.
        policy: `[N]`, the index of each world's.
    """

    def __init__(
        self,
        agent: MoEPolicy,
        facts: Facts,
        policies: Sequence[Steering],
        policy: NDArray[np.int64],
    ) -> None:
        self.agent, self.facts, self.policies, self.policy = agent, facts, policies, policy
        self.rows: dict[int, int] = {}  # of `edges`, by the key of what is seen
        space = cast(spaces.Discrete, agent.action_space)
        self.edges = torch.empty(0, len(policies), int(space.n) - 1)  # of views, see `sample`

    @torch.no_grad()
    def __call__(self, observation: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Draw actions `[N]`, by torch's own generator.

        Raises:
            UserError: action probabilities are not finite.
        """
        found, first, view = np.unique(keys(observation), return_index=True, return_inverse=True)
        known = found.tolist()
        new = [i for i, key in enumerate(known) if key not in self.rows]
        if new:
            output = self.agent.output(self.agent.obs_to_tensor(observation[first[new]])[0])
            chances = torch.cat([policy.probabilities(output) for policy in self.policies])
            if not chances.isfinite().all():
                bad = int(chances.isfinite().flatten(1).all(1).int().argmin())
                raise no_policy(self.facts, self.policies[bad])
            self.rows |= zip((known[i] for i in new), count(len(self.edges)), strict=False)
            self.edges = torch.cat([self.edges, cumulative(chances).transpose(0, 1).cpu()])
        row = np.array([self.rows[key] for key in known])[view]
        return sample(self.edges[row, self.policy], torch.rand(len(row))).numpy()


def keys(observation: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Numbers `[N]` that tell observations `[N, ...]` apart: sums of random numbers.

    Two that differ have the same with a chance of 2^-56 at most.
    """
    flat = observation.reshape(len(observation), -1)
    random = np.random.default_rng(0).integers(2**63, size=flat.shape[1])
    return flat @ random
