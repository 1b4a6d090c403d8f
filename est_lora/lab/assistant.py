"""Who does the lab's work, piece by piece: trains, tests, draws, judges."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from est_lora.config import FusionConfig
from est_lora.demo.model import LORAS
from est_lora.demo.study import extractor
from est_lora.demo.styles import COLOURS
from est_lora.demo.things import THINGS
from est_lora.demo.train import Recipe, train_lora
from est_lora.demo.world import Pose
from est_lora.discrepancy import Memory
from est_lora.gate import STYLE, SUBJECT, FusionPlan
from est_lora.hosts.diffusers import load_plan
from est_lora.hosts.measuring import measure
from est_lora.lab.drawing import draw, pipeline, prompt_of, true_picture
from est_lora.lab.examples import corrupted
from est_lora.lab.folder import Key, Lab
from est_lora.lab.judge import QUESTIONS, Judge, trained
from est_lora.lab.methods import halved, plan_of
from est_lora.lab.registration import distances

_UNSEEN = 1_000_003  # seeds from here on were in no training

Found = dict[str, Any]


class Assistant:
    """Does pieces of a lab's work, with a model and a judge of its own.

    Args:
        lab: whose work.
    """

    def __init__(self, lab: Lab) -> None:
        self.lab, self.protocol = lab, lab.protocol
        self.seeds = range(lab.protocol.sampling_seeds)

    @cached_property
    def pipe(self) -> Any:
        """The model."""
        return pipeline(self.lab.base)

    @cached_property
    def judge(self) -> Judge:
        """Both classifiers, which are trained by now."""
        return Judge({name: trained(name, self.lab.folder, self.protocol.judge_steps) for name in QUESTIONS})

    def do(self, key: Key) -> Found:
        """Does what a key of the lab's names; returns what was found."""
        what, *which = key
        return {
            "judge": self.train_classifier,
            "extractor": self.train_extractor,
            "lora": self.train_lora,
            "single": self.test_lora,
            "half": self.test_half,
            "drawn by code": self.judge_drawn_by_code,
            "ceiling": self.test_ceiling,
            "discrepancy": self.measure,
            "cell": self.fuse,
        }[what](*which)

    # ---- training

    def train_classifier(self, name: str) -> Found:
        """One of the judge's, and how often it is right on what it hasn't seen."""
        classifier = trained(name, self.lab.folder, self.protocol.judge_steps)
        return {"right": Judge({name: classifier}).right(name, self.protocol.judge_pictures, _UNSEEN)}

    def train_extractor(self) -> Found:
        """The stand-in by which style discrepancies are measured."""
        extractor.train(self.lab.folder / "stand-in", self.protocol.extractor_steps)
        return {}

    def train_lora(self, name: str) -> Found:
        """One of the lab's files."""
        words, recipe = self.lab.recipes[name]
        path = self.lab.folder / "loras" / name
        if self.protocol.embedded and self.lab.base is None and recipe == Recipe() and words in LORAS:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(LORAS[words], path)
        else:
            train_lora(words, recipe, path, self.lab.base, save_every=recipe.steps)
        return {"words": words, "rank": recipe.rank, "alpha": recipe.alpha, "share": self._share(path)}

    def _share(self, path: Path) -> float:
        """`||dW||^2 / ||W||^2` over the layers of a LoRA."""
        layers = self._plan_of_one(path, SUBJECT).layers
        weights = [self.pipe.unet.get_submodule(layer.layer.name).weight for layer in layers]
        return sum(layer.energy_subject or 0.0 for layer in layers) / sum(
            float(each.detach().square().sum()) for each in weights
        )

    # ---- testing

    def test_lora(self, words: str, training: int, guidance: float) -> Found:
        """How often a LoRA draws alone what it was taught."""
        seeds = range(self.protocol.single_pictures)
        return self._alone(self._plan_alone(words, training), seeds, "single", words, training, guidance)

    def test_half(self, words: str, training: int, guidance: float, of: str) -> Found:
        """The same of half a LoRA, which is what routing leaves of it."""
        plan = halved(self._plan_alone(words, training), of, _number(words, training, of))
        return self._alone(plan, self.seeds, "half", words, training, guidance, of)

    def judge_drawn_by_code(self, both: str) -> Found:
        """What the judge says of true pictures."""
        subject, style = both.split(", ")
        rng = np.random.default_rng(_UNSEEN)
        pictures = [corrupted(true_picture(subject, style, seed, Pose.random(rng)), rng) for seed in self.seeds]
        return self._judged(pictures, subject, style, "drawn by code", both)

    def test_ceiling(self, both: str, guidance: float) -> Found:
        """What a LoRA that was taught the true pictures can do."""
        subject, style = both.split(", ")
        plan = self._plan_of_one(self.lab.ceiling(subject, style), SUBJECT)
        return self._judged(self._drawn(both, guidance, plan), subject, style, "ceiling", both, guidance)

    def measure(self, subject: str, style: str, training: int) -> Found:
        """A pair's style discrepancy."""
        files = self.lab.lora(subject, training), self.lab.lora(style, training)
        folder, memory = self.lab.folder / "stand-in", Memory(self.lab.folder / "memory")
        found = measure(self.pipe, *files, prompt=f"{subject}, {style}", folder=folder, memory=memory)
        return {"value": found.value}

    # ---- comparing

    def fuse(self, subject: str, style: str, training: int, method: str, guidance: float) -> Found:
        """A cell of the comparison."""
        plan = plan_of(
            self.protocol.methods[method],
            self.lab.lora(subject, training),
            self.lab.lora(style, training),
            self.pipe,
            self.lab.records[("discrepancy", subject, style, training)]["value"],
            _number(subject, style, training, method),
        )
        pictures = self._drawn(f"{subject}, {style}", guidance, plan)
        return self._judged(pictures, subject, style, "cell", subject, style, training, method, guidance)

    # ---- what they share

    def _plan_alone(self, words: str, training: int) -> FusionPlan:
        return self._plan_of_one(self.lab.lora(words, training), SUBJECT if words in self.protocol.subjects else STYLE)

    def _plan_of_one(self, file: Path, method: str) -> FusionPlan:
        return load_plan(FusionConfig(subject=str(file), style=str(file), method=method), self.pipe)

    def _alone(self, plan: FusionPlan, seeds: range, *key: Any) -> Found:
        """How often one file draws what it teaches; some of the pictures are kept under a key."""
        _, words, _, guidance, *_ = key
        is_subject = words in self.protocol.subjects
        asked = [f"{words}, plain" if is_subject else f"{_object(seed)}, {words}" for seed in seeds]
        prompts = [prompt_of(each, seed) for each, seed in zip(asked, seeds)]
        pictures = draw(self.pipe, prompts, seeds, self.protocol.steps, guidance, plan)
        verdicts = self.judge.verdicts(pictures, words, words)
        self._keep(pictures[: self.protocol.sampling_seeds], *key)
        right = [verdict.subject if is_subject else verdict.style for verdict in verdicts]
        return {"right": float(np.mean(right))}

    def _drawn(self, words: str, guidance: float, plan: Any) -> list[np.ndarray]:
        prompts = [prompt_of(words, seed) for seed in self.seeds]
        return draw(self.pipe, prompts, self.seeds, self.protocol.steps, guidance, plan)

    def _judged(self, pictures: Sequence[np.ndarray], subject: str, style: str, *key: Any) -> Found:
        """What is said of pictures that are to show both; they are kept under a key."""
        self._keep(pictures, *key)
        verdicts = self.judge.verdicts(pictures, subject, style)
        return {
            "subject": [int(verdict.subject) for verdict in verdicts],
            "style": [int(verdict.style) for verdict in verdicts],
            "parts": [verdict.parts for verdict in verdicts],
            "distance": [round(each, 4) for each in distances(pictures, subject, style)],
        }

    def _keep(self, pictures: Sequence[np.ndarray], *key: Any) -> None:
        path = self.lab.picture(*key)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate(pictures, axis=1)).save(path)


def _object(seed: int) -> str:
    """Something of the base's world, another one for each seed."""
    things, colours = list(THINGS), list(COLOURS)
    return f"{colours[(3 * seed) % len(colours)]} {things[(5 * seed) % len(things)]}"


def _number(*what: Any) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(what).encode()).digest()[:4], "little")
