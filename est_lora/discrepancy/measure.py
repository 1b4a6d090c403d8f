"""From two pictures' features to one number."""

from __future__ import annotations

from torch import Tensor

from est_lora.errors import EstLoraError

DIGITS = 6  # as many as a picture's parameters have of it: whoever types them gets the same picture


def discrepancy(features: Tensor) -> float:
    """The style discrepancy `D = 1 - cos(a, b)`, computed in float64 (EST-LoRA, arXiv 2508.02165).

    Args:
        features: (2, d), what an extractor makes of the subject's and the style's picture, in any order.

    Returns:
        A number in [0, 2]: 0 for features of one direction, 1 for unrelated ones, 2 for opposite ones.

    Raises:
        EstLoraError: it isn't two rows, or a row is all zeros or not finite, so that it has no direction.
    """
    if features.ndim != 2 or len(features) != 2 or not features.numel():
        shape = " x ".join(map(str, features.shape))
        raise EstLoraError(f"The style discrepancy is of two pictures' features, and these are {shape}: give 2 x d.")
    rows = features.detach().cpu().double()
    largest = rows.abs().amax(dim=1, keepdim=True)
    if not (largest.isfinite() & (largest > 0)).all():
        raise EstLoraError(
            "The style discrepancy can't be measured, as a picture's features are all zero or not finite:"
            " see that the extractor's weights are whole, or give beta as a number."
        )
    a, b = rows / largest  # lest squares leave the range of a float
    cosine = float((a @ b) / ((a @ a).sqrt() * (b @ b).sqrt()))
    return min(max(1.0 - cosine, 0.0), 2.0)
