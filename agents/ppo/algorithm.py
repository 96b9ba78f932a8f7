"""Gradient routing on Stable-Baselines3: `RoutedPPO` and its mixture-of-experts policy.

The methods, the routes, the networks and the memory are those of the REINFORCE learner; here they
meet SB3's PPO, its environments, callbacks, logger and files. A label is known at an episode's
end, so `RoutedRolloutBuffer` writes it back to the episode's steps before the learner sees them.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Self, cast
from zipfile import ZipFile

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.utils import LinearSchedule, explained_variance, obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from oversight_rl.agents.learner import NotFinite
from oversight_rl.agents.memory import Memory
from oversight_rl.agents.methods import METHODS, UNFINISHED, Overseer, tables
from oversight_rl.agents.ppo.buffer import (
    RoutedDictRolloutBuffer,
    RoutedRolloutBuffer,
    RoutedSamples,
)
from oversight_rl.agents.ppo.config import DEFAULT_METHOD, LABEL_REACH
from oversight_rl.agents.ppo.endings import ending_memory
from oversight_rl.agents.ppo.experience import SETTLED, Rollout, impute, in_task_scale, judged_anew
from oversight_rl.agents.ppo.held import LateLabel
from oversight_rl.agents.ppo.losses import ending_loss, losses
from oversight_rl.agents.ppo.observations import check_spaces, row_type, row_width
from oversight_rl.agents.ppo.policy import MoEPolicy
from oversight_rl.agents.ppo.targets import targets
from oversight_rl.agents.ppo.told import Told, ask, checked_behaviors
from oversight_rl.agents.steering import MIXTURE
from oversight_rl.agents.threads import on_threads
from oversight_rl.aliases import names_of_0_1
from oversight_rl.envs.readable import readable, readable_vec
from oversight_rl.envs.settings import BEHAVIORS, NO_LABEL, nearest
from oversight_rl.envs.vector import make_vec

PPO_METHODS = tuple(name for name, method in METHODS.items() if method.any_environment)
FIRST_ROLLOUTS, PATIENCE = 2, 20
"""Rollouts, and episodes in them, without a single label after which a warning is due, if the level
is not known."""

SURPRISE = 1e-6
"""Chance of as many episodes without a label below which it is due, if the level is known."""
LESSONS = 12
"""Steps of the classifier of endings in an update; it must be right before the experts are set."""

ROLLOUT = 2048
"""Samples of a rollout at least, unless its steps are given: few environments need long ones."""
MINIBATCHES, LEAST_MINIBATCH = 4, 64
"""Of a rollout at most, and samples in each at least, unless their size is given."""
FIRST_LABELS = 100
"""Labeled endings that the classifier is to have seen before the policy learns."""
LOOKING = 0.1
"""Share of training that this may take at most."""


class RoutedPPO(PPO):
    """PPO with gradient routing, for any environment whose overseer labels some episodes.

    An environment says at an episode's end, in `info`, which behavior it was (`behavior`) and, if
    an overseer saw it, the same as `label`; `oversight_rl.OversightLabels` does it for any other.
    The first behavior is the wanted one, and the first expert its own.

    Args:
        policy: "MoEPolicy", or a subclass of it.
        env: an environment, a VecEnv, or an id, of which `n_envs` are made.
        method: a row of the table of methods that PPO can follow, see `PPO_METHODS`.
        oversight: chance that a behavior is watched in an episode; given to an environment that is
            made from its id, and None with any other.
        n_envs: number of environments, made from an id.
        behaviors: names that labels may have; None: the environment's own `behaviors`, or diamond
            and ghost.
        labeled_weight: weight of a labeled episode's samples next to any other's.
        gate_coef: weight of the gate loss.
        contrast_coef: weight of the contrast loss, for the methods that have one.
        solo_share: share of the episodes in which the deployed expert acts by itself and learns
            from that, for the method that knows, or imputes, how every episode ended.
        task_weight: exchange rate between the environment's reward and the behaviors: how much
            one spread of the task's advantage counts next to one of the behavior's. At 0 the
            reward is not looked at; neither is it where the environment has an attribute
            `has_task` that is False, since its reward says no more than that a behavior was shown.
        gate_replay: remembered labeled observations that the gate learns from in each minibatch.
        label_reach: steps before a rollout's end that its labels reach. Where a method asks for
            labels, a step is learned from when its episode has ended, or when it is as old as this.
        label_recall: chance that an ending which should be labeled is.
        label_error: chance that a label names a wrong behavior.
        threads: of PyTorch, while it learns; None leaves them as they are. Networks of this size
            gain little from a second one, and lose a lot where another process keeps it busy.
        env_kwargs: more for an environment that is made from its id.
        policy_kwargs: as SB3's; `experts` defaults to one for each behavior.
        kwargs: as SB3's PPO, with other defaults: short rollouts of many environments, few epochs.

    Raises:
        ValueError: the method, an argument or a space is not one that this works with.

    Source: arXiv 2410.04332, section 4.3, for the routes; PPO as in SB3.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MoEPolicy": MoEPolicy}
    DEFAULTS: ClassVar[dict[str, Any]] = {
        "learning_rate": LinearSchedule(3e-3, 1e-4, 1.0),
        "n_epochs": 4,
        "gamma": 0.97,
        "gae_lambda": 0.95,
        "ent_coef": 0.02,
        "device": "cpu",
    }

    def __init__(
        self,
        policy: str | type[MoEPolicy],
        env: Any,
        *args: Any,
        method: str = DEFAULT_METHOD,
        oversight: float | None = None,
        n_envs: int = 128,
        behaviors: Sequence[str] | None = None,
        labeled_weight: float = 20.0,
        gate_coef: float = 1.0,
        contrast_coef: float = 1.0,
        solo_share: float = 0.75,
        task_weight: float = 0.5,
        gate_replay: int = 512,
        label_reach: int = LABEL_REACH,
        label_recall: float = 1.0,
        label_error: float = 0.0,
        threads: int | None = 1,
        env_kwargs: dict[str, Any] | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(policy, str) and policy not in self.policy_aliases:
            raise ValueError(
                "policy must be 'MoEPolicy', which takes vectors, images and dictionaries, or a "
                f"subclass of it, got {policy!r}"
            )
        if method not in PPO_METHODS:
            raise ValueError(
                f"method must be one of {', '.join(PPO_METHODS)}, got {method!r}"
                f"{nearest(method, PPO_METHODS)}"
            )
        shares = {"label_recall": label_recall, "label_error": label_error}
        for name, p in (shares | {"solo_share": solo_share}).items():
            if not 0 <= p <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {p}")
        if solo_share == 1:
            raise ValueError("solo_share must be below 1, or the mixture learns nothing")
        numbers = {"task_weight": task_weight, "gate_coef": gate_coef, "gate_replay": gate_replay}
        for name, x in (numbers | {"contrast_coef": contrast_coef}).items():
            if not 0 <= x < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {x}")
        if not 0 < labeled_weight < math.inf:
            raise ValueError(f"labeled_weight must be above 0 and finite, got {labeled_weight}")
        if not isinstance(label_reach, int | np.integer) or label_reach < 0:
            raise ValueError(f"label_reach must be a whole number, 0 or more, got {label_reach!r}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, or None, got {threads}")
        behaviors = None if behaviors is None else checked_behaviors(behaviors)
        own = {"behaviors", "gate", "imputes", "flags", "task", "steering"}
        own &= set(policy_kwargs or {})
        if own:
            raise ValueError(f"policy_kwargs: {own.pop()} follows from the method and behaviors")
        hides = {"flags_visible": False} if METHODS[method].hides_flags else {}
        if not isinstance(env, str) and (oversight is not None or env_kwargs):
            raise ValueError(
                "oversight and env_kwargs are for environments made from their id; give them to "
                "the environment itself, or to OversightLabels"
            )
        if isinstance(env, str):
            level = {} if oversight is None else {"oversight": oversight}
            env = make_vec(env, n_envs, **{**(env_kwargs or {}), **level, **hides})
        self.method, self.behaviors = method, behaviors or ()
        self.told_behaviors: tuple[str, ...] = ()  # what the environment calls its own
        self.steering = MIXTURE  # of a policy that was saved steered
        self.left_out: tuple[str, ...] = ()  # names of what is not read of observations
        self.audit: np.random.Generator | None = None
        self.task_weight, self.threads = task_weight, threads
        self.overseer = Overseer(0.0, None, label_recall, label_error)
        self.labeled_weight = labeled_weight
        self.gate_coef, self.gate_replay = gate_coef, gate_replay
        self.contrast_coef, self.solo_share = contrast_coef, solo_share
        self.label_reach = label_reach
        kwargs["policy_kwargs"] = policy_kwargs
        given = inspect.signature(PPO).bind_partial(policy, env, *args, **kwargs).arguments
        envs = getattr(env, "num_envs", 1)
        n_steps = given.get(
            "n_steps", max(32, math.ceil(ROLLOUT / MINIBATCHES / envs) * MINIBATCHES)
        )
        batch_size = n_steps * envs
        for parts in range(2, MINIBATCHES + 1):  # as many as are alike and not too small
            if n_steps * envs % parts == 0 and n_steps * envs >= parts * LEAST_MINIBATCH:
                batch_size = n_steps * envs // parts
        defaults = self.DEFAULTS | {"n_steps": n_steps, "batch_size": batch_size}
        kwargs |= {name: value for name, value in defaults.items() if name not in given}
        super().__init__(policy, env, *args, **kwargs)

    def _setup_model(self) -> None:
        if self.use_sde:
            raise ValueError("RoutedPPO: use_sde must be False")
        method = METHODS[self.method]
        flags, task = (self.policy_kwargs.get(name) for name in ("flags", "task"))
        if self.env is not None:
            told = ask(self.env, self.method, self.told_behaviors, self.policy_kwargs)
            self._heed(told)
            flags, task = told.flags, told.has_task
        self.behaviors = self.behaviors or BEHAVIORS
        experts = self.policy_kwargs.get("experts", max(2, len(self.behaviors)))
        experts = experts if method.experts == "many" else 1
        if method.experts == "many" and experts < len(self.behaviors):
            raise ValueError(f"experts must be at least {len(self.behaviors)}, got {experts}")
        own = {"experts": experts, "behaviors": self.behaviors, "gate": method.gate}
        own |= {"task": bool(task)}
        replays = experts > 1 and method.gate == "learned" and self.gate_replay > 0
        self.memory = self._new_memory() if replays else None
        self.endings = None
        if method.imputes:
            own |= {"imputes": True, "flags": flags}
            self.endings = ending_memory(self.observation_space, self.action_space)
        self.policy_kwargs = self.policy_kwargs | own
        self._set_tables()
        if self.audit is None:  # it decides which labels go missing or wrong
            self.audit = np.random.default_rng(self.seed)
        if self.rollout_buffer_class is None:
            by_name = isinstance(self.observation_space, spaces.Dict)
            self.rollout_buffer_class = RoutedDictRolloutBuffer if by_name else RoutedRolloutBuffer
        self.rollout_buffer_kwargs = self.rollout_buffer_kwargs | {
            "behaviors": self.behaviors,
            "solo_share": self.solo_share if method.contrasts and method.imputes else 0.0,
            "label_reach": self.label_reach,
        }
        self._warned: set[str] = set()
        self._rollouts = 0
        self._resets: Any = None
        self._warn_of_texts()
        super()._setup_model()
        cast(MoEPolicy, self.policy).steering = self.steering

    def _set_tables(self) -> None:
        experts = self.policy_kwargs["experts"]
        self.tables = tables([self.method], [self.overseer], experts, behaviors=len(self.behaviors))

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """As SB3 has it; the environment is asked what the constructor asks it.

        Raises:
            ValueError: it does not fit what the model was made for.
        """
        env = self._wrap_env(env, self.verbose)
        told = ask(env, self.method, self.told_behaviors, self.policy_kwargs)
        super().set_env(env, force_reset)
        held = cast(RoutedRolloutBuffer, self.rollout_buffer).held
        held.interrupt()
        held.ended.clear()  # its names are others
        self._heed(told)
        self._warn_of_texts()
        self._set_tables()

    def _heed(self, told: Told) -> None:
        """Take over what an environment said."""
        self.told_behaviors = told.behaviors or self.told_behaviors
        self.behaviors = self.behaviors or self.told_behaviors
        self.left_out = told.left_out
        self._knows_level = told.oversight is not None
        self.overseer = replace(
            self.overseer,
            oversight=float(told.oversight or 0.0),
            ghost_oversight=told.ghost_oversight,
        )

    def _new_memory(self) -> Memory:
        space = self.observation_space
        return Memory(1, row_width(space), self.gate_replay, row_type(space))

    def set_random_seed(self, seed: int | None = None) -> None:
        """As SB3 has it.

        Raises:
            ValueError: the environment cannot be seeded.
        """
        try:
            super().set_random_seed(seed)
        except AttributeError as error:  # of a VecEnv that is not SB3's
            if error.name != "seed":
                raise
            raise ValueError(
                "seed: these environments cannot be seeded; leave it out, or seed them, torch and "
                "NumPy yourself"
            ) from error

    def learn(self, *args: Any, **kwargs: Any) -> Self:
        """As SB3 has it, with the model's number of threads.

        Raises:
            ValueError: there is no environment.
        """
        if self.env is None:
            raise ValueError("there is no environment: load(..., env=env) or set_env(env) first")
        with on_threads(self.threads or torch.get_num_threads()):
            return super().learn(*args, **kwargs)

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        n_rollout_steps: int,
    ) -> bool:
        """As SB3 has it; the deployed expert acts by itself in some of the episodes.

        The reward is kept as it came: what follows an episode that a time limit cut is known when
        the rollout is whole. One that is stopped on the way leaves nothing behind; after an
        exception, nobody knows where the environments are, and they are reset.

        Raises:
            ValueError: the policy is steered.
        """
        buffer, policy = cast(RoutedRolloutBuffer, rollout_buffer), cast(MoEPolicy, self.policy)
        if policy.n_experts > 1 and policy.steering != MIXTURE:
            raise ValueError(
                f"the policy is steered to {policy.steering.name}, and learns as the mixture only: "
                "set model.policy = model.steer('mixture') first"
            )
        if self._reset_by_others(env):
            self._last_obs = cast(Any, self._start(env))
            self._last_episode_starts = np.ones(env.num_envs, dtype=bool)
        policy.set_training_mode(False)
        buffer.reset()
        callback.on_rollout_start()
        whole = False
        try:
            for _ in range(n_rollout_steps):
                alone = buffer.acts_alone
                acting = torch.as_tensor(alone, device=self.device) if alone.any() else None
                with torch.no_grad():
                    obs_tensor = obs_as_tensor(cast(Any, self._last_obs), self.device)
                    actions, values, log_probs = policy(obs_tensor, alone=acting)
                actions = actions.cpu().numpy()
                clipped_actions = actions
                if isinstance(self.action_space, spaces.Box):
                    low, high = self.action_space.low, self.action_space.high
                    clipped_actions = np.clip(actions, low, high).astype(low.dtype, copy=False)
                new_obs, rewards, dones, infos = env.step(clipped_actions)
                self.num_timesteps += env.num_envs
                callback.update_locals(locals())
                goes_on = callback.on_step()
                if self._reset_by_others(env):  # a callback did: these episodes are cut
                    infos = [
                        info
                        if done
                        else {
                            "TimeLimit.truncated": True,
                            "terminal_observation": last,
                            "late_labels": info.get("late_labels"),
                        }
                        for info, done, last in zip(infos, dones, new_obs, strict=True)
                    ]
                    new_obs, dones = cast(Any, self._start(env)), np.ones_like(dones)
                if goes_on:
                    self._update_info_buffer(infos, dones)
                    buffer.note(infos, dones)
                    if isinstance(self.action_space, spaces.Discrete):
                        actions = actions.reshape(-1, 1)
                    starts = cast(Any, self._last_episode_starts)
                    last = cast(Any, self._last_obs)
                    buffer.add(last, actions, rewards, starts, values, log_probs)
                buffer.pass_on(dones)
                self._last_obs, self._last_episode_starts = cast(Any, new_obs), dones
                if not goes_on:
                    return False
            self._learn_what_it_was(buffer)
            whole = True
        except BaseException:
            self._last_obs = None
            raise
        finally:
            if not whole:
                buffer.held.interrupt()
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: Any = None,
        reset_num_timesteps: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[int, BaseCallback]:
        """As SB3 has it, whose own resets are no surprise."""
        starts_anew = self._last_obs is None or reset_num_timesteps
        result = super()._setup_learn(
            total_timesteps, callback, reset_num_timesteps, *args, **kwargs
        )
        if starts_anew:
            self._reset_by_others(cast(VecEnv, self.env))
        return result

    def _start(self, env: VecEnv) -> Any:
        observation = env.reset()
        self._reset_by_others(env)
        return observation

    def _reset_by_others(self, env: VecEnv) -> bool:
        """Whether the environments were reset since the last time that this was asked.

        SB3's VecEnvs forget seeds and options at every reset, and take new lists for them.
        """
        base = env.unwrapped
        now = getattr(base, "_seeds", None), getattr(base, "_options", None)
        before, self._resets = self._resets, now
        return before is not None and all(x is not y for x, y in zip(before, now, strict=True))

    def _learn_what_it_was(self, buffer: RoutedRolloutBuffer) -> None:
        """Write labels back to all steps of their episodes, remember them, and set the targets."""
        policy, method = cast(MoEPolicy, self.policy), METHODS[self.method]
        rollout, waits = Rollout(policy, buffer, self._last_obs), self.tables.asks_labels
        own, task = rollout.values()
        reward = np.zeros_like(task)
        if policy.task and self.task_weight > 0:
            reward = in_task_scale(policy, buffer, self.gamma)
        if bool(self.tables.sees_truth.any()):  # and nobody's labels
            buffer.names.clear()
            buffer.late.clear()
        self._warn_of_late(buffer.look_back(own, task, reward))
        _, left = buffer.outcomes(self.tables, cast(np.random.Generator, self.audit))
        buffer.choose(waits)
        if self.memory is not None:
            buffer.remember(self.memory)
        chances = None
        if self.endings is not None:
            buffer.remember_endings(self.endings)
            self.imputed = impute(policy, buffer.window.steps)
            if int(self.endings.count):
                end = (np.arange(len(left))[:, None] + left).clip(max=len(left) - 1)
                at_end = np.take_along_axis(self.imputed, end[..., None], 0)
                chances = np.nan_to_num(at_end)
        share, log_prob, value = judged_anew(policy, buffer, self.clip_range_vf is not None)
        found = targets(
            rollout.experience(left, chances, share),
            self.tables,
            discount=self.gamma,
            trace=self.gae_lambda,
            labeled_weight=self.labeled_weight,
            imputes=method.imputes,
            normalize=self.normalize_advantage,
            task_weight=self.task_weight,
        )
        buffer.set_targets(found, log_prob, value, share)
        buffer.hold(waits)

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        if isinstance(env, VecEnv | gym.Env):  # of anything else SB3 says what it is
            env = readable_vec(env) if isinstance(env, VecEnv) else readable(env)
            check_spaces(env.observation_space, env.action_space)
        try:
            return PPO._wrap_env(env, verbose, monitor_wrapper)
        except AssertionError as error:  # as SB3 says that it takes images of one kind at once
            raise ValueError(str(error)) from None

    def _warn_of_texts(self) -> None:
        if self.left_out:
            self._warn(
                "texts",
                f"{', '.join(map(repr, self.left_out))} is left out of the observations: it is a "
                "text, and no network here reads any",
            )

    def _warn_of_data(self) -> None:
        """Warn, once each, of what makes learning from labels hopeless."""
        buffer = cast(RoutedRolloutBuffer, self.rollout_buffer)
        self._rollouts += 1
        if self._knows_level:
            missing = (1 - self.overseer.oversight) ** buffer.episodes < SURPRISE
        else:
            missing = buffer.episodes >= PATIENCE and self._rollouts >= FIRST_ROLLOUTS
        if missing and not buffer.labels:
            told = (buffer.truth != NO_LABEL).any()
            self._warn(
                "unlabeled",
                f"none of {buffer.episodes:,} episodes was labeled: at their ends info says "
                f"{'a behavior and no label' if told else 'neither label nor behavior'}. Does the "
                "environment put 'label' there where an overseer saw the episode, and does every "
                "wrapper pass info on? OversightLabels does it for any environment"
                + (
                    ""
                    if self._knows_level
                    else "; an attribute oversight says how often to expect one"
                ),
            )
        if buffer.labels > buffer.told:
            self._warn(
                "untold",
                "episodes were labeled that had no 'behavior' in info: evaluation and oracle "
                "methods will not know what they were",
            )
        acted = buffer.due & ~buffer.window.steps.alone
        beyond = float((buffer.outcome[acted] == UNFINISHED).mean()) if acted.any() else 0.0
        if self.tables.asks_labels and beyond > 0.5 and self._n_updates >= SETTLED * self.n_epochs:
            self._warn(
                "unfinished",
                f"{beyond:.0%} of the steps learned from are of episodes whose end, and label, is "
                f"more than {buffer.held.reach} steps away: let label_reach be longer",
            )

    def _warn_of_late(self, missed: Sequence[LateLabel]) -> None:
        """Warn, once, of late labels that are lost, or of no use."""
        window = cast(RoutedRolloutBuffer, self.rollout_buffer).window
        if window.late.any() and not self.tables.asks_labels and self.endings is None:
            self._warn(
                "late for nothing",
                f"method {self.method} learns nothing from labels that come late: its rewards are "
                "paid when an episode ends",
            )
        if missed:
            label, buffer = missed[0], cast(RoutedRolloutBuffer, self.rollout_buffer)
            self._warn(
                "late",
                f"a late label is lost, of episode {label.episode!r} of environment "
                f"{label.environment}: either no episode ended with this info['episode_id'] there, "
                f"or it had its label, or it was more than label_reach = {buffer.held.reach} steps "
                "ago",
            )

    def _warn(self, cause: str, text: str) -> None:
        if cause not in self._warned:
            self._warned.add(cause)
            warnings.warn(text, UserWarning, stacklevel=4)

    def train(self) -> None:
        """Update the policy from the rollout: PPO's losses, with every gradient routed.

        Raises:
            NotFinite: numbers went bad.
        """
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        clip = self.clip_range(self._current_progress_remaining)  # type: ignore[operator]
        self._warn_of_data()
        figures: dict[str, list[Tensor]] = {}
        if self.endings is not None:
            lessons = LESSONS if int(self.endings.count) else 0
            figures["reward_model_loss"] = [self._learn_endings() for _ in range(lessons)]
        for _ in range(self.n_epochs):
            for batch in self.rollout_buffer.get(self.batch_size):
                loss, parts = self.loss(cast(Any, batch), clip)
                for name, value in parts.items():
                    figures.setdefault(name, []).append(value)
                if self.target_kl is not None and parts["approx_kl"] > 1.5 * self.target_kl:
                    break
                self.policy.optimizer.zero_grad()
                loss.backward()
                norm = nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
                if not norm.isfinite():
                    raise NotFinite("gradient's norm", float(norm))
                self.policy.optimizer.step()
            else:
                self._n_updates += 1
                continue
            break
        for name, values in figures.items():
            mean = torch.stack(values).mean().item() if values else math.nan
            self.logger.record(f"train/{name}", mean)
        buffer = cast(RoutedRolloutBuffer, self.rollout_buffer)
        mixture = ~buffer.flat["alone"]
        foretold, was = (buffer.flat[name][mixture] for name in ("old_values", "returns"))
        explained = explained_variance(foretold, was) if mixture.any() else math.nan
        self.logger.record("train/explained_variance", explained)
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", self.policy.log_std.exp().mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/clip_range", clip)

    @property
    def still_looks(self) -> bool:
        """Whether the experts wait for the classifier of endings; values and the gate do not.

        A policy that learns before anyone knows what was unsafe settles on something quick, and
        leaves it no more. So labels come first, for a tenth of training at most.
        """
        return (
            self.endings is not None
            and int(self.endings.count) < FIRST_LABELS
            and self._current_progress_remaining > 1 - LOOKING
        )

    def loss(self, batch: RoutedSamples, clip: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a minibatch, and its parts."""
        policy, within = cast(MoEPolicy, self.policy), cast(Any, self.clip_range_vf)
        parts = losses(
            policy,
            batch,
            self.memory,
            contrasts=METHODS[self.method].contrasts,
            clip=clip,
            clip_value=within and within(self._current_progress_remaining),
        )
        acting = (
            parts["policy_gradient_loss"]
            + self.ent_coef * parts["entropy_loss"]
            + self.contrast_coef * parts.get("contrast_loss", 0.0)
        )
        loss = (
            (0.0 if self.still_looks else 1.0) * acting
            + self.vf_coef * (parts["value_loss"] + parts.get("task_value_loss", 0.0))
            + self.gate_coef * parts["gate_loss"]
        )
        return loss, {name: value.detach() for name, value in (parts | {"loss": loss}).items()}

    def _learn_endings(self) -> Tensor:
        """One step of the classifier of endings, apart from the policy's; returns its loss."""
        self.policy.optimizer.zero_grad()
        loss = ending_loss(cast(MoEPolicy, self.policy), cast(Memory, self.endings))
        if not loss.isfinite():
            raise NotFinite("loss of the classifier of endings", float(loss.detach()))
        loss.backward()
        self.policy.optimizer.step()
        return loss.detach()

    def save(self, *args: Any, **kwargs: Any) -> None:
        """As SB3 has it; a policy that is steered is steered when it is loaded."""
        self.steering = cast(MoEPolicy, self.policy).steering
        super().save(*args, **kwargs)

    @classmethod
    def load(cls, path: Any, *args: Any, **kwargs: Any) -> Self:
        """As SB3 has it; zips of version 0.1, too."""
        file = open_path(path, "r", suffix="zip")
        with ZipFile(file) as archive:
            data = archive.read("data")
        old = b'"__module__": "agents.ppo"' in data
        if file is not path:
            file.close()
        if b'"overseer"' not in data:
            raise ValueError(f"{path}: holds a model of another kind, and not a RoutedPPO")
        with names_of_0_1() if old else nullcontext():
            return super().load(path, *args, **kwargs)

    def steer(self, text: str) -> MoEPolicy:
        """The policy, steered: `mixture`, `deployed`, an expert, a blend or an ablation.

        It predicts as any SB3 policy does, and shares its parameters with this model.

        Raises:
            UserError: the text names no expert.
        """
        return cast(MoEPolicy, self.policy).steer(text)

    def _excluded_save_params(self) -> list[str]:
        # made anew from the rest on loading
        return [*super()._excluded_save_params(), "rollout_buffer_kwargs", "tables", "imputed"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        modules, variables = super()._get_torch_save_params()
        kept = [name for name in ("memory", "endings") if getattr(self, name) is not None]
        return modules + kept, variables
