"""The judge: two classifiers, of subjects and of styles, and checks of a subject's parts, trained on drawn pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import ResNetConfig, ResNetModel

from est_lora.demo.fitting import learning_rate
from est_lora.demo.lessons import to_pixels
from est_lora.demo.styles import NEW_STYLES
from est_lora.demo.things import SUBJECTS
from est_lora.lab.examples import (
    NOTHING,
    PARTS,
    STYLE_KINDS,
    SUBJECT_KINDS,
    Example,
    style_example,
    subject_example,
)

BATCH = 64


class Verdict(NamedTuple):
    """What the judge says of a picture.

    Attributes:
        subject: whether it shows the subject asked for, and nothing that only looks like it.
        style: likewise of the style.
        parts: the share of the subject's parts that are there, in their place and their colour.
    """

    subject: bool
    style: bool
    parts: float


class Classifier(nn.Module):
    """A small residual network: pixels (batch, 3, 64, 64) in [-1, 1] to logits of the answers and of the parts."""

    def __init__(self, answers: int) -> None:
        super().__init__()
        config = ResNetConfig(
            embedding_size=32, hidden_sizes=[32, 64, 128, 192], depths=[1, 1, 1, 1], layer_type="basic"
        )
        self.body = ResNetModel(config)
        self.answers = nn.Linear(config.hidden_sizes[-1], answers)
        self.parts = nn.Linear(config.hidden_sizes[-1], len(PARTS))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(pixels).pooler_output.flatten(1)
        return self.answers(features), self.parts(features)


@dataclass(frozen=True)
class Question:
    """What one of the classifiers is asked.

    Attributes:
        answers: what it can say.
        example: makes a picture to learn from; the second argument, if given, says of which kind.
        kinds: the kinds there are; the first is the real thing.
    """

    answers: tuple[str, ...]
    example: Callable[..., Example]
    kinds: tuple[str, ...]


QUESTIONS = {
    "subject": Question((NOTHING, *SUBJECTS), subject_example, tuple(SUBJECT_KINDS)),
    "style": Question((NOTHING, *NEW_STYLES), style_example, tuple(STYLE_KINDS)),
}


class _Examples(Dataset[tuple[Tensor, Tensor, Tensor]]):
    def __init__(self, question: Question, seed: int) -> None:
        self.question, self.seed = question, seed

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        rng = np.random.default_rng([self.seed, number])
        examples = [self.question.example(rng) for _ in range(BATCH)]
        answers = torch.tensor([self.question.answers.index(example.answer) for example in examples])
        parts = torch.tensor(np.stack([example.parts for example in examples]), dtype=torch.float32)
        return to_pixels(np.stack([example.picture for example in examples])), answers, parts


class Judge:
    """Asks both classifiers, or tests one.

    Args:
        classifiers: by the names of their questions.
    """

    def __init__(self, classifiers: dict[str, Classifier]) -> None:
        self.classifiers = {name: classifier.eval() for name, classifier in classifiers.items()}

    @torch.inference_mode()
    def verdicts(self, pictures: Sequence[np.ndarray], subject: str, style: str) -> list[Verdict]:
        """Of pictures, uint8 (SIZE, SIZE, 3), that are to show a subject in a style."""
        pixels = to_pixels(np.stack(pictures))
        of_subject, parts = self.classifiers["subject"](pixels)
        of_style, _ = self.classifiers["style"](pixels)
        own = [index for index, (owner, _) in enumerate(PARTS) if owner == subject]
        found = (parts[:, own] > 0).float().mean(1)
        subjects, styles = QUESTIONS["subject"].answers, QUESTIONS["style"].answers
        return [
            Verdict(subjects[one] == subject, styles[other] == style, round(share, 4))
            for one, other, share in zip(of_subject.argmax(1).tolist(), of_style.argmax(1).tolist(), found.tolist())
        ]

    @torch.inference_mode()
    def right(self, name: str, count: int, seed: int) -> dict[str, float]:
        """How often a classifier is right on pictures that it hasn't seen, by their kind."""
        question, shares = QUESTIONS[name], {}
        for index, kind in enumerate(question.kinds):
            rng = np.random.default_rng([seed, 1, index])
            examples = [question.example(rng, kind) for _ in range(count)]
            pixels = to_pixels(np.stack([example.picture for example in examples]))
            said = torch.cat([self.classifiers[name](part)[0].argmax(1) for part in pixels.split(BATCH)]).tolist()
            right = [question.answers[one] == example.answer for one, example in zip(said, examples)]
            shares[kind] = float(np.mean(right))
        if name == "subject":
            shares["all part checks"] = self._parts_right(count, seed)
        return shares

    def _parts_right(self, count: int, seed: int) -> float:
        """How often a part check is right on subjects with all their parts and on those whose parts are spoilt."""
        rng, hits = np.random.default_rng([seed, 2]), []
        for kind in [kind for kind in SUBJECT_KINDS if kind != "anything of the world"]:
            examples = [subject_example(rng, kind) for _ in range(count)]
            known = np.stack([example.parts for example in examples])
            said = self.classifiers["subject"](to_pixels(np.stack([example.picture for example in examples])))[1] > 0
            looked_at = ~np.isnan(known)
            hits.append((said.numpy() == (known > 0))[looked_at])
        return float(np.concatenate(hits).mean())


def trained(name: str, folder: Path, steps: int, seed: int = 0) -> Classifier:
    """The classifier of a question in a folder, which is trained first where it isn't there."""
    question, path = QUESTIONS[name], folder / f"judge-{name}.safetensors"
    torch.manual_seed(seed)
    classifier = Classifier(len(question.answers))
    told = {"steps": steps, "seed": seed}
    if path.is_file() and json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) == told:
        classifier.load_state_dict(load_file(path))
        return classifier
    optimiser = torch.optim.AdamW(classifier.parameters(), lr=0.0, weight_decay=0.01)
    batches = DataLoader(_Examples(question, seed), batch_size=None, sampler=range(steps))
    with tqdm(batches, total=steps, desc=f"judge of {name}s", unit="step") as progress:
        for step, (pixels, answers, parts) in enumerate(progress):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step / steps, 2e-3)
            said, said_parts = classifier(pixels)
            loss = cross_entropy(said, answers)
            known = ~parts.isnan()
            if known.any():
                loss = loss + 0.5 * binary_cross_entropy_with_logits(said_parts[known], parts[known])
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
            optimiser.step()
            progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(classifier.state_dict(), path)
    path.with_suffix(".json").write_text(json.dumps(told), encoding="utf-8")
    return classifier
