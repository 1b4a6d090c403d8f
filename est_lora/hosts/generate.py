"""What `est-lora generate` does: a series of pictures with one model and one pair of LoRAs."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from est_lora import __version__
from est_lora.config import FusionConfig
from est_lora.errors import EstLoraError, quote, reason
from est_lora.hosts import pictures
from est_lora.hosts.checkpoint import load_checkpoint
from est_lora.hosts.diffusers import fuse, load_plan
from est_lora.hosts.diffusers_loading import device_and_dtype, load_pipeline, sampler_names, set_scheduler
from est_lora.lora.reading import sha256
from est_lora.lora.scaling import config_beside
from est_lora.text import infotext

_CONFIGURATIONS = (".json", ".txt")  # also of schedulers and tokenizers


@dataclass(frozen=True)
class Request:
    """A series of pictures.

    Attributes:
        model: a folder in diffusers' format, or a checkpoint in one `.safetensors` file.
        configs: for a checkpoint, a folder in diffusers' format whose configurations serve.
        fusion: the two LoRAs and how they are fused.
        prompt, negative: what to draw, and what to keep away from.
        steps: how many sampling steps.
        guidance: the guidance scale.
        seeds: one a picture.
        size: width and height in pixels; None for the model's own.
        scheduler: one of `SCHEDULERS`; None for the model's own.
        device, dtype: where and in what to compute; None for the best there is.
        folder: where the pictures go.
    """

    model: Path
    fusion: FusionConfig
    prompt: str
    folder: Path
    configs: Path | None = None
    negative: str = ""
    steps: int = 28
    guidance: float = 7.0
    seeds: Sequence[int] = (0,)
    size: tuple[int, int] | None = None
    scheduler: str | None = None
    device: str | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Output:
    """A file of the series: where it is, and whether it was there already."""

    path: Path
    found: bool = False


def generate(request: Request) -> Iterator[Output]:
    """Makes the pictures that aren't there yet, in the order of their seeds, then the contact sheets if there are several.

    Raises:
        EstLoraError: something of the request can't be done. Nothing is written then, unless it shows in a later picture.
    """
    device, dtype = device_and_dtype(request.device, request.dtype)
    load_plan(request.fusion)  # says what is wrong with the files before minutes go into loading the model
    infotext.write(request.prompt, request.negative, {})  # and the same of the prompts
    pipe = _load(request, device, dtype)
    width, height = request.size or _size_of(pipe)
    sampler, schedule = sampler_names(pipe.scheduler)
    loras = [Path(path) for path in request.fusion.pair()]
    settings = filter(None, map(config_beside, loras))
    sums = {path: sha256(path) for path in [*loras, *settings, *_files_of(request)]}
    values = {
        "Steps": request.steps,
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": request.guidance,
        "Seed": 0,
        "Size": f"{width}x{height}",
        "Model hash": sums[request.model][:10] if request.model.is_file() else None,
        "Model": _name_of(request.model),
        **infotext.fusion(request.fusion),
        "EST-LoRA dtype": str(dtype).removeprefix("torch."),
        "EST-LoRA fingerprint": _fingerprint(sums.values(), pipe.scheduler),
        "Lora hashes": infotext.lora_hashes((path.stem, sha256(path, header=False)[:12]) for path in loras),
        "Version": f"est-lora {__version__}",
    }
    made: list[Path] = []
    with fuse(pipe, **dataclasses.asdict(request.fusion)):
        for seed in request.seeds:
            text = infotext.write(request.prompt, request.negative, {**values, "Seed": seed})
            path = there = pictures.find(request.folder, seed, text)
            if path is None:
                pipe.set_progress_bar_config(desc=f"picture {len(made) + 1} of {len(request.seeds)}")
                picture = _draw(pipe, request, seed, width, height)
                path = pictures.save(picture, request.folder, seed, text)
            made.append(path)
            yield Output(path, found=there is not None)
    if len(made) > 1:
        yield from map(Output, pictures.contact_sheets(made))


def _load(request: Request, device: str, dtype: torch.dtype) -> Any:
    if request.model.is_file() or (request.model.suffix == ".safetensors" and not request.model.is_dir()):
        pipe = load_checkpoint(request.model, request.configs, device, dtype)
    elif request.configs is not None:
        raise EstLoraError(
            f"--config is for a model in one file, and {quote(request.model)} isn't a file: leave --config out."
        )
    else:
        pipe = load_pipeline(request.model, device, dtype)
    if request.scheduler is not None:
        set_scheduler(pipe, request.scheduler)
    return pipe


def _draw(pipe: Any, request: Request, seed: int, width: int, height: int) -> Any:
    try:
        return pipe(
            prompt=request.prompt,
            negative_prompt=request.negative,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            width=width,
            height=height,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
    except EstLoraError:
        raise
    except (RuntimeError, ValueError) as error:  # out of memory, or more than this model or scheduler can do
        raise EstLoraError(f"The picture can't be made this way: {reason(error)}") from error


def _size_of(pipe: Any) -> tuple[int, int]:
    """Width and height in pixels that the model was made for."""
    latents = pipe.unet.config.sample_size
    height, width = (latents, latents) if isinstance(latents, int) else latents
    return width * pipe.vae_scale_factor, height * pipe.vae_scale_factor


def _name_of(model: Path) -> str:
    return model.stem if model.is_file() else model.resolve().name


def _fingerprint(sums: Iterable[str], scheduler: Any) -> str:
    """12 hex digits of what the other keys don't say: all that the files hold, and all of the scheduler's settings."""
    settings = {key: str(value) for key, value in scheduler.config.items() if not key.startswith("_")}
    told = [*sums, type(scheduler).__name__, *map(repr, sorted(settings.items()))]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]


def _files_of(request: Request) -> list[Path]:
    """The files of the model that a picture depends on."""
    if not request.model.is_file():
        return _files_in(request.model, (*_CONFIGURATIONS, ".safetensors"))
    return [request.model, *(_files_in(request.configs, _CONFIGURATIONS) if request.configs else [])]


def _files_in(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(place, name)) not in seen]
        found += [path for name in names if (path := Path(place, name)).suffix in endings and path.is_file()]
    return sorted(found)
