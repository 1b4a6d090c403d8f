"""Carries the protocol out: trains the judge and the LoRAs, tests them, draws every cell of the comparison and judges it.

Whatever is finished is kept in a folder, and a run that was interrupted goes on from there:

    protocol.json            what is being carried out
    judge-*.safetensors      the classifiers
    stand-in/                the extractor that measures the style discrepancy
    loras/                   the LoRAs, by the words' first and the training's number; `ceiling-` those of true pictures
    pictures/                what was drawn, a strip of pictures a cell
    records.jsonl            what was found, a line each
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from est_lora.config import FusionConfig
from est_lora.demo.study import extractor
from est_lora.demo.styles import COLOURS, Style
from est_lora.demo.things import THINGS
from est_lora.demo.train import Recipe, train_lora
from est_lora.demo.world import Pose, Scene, random_scene
from est_lora.demo.world import draw as draw_true
from est_lora.discrepancy import Memory
from est_lora.errors import EstLoraError, quote
from est_lora.hosts.diffusers import load_plan
from est_lora.hosts.measuring import measure
from est_lora.lab.drawing import background_of, draw, pipeline, prompt_of
from est_lora.lab.examples import corrupted
from est_lora.lab.judge import QUESTIONS, Judge
from est_lora.lab.methods import plan_of
from est_lora.lab.protocol import Cell, Pair, Protocol
from est_lora.lab.registration import distances
from est_lora.stored import write_whole

RECORDS, PICTURES, PROTOCOL = "records.jsonl", "pictures", "protocol.json"
_UNSEEN = 1_000_003  # seeds from here on were in no training


@dataclass
class Lab:
    """A folder and what is to be found out in it.

    Attributes:
        folder: where everything is kept.
        protocol: what is carried out.
        base: the model's folder; None for the embedded one.
        records: what was found.
    """

    folder: Path
    protocol: Protocol
    base: Path | None = None

    def __post_init__(self) -> None:
        self.records = Records(self.folder / RECORDS)

    @property
    def missing(self) -> int:
        """How many cells of the comparison aren't drawn yet."""
        return sum(_key(cell) not in self.records for cell in self.protocol.cells)

    def run(self) -> None:
        """Does what isn't done yet."""
        judge = Judge.trained(self.folder, self.protocol.judge_steps)
        self._test_judge(judge)
        self._train()
        pipe = pipeline(self.base)
        self._test_single(pipe, judge)
        self._test_ceiling(pipe, judge)
        self._compare(pipe, judge)

    # ---- the judge

    def _test_judge(self, judge: Judge) -> None:
        count = self.protocol.judge_pictures
        for name in QUESTIONS:
            if ("judge", name) not in self.records:
                self.records.add("judge", name, right=judge.right(name, count, _UNSEEN))
        if ("judge", "parts") not in self.records:
            self.records.add("judge", "parts", right={"all part checks": judge.parts_right(count, _UNSEEN)})

    # ---- the LoRAs

    def lora(self, words: str, training: int) -> Path:
        """Where the LoRA of a subject or a style is."""
        return self.folder / "loras" / f"{words.split()[0]}-{training}.safetensors"

    def ceiling(self, subject: str, style: str) -> Path:
        """Where the LoRA is that was taught a pair's true pictures."""
        return self.folder / "loras" / f"ceiling-{subject.split()[0]}-{style.split()[0]}.safetensors"

    def _train(self) -> None:
        protocol = self.protocol
        wanted: dict[Path, tuple[str, Recipe]] = {}
        for training in range(len(protocol.trainings)):
            for words in (*protocol.subjects, *protocol.styles):
                wanted[self.lora(words, training)] = words, protocol.recipe(words, training)
        for subject, style in self.protocol.kinds:
            recipe = Recipe(**protocol.ceiling, steps=protocol.lora_steps)
            wanted[self.ceiling(subject, style)] = f"{subject}, {style}", recipe
        for path, (words, recipe) in tqdm(wanted.items(), desc="LoRAs", unit="LoRA"):
            if ("lora", path.name) not in self.records:
                share = train_lora(words, recipe, path, self.base, workers=0, save_every=recipe.steps)
                self.records.add("lora", path.name, words=words, rank=recipe.rank, alpha=recipe.alpha, share=share)

    # ---- the gates

    def _test_single(self, pipe: Any, judge: Judge) -> None:
        protocol, seeds = self.protocol, range(self.protocol.single_pictures)
        todo = [
            (words, training, guidance)
            for words in (*protocol.subjects, *protocol.styles)
            for training in range(len(protocol.trainings))
            for guidance in protocol.guidances
            if ("single", words, training, guidance) not in self.records
        ]
        for words, training, guidance in tqdm(todo, desc="LoRAs alone", unit="LoRA"):
            is_subject = words in protocol.subjects
            method = "subject" if is_subject else "style"
            path = str(self.lora(words, training))
            plan = load_plan(FusionConfig(subject=path, style=path, method=method), pipe)
            prompts = [
                prompt_of(f"{words}, plain" if is_subject else f"{_object(seed)}, {words}", seed) for seed in seeds
            ]
            pictures = draw(pipe, prompts, seeds, protocol.steps, guidance, plan)
            verdicts = judge.verdicts(pictures, words, words)
            right = [verdict.subject if is_subject else verdict.style for verdict in verdicts]
            self._keep(pictures[: protocol.sampling_seeds], "single", words, training, guidance)
            self.records.add("single", words, training, guidance, right=float(np.mean(right)))

    def _test_ceiling(self, pipe: Any, judge: Judge) -> None:
        protocol, seeds = self.protocol, range(self.protocol.sampling_seeds)
        for subject, style in tqdm(self.protocol.kinds, desc="ceiling", unit="pair"):
            both = f"{subject}, {style}"
            if ("drawn by code", both) not in self.records:
                rng = np.random.default_rng(_UNSEEN)
                pictures = [corrupted(self._true(subject, style, seed, Pose.random(rng)), rng) for seed in seeds]
                self._judge(pictures, judge, ("drawn by code", both), subject, style)
            for guidance in protocol.guidances:
                if ("ceiling", both, guidance) not in self.records:
                    path = str(self.ceiling(subject, style))
                    plan = load_plan(FusionConfig(subject=path, style=path, method="subject"), pipe)
                    prompts = [prompt_of(both, seed) for seed in seeds]
                    pictures = draw(pipe, prompts, seeds, protocol.steps, guidance, plan)
                    self._judge(pictures, judge, ("ceiling", both, guidance), subject, style)

    # ---- the comparison

    def _compare(self, pipe: Any, judge: Judge) -> None:
        todo = [cell for cell in self.protocol.cells if _key(cell) not in self.records]
        seeds = range(self.protocol.sampling_seeds)
        for cell in tqdm(todo, desc="comparison", unit="cell"):
            pair = cell.pair
            plan = plan_of(
                self.protocol.methods[cell.method],
                self.lora(pair.subject, pair.training),
                self.lora(pair.style, pair.training),
                pipe,
                lambda pair=pair: self._discrepancy(pipe, pair),
                _number(pair, cell.method),
            )
            prompts = [prompt_of(f"{pair.subject}, {pair.style}", seed) for seed in seeds]
            pictures = draw(pipe, prompts, seeds, self.protocol.steps, cell.guidance, plan)
            self._judge(pictures, judge, _key(cell), pair.subject, pair.style)

    def _discrepancy(self, pipe: Any, pair: Pair) -> float:
        if ("discrepancy", *pair) not in self.records:
            folder = self.folder / "stand-in"
            if not extractor.is_there(folder):
                extractor.train(folder, self.protocol.extractor_steps)
            found = measure(
                pipe,
                self.lora(pair.subject, pair.training),
                self.lora(pair.style, pair.training),
                prompt=f"{pair.subject}, {pair.style}",
                folder=folder,
                memory=Memory(self.folder / "memory"),
            )
            self.records.add("discrepancy", *pair, value=found.value)
        return float(self.records[("discrepancy", *pair)]["value"])

    # ---- what they share

    def _true(self, subject: str, style: Style | str, seed: int, pose: Pose) -> np.ndarray:
        scene = random_scene(np.random.default_rng(_UNSEEN + seed), subject, style)
        return draw_true(Scene(subject, scene.colours, scene.parts, style, background_of(seed), pose))

    def _judge(
        self,
        pictures: Sequence[np.ndarray],
        judge: Judge,
        key: tuple[Any, ...],
        subject: str,
        style: str,
    ) -> None:
        """Keeps what is said of pictures that are to show both."""
        verdicts = judge.verdicts(pictures, subject, style)
        far = distances(pictures, subject, style)
        self._keep(pictures, *key)
        self.records.add(
            *key,
            subject=[int(verdict.subject) for verdict in verdicts],
            style=[int(verdict.style) for verdict in verdicts],
            parts=[verdict.parts for verdict in verdicts],
            distance=[round(each, 4) for each in far],
        )

    def _keep(self, pictures: Sequence[np.ndarray], *key: Any) -> None:
        self.picture(*key).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate(pictures, axis=1)).save(self.picture(*key))

    def picture(self, *key: Any) -> Path:
        """Where the strip of pictures of a record is."""
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        return self.folder / PICTURES / f"{name}.png"


class Records:
    """What was found, by keys; a line each in a file that only grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        whole = [line for line in lines if line.endswith("\n")]
        if whole != lines:  # it was interrupted in the middle of one
            write_whole(path, "".join(whole).encode())
        entries = [json.loads(line) for line in whole]
        self.entries: dict[tuple[Any, ...], dict[str, Any]] = {tuple(entry.pop("key")): entry for entry in entries}

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self.entries

    def __getitem__(self, key: tuple[Any, ...]) -> dict[str, Any]:
        return self.entries[key]

    def add(self, *key: Any, **found: Any) -> None:
        """Keeps what was found."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, **found}) + "\n")
        self.entries[key] = found


def open_lab(folder: Path, protocol: Path, base: Path | None = None) -> Lab:
    """The lab in a folder, which is made where there is none.

    Raises:
        EstLoraError: another protocol has been begun in that folder.
    """
    wanted, begun = protocol.read_bytes(), folder / PROTOCOL
    if begun.is_file() and begun.read_bytes() != wanted:
        raise EstLoraError(f"In {quote(folder)} another protocol has been begun: give another folder with -o.")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(begun, wanted)
    return Lab(folder, Protocol.read(begun), base)


def reopen_lab(folder: Path) -> Lab:
    """The lab in a folder, of which all is done.

    Raises:
        EstLoraError: there is none, or it isn't finished.
    """
    if not (folder / PROTOCOL).is_file():
        raise EstLoraError(f"There is no lab in {quote(folder)}: est-lora lab run -o {folder} makes it.")
    lab = Lab(folder, Protocol.read(folder / PROTOCOL))
    if missing := lab.missing:
        raise EstLoraError(
            f"The lab in {quote(folder)} isn't finished ({missing} of {len(lab.protocol.cells)} cells are missing):"
            f" est-lora lab run -o {folder} goes on with it."
        )
    return lab


def _key(cell: Cell) -> tuple[Any, ...]:
    return "cell", *cell.pair, cell.method, cell.guidance


def _object(seed: int) -> str:
    """Something of the base's world, another one for each seed."""
    things, colours = list(THINGS), list(COLOURS)
    return f"{colours[(3 * seed) % len(colours)]} {things[(5 * seed) % len(things)]}"


def _number(pair: Pair, method: str) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps([*pair, method]).encode()).digest()[:4], "little")
