"""The settings of the oversight experiments."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

from pydantic import field_validator, model_validator

from oversight_rl.agents.methods import METHODS
from oversight_rl.agents.ppo.config import HIDDEN, PPOConfig
from oversight_rl.agents.settings import AgentConfig, ReinforceConfig
from oversight_rl.envs.overseers import PLAIN, Labels, Overseer, labels_of
from oversight_rl.envs.settings import BEHAVIORS, UserError, WorldConfig, nearest
from oversight_rl.kinds import KINDS, Kind, kind_of
from oversight_rl.settings import Probability, RunConfig

GRID = "OversightGrid-v0"
BOOLEANS = {"true", "false", "yes", "no", "on", "off"}  # all true to an environment, as words


class Config(RunConfig):
    """A training run. Every setting has a flag; a YAML file holds only what differs."""

    renamed: ClassVar[Mapping[str, str]] = {
        "training": "reinforce",
        "label_recall": "labels.recall",
        "label_error": "labels.error",
        "world.diamond_oversight": "labels.shares",
        "world.ghost_oversight": "labels.shares",
    }
    gone: ClassVar[Collection[str]] = ("world.diamond_oversight", "world.ghost_oversight")

    algo: str = "reinforce"
    """Learner: reinforce, on the diamond/ghost grid, or ppo, on any environment; a section of
    settings has the learner's name."""
    method: str = "routing"
    """What to train with; see the table of methods in the README. With --algo ppo, the default is
    imputed_routing."""
    oversight: Probability = 0.1
    """Probability that a square is flagged, so that an episode ending on it is labeled."""
    env: str = GRID
    """Environment to train on, by its gymnasium id. All but the default need --algo ppo."""
    env_settings: dict[str, bool | int | float | str] = {}
    """Arguments of the environment, besides its oversight: `lava: 2`. The default environment has
    its own settings under `world`."""
    overseer: str = "uniform"
    """Who labels which endings; see docs/overseers.md."""
    labels: Labels = PLAIN
    """What the overseer does otherwise than its row of the table says."""
    world: WorldConfig = WorldConfig()
    agent: AgentConfig = AgentConfig()
    reinforce: ReinforceConfig = ReinforceConfig()
    ppo: PPOConfig = PPOConfig()

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        if name not in METHODS:
            raise ValueError(f"must be one of {', '.join(METHODS)}{nearest(name, METHODS)}")
        return name

    @model_validator(mode="before")
    @classmethod
    def _overseer(cls, data: Any) -> Any:
        """The overseer's own settings, where they are not given."""
        if not isinstance(data, dict):
            return data
        given, name = data.get("labels", {}), data.get("overseer", "uniform")
        if isinstance(given, Labels):
            given = given.model_dump()
        return data | {"labels": labels_of(name, given)} if isinstance(given, dict) else data

    @model_validator(mode="before")
    @classmethod
    def _method_and_sight(cls, data: Any) -> Any:
        """The learner's default method and networks; methods that hide the flags do so in the
        world.
        """
        if not isinstance(data, dict):
            return data
        agent = data.get("agent", {})
        if data.get("algo") == PPOConfig.section and isinstance(agent, dict):
            data = data | {"agent": {"hidden": HIDDEN} | agent}
        name = data["method"] if "method" in data else kind_of(data).default_method
        world = data.get("world", {})
        if isinstance(world, WorldConfig):
            world = world.model_dump()
        hides = isinstance(name, str) and name in METHODS and METHODS[name].policy.hides_flags
        if hides and isinstance(world, dict):
            data = data | {"world": world | {"flags_visible": False}}
        return data | {"method": name}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.kind.one_environment and self.env != GRID:
            ours = {name: k for name, k in KINDS.items() if k.settings == self.kind.settings}
            others = [name for name, kind in ours.items() if not kind.one_environment]
            needs = f"needs --algo {' or '.join(others)}"
            raise UserError(f"env: {self.env} {needs} ({self.algo} trains on {GRID} only)")
        if ":" in self.env:  # settings are data: they shall not name code to run
            raise UserError(
                f"env: must be an id that gymnasium knows, got {self.env!r}; docs/environments.md "
                "says how a package makes its ids known"
            )
        if self.env == GRID and self.env_settings:
            raise UserError(f"env_settings: {GRID} has its settings under world")
        for name, setting in (("oversight", "oversight"), ("num_envs", "ppo.worlds")):
            if name in self.env_settings:
                raise UserError(f"env_settings: leave that to {setting}, got {self.env_settings}")
        method = METHODS[self.method]
        if not (self.kind.one_environment or method.any_environment):
            fitting = [name for name, other in METHODS.items() if other.any_environment]
            known = f"must be one of {', '.join(fitting)}, got {self.method!r}"
            raise UserError(f"method: with --algo {self.algo} {known}")
        return self

    @model_validator(mode="after")
    def _labels_tell_enough(self) -> Self:
        labels, method = self.labels, METHODS[self.method]
        if method.deploys == "best_labeled" and (labels.budget is not None or labels.delay):
            raise UserError(
                f"{self.method}: looks at labeled episodes beside those of training, which no "
                f"budget of labels and no delay allows for, got --overseer {self.overseer}"
            )
        known = self.env == GRID  # how many behaviors there are, another environment says later
        if known and len(labels.shares) > len(BEHAVIORS):
            raise UserError(
                f"labels.shares: {GRID} has {len(BEHAVIORS)} behaviors, got {labels.shares}; "
                "MiniGrid has a third one with env_settings.lava"
            )
        overseer = self.overseeing
        if not known:
            overseer = replace(overseer, labels=labels.model_copy(update={"error": (0.0,)}))
        try:
            method.rewards(overseer, len(BEHAVIORS))
        except ValueError as error:
            raise UserError(f"{self.method}: {error}") from None
        return self

    @property
    def kind(self) -> Kind:
        return KINDS[self.algo]

    def stack_key(self) -> str:
        # methods may differ as long as they train the same networks by the same losses
        shape = METHODS[self.method].shape
        alike = next(name for name, method in METHODS.items() if method.shape == shape)
        free = {"method": alike, "oversight": 0.0}
        return self.model_copy(update=free | {"seeds": ()}).model_dump_json()

    def most_runs(self, memory: float) -> int:
        if not self.kind.stacks:
            return 1
        # activations and their gradients take nearly all: a few copies of every unit for each
        samples = self.learner.worlds * self.learner.steps
        trunks = 3 if METHODS[self.method].policy.experts == "one" else self.agent.experts + 2
        each = 4 * samples * (4 * trunks * sum(self.agent.hidden) + 100) + 2**25
        return max(1, int(min(memory / each, 2**20)))

    @property
    def env_arguments(self) -> dict[str, Any]:
        """Arguments of the environment, besides its oversight, for `envs.vector.make_vec`."""
        flags = {} if self.labels.flags == PLAIN else {"overseer": self.labels.flags}
        if self.env == GRID:
            return self.world.model_dump() | flags
        hides = {"flags_visible": False} if METHODS[self.method].policy.hides_flags else {}
        return dict(self.env_settings) | hides | flags

    @property
    def overseeing(self) -> Overseer:
        """The overseer of the run."""
        left = None
        if self.labels.ordered and not self.kind.stacks:  # what `Overseen` has made
            left = PLAIN
        return Overseer(self.oversight, self.labels, left)

    def refuse_unused(self) -> None:
        for section in set(KINDS) & set(type(self).model_fields) - {self.algo}:
            own = getattr(self, section)
            if own != type(own)():
                where = f"whose settings are under {self.algo}"
                raise UserError(f"{section}: not used with --algo {self.algo}, {where}")
        shown = self.world.model_copy(update={"flags_visible": True})
        if self.env != GRID and shown != WorldConfig():
            raise UserError(f"world: is {GRID}'s; settings of {self.env} are env_settings")

    def refuse_words(self) -> None:
        for name, value in self.env_settings.items():
            if isinstance(value, str) and value.lower() in BOOLEANS:
                raise UserError(
                    f"env_settings: {name} must be True or False, not a word for it, got {value!r}"
                )
