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
from est_lora.fusion import FusionSession, find, modules_of, original_weight
from est_lora.gate import FusionPlan
from est_lora.lora import LoraFile, Shape, UNetLayout, Weight
from est_lora.lora.names import TEXT_ENCODERS, UNET

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
    with carry_out(pipe, load_plan(config, pipe)) as session:
        yield session


@contextmanager
def carry_out(pipe: Any, plan: FusionPlan) -> Iterator[FusionSession]:
    """Inside the `with` block, `pipe` draws by a plan, as by `load_plan` or one made of that.

    Yields:
        The session.

    Raises:
        EstLoraError: the pipeline can't draw by a plan. Nothing is attached then.
    """
    unet, config = unet_of(pipe), plan.config
    _check_scheduler(pipe.scheduler)
    session = FusionSession(unet, plan)

    @torch.compiler.disable  # a UNet compiled in place would compile this with it
    def tell(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if session.attached:  # not where a later fusion of the same model has taken its place
            timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
            sample = kwargs["sample"] if "sample" in kwargs else args[0]
            session.at(_progress(pipe.scheduler, timestep, config.clock), sample.device)

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


def unet_of(pipe: Any) -> nn.Module:
    """The model that a fusion works in.

    Raises:
        EstLoraError: the pipeline has none.
    """
    unet = getattr(pipe, "unet", None)
    if not isinstance(unet, nn.Module):
        raise EstLoraError(f"A {type(pipe).__name__} has no UNet: fuse takes Stable Diffusion 1, 2 and XL pipelines.")
    return unet


def _text_sessions(pipe: Any, plan: FusionPlan) -> Iterator[FusionSession]:
    for part in TEXT_ENCODERS:
        encoder = getattr(pipe, part, None)
        if isinstance(encoder, nn.Module):
            yield FusionSession(encoder, plan, part)
        elif count := sum(layer.layer.part == part for layer in plan.text_layers):
            log.warning("%d layers of the files are for a %s, which this pipeline doesn't have.", count, part)


def load_plan(config: FusionConfig, pipe: Any = None) -> FusionPlan:
    """Reads the two files that `config` names by path, and decides every layer.

    Args:
        config: the request.
        pipe: the pipeline they are for: files in the original spelling are read by its UNet's layout (SD1.5's and
            SDXL's without), and kinds that depend on the model's weights can't be decided without it.

    Raises:
        EstLoraError: a file is missing or unusable, or the two don't go together.
    """
    models = {part: getattr(pipe, part, None) for part in (UNET, *TEXT_ENCODERS)}
    parts = {part: modules_of(model) for part, model in models.items() if isinstance(model, nn.Module)}
    layout = UNetLayout.of(parts[UNET]) if UNET in parts else None
    subject, style = (_on(parts, LoraFile.load(path, layout)) for path in config.pair())
    return FusionPlan.of(subject, style, config)


def _on(parts: dict[str, dict[str, nn.Module]], file: LoraFile) -> LoraFile:
    """`file`, its updates given the weights of the parts of the pipeline."""

    def weight_of(name: str) -> tuple[Weight, Shape] | None:
        module = find(modules, name)
        return None if module is None else original_weight(module)

    for part, modules in parts.items():
        file = file.on(part, weight_of)
    return file


def _progress(scheduler: Any, timestep: Tensor | float, ticks: str) -> float:
    _check_scheduler(scheduler)  # it may have been exchanged since
    t = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
    if ticks == "step" and scheduler.timesteps is not None:
        return clock.from_step(t, scheduler.timesteps.tolist())
    if _is_flow(scheduler):
        return clock.from_flow_sigma(t / scheduler.config.num_train_timesteps)
    return clock.from_timestep(t, scheduler.config.num_train_timesteps)


def _is_flow(scheduler: Any) -> bool:
    # The flow-matching schedulers have a shift and no prediction type.
    config = scheduler.config
    return config.get("prediction_type", "flow_prediction" if "shift" in config else None) == "flow_prediction"


def _check_scheduler(scheduler: Any) -> None:
    """Refuses schedulers that call the model with something else than a timestep.

    Raises:
        EstLoraError: it is an EDM scheduler, one with continuous timesteps, or of an unknown type.
    """
    config = scheduler.config
    discrete = "prediction_type" in config and config.get("timestep_type") != "continuous"
    if "sigma_data" in config or not (discrete or _is_flow(scheduler)):
        name = type(scheduler).__name__
        raise EstLoraError(f"The progress of a picture can't be read off {name}: use a DDIM, Euler or DPM++ scheduler.")
