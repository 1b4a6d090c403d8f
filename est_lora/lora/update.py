"""What one file does to one layer: `dW`, kept in the form it came in."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from est_lora.errors import EstLoraError

Shape = tuple[int, ...]
Numbers = dict[str, float]
_PIECE = 1 << 16
# Factors that are so short, and squares that sum to a number in this range, lose no more than the 7th digit in float32.
_SHORT, _LEAST, _MOST = 2048, 1e-10, 1e18


class Factors(NamedTuple):
    """Two factors with `up @ down * scale = dW`.

    Attributes:
        up: (out, rank) or (out, rank, 1, 1).
        down: (rank, in) or (rank, in, kh, kw).
        scale: what their product is multiplied with.
    """

    up: Tensor
    down: Tensor
    scale: float

    @property
    def energy(self) -> float:
        """`||dW||_F^2` by two rank x rank Gram matrices: `sum((up^T up) * (down down^T)) * scale^2`.

        The Gram matrices of short factors are made in float32, to 6 digits in half the time. Where that may lose digits,
        because the columns of a factor cancel or squares leave the range of float32, all of it is float64.
        """
        up, down = self.up.flatten(1), self.down.flatten(1)
        if max(len(up), down.shape[1]) <= _SHORT and up.element_size() < 8 and down.element_size() < 8:
            up_32, down_32 = up.float(), down.float()
            grams = up_32.T @ up_32, down_32 @ down_32.T
            energy = float((grams[0] * grams[1]).sum(dtype=torch.float64))
            traces = [float(gram.trace()) for gram in grams]
            if min(traces) > _LEAST and max(traces) < _MOST and 4 * len(down) * energy > traces[0] * traces[1]:
                return energy * self.scale * self.scale
        (up, up_peak), (down, down_peak) = _in_float64(up), _in_float64(down)
        energy = float(torch.dot((up.T @ up).flatten(), (down @ down.T).flatten()))
        peak = up_peak * down_peak * self.scale
        return max(energy, 0.0) * peak * peak  # not `** 2`, which raises where a product becomes infinite


@dataclass(frozen=True, eq=False)
class Update(ABC):
    """The update `dW` of one weight, at strength 1, with its scaling applied.

    Attributes:
        kind: what this form is called.
        bias: what is added to the layer's bias along with it, (out,), or None. The gate doesn't look at it.
        numbers: what has been computed of `dW`, by name, so that another plan needn't compute it again.
    """

    kind: ClassVar[str]
    bias: Tensor | None = field(default=None, kw_only=True)
    numbers: Numbers = field(default_factory=dict, kw_only=True, repr=False)

    @property
    @abstractmethod
    def rank(self) -> int:
        """The inner width; for a dense update min(out, in)."""

    @property
    @abstractmethod
    def shape(self) -> Shape:
        """Shape of `dW`: (out, in), (out, in, kh, kw), or (out, in * kh * kw) where a file doesn't tell them apart."""

    @abstractmethod
    def dense(self) -> Tensor:
        """`dW` in float64, of `shape`."""

    def factors(self) -> Factors | None:
        """The same as two factors, where it has such a form and that is cheaper to apply than the dense one."""
        return None

    @property
    def needs_model(self) -> bool:
        """Whether it can't be computed before the weight that it changes is known."""
        return False

    @property
    def energy(self) -> float:
        """`||dW||_F^2`."""
        if "energy" not in self.numbers:
            self.numbers["energy"] = self._energy()
        return self.numbers["energy"]

    def _energy(self) -> float:
        factors = self.factors()
        if factors is not None:
            return factors.energy
        entries = self.dense().flatten()
        return float(entries @ entries)

    def fits(self, shape: Shape) -> bool:
        """Whether this is an update of a layer whose weight has `shape`, be its kernel flattened or not."""
        return len(shape) > 1 and self.fits_weight(shape) and (self.bias is None or len(self.bias) == shape[0])

    def applies_to(self, shape: Shape) -> bool:
        """The same where `shape` is that of the layer itself, its kernel not flattened."""
        return self.fits(shape)

    def fits_weight(self, shape: Shape) -> bool:
        """The same of `dW` alone."""
        mine = self.shape
        return mine == shape or (
            min(len(mine), len(shape)) == 2 and mine[0] == shape[0] and math.prod(mine[1:]) == math.prod(shape[1:])
        )


@dataclass(frozen=True, eq=False)
class LowRankUpdate(Update):
    """LoRA: `dW = up @ down * scale`, the update of a linear or convolutional weight.

    Attributes:
        down: (rank, in) or (rank, in, kh, kw).
        up: (out, rank) or (out, rank, 1, 1).
        scale: alpha / rank; the strength a user asks for is not in it.
    """

    kind = "lora"
    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Inner width of the factors."""
        return self.down.shape[0]

    @property
    def shape(self) -> Shape:
        """Shape of `dW`: (out, in), or (out, in, kh, kw) where the kernel is larger than 1 x 1."""
        return weight_shape(self.up.shape[0], self.down.shape[1], *self.down.shape[2:])

    def factors(self) -> Factors:
        """As the file has them."""
        return Factors(self.up, self.down, self.scale)

    def dense(self) -> Tensor:
        """`dW` in float64, of `shape`."""
        return (Product(self.up.flatten(1), self.down.flatten(1)).dense() * self.scale).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Product:
    """A matrix that a file keeps as it is, as two factors, or as a Tucker form: what the other kinds are made of.

    Attributes:
        left: the matrix itself; or (out, rank).
        right: (rank, in), or None.
        core: (rank, rank, kh, kw), or None.
    """

    left: Tensor
    right: Tensor | None = None
    core: Tensor | None = None

    @property
    def rank(self) -> int:
        """Inner width; of a whole matrix min(out, in)."""
        return self.right.shape[0] if self.right is not None else min(self.left.shape[0], self.left[0].numel())

    @property
    def shape(self) -> Shape:
        """(out, in) or (out, in, kh, kw)."""
        if self.right is None:
            return weight_shape(*self.left.shape)
        if self.core is None:
            return (self.left.shape[0], self.right.shape[1])
        return weight_shape(self.left.shape[0], self.right.shape[1], *self.core.shape[2:])

    def dense(self) -> Tensor:
        """The matrix in float64, of `shape`."""
        left = self.left.double()
        if self.right is None:
            return left.reshape(self.shape)
        if self.core is None:
            return left @ self.right.double()
        return torch.einsum("ijkl,oi,jn->onkl", self.core.double(), left, self.right.double()).reshape(self.shape)

    def halves(self) -> tuple[Tensor, Tensor] | None:
        """(out, rank) and (rank, in * kh * kw) in float32, whose product it is; None of a matrix kept whole."""
        if self.right is None:
            return None
        left, right = self.left.float(), self.right.float()
        if self.core is None:
            return left, right
        return left, torch.einsum("ijkl,jn->inkl", self.core.float(), right).flatten(1)


@dataclass(frozen=True, eq=False)
class ProductUpdate(Update):
    """One product alone: LoRA in its Tucker form (`lora_mid`), or a full difference (`diff`)."""

    product: Product
    scale: float

    @property
    def kind(self) -> str:  # type: ignore[override]
        """`tucker` or `full`."""
        return "tucker" if self.product.core is not None else "full"

    @property
    def rank(self) -> int:
        """The product's."""
        return self.product.rank

    @property
    def shape(self) -> Shape:
        """The product's."""
        return self.product.shape

    def factors(self) -> Factors | None:
        """Up, and what down and the core make together."""
        halves = self.product.halves() if _is_thin(self.rank, self.shape) else None
        return halves and _factors(*halves, self.shape, self.scale)

    def dense(self) -> Tensor:
        """`dW` in float64, of `shape`."""
        return self.product.dense() * self.scale


@dataclass(frozen=True, eq=False)
class HadamardUpdate(Update):
    """LoHa (arXiv 2108.06098): `dW = (a1 @ b1) * (a2 @ b2) * scale`, entry by entry."""

    kind = "loha"
    first: Product
    second: Product
    scale: float

    @property
    def rank(self) -> int:
        """Inner width of each of the two products."""
        return self.first.rank

    @property
    def shape(self) -> Shape:
        """That of both products."""
        return self.first.shape

    def factors(self) -> Factors | None:
        """`(a1 @ b1) * (a2 @ b2)` as one product of rank^2: each row of the new `a` is the Kronecker product of rows."""
        first, second = self.first.halves(), self.second.halves()
        if not (first and second and _is_thin(self.first.rank * self.second.rank, self.shape)):
            return None
        left = torch.einsum("or,os->ors", first[0], second[0]).flatten(1)
        right = torch.einsum("rn,sn->rsn", first[1], second[1]).flatten(0, 1)
        return _factors(left, right, self.shape, self.scale)

    def dense(self) -> Tensor:
        """`dW` in float64, of `shape`."""
        return self.first.dense() * self.second.dense() * self.scale


@dataclass(frozen=True, eq=False)
class KroneckerUpdate(Update):
    """LoKr (arXiv 2212.10650): `dW = kron(small, large) * scale`; a convolution's kernel is in `large`."""

    kind = "lokr"
    small: Product
    large: Product
    scale: float

    @property
    def rank(self) -> int:
        """That of a product whose rank is the product of the two factors' ranks."""
        return self.small.rank * self.large.rank

    @property
    def shape(self) -> Shape:
        """(out, in) or (out, in, kh, kw)."""
        (a, b), (c, d, *kernel) = self.small.shape, self.large.shape
        return (a * c, b * d, *kernel)

    def _energy(self) -> float:
        """`||dW||_F^2 = ||small||_F^2 * ||large||_F^2 * scale^2`."""
        small, large = (float(factor.dense().square().sum()) for factor in (self.small, self.large))
        return small * large * self.scale * self.scale

    def factors(self) -> Factors | None:
        """`kron(a1 @ b1, a2 @ b2) = kron(a1, a2) @ kron(b1, b2)`; a small matrix kept whole is itself times one."""
        small, large = self.small.halves(), self.large.halves()
        inner = self.small.shape[1] if small is None else len(small[1])
        if large is None or not _is_thin(inner * len(large[1]), self.shape):
            return None
        if small is None:
            small = self.small.left.float().reshape(self.small.shape), torch.eye(inner)
        inputs = self.large.shape[1]
        left = torch.einsum("ar,cs->acrs", small[0], large[0]).flatten(2).flatten(0, 1)
        # The kernel's entries vary fastest, after the inputs: the Kronecker product is over the inputs alone.
        right = torch.einsum("rb,sdk->rsbdk", small[1], large[1].reshape(len(large[1]), inputs, -1))
        return _factors(left, right.flatten(0, 1), self.shape, self.scale)

    def dense(self) -> Tensor:
        """`dW` in float64, of `shape`."""
        small, large = self.small.dense(), self.large.dense()
        small = small.reshape(*small.shape, *(1 for _ in large.shape[2:]))
        return torch.kron(small, large.contiguous()) * self.scale


def weight_shape(out: int, inputs: int, *kernel: int) -> Shape:
    """(out, in), or (out, in, kh, kw) where the kernel is larger than 1 x 1."""
    return (out, inputs, *(kernel if math.prod(kernel) > 1 else ()))


def misfit(who: str, layer: str, update: Update, shape: Shape) -> EstLoraError:
    """The error that `who`'s update of `layer`, whose weight has `shape`, is for another model."""
    mine = shape_text(update.shape) or f"of the kind {update.kind}, for another width"
    return EstLoraError(
        f"{who} doesn't fit this model: its update of {layer} is {mine}, the layer is {shape_text(shape)}; choose a LoRA"
        " and a model of the same family."
    )


def shape_text(shape: Shape) -> str:
    """`320 x 768`."""
    return " x ".join(map(str, shape))


def is_finite(tensor: Tensor) -> bool:
    """Whether every entry is a number."""
    if tensor.element_size() == 1:  # of an 8-bit type, which few operations know; in pieces, to spare the memory
        return all(math.isfinite(float(piece.float().sum())) for piece in torch.split(tensor.flatten(), _PIECE))
    # A sum needs no memory and is finite only if all entries are; a half's may overflow though they are.
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _is_thin(rank: int, shape: Shape) -> bool:
    """Whether two factors of that rank cost at most half of what applying a dense update of `shape` does."""
    out, inputs = shape[0], math.prod(shape[1:])
    return 2 * rank * (out + inputs) <= out * inputs


def _factors(left: Tensor, right: Tensor, shape: Shape, scale: float) -> Factors:
    """Factors of a product that a file doesn't have as such, their magnitudes balanced so that half precision holds."""
    right = right.flatten(1)
    norms = right.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    left, right = left * norms, right / norms[:, None]
    peak = float(left.abs().amax()) or 1.0
    return Factors(left / peak, right.reshape(len(right), *shape[1:]), scale * peak)


def _in_float64(matrix: Tensor) -> tuple[Tensor, float]:
    """`matrix` in float64, and the largest entry that it has been divided by: its squares may leave float64's range."""
    matrix = matrix.double()
    peak = float(matrix.abs().amax()) if matrix.numel() else 0.0
    return (matrix / peak, peak) if peak else (matrix, 1.0)
