"""How much each file changes a layer, and how two files of different scale are made comparable."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from est_lora.lora import Update

# What outweighs the mean of the L1 ratios this often is left out when the mean is taken again (as published).
_OUTLIER = 3.0
_BLOCK = 64


def dense_measures(update: Update, count: int = 0) -> tuple[float, float]:
    """Of the dense update: `sum|dW|`, and the sum of its `count` largest absolute entries.

    The first is what the published balance compares files by, the second K-LoRA's score (arXiv 2502.18461). The update
    remembers both.
    """
    known, name = update.numbers, f"sum of {count} largest"
    if "sum" not in known or (count and name not in known):
        entries = update.dense().abs().flatten()
        known[name] = float(_largest(entries, count).sum())
        known["sum"] = float(entries.sum())
    return known["sum"], known[name] if count else 0.0


def _largest(entries: Tensor, count: int) -> Tensor:
    """The `count` largest entries, or all there are.

    At least `count` entries reach the `count`-th largest of the maxima of blocks, so only these need to be sorted.
    """
    if count >= entries.numel():
        return entries
    if 0 < count * _BLOCK < entries.numel() and entries.numel() % _BLOCK == 0:
        maxima = entries.reshape(-1, _BLOCK).amax(1)
        entries = entries[entries >= torch.topk(maxima, count, sorted=False).values.amin()]
    return torch.topk(entries, count, sorted=False).values


def energy_balance(pairs: Sequence[tuple[float, float]]) -> float:
    """`gamma` as the geometric mean of `E_subject / E_style`: scaling a file moves it along, so `rho` stays.

    Args:
        pairs: (subject's energy, style's energy) of each gated layer where both are > 0; not empty.
    """
    return math.exp(math.fsum(math.log(subject) - math.log(style) for subject, style in pairs) / len(pairs))


def l1_balance(pairs: Sequence[tuple[float, float]]) -> float:
    """`gamma` as published: the mean of `sum|dW_subject| / sum|dW_style|` without ratios of 3x that mean and more.

    Args:
        pairs: (subject's L1 norm, style's L1 norm) of each gated layer where both energies are > 0; not empty.
    """
    ratios = [subject / style for subject, style in pairs]
    mean = math.fsum(ratios) / len(ratios)
    kept = [ratio for ratio in ratios if ratio < _OUTLIER * mean]
    return math.fsum(kept) / len(kept)
