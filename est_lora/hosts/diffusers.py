"""diffusers as a host: any Stable Diffusion pipeline with a UNet, any of its schedulers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from est_lora import clock
from est_lora.config import FusionConfig
from est_lora.errors import EstLoraError
from est_lora.fusion import FusionSession
from est_lora.gate import FusionPlan
from est_lora.lora import LoraFile, UNetLayout
from est_lora.lora.names import TEXT_ENCODERS

log = logging.getLogger(__name__)


@contextmanager
def fuse(
    pipe: Any,
    subject: str | PathLike[str] | None = None,
    style: str | PathLike[str] | None = None,
    **knobs: object,
) -> Iterator[FusionSession]:
    """Inside the `with` block, `pipe` draws with both LoRAs, each layer at each noise level with the one it chose.

        with fuse(pipe, subject="character.safetensors", style="ink.safetensors", beta=0.4):
            pipe("a knight on a hill").images[0].save("knight.png")

    Args:
        pipe: a pipeline whose `unet` is a `UNet2DConditionModel`: StableDiffusionPipeline, StableDiffusionXLPipeline,
            their img2img and inpainting siblings.
        subject: path of the subject's LoRA.
        style: path of the style's LoRA.
        knobs: any row of `est_lora.config.FIELDS`, by its key.

    Yields:
        The session; its `plan` says what every layer does, its `remarks` what was left out.

    Raises:
        EstLoraError: a knob or a file can't be used. Nothing is attached then.
    """
    config = FusionConfig.of({"subject": subject, "style": style, **knobs})
    unet = getattr(pipe, "unet", None)
    if not isinstance(unet, nn.Module):
        raise EstLoraError(f"A {type(pipe).__name__} has no UNet: fuse takes Stable Diffusion 1, 2 and XL pipelines.")
    session = FusionSession(unet, load_plan(config, unet))

    @torch.compiler.disable  # a UNet compiled in place would compile this with it
    def tell(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if session.attached:  # not where a later fusion of the same model has taken its place
            timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
            session.at(_progress(pipe.scheduler, timestep, config.clock))

    with ExitStack() as undone:
        undone.callback(unet.register_forward_pre_hook(tell, with_kwargs=True).remove)
        sessions = [session, *_text_sessions(pipe, session.plan)]
        for each in sessions:
            undone.enter_context(each)
            for remark in each.remarks:
                log.warning("%s", remark)
        for each in sessions[1:]:
            each.at(0.0)  # a text encoder has no progress: what acts there acts always
        yield session


def _text_sessions(pipe: Any, plan: FusionPlan) -> Iterator[FusionSession]:
    for part in TEXT_ENCODERS:
        encoder = getattr(pipe, part, None)
        if isinstance(encoder, nn.Module):
            yield FusionSession(encoder, plan, part)
        elif count := sum(layer.layer.part == part for layer in plan.text_layers):
            log.warning("%d layers of the files are for a %s, which this pipeline doesn't have.", count, part)


def load_plan(config: FusionConfig, unet: nn.Module | None = None) -> FusionPlan:
    """Reads the two files that `config` names by path, and decides every layer.

    Args:
        config: the request.
        unet: the model they are for, which files in the original spelling are read by; SD1.5's and SDXL's without.

    Raises:
        EstLoraError: a file is missing or unusable, or the two don't go together.
    """
    layout = UNetLayout.of(name for name, _ in unet.named_modules()) if unet is not None else None
    subject, style = (LoraFile.load(path, layout) for path in config.pair())
    return FusionPlan.of(subject, style, config)


def _progress(scheduler: Any, timestep: Tensor | float, ticks: str) -> float:
    if "sigma_data" in scheduler.config:
        name = type(scheduler).__name__
        raise EstLoraError(f"The progress of a picture can't be read off {name}: use a DDIM, Euler or DPM++ scheduler.")
    t = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
    if ticks == "step":
        return clock.from_step(t, scheduler.timesteps.tolist())
    # The flow-matching schedulers have no such entry.
    if scheduler.config.get("prediction_type", "flow_prediction") == "flow_prediction":
        return clock.from_flow_sigma(t / scheduler.config.num_train_timesteps)
    return clock.from_timestep(t, scheduler.config.num_train_timesteps)
