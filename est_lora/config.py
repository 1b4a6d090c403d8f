"""The knobs: one frozen dataclass, and the `FIELDS` table that is read off it.

The table drives every face of the program (Python keywords, command-line flags, the README's table), so a knob is
written down once, here.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from est_lora.errors import EstLoraError, nearest, quote

AUTO = "auto"
BETA_UNMEASURED = 0.5  # what `beta = auto` is where no style discrepancy has been measured
_SWITCH = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}


@dataclass(frozen=True)
class Field:
    """One knob.

    Attributes:
        key: its name in Python, in the JSON, and (with dashes) on the command line.
        type: `str`, `float` or `bool`.
        default: the value when nobody says otherwise.
        help: one sentence for the user.
        label: its name where people read it.
        choices: the words it may take; empty where any text or number is allowed.
        low, high: bounds of a number, inclusive; `above_low`: the lower bound itself is excluded.
        auto: a number that may also be the word `auto`.
        webui: whether only a WebUI has a use for it.
    """

    key: str
    type: type
    default: Any
    help: str
    label: str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    above_low: bool = False
    auto: bool = False
    webui: bool = False

    @property
    def flag(self) -> str:
        """The command line's spelling."""
        return "--" + self.key.replace("_", "-")

    @property
    def infotext(self) -> str:
        """Its key in the text that a picture carries."""
        return "EST-LoRA " + self.key.replace("_", " ")

    @property
    def range(self) -> str:
        """What may be given, in words."""
        if self.choices:
            return ", ".join(self.choices)
        if self.type is bool:
            return "true, false"
        if self.type is str:
            return "a LoRA file"
        return f"{AUTO}, {self._bounds}" if self.auto else self._bounds

    @property
    def _bounds(self) -> str:
        return f"{'> ' if self.above_low else ''}{self.low:g} ... {self.high:g}"

    def parse(self, value: object) -> Any:
        """`value`, typed by a user or given by a program, as this knob's own type.

        Raises:
            EstLoraError: it is not one of the choices, not a finite number, or out of range.
        """
        if self.choices:
            if isinstance(value, str) and value in self.choices:
                return value
            raise EstLoraError(f"{self.key} can't be {quote(value)}: it is one of {self.range}.")
        if self.type is str:
            return self._parse_name(value)
        if self.type is bool:
            return self._parse_switch(value)
        if self.auto and isinstance(value, str) and value == AUTO:
            return AUTO
        return self._parse_number(value)

    def text(self, value: object) -> str:
        """A value as a person would type it, from which `parse` makes the same value again."""
        if not isinstance(value, float):
            return str(value)
        short = f"{value:g}"
        return short if float(short) == value else repr(value)

    def _parse_name(self, value: object) -> str | None:
        if value is None:
            return None
        if isinstance(value, (str, os.PathLike)) and os.fspath(value):
            return str(os.fspath(value))
        raise EstLoraError(f"{self.key} can't be {quote(value)}: it is {self.range}.")

    def _parse_switch(self, value: object) -> bool:
        word = str(value).casefold() if isinstance(value, str) or value in (0, 1) else ""
        if word in _SWITCH:
            return _SWITCH[word]
        raise EstLoraError(f"{self.key} can't be {quote(value)}: it is {' or '.join(self.range.split(', '))}.")

    def _parse_number(self, value: object) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number) and self.low <= number <= self.high and not (self.above_low and number == self.low):
            return number
        auto = f", or {AUTO}" if self.auto else ""
        raise EstLoraError(f"{self.key} can't be {quote(value)}: it is a number in {self._bounds}{auto}.")


def _knob(default: Any, help: str, **limits: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class FusionConfig:
    """A request: which two LoRAs, and how they are to be fused. Values are checked and converted on construction.

    Raises:
        EstLoraError: a value is of the wrong type, unknown or out of range.
    """

    enabled: bool = _knob(True, "off: the picture is made without fusion", webui=True)
    subject: str | None = _knob(None, "the LoRA of the subject: a character, a person, an object", type=str)
    style: str | None = _knob(None, "the LoRA of the style", type=str)
    subject_weight: float = _knob(1.0, "strength of the subject's update; doesn't move the gate", low=-2, high=2)
    style_weight: float = _knob(1.0, "strength of the style's update; doesn't move the gate", low=-2, high=2)
    beta: float | str = _knob(
        AUTO,
        f"style pressure at the start; auto = the measured style discrepancy, {BETA_UNMEASURED:g} without one",
        label="Style discrepancy (beta)",
        low=0,
        high=2,
        auto=True,
    )
    alpha: float = _knob(1.5, "how fast time favours the style", low=0, high=10, above_low=True)
    lean: float = _knob(0.0, "more subject (below 0) ... more style (above 0): who acts longer", low=-1, high=1)
    balance: str = _knob("energy", "how the two files are made comparable; l1 = as published", choices=("energy", "l1"))
    pattern: str = _knob("s", "style pressure rises (s), or rises and wraps around (s*)", choices=("s", "s*"))
    clock: str = _knob(
        "timestep", "progress by noise level, or by step / steps as published", choices=("timestep", "step")
    )
    method: str = _knob(
        "est",
        "how a layer chooses: est, k-lora; sum adds both always; subject, style use one file alone",
        choices=("est", "k-lora", "sum", "subject", "style"),
    )
    layers: str = _knob(
        "attention", "which layers the gate decides: attention projections, or all", choices=("attention", "all")
    )
    other: str = _knob(
        "sum",
        "what happens to layers the gate doesn't decide (est, k-lora)",
        label="Other layers",
        choices=("sum", "off"),
    )
    subject_te: float = _knob(
        1.0, "strength of the subject file's text-encoder part", label="Subject's text encoder", low=-2, high=2
    )
    style_te: float = _knob(
        1.0, "strength of the style file's text-encoder part", label="Style's text encoder", low=-2, high=2
    )
    hires: str = _knob(
        "same",
        "what the second pass of a hires fix does: the same, one file alone, or no fusion",
        label="Hires pass",
        choices=("same", "subject", "style", "off"),
        webui=True,
    )
    engine: str = _knob(
        "auto",
        "how updates are applied; never changes the picture beyond rounding",
        choices=("auto", "branch", "merge"),
    )

    def __post_init__(self) -> None:
        for field in FIELDS:
            object.__setattr__(self, field.key, field.parse(getattr(self, field.key)))

    @classmethod
    def of(cls, knobs: Mapping[str, object]) -> FusionConfig:
        """A config from `{key: value}` as a user gave it.

        Raises:
            EstLoraError: a key is unknown (the nearest ones are named), or a value can't be used.
        """
        keys = [field.key for field in FIELDS]
        for key in knobs:
            if key not in keys:
                near = nearest(str(key), keys) or keys
                raise EstLoraError(f"There is no knob {quote(key)}: did you mean {' or '.join(near)}?")
        return cls(**knobs)  # type: ignore[arg-type]

    @property
    def takes_discrepancy(self) -> bool:
        """Whether a measured style discrepancy counts; K-LoRA's `beta` is its own, and the other methods have none."""
        return self.beta == AUTO and self.method == "est"

    def pair(self) -> tuple[str, str]:
        """Subject and style.

        Raises:
            EstLoraError: one of them wasn't given.
        """
        if self.subject is None or self.style is None:
            missing = "subject" if self.subject is None else "style"
            raise EstLoraError(f"A fusion needs two LoRAs and no {missing} was given: name a subject and a style.")
        return self.subject, self.style


def _field(declared: dataclasses.Field[Any]) -> Field:
    limits = dict(declared.metadata)
    kind = str if "choices" in limits else limits.pop("type", bool if isinstance(declared.default, bool) else float)
    limits.setdefault("label", declared.name.replace("_", " ").capitalize())
    return Field(key=declared.name, type=kind, default=declared.default, **limits)


FIELDS: tuple[Field, ...] = tuple(_field(declared) for declared in dataclasses.fields(FusionConfig))
BY_KEY: dict[str, Field] = {field.key: field for field in FIELDS}
FILES = ("subject", "style")  # the keys of the two knobs that are files
