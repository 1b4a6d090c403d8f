"""What is measured: the pairs, the probes, and `D` of every one of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from est_lora.demo.model import BASE, GUIDANCE, LORAS
from est_lora.demo.world import NEW_STYLES, SIZE, SUBJECTS
from est_lora.gate import STYLE, SUBJECT
from est_lora.hosts.diffusers import fuse

Features = Callable[[list[Image]], Tensor]
_MADE_BY = "made by"

BUDGET = 14.0
"""What a probe may cost, in steps at the native side: half a picture of 28 steps."""

PROMPTS = {
    "both": "a {subject}, {style}, on white",
    "both, nothing else": "{subject} {style}",
    "both, on sky": "drawing of a {subject} in {style}, on sky",
    "both, style first": "{style}, a {subject}, on cream",
    "subject's only": "a {subject}, flat, on white",
    "style's only": "a red heart, {style}, on white",
    "neither (heart)": "a red heart, flat, on white",
    "neither (creature)": "a blue creature, outlined, on sky",
}
"""Prompts by which trigger words are in them. The first is the reference."""


class Pair(NamedTuple):
    """A subject and a style, by the words that mean them."""

    subject: str
    style: str

    def prompt(self, name: str) -> str:
        """The prompt of this name with the pair's words."""
        return PROMPTS[name].format(subject=self.subject, style=self.style)

    def __str__(self) -> str:
        return f"{self.subject.split()[0]} x {self.style.split()[0]}"


class Probe(NamedTuple):
    """How a probe's two pictures are made.

    Attributes:
        prompt: a key of `PROMPTS`.
        steps: of the sampler.
        side: pixels.
    """

    prompt: str
    steps: int
    side: int

    @property
    def cost(self) -> float:
        """Of both pictures, in steps at the native side."""
        return 2 * self.steps * (self.side / SIZE) ** 2


class Plan(NamedTuple):
    """What is measured.

    Attributes:
        subjects, styles: the words; every subject is paired with every style.
        seeds: of the probes.
        prompt_seeds: of the probes with another prompt than the first, the first so many of `seeds`.
        prompts: keys of `PROMPTS`.
        grid: steps by side; the last of the native side is the reference.
    """

    subjects: tuple[str, ...] = tuple(SUBJECTS)
    styles: tuple[str, ...] = NEW_STYLES
    seeds: int = 12
    prompt_seeds: int = 6
    prompts: tuple[str, ...] = tuple(PROMPTS)
    grid: tuple[tuple[int, tuple[int, ...]], ...] = (
        (16, (4, 7, 14, 20, 28)),
        (24, (4, 7, 12, 20, 28)),
        (SIZE, (2, 3, 4, 5, 7, 10, 14, 20, 28)),
    )

    @property
    def pairs(self) -> list[Pair]:
        """Every subject with every style."""
        return [Pair(*words) for words in product(self.subjects, self.styles)]

    @property
    def reference(self) -> Probe:
        """The probe that the others are compared with."""
        return Probe(self.prompts[0], dict(self.grid)[SIZE][-1], SIZE)

    @property
    def settings(self) -> list[Probe]:
        """The reference prompt with every number of steps and every side."""
        return [Probe(self.prompts[0], steps, side) for side, column in self.grid for steps in column]

    @property
    def rewordings(self) -> list[Probe]:
        """The reference with the other prompts."""
        return [self.reference._replace(prompt=prompt) for prompt in self.prompts[1:]]

    @property
    def probes(self) -> list[Probe]:
        """All of them."""
        return [*self.settings, *self.rewordings]

    def seeds_of(self, probe: Probe) -> int:
        """How many seeds a probe is measured with."""
        return self.seeds if probe.prompt == self.reference.prompt else self.prompt_seeds


Values = NDArray[np.float64]
Table = dict[tuple[Pair, Probe], Values]
"""`D` by pair and probe, one for each seed, in the order of the seeds."""


def quick() -> Plan:
    """A plan that is measured in seconds, and tells nothing."""
    return Plan(
        subjects=tuple(SUBJECTS)[:2],
        styles=NEW_STYLES[:2],
        seeds=2,
        prompt_seeds=2,
        prompts=tuple(PROMPTS)[:2],
        grid=((16, (1, 2)), (SIZE, (1, 3))),
    )


class Series(NamedTuple):
    """Pictures that one of a pair draws alone, with the seeds 0, 1, ..."""

    pair: Pair
    role: str
    prompt: str
    probe: Probe
    seeds: int

    @property
    def key(self) -> str:
        """Says what is drawn. The other of the pair has no part in it, so other pairs have the same pictures."""
        words = getattr(self.pair, self.role)
        return f"{words}: {self.prompt}; {self.probe.steps} steps, {self.probe.side} px, {self.seeds} seeds"


class Bench:
    """Draws probe pictures and keeps their features, so that no picture is drawn twice.

    Args:
        pipe: the demo's pipeline.
        features: pictures to features, (n, d).
        kept: a file that keeps them between runs; None for memory only.
        extractor: identifies the extractor, so that another's features aren't taken for its own.
    """

    def __init__(self, pipe: Any, features: Features, kept: Path | None = None, extractor: str = "") -> None:
        self.pipe, self.features, self.kept = pipe, features, kept
        digest = hashlib.sha256(extractor.encode())
        for path in sorted([*BASE.rglob("*.*"), *LORAS.values()]):
            digest.update(path.read_bytes())
        self.made_by = digest.hexdigest()
        self.known: dict[str, Values] = {}
        if kept is not None and kept.is_file():
            with np.load(kept) as stored:
                if str(stored[_MADE_BY]) == self.made_by:
                    self.known = {key: stored[key] for key in stored.files if key != _MADE_BY}

    def measure(self, plan: Plan) -> Table:
        """`D` of every pair with every probe of the plan."""
        wanted = {
            (pair, probe): tuple(
                Series(pair, role, pair.prompt(probe.prompt), probe, plan.seeds_of(probe)) for role in (SUBJECT, STYLE)
            )
            for pair in plan.pairs
            for probe in plan.probes
        }
        each = {series.key: series for two in wanted.values() for series in two}
        cost = {key: series.seeds * series.probe.cost / 2 for key, series in each.items()}
        with tqdm(total=round(sum(cost.values())), desc="drawing probe pictures", unit="step") as bar:
            for key, series in each.items():
                if key not in self.known:
                    self.known[key] = self.features(self._draw(series)).double().numpy()
                    self._keep()
                bar.update(cost[key])
        return {which: _discrepancies(*(self.known[series.key] for series in two)) for which, two in wanted.items()}

    def _draw(self, series: Series) -> list[Image]:
        probe, subject, style = series.probe, *(LORAS[words] for words in series.pair)
        with fuse(self.pipe, subject, style, method=series.role):
            return list(
                self.pipe(
                    [series.prompt] * series.seeds,
                    num_inference_steps=probe.steps,
                    guidance_scale=GUIDANCE,
                    height=probe.side,
                    width=probe.side,
                    generator=[torch.Generator().manual_seed(seed) for seed in range(series.seeds)],
                ).images
            )

    def _keep(self) -> None:
        if self.kept is not None:
            unfinished = self.kept.with_suffix(".unfinished.npz")
            np.savez(unfinished, **{_MADE_BY: np.array(self.made_by)}, **self.known)
            os.replace(unfinished, self.kept)


def _discrepancies(subject: Values, style: Values) -> Values:
    """`D` of each row, from features (seeds, d)."""
    cosine = (subject * style).sum(1) / (np.linalg.norm(subject, axis=1) * np.linalg.norm(style, axis=1))
    return 1.0 - cosine
