"""Tiny extractors made on the spot, in the folders that the published ones come in, and pictures to look at."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from est_lora.discrepancy import open_extractor
from est_lora.errors import EstLoraError

REVISION = "733b42a211ebe03aa7327050699cfcee7cd96123"
ARCHITECTURE = "vit_small_patch16_224"
SMALLER = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2, "drop_path_rate": 0.5}
PREPROCESSING = {
    "input_size": [3, 32, 32],
    "interpolation": "bicubic",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "crop_pct": 0.9,
    "crop_mode": "center",
}
CONFIG = {"architecture": ARCHITECTURE, "model_args": SMALLER, "pretrained_cfg": PREPROCESSING}
PROCESSOR = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
DROPOUT = {"attention_dropout": 0.5}
TEXT = VISION | {"num_hidden_layers": 1, "vocab_size": 99}


def randomly(model):
    """A model that isn't being trained, all of whose weights matter: some begin as zeros or ones."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return model.eval()


def write_dino(folder, dtype=torch.float32):
    """Writes a vision transformer; returns it."""
    import timm

    model = randomly(timm.create_model(ARCHITECTURE, num_classes=0, **SMALLER)).to(dtype).float()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({key: weight.to(dtype) for key, weight in model.state_dict().items()}, folder / "model.safetensors")
    return model


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
    clip_processor().save_pretrained(folder)
    return encoder


def clip_processor():
    import transformers

    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    return kind(**PROCESSOR)


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
