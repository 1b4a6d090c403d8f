"""LoRAs with random weights for a checkpoint in the original naming, in the conventions that people's files have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from est_lora.lora.names import UNetLayout, read_name

_UNET = "model.diffusion_model."
_ENCODERS = {
    "cond_stage_model.transformer.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.1.model.transformer.resblocks.": "text_encoder_2",
}
_KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
_PEFT = {"unet": "unet", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"}
_OPEN_CLIP = {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
_LAYER = re.compile(r"(\d+)\.(.+)")
_ATTENTION = re.compile(r"\.attn[12]\.to_")
_SKIPPED = re.compile(r"norm|embed|first_stage|position|token")
# The share of a layer's norm that an update takes: enough to be seen in a picture of four steps.
_SHARE = 0.3


def layers(checkpoint: Path) -> dict[tuple[str, str], tuple[str, tuple[int, ...]]]:
    """The original name and the shape of every linear layer and convolution, by part and diffusers' name."""
    with safe_open(checkpoint, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    unet = [name.removeprefix(_UNET) for name in shapes if name.startswith(_UNET)]
    layout = UNetLayout.of_original(unet)
    found = {}
    for name, shape in shapes.items():
        for part, own, size in _named(name, shape, layout):
            if len(size) in (2, 4):
                original = name.removeprefix(_UNET).removesuffix(".weight") if part == "unet" else own
                found[part, own] = original, size
    return found


def write_lora(
    path: Path,
    checkpoint: Path,
    seed: int,
    *,
    text: bool = False,
    everything: bool = False,
    convention: str = "kohya",
    rank: int = 4,
    share: float = _SHARE,
) -> Path:
    """Writes a LoRA for `checkpoint`.

    Args:
        path: the `.safetensors` file.
        checkpoint: the checkpoint it is for, in the original naming.
        seed: other weights, same layers.
        text: also the text encoders.
        everything: also convolutions, feed-forward and projections, not only the attention.
        convention: `kohya` or `peft`.
        rank: of every layer; alpha is half of it in kohya's convention.
        share: the norm of an update over that of a random matrix of the layer's size.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    is_xl = any(part == "text_encoder_2" for part, _ in layers(checkpoint))
    for (part, name), (original, shape) in layers(checkpoint).items():
        if part == "unet" and not everything and not _ATTENTION.search(name):
            continue
        if part != "unet" and not text:
            continue
        down = torch.randn(rank, *shape[1:], generator=generator)
        up = torch.randn(shape[0], rank, *([1, 1] if len(shape) == 4 else []), generator=generator)
        up *= share * (0.5 + torch.rand(1, generator=generator)) / (rank * down[0].numel()) ** 0.5
        if convention == "peft":
            tensors[f"{_PEFT[part]}.{name}.lora_A.weight"] = down.contiguous()
            tensors[f"{_PEFT[part]}.{name}.lora_B.weight"] = up.contiguous()
            continue
        prefix = "lora_te1" if is_xl and part == "text_encoder" else _KOHYA[part]
        # What trains LoRAs for SDXL keeps the original names, and what trains them for SD1.5 translates them.
        kohya = f"{prefix}_{(original if is_xl else name).replace('.', '_')}"
        tensors[f"{kohya}.lora_down.weight"] = down.contiguous()
        tensors[f"{kohya}.lora_up.weight"] = 2 * up.contiguous()
        tensors[f"{kohya}.alpha"] = torch.tensor(rank / 2)
    save_file(tensors, path)
    return path


def _named(name: str, shape: tuple[int, ...], layout: UNetLayout) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(part, diffusers' name, shape) of what a tensor of a checkpoint holds."""
    if name.startswith(_UNET) and name.endswith(".weight") and not _SKIPPED.search(name):
        found = read_name(name.removeprefix(_UNET).removesuffix(".weight"), layout)
        if found:
            yield "unet", found.layer.name, shape
    for prefix, part in _ENCODERS.items():
        if not name.startswith(prefix):
            continue
        own = name.removeprefix(prefix)
        layer = _LAYER.match(own)
        if part == "text_encoder" and own.endswith(".weight") and not _SKIPPED.search(own):
            yield part, own.removesuffix(".weight"), shape
        elif part == "text_encoder_2" and layer:
            block = f"text_model.encoder.layers.{layer[1]}."
            if layer[2] == "attn.in_proj_weight":
                for one in "qkv":
                    yield part, f"{block}self_attn.{one}_proj", (shape[0] // 3, shape[1])
            elif layer[2].removesuffix(".weight") in _OPEN_CLIP and layer[2].endswith(".weight"):
                yield part, block + _OPEN_CLIP[layer[2].removesuffix(".weight")], shape
