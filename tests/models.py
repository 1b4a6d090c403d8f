"""UNets with the layout of the real ones, as wide or as narrow as a test needs."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

SD15 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
    "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


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
