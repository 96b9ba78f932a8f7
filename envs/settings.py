"""The base of all configuration models, frozen, strict and clear about what is wrong; the world's.

Nothing here loads torch, which takes a second: settings are read, explained and refused before.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, ClassVar, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

ACTIONS = ("up", "right", "down", "left")
BEHAVIORS = ("diamond", "ghost")  # the two ways to terminate; their indices are the labels
NO_LABEL = -1
FLAGS = 4  # settings of the two flags: none, ghost's, diamond's, both
PLANES = ("agent", "ghost", "diamond", "oversight")  # channels of the observation
LONGEST = 600  # characters of a message


class UserError(Exception):
    """A mistake of the user's, told in one line: the rule, the value, the nearest valid choice.

    Whatever the message quotes, it is one line of printable characters, and not a long one.
    """

    def __init__(self, message: object) -> None:
        words = " ".join(str(message).split())
        # bytes of a file name that are no UTF-8 are told from other characters by 0xDC00
        codes = (c if c.isprintable() else ord(c) % 0xDC00 for c in words)
        shown = "".join(c if isinstance(c, str) else f"\\x{c:02x}" for c in codes)
        super().__init__(shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}...")


class Settings(BaseModel):
    """A frozen group of settings; unknown names and bad values raise `UserError`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    section: ClassVar[str] = ""
    """Name of the group within the whole configuration, for messages."""

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(data, dict | cls):
            raise UserError(f"{cls.section}: expected `name: value` settings, got {data!r}")
        try:
            return handler(data)
        except ValidationError as error:
            problem = error.errors()[0]
        name, *_ = (str(part) for part in problem["loc"])
        setting = f"{cls.section}.{name}" if cls.section else name
        if problem["type"] == "extra_forbidden":
            raise UserError(f"unknown setting {setting}{nearest(name, cls.model_fields)}")
        message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
        rule, mark, hint = (message[:1].lower() + message[1:]).partition("; ")
        raise UserError(f"{setting}: {rule}, got {problem['input']!r}{mark}{hint}")

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        numbers = _takes(annotation, int) or _takes(annotation, float)
        if numbers and not _takes(annotation, bool):
            if isinstance(value, bool):
                raise ValueError("must be a number")
            if isinstance(value, list | tuple) and any(isinstance(v, bool) for v in value):
                raise ValueError("must be numbers")
        return value


class WorldConfig(Settings):
    """The world. Probabilities are per episode."""

    section: ClassVar[str] = "world"

    rows: int = Field(5, ge=2, le=64)
    """Grid height in cells, at least 2."""
    cols: int = Field(5, ge=2, le=64)
    """Grid width in cells, at least 2."""
    max_steps: int = Field(32, ge=1, le=10_000)
    """Step limit of an episode, exact."""
    spurious_oversight: float = Field(0.0, ge=0, le=1)
    """Chance that any other cell shows a flag that means nothing."""
    flags_visible: bool = True
    """Whether the observation shows the flags; hidden flags still decide the labels."""

    @property
    def cells(self) -> int:
        """Number of cells S."""
        return self.rows * self.cols

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of an observation: planes, rows, columns."""
        return len(PLANES), self.rows, self.cols


def _takes(annotation: Any, kind: type) -> bool:
    """Whether a type, or what it is made of, is `kind`."""
    return annotation is kind or any(_takes(part, kind) for part in get_args(annotation))


def as_sequence(value: Any) -> Any:
    """One value where several may stand: `128` for `[128]`."""
    return value if isinstance(value, list | tuple) else (value,)


def nearest(word: str, choices: Iterable[str]) -> str:
    """Ask "did you mean" for the choice most like `word`, in whatever case, or nothing."""
    spelled = {choice.casefold(): choice for choice in choices}
    match = difflib.get_close_matches(word.casefold(), list(spelled), n=1)
    return f"; did you mean {spelled[match[0]]!r}?" if match else ""
