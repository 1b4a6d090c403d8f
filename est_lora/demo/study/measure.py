"""What is measured: the pairs, the probes, and `D` of every one of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
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
from est_lora.demo.styles import NEW_STYLES, SIZE
from est_lora.demo.things import SUBJECTS
from est_lora.discrepancy import discrepancy
from est_lora.errors import EstLoraError
from est_lora.gate import STYLE, SUBJECT
from est_lora.hosts.diffusers import fuse

Features = Callable[[list[Image]], Tensor]

BUDGET = 14.0
"""What a probe may cost, in steps at the native side: half a picture of 28 steps."""

PROMPTS = {
    "the words alone": "{subject}, {style}",
    "both, on white": "a {subject}, {style}, on white",
    "both, on sky": "drawing of a {subject} in {style}, on sky",
    "both, style first": "{style}, a {subject}, on cream",
    "both and a colour": "a blue {subject}, {style}, on white",
    "the subject's words": "a {subject}, plain, on white",
    "the style's words": "a red heart, {style}, on white",
    "neither: a heart": "a red heart, plain, on white",
    "neither: a creature": "a blue creature, striped, inked, on sky",
}
"""Prompts by which of the pair's trigger words they have. The first is the reference."""


def has_both(prompt: str) -> bool:
    """Whether a prompt, a key of `PROMPTS`, has the trigger words of both."""
    return "{subject}" in PROMPTS[prompt] and "{style}" in PROMPTS[prompt]


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


def loras_in(folder: Path) -> dict[str, Path]:
    """The files of a folder that teach a subject or a style of the demo's world, by the words that mean it.

    Raises:
        EstLoraError: they don't make two pairs.
    """
    named = {words: folder / f"{words.split()[0]}.safetensors" for words in (*SUBJECTS, *NEW_STYLES)}
    there = {words: path for words, path in named.items() if path.is_file()}
    subjects, styles = ([words for words in there if words in known] for known in (SUBJECTS, NEW_STYLES))
    if len(subjects) * len(styles) < 2:
        raise EstLoraError(
            f"'{folder}' has LoRAs of {len(subjects)} subjects and {len(styles)} styles, and the study compares pairs:"
            f" it takes two at least. Files are called {', '.join(path.name for path in named.values())}."
        )
    return there


class Plan(NamedTuple):
    """What is measured.

    Attributes:
        loras: the files by the words that mean what they teach; every subject among them is paired with every style.
        seeds: of the probes.
        prompt_seeds: of the probes with another prompt than the first, the first so many of `seeds`.
        prompts: keys of `PROMPTS`.
        grid: steps by side; the last of the native side is the reference.
    """

    loras: Mapping[str, Path] = LORAS
    seeds: int = 12
    prompt_seeds: int = 6
    prompts: tuple[str, ...] = tuple(PROMPTS)
    grid: tuple[tuple[int, tuple[int, ...]], ...] = (
        (SIZE // 2, (4, 7, 14, 20, 28)),
        (SIZE // 4 * 3, (4, 7, 12, 20, 28)),
        (SIZE, (2, 3, 4, 5, 7, 10, 14, 20, 28)),
    )

    @property
    def subjects(self) -> list[str]:
        """The words of the subjects."""
        return [words for words in self.loras if words in SUBJECTS]

    @property
    def styles(self) -> list[str]:
        """The words of the styles."""
        return [words for words in self.loras if words in NEW_STYLES]

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

    def files(self, pair: Pair) -> tuple[Path, Path]:
        """A pair's subject and style."""
        return self.loras[pair.subject], self.loras[pair.style]

    def seeds_of(self, probe: Probe) -> int:
        """How many seeds a probe is measured with."""
        return self.seeds if probe.prompt == self.reference.prompt else self.prompt_seeds


Values = NDArray[np.float64]
Table = dict[tuple[Pair, Probe], Values]
"""`D` by pair and probe, one for each seed, in the order of the seeds."""


def quick(loras: Mapping[str, Path] = LORAS) -> Plan:
    """A plan that is measured in seconds, and tells nothing."""
    return Plan(
        loras=loras,
        seeds=2,
        prompt_seeds=2,
        prompts=tuple(PROMPTS)[:2],
        grid=((SIZE // 2, (1, 2)), (SIZE, (1, 3))),
    )


class Series(NamedTuple):
    """Pictures that one of a pair draws alone, with the seeds 0, 1, ...

    Attributes:
        subject, style: the pair's files.
        role: which of them draws.
    """

    subject: Path
    style: Path
    role: str
    prompt: str
    probe: Probe
    seeds: int

    @property
    def key(self) -> str:
        """Says what is drawn. The other of the pair has no part in it, so other pairs have the same pictures."""
        file: Path = getattr(self, self.role)
        lora = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        return f"{lora} {self.prompt} {self.probe.steps} {self.probe.side} {self.seeds}"


class Bench:
    """Draws probe pictures and keeps their features, so that no picture is drawn twice.

    Args:
        pipe: the demo's pipeline.
        features: pictures to features, (n, d).
        folder: where they are kept between runs.
        extractor: identifies the extractor, so that another's features aren't taken for its own.
    """

    def __init__(self, pipe: Any, features: Features, folder: Path, extractor: str) -> None:
        self.pipe, self.features = pipe, features
        digest = hashlib.sha256(extractor.encode())
        for path in sorted(BASE.rglob("*.*")):
            digest.update(path.read_bytes())
        self.kept = folder / f"features-{digest.hexdigest()[:12]}.npz"
        self.known: dict[str, Values] = {}
        if self.kept.is_file():
            with np.load(self.kept) as stored:
                self.known = dict(stored)

    def measure(self, plan: Plan) -> Table:
        """`D` of every pair with every probe of the plan."""
        wanted = {
            (pair, probe): tuple(
                Series(*plan.files(pair), role, pair.prompt(probe.prompt), probe, plan.seeds_of(probe))
                for role in (SUBJECT, STYLE)
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
        return {which: _each(*(self.known[series.key] for series in two)) for which, two in wanted.items()}

    def _draw(self, series: Series) -> list[Image]:
        probe = series.probe
        with fuse(self.pipe, series.subject, series.style, method=series.role):
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
        unfinished = self.kept.with_suffix(".unfinished.npz")
        np.savez(unfinished, **self.known)  # type: ignore[arg-type]
        os.replace(unfinished, self.kept)


def _each(subject: Values, style: Values) -> Values:
    """`D` of each seed, from features (seeds, d)."""
    return np.array([discrepancy(torch.from_numpy(rows)) for rows in np.stack([subject, style], axis=1)])
