"""What the fusion needs from a WebUI's loaded model. Hosts are told apart by what they have, never by a version."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from est_lora import clock
from est_lora.fusion import find, modules_of, original_weight
from est_lora.gate import FusionPlan
from est_lora.hosts.webui.steps import has_list
from est_lora.lora import LayerId, LoraFile, Numbers, Shape, UNetLayout, Weight
from est_lora.lora.names import TEXT_ENCODERS, UNET, read_name


class Host(ABC):
    """One loaded checkpoint in one WebUI."""

    def __init__(self, sd_model: Any) -> None:
        """Takes the WebUI's own model object."""
        self.sd_model = sd_model
        self.checkpoint = _checkpoint(sd_model)

    @property
    @abstractmethod
    def unet(self) -> nn.Module:
        """What is called once for every noise level, or oftener."""

    @abstractmethod
    def level(self, timestep: Tensor, kwargs: Mapping[str, Any]) -> float:
        """The noise level of a call of the UNet, in the units of `starts`."""

    @abstractmethod
    def starts(self, sampler: Any, p: Any, steps: int) -> list[float]:
        """The noise levels at which the steps of `sampler` begin, in full, largest first."""

    @abstractmethod
    def tau(self, timestep: Tensor, kwargs: Mapping[str, Any]) -> float:
        """The progress of the picture at a call of the UNet."""

    @abstractmethod
    def text_weight(self, part: str, name: str) -> tuple[Weight, Shape] | None:
        """What reads the original weight of a layer of a text encoder, and its shape; None where there is none."""

    @abstractmethod
    def encoding(self, plan: FusionPlan) -> AbstractContextManager[list[str]]:
        """While it lasts, text is encoded with both files' parts; it yields the names of layers that aren't there."""

    @abstractmethod
    def tidy(self) -> int:
        """Takes off what a fusion that ended badly may have left on the text encoders; returns how much there was."""

    @abstractmethod
    def backup(self, name: str, module: nn.Module) -> Tensor | None:
        """The original of a weight that the host has changed for its own LoRAs, or None where it hasn't."""

    @abstractmethod
    def settle(self, module: nn.Module) -> bool:
        """Has the host put its own LoRAs into a layer now, if it hasn't yet; whether it leaves the weight alone then.

        Called for each layer when the UNet is about to be called for the first time.
        """

    @property
    def merged(self) -> object:
        """What of its own LoRAs the host wants to be in the weights. When this changes, it writes into them."""
        return None

    @property
    def obstacle(self) -> str | None:
        """Why there can be no fusion with this checkpoint, as a sentence; None where there can."""
        if any(LayerId(UNET, name).is_attention for name in self.modules):
            return None
        return (
            "EST-LoRA works in the UNet of Stable Diffusion 1, 2 and XL, and this checkpoint has none: it is a"
            f" {type(unwrapped_model(self.unet)).__name__}."
        )

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The modules of the UNet by diffusers' names."""
        named = {}
        for original, module in modules_of(self.unet).items():
            if original and (name := _read_name(original, self.layout)):
                named[name.layer.name] = module
        return named

    @cached_property
    def layout(self) -> UNetLayout:
        """The block structure of the UNet."""
        return UNetLayout.of_original(modules_of(self.unet))

    def still_loaded(self) -> bool:
        """Whether the checkpoint is still that with which this began: a refiner may be loaded into the same modules."""
        return _checkpoint(self.sd_model) is self.checkpoint

    def fit(self, file: LoraFile, numbers: defaultdict[LayerId, Numbers]) -> LoraFile:
        """`file`, its updates given the weights of this checkpoint, and `numbers` as in `LoraFile.on`.

        Raises:
            EstLoraError: it is for another model.
        """
        file = file.on(UNET, self._unet_weight, numbers)
        for part in TEXT_ENCODERS:
            file = file.on(part, lambda name, part=part: self.text_weight(part, name), numbers)  # type: ignore[misc]
        return file

    def _unet_weight(self, name: str) -> tuple[Weight, Shape] | None:
        module = find(self.modules, name)
        return None if module is None else self.original(f"{self._unet_names[module]}.weight", module)

    @cached_property
    def _unet_names(self) -> dict[nn.Module, str]:
        return {module: f"diffusion_model.{name}" for name, module in modules_of(self.unet).items()}

    def original(self, name: str, module: nn.Module) -> tuple[Weight, Shape] | None:
        """What reads the weight `module` came with, which the host calls `name`, and its shape; None: it can't be read."""
        found = original_weight(module)
        if found is None:
            return None

        def read() -> Tensor:
            kept = self.backup(name, module)
            return found[0]() if kept is None else kept.detach()

        return read, found[1]


def step_starts(host: Host, p: Any) -> list[float]:
    """The noise levels at which the steps of the job's sampler begin; empty for a sampler without such a list."""
    sampler = p.sampler
    if not has_list(sampler.func):
        return []
    from modules.sd_samplers_common import setup_img2img_steps

    is_second = getattr(p, "is_hr_pass", False)
    steps = p.steps
    if is_second or hasattr(p, "init_images"):
        steps, _ = setup_img2img_steps(p, (p.hr_second_pass_steps or p.steps) if is_second else None)
    return host.starts(sampler, p, steps)


def progress(host: Host, starts: list[float], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """`tau` of a call of the UNet: by its noise level, or by `starts` where there are any."""
    timestep = args[1] if len(args) > 1 else kwargs["timesteps"]
    if starts:
        return clock.from_step(host.level(timestep, kwargs), starts)
    return host.tau(timestep, kwargs)


def device_of(args: tuple[Any, ...]) -> torch.device | None:
    """What a call of the UNet computes on, by its first argument."""
    return args[0].device if args and isinstance(args[0], Tensor) else None


def scalar(tensor: Tensor) -> float:
    """The first number in it: all rows of a call share one noise level."""
    return float(tensor.flatten()[0])


def unwrapped_model(model: nn.Module) -> nn.Module:
    """The model itself, where torch.compile is wrapped around it."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


# A picture's set-up is mostly this, and the names of a model's modules stay the same.
_read_name = lru_cache(maxsize=1 << 13)(read_name)


def _checkpoint(sd_model: Any) -> Any:
    return getattr(sd_model, "sd_checkpoint_info", None)
