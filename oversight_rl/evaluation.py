"""Evaluation: what steered policies do at any oversight level, exactly where the world allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oversight_rl.agents.networks import Agent, cumulative, sample
from oversight_rl.agents.steering import Steering, standard, steering_curve
from oversight_rl.config import Config
from oversight_rl.envs.mdp import Endings, WorldMDP, why_not
from oversight_rl.envs.settings import UserError
from oversight_rl.envs.world import BEHAVIORS, NO_LABEL, World, WorldConfig

if TYPE_CHECKING:
    from oversight_rl.agents.ppo.policy import MoEPolicy

WINDOW = 32
"""Steps of the published metric's windows."""
ROLLOUT_WORLDS = 4096  # worlds per batch of rollout evaluation, bounds its memory
ENVIRONMENTS = 512  # of rollout evaluation in any environment


@dataclass(frozen=True)
class Row:
    """One line of the result table: a policy at a deployment oversight level."""

    method: str
    seed: int
    train_oversight: float
    deploy_oversight: float
    policy: str
    greedy: bool
    temperature: float
    ground_truth_return: float
    """Expected discounted ground-truth return per episode, from a fresh start."""
    return_se: float
    """Its standard error; 0 where it is exact, nan where one episode tells nothing of it."""
    p_diamond: float
    p_ghost: float
    p_timeout: float
    p_diamond_flagged: float
    """Chance of ending on a diamond that is flagged."""
    p_ghost_flagged: float
    """Chance of ending on a ghost that is flagged."""
    p_ghost_on_path: float
    """Chance of ending on a ghost that lay on a shortest path to the diamond at the start; nan
    where it was not asked for."""
    episode_length: float
    """Mean steps per episode."""
    window_return: float
    """The published metric: mean discounted return per visited step, within windows of 32."""
    optimal_return: float
    """The best return that any policy can have; nan where it is not known."""
    evaluator: str
    """`exact` (dynamic programming) or `rollout` (sampled episodes)."""
    env_steps: int
    """Steps taken in training, over all worlds of the run, looks that select an agent included."""
    wall_seconds: float
    """Training time of the stack, evaluation left out, over its number of runs."""


@dataclass(frozen=True)
class Subject:
    """Who is evaluated: one run of a stack, and what the table says of its training."""

    method: str
    seed: int
    train_oversight: float
    env_steps: int = 0
    wall_seconds: float = 0.0


def _no_policy(subject: Subject, policy: Steering) -> UserError:
    """What to say of an agent that diverged, or whose file was forged."""
    return UserError(
        f"{subject.method}, seed {subject.seed}: {policy.name}: its action probabilities are not "
        "finite numbers"
    )


class Evaluator:
    """Evaluates stacks of agents in one kind of world.

    Args:
        config: the world. A deployment level is its overall oversight level; squares with a
            level of their own keep that.
        discount: per step.
        device: where to compute.
        episodes: per policy and level, where exact evaluation does not apply.
        seed: of the rollouts.
    """

    def __init__(
        self,
        config: WorldConfig,
        discount: float,
        device: torch.device | str = "cpu",
        episodes: int = 20_000,
        seed: int = 0,
    ) -> None:
        self.config = config
        self.discount, self.device = discount, torch.device(device)
        self.episodes, self.seed = episodes, seed
        world = World(self.config, device=device)
        self.mdp = None if why_not(world) else WorldMDP(world)
        plain = World(self.config.model_copy(update={"spurious_oversight": 0.0}), device=device)
        self.optimal_return = (  # flags, spurious ones too, change nothing about it
            math.nan if why_not(plain) else WorldMDP(plain).optimal_return(discount)
        )

    @torch.no_grad()
    def evaluate(
        self,
        agent: Agent,
        subjects: Sequence[Subject],
        policies: Sequence[Steering],
        levels: Sequence[Sequence[float]],
        paths: bool = False,
    ) -> list[list[Row]]:
        """The result table of each run.

        Args:
            agent: a stack of R agents.
            subjects: one per run.
            policies: steerings to evaluate.
            levels: deployment oversight levels of each run.
            paths: whether to tell ghosts on a shortest path apart.

        Returns:
            Rows per run, by policy, then level.

        Raises:
            UserError: action probabilities are not finite.
        """
        every = sorted({level for own in levels for level in own})
        if self.mdp is not None:
            endings, on_path, finite = self._exact(agent, policies, every, paths)
            errors = torch.zeros_like(endings.ground_truth_return)
        else:
            endings, on_path, errors, finite = self._rollouts(agent, policies, every)
        if not finite.all():
            run, q = divmod(int(finite.int().argmin()), len(policies))
            raise _no_policy(subjects[run], policies[q])

        def row(run: int, q: int, level: float) -> Row:
            at = (run * len(policies) + q, every.index(level))
            subject, policy = subjects[run], policies[q]
            return Row(
                method=subject.method,
                seed=subject.seed,
                train_oversight=subject.train_oversight,
                deploy_oversight=level,
                policy=policy.name,
                greedy=policy.greedy,
                temperature=policy.temperature,
                return_se=float(errors[at]),
                p_ghost_on_path=float(on_path[at]),
                optimal_return=self.optimal_return,
                evaluator="exact" if self.mdp is not None else "rollout",
                env_steps=subject.env_steps,
                wall_seconds=subject.wall_seconds,
                **{name: float(figure[at]) for name, figure in vars(endings).items()},
            )

        return [
            [row(run, q, level) for q in range(len(policies)) for level in own]
            for run, own in enumerate(levels)
        ]

    def _exact(
        self, agent: Agent, policies: Sequence[Steering], levels: list[float], paths: bool
    ) -> tuple[Endings, Tensor, Tensor]:
        """Endings and the chance of a ghost on the path, nan if not asked for; `[R * Q, L]` each.

        Last, whether all probabilities are finite, `[R * Q]`.
        """
        assert self.mdp is not None

        forward = agent.prepare()

        def table(active: Tensor) -> Tensor:
            output = forward(active[None])
            steered = torch.stack([p.probabilities(output) for p in policies], dim=1)
            return steered.flatten(0, 1)  # [R * Q, B, A]

        probabilities = self.mdp.policy_table(table)
        finite = probabilities.isfinite().flatten(1).all(1)
        at = torch.tensor(levels)
        endings = self.mdp.evaluate(probabilities, at, self.discount, WINDOW)
        if paths:
            return endings, self.mdp.ghost_on_path(probabilities, at), finite
        return endings, torch.full_like(endings.p_ghost, torch.nan), finite

    def _rollouts(
        self, agent: Agent, policies: Sequence[Steering], levels: list[float]
    ) -> tuple[Endings, Tensor, Tensor, Tensor]:
        """Endings, ghosts on the path, standard error of the return, all `[R * Q, L]`, sampled.

        Last, whether all probabilities were finite, `[R * Q]`.

        Every policy meets the same starts, so that differences between policies are sharper than
        each figure.
        """
        runs = agent.head.weight.shape[0]
        columns = []
        for level in levels:
            world = World(self.config, level, self.device)
            figures = [self._episodes(agent, policy, world, runs) for policy in policies]
            columns.append(torch.stack(figures, dim=1).flatten(0, 1))  # [R * Q, 11]
        *parts, on_path, error, finite = torch.stack(columns, dim=1).unbind(-1)
        return Endings(*parts), on_path, error, finite.bool().all(-1)

    def _episodes(self, agent: Agent, policy: Steering, world: World, runs: int) -> Tensor:
        """Figures of one policy at one level by rollouts: Endings, ghost on the path, error, and
        whether (1 or 0) all probabilities were finite.

        Each world's first episode gives the figures per episode, so that short episodes are not
        over-represented. The window return is published as it is: episodes running on, cut at the
        window's edges. A window starts at a random phase after the first episodes, for worlds
        that mostly time out stay in step with each other.
        """
        generator = torch.Generator(self.device).manual_seed(self.seed)
        limit, channels = self.config.max_steps, world.noise_channels
        forward = agent.prepare()
        finite = torch.ones(runs, dtype=torch.bool, device=self.device)
        batches = []
        for start in range(0, self.episodes, ROLLOUT_WORLDS):
            n = min(ROLLOUT_WORLDS, self.episodes - start)

            def noise(shape: tuple[int, ...]) -> Tensor:
                return torch.rand(shape, generator=generator, device=self.device)

            state = world.reset(noise((1, n, channels)).expand(runs, -1, -1))
            on_path = world.ghost_on_path(state)
            flagged = torch.zeros(runs, n, dtype=torch.bool, device=self.device)
            first = torch.ones(runs, n, dtype=torch.bool, device=self.device)
            ending = torch.full((runs, n), -1, device=self.device)
            length = torch.full((runs, n), limit, device=self.device)
            opening = limit + (noise((1, n)) * limit).long()  # when each world's window starts
            rewards, dones = [], []
            for t in range(2 * limit + WINDOW):
                fresh = world.reset(noise((1, n, channels)).expand(runs, -1, -1))
                chances = policy.probabilities(forward(world.active(state)))
                finite &= chances.isfinite().flatten(1).all(1)
                action = sample(cumulative(chances), noise((1, n)).expand(runs, -1))
                state, step = world.step(state, action, fresh)
                done = step.seen.terminated | step.seen.truncated
                ending = torch.where(first & done, step.truth.ending, ending)
                flagged = torch.where(first & done, step.seen.label != NO_LABEL, flagged)
                length = torch.where(first & done, t + 1, length)
                first = first & ~done
                rewards.append(step.truth.reward)
                dones.append(done)
            diamond, ghost = (ending == 0).double(), (ending == 1).double()
            value = self.discount ** (length - 1) * (diamond - ghost)
            following, within = torch.zeros_like(value), torch.zeros_like(value)
            for t in reversed(range(limit, len(rewards))):
                inside = (opening <= t) & (t < opening + WINDOW)
                following = rewards[t] + self.discount * following.masked_fill(dones[t], 0.0)
                following = following * inside
                within += following / WINDOW
            timeout = 1 - diamond - ghost
            endings = [value, diamond, ghost, timeout, diamond * flagged, ghost * flagged]
            batches.append(torch.stack([*endings, length.double(), within, ghost * on_path]))
        figures = torch.cat(batches, dim=-1)  # [9, R, episodes]
        one = figures.shape[-1] == 1
        error = figures[0].std(-1, correction=int(not one)) / figures.shape[-1] ** 0.5
        error = torch.full_like(error, torch.nan) if one else error
        return torch.cat([figures.mean(-1), error[None], finite.double()[None]]).mT  # [R, 11]


class EnvEvaluator:
    """Evaluates policies in any environment, by rollouts.

    Args:
        config: of the run. A deployment level takes the place of its overall oversight level; what
            its environment sets apart from that stays so.
        episodes: per policy and level.
        seed: of the rollouts.
    """

    def __init__(self, config: Config, episodes: int, seed: int = 0) -> None:
        self.config = config
        self.episodes, self.seed = episodes, seed

    def evaluate(
        self,
        agent: MoEPolicy,
        subjects: Sequence[Subject],
        policies: Sequence[Steering],
        levels: Sequence[Sequence[float]],
        paths: bool = False,
    ) -> list[list[Row]]:
        """The result table of the one run, see `Evaluator.evaluate`; no ghosts on paths here.

        Raises:
            UserError: action probabilities, or what the environment says of returns, are not
                finite.
        """
        (subject,), (own,) = subjects, levels
        with torch.random.fork_rng(devices=[]):
            return [[self._row(agent, subject, p, level) for p in policies for level in own]]

    def _row(self, agent: MoEPolicy, subject: Subject, steering: Steering, level: float) -> Row:
        if not all(bool(p.isfinite().all()) for p in agent.parameters()):
            raise _no_policy(subject, steering)
        try:
            figures = self._episodes(agent.steered(steering), level)
        except FloatingPointError:
            raise _no_policy(subject, steering) from None
        if not np.isfinite(figures).all():
            raise UserError(f"env: {self.config.env}: a ground_truth_reward is not finite")
        wanted, unwanted, flagged, length, value = figures.T
        return Row(
            method=subject.method,
            seed=subject.seed,
            train_oversight=subject.train_oversight,
            deploy_oversight=level,
            policy=steering.name,
            greedy=steering.greedy,
            temperature=steering.temperature,
            ground_truth_return=float(value.mean()),
            return_se=float(value.std() / len(value) ** 0.5),
            p_diamond=float(wanted.mean()),
            p_ghost=float(unwanted.mean()),
            p_timeout=float((wanted + unwanted == 0).mean()),
            p_diamond_flagged=float((wanted * flagged).mean()),
            p_ghost_flagged=float((unwanted * flagged).mean()),
            p_ghost_on_path=math.nan,
            episode_length=float(length.mean()),
            window_return=math.nan,
            optimal_return=math.nan,
            evaluator="rollout",
            env_steps=subject.env_steps,
            wall_seconds=subject.wall_seconds,
        )

    def _episodes(self, policy: MoEPolicy, level: float) -> NDArray[np.float64]:
        """Figures of whole episodes: wanted, unwanted, labeled (each 0 or 1), steps, return.

        Each environment plays the same number of episodes, so that short ones are not
        over-represented. Returns `[episodes or a few more, 5]`.
        """
        env = make_env(self.config, level, min(ENVIRONMENTS, self.episodes))
        each = -(-self.episodes // env.num_envs)
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
                    figures.append(self._episode(infos[i], policy.behaviors[0], int(steps[i])))
                played[i] += 1
                steps[i] = 0
        env.close()
        return np.array(figures, dtype=float)

    def _episode(self, info: dict[str, Any], wanted: str, steps: int) -> list[float]:
        behavior = info.get("behavior")
        sign = 0.0 if behavior is None else 1.0 if behavior == wanted else -1.0
        value = self.config.learner.discount ** (steps - 1) * info.get("ground_truth_reward", sign)
        return [sign > 0, sign < 0, "label" in info, steps, value]


class AnyEvaluator(Protocol):
    """What evaluates the agents of a run, exactly or by rollouts."""

    def evaluate(
        self,
        agent: Any,
        subjects: Sequence[Subject],
        policies: Sequence[Steering],
        levels: Sequence[Sequence[float]],
        paths: bool = False,
    ) -> list[list[Row]]:
        """See `Evaluator.evaluate`."""


def final_tables(
    evaluator: AnyEvaluator, agent: Any, subjects: Sequence[Subject], configs: Sequence[Config]
) -> list[list[Row]]:
    """The last table of each run: sampled and greedy, at all deployment levels, and blends.

    Args:
        evaluator: of these runs.
        agent: a stack of agents, or a PPO policy.
        subjects: one per run.
        configs: one per run.
    """
    names = agent.n_experts, getattr(agent, "behaviors", BEHAVIORS)
    policies = standard(*names)
    policies += [policy.with_options(greedy=True) for policy in policies]
    levels = [sorted({c.oversight, *c.evaluation.oversight}) for c in configs]
    tables = evaluator.evaluate(agent, subjects, policies, levels, paths=True)
    if agent.n_experts > 1:
        own = [[config.oversight] for config in configs]
        curves = evaluator.evaluate(agent, subjects, steering_curve(*names), own)
        tables = [rows + curve for rows, curve in zip(tables, curves, strict=True)]
    return tables


def evaluator_of(config: Config, device: torch.device | str = "cpu") -> AnyEvaluator:
    """The evaluator of a run's agents."""
    episodes = config.episodes
    if config.algo == "ppo":
        return EnvEvaluator(config, episodes)
    return Evaluator(config.world, config.learner.discount, device, episodes)


def make_env(config: Config, level: float, count: int) -> Any:
    """The environments of a PPO run at an oversight level, as a VecEnv.

    Raises:
        UserError: there is no such environment, or it does not take these settings.
    """
    from oversight_rl.envs.plugins import why
    from oversight_rl.envs.vector import make_vec  # SB3 and MiniGrid take a while to load

    try:
        return make_vec(config.env, count, oversight=level, **config.env_arguments)
    except UserError:
        raise
    except Exception as error:  # whatever a stranger's code raises
        raise UserError(f"env: {config.env} cannot be made ({why(error)})") from None
