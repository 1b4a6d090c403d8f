"""From the tensors of one layer to its update, kind by kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from est_lora.lora.update import HadamardUpdate, KroneckerUpdate, LowRankUpdate, Product, ProductUpdate, Update

Parts = Mapping[str, Tensor]
Scale = Callable[[int], float]
"""A layer's scale, given its rank."""


def build(kind: str, parts: Parts, scale: Scale) -> Update | None:
    """The update of one layer.

    Args:
        kind: one of `KINDS`.
        parts: its tensors by role: `down`, `up`, `lora_mid`, `hada_w1_a`, `lokr_w2`, `diff`, ...
        scale: its scale, given the rank.

    Returns:
        None where tensors are missing, too many, or not of the shapes that the kind has.

    Raises:
        ValueError: the tensors contradict one another; the text says how.
    """
    return KINDS[kind](parts, scale)


def _lora(parts: Parts, scale: Scale) -> Update | None:
    if parts.keys() != {"down", "up"}:
        return None
    down, up = parts["down"], parts["up"]
    if not {down.dim(), up.dim()} <= {2, 4} or math.prod(up.shape[2:]) != 1:
        return None
    _check_ranks(down.shape[0], up.shape[1])
    return LowRankUpdate(down, up, scale(down.shape[0]))


def _tucker(parts: Parts, scale: Scale) -> Update | None:
    if parts.keys() != {"down", "up", "lora_mid"} or math.prod([*parts["up"].shape[2:], *parts["down"].shape[2:]]) != 1:
        return None
    product = _product(parts["up"].flatten(1).T, parts["down"].flatten(1), parts["lora_mid"])
    return None if product is None else ProductUpdate(product, scale(product.rank))


def _full(parts: Parts, scale: Scale) -> Update | None:
    product = _product(parts["diff"]) if parts.keys() == {"diff"} else None
    return None if product is None else ProductUpdate(product, 1.0)


def _loha(parts: Parts, scale: Scale) -> Update | None:
    names = {f"hada_w{n}_{side}" for n in (1, 2) for side in "ab"}
    if parts.keys() - {"hada_t1", "hada_t2"} != names or ("hada_t1" in parts) != ("hada_t2" in parts):
        return None
    first, second = (_product(parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"], parts.get(f"hada_t{n}")) for n in (1, 2))
    if first is None or second is None or first.shape != second.shape:
        return None
    return HadamardUpdate(first, second, scale(first.rank))


def _lokr(parts: Parts, scale: Scale) -> Update | None:
    small, large = _half(parts, "1"), _half(parts, "2")
    used = len(parts) - sum(part is not None for half in (small, large) if half for part in vars(half).values())
    if small is None or large is None or used or len(small.shape) != 2:
        return None
    factored = next((half for half in (small, large) if half.right is not None), None)
    return KroneckerUpdate(small, large, scale(factored.rank) if factored else 1.0)


def _half(parts: Parts, n: str) -> Product | None:
    if f"lokr_w{n}" in parts:
        return _product(parts[f"lokr_w{n}"])
    if f"lokr_w{n}_a" in parts and f"lokr_w{n}_b" in parts:
        return _product(parts[f"lokr_w{n}_a"], parts[f"lokr_w{n}_b"], parts.get(f"lokr_t{n}"))
    return None


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
    _check_ranks(right.shape[0], left.shape[0])
    _check_ranks(core.shape[0], core.shape[1])
    _check_ranks(right.shape[0], core.shape[0])
    return Product(left, right, core)


def _check_ranks(one: int, other: int) -> None:
    if one != other:
        raise ValueError(f"two of its factors have different ranks, {one} and {other}")


KINDS: Mapping[str, Callable[[Parts, Scale], Update | None]] = {
    "lora": _lora,
    "tucker": _tucker,
    "full": _full,
    "loha": _loha,
    "lokr": _lokr,
}
