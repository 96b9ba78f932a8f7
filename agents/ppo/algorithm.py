"""Gradient routing on Stable-Baselines3: `RoutedPPO` and its mixture-of-experts policy.

The methods, the routes, the networks and the memory are those of the REINFORCE learner; here they
meet SB3's PPO, its environments, callbacks, logger and files. A label is known at an episode's
end, so `RoutedRolloutBuffer` writes it back to the episode's steps before the learner sees them.
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import repeat
from typing import Any, ClassVar, Self
from zipfile import ZipFile

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.utils import LinearSchedule, explained_variance
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from oversight_rl.agents.learner import NotFinite
from oversight_rl.agents.memory import Memory
from oversight_rl.agents.methods import METHODS
from oversight_rl.agents.outcomes import tables
from oversight_rl.agents.ppo.buffer import RoutedDictRolloutBuffer, RoutedRolloutBuffer
from oversight_rl.agents.ppo.collect import CollectingPPO
from oversight_rl.agents.ppo.config import DEFAULT_METHOD, RoutedPPOArguments, rollout_sizes
from oversight_rl.agents.ppo.data_warnings import DataWarnings
from oversight_rl.agents.ppo.environment import (
    Declared,
    ask,
    checked_behaviors,
    made,
    policy_arguments,
    ppo_methods,
)
from oversight_rl.agents.ppo.experience import SETTLED, Rollout, in_task_scale, outcomes_of
from oversight_rl.agents.ppo.losses import Replay, learn_reward_model, losses, remembered, replays
from oversight_rl.agents.ppo.observations import flags_found, row_type, row_width
from oversight_rl.agents.ppo.policy import MoEPolicy
from oversight_rl.agents.ppo.targets import Experience, Samples, Targets, targets
from oversight_rl.agents.steering import MIXTURE
from oversight_rl.agents.telling import Tally
from oversight_rl.agents.threads import on_threads
from oversight_rl.aliases import names_of_0_1
from oversight_rl.envs.overseers import Labels, Overseer, overheard
from oversight_rl.envs.settings import BEHAVIORS, nearest

FIRST_LABELS = 100
"""Labeled endings that the reward model is to have seen before the policy learns."""
ENDINGS = 512
"""Remembered endings that each step of the reward model learns from."""
LOOKING = 0.1
"""Share of training that this may take at most."""
FOLLOWING = {"behaviors", "gate", "lessons", "flags", "soloists", "task", "steering"}
"""Arguments of the policy that nobody gives but its model."""


class RoutedPPO(CollectingPPO):
    """PPO with gradient routing, for any environment whose overseer labels some episodes.

    An environment says at an episode's end, in `info`, which behavior it was (`behavior`) and, if
    an overseer saw it, the same as `label`; `oversight_rl.OversightLabels` does it for any other.
    The first behavior is the wanted one, and the first expert its own.

    Args:
        policy: "MoEPolicy", or a subclass of it.
        env: an environment, a VecEnv, or an id, of which `n_envs` are made.
        method: a row of the table of methods that PPO can follow, see `ppo_methods`.
        oversight: chance that a behavior is watched in an episode; given to an environment that is
            made from its id, and None with any other.
        n_envs: number of environments, made from an id.
        behaviors: names that labels may have; None: the environment's own `behaviors`, or diamond
            and ghost.
        labeled_weight: weight of a labeled episode's samples next to any other's.
        gate_coef: weight of the gate loss.
        contrast_coef: weight of the contrast loss, for the methods that have one.
        solo_share: share of the episodes in which experts act by themselves, each in turn, and
            learn from that, for the method that knows, or imputes, how every episode ended.
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
    keeps_endings: bool | None = None  # without labels too: as the first overseer asks
    DEFAULTS: ClassVar[dict[str, Any]] = {
        "learning_rate": LinearSchedule(3e-3, 1e-4, 1.0),
        "n_epochs": 4,
        "gamma": 0.97,
        "gae_lambda": 0.95,
        "ent_coef": 0.02,
        "device": "cpu",
    }

    labeled_weight: float
    gate_coef: float
    contrast_coef: float
    solo_share: float
    task_weight: float
    gate_replay: int
    label_reach: int
    threads: int | None
    experience: Experience
    """The window of the last rollout, with what was made of it."""
    targets: Samples
    """What the losses ask of each of its steps."""

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
        contrast_coef: float = 2.0,
        solo_share: float = 0.75,
        task_weight: float = 0.5,
        gate_replay: int = 512,
        label_reach: int = 256,
        label_recall: float | Sequence[float] = 1.0,
        label_error: float | Sequence[float] = 0.0,
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
        names = ppo_methods()
        if method not in names:
            must = f"method must be one of {', '.join(names)}"
            raise ValueError(f"{must}, got {method!r}{nearest(method, names)}")
        numbers = RoutedPPOArguments.checked(
            labeled_weight=labeled_weight, gate_coef=gate_coef, contrast_coef=contrast_coef,
            solo_share=solo_share, task_weight=task_weight, gate_replay=gate_replay,
            label_reach=label_reach, threads=threads, label_recall=label_recall,
            label_error=label_error,
        )  # fmt: skip
        recall, error = numbers.pop("label_recall"), numbers.pop("label_error")
        vars(self).update(numbers)
        self.noise = Labels(recall=recall, error=error)
        self.method, self.overseer = method, Overseer(None, self.noise)
        self.behaviors = () if behaviors is None else checked_behaviors(behaviors)
        self.declared_behaviors: tuple[str, ...] = ()  # what the environment calls its own
        self.steering = MIXTURE  # of a policy that was saved steered
        self.left_out: tuple[str, ...] = ()  # names of what is not read of observations
        self.label_generator: Any = None  # decides which labels go missing or wrong
        if own := FOLLOWING & set(policy_kwargs or {}):
            raise ValueError(f"policy_kwargs: {own.pop()} follows from the method and behaviors")
        env = made(env, n_envs, method, oversight, env_kwargs)
        kwargs["policy_kwargs"] = policy_kwargs
        given = inspect.signature(PPO).bind_partial(policy, env, *args, **kwargs).arguments
        defaults = self.DEFAULTS | rollout_sizes(getattr(env, "num_envs", 1), **given)
        kwargs |= {name: value for name, value in defaults.items() if name not in given}
        super().__init__(policy, env, *args, **kwargs)

    def _setup_model(self) -> None:
        for name in ("forward", "output", "distribution", "extract_features"):
            if getattr(self.policy_class, name) is not getattr(MoEPolicy, name):
                raise ValueError(
                    f"policy: {self.policy_class.__name__} has its own {name}, which is not called "
                    "in training: give it a features_extractor_class, or wrap the environment"
                )
        if self.use_sde:
            raise ValueError("RoutedPPO: use_sde must be False")
        if "noise" not in vars(self):  # in a zip of 0.1
            was = vars(self.overseer)
            self.noise = Labels(recall=was["recall"], error=was["error"])
        soloists, old = self.policy_kwargs.get("soloists"), False
        if "behaviors" in self.policy_kwargs and soloists is None:  # loaded from a zip of 0.1
            self.policy_kwargs.pop("imputes", None)
            soloists, old = 1, True  # the deployed expert alone
        method = METHODS[self.method]
        experts, flags, task = map(self.policy_kwargs.get, ("experts", "flags", "task"))
        if self.env is not None:
            declared = self._asked(self.env)
            self._heed(declared)
            flags, task = declared.flags, declared.has_task
        self.behaviors = self.behaviors or BEHAVIORS
        self.policy_kwargs = self.policy_kwargs | policy_arguments(
            self.method, self.behaviors, experts, flags, bool(task), soloists
        )
        # of the gate; of the reward model: labeled endings, and all of them
        self.memory = self.endings = self.every_ending = self.tally = None
        self._set_tables()
        space = self.observation_space
        if "gate" in method.lessons and self.gate_replay > 0:
            self.memory = Memory(1, row_width(space), self.gate_replay, row_type(space))
        if "reward_model" in method.lessons:
            parts = space, self.action_space  # an observation, followed by its action
            row = sum(map(row_width, parts)), ENDINGS, row_type(*parts), len(self.behaviors)
            self.endings = Memory(1, *row)
            if self.keeps_endings is None:
                self.keeps_endings = not (old or (self.tables.labeled > 0).all())
            if self.keeps_endings:
                self.every_ending = Memory(1, *row)
            if method.reward_model == "plain":
                self.tally = Tally(self.tables.labeled, row_width(space))
        if self.label_generator is None:
            self.label_generator = np.random.default_rng(self.seed)
        if self.rollout_buffer_class is None:
            by_name = isinstance(space, spaces.Dict)
            self.rollout_buffer_class = RoutedDictRolloutBuffer if by_name else RoutedRolloutBuffer
        self.rollout_buffer_kwargs = self.rollout_buffer_kwargs | {
            "behaviors": self.behaviors,
            "solo_share": self.solo_share,
            "soloists": self.policy_kwargs["soloists"],
            "label_reach": self.label_reach,
        }
        self._resets = None
        self._warnings = DataWarnings()
        self._warnings.of_texts(self.left_out)
        super()._setup_model()
        self.policy.steering = self.steering

    def _set_tables(self) -> None:
        experts = self.policy_kwargs["experts"]
        self.tables = tables([self.method], [self.overseer], experts, behaviors=len(self.behaviors))
        if self.tally is not None:
            self.tally.chances = self.tables.labeled

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        env = self._wrap_env(env, self.verbose)
        declared = self._asked(env)
        super().set_env(env, force_reset)
        self.rollout_buffer.held.interrupt()
        self.rollout_buffer.held.ended.clear()  # its names are others
        self._heed(declared)
        self._warnings.of_texts(self.left_out)
        self._set_tables()

    def _asked(self, env: VecEnv) -> Declared:
        return ask(env, self.method, self.declared_behaviors, self.policy_kwargs)

    def _heed(self, declared: Declared) -> None:
        """Take over what an environment declares."""
        self.declared_behaviors = declared.behaviors or self.declared_behaviors
        self.behaviors = self.behaviors or self.declared_behaviors
        self.left_out = declared.left_out
        self._level = declared.oversight
        self.overseer = overheard(declared.oversight, declared.labels, self.noise)

    def learn(self, *args: Any, **kwargs: Any) -> Self:
        if self.env is None:
            raise ValueError("there is no environment: load(..., env=env) or set_env(env) first")
        with on_threads(self.threads or torch.get_num_threads()):
            return super().learn(*args, **kwargs)

    def make_targets(self, buffer: RoutedRolloutBuffer) -> None:
        """Write labels back to all steps of their episodes, remember them, and set the targets."""
        policy, waits = self.policy, self.tables.asks_labels
        rollout = Rollout(policy, buffer, self._last_obs)
        own, task = rollout.values()
        reward = np.zeros_like(task)
        if policy.task and self.task_weight > 0:
            reward = in_task_scale(policy, buffer, self.gamma)
        if bool(self.tables.sees_truth.any()):  # and nobody's labels
            buffer.names.clear()
            buffer.late.clear()
        window, missed = buffer.look_back(own, task, reward)
        if window.late.any() and not waits and self.endings is None:
            self._warnings.of_useless(self.method)
        self._warnings.of_lost(missed, buffer.held.reach)
        ends = outcome, _ = outcomes_of(window, self.tables, self.label_generator)
        due = window.due(outcome, buffer.held.reach, waits)
        window.remember(outcome, self.memory, self.endings, self.every_ending, self.tally)
        if self.tally is not None and self.overseer.labels.region == "all":
            policy.flags = flags_found(self.tally.telling, self.observation_space)
        taught = self.endings is not None and bool(self.endings.count)
        x = rollout.experience(window, ends, due, taught)
        found = targets(
            x, self.tables, discount=self.gamma, trace=self.gae_lambda,
            labeled_weight=self.labeled_weight, normalize=self.normalize_advantage,
            task_weight=self.task_weight,
        )  # fmt: skip
        self.experience, self.targets = x, found
        counts = x.share.T > 0
        buffer.samples = Targets(  # one environment after another
            *(part.swapaxes(0, 1)[counts] for part in found)
        )
        # as SB3 has them, for callbacks
        buffer.advantages, buffer.returns = map(
            window.of_rollout, (found.advantages, found.returns)
        )
        buffer.hold(window, due, waits)

    def train(self) -> None:
        """Update the policy from the rollout: PPO's losses, with every gradient routed.

        Raises:
            NotFinite: numbers went bad.
        """
        buffer = self.rollout_buffer
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        clip = self.clip_range(self._current_progress_remaining)  # type: ignore[operator]
        self._warnings.of_labels(buffer, self._level)
        if self.tables.asks_labels and self._n_updates >= SETTLED * self.n_epochs:
            self._warnings.of_reach(self.experience, buffer.held.reach)
        figures: dict[str, list[Tensor]] = {}
        if self.endings is not None:
            told = METHODS[self.method].reward_model == "told"
            about = self.tables.labeled, told and any(self.overseer.labels.error)
            memories = self.endings, self.every_ending
            figures["reward_model_loss"] = learn_reward_model(self.policy, *memories, *about)
        drawn: Iterator[Replay | None] = repeat(None)
        if self.memory is not None:
            minibatches = buffer.minibatches(self.batch_size) * self.n_epochs
            drawn = replays(remembered, self.policy, self.memory, minibatches)
        for _ in range(self.n_epochs):
            if not self._pass_over(buffer, clip, drawn, figures):
                break
            self._n_updates += 1
        for name, values in figures.items():
            mean = torch.stack(values).mean().item() if values else math.nan
            self.logger.record(f"train/{name}", mean)
        assert buffer.samples is not None
        samples = buffer.samples
        mixture = ~samples.alone
        parts = samples.old_values[mixture], samples.returns[mixture]
        explained = explained_variance(*parts) if mixture.any() else math.nan
        self.logger.record("train/explained_variance", explained)
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", self.policy.log_std.exp().mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/clip_range", clip)

    def _pass_over(
        self,
        buffer: RoutedRolloutBuffer,
        clip: float,
        drawn: Iterator[Replay | None],
        figures: dict[str, list[Tensor]],
    ) -> bool:
        """Learn from every sample once; False where the policy has moved as far as it may."""
        parameters = list(self.policy.parameters())
        for batch, replay in zip(buffer.get(self.batch_size), drawn, strict=False):
            loss, parts = self.loss(batch, clip, replay)
            for name, value in parts.items():
                figures.setdefault(name, []).append(value)
            if self.target_kl is not None and parts["approx_kl"] > 1.5 * self.target_kl:
                return False
            self.policy.optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
            if not norm.isfinite():
                raise NotFinite("gradient's norm", float(norm))
            self.policy.optimizer.step()
        return True

    @property
    def still_looks(self) -> bool:
        """Whether the experts wait for the reward model; values and the gate do not.

        A policy that learns before anyone knows what was unsafe settles on something quick, and
        leaves it no more. So labels come first, for a tenth of training at most.
        """
        return (
            self.endings is not None
            and int(self.endings.count) < FIRST_LABELS
            and self._current_progress_remaining > 1 - LOOKING
        )

    def loss(
        self, batch: Targets[Tensor], clip: float, replay: Replay | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a minibatch, and its parts."""
        within: Any = self.clip_range_vf
        clip_value = within and within(self._current_progress_remaining)
        views = self.rollout_buffer.views
        parts = losses(self.policy, batch, views, replay, clip=clip, clip_value=clip_value)
        acting = parts["policy_gradient_loss"] + self.ent_coef * parts["entropy_loss"]
        acting = acting + self.contrast_coef * parts.get("contrast_loss", 0.0)
        value = parts["value_loss"] + parts.get("task_value_loss", 0.0)
        loss = (0.0 if self.still_looks else 1.0) * acting + self.vf_coef * value
        loss = loss + self.gate_coef * parts["gate_loss"]
        return loss, {name: value.detach() for name, value in (parts | {"loss": loss}).items()}

    def save(self, *args: Any, **kwargs: Any) -> None:
        # a policy that is steered is steered when it is loaded
        self.steering = self.policy.steering
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
        return self.policy.steer(text)

    def _excluded_save_params(self) -> list[str]:
        # made anew from the rest on loading
        ours = ["rollout_buffer_kwargs", "tables", "experience", "targets", "_warnings"]
        return [*super()._excluded_save_params(), *ours]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        modules, variables = super()._get_torch_save_params()
        names = "memory", "endings", "every_ending", "tally"
        kept = [name for name in names if getattr(self, name) is not None]
        return modules + kept, variables
