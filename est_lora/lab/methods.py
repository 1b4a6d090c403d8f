"""The plans of the methods that are compared: what `FusionConfig` offers, and two ways of choosing without a gate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

from est_lora.config import FusionConfig
from est_lora.gate import NONE, STYLE, SUBJECT, FusionPlan, LayerPlan
from est_lora.gate.schedule import Segment, Segments
from est_lora.hosts.diffusers import load_plan

MEASURED = "measured"
"""What `beta` is where the pair's style discrepancy is to be taken."""
_HALF_TIME = 0.5


def _at_half_time(rng: Generator) -> Segments:
    return Segment(0.0, SUBJECT), Segment(_HALF_TIME, STYLE)


def _by_chance(rng: Generator) -> Segments:
    return (Segment(0.0, SUBJECT if rng.random() < 0.5 else STYLE),)


LAYERS_BY: dict[str, Callable[[Generator], Segments]] = {"half time": _at_half_time, "chance": _by_chance}
"""Who acts in a gated layer, where the gate doesn't say."""


def plan_of(method: dict[str, Any], subject: Path, style: Path, pipe: Any, discrepancy: float, seed: int) -> FusionPlan:
    """The plan of a method.

    Args:
        method: as in the protocol.
        subject: the subject's LoRA.
        style: the style's LoRA.
        pipe: the pipeline that is to draw.
        discrepancy: the pair's `D`, for methods that take it.
        seed: of what is left to chance.
    """
    knobs = dict(method)
    layers_by = knobs.pop("layers_by", None)
    if knobs.get("beta") == MEASURED:
        knobs["beta"] = discrepancy
    plan = load_plan(FusionConfig.of({"subject": subject, "style": style, **knobs}), pipe)
    if layers_by is None:
        return plan
    rng = np.random.default_rng(seed)
    return _changed(plan, lambda layer: LAYERS_BY[layers_by](rng) if layer.gated else layer.segments)


def _changed(plan: FusionPlan, segments: Callable[[LayerPlan], Segments]) -> FusionPlan:
    """The plan with other segments in its layers."""
    layers = tuple(dataclasses.replace(layer, segments=segments(layer)) for layer in plan.layers)
    return dataclasses.replace(plan, layers=layers)


def _some_layers(acts: str, rng: Generator) -> Segments:
    return (Segment(0.0, acts if rng.random() < 0.5 else NONE),)


def _some_time(acts: str, rng: Generator) -> Segments:
    first, second = (acts, NONE) if acts == SUBJECT else (NONE, acts)
    return Segment(0.0, first), Segment(_HALF_TIME, second)


HALVES: dict[str, Callable[[str, Generator], Segments]] = {
    "half of the layers": _some_layers,
    "half of the time": _some_time,
}
"""What routing leaves of a file: layers chosen by chance, or a part of the time, a subject the first, a style the second."""


def halved(plan: FusionPlan, of: str, seed: int) -> FusionPlan:
    """The plan of one file alone, with half of what it did.

    Args:
        plan: of the whole.
        of: a key of `HALVES`.
        seed: of what is left to chance.
    """
    rng = np.random.default_rng(seed)
    return _changed(plan, lambda layer: HALVES[of](layer.segments[0].acts, rng))
