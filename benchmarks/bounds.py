"""What is promised of a picture's time, and whether a measurement bears it out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.measure import BARE
from benchmarks.ways import WAYS

# (a way, what it is compared with: another way or None for no LoRA, rank or None for all, bound on a CPU, on a GPU)
BOUNDS = (
    ("auto", None, None, 1.02, 1.03),
    ("auto", "branch", None, 1.0, 1.0),
    ("branch", None, 8, 1.05, 1.05),
    ("branch", None, 128, 1.15, 1.15),
)


def judged(rows: Sequence[Mapping[str, Any]], on_gpu: bool) -> list[dict[str, Any]]:
    """Every bound that `rows`, of one UNet and rank, say something about.

    Returns:
        `what`, `against`, `bound`, `ratio` (value, low, high) and `kept`: `yes`, `no`, or `within the noise` where the
        ratio exceeds the bound by less than the interval is wide.
    """
    by_way = {row["way"]: row for row in rows}
    said = []
    for way, against, rank, on_cpu, gpu in BOUNDS:
        if way not in by_way or against not in by_way or rank not in (None, by_way[way]["rank"]):
            continue
        bound, ratio = gpu if on_gpu else on_cpu, quotient(by_way[way], by_way[against])
        kept = "yes" if ratio["value"] <= bound else "within the noise" if ratio["low"] <= bound else "no"
        compared = BARE if against is None else WAYS[against].title
        said.append({"what": WAYS[way].title, "against": compared, "bound": bound, "ratio": ratio, "kept": kept})
    return said


def quotient(row: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
    """How many times as long a picture takes in `row` as in `other`, both by their own bare calls, and its interval."""
    one, two = row["ratio"], other["ratio"]
    value = one["value"] / two["value"]
    below = math.hypot(1 - one["low"] / one["value"], two["high"] / two["value"] - 1)
    above = math.hypot(one["high"] / one["value"] - 1, 1 - two["low"] / two["value"])
    return {"value": value, "low": value * (1 - below), "high": value * (1 + above)}
