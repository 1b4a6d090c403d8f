"""What `est-lora generate` does: a series of pictures with one model and one pair of LoRAs."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from est_lora import __version__
from est_lora.config import BETA_UNMEASURED, FusionConfig
from est_lora.discrepancy import identity
from est_lora.errors import EstLoraError
from est_lora.hosts import pictures
from est_lora.hosts.diffusers import fuse, load_plan
from est_lora.hosts.diffusers_loading import device_and_dtype, sampler_names, set_scheduler, settings_of
from est_lora.hosts.drawing import draw, size_of
from est_lora.hosts.measuring import measure, scheduled, told_by_sums
from est_lora.hosts.models import files_of, open_model
from est_lora.lora.reading import sha256
from est_lora.lora.scaling import config_beside
from est_lora.text import infotext

log = logging.getLogger(__name__)


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
        extractor, weights: where `beta` is to be measured, what compares the pictures, and the folder of its weights;
            None for the published ones.
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
    extractor: str = "dino"
    weights: Path | None = None


@dataclass(frozen=True)
class Output:
    """A file of the series: where it is, and whether it was there already."""

    path: Path
    found: bool = False


def generate(request: Request, say: Callable[[str], None] = log.info) -> Iterator[Output]:
    """Makes the pictures that aren't there yet, in the order of their seeds, then the contact sheets if there are several.

    Args:
        request: which.
        say: is told in a sentence what takes time, or is done otherwise than was asked.

    Raises:
        EstLoraError: something of the request can't be done. Nothing is written then, unless it shows in a later picture.
    """
    device, dtype = device_and_dtype(request.device, request.dtype)
    load_plan(request.fusion)  # says what is wrong with the files before minutes go into loading the model
    infotext.write(request.prompt, request.negative, {})  # and the same of the prompts
    identity(request.extractor, request.weights)  # and of what compares pictures
    pipe = open_model(request.model, request.configs, device, dtype)
    own = pipe.scheduler
    if request.scheduler is not None:
        set_scheduler(pipe, request.scheduler)
    size = request.size or size_of(pipe)
    sampler, schedule = sampler_names(pipe.scheduler)
    loras = [Path(path) for path in request.fusion.pair()]
    settings = filter(None, map(config_beside, loras))
    files = files_of(request.model, request.configs)
    sums = {path: sha256(path) for path in [*loras, *settings, *files]}
    fusion = request.fusion
    if fusion.takes_discrepancy:
        beta = _discrepancy(pipe, own, request, told_by_sums(sums[path] for path in files), say)
        fusion = dataclasses.replace(fusion, beta=beta)
    values = {
        "Steps": request.steps,
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": request.guidance,
        "Seed": 0,
        "Size": f"{size[0]}x{size[1]}",
        "Model hash": sums[request.model][:10] if request.model.is_file() else None,
        "Model": _name_of(request.model),
        **infotext.fusion(fusion),
        "EST-LoRA dtype": str(dtype).removeprefix("torch."),
        "EST-LoRA fingerprint": _fingerprint(sums.values(), pipe.scheduler),
        "Lora hashes": infotext.lora_hashes((path.stem, sha256(path, header=False)[:12]) for path in loras),
        "Version": f"est-lora {__version__}",
    }
    made: list[Path] = []
    with fuse(pipe, **dataclasses.asdict(fusion)):
        for seed in request.seeds:
            text = infotext.write(request.prompt, request.negative, {**values, "Seed": seed})
            path = there = pictures.find(request.folder, seed, text)
            if path is None:
                pipe.set_progress_bar_config(desc=f"picture {len(made) + 1} of {len(request.seeds)}")
                drawn = draw(
                    pipe,
                    prompt=request.prompt,
                    negative=request.negative,
                    steps=request.steps,
                    guidance=request.guidance,
                    seed=seed,
                    size=size,
                )
                path = pictures.save(drawn.images[0], request.folder, seed, text)
            made.append(path)
            yield Output(path, found=there is not None)
    if len(made) > 1:
        yield from map(Output, pictures.contact_sheets(made))


def _discrepancy(pipe: Any, own: Any, request: Request, model: str, say: Callable[[str], None]) -> float:
    """The pair's, remembered or measured with the model's own scheduler; where neither can be, what is taken for it."""
    try:
        with scheduled(pipe, own):
            return measure(
                pipe,
                *request.fusion.pair(),
                prompt=request.prompt,
                extractor=request.extractor,
                folder=request.weights,
                model=model,
                say=say,
            ).value
    except EstLoraError as error:
        say(f"The style discrepancy can't be measured, and for beta {BETA_UNMEASURED:g} is taken: {error}")
        return BETA_UNMEASURED


def _name_of(model: Path) -> str:
    return model.stem if model.is_file() else model.resolve().name


def _fingerprint(sums: Iterable[str], scheduler: Any) -> str:
    """12 hex digits of what the other keys don't say: all that the files hold, and all of the scheduler's settings."""
    name, settings = settings_of(scheduler)
    return hashlib.sha256("\n".join([*sums, name, *map(repr, settings)]).encode()).hexdigest()[:12]
