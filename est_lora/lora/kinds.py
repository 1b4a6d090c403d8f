"""From the tensors of one layer to its update, kind by kind."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from est_lora.lora.relative import DoraUpdate, PromptedUpdate, RelativeUpdate, RotationUpdate, ScalingUpdate
from est_lora.lora.update import HadamardUpdate, KroneckerUpdate, LowRankUpdate, Product, ProductUpdate, Update

Parts = Mapping[str, Tensor]
# What may come with the tensors of any kind.
_ADDED = {"diff_b", "lora_B.bias", "dora_scale", "lora_magnitude_vector"}


@dataclass(frozen=True)
class Scale:
    """How a layer's update is scaled.

    Attributes:
        alpha: as its tensors say it; None where they don't.
        otherwise: the scale for a rank where no tensor says it.
    """

    alpha: float | None
    otherwise: Callable[[int | None], float]

    def __call__(self, rank: int | None) -> float:
        """What the product of factors of that rank is multiplied with; None of matrices that are kept whole."""
        if self.alpha is None:
            return self.otherwise(rank)
        return 1.0 if rank is None else self.alpha / max(rank, 1)


def build(kind: str, parts: Parts, scale: Scale) -> Update | None:
    """The update of one layer.

    Args:
        kind: one of `KINDS`.
        parts: its tensors by role: `down`, `up`, `lora_mid`, `hada_w1_a`, `lokr_w2`, `diff`, ...; with any kind also
            `dora_scale` (or PEFT's `lora_magnitude_vector`), `diff_b`, `lora_B.bias`.
        scale: its scale.

    Returns:
        None where tensors are missing, too many, or not of the shapes that the kind has.

    Raises:
        ValueError: the tensors contradict one another; the text says how.
    """
    update = KINDS[kind]({role: part for role, part in parts.items() if role not in _ADDED}, scale)
    if update is None:
        return None
    bias = parts.get("diff_b")
    if "lora_B.bias" in parts:
        if not isinstance(update, LowRankUpdate):
            return None
        bias = parts["lora_B.bias"].float() * update.scale
    magnitude = parts.get("dora_scale")
    if "lora_magnitude_vector" in parts:
        magnitude = parts["lora_magnitude_vector"].flatten()
    if magnitude is not None:
        if isinstance(update, RelativeUpdate):
            return None
        update = _decomposed(update, magnitude)
    return update if bias is None else _with_bias(update, bias)


def _with_bias(update: Update, bias: Tensor) -> Update:
    if update.shape and bias.numel() != update.shape[0]:
        raise ValueError(f"the bias has {bias.numel()} entries for {update.shape[0]} outputs")
    return dataclasses.replace(update, bias=bias.flatten())


def _decomposed(direction: Update, magnitude: Tensor) -> Update:
    """DoRA; a magnitude of shape (1, in, ...) is that of the inputs, any other that of the outputs."""
    out, inputs = direction.shape[:2]
    on_input = magnitude.dim() > 1 and not magnitude.shape[0] == out != 1
    count = magnitude.numel()
    # Of a convolution some kinds don't tell the inputs from the kernel.
    if not count or (inputs % count if on_input else count != out):
        raise ValueError(f"its {count} magnitudes are for another shape than {out} x {inputs}")
    return DoraUpdate(direction, magnitude.flatten(), on_input)


def _lora(parts: Parts, scale: Scale) -> Update | None:
    if parts.keys() != {"down", "up"}:
        return None
    down, up = parts["down"], parts["up"]
    if not {down.dim(), up.dim()} <= {2, 4} or math.prod(up.shape[2:]) != 1:
        return None
    _check_ranks(down.shape[0], up.shape[1])
    return LowRankUpdate(down, up, scale(down.shape[0]))


def _tucker(parts: Parts, scale: Scale) -> Update | None:
    if parts.keys() != {"down", "up", "lora_mid"}:
        return None
    factors = parts["down"], parts["up"]
    if any(factor.dim() not in (2, 4) or math.prod(factor.shape[2:]) != 1 for factor in factors):
        return None
    product = _product(parts["up"].flatten(1), parts["down"].flatten(1), parts["lora_mid"])
    return None if product is None else ProductUpdate(product, scale(product.rank))


def _full(parts: Parts, scale: Scale) -> Update | None:
    product = _product(parts["diff"]) if parts.keys() == {"diff"} else None
    return None if product is None else ProductUpdate(product, 1.0)


def _loha(parts: Parts, scale: Scale) -> Update | None:
    names = {f"hada_w{n}_{side}" for n in (1, 2) for side in "ab"}
    if parts.keys() - {"hada_t1", "hada_t2"} != names or ("hada_t1" in parts) != ("hada_t2" in parts):
        return None
    first, second = (_lycoris(parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"], parts.get(f"hada_t{n}")) for n in (1, 2))
    if first is None or second is None or first.shape != second.shape:
        return None
    return HadamardUpdate(first, second, scale(first.rank))


def _lokr(parts: Parts, scale: Scale) -> Update | None:
    small, large = _half(parts, "1"), _half(parts, "2")
    used = len(parts) - sum(part is not None for half in (small, large) if half for part in vars(half).values())
    if small is None or large is None or used or len(small.shape) != 2:
        return None
    factored = next((half for half in (small, large) if half.right is not None), None)
    return KroneckerUpdate(small, large, scale(factored.rank if factored else None))


def _half(parts: Parts, n: str) -> Product | None:
    if f"lokr_w{n}" in parts:
        return _product(parts[f"lokr_w{n}"])
    if f"lokr_w{n}_a" in parts and f"lokr_w{n}_b" in parts:
        return _lycoris(parts[f"lokr_w{n}_a"], parts[f"lokr_w{n}_b"], parts.get(f"lokr_t{n}"))
    return None


def _lycoris(left: Tensor, right: Tensor, core: Tensor | None) -> Product | None:
    """A product as LyCORIS has it: with a core, its left factor is (rank, out)."""
    return _product(left if core is None or left.dim() != 2 else left.T, right, core)


def _product(left: Tensor, right: Tensor | None = None, core: Tensor | None = None) -> Product | None:
    if right is None:
        return Product(left) if left.dim() in (2, 4) and left.numel() else None
    if left.dim() != 2 or right.dim() not in (2, 4):
        return None
    right = right.flatten(1)
    if core is None:
        _check_ranks(right.shape[0], left.shape[1])
        return Product(left, right)
    if core.dim() != 4:
        return None
    _check_ranks(right.shape[0], left.shape[1])
    _check_ranks(core.shape[0], core.shape[1])
    _check_ranks(right.shape[0], core.shape[0])
    return Product(left, right, core)


def _ia3(parts: Parts, _scale: Scale) -> Update | None:
    if parts.keys() != {"weight", "on_input"} or parts["on_input"].numel() != 1 or not parts["weight"].numel():
        return None
    return ScalingUpdate(parts["weight"].flatten(), bool(parts["on_input"].reshape(())))


def _oft(parts: Parts, scale: Scale) -> Update | None:
    if parts.keys() - {"rescale"} != {"oft_blocks"}:
        return None
    blocks, rescale = parts["oft_blocks"], parts.get("rescale")
    if blocks.dim() not in (3, 4) or blocks.shape[-1] != blocks.shape[-2] or not blocks.numel():
        return None
    *stages, count, size = blocks.shape[:-1]
    out = count * size
    if stages and (size % 2 or out % (size << stages[0] - 1)):  # a stage pairs outputs that far apart
        return None
    if rescale is not None and rescale.numel() != out:
        raise ValueError(f"{rescale.numel()} outputs are rescaled and {out} rotated")
    return RotationUpdate(blocks, rescale, (scale.alpha or 0.0) * out)


def _glora(parts: Parts, scale: Scale) -> Update | None:
    if parts.keys() != {"a1", "a2", "b1", "b2"} or any(part.dim() not in (2, 4) for part in parts.values()):
        return None
    a1, a2, b1, b2 = (parts[name] for name in ("a1", "a2", "b1", "b2"))
    read = []
    for (a_left, a_right), (b_left, b_right) in (
        ((a1, a2), (b1, b2)),
        ((a2, a1), (b2, b1)),
    ):  # which is which has changed
        rank, inputs = b_right.shape[:2]
        a = a_left.shape[1], a_right.shape[0], a_left.shape[0], a_right.shape[1]
        kernels = (*a_left.shape[2:], *a_right.shape[2:], *b_left.shape[2:])
        if a == (rank, rank, inputs, inputs) and b_left.shape[1] == rank and math.prod(kernels) == 1:
            prompt = Product(a_left.flatten(1), a_right.flatten(1))
            read.append(PromptedUpdate(prompt, LowRankUpdate(b_right, b_left, 1.0), scale(rank)))
    return min(read, key=lambda update: update.rank, default=None)


def _check_ranks(one: int, other: int) -> None:
    if one != other:
        raise ValueError(f"two of its factors have different ranks, {one} and {other}")


KINDS: Mapping[str, Callable[[Parts, Scale], Update | None]] = {
    "lora": _lora,
    "tucker": _tucker,
    "full": _full,
    "loha": _loha,
    "lokr": _lokr,
    "ia3": _ia3,
    "oft": _oft,
    "glora": _glora,
}
