"""The style discrepancy of a pair in diffusers: remembered, or measured on two pictures, one with each LoRA alone.

from est_lora.hosts.measuring import measure

with fuse(pipe, subject, style, beta=measure(pipe, subject, style).value):
    ...
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from est_lora.config import FILES, FusionConfig
from est_lora.discrepancy import (
    DIGITS,
    Key,
    Memory,
    ProbeSettings,
    discrepancy,
    identity,
    open_extractor,
    probe_prompt,
    side_by_side,
)
from est_lora.errors import EstLoraError
from est_lora.hosts.diffusers import fuse, load_plan, unet_of
from est_lora.hosts.diffusers_loading import device_and_dtype, set_scheduler, settings_of
from est_lora.hosts.drawing import draw, random_kept, size_of
from est_lora.hosts.models import files_of, open_model
from est_lora.lora.reading import sha256
from est_lora.lora.scaling import config_beside

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

_SAMPLED = 1024  # entries of a tensor


@dataclass(frozen=True)
class Measurement:
    """A style discrepancy.

    Attributes:
        value: in [0, 2], rounded to 6 digits; what `beta` may be given.
        remembered: whether it was known already, so that nothing was drawn.
        png: the subject's picture on the left and the style's on the right; None where they aren't kept any more.
        pictures: where that is kept; None where it isn't.
    """

    value: float
    remembered: bool
    png: bytes | None
    pictures: Path | None


def measure(
    pipe: Any,
    subject: str | PathLike[str],
    style: str | PathLike[str],
    *,
    prompt: str = "",
    settings: ProbeSettings | None = None,
    extractor: str = "dino",
    folder: Path | None = None,
    cache: Path | None = None,
    memory: Memory | None = None,
    model: str | None = None,
    again: bool = False,
    say: Callable[[str], None] = log.info,
) -> Measurement:
    """The style discrepancy `D` of two LoRA files on a model. The pipe, and all random numbers, are as before.

    Not for use inside a `with fuse(pipe, ...)` block, whose fusion it would end.

    Args:
        pipe: a text-to-image pipeline of Stable Diffusion 1, 2 or XL.
        subject: path of the subject's LoRA.
        style: path of the style's LoRA.
        prompt: what to draw where not both files name words of their own.
        settings: how to draw, its sampler one of `SCHEDULERS`; None for `usual(pipe)`.
        extractor, folder, cache: what compares the pictures, as for `open_extractor`.
        memory: where values are remembered; None for the command line's.
        model: which model the pipe is, in any words; None to tell it by the pipe's weights, of which each tensor is
            looked at in a thousand places, and by the scheduler's settings.
        again: whether to measure also what is remembered.
        say: is told in a sentence what is about to take time.

    Raises:
        EstLoraError: it can't be measured.
    """
    config = FusionConfig(subject=subject, style=style)  # type: ignore[arg-type]
    pair = config.pair()
    _check(pipe)
    load_plan(config)  # says what is wrong with the files
    memory = Memory(memory_folder()) if memory is None else memory
    sums = [told_by_sums(map(sha256, filter(None, (Path(path), config_beside(Path(path)))))) for path in pair]
    key = Key(
        subject=sums[0],
        style=sums[1],
        checkpoint=_told_by_weights(pipe) if model is None else model,
        extractor=identity(extractor, folder),
        settings=usual(pipe) if settings is None else settings,
        prompt=probe_prompt(*pair, prompt),
    )
    found = None if again else memory.find(key)
    if found is not None:
        kept = memory.pictures(key)
        try:
            png = kept.read_bytes() if kept else None
        except OSError:  # another process needed the room
            kept = png = None
        return Measurement(found, remembered=True, png=png, pictures=kept)
    _warn(memory.remarks)
    with random_kept(), open_extractor(extractor, folder=folder, cache=cache) as opened:
        names = " and ".join(Path(path).stem for path in pair)
        say(f"The style discrepancy of {names} is measured, on two pictures of {key.settings.steps} steps.")
        drawn = _draw(pipe, pair, key)
        value = round(discrepancy(opened.features(drawn)), DIGITS)
    memory.keep(key, value, drawn)
    _warn(memory.remarks)
    return Measurement(value, remembered=False, png=side_by_side(*drawn), pictures=memory.pictures(key))


def measure_files(
    model: Path,
    configs: Path | None,
    subject: str,
    style: str,
    *,
    wishes: Mapping[str, Any],
    device: str | None = None,
    dtype: str | None = None,
    folder: Path | None = None,
    extractor: str = "dino",
    **request: Any,
) -> Measurement:
    """What `est-lora measure` does.

    Args:
        model, configs: as for `open_model`.
        subject, style: paths of the two LoRAs.
        wishes: what of `usual` is to be otherwise.
        device, dtype: where and in what to compute; None for the best there is.
        extractor, folder: what compares the pictures, as for `open_extractor`.
        request: `prompt` and `again`, as for `measure`.

    Raises:
        EstLoraError: it can't be measured.
    """
    where, kind = device_and_dtype(device, dtype)
    identity(extractor, folder)
    load_plan(FusionConfig(subject=subject, style=style))  # what is wrong is said before minutes go into loading
    pipe = open_model(model, configs, where, kind)
    settings = dataclasses.replace(usual(pipe), **wishes)
    called = told_by_sums(map(sha256, files_of(model, configs)))
    return measure(pipe, subject, style, settings=settings, extractor=extractor, folder=folder, model=called, **request)


def usual(pipe: Any) -> ProbeSettings:
    """How the pictures are drawn where nobody has another wish: of the model's own side, by Euler's method."""
    return dataclasses.replace(ProbeSettings.usual(min(size_of(pipe))), sampler="euler")


def memory_folder() -> Path:
    """Where the command line remembers: `est-lora` in the user's folder for what can be made again."""
    caches = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(caches) if os.path.isabs(caches) else Path("~/.cache").expanduser()) / "est-lora"


def told_by_sums(sums: Iterable[str]) -> str:
    """What several files are told by, from the SHA-256 of each; that of a single file is its own."""
    told = list(sums)
    return told[0] if len(told) == 1 else hashlib.sha256("\n".join(told).encode()).hexdigest()


@contextmanager
def scheduled(pipe: Any, scheduler: Any) -> Iterator[None]:
    """With another scheduler, as an object or by its name, for the time of the block."""
    own = pipe.scheduler
    try:
        if isinstance(scheduler, str):
            set_scheduler(pipe, scheduler)
        else:
            pipe.scheduler = scheduler
        yield
    finally:
        pipe.scheduler = own


def _draw(pipe: Any, pair: tuple[str, str], key: Key) -> tuple[Image, Image]:
    """One picture with each LoRA alone, all else the same."""
    settings, drawn = key.settings, []
    with scheduled(pipe, settings.sampler), _progress_bar(pipe) as bar:
        for number, role in enumerate(FILES, 1):
            bar(f"probe {number} of {len(FILES)}")
            with fuse(pipe, *pair, method=role, beta=0.0):
                made = draw(
                    pipe,
                    prompt=key.prompt,
                    negative="",
                    steps=settings.steps,
                    guidance=settings.guidance,
                    seed=settings.seed,
                    size=(settings.side, settings.side),
                )
            if any(getattr(made, "nsfw_content_detected", None) or ()):
                raise EstLoraError(
                    f"The picture with the {role} alone was blacked out by the model's safety checker: take another"
                    " seed or prompt for it, or give beta as a number."
                )
            drawn.append(made.images[0])
    return drawn[0], drawn[1]


@contextmanager
def _progress_bar(pipe: Any) -> Iterator[Callable[[str], None]]:
    """Gives what names the pipe's progress bar, for the time of the block."""
    attribute = "_progress_bar_config"  # which diffusers has no getter for
    before = vars(pipe).get(attribute)
    try:
        yield lambda text: pipe.set_progress_bar_config(**{**(before or {}), "desc": text})
    finally:
        if before is None:
            vars(pipe).pop(attribute, None)
        else:
            setattr(pipe, attribute, before)


def _check(pipe: Any) -> None:
    unet_of(pipe)
    if "image" in inspect.signature(type(pipe).__call__).parameters:
        name = type(pipe).__name__
        raise EstLoraError(
            f"A {name} begins with a picture, and measuring with noise: give a text-to-image pipeline of the same parts,"
            " as diffusers.AutoPipelineForText2Image.from_pipe makes it."
        )


def _told_by_weights(pipe: Any) -> str:
    """Which model a pipe is, its adapters included: of each tensor, name, type, shape and some entries."""
    digest = hashlib.sha256(repr(settings_of(pipe.scheduler)).encode())
    for part, model in sorted(pipe.components.items()):
        if not isinstance(model, nn.Module):
            continue
        for name, tensor in model.state_dict().items():
            if tensor.is_meta:
                raise EstLoraError(
                    f"The weights of the {part} aren't in memory: say which model it is (model=...), in any words."
                )
            flat = tensor.detach().flatten()
            some = flat[:: max(1, flat.numel() // _SAMPLED)].contiguous().cpu()
            digest.update(f"{part} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(some.view(torch.uint8).numpy().tobytes())
        for name, module in model.named_modules():
            if isinstance(scaling := getattr(module, "scaling", None), dict):  # of PEFT's adapters
                active = (scaling, getattr(module, "active_adapters", None), getattr(module, "disable_adapters", None))
                digest.update(f"{part} {name} {active}".encode())
    return digest.hexdigest()


def _warn(remarks: Iterable[str]) -> None:
    for remark in remarks:
        log.warning("%s", remark)
