"""How much each file changes a layer, and how two files of different scale are made comparable."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from est_lora.lora import Update

# What outweighs the mean of the L1 ratios this often is left out when the mean is taken again (as published).
_OUTLIER = 3.0


def l1_norm(update: Update) -> float:
    """`sum|dW|`, from the dense update."""
    return float(update.dense().abs().sum())


def top_score(update: Update, count: int) -> float:
    """K-LoRA's score (arXiv 2502.18461): the sum of the `count` largest absolute entries of the dense update."""
    entries = update.dense().abs().flatten()
    return float(torch.topk(entries, min(count, entries.numel()), sorted=False).values.sum())


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
