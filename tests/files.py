"""LoRA files made on the spot, in every convention, from one description."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

# One level with attention on the way down, the middle, one on the way up; q, k, v, out of both attentions.
BLOCKS = ("down_blocks.1.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.2")
PROJECTIONS = tuple(f"attn{n}.{p}" for n in (1, 2) for p in ("to_q", "to_k", "to_v", "to_out.0"))
ATTENTION_LAYERS = tuple(f"{block}.transformer_blocks.0.{p}" for block in BLOCKS for p in PROJECTIONS)
FEED_FORWARD = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
CONV = "down_blocks.1.resnets.0.conv1"
WIDTH, CONTEXT = 24, 40

CONVENTIONS = (
    "kohya",
    "kohya-original",
    "lycoris",
    "peft",
    "peft-wrapped",
    "diffusers",
    "diffusers-twice",
    "diffusers-bare",
    "diffusers-processor",
    "original-dotted",
)


@dataclass
class Factors:
    """One layer: down (rank, in[, kh, kw]), up (out, rank[, 1, 1]), alpha or None."""

    down: Tensor
    up: Tensor
    alpha: float | None = None

    @property
    def dense(self) -> Tensor:
        """`dW` in float64."""
        rank = self.down.shape[0]
        scale = 1.0 if self.alpha is None else self.alpha / rank
        product = self.up.double().flatten(1) @ self.down.double().flatten(1)
        return (product * scale).reshape(self.up.shape[0], *self.down.shape[1:])


Lora = dict[str, Factors]


def random_lora(
    seed: int,
    names: tuple[str, ...] = ATTENTION_LAYERS,
    rank: int = 4,
    alpha: float | None = 2.0,
    size: float = 1.0,
    dtype: torch.dtype = torch.float32,
    width: int = WIDTH,
    context: int = CONTEXT,
) -> Lora:
    """Random factors whose magnitudes differ from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name in names:
        inputs = context if name.endswith(("attn2.to_k", "attn2.to_v")) else width
        kernel, ones = ((3, 3), (1, 1)) if "conv" in name else ((), ())
        spread = size * float(torch.exp(torch.randn((), generator=generator) * 0.7))
        down = torch.randn(rank, inputs, *kernel, generator=generator)
        up = torch.randn(width * (8 if "ff.net.0" in name else 1), rank, *ones, generator=generator) * spread
        made[name] = Factors(down.to(dtype), up.to(dtype), alpha)
    return made


def write(path: Path, lora: Lora, convention: str = "kohya", metadata: dict[str, str] | None = None) -> Path:
    """Saves `lora` as files of that convention look."""
    tensors: dict[str, Tensor] = {}
    header = dict(metadata or {})
    peft: dict[str, object] = {}
    for name, factors in lora.items():
        down, up, alpha = _keys(name, convention)
        tensors[down], tensors[up] = factors.down.contiguous(), factors.up.contiguous()
        if factors.alpha is not None and alpha:
            tensors[alpha] = torch.tensor(factors.alpha)
        elif factors.alpha is not None:
            peft.setdefault("unet.lora_alpha", factors.alpha)
            peft.setdefault("unet.alpha_pattern", {})[name] = factors.alpha  # type: ignore[index]
    if peft:
        header["lora_adapter_metadata"] = json.dumps(peft)
    save_file(tensors, path, metadata=header or None)
    return path


def original_name(name: str) -> str:
    """A diffusers name in the original (ldm/sgm) spelling, for a UNet with two residual blocks a level."""
    parts = name.split(".")
    if parts[0] == "mid_block":
        block, rest = f"middle_block.{1 if parts[1] == 'attentions' else 2 * int(parts[2])}", parts[3:]
    else:
        level, position = int(parts[1]), int(parts[3])
        number = 1 + 3 * level + position if parts[0] == "down_blocks" else 3 * level + position
        side = "input_blocks" if parts[0] == "down_blocks" else "output_blocks"
        block, rest = f"{side}.{number}.{1 if parts[2] == 'attentions' else 0}", parts[4:]
    leaf = ".".join(rest)
    return f"{block}.{ {'conv1': 'in_layers.2', 'conv2': 'out_layers.3'}.get(leaf, leaf) }"


def _keys(name: str, convention: str) -> tuple[str, str, str | None]:
    kohya = name.replace(".", "_")
    original = original_name(name) if "original" in convention else ""
    old = name.replace(".to_out.0", ".to_out").rpartition(".")
    stem, down, up, alpha = {
        "kohya": (f"lora_unet_{kohya}", ".lora_down.weight", ".lora_up.weight", ".alpha"),
        "kohya-original": (
            f"lora_unet_{original.replace('.', '_')}",
            ".lora_down.weight",
            ".lora_up.weight",
            ".alpha",
        ),
        "lycoris": (f"lycoris_{kohya}", ".lora_down.weight", ".lora_up.weight", ".alpha"),
        "peft": (f"unet.{name}", ".lora_A.weight", ".lora_B.weight", None),
        "peft-wrapped": (f"base_model.model.unet.{name}", ".lora_A.weight", ".lora_B.weight", None),
        "diffusers": (f"unet.{name}", ".lora.down.weight", ".lora.up.weight", ".alpha"),
        "diffusers-twice": (f"unet.unet.{name}", ".lora.down.weight", ".lora.up.weight", ".alpha"),
        "diffusers-bare": (name, ".lora.down.weight", ".lora.up.weight", ".alpha"),
        "diffusers-processor": (
            f"unet.{old[0]}.processor.{old[2]}",
            "_lora.down.weight",
            "_lora.up.weight",
            None,
        ),
        "original-dotted": (f"diffusion_model.{original}", ".lora_A.weight", ".lora_B.weight", ".alpha"),
    }[convention]
    return stem + down, stem + up, None if alpha is None else stem + alpha
