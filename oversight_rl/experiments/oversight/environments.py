"""PPO in any environment, evaluated by whole episodes; on our grid, exactly."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from oversight_rl.agents.learner import NotFinite
from oversight_rl.agents.networks import Output
from oversight_rl.agents.ppo.learner import PPOLearner, new_policy
from oversight_rl.agents.ppo.policy import MoEPolicy
from oversight_rl.agents.steering import Steering
from oversight_rl.agents.threads import on_threads
from oversight_rl.envs.labels import LabelError
from oversight_rl.envs.plugins import why
from oversight_rl.envs.settings import UserError
from oversight_rl.experiments.oversight.config import GRID, Config
from oversight_rl.experiments.oversight.evaluation import Evaluator
from oversight_rl.experiments.oversight.rollouts import EnvEvaluator, env_rollouts, make_env
from oversight_rl.experiments.oversight.runs import OversightRuns, deployed_name
from oversight_rl.runs.experiment import LOG_EVERY
from oversight_rl.runs.rows import Facts, Row

TRIAL = 32  # steps that an environment is tried out for


class EnvJudge:
    """Evaluates and draws policies in the environment of a run.

    Args:
        config: of the run.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.evaluator = EnvEvaluator(config)
        self.exact = None
        if config.env == GRID:
            exact = Evaluator(config.world, config.learner.discount)
            self.exact = exact if exact.mdp is not None else None

    def tables(
        self,
        agent: MoEPolicy,
        facts: Sequence[Facts],
        policies: Sequence[Steering],
        levels: Sequence[Sequence[float]],
        paths: bool = False,
    ) -> list[list[Row]]:
        deployed = deployed_name((agent.n_experts, agent.behaviors))
        if self.exact is not None:  # a policy is a table there
            forward = _on_active_inputs(agent, self.config)
            return self.exact.evaluate(forward, facts, policies, levels, deployed, paths)
        (own,), (at,) = facts, levels
        return [self.evaluator.evaluate(agent, own, policies, at, deployed)]

    def pictures(self, agent: MoEPolicy, policies: Sequence[Steering]) -> dict[str, bytes]:
        animation = env_rollouts(agent, self.config, policies)
        return {} if animation is None else {"rollouts": animation}


def _on_active_inputs(policy: MoEPolicy, config: Config) -> Any:
    """What a policy computes on the grid, from the inputs that are active; see `World.active`."""
    inputs = int(np.prod(config.world.shape))

    def forward(active: Tensor) -> Output:
        planes = F.one_hot(active[0], inputs + 1).sum(1)[:, :inputs]  # [B, F]
        seen = planes.view(-1, *config.world.shape).float()
        return policy.output(seen.to(policy.device))

    return forward


class PPORuns(OversightRuns):
    """One run of PPO."""

    def __init__(self, configs: Sequence[Config]) -> None:
        (config,) = self.configs = configs
        self.judge = self.judge_of(config)
        self.learner: PPOLearner = new_learner(config)

    @property
    def agent(self) -> MoEPolicy:
        return self.learner.policy

    def pictures(self, run: int) -> dict[str, bytes]:
        return self.judge.pictures(self.agent, self.standard(self.agent))

    def close(self) -> None:
        self.learner.close()

    @classmethod
    def try_out(cls, config: Config) -> None:
        """Train for one small update, to refuse what cannot be, and forget it.

        Raises:
            UserError: the environment cannot be made, does not fit, or fails.
        """
        super().try_out(config)
        few = {"worlds": min(config.ppo.worlds, 2), "steps": min(config.ppo.steps, TRIAL)}
        small = config.model_copy(update={"ppo": config.ppo.model_copy(update=few)})
        with on_threads(config.threads), warnings.catch_warnings():
            learner = new_learner(small)
            warnings.simplefilter("ignore")  # the run itself will say so
            try:
                learner.update()
                bad = [what for what, x in learner.numbers().items() if not x.isfinite().all()]
                if bad and config.on_nan == "stop":
                    raise NotFinite(bad[0])
            except UserError:
                raise
            except Exception as error:  # whatever a stranger's environment leads to
                reason = str(error) if isinstance(error, LabelError | NotFinite) else why(error)
                raise UserError(f"env: {config.env}: no first update ({reason})") from None
            finally:
                learner.close()

    @classmethod
    def blank(cls, config: Config) -> MoEPolicy:
        with _refusing(config), closing(make_env(config, config.oversight, 1)) as env:
            return new_policy(config.agent, env, config.method)

    @classmethod
    def behaviors(cls, agent: MoEPolicy) -> Sequence[str]:
        return agent.behaviors

    @classmethod
    def policy(cls, agent: MoEPolicy, steering: Steering) -> MoEPolicy:
        return agent.steered(steering)

    @classmethod
    def judge_of(cls, config: Config, device: torch.device | str = "cpu") -> EnvJudge:
        return EnvJudge(config)

    @classmethod
    def prefix(cls, config: Config) -> str:
        return "policy."


def new_learner(config: Config) -> PPOLearner:
    """A fresh learner of a run.

    Args:
        config: with one seed.

    Raises:
        UserError: the environment cannot be made, or is not one that PPO can train on.
    """
    env = make_env(config, config.oversight, config.ppo.worlds)
    with _refusing(config):
        return PPOLearner(
            config.ppo,
            config.agent,
            env,
            method=config.method,
            overseer=config.overseer,
            seed=config.seeds[0],
            device=config.torch_device(),
            curves_every=LOG_EVERY,
        )


@contextmanager
def _refusing(config: Config) -> Iterator[None]:
    """Say in one line that an environment does not fit."""
    try:
        yield
    except (ValueError, AssertionError, NotImplementedError) as error:  # as SB3 refuses spaces
        raise UserError(f"env: {config.env}: {error}") from None
