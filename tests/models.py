"""UNets with the layout of the real ones, as wide or as narrow as a test needs."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

from benchmarks.unets import SIZES

SD15, SDXL = SIZES["sd15"].config, SIZES["sdxl"].config


def unet(config: dict, **changes: object) -> UNet2DConditionModel:
    """The full-size model, without memory for its weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(**{**config, **changes})


def narrow(config: dict, seed: int = 0, **changes: object) -> UNet2DConditionModel:
    """The same layout, narrow, shallow and with random weights."""
    small = {
        "sample_size": 8,
        "block_out_channels": tuple(32 * min(2**i, 2) for i in range(len(config["block_out_channels"]))),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        "transformer_layers_per_block": 1,
    }
    torch.manual_seed(seed)
    return UNet2DConditionModel(**{**config, **small, **changes}).eval()


def projections(model: UNet2DConditionModel) -> dict[str, torch.nn.Module]:
    """Every module with a matrix or a kernel, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
