"""What is compared and how, fixed in a file before it is run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from est_lora.demo.train import Recipe

FULL = Path(__file__).with_name("protocol.json")
QUICK = Path(__file__).with_name("quick.json")


class Pair(NamedTuple):
    """Two LoRAs that were trained with the same number.

    Attributes:
        subject: the words that mean it.
        style: likewise.
        training: which of the protocol's trainings.
    """

    subject: str
    style: str
    training: int


class Cell(NamedTuple):
    """What is drawn at once: a picture for each sampling seed."""

    pair: Pair
    method: str
    guidance: float


@dataclass(frozen=True)
class Protocol:
    """The file, read; its keys are the attributes.

    Attributes:
        subjects, styles: the words that mean what is taught.
        trainings: of each training seed the `Recipe` for subjects and for styles.
        ceiling: the `Recipe` of the LoRAs that are taught the true fused pictures.
        extractor_steps: of the stand-in that measures the style discrepancy.
        judge_steps: of each classifier's training.
        judge_pictures: that a classifier is tested with, of each kind.
        single_pictures: that a LoRA draws alone.
        sampling_seeds: how many.
        steps: of a picture.
        guidances: the guidance scales.
        methods: by name what `FusionConfig` takes; `beta` may be `measured`, and `layers_by` says how layers are
            chosen where the gate doesn't.
        gates: what has to be reached before methods are ranked.
        embedded: whether LoRAs that are part of the project are taken as they are, where they were trained by the very
            recipe, instead of being trained again.
    """

    subjects: tuple[str, ...]
    styles: tuple[str, ...]
    trainings: tuple[dict[str, dict[str, Any]], ...]
    ceiling: dict[str, Any]
    extractor_steps: int
    judge_steps: int
    judge_pictures: int
    single_pictures: int
    sampling_seeds: int
    steps: int
    guidances: tuple[float, ...]
    methods: dict[str, dict[str, Any]]
    gates: dict[str, float]
    embedded: bool = False

    @classmethod
    def read(cls, path: Path) -> Protocol:
        """Reads the file."""
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in content.items()})

    @property
    def kinds(self) -> list[tuple[str, str]]:
        """Every subject with every style."""
        return list(product(self.subjects, self.styles))

    @property
    def pairs(self) -> list[Pair]:
        """Every subject with every style, in every training."""
        return [Pair(*names) for names in product(self.subjects, self.styles, range(len(self.trainings)))]

    @property
    def cells(self) -> list[Cell]:
        """All that is drawn for the comparison."""
        return [Cell(*each) for each in product(self.pairs, self.methods, self.guidances)]

    def recipe(self, words: str, training: int) -> Recipe:
        """How the LoRA of a subject or a style is trained."""
        kind = "subject" if words in self.subjects else "style"
        return Recipe(**self.trainings[training][kind], seed=training)
