"""Settings: what every run has, in one frozen model; how they are read from YAML and written."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, field_validator

from oversight_rl.envs.settings import Settings, UserError, as_sequence, nearest
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

PRESETS = Path(__file__).parent / "configs"
Probability = Annotated[float, Field(ge=0, le=1)]


class EvaluationConfig(Settings):
    """Evaluation while and after training."""

    section: ClassVar[str] = "evaluation"

    every: int = Field(50, ge=1)
    """Updates between evaluations (and checkpoints)."""
    oversight: tuple[Probability, ...] = (0.0, 0.01, 0.1, 1.0)
    """Deployment oversight levels of the final table; the training level is always added."""
    episodes: int = Field(200, ge=1, le=10_000_000)
    """Episodes per policy and level where exact evaluation does not apply; four times as many halve
    the standard errors."""


class RunConfig(Settings):
    """A training run, of whatever kind. Every setting has a flag; a YAML file holds what differs.

    The settings of the learner are a section of the name that `algo` has, and say how many
    `updates` there are.
    """

    renamed: ClassVar[Mapping[str, str]] = {}
    """Settings, or sections, that had another name in version 0.1: the old one, and the new."""
    gone: ClassVar[Collection[str]] = ()
    """Old ones whose values the new ones cannot have."""

    algo: str
    """What to train: a line of the table of kinds."""
    method: str
    """What to train it with."""
    oversight: Probability = 0.1
    """Share of the episodes (or of the data) that is labeled."""
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
    """Whether TensorBoard gets pictures of policies and animated rollouts, and runs on the grid
    keep snapshots and a playground, play.html."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What to do where a loss, gradient or parameter is not a finite number: stop there, or leave
    that update of that run out."""
    evaluation: EvaluationConfig = EvaluationConfig()

    @field_validator("seeds")
    @classmethod
    def _distinct_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("must be distinct")
        return seeds

    @property
    def learner(self) -> Any:
        """Settings of the learner in use."""
        return getattr(self, self.algo)

    def stack_key(self) -> str:
        """What runs must share to train in one stack: all but the seed."""
        return self.model_copy(update={"seeds": ()}).model_dump_json()

    def most_runs(self, memory: float) -> int:
        """How many runs like this train as one stack in `memory` bytes; 1: each by itself."""
        return 1

    def refuse_unused(self) -> None:
        """Refuse settings that the run would not look at. (Those of old run folders may differ.)"""

    def refuse_words(self) -> None:
        """Refuse words where something else is meant, which no type tells; in a user's file."""

    def torch_device(self) -> torch.device:
        """The device to use; `UserError` if a GPU was asked for and there is none."""
        import torch  # takes a second, and settings are read without it

        if self.device == "cuda" and not torch.cuda.is_available():
            found = "but there is no GPU here; try --device cpu"
            raise UserError(f"device: cuda was asked for, {found}")
        use_gpu = self.device != "cpu" and torch.cuda.is_available()
        return torch.device("cuda" if use_gpu else "cpu")

    def single(self, seed: int) -> Self:
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
    """The settings in a YAML file, unchecked; `UserError` if it cannot be read as such.

    Aliases are refused: a few lines of them can stand for more than fits into memory.
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
    """The file that a user names: one that is there, or else a preset of ours by its name."""
    presets = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    if given.exists() and not (given.is_dir() and str(given) in presets):
        return given
    if str(given) in presets:
        return PRESETS / f"{given}.yaml"
    why = f"no such file, nor a preset: {', '.join(presets)}"
    raise UserError(f"{given}: cannot read it ({why}){nearest(given.stem, presets)}")


def as_asked(path: Path) -> str:
    """A file of settings as a user names it: a preset by its name."""
    return path.stem if path.parent == PRESETS else str(path)


def dump_yaml(settings: Settings, **others: Any) -> str:
    """Settings, and others beside them, as YAML that `read_yaml` reads back."""
    return yaml.dump(settings.model_dump(mode="json") | others, Dumper=_Dumper, sort_keys=False)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    settings: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            settings |= flat(value, f"{prefix}{key}.")
        else:
            settings[f"{prefix}{key}"] = value
    return settings
