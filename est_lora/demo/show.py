"""The demonstration: the same seeds drawn by the base, by each LoRA alone, by their sum, and by EST-LoRA."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure
from PIL.Image import Image
from tqdm import tqdm

from est_lora.config import FusionConfig
from est_lora.demo.model import GUIDANCE, STYLE_LORA, SUBJECT_LORA, load_pipeline
from est_lora.demo.world import STYLE, SUBJECT
from est_lora.hosts.diffusers import fuse, load_plan
from est_lora.plot import gate_map

STEPS = 28
PROMPTS = [
    f"a red heart, {STYLE}, on white",
    f"a {SUBJECT}, {STYLE}, on white",
    f"a {SUBJECT}, {STYLE}, on cream",
    f"a {SUBJECT}, {STYLE}, on sky",
]
_METHODS = {"base": None, "subject alone": "subject", "style alone": "style", "sum": "sum", "EST-LoRA": "est"}


def demo(folder: Path, seed: int = 0) -> list[Path]:
    """Draws the contact sheet and the gate map into `folder`; returns where they are."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # the model is so small that threads cost more than they bring
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    with tqdm(total=len(_METHODS) * STEPS, desc="drawing", unit="step") as bar:
        columns = {name: _draw(pipe, method, seed, bar) for name, method in _METHODS.items()}
    plan = load_plan(FusionConfig(subject=str(SUBJECT_LORA), style=str(STYLE_LORA)), pipe)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {folder / "contact-sheet.png": _sheet(columns), folder / "gate-map.png": gate_map(plan)}
    for path, figure in drawn.items():
        figure.savefig(path)
    return list(drawn)


def _draw(pipe: Any, method: str | None, seed: int, bar: tqdm[None]) -> list[Image]:
    def tick(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        bar.update()
        return tensors

    fusing = fuse(pipe, SUBJECT_LORA, STYLE_LORA, method=method) if method else nullcontext()
    with fusing:
        return list(
            pipe(
                PROMPTS,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                generator=[torch.Generator().manual_seed(seed + row) for row in range(len(PROMPTS))],
                callback_on_step_end=tick,
            ).images
        )


def _sheet(columns: dict[str, list[Image]]) -> Figure:
    rows = len(PROMPTS)
    figure = Figure(figsize=(1.7 * len(columns) + 0.4, 1.7 * rows + 0.7), dpi=130, layout="constrained")
    for (row, column), axes in _each(figure.subplots(rows, len(columns), squeeze=False)):
        name = list(columns)[column]
        axes.imshow(columns[name][row], interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        if row == 0:
            axes.set_title(name, fontsize=11)
        if column == 0:
            axes.set_ylabel(PROMPTS[row], fontsize=6)
    return figure


def _each(grid: Any) -> list[tuple[tuple[int, int], Any]]:
    return [((row, column), axes) for row, line in enumerate(grid) for column, axes in enumerate(line)]
