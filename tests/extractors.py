"""Feature extractors with random weights, in the format of the published ones."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

_ARCHITECTURE = "vit_small_patch16_224"
_SMALLER = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}


def write_dino(folder: Path, seed: int = 0) -> Path:
    """A small vision transformer of timm in a folder: what takes DINO's place in tests."""
    import timm

    model = timm.create_model(_ARCHITECTURE, pretrained=False, num_classes=0, **_SMALLER)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: weight + 0.2 * torch.randn(weight.shape, generator=generator)
        for name, weight in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors")
    side = _SMALLER["img_size"]
    prepared = {
        "input_size": [3, side, side],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "num_classes": 0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    config = {"architecture": _ARCHITECTURE, "num_classes": 0, "model_args": _SMALLER, "pretrained_cfg": prepared}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
