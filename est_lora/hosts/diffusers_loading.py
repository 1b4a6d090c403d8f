"""Models in diffusers' folder format, and diffusers' schedulers by the names people know them by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from est_lora.errors import EstLoraError, nearest, quote, reason

_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++2m-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++2s": ("DPMSolverSinglestepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2-a": ("KDPM2AncestralDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


def device_and_dtype(device: str | None, dtype: str | None) -> tuple[str, torch.dtype]:
    """What to compute on and in: as asked, else the fastest device there is, and float16 on CUDA alone.

    Raises:
        EstLoraError: there is no such device here, or it is no such type.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EstLoraError(f"The device {quote(device)} can't be used here; cpu always can.") from error
    if dtype is None:
        dtype = "float16" if device.startswith("cuda") else "float32"
    if dtype not in _DTYPES:
        raise EstLoraError(f"--dtype can't be {quote(dtype)}: it is one of {', '.join(_DTYPES)}.")
    return device, _DTYPES[dtype]


def load_pipeline(folder: Path, device: str, dtype: torch.dtype) -> Any:
    """The Stable Diffusion 1, 2 or XL pipeline in `folder`, safetensors only, nothing downloaded.

    Raises:
        EstLoraError: there is no such model, or it can't be loaded.
    """
    index = folder / "model_index.json"
    try:
        kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except OSError as error:
        raise EstLoraError(
            f"{quote(folder)} holds no model in diffusers' folder format: there is no readable model_index.json in it."
        ) from error
    except (ValueError, AttributeError) as error:
        raise EstLoraError(f"{quote(index)} is damaged: it isn't a JSON object.") from error
    if kind not in _PIPELINES:
        raise EstLoraError(f"{quote(folder)} is a {quote(kind)}: generate takes a {' or a '.join(_PIPELINES)}.")
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()  # what can't be done is said by the sentences below
    transformers.utils.logging.disable_progress_bar()
    try:
        pipe = getattr(diffusers, kind).from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True
        )
        return pipe.to(device)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise EstLoraError(f"The model in {quote(folder)} can't be loaded on {device}: {reason(error)}") from error


def set_scheduler(pipe: Any, name: str) -> None:
    """Gives `pipe` another scheduler, by its name in `SCHEDULERS`.

    Raises:
        EstLoraError: there is no such scheduler, or it can't run what this model predicts.
    """
    if name not in SCHEDULERS:
        near = nearest(name, SCHEDULERS) or sorted(SCHEDULERS)
        raise EstLoraError(f"There is no scheduler {quote(name)}: did you mean {' or '.join(near)}?")
    kind, options = SCHEDULERS[name]
    predicts = pipe.scheduler.config.get("prediction_type", "epsilon")
    scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config, **options)
    if not _runs(scheduler):
        raise EstLoraError(
            f"The scheduler {quote(name)} can't run a model with {predicts} prediction: try ddim or dpm++2m."
        )
    pipe.scheduler = scheduler


def _runs(scheduler: Any) -> bool:
    """Whether `scheduler` takes this model's kind of prediction, tried on a copy with an empty picture."""
    trial = type(scheduler).from_config(scheduler.config)
    picture = torch.zeros(1, 1, 4, 4)
    trial.set_timesteps(20)
    try:
        trial.step(picture, trial.timesteps[0], picture)
    except (NotImplementedError, ValueError):
        return False
    return True
