"""How far a picture is from the true one: on the foreground alone, and wherever the object stands."""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

from est_lora.demo.styles import SIZE
from est_lora.demo.world import Pose, Scene, draw, random_scene

RADII = np.arange(17.0, 22.5, 1.0)
TILTS = np.linspace(-0.15, 0.15, 5)
SHIFTS = np.arange(-3.0, 3.5, 1.0)
_DIFFERS = 12  # of 255: what two backgrounds make of a pixel that shows them


@cache
def _templates(subject: str, style: str, background: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The true picture in every pose that is tried, (poses, pixels * 3) in [0, 1], and where it shows the object."""
    scene = random_scene(np.random.default_rng(0), subject, style)
    other = "white" if background != "white" else "sky"
    pictures, masks = [], []
    for radius, tilt, mirrored, x, y in product(RADII, TILTS, (False, True), SHIFTS, SHIFTS):
        pose = Pose(float(radius), float(x), float(y), float(tilt), mirrored)
        one, two = (
            draw(Scene(scene.thing, scene.colours, scene.parts, style, paper, pose)).astype(np.int16)
            for paper in (background, other)
        )
        pictures.append(one.astype(np.uint8))
        masks.append(np.abs(one - two).max(2) < _DIFFERS)
    stack = torch.from_numpy(np.stack(pictures)).flatten(1).to(torch.float16) / 255
    return stack, torch.from_numpy(np.stack(masks))


@torch.inference_mode()
def distance(picture: NDArray[np.uint8], subject: str, style: str, background: str) -> float:
    """Root mean square difference to the true picture on its foreground, in the pose in which that is least.

    Args:
        picture: uint8, (SIZE, SIZE, 3).
        subject: what it is to show.
        style: how.
        background: on what.

    Returns:
        Of a channel, 0 to 1; 0 is the true picture itself.
    """
    templates, masks = _templates(subject, style, background)
    pixels = torch.tensor(picture, dtype=torch.float32).flatten() / 255
    best = np.inf
    for stack, shown in zip(templates.split(256), masks.split(256)):
        squares = (stack.float() - pixels).square_().view(-1, SIZE, SIZE, 3).sum(3)
        errors = (squares * shown).sum((1, 2)) / (3 * shown.sum((1, 2)))
        best = min(best, errors.min().item())
    return float(np.sqrt(best))
