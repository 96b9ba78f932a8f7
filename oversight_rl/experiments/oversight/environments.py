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
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor
from torch.nn import functional as F

from oversight_rl.agents.learner import NotFinite
from oversight_rl.agents.networks import Agent, Output
from oversight_rl.agents.ppo.learner import PPOLearner, new_policy
from oversight_rl.agents.ppo.policy import MoEPolicy
from oversight_rl.agents.steering import Steering, expert_names
from oversight_rl.agents.threads import on_threads
from oversight_rl.envs import render
from oversight_rl.envs.labels import LabelError, behavior_index
from oversight_rl.envs.minigrid_batch import DiamondGhostVecEnv
from oversight_rl.envs.minigrid_mdp import DiamondGhostMDP, why_not
from oversight_rl.envs.overseen import Overseen
from oversight_rl.envs.plugins import why
from oversight_rl.envs.settings import NO_LABEL, UserError
from oversight_rl.envs.vector import make_vec
from oversight_rl.experiments.oversight.config import GRID, Config
from oversight_rl.experiments.oversight.evaluation import (
    Evaluator,
    no_policy,
    policy_row,
    steered_return,
)
from oversight_rl.experiments.oversight.grid import (
    HELD,
    MOST_POLICIES,
    RINGS,
    Frames,
    side_by_side,
)
from oversight_rl.experiments.oversight.rollouts import Act, SideBySide, acting, play
from oversight_rl.experiments.oversight.runs import WINDOW_RETURN, OversightRuns
from oversight_rl.runs.experiment import LOG_EVERY
from oversight_rl.runs.rows import Facts, Row

WORLDS = 512  # of each policy and level at most, where all are side by side
ENVIRONMENTS = 32  # of others; more would stand by longer until the last episode has ended
CHUNK = 2048  # views per call of an agent, which bounds the memory taken
TILES = 2**23  # of all worlds side by side, which bounds the memory taken
STILLS = 40  # frames of an animation, which have more colors than the grid's
TRIAL = 32  # steps that an environment is tried out for


class EnvJudge:
    """Evaluates and draws policies in the environment of a run.

    That is exact on our grid and in MiniGrid rooms of ours that are small and empty; elsewhere by
    rollouts.

    A deployment level takes the place of the run's overall oversight level; what its environment
    sets apart from that stays so.
    """

    def __init__(self, config: Config, *, exact: bool = True) -> None:
        self.config, self.exact, self.may_be_exact = config, None, exact
        if exact and config.env == GRID:
            known = Evaluator(config.world, config.learner.discount, labels=config.labels)
            self.exact = known if known.mdp is not None else None

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
        exact = self.room is not None
        with torch.random.fork_rng(devices=[]):
            found = (self._exact if exact else self._sampled)(agent, own, policies, at)
        by, cells = "exact" if exact else "rollout", product(policies, at)
        rows = zip(cells, found, strict=True)
        return [[policy_row(own, *cell, figures, deployed, by) for cell, figures in rows]]

    @cached_property
    def one(self) -> Any:
        """An environment of the run, closed: to see what it is."""
        with closing(make_env(self.config, self.config.oversight, 1)) as env:
            return env

    @cached_property
    def room(self) -> DiamondGhostMDP | None:
        """All states of the environment, where it is a room of ours with not too many."""
        ours = self.may_be_exact and isinstance(self.one, DiamondGhostVecEnv)
        fits = ours and not why_not(self.one)
        return DiamondGhostMDP(self.one) if fits else None

    @torch.no_grad()
    def _exact(
        self,
        agent: MoEPolicy,
        facts: Facts,
        policies: Sequence[Steering],
        levels: Sequence[float],
    ) -> list[dict[str, float]]:
        """Figures of each policy at each level, from what the agent does in each view."""
        assert self.room is not None
        outputs = [agent.output(views.to(agent.device)) for views in self.room.views.split(CHUNK)]
        tables = []
        for policy in policies:
            table = torch.cat([policy.probabilities(output) for output in outputs], dim=1)
            if not table.isfinite().all():
                raise no_policy(facts, policy)
            tables.append(table[0].cpu())
        discount, at = self.config.learner.discount, torch.tensor(levels, dtype=torch.float64)
        endings = vars(self.room.evaluate(torch.stack(tables), at, discount))
        optimum = self.room.optimal_return(discount)
        figures = []
        for cell in np.ndindex(len(policies), len(levels)):
            ends = {name: float(x[cell]) for name, x in endings.items() if name != WINDOW_RETURN}
            value = ends.pop("ground_truth_return")
            known = {"ground_truth_return": value, "return_se": 0.0}
            known["steered_return"] = steered_return(policies[cell[0]], (value, -value))
            figures.append(known | ends | {"optimal_return": optimum})
        return figures

    def _sampled(
        self,
        agent: MoEPolicy,
        facts: Facts,
        policies: Sequence[Steering],
        levels: Sequence[float],
    ) -> list[dict[str, float]]:
        """Figures of each policy at each level, from whole episodes."""
        if not all(bool(p.isfinite().all()) for p in agent.parameters()):
            raise no_policy(facts, policies[0])
        episodes = self.config.evaluation.episodes
        if isinstance(self.one, DiamondGhostVecEnv):  # whose worlds may have levels of their own
            rows = len(policies) * len(levels)
            worlds = min(WORLDS, episodes, max(1, TILES // (rows * self.one.walls.size)))
            env = make_env(self.config, levels[0], rows * worlds)
            env.set_attr("oversight", np.tile(np.repeat(levels, worlds), len(policies)))
            which = np.repeat(np.arange(len(policies)), len(levels) * worlds)
            act = SideBySide(agent, facts, policies, which)
            steered = [policy for policy in policies for _ in levels]
            return self._played(env, act, agent.behaviors, steered)
        return [
            figures
            for steering, level in product(policies, levels)
            for figures in self._played(
                make_env(self.config, level, min(ENVIRONMENTS, episodes)),
                acting(agent.steered(steering), facts),
                agent.behaviors,
                [steering],
            )
        ]

    def _played(
        self, env: VecEnv, act: Act, behaviors: Sequence[str], policies: Sequence[Steering]
    ) -> list[dict[str, float]]:
        """Figures of rows of worlds, a policy and as many worlds each, from `episodes` of each."""
        rows = len(policies)
        episodes, worlds = self.config.evaluation.episodes, env.num_envs // rows
        each = np.tile(episodes // worlds + (np.arange(worlds) < episodes % worlds), rows)
        found: list[list[list[float]]] = [[] for _ in range(rows)]
        with closing(env):
            for world, steps, info in play(env, act, each):
                found[world // worlds].append(self._episode(info, behaviors, steps))
        return [
            self._figures(np.array(episodes), behaviors, policy)
            for episodes, policy in zip(found, policies, strict=True)
        ]

    def _figures(
        self, episodes: NDArray[np.float64], behaviors: Sequence[str], policy: Steering
    ) -> dict[str, float]:
        """Figures of a policy's episodes `[n, 4]`, see `_episode`."""
        if not np.isfinite(episodes).all():
            raise UserError(f"env: {self.config.env}: a ground_truth_reward is not finite")
        ending, labeled, length, value = episodes.T
        shares = {f"p_{name}": ending == i for i, name in enumerate(behaviors)}
        flagged = {f"{name}_flagged": share * labeled for name, share in shares.items()}
        shares["p_timeout"] = ending == NO_LABEL
        fades = (ending != NO_LABEL) * self.config.learner.discount ** (length - 1)
        toward = [float((fades * (2 * (ending == b) - 1)).mean()) for b in range(len(behaviors))]
        return {
            "ground_truth_return": float(value.mean()),
            "return_se": float(value.std() / len(value) ** 0.5),
            "steered_return": steered_return(policy, toward),
            **{name: float(share.mean()) for name, share in (shares | flagged).items()},
            "episode_length": float(length.mean()),
            "optimal_return": math.nan,
        }

    def _episode(self, info: dict[str, Any], behaviors: Sequence[str], steps: int) -> list[float]:
        """Of an episode: behavior by number, labeled (0 or 1), steps, return."""
        name, ending, sign = info.get("behavior"), NO_LABEL, 0.0
        if name is not None:
            try:
                ending = behavior_index(name, behaviors, "info['behavior']")
            except LabelError as error:
                raise UserError(f"env: {self.config.env}: {error}") from None
            sign = 1.0 if ending == 0 else -1.0
        value = self.config.learner.discount ** (steps - 1) * info.get("ground_truth_reward", sign)
        return [ending, "label" in info, steps, value]

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

    def show(picture: render.Picture) -> None:
        count = ", ".join(f"{behavior} {n}" for behavior, n in tally.items())
        deployed = " (deployed)" * (name == expert_names(policy.n_experts, policy.behaviors)[0])
        shown.append((picture, f"{name}{deployed}\n{count}"))

    while len(shown) < STILLS:
        (picture,) = env.get_images()
        if picture is None:
            return None
        show(picture)
        action, _ = policy.predict(observation)
        world = env.world(0) if isinstance(env, DiamondGhostVecEnv) else None
        observation, _, dones, infos = env.step(action)
        if dones[0]:
            if world is not None:  # which ends there, as others have been reset by now
                world.step(action[0])
                picture = world.get_frame()
            ending = infos[0].get("behavior") or "timeout"
            tally[ending] += 1
            place = list(policy.behaviors).index(ending) if ending != "timeout" else NO_LABEL
            for _ in range(HELD + 1):
                show(render.framed(picture, RINGS.get(place, render.FLAG)))
    env.close()
    return shown[:STILLS]


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
    charts = {**OversightRuns.charts, "All endings": {"how episodes end": "evaluation/p_.*"}}

    def __init__(self, configs: Sequence[Config]) -> None:
        (config,) = self.configs = configs
        self.judge = EnvJudge(config)
        self.learner: PPOLearner = new_learner(config)

    @property
    def agent(self) -> MoEPolicy:
        return self.learner.policy

    def snapshot(self, run: int) -> dict[str, Tensor]:
        on_grid = self.configs[run].env == GRID  # elsewhere there is nothing to look at it with
        return dict(self.agent.named_parameters()) if on_grid else {}

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
    def networks(cls, agent: MoEPolicy) -> Agent:
        return agent.agent

    @classmethod
    def prefix(cls, config: Config) -> str:
        return "policy."


def new_learner(config: Config) -> PPOLearner:
    """A fresh learner of a run; `UserError` if PPO cannot train in its environment."""
    env = make_env(config, config.oversight, config.ppo.worlds)
    if config.labels.ordered:
        env = Overseen(env, config.labels, config.oversight, config.seeds[0])
    with _refusing(config):
        learner = PPOLearner(
            config.ppo,
            config.agent,
            env,
            method=config.method,
            overseer=config.overseeing,
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
