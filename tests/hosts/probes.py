"""The two pictures of a style discrepancy, drawn and compared by the libraries' own means."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from est_lora.discrepancy import ProbeSettings
from est_lora.hosts.diffusers import fuse

SETTINGS = ProbeSettings(seed=3, side=24, steps=2, sampler="euler", guidance=4.0)
PROMPT = "a star"
PAIR = ("subject.safetensors", "style.safetensors")


def by_hand(pipe, pair, scheduler, prompt, settings):
    """Both pictures, and the discrepancy of them, with nothing but the libraries' own means."""
    pipe.scheduler, drawn = scheduler.from_config(pipe.scheduler.config), []
    for method in ("subject", "style"):
        generator = torch.Generator().manual_seed(settings.seed)
        request = {"height": settings.side, "width": settings.side, "num_inference_steps": settings.steps}
        request["negative_prompt"] = ""  # which isn't nothing to XL
        with fuse(pipe, *pair, method=method):
            drawn += pipe(prompt, guidance_scale=settings.guidance, generator=generator, **request).images
    return drawn, 1 - float(torch.cosine_similarity(*(look(picture).double() for picture in drawn), dim=0))


def look(picture):
    """What the library itself sees in a picture."""
    from transformers import ViTImageProcessor, ViTModel

    model = ViTModel.from_pretrained("weights", add_pooling_layer=False).eval()
    pixels = ViTImageProcessor.from_pretrained("weights")(images=picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model(pixels).last_hidden_state[0, 0]


def halves(png):
    with Image.open(io.BytesIO(png)) as both:
        pixels = np.asarray(both)
    return pixels[:, : pixels.shape[1] // 2], pixels[:, pixels.shape[1] // 2 :]


def edit(path):
    save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path)
