"""The schedule: style pressure over time, and the segments of `tau` in which each file acts.

`rho` is a constant of the layer and the style pressure `S` a known function of `tau`, so all switches of a layer are
known in closed form before the first step.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

SUBJECT, STYLE, BOTH, NONE = "subject", "style", "both", "none"
NEEDS_MODEL = "needs the model"  # undecided: an energy depends on weights that aren't known


class Segment(NamedTuple):
    """From `start` on, up to the next segment's start, `acts` acts: `subject`, `style`, `both`, `none`, or nobody knows."""

    start: float
    acts: str


Segments = tuple[Segment, ...]


class Schedule(NamedTuple):
    """Style pressure as METHOD's knobs set it.

    `S(tau) = (alpha * tau + beta) * 4^lean`; with the pattern `s*` the bracket is taken modulo alpha.
    """

    alpha: float
    beta: float
    lean: float = 0.0
    pattern: str = "s"

    def pressure(self, tau: float) -> float:
        """`S(tau)`, `tau` in [0, 1]."""
        rising = self.alpha * tau + self.beta
        return self._leaned(math.fmod(rising, self.alpha) if self.pattern == "s*" else rising)

    def segments(self, rho: float) -> Segments:
        """Where a layer with the energy ratio `rho` > 0 uses which file: the subject where `rho > S(tau)`."""
        level = rho / self._leaned(1.0)
        if self.pattern == "s":
            return _merged([(0.0, SUBJECT), ((level - self.beta) / self.alpha, STYLE)])
        # S rises from `low`, falls to 0 at `wrap`, and rises to `low` again at tau = 1.
        low = math.fmod(self.beta, self.alpha)
        wrap = 1.0 - low / self.alpha
        again = min(wrap + level / self.alpha, 1.0) if level <= low else math.inf
        return _merged(
            [(0.0, SUBJECT), (min((level - low) / self.alpha, wrap), STYLE), (wrap, SUBJECT), (again, STYLE)]
        )

    def _leaned(self, pressure: float) -> float:
        return float(pressure * 4.0**self.lean)


def always(acts: str) -> Segments:
    """One segment that covers all of [0, 1]."""
    return (Segment(0.0, acts),)


def acting(segments: Sequence[Segment], tau: float) -> str:
    """Who acts at `tau` in [0, 1]. A segment begins at its start: at equality the style has taken over."""
    return segments[max(bisect_right([segment.start for segment in segments], tau) - 1, 0)].acts


def _merged(steps: list[tuple[float, str]]) -> Segments:
    """Segments of [0, 1] from (start, acts) in order: starts clipped, empty ones dropped, equal neighbours joined."""
    kept: list[Segment] = []
    for start, acts in ((max(start, 0.0), acts) for start, acts in steps if start <= 1.0):
        while kept and kept[-1].start >= start:
            kept.pop()
        if not kept or kept[-1].acts != acts:
            kept.append(Segment(start, acts))
    return tuple(kept)
