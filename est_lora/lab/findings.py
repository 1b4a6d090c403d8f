"""What the records say, in numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from est_lora.lab.folder import Lab, Records
from est_lora.lab.methods import HALVES
from est_lora.lab.protocol import Protocol

_RESAMPLES = 1000
PLAIN_SUM = "sum 1/1"
SHIPPED = "EST, measured D"
"""What the extension does if nothing is changed."""
WHOLE = "whole"

Values = NDArray[np.float64]


class Interval(NamedTuple):
    """A mean, and where it lies with 95 % probability."""

    mean: float
    low: float
    high: float


class Gate(NamedTuple):
    """Something that has to hold before methods are ranked.

    Attributes:
        name: what it is.
        least: what has to be reached.
        figures: by their names.
        guidance: the guidance scale that it is about; None for all.
    """

    name: str
    least: float
    figures: dict[str, float]
    guidance: float | None = None

    @property
    def holds(self) -> bool:
        """Whether every figure reaches it."""
        return min(self.figures.values()) >= self.least


class Score(NamedTuple):
    """How a method does.

    Attributes:
        method: its name.
        subject: share of pictures with the right subject.
        style: likewise.
        both: share of pictures with both right.
        harmonic: harmonic mean of `subject` and `style`.
        parts: share of the subject's parts that are right.
        distance: to the true picture.
        gain: `both` less that of the plain sum, pair by pair.
        lead: `both` of what is shipped less this method's, pair by pair.
    """

    method: str
    subject: Interval
    style: Interval
    both: Interval
    harmonic: Interval
    parts: Interval
    distance: Interval
    gain: Interval
    lead: Interval


@dataclass(frozen=True)
class Findings:
    """All that is reported.

    Attributes:
        gates: in order.
        scores: of every method, by guidance scale.
        loras: of each file its words, its rank, its alpha and `||dW||^2 / ||W||^2`.
        ceilings: of each pair, how often the LoRA of its true pictures has the subject, and the style, by guidance scale.
        discrepancies: of each pair and training its `D`.
        alone: by guidance scale, of what each LoRA teaches how often it draws it alone: whole, and with each half left out.
    """

    gates: list[Gate]
    scores: dict[float, list[Score]]
    loras: dict[str, dict[str, float | str]]
    ceilings: dict[str, dict[float, tuple[float, float]]]
    discrepancies: dict[tuple[str, str, int], float]
    alone: dict[float, dict[str, dict[str, float]]]

    def shut(self, guidance: float) -> list[Gate]:
        """The gates that don't hold at a guidance scale; methods are ranked at it only where there are none."""
        return [gate for gate in self.gates if gate.guidance in (None, guidance) and not gate.holds]

    @classmethod
    def of(cls, lab: Lab) -> Findings:
        """What a finished run found.

        Raises:
            KeyError: it isn't finished.
        """
        protocol, records = lab.protocol, lab.records
        scores = {guidance: _scores(protocol, records, guidance) for guidance in protocol.guidances}
        loras = {name: records["lora", name] for name in lab.recipes}
        measured = {key[1:]: entry["value"] for key, entry in records.entries.items() if key[0] == "discrepancy"}
        ceilings = {
            both: {guidance: _right(records["ceiling", both, guidance]) for guidance in protocol.guidances}
            for both in map(", ".join, protocol.kinds)
        }
        alone = {guidance: _alone(protocol, records, guidance) for guidance in protocol.guidances}
        return cls(_gates(protocol, records, alone), scores, loras, ceilings, measured, alone)


def _alone(protocol: Protocol, records: Records, guidance: float) -> dict[str, dict[str, float]]:
    trainings = range(len(protocol.trainings))

    def right(what: str, words: str, *of: str) -> float:
        return _mean(records[(what, words, training, guidance, *of)]["right"] for training in trainings)

    return {
        words: {WHOLE: right("single", words), **{of: right("half", words, of) for of in HALVES}}
        for words in (*protocol.subjects, *protocol.styles)
    }


def _gates(protocol: Protocol, records: Records, alone: dict[float, dict[str, dict[str, float]]]) -> list[Gate]:
    kinds = [f"{subject}, {style}" for subject, style in protocol.kinds]
    gates = []
    for guidance in protocol.guidances:
        single = {words: shares[WHOLE] for words, shares in alone[guidance].items()}
        ceiling = {
            f"one LoRA of the true pictures, {what}": _mean(
                np.mean(records["ceiling", both, guidance][what]) for both in kinds
            )
            for what in ("subject", "style")
        }
        gates.append(Gate("LoRAs alone on their own picture", protocol.gates["single"], single, guidance))
        gates.append(Gate("the ceiling", protocol.gates["ceiling"], ceiling, guidance))
    drawn = {
        f"drawn by code, {what}": _mean(np.mean(records["drawn by code", both][what]) for both in kinds)
        for what in ("subject", "style")
    }
    judged = {
        f"{name}: {kind}": right
        for name in ("subject", "style")
        for kind, right in records["judge", name]["right"].items()
    }
    return [
        *gates,
        Gate("the ceiling", protocol.gates["ceiling"], drawn),
        Gate("the judge on pictures it hasn't seen", protocol.gates["judge"], judged),
    ]


def _right(entry: dict[str, list[int]]) -> tuple[float, float]:
    return float(np.mean(entry["subject"])), float(np.mean(entry["style"]))


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _scores(protocol: Protocol, records: Records, guidance: float) -> list[Score]:
    found = {
        method: {
            what: np.array(
                [records[("cell", *pair, method, guidance)][what] for pair in protocol.pairs], float
            ).reshape(len(protocol.kinds), -1)
            for what in ("subject", "style", "parts", "distance")
        }
        for method in protocol.methods
    }
    plain, shipped = _both(found[PLAIN_SUM]), _both(found[SHIPPED])
    return [
        Score(
            method,
            *(
                _interval(each["subject"]),
                _interval(each["style"]),
                _interval(_both(each)),
                _interval(each["subject"], each["style"], of=_harmonic),
                _interval(each["parts"]),
                _interval(each["distance"]),
                _interval(_both(each) - plain),
                _interval(shipped - _both(each)),
            ),
        )
        for method, each in found.items()
    ]


def _both(found: dict[str, Values]) -> Values:
    return found["subject"] * found["style"]


def _harmonic(means: Sequence[Values]) -> Values:
    one, other = means
    total = one + other
    return np.where(total > 0, 2 * one * other / np.where(total > 0, total, 1), 0.0)


def _interval(*values: Values, of: Callable[[Sequence[Values]], Values] = lambda means: means[0]) -> Interval:
    """Of values with shape (pairs, pictures of each).

    Pairs are drawn anew with repetition, each with all its pictures: these share its LoRAs and are alike, so a picture more
    of the same pair tells less than one of another.
    """
    drawn = np.random.default_rng(0).integers(len(values[0]), size=(_RESAMPLES, len(values[0])))
    mean = of([np.array(each.mean()) for each in values])
    again = of([each.mean(1)[drawn].mean(1) for each in values])
    low, high = np.quantile(again, (0.025, 0.975))
    return Interval(float(mean), float(low), float(high))
