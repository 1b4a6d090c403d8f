"""Knobs as axes of the host's X/Y/Z plot: each cell of a grid is a job with values of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from est_lora.config import FIELDS, FILES, Field
from est_lora.errors import EstLoraError
from est_lora.hosts.webui.loras import LoraList

KNOBS = (
    *(*FILES, "subject_weight", "style_weight", "beta", "alpha", "lean"),
    *("balance", "pattern", "clock", "method", "layers", "hires"),
)
_PREFIX = "[EST] "
_CHOSEN = "est_lora_axes"
_PLOT = "xyz_grid.py"
_DIGITS = 8


def add() -> None:
    """Enters our axes into the host's plot, where it has one and they aren't in it yet.

    To be called when all scripts are loaded, and none of them has built its page.
    """
    from modules import scripts

    for script in scripts.scripts_data:
        if script.script_class.__module__ == _PLOT and hasattr(script.module, "axis_options"):
            options = script.module.axis_options
            there = {option.label for option in options}
            axes = [_axis(script.module.AxisOption, field) for field in FIELDS if field.key in KNOBS]
            options.extend(axis for axis in axes if axis.label not in there)


def chosen(p: Any) -> Mapping[str, object]:
    """The knobs that axes have set on the job `p`, by their keys."""
    knobs: Mapping[str, object] = getattr(p, _CHOSEN, {})
    return knobs


class _Number:
    """The type of an axis of numbers. The host knows ranges where it is `float`; words and text are left as they are."""

    def __call__(self, value: object) -> object:
        """A value as it was typed, or of a range, where 0.3 may have come out as 0.30000000000000004."""
        return round(value, _DIGITS) + 0.0 if isinstance(value, float) else value  # + 0.0: there is no -0

    def __eq__(self, other: object) -> bool:
        return other is float

    def __hash__(self) -> int:
        return hash(float)


def _axis(option: Callable[..., Any], field: Field) -> Any:
    return option(
        _PREFIX + field.label,
        _Number() if field.type is float else str,
        _choosing(field),
        format_value=_showing(field),
        confirm=_confirming(field),
        choices=_choices(field),
    )


def _choosing(field: Field) -> Callable[..., None]:
    def choose(p: Any, value: object, _: Sequence[object]) -> None:
        # A new dict: the cells of a grid are shallow copies of one job.
        setattr(p, _CHOSEN, {**chosen(p), field.key: value})

    return choose


def _showing(field: Field) -> Callable[..., str]:
    def show(p: Any, option: Any, value: Any) -> str:
        parsed = _checked(field, value)
        return f"{field.key.replace('_', ' ')}: {f'{parsed:g}' if isinstance(parsed, float) else parsed}"

    return show


def _confirming(field: Field) -> Callable[..., None]:
    def confirm(p: Any, values: Sequence[object]) -> None:
        """Before the first picture, so that one wrong value costs none."""
        try:
            if not values:
                raise EstLoraError(f"The axis {_PREFIX}{field.label} has no values: give it some, or take it out.")
            for value in values:
                _checked(field, value)
        except EstLoraError as error:
            if not getattr(p, "is_api", False):
                raise
            from fastapi import HTTPException

            raise HTTPException(status_code=422, detail=str(error)) from error

    return confirm


def _choices(field: Field) -> Callable[[], list[str]] | None:
    if field.key in FILES:
        return _names
    return (lambda: list(field.choices)) if field.choices else None


def _names() -> list[str]:
    try:
        return LoraList().names()
    except EstLoraError:  # said when the grid is started
        return []


def _checked(field: Field, value: object) -> Any:
    """A value as the field's own type, or the name of the file that is meant."""
    parsed = field.parse(value)
    return LoraList().find(parsed).name if field.key in FILES else parsed
