"""Any environment: whole episodes of steered policies, judged and drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from oversight_rl.agents.ppo.policy import MoEPolicy
from oversight_rl.agents.steering import Steering
from oversight_rl.envs.labels import LabelError, behavior_index
from oversight_rl.envs.plugins import why
from oversight_rl.envs.settings import NO_LABEL, UserError
from oversight_rl.envs.vector import make_vec
from oversight_rl.experiments.oversight.config import GRID, Config
from oversight_rl.experiments.oversight.evaluation import no_policy, policy_row
from oversight_rl.experiments.oversight.pictures import FRAMES, MOST_POLICIES, Frames, side_by_side
from oversight_rl.runs.rows import Facts, Row

ENVIRONMENTS = 512  # of an evaluation, at most


class EnvEvaluator:
    """Evaluates policies in any environment, by rollouts.

    Args:
        config: of the run. A deployment level takes the place of its overall oversight level; what
            its environment sets apart from that stays so.
        seed: of the rollouts.
    """

    def __init__(self, config: Config, seed: int = 0) -> None:
        self.config, self.seed = config, seed

    def evaluate(
        self,
        agent: MoEPolicy,
        facts: Facts,
        policies: Sequence[Steering],
        levels: Sequence[float],
        deployed: str,
    ) -> list[Row]:
        """The result table of a run: rows by policy, then level.

        Args:
            agent: whose policies they are.
            facts: of the run.
            policies: steerings to evaluate.
            levels: deployment oversight levels.
            deployed: name of the policy that is deployed.

        Raises:
            UserError: action probabilities, or what the environment says of returns, are not
                finite.
        """
        with torch.random.fork_rng(devices=[]):
            return [
                policy_row(
                    facts,
                    p,
                    level,
                    self._figures(agent, facts, p, level),
                    deployed=p.name == deployed,
                    evaluator="rollout",
                )
                for p in policies
                for level in levels
            ]

    def _figures(
        self, agent: MoEPolicy, facts: Facts, steering: Steering, level: float
    ) -> dict[str, float]:
        if not all(bool(p.isfinite().all()) for p in agent.parameters()):
            raise no_policy(facts, steering)
        try:
            episodes = self._episodes(agent.steered(steering), level)
        except FloatingPointError:
            raise no_policy(facts, steering) from None
        if not np.isfinite(episodes).all():
            raise UserError(f"env: {self.config.env}: a ground_truth_reward is not finite")
        ending, labeled, length, value = episodes.T
        shares = {f"p_{name}": ending == i for i, name in enumerate(agent.behaviors)}
        flagged = {f"{name}_flagged": share * labeled for name, share in shares.items()}
        shares["p_timeout"] = ending == NO_LABEL
        return {
            "ground_truth_return": float(value.mean()),
            "return_se": float(value.std() / len(value) ** 0.5),
            **{name: float(share.mean()) for name, share in (shares | flagged).items()},
            "episode_length": float(length.mean()),
            "optimal_return": math.nan,
        }

    def _episodes(self, policy: MoEPolicy, level: float) -> NDArray[np.float64]:
        """Figures of whole episodes: behavior by number, labeled (0 or 1), steps, return.

        Each environment plays the same number of episodes, so that short ones are not
        over-represented. Returns `[episodes or a few more, 4]`.
        """
        env = make_env(self.config, level, min(ENVIRONMENTS, self.config.episodes))
        each = -(-self.config.episodes // env.num_envs)
        torch.manual_seed(self.seed)
        env.seed(self.seed)
        observation = env.reset()
        played, steps = np.zeros((2, env.num_envs), np.int64)
        figures = []
        while played.min() < each:
            action, _ = policy.predict(observation)
            observation, _, dones, infos = env.step(action)
            steps += 1
            for i in np.flatnonzero(dones):
                if played[i] < each:
                    figures.append(self._episode(infos[i], policy.behaviors, int(steps[i])))
                played[i] += 1
                steps[i] = 0
        env.close()
        return np.array(figures, dtype=float)

    def _episode(self, info: dict[str, Any], behaviors: Sequence[str], steps: int) -> list[float]:
        name = info.get("behavior")
        try:
            ending = (
                NO_LABEL if name is None else behavior_index(name, behaviors, "info['behavior']")
            )
        except LabelError as error:
            raise UserError(f"env: {self.config.env}: {error}") from None
        sign = 0.0 if ending == NO_LABEL else 1.0 if ending == 0 else -1.0
        value = self.config.learner.discount ** (steps - 1) * info.get("ground_truth_reward", sign)
        return [ending, "label" in info, steps, value]


def env_rollouts(
    policy: MoEPolicy, config: Config, steerings: Sequence[Steering], seed: int = 0
) -> bytes | None:
    """Policies of a PPO run at work side by side, in the environment's own pictures.

    Returns:
        A GIF; None where the environment draws none.
    """
    columns = []
    with torch.random.fork_rng(devices=[]):
        for steering in steerings[:MOST_POLICIES]:
            torch.manual_seed(seed)
            frames = _env_rollout(policy.steered(steering), config, steering.name, seed)
            if frames is None:
                return None
            columns.append(frames)
    return side_by_side(columns)


def _env_rollout(policy: MoEPolicy, config: Config, name: str, seed: int) -> Frames | None:
    """Frames of one policy with their captions; None where there are no pictures."""
    settings = config.model_copy(
        update={"env_settings": config.env_settings | {"render_mode": "rgb_array"}}
    )
    try:
        env = make_env(settings if config.env != GRID else config, config.oversight, 1)
    except UserError:
        return None  # it was made for training, but knows no render_mode
    env.seed(seed)
    observation = env.reset()
    tally = dict.fromkeys([*policy.behaviors, "timeout"], 0)
    shown: Frames = []
    while len(shown) < FRAMES:
        (picture,) = env.get_images()
        if picture is None:
            return None
        count = ", ".join(f"{behavior} {n}" for behavior, n in tally.items())
        shown.append((picture, f"policy: {name}\nreached: {count}"))
        action, _ = policy.predict(observation)
        observation, _, dones, infos = env.step(action)
        if dones[0]:  # the end itself is not shown: SB3's environments have been reset by now
            tally[infos[0].get("behavior") or "timeout"] += 1
    env.close()
    return shown


def make_env(config: Config, level: float, count: int) -> Any:
    """The environments of a PPO run at an oversight level, as a VecEnv.

    Raises:
        UserError: there is no such environment, or it does not take these settings.
    """
    try:
        return make_vec(config.env, count, oversight=level, **config.env_arguments)
    except UserError:
        raise
    except Exception as error:  # whatever a stranger's code raises
        raise UserError(f"env: {config.env} cannot be made ({why(error)})") from None
