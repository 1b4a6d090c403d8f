"""UNets of the real sizes with random weights, and pairs of LoRA files that fit them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

_PROJECTIONS = tuple(f"attn{n}.{leaf}" for n in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out.0"))
_TOKENS = 77


@dataclass(frozen=True)
class Size:
    """A UNet's size.

    Attributes:
        title: what tables call it.
        config: what `UNet2DConditionModel` is made with.
    """

    title: str
    config: dict[str, Any]


SIZES = {
    "tiny": Size(
        "tiny",
        {
            "block_out_channels": (32, 64),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 48,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
        },
    ),
    "sd15": Size(
        "SD1.5",
        {
            "block_out_channels": (320, 640, 1280, 1280),
            "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
    ),
    "sdxl": Size(
        "SDXL",
        {
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
        },
    ),
}


def build(size: Size, device: str | torch.device, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """The UNet with random weights; on the device `meta` without memory for them."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # made in this dtype: converted afterwards, it would need the memory twice
    try:
        with torch.device(device):
            return UNet2DConditionModel(**size.config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def inputs(model: UNet2DConditionModel, latents: int, batch: int) -> dict[str, Any]:
    """What one call of `model` takes, but for the timestep: `batch` latents of `latents` x `latents`, 77 tokens."""
    generator = torch.Generator().manual_seed(1)
    config = model.config

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(model.device, model.dtype)

    made: dict[str, Any] = {
        "sample": random(batch, config.in_channels, latents, latents),
        "encoder_hidden_states": random(batch, _TOKENS, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        sizes = 6  # of the original, the crop and the target, two numbers each
        pooled = config.projection_class_embeddings_input_dim - sizes * config.addition_time_embed_dim
        made["added_cond_kwargs"] = {"text_embeds": random(batch, pooled), "time_ids": random(batch, sizes)}
    return made


def attention_projections(model: nn.Module) -> dict[str, nn.Linear]:
    """q, k, v and out of every self- and cross-attention, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(_PROJECTIONS)
    }


def write_pair(folder: Path, model: nn.Module, rank: int) -> tuple[Path, Path]:
    """Writes a subject's and a style's LoRA of every attention projection of `model`, as kohya's trainer names them.

    The factors are random, in float16, of another magnitude in each layer, so that the layers of a pair switch at
    different times; alpha is half the rank.
    """
    paths = folder / f"subject-{rank}.safetensors", folder / f"style-{rank}.safetensors"
    for seed, path in enumerate(paths):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, module in attention_projections(model).items():
            stem = "lora_unet_" + name.replace(".", "_")
            spread = torch.exp(torch.randn((), generator=generator) / 4)
            down = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
            up = torch.randn(module.out_features, rank, generator=generator) * 0.1 * spread
            tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = down.half(), up.half()
            tensors[f"{stem}.alpha"] = torch.tensor(rank / 2)
        save_file(tensors, path)
    return paths
