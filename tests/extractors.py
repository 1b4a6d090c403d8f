"""Tiny extractors made on the spot, in the folders that the published ones come in, and pictures to look at."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from est_lora.discrepancy import open_extractor
from est_lora.errors import EstLoraError

REVISION = "a7a4d161f5c0bd70478c05ca5777ec7cd8848021"
PUBLISHED = {  # the published DINO's files, word for word
    "config.json": {
        "architectures": ["ViTModel"],
        "attention_probs_dropout_prob": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": 384,
        "image_size": 224,
        "initializer_range": 0.02,
        "intermediate_size": 1536,
        "layer_norm_eps": 1e-12,
        "model_type": "vit",
        "num_attention_heads": 6,
        "num_channels": 3,
        "num_hidden_layers": 12,
        "patch_size": 16,
        "qkv_bias": True,
        "torch_dtype": "float32",
        "transformers_version": "4.12.0.dev0",
    },
    "preprocessor_config.json": {
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "ViTFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 2,
        "size": 224,
    },
}
SMALLER = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALLER |= {"image_size": 32, "patch_size": 8, "hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
CONFIG = PUBLISHED["config.json"] | SMALLER
PREPROCESSING = PUBLISHED["preprocessor_config.json"] | {"size": 32}
PROCESSOR = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
DROPOUT = {"attention_dropout": 0.5}
TEXT = VISION | {"num_hidden_layers": 1, "vocab_size": 99}


def randomly(model):
    """A model that isn't being trained, all of whose weights matter: some begin as zeros or ones."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn(weight.shape, generator=generator)
    return model.eval()


def write_dino(folder, dtype=torch.float32):
    """Writes a vision transformer, with a pooler as the published one has; returns it."""
    import transformers

    model = randomly(transformers.ViTModel(transformers.ViTConfig(**CONFIG))).to(dtype)
    model.save_pretrained(folder, safe_serialization=True)
    for file, content in {"config.json": CONFIG, "preprocessor_config.json": PREPROCESSING}.items():
        (folder / file).write_text(json.dumps(content))
    return model.float()


def write_clip(folder, whole=False):
    """Writes a CLIP's image encoder, or a whole CLIP; returns the encoder."""
    import transformers

    config = transformers.CLIPVisionConfig(**VISION, **DROPOUT, image_size=32, patch_size=8, projection_dim=16)
    encoder = randomly(transformers.CLIPVisionModelWithProjection(config))
    if whole:
        both = transformers.CLIPConfig(vision_config=config.to_dict(), text_config=TEXT, projection_dim=16)
        clip = transformers.CLIPModel(both)
        clip.load_state_dict(encoder.state_dict(), strict=False)
        clip.save_pretrained(folder, safe_serialization=True)
    else:
        encoder.save_pretrained(folder, safe_serialization=True)
    processor("clip").save_pretrained(folder)
    return encoder


def processor(name):
    """The library's own way to prepare pictures."""
    import transformers

    kind = {"dino": "ViTImageProcessor", "clip": "CLIPImageProcessor"}[name]
    kind = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
    return kind(**(PROCESSOR if name == "clip" else PREPROCESSING))


def picture(seed, mode="RGB", size=(64, 64)):
    """Coarse coloured noise, in which a colour or a place matters, as a picture of a mode and a size."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (5, 7, 4), dtype=np.uint8), "RGBA")
    smooth = coarse.resize(size, Image.Resampling.BICUBIC)
    if mode == "I;16":
        return Image.fromarray(np.asarray(smooth.convert("L")).astype(np.uint16) * 257)
    return smooth.convert(mode) if mode in ("RGBA", "LA") else smooth.convert("RGB").convert(mode)


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(name, folder, **arguments):
    """The one line that an extractor is refused with."""
    with pytest.raises(EstLoraError) as raised, open_extractor(name, folder=folder, cache=None, **arguments):
        pytest.fail("it was opened")
    said = str(raised.value)
    assert "\n" not in said
    assert said.endswith(".")
    assert len(said) < 600
    return said


def look(name, folder, *pictures):
    with open_extractor(name, folder=folder, cache=None) as extractor:
        return extractor.features(pictures)
