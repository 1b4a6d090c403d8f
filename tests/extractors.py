"""Feature extractors with random weights, in the format of the published ones."""

from __future__ import annotations

import json
from pathlib import Path

import torch

SMALLER = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALLER |= {"image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-12}
PROCESSOR = {  # word for word the published one's, but for the size
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "ViTFeatureExtractor",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 2,
    "size": 32,
}


def write_dino(folder: Path, seed: int = 0) -> Path:
    """A small vision transformer of transformers in a folder: what takes DINO's place in tests."""
    import transformers

    model = transformers.ViTModel(transformers.ViTConfig(**SMALLER), add_pooling_layer=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            mean = float("layernorm" in name and name.endswith("weight"))
            weight.normal_(mean, 0.2, generator=generator)
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR), encoding="utf-8")
    return folder
