"""The demonstration: the same seeds drawn by the base, by each LoRA alone, by their sum, and by EST-LoRA.

Beside them stands what the world's own code draws of the same words, and above them what the two LoRAs were shown.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure, SubFigure
from PIL import Image
from tqdm import tqdm

from est_lora.config import FusionConfig
from est_lora.demo.lessons import lesson
from est_lora.demo.model import GUIDANCE, STYLE_LORA, SUBJECT_LORA, load_pipeline
from est_lora.demo.world import STYLE, SUBJECT, draw, random_scene
from est_lora.hosts.diffusers import fuse, load_plan
from est_lora.plot import gate_map


class Asked(NamedTuple):
    """What a row of the sheet asks for, in the style that the LoRA teaches.

    Attributes:
        thing: of the world, or the subject.
        background: on which.
        colour: of the thing's main part; empty for the subject, which has its own.
    """

    thing: str
    background: str
    colour: str = ""

    @property
    def prompt(self) -> str:
        """In words."""
        thing = f"{self.colour} {self.thing}" if self.colour else self.thing
        return f"a {thing}, {STYLE}, on {self.background}"

    def by_code(self, seed: int) -> np.ndarray:
        """The same as the world's own code draws it, uint8, shape (SIZE, SIZE, 3)."""
        rng = np.random.default_rng(seed)
        while True:
            scene = random_scene(rng, self.thing, STYLE)
            if self.colour in {"", scene.colours[scene.main_part]}:
                return draw(replace(scene, background=self.background))


STEPS = 28
ASKED = [
    Asked("house", "white", colour="red"),
    Asked(SUBJECT, "white"),
    Asked(SUBJECT, "cream"),
    Asked(SUBJECT, "sky"),
]
_METHODS: dict[str, dict[str, Any] | None] = {
    "base model,\nno LoRA": None,
    "subject LoRA\nalone": {"method": "subject"},
    "style LoRA\nalone": {"method": "style"},
    "both:\nplain sum": {"method": "sum"},
    "both:\nEST-LoRA": {},
    "both: EST-LoRA,\nweights 1.4": {"subject_weight": 1.4, "style_weight": 1.4},
}
_BY_CODE = "what is asked for,\ndrawn by code"
_SHOWN = {f"the subject: {SUBJECT}": (SUBJECT, (0, 1, 2)), f"the style: {STYLE}": (STYLE, (8, 11, 20))}
"""Above the sheet: what the LoRAs were taught, and which of their pictures are shown (of the style a fish, a car, a house)."""


def demo(folder: Path, seed: int = 0) -> list[Path]:
    """Draws the contact sheet and the gate map into `folder`; returns where they are."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # the model is so small that threads cost more than they bring
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    with tqdm(total=len(_METHODS) * STEPS, desc="drawing", unit="step") as bar:
        columns = {name: _draw(pipe, options, seed, bar) for name, options in _METHODS.items()}
    columns[_BY_CODE] = [Image.fromarray(asked.by_code(seed + row)) for row, asked in enumerate(ASKED)]
    plan = load_plan(FusionConfig(subject=str(SUBJECT_LORA), style=str(STYLE_LORA)), pipe)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {folder / "contact-sheet.png": _sheet(columns), folder / "gate-map.png": gate_map(plan)}
    for path, figure in drawn.items():
        figure.savefig(path)
    return list(drawn)


def _draw(pipe: Any, options: dict[str, Any] | None, seed: int, bar: tqdm[None]) -> list[Image.Image]:
    def tick(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        bar.update()
        return tensors

    fusing = nullcontext() if options is None else fuse(pipe, SUBJECT_LORA, STYLE_LORA, **options)
    with fusing:
        return list(
            pipe(
                [asked.prompt for asked in ASKED],
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                generator=[torch.Generator().manual_seed(seed + row) for row in range(len(ASKED))],
                callback_on_step_end=tick,
            ).images
        )


def _sheet(columns: dict[str, list[Image.Image]]) -> Figure:
    rows = len(ASKED)
    figure = Figure(figsize=(1.7 * len(columns) + 0.5, 1.7 * rows + 2.7), dpi=110, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(2.05, 1.7 * rows + 0.65))
    for part, (title, (words, shown)) in zip(above.subfigures(1, len(_SHOWN)), _SHOWN.items()):
        part.set_facecolor("#eef1f6")
        part.suptitle(f"{title}\nas its LoRA was shown it", fontsize=11)
        scenes = lesson(words, seed=0, batch=4).scenes
        for (_, column), axes in _grid(part, 1, len(shown)):
            axes.imshow(draw(scenes[shown[column]]), interpolation="nearest")
    for (row, column), axes in _grid(below, rows, len(columns)):
        name = list(columns)[column]
        axes.imshow(columns[name][row], interpolation="nearest")
        if row == 0:
            axes.set_title(name, fontsize=11)
        if column == 0:
            axes.set_ylabel(ASKED[row].prompt.replace(", ", ",\n"), fontsize=8)
    return figure


def _grid(figure: SubFigure, rows: int, columns: int) -> list[tuple[tuple[int, int], Any]]:
    """Axes without ticks, each with its row and its column."""
    grid = figure.subplots(rows, columns, squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    return list(np.ndenumerate(grid))
