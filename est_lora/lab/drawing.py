"""Drawing: the embedded model with a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from est_lora.demo.model import load_pipeline
from est_lora.demo.styles import BACKGROUNDS
from est_lora.demo.world import Pose, random_scene
from est_lora.demo.world import draw as draw_scene
from est_lora.gate import FusionPlan
from est_lora.hosts.diffusers import carry_out

_BATCH = 8  # larger ones are no faster on a CPU


def pipeline(base: Any = None) -> Any:
    """The embedded model, or another in its format, ready to draw without a word."""
    pipe = load_pipeline(base)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def background_of(seed: int) -> str:
    """What the picture of a sampling seed is drawn on."""
    return list(BACKGROUNDS)[seed % len(BACKGROUNDS)]


def prompt_of(words: str, seed: int) -> str:
    """What is asked for: `a mipo creature, vitra style, on cream`."""
    return f"a {words}, on {background_of(seed)}"


def true_picture(subject: str, style: str, seed: int, pose: Pose | None = None) -> np.ndarray:
    """What a picture of a sampling seed is to show, drawn by code."""
    scene = random_scene(np.random.default_rng(seed), subject, style)
    return draw_scene(replace(scene, background=background_of(seed), pose=pose or Pose()))


def draw(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    plan: FusionPlan,
) -> list[np.ndarray]:
    """Pictures, uint8 (SIZE, SIZE, 3), one a prompt and seed.

    Args:
        pipe: the pipeline.
        prompts: one a picture.
        seeds: of the noise, one a picture.
        steps: of the sampler.
        guidance: the guidance scale; 1 is without.
        plan: the fusion.
    """
    pictures: list[np.ndarray] = []
    with carry_out(pipe, plan):
        for first in range(0, len(prompts), _BATCH):
            part = slice(first, first + _BATCH)
            drawn = pipe(
                list(prompts[part]),
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                output_type="np",
            ).images
            pictures += [np.rint(255 * picture).astype(np.uint8) for picture in drawn]
    return pictures
