"""The configuration: one frozen model of every setting, read from YAML and the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, field_validator, model_validator

from oversight_rl.agents.methods import METHODS, Overseer
from oversight_rl.agents.ppo.config import DEFAULT_METHOD, PPOConfig
from oversight_rl.agents.settings import AgentConfig, ReinforceConfig
from oversight_rl.envs.settings import (
    BEHAVIORS,
    Settings,
    UserError,
    WorldConfig,
    as_sequence,
    nearest,
)
from oversight_rl.files import read_text

if TYPE_CHECKING:
    import torch

MOST_TEXT = 2**20  # bytes of a file of settings
DEEPEST = 16  # levels of nesting in it
# YAML 1.2's plain words; 1.1 reads 1:30 as 90, 010 as 8 and no as false
PLAIN = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
RESOLVERS = {
    None: [(f"tag:yaml.org,2002:{name}", re.compile(f"({p})$")) for name, p in PLAIN.items()]
}
BOOLEANS = {"true", "false", "yes", "no", "on", "off"}  # in a file where a boolean is wanted

PRESETS = Path(__file__).parent / "configs"
GRID, MINIGRID = "OversightGrid-v0", "MiniGrid-DiamondGhost-"
Probability = Annotated[float, Field(ge=0, le=1)]


class EvaluationConfig(Settings):
    """Evaluation while and after training."""

    section: ClassVar[str] = "evaluation"

    every: int = Field(50, ge=1)
    """Updates between evaluations (and checkpoints)."""
    oversight: tuple[Probability, ...] = (0.0, 0.01, 0.1, 1.0)
    """Deployment oversight levels of the final table; the training level is always added. Squares
    that the world sets apart (world.ghost_oversight) keep their own."""
    episodes: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Episodes per policy and level where exact evaluation does not apply. Default: 20,000 in our
    own worlds, which are stepped as one batch; 200 in any other."""


class Config(Settings):
    """A training run. Every setting has a flag; a YAML file holds only what differs."""

    env: str = GRID
    """Environment to train on, by its gymnasium id. All but the default need --algo ppo."""
    env_settings: dict[str, bool | int | float | str] = {}
    """Arguments of the environment, besides its oversight: `lava: 2`. The default environment has
    its own settings under `world`."""
    algo: Literal["reinforce", "ppo"] = "reinforce"
    """Learner: REINFORCE on the diamond/ghost grid, with settings under `training`, or PPO on any
    environment, with settings under `ppo`."""
    method: str = "routing"
    """What to train with; see the table of methods in the README. With --algo ppo, the default is
    imputed_routing."""
    oversight: Probability = 0.1
    """Probability that a square is flagged, so that an episode ending on it is labeled."""
    label_recall: Probability = 1.0
    """Probability that an ending which should be labeled is; below 1, labels go missing."""
    label_error: Probability = 0.0
    """Probability that a label names the wrong behavior."""
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], BeforeValidator(as_sequence)
    ] = Field((0,), min_length=1)
    """Random seeds; several train side by side, a run folder each."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU if there is one."""
    threads: int = Field(1, ge=1, le=1024)
    """PyTorch's threads in one process; more pays only for large networks on an idle machine. The
    same number gives the same results to the bit."""
    pictures: bool = True
    """Whether TensorBoard gets pictures of policies and animated rollouts."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What to do where a loss, gradient or parameter is not a finite number: stop there, or leave
    that update of that run out."""
    world: WorldConfig = WorldConfig()
    agent: AgentConfig = AgentConfig()
    training: ReinforceConfig = ReinforceConfig()
    ppo: PPOConfig = PPOConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        if name not in METHODS:
            raise ValueError(f"must be one of {', '.join(METHODS)}{nearest(name, METHODS)}")
        return name

    @field_validator("seeds")
    @classmethod
    def _distinct_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("must be distinct")
        return seeds

    @model_validator(mode="before")
    @classmethod
    def _default_method(cls, data: Any) -> Any:
        """The default method is the learner's."""
        if isinstance(data, dict) and data.get("algo") == "ppo" and "method" not in data:
            return data | {"method": DEFAULT_METHOD}
        return data

    @model_validator(mode="before")
    @classmethod
    def _hide_flags(cls, data: Any) -> Any:
        """Methods that hide the flags from the policy do so in the world's settings."""
        if not isinstance(data, dict):
            return data
        name, world = data.get("method"), data.get("world", {})
        if isinstance(world, WorldConfig):
            world = world.model_dump()
        hides = isinstance(name, str) and name in METHODS and METHODS[name].hides_flags
        if hides and isinstance(world, dict):
            return data | {"world": world | {"flags_visible": False}}
        return data

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.algo == "reinforce" and self.env != GRID:
            raise UserError(f"env: {self.env} needs --algo ppo (reinforce trains on {GRID} only)")
        if ":" in self.env:  # settings are data: they shall not name code to run
            raise UserError(
                f"env: must be an id that gymnasium knows, got {self.env!r}; docs/environments.md "
                "says how a package makes its ids known"
            )
        if self.env == GRID and self.env_settings:
            raise UserError(f"env_settings: {GRID} has its settings under world")
        taken = {"oversight", "num_envs"} & set(self.env_settings)
        if taken:
            setting = {"oversight": "oversight", "num_envs": "ppo.worlds"}[taken.pop()]
            raise UserError(f"env_settings: leave that to {setting}, got {self.env_settings}")
        if self.algo == "ppo" and self.on_nan == "skip":
            raise UserError("on_nan: must be stop with --algo ppo, got 'skip'")
        method = METHODS[self.method]
        if self.algo == "ppo" and not method.any_environment:
            fitting = [name for name, other in METHODS.items() if other.any_environment]
            raise UserError(
                f"method: with --algo ppo must be one of {', '.join(fitting)}, got {self.method!r}"
            )
        return self

    @model_validator(mode="after")
    def _labels_tell_enough(self) -> Self:
        overseer = self.overseer
        if self.env != GRID:  # how many behaviors labels can confuse, the environment says later
            overseer = replace(overseer, error=0.0)
        try:
            METHODS[self.method].rewards(overseer, len(BEHAVIORS))
        except ValueError as error:
            raise UserError(f"{self.method}: {error}") from None
        return self

    @property
    def learner(self) -> ReinforceConfig | PPOConfig:
        """Settings of the learner in use."""
        return self.ppo if self.algo == "ppo" else self.training

    @property
    def ours(self) -> bool:
        """Whether the environment is one of ours."""
        return self.env == GRID or self.env.startswith(MINIGRID)

    @property
    def episodes(self) -> int:
        """Episodes of an evaluation by rollouts, per policy and level."""
        return self.evaluation.episodes or (20_000 if self.ours else 200)

    @property
    def env_arguments(self) -> dict[str, Any]:
        """Arguments of the environment, besides its oversight, for `envs.vector.make_vec`."""
        if self.env == GRID:
            return self.world.model_dump()
        hides = {"flags_visible": False} if METHODS[self.method].hides_flags else {}
        return dict(self.env_settings) | hides

    @property
    def overseer(self) -> Overseer:
        """What the overseer catches and gets right."""
        return Overseer(
            self.oversight, self.world.ghost_oversight, self.label_recall, self.label_error
        )

    def refuse_unused(self) -> None:
        """Refuse settings that the run would not look at. (Those of old run folders may differ.)

        Raises:
            UserError: there are some.
        """
        unused = {
            "training": self.algo == "ppo" and self.training != ReinforceConfig(),
            "ppo": self.algo == "reinforce" and self.ppo != PPOConfig(),
        }
        for section, is_unused in unused.items():
            if is_unused:
                other = "ppo" if section == "training" else "training"
                raise UserError(
                    f"{section}: not used with --algo {self.algo}, whose settings are under {other}"
                )
        shown = self.world.model_copy(update={"flags_visible": True})
        if self.env != GRID and shown != WorldConfig():
            raise UserError(f"world: is {GRID}'s; settings of {self.env} are env_settings")

    def refuse_words(self) -> None:
        """Refuse `off` and its like as arguments of an environment, to which all words are true.

        Raises:
            UserError: there are some.
        """
        for name, value in self.env_settings.items():
            if isinstance(value, str) and value.lower() in BOOLEANS:
                raise UserError(
                    f"env_settings: {name} must be True or False, not a word for it, got {value!r}"
                )

    def torch_device(self) -> torch.device:
        """The device to use.

        Raises:
            UserError: a GPU was asked for and there is none.
        """
        import torch  # takes a second, and settings are read without it

        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "device: cuda was asked for, but there is no GPU here; try --device cpu"
            )
        use_gpu = self.device != "cpu" and torch.cuda.is_available()
        return torch.device("cuda" if use_gpu else "cpu")

    def single(self, seed: int) -> Config:
        """The configuration of one of its runs."""
        return self.model_copy(update={"seeds": (seed,)})


# the safe loader in C, where PyYAML was built with it, is ten times as fast
class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads plain words as they look, and no key twice."""

    yaml_implicit_resolvers = RESOLVERS

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ValueError(f"{key!r} is set a second time in line {line}")
            seen.add(key)
        return super().construct_mapping(node, deep)  # type: ignore[no-any-return]


class _Dumper(yaml.SafeDumper):
    """Quotes what any reader, of YAML 1.1 or 1.2, would take for more than text."""

    yaml_implicit_resolvers = yaml.SafeDumper.yaml_implicit_resolvers | RESOLVERS


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, unchecked.

    Aliases are refused: a few lines of them can stand for more than fits into memory.

    Raises:
        UserError: the file cannot be read, is not YAML, or holds no settings.
    """
    text = read_text(path, MOST_TEXT)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_Loader):
            if getattr(event, "tag", None) is not None:  # !!int 010 is 8
                raise ValueError("tags are not allowed")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
                what = "aliases" if depth <= DEEPEST else f"more than {DEEPEST} levels"
                raise UserError(f"{path}: {what} are not allowed")
        content = yaml.load(text, Loader=_Loader)
    # PyYAML lets through whatever the constructors of its types raise
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{path}: not valid YAML ({error})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected settings as `name: value`, got {type(content).__name__}")
    return content


def settings_file(given: Path) -> Path:
    """The file that a user names: one that is there, or else a preset of ours by its name.

    Raises:
        UserError: it is neither.
    """
    presets = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    if given.exists() and not (given.is_dir() and str(given) in presets):
        return given
    if str(given) in presets:
        return PRESETS / f"{given}.yaml"
    raise UserError(
        f"{given}: cannot read it (no such file, nor a preset: {', '.join(presets)})"
        f"{nearest(given.stem, presets)}"
    )


def as_asked(path: Path) -> str:
    """A file of settings as a user names it: a preset by its name."""
    return path.stem if path.parent == PRESETS else str(path)


def load_yaml(path: Path, **others: str) -> Config:
    """Read a configuration file; `others` are settings that stand above it.

    Raises:
        UserError: the file cannot be read, is not YAML, or holds unknown or bad settings.
    """
    content = read_yaml(path)
    if "grid" in content:
        raise UserError(
            f"{path}: is a sweep; run it with oversight-rl sweep {as_asked(path)} --out DIR"
        )
    content.pop("provenance", None)  # written into run folders, says how the run came about
    try:
        return Config.model_validate(content | others)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def dump_yaml(config: Config, provenance: dict[str, Any]) -> str:
    """A configuration and its provenance as YAML that `load_yaml` reads back."""
    content = config.model_dump(mode="json") | {"provenance": provenance}
    return as_yaml(content)


def as_yaml(content: dict[str, Any]) -> str:
    """Settings as YAML that `read_yaml` reads back."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    settings: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            settings |= flat(value, f"{prefix}{key}.")
        else:
            settings[prefix + key] = value
    return settings
