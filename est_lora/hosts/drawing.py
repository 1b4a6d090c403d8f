"""One picture with a diffusers pipeline, and what a program that draws beside another one leaves as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from est_lora.errors import EstLoraError, reason


def draw(
    pipe: Any, *, prompt: str, negative: str, steps: int, guidance: float, seed: int, size: tuple[int, int]
) -> Any:
    """What `pipe` makes of a request for one picture: its `images[0]`. The noise is the same on every device.

    Args:
        pipe: a text-to-image pipeline of diffusers.
        prompt, negative: what to draw, and what to keep away from.
        steps: how many sampling steps.
        guidance: the guidance scale.
        seed: of the noise.
        size: width and height in pixels.

    Raises:
        EstLoraError: it can't be made this way.
    """
    try:
        return pipe(
            prompt=prompt,
            negative_prompt=negative,
            num_inference_steps=steps,
            guidance_scale=guidance,
            width=size[0],
            height=size[1],
            generator=torch.Generator().manual_seed(seed),
        )
    except EstLoraError:
        raise
    except (RuntimeError, ValueError) as error:  # out of memory, or more than this model or scheduler can do
        raise EstLoraError(f"The picture can't be made this way: {reason(error)}") from error


def size_of(pipe: Any) -> tuple[int, int]:
    """Width and height in pixels that the model was made for."""
    latents = pipe.unet.config.sample_size
    height, width = (latents, latents) if isinstance(latents, int) else latents
    return width * pipe.vae_scale_factor, height * pipe.vae_scale_factor


@contextmanager
def random_kept() -> Iterator[None]:
    """All random numbers go on afterwards where they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
