"""How far pictures are from the true one: on the foreground alone, and wherever the object stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from est_lora.demo.world import RADII, SHIFT, TILT, Pose, draw, random_scene

_RADII = np.linspace(*RADII, 4)
_TILTS = 0.7 * np.linspace(-TILT, TILT, 3)  # so that none is far from one of three
_SHIFTS = np.linspace(-SHIFT, SHIFT, 5)
_PAPERS = "white", "sky"
_DIFFERS = 12  # of 255: a pixel that differs by more on another background shows the background


class _Templates(NamedTuple):
    """The true picture in every pose that is tried, in [0, 1].

    Attributes:
        shown: where it shows the object, (poses, pixels), 0 or 1.
        colours: there, and 0 elsewhere, (poses, pixels * 3).
        squares: the sum of their squares, (poses, 1).
    """

    shown: Tensor
    colours: Tensor
    squares: Tensor


@lru_cache(maxsize=2)  # pairs are judged one after the other
def _templates(subject: str, style: str) -> _Templates:
    scene = random_scene(np.random.default_rng(0), subject, style)
    shown, colours = [], []
    for radius, tilt, mirrored, x, y in product(_RADII, _TILTS, (False, True), _SHIFTS, _SHIFTS):
        pose = Pose(float(radius), float(x), float(y), float(tilt), mirrored)
        one, other = (draw(replace(scene, background=paper, pose=pose)).astype(np.int16) for paper in _PAPERS)
        mask = np.abs(one - other).max(2) <= _DIFFERS
        shown.append(mask.ravel())
        colours.append((one * mask[..., None]).ravel())
    stack = torch.from_numpy(np.stack(colours)).float() / 255
    return _Templates(torch.from_numpy(np.stack(shown)).float(), stack, stack.square().sum(1, keepdim=True))


@torch.inference_mode()
def distances(pictures: Sequence[np.ndarray], subject: str, style: str) -> list[float]:
    """Root mean square difference to the true picture on its foreground, in the pose in which that is least.

    Args:
        pictures: uint8, (SIZE, SIZE, 3) each.
        subject: what they are to show.
        style: how.

    Returns:
        Of a channel, 0 to 1; 0 is the true picture itself.
    """
    templates = _templates(subject, style)
    pixels = torch.tensor(np.stack(pictures), dtype=torch.float32).flatten(1).T / 255
    own = templates.shown @ pixels.square().view(-1, 3, pixels.shape[1]).sum(1)
    errors = own - 2 * templates.colours @ pixels + templates.squares
    mean = errors / (3 * templates.shown.sum(1, keepdim=True))
    return mean.amin(0).clamp(min=0).sqrt().tolist()
