"""PPO in any environment, evaluated by whole episodes; on our grid, exactly."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from oversight_rl.agents.learner import NotFinite
from oversight_rl.agents.networks import Output
from oversight_rl.agents.ppo.learner import PPOLearner, new_policy
from oversight_rl.agents.ppo.policy import MoEPolicy
from oversight_rl.agents.steering import Steering, expert_names
from oversight_rl.agents.threads import on_threads
from oversight_rl.envs.labels import LabelError, behavior_index
from oversight_rl.envs.minigrid_batch import DiamondGhostVecEnv
from oversight_rl.envs.minigrid_mdp import DiamondGhostMDP, why_not
from oversight_rl.envs.plugins import why
from oversight_rl.envs.settings import NO_LABEL, UserError
from oversight_rl.envs.vector import make_vec
from oversight_rl.experiments.oversight.config import GRID, Config
from oversight_rl.experiments.oversight.evaluation import Evaluator, no_policy, policy_row
from oversight_rl.experiments.oversight.grid import FRAMES, MOST_POLICIES, Frames, side_by_side
from oversight_rl.experiments.oversight.runs import WINDOW_RETURN, OversightRuns
from oversight_rl.runs.experiment import LOG_EVERY
from oversight_rl.runs.rows import Facts, Row

ENVIRONMENTS = 512  # of an evaluation, at most
CHUNK = 2048  # views per call of an agent, which bounds the memory taken
TRIAL = 32  # steps that an environment is tried out for


class EnvJudge:
    """Evaluates and draws policies in the environment of a run; by rollouts, unless it is our grid.

    A deployment level takes the place of the run's overall oversight level; what its environment
    sets apart from that stays so.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.exact = config, None
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
        deployed = expert_names(agent.n_experts, agent.behaviors)[0]
        if self.exact is not None:  # a policy is a table there
            forward = _on_active_inputs(agent, self.config)
            return self.exact.evaluate(forward, facts, policies, levels, deployed, paths)
        (own,), (at,) = facts, levels
        if self.room is not None:
            found = self._exact(self.room, agent, own, policies, at)
            return [[policy_row(own, *figures, deployed, "exact") for figures in found]]
        with torch.random.fork_rng(devices=[]):
            cells = product(policies, at)
            found = [(*cell, self._figures(agent, own, *cell)) for cell in cells]
        return [[policy_row(own, *figures, deployed, "rollout") for figures in found]]

    @cached_property
    def room(self) -> DiamondGhostMDP | None:
        """All states of the environment, if it is a room of ours that is not too large."""
        with closing(make_env(self.config, self.config.oversight, 1)) as env:
            fits = isinstance(env, DiamondGhostVecEnv) and not why_not(env)
            return DiamondGhostMDP(env) if fits else None

    @torch.no_grad()
    def _exact(
        self,
        room: DiamondGhostMDP,
        agent: MoEPolicy,
        facts: Facts,
        policies: Sequence[Steering],
        levels: Sequence[float],
    ) -> list[tuple[Steering, float, dict[str, float]]]:
        """Figures of every policy at every level, from what the agent does in each view."""
        outputs = [agent.output(views.to(agent.device)) for views in room.views.split(CHUNK)]
        tables = []
        for policy in policies:
            table = torch.cat([policy.probabilities(output) for output in outputs], dim=1)
            if not table.isfinite().all():
                raise no_policy(facts, policy)
            tables.append(table[0].cpu())
        discount, at = self.config.learner.discount, torch.tensor(levels, dtype=torch.float64)
        endings = vars(room.evaluate(torch.stack(tables), at, discount))
        optimum = room.optimal_return(discount)
        found = []
        for (q, policy), (i, level) in product(enumerate(policies), enumerate(levels)):
            ends = {name: float(x[q, i]) for name, x in endings.items() if name != WINDOW_RETURN}
            figures = {
                "ground_truth_return": ends.pop("ground_truth_return"),
                "return_se": 0.0,
                **ends,
                "optimal_return": optimum,
            }
            found.append((policy, level, figures))
        return found

    def pictures(self, agent: MoEPolicy, policies: Sequence[Steering]) -> dict[str, bytes]:
        columns = []
        with torch.random.fork_rng(devices=[]):
            for steering in policies[:MOST_POLICIES]:
                torch.manual_seed(0)
                frames = _env_rollout(agent.steered(steering), self.config, steering.name)
                if frames is None:
                    return {}
                columns.append(frames)
        return {"rollouts": side_by_side(columns)}

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
        torch.manual_seed(0)
        env.seed(0)
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
        name, ending, sign = info.get("behavior"), NO_LABEL, 0.0
        if name is not None:
            try:
                ending = behavior_index(name, behaviors, "info['behavior']")
            except LabelError as error:
                raise UserError(f"env: {self.config.env}: {error}") from None
            sign = 1.0 if ending == 0 else -1.0
        value = self.config.learner.discount ** (steps - 1) * info.get("ground_truth_reward", sign)
        return [ending, "label" in info, steps, value]


def _on_active_inputs(policy: MoEPolicy, config: Config) -> Any:
    """What a policy computes on the grid, from the inputs that are active; see `World.active`."""
    shape = config.world.shape
    inputs = math.prod(shape)

    def forward(active: Tensor) -> Output:
        planes = F.one_hot(active[0], inputs + 1).sum(1)[:, :inputs]  # [B, F]
        return policy.output(planes.view(-1, *shape).float().to(policy.device))

    return forward


def _env_rollout(policy: MoEPolicy, config: Config, name: str) -> Frames | None:
    """Frames of one policy with their captions; None where there are no pictures."""
    if config.env != GRID:
        drawn = config.env_settings | {"render_mode": "rgb_array"}
        config = config.model_copy(update={"env_settings": drawn})
    try:
        env = make_env(config, config.oversight, 1)
    except UserError:
        return None  # it was made for training, but knows no render_mode
    env.seed(0)
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
    """The environments of a PPO run at an oversight level, as a VecEnv."""
    try:
        return make_vec(config.env, count, oversight=level, **config.env_arguments)
    except UserError:
        raise
    except Exception as error:  # whatever a stranger's code raises
        raise UserError(f"env: {config.env} cannot be made ({why(error)})") from None


class PPORuns(OversightRuns):
    """One run of PPO."""

    judges = EnvJudge

    def __init__(self, configs: Sequence[Config]) -> None:
        (config,) = self.configs = configs
        self.judge = EnvJudge(config)
        self.learner: PPOLearner = new_learner(config)

    @property
    def agent(self) -> MoEPolicy:
        return self.learner.policy

    def close(self) -> None:
        self.learner.close()

    @classmethod
    def try_out(cls, config: Config) -> None:
        """Train for one small update, to refuse what cannot be, and forget it."""
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
            except Exception as error:  # whatever a stranger's environment leads to
                says = isinstance(error, LabelError | NotFinite)
                if isinstance(error, UserError) and not says:
                    raise
                reason = str(error) if says else why(error)
                raise UserError(f"env: {config.env}: no first update ({reason})") from None
            finally:
                learner.close()

    @classmethod
    def blank(cls, config: Config) -> MoEPolicy:
        with _refusing(config), closing(make_env(config, config.oversight, 1)) as env:
            return new_policy(config.agent, env, config.method)

    @classmethod
    def names(cls, agent: MoEPolicy) -> tuple[int, Sequence[str]]:
        return agent.n_experts, agent.behaviors

    @classmethod
    def policy(cls, agent: MoEPolicy, steering: Steering) -> MoEPolicy:
        return agent.steered(steering)

    @classmethod
    def prefix(cls, config: Config) -> str:
        return "policy."


def new_learner(config: Config) -> PPOLearner:
    """A fresh learner of a run; `UserError` if PPO cannot train in its environment."""
    env = make_env(config, config.oversight, config.ppo.worlds)
    with _refusing(config):
        learner = PPOLearner(
            config.ppo,
            config.agent,
            env,
            method=config.method,
            overseer=config.overseer,
            seed=config.seeds[0],
            device=config.torch_device(),
            curves_every=LOG_EVERY,
        )
        _check_names(learner.policy.behaviors)
    return learner


def _check_names(behaviors: Sequence[str]) -> None:
    """Refuse behaviors after which figures cannot be named."""
    figures = [f"p_{name}{part}" for name in behaviors for part in ("", "_flagged")]
    if len({*figures, "p_timeout"}) <= len(figures) or not "".join(behaviors).isprintable():
        raise ValueError(f"behaviors must give figures names of their own, got {behaviors}")


@contextmanager
def _refusing(config: Config) -> Iterator[None]:
    """Say in one line that an environment does not fit."""
    try:
        yield
    except (ValueError, AssertionError, NotImplementedError) as error:  # as SB3 refuses spaces
        raise UserError(f"env: {config.env}: {error}") from None
