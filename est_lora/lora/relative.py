"""Updates that are functions of the weight they change: unknown until a model is there."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from est_lora.errors import EstLoraError
from est_lora.lora.update import LowRankUpdate, Numbers, Product, Shape, Update

Weight = Callable[[], Tensor]
"""Reads the model's own weight of one layer, (out, in) or (out, in, kh, kw): the original, nothing added to it."""


@dataclass(frozen=True, eq=False)
class RelativeUpdate(Update):
    """An update that depends on the weight it changes.

    Attributes:
        base: reads that weight; None as long as no model is there.
        base_shape: its shape, or ().
    """

    base: Weight | None = field(default=None, kw_only=True)
    base_shape: Shape = field(default=(), kw_only=True)

    def on(self, base: Weight, shape: Shape, numbers: Numbers) -> RelativeUpdate:
        """The same update of the weight that `base` reads, which has `shape`, with its `numbers` there."""
        return dataclasses.replace(self, base=base, base_shape=shape, numbers=numbers)

    @property
    def needs_model(self) -> bool:
        """Whether the weight is still unknown."""
        return self.base is None

    @property
    def rank(self) -> int:
        """As of a dense update; 0 while the weight is unknown."""
        return min(self.shape[:2], default=0)

    @property
    def shape(self) -> Shape:
        """The weight's; () while it is unknown."""
        return self.base_shape

    def dense(self) -> Tensor:
        """`dW` in float64, of `shape`.

        Raises:
            EstLoraError: the weight is unknown.
        """
        if self.base is None:
            raise EstLoraError(f"An update of the kind {self.kind} can't be computed without the model's own weight.")
        return self.change(self.base().detach().cpu().double().reshape(self.base_shape))

    @abstractmethod
    def change(self, weight: Tensor) -> Tensor:
        """`dW` of `weight`, both (out, in) or (out, in, kh, kw) in float64."""


@dataclass(frozen=True, eq=False)
class DoraUpdate(RelativeUpdate):
    """DoRA (arXiv 2402.09353): `W + dW` of another kind, its rows or columns rescaled to learnt magnitudes.

    Attributes:
        direction: the other kind's update.
        magnitude: the learnt norm of each output, (out,), or of each input, (in,).
        on_input: which of the two.
    """

    direction: Update
    magnitude: Tensor
    on_input: bool

    @property
    def kind(self) -> str:  # type: ignore[override]
        """`dora`, and of what where it isn't plain LoRA."""
        return "dora" if self.direction.kind == "lora" else f"dora-{self.direction.kind}"

    @property
    def rank(self) -> int:
        """That of the direction."""
        return self.direction.rank

    @property
    def shape(self) -> Shape:
        """The weight's; while it is unknown, that of the direction."""
        return self.base_shape or self.direction.shape

    def fits_weight(self, shape: Shape) -> bool:
        """Whether the direction is an update of such a weight."""
        return self.direction.fits_weight(shape)

    def applies_to(self, shape: Shape) -> bool:
        """Whether there is also a magnitude for each of the axis."""
        return self.fits(shape) and len(self.magnitude) == shape[int(self.on_input)]

    def change(self, weight: Tensor) -> Tensor:
        """`magnitude * (W + dW) / ||W + dW|| - W`, the norms over all but the axis that the magnitude runs along."""
        changed = weight + self.direction.dense().reshape(weight.shape)
        others = [dim for dim in range(weight.dim()) if dim != int(self.on_input)]
        norms = changed.square().sum(others).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        return changed * _along(self.magnitude.double() / norms, self.on_input, weight) - weight


@dataclass(frozen=True, eq=False)
class ScalingUpdate(RelativeUpdate):
    """(IA)^3 (arXiv 2205.05638): `dW = W` times a factor for each output, or for each input.

    Attributes:
        factors_of: (out,) or (in,).
        on_input: which of the two.
    """

    kind = "ia3"
    factors_of: Tensor
    on_input: bool

    def fits_weight(self, shape: Shape) -> bool:
        """Whether there is a factor for each of the axis."""
        return len(self.factors_of) == shape[int(self.on_input)]

    def change(self, weight: Tensor) -> Tensor:
        """`W * factors`."""
        return weight * _along(self.factors_of.double(), self.on_input, weight)


@dataclass(frozen=True, eq=False)
class RotationUpdate(RelativeUpdate):
    """OFT (arXiv 2306.07280) and BOFT (arXiv 2311.06243): the outputs are rotated, block by block.

    Attributes:
        blocks: (blocks, size, size); of BOFT (stages, blocks, size, size).
        rescale: a factor for each output, (out,), or None.
        constraint: the largest norm that the generators of all rotations may have together; 0 for none.
    """

    blocks: Tensor
    rescale: Tensor | None
    constraint: float

    @property
    def kind(self) -> str:  # type: ignore[override]
        """`oft` or `boft`."""
        return "oft" if self.blocks.dim() == 3 else "boft"

    def fits_weight(self, shape: Shape) -> bool:
        """Whether the blocks cover the outputs."""
        return self.outputs == shape[0]

    @property
    def outputs(self) -> int:
        """How many outputs are rotated."""
        return self.blocks.shape[-3] * self.blocks.shape[-1]

    def change(self, weight: Tensor) -> Tensor:
        """`rescale * (R W) - W`."""
        rotations, rotated = self._rotations(), weight.flatten(1)
        if self.blocks.dim() == 3:
            count, size = self.blocks.shape[:2]
            rotated = torch.einsum("knm,kni->kmi", rotations, rotated.reshape(count, size, -1))
        else:
            for stage, rotation in enumerate(rotations):
                rotated = self._butterfly(rotated, rotation, 2**stage * (self.blocks.shape[-1] // 2))
        rotated = rotated.reshape(weight.shape)
        if self.rescale is not None:
            rotated = rotated * _along(self.rescale.double().flatten(), False, weight)
        return rotated - weight

    @staticmethod
    def _butterfly(weight: Tensor, rotation: Tensor, stride: int) -> Tensor:
        """One stage: outputs that stand `stride` apart come together in a block, are rotated, and go back."""
        out, inputs = weight.shape
        blocks = weight.reshape(-1, 2, stride, inputs).transpose(1, 2).reshape(-1, rotation.shape[-1], inputs)
        rotated = torch.einsum("bij,bjn->bin", rotation, blocks)
        return rotated.reshape(-1, stride, 2, inputs).transpose(1, 2).reshape(out, inputs)

    def _rotations(self) -> Tensor:
        """Cayley's map of the skew-symmetric generators: `(I + Q)(I - Q)^-1`."""
        blocks = self.blocks.double()
        generators = blocks - blocks.transpose(-1, -2)
        norm = float(generators.norm())
        if 0 < self.constraint < norm:
            generators = generators * (self.constraint / norm)
        one = torch.eye(blocks.shape[-1], dtype=torch.float64)
        rotations: Tensor = torch.linalg.solve(one - generators, one + generators, left=False)
        return rotations


@dataclass(frozen=True, eq=False)
class PromptedUpdate(RelativeUpdate):
    """GLoRA (arXiv 2306.07967): `dW = (W A + B) * scale`.

    Attributes:
        prompt: A, (in, in).
        addition: B, (out, in) or (out, in, kh, kw), unscaled.
        scale: alpha / rank.
    """

    kind = "glora"
    prompt: Product
    addition: LowRankUpdate
    scale: float

    @property
    def rank(self) -> int:
        """That of B."""
        return self.addition.rank

    @property
    def shape(self) -> Shape:
        """That of B."""
        return self.addition.shape

    def applies_to(self, shape: Shape) -> bool:
        """Whether A also is for the inputs."""
        return self.fits(shape) and self.prompt.shape[0] == shape[1]

    def change(self, weight: Tensor) -> Tensor:
        """`(W A + B) * scale`."""
        prompted = torch.einsum("oi...,ij->oj...", weight, self.prompt.dense())
        return (prompted + self.addition.dense().reshape(weight.shape)) * self.scale


def _along(values: Tensor, on_input: bool, weight: Tensor) -> Tensor:
    """`values`, one for each output or input, of a shape that multiplies `weight` so."""
    return values.reshape([-1 if dim == int(on_input) else 1 for dim in range(weight.dim())])
