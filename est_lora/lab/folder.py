"""A lab's folder: what is to be found out in it, what of it is finished, and where everything is kept.

protocol.json            what is being carried out
judge-*.safetensors      the classifiers
stand-in/                the extractor that measures the style discrepancy
loras/                   the LoRAs, by the words' first and the training's number; `ceiling-` those of true pictures
pictures/                what was drawn, a strip of pictures a piece of work
records.jsonl            what was found, a line each
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from est_lora.demo.train import Recipe
from est_lora.errors import EstLoraError, quote
from est_lora.lab.methods import HALVES
from est_lora.lab.protocol import Protocol
from est_lora.stored import write_whole

PROTOCOL = "protocol.json"

Key = tuple[Any, ...]
"""Names a piece of work: what is done, and then with what."""


@dataclass
class Lab:
    """A folder and what is to be found out in it.

    Attributes:
        folder: where everything is kept.
        protocol: what is carried out.
        base: the model's folder; None for the embedded one.
    """

    folder: Path
    protocol: Protocol
    base: Path | None = None

    def __post_init__(self) -> None:
        self.records = Records(self.folder / "records.jsonl")

    @cached_property
    def stages(self) -> dict[str, list[Key]]:
        """All the work; what stands in a stage needs the stages before it, and nothing else."""
        protocol = self.protocol
        kinds = [f"{subject}, {style}" for subject, style in protocol.kinds]
        words = (*protocol.subjects, *protocol.styles)
        alone = list(product(words, range(len(protocol.trainings)), protocol.guidances))
        return {
            "training": [
                *(("judge", name) for name in ("subject", "style")),
                ("extractor",),
                *(("lora", name) for name in self.recipes),
            ],
            "testing": [
                *(("single", *each) for each in alone),
                *(("half", *each, of) for each in alone for of in HALVES),
                *(("drawn by code", both) for both in kinds),
                *(("ceiling", *each) for each in product(kinds, protocol.guidances)),
                *(("discrepancy", *pair) for pair in protocol.pairs),
            ],
            "comparing": [("cell", *cell.pair, cell.method, cell.guidance) for cell in protocol.cells],
        }

    @property
    def missing(self) -> list[Key]:
        """What isn't finished."""
        return [key for keys in self.stages.values() for key in keys if key not in self.records]

    @cached_property
    def recipes(self) -> dict[str, tuple[str, Recipe]]:
        """Of each LoRA's file what it is taught and how."""
        protocol = self.protocol
        words = (*protocol.subjects, *protocol.styles)
        single = [(each, training) for training in range(len(protocol.trainings)) for each in words]
        return {
            **{self.lora(*each).name: (each[0], protocol.recipe(*each)) for each in single},
            **{self.ceiling(*pair).name: (", ".join(pair), Recipe(**protocol.ceiling)) for pair in protocol.kinds},
        }

    def lora(self, words: str, training: int) -> Path:
        """Where the LoRA of a subject or a style is."""
        return self.folder / "loras" / f"{words.split()[0]}-{training}.safetensors"

    def ceiling(self, subject: str, style: str) -> Path:
        """Where the LoRA is that was taught a pair's true pictures."""
        return self.folder / "loras" / f"ceiling-{subject.split()[0]}-{style.split()[0]}.safetensors"

    def picture(self, *key: Any) -> Path:
        """Where the strip of pictures of a piece of work is."""
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        return self.folder / "pictures" / f"{name}.png"


class Records:
    """What was found, by keys; a line each in a file that only grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        whole = [line for line in lines if line.endswith("\n")]
        if whole != lines:  # it was interrupted in the middle of one
            write_whole(path, "".join(whole).encode())
        entries = [json.loads(line) for line in whole]
        self.entries: dict[Key, dict[str, Any]] = {tuple(entry.pop("key")): entry for entry in entries}

    def __contains__(self, key: Key) -> bool:
        return key in self.entries

    def __getitem__(self, key: Key) -> dict[str, Any]:
        return self.entries[key]

    def add(self, key: Key, found: dict[str, Any]) -> None:
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
        of = sum(map(len, lab.stages.values()))
        raise EstLoraError(
            f"The lab in {quote(folder)} isn't finished ({len(missing)} of {of} pieces of work are missing):"
            f" est-lora lab run -o {folder} goes on with it."
        )
    return lab
