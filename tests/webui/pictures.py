"""What the tests ask of a WebUI, and how far two of its pictures are apart."""

from __future__ import annotations

import pytest

FILES = [{}, {"text": True, "everything": True, "share": 0.15}]
HIRES = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.6}


def pair(webui, **how):
    """The names of a subject and a style; `how` is `write_lora`'s."""
    suffix = "-".join(sorted(how))
    return webui.lora(f"subject{suffix}", **how), webui.lora(f"style{suffix}", **how)


def est(subject, style, **knobs):
    """Our arguments in a request."""
    return {"subject": subject, "style": style, **knobs}


def sampler(webui, name):
    """What a request says of a sampler; skips the test where the WebUI hasn't got it, as some then take another."""
    name, karras, _ = name.partition(" Karras")
    if name not in [each["name"] for each in webui.api.get_samplers()]:
        pytest.skip(f"this WebUI has no sampler {name}")
    return {"sampler_name": name, "scheduler": "Karras" if karras else "Automatic"}


def furthest(one, other):
    """The largest difference of two pictures, in 0 ... 255."""
    return int(abs(one - other).max())
