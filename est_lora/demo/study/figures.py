"""What the measured discrepancies say, in numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from est_lora.config import BETA_UNMEASURED, FusionConfig
from est_lora.demo.study.measure import BUDGET, Plan, Probe, Table, Values, has_both
from est_lora.demo.styles import SIZE
from est_lora.gate import FusionPlan
from est_lora.hosts.diffusers import load_plan

_RESAMPLES = 1000


class Spread(NamedTuple):
    """How much `D` moves within a pair when one thing is varied, as standard deviations.

    Attributes:
        levels: how many values the thing has.
        within: within a pair, over all pairs; `within^2 = common^2 + own^2`.
        common: of it, what all pairs do alike.
        own: of it, what each pair does for itself.
    """

    levels: int
    within: float
    common: float
    own: float

    @classmethod
    def of(cls, rows: Values) -> Spread:
        """Of `D` with shape (pairs, levels)."""
        pairs, levels = rows.shape
        free = max(levels - 1, 1)
        moved = rows - rows.mean(1, keepdims=True)
        alike = moved.mean(0)
        common, own = (alike**2).sum() / free, ((moved - alike) ** 2).sum() / (pairs * free)
        return cls(levels, math.sqrt(common + own), math.sqrt(common), math.sqrt(own))


class Score(NamedTuple):
    """How near one probe comes to the reference's mean over the seeds.

    Attributes:
        shift: of the mean over pairs and seeds.
        error: root of the mean square over pairs and seeds, of a single seed.
        order: rank correlation of the pairs' means with the reference's.
        seeds: how many seeds the budget allows.
        error_of_seeds: the error of the mean over so many.
    """

    probe: Probe
    shift: float
    error: float
    order: float
    seeds: int
    error_of_seeds: float

    @property
    def affordable(self) -> bool:
        """Whether two pictures keep within the budget."""
        return self.probe.cost <= BUDGET


@dataclass(frozen=True)
class Findings:
    """What follows from the measured `D`.

    Attributes:
        plan: what was measured.
        means: `D` of each pair with the reference, over the seeds.
        seed_deviation: its standard deviation over the seeds.
        between: standard deviation between the pairs; what the seeds leave in `means` is taken off.
        spreads: by what is varied.
        by_prompt: `D` over the seeds, (pairs, prompts).
        deviation_by_prompt: its standard deviation over the seeds, over all pairs, a value a prompt.
        scores: of every steps and side.
        best: the affordable one with the smallest error.
        best_of_seeds: the affordable one with the smallest error where the budget is spent on several seeds.
        wins: how often it stays the best when pairs and seeds are drawn anew.
        constant, half: the error of taking the mean of all pairs for each, and of taking 0.5.
        hands: by how far `beta` is moved, the share of gated layers x progress that changes hands, a value a pair.
        hands_probe, hands_reference, hands_half: the same where `beta` is what one seed of the best probe or of the
            reference measures, or 0.5, for the mean of the reference; over pairs and seeds.
        seed_errors: the best probe's error by seed.
    """

    plan: Plan
    means: Values
    seed_deviation: Values
    between: float
    spreads: dict[str, Spread]
    by_prompt: Values
    deviation_by_prompt: Values
    scores: list[Score]
    best: Score
    best_of_seeds: Score
    wins: float
    constant: float
    half: float
    hands: dict[float, Values]
    hands_probe: float
    hands_reference: float
    hands_half: float
    seed_errors: Values

    @classmethod
    def of(cls, table: Table, plan: Plan) -> Findings:
        """Draws them from what was measured."""

        def rows(probe: Probe) -> Values:
            return np.stack([table[pair, probe] for pair in plan.pairs])

        reference = rows(plan.reference)
        means = reference.mean(1)
        seeds = Spread.of(reference)
        between = math.sqrt(max(means.var(ddof=1) - seeds.own**2 / plan.seeds, 0.0))
        scores = [_score(probe, rows(probe), means) for probe in plan.settings]
        within_budget = [score for score in scores if score.affordable]
        best = min(within_budget, key=lambda score: score.error)
        affordable = {score.probe: rows(score.probe) for score in within_budget}
        chosen = affordable[best.probe]

        prompted = [reference[:, : plan.prompt_seeds], *(rows(probe) for probe in plan.rewordings)]
        by_prompt = np.stack([values.mean(1) for values in prompted], axis=1)
        both = [place for place, name in enumerate(plan.prompts) if has_both(name)]
        native = [rows(probe).mean(1) for probe in plan.settings if probe.side == SIZE]
        longest = [rows(Probe(plan.prompts[0], column[-1], side)).mean(1) for side, column in plan.grid]
        hands = [_Hands(*plan.files(pair)) for pair in plan.pairs]
        return cls(
            plan=plan,
            means=means,
            seed_deviation=reference.std(1, ddof=1),
            between=between,
            spreads={
                "seed": seeds,
                "prompt, with both trigger words": Spread.of(by_prompt[:, both]),
                "prompt, any": Spread.of(by_prompt),
                "steps": Spread.of(np.stack(native, axis=1)),
                "side": Spread.of(np.stack(longest, axis=1)),
            },
            by_prompt=by_prompt,
            deviation_by_prompt=np.array([Spread.of(values).within for values in prompted]),
            scores=scores,
            best=best,
            best_of_seeds=min(within_budget, key=lambda score: score.error_of_seeds),
            wins=_wins(list(affordable.values()), reference, chosen),
            constant=float(means.std()),
            half=_root_mean_square(means - BETA_UNMEASURED),
            hands={
                by: np.array([each.between(mean, mean + by) for each, mean in zip(hands, means)]) for by in (-0.1, 0.1)
            },
            hands_probe=_mean_of_hands(hands, means, chosen),
            hands_reference=_mean_of_hands(hands, means, reference),
            hands_half=float(np.mean([each.between(mean, BETA_UNMEASURED) for each, mean in zip(hands, means)])),
            seed_errors=np.sqrt(((chosen - means[:, None]) ** 2).mean(0)),
        )


class _Hands:
    """One pair's plans, to be compared with one another."""

    def __init__(self, subject: Path, style: Path) -> None:
        self.plan = load_plan(FusionConfig(subject=str(subject), style=str(style)))

    def between(self, one: float, other: float) -> float:
        """The share of gated layers x progress in which another file acts with the one `beta` than with the other."""
        return changed(*(self._at(float(np.clip(beta, 0.0, 2.0))) for beta in (one, other)))

    def _at(self, beta: float) -> FusionPlan:
        config = dataclasses.replace(self.plan.config, beta=beta)
        return FusionPlan.of(self.plan.subject, self.plan.style, config)


def changed(one: FusionPlan, other: FusionPlan) -> float:
    """The share of gated layers x progress in which two plans of the same files differ."""
    shares = []
    for layer, again in zip(one.layers, other.layers):
        if layer.gated:
            ends = sorted({0.0, 1.0, *(segment.start for each in (layer, again) for segment in each.segments)})
            pieces = pairwise(ends)
            shares.append(sum(end - start for start, end in pieces if layer.acts(start) != again.acts(start)))
    return sum(shares) / max(len(shares), 1)


def _mean_of_hands(hands: Sequence[_Hands], means: Values, measured: Values) -> float:
    return float(
        np.mean([each.between(mean, one) for each, mean, row in zip(hands, means, measured) for one in row.tolist()])
    )


def _score(probe: Probe, rows: Values, means: Values) -> Score:
    seeds = max(int(BUDGET / probe.cost), 1)
    shifts = rows.mean(1) - means
    variance = rows.var(1)
    return Score(
        probe=probe,
        shift=float(shifts.mean()),
        error=_root_mean_square(rows - means[:, None]),
        order=float(np.corrcoef(_ranks(rows.mean(1)), _ranks(means))[0, 1]),
        seeds=seeds,
        error_of_seeds=math.sqrt(float((shifts**2 + variance / seeds).mean())),
    )


def _wins(probes: list[Values], reference: Values, chosen: Values) -> float:
    """How often `chosen` has the smallest error of `probes` when pairs and seeds are drawn anew, with repetition."""
    rng = np.random.default_rng(0)
    pairs, seeds = reference.shape
    won = 0
    for _ in range(_RESAMPLES):
        some = np.ix_(rng.integers(pairs, size=pairs), rng.integers(seeds, size=seeds))
        means = reference[some].mean(1, keepdims=True)
        errors = [_root_mean_square(rows[some] - means) for rows in probes]
        won += probes[int(np.argmin(errors))] is chosen
    return won / _RESAMPLES


def _root_mean_square(values: Values) -> float:
    return float(np.sqrt((values**2).mean()))


def _ranks(values: Values) -> Values:
    return np.argsort(np.argsort(values)).astype(float)
