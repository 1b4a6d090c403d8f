"""What one LoRA does to one layer: `dW`, kept as the thin factors it came in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRankUpdate:
    """`dW = up @ down * scale`, the update of a linear or convolutional weight.

    Attributes:
        down: (rank, in) or (rank, in, kh, kw).
        up: (out, rank) or (out, rank, 1, 1).
        scale: alpha / rank; the strength a user asks for is not in it.
    """

    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Inner width of the factors."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of `dW`: (out, in), or (out, in, kh, kw) where the kernel is larger than 1 x 1."""
        kernel = tuple(self.down.shape[2:])
        return (self.up.shape[0], self.down.shape[1], *(kernel if math.prod(kernel) > 1 else ()))

    @cached_property
    def energy(self) -> float:
        """`||dW||_F^2` by two rank x rank Gram matrices: `sum((up^T up) * (down down^T)) * scale^2`.

        The factors are divided by their largest entries first: squares of fp16 values overflow, tiny ones vanish.
        """
        up, up_peak = _normalised(self.up)
        down, down_peak = _normalised(self.down)
        gram = float(((up.T @ up) * (down @ down.T)).sum())
        peak = up_peak * down_peak * self.scale
        return max(gram, 0.0) * peak * peak  # not `** 2`, which raises where a product becomes infinite

    def dense(self) -> Tensor:
        """`dW` in float64, of `shape`."""
        product = self.up.flatten(1).double() @ self.down.flatten(1).double()
        return (product * self.scale).reshape(self.shape)


def _normalised(factor: Tensor) -> tuple[Tensor, float]:
    matrix = factor.flatten(1).double()
    peak = float(matrix.abs().amax()) if matrix.numel() else 0.0
    return (matrix / peak if peak else matrix), peak


def is_finite(tensor: Tensor) -> bool:
    """Whether every entry is a number."""
    return bool(torch.isfinite(tensor).all())
