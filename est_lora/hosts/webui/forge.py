"""Forge, reForge, Forge Neo: the model is in patchers, text encoders are in the names of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from est_lora import clock
from est_lora.fusion import FusionSession, find, modules_of, remove_fusion
from est_lora.gate import FusionPlan
from est_lora.hosts.webui.host import Host, scalar
from est_lora.lora import Shape, Weight

# What the family calls the text encoders, by what diffusers calls them. SD2's stands alone, so it is the first.
_ENCODERS = {"text_encoder": ("clip_l", "clip_h"), "text_encoder_2": ("clip_g",)}

# What a layer has whose weight is made in each call: a LoRA that isn't merged, patches, a scale of fp8.
_COMPUTES_WEIGHT = ("forge_online_loras", "weight_function", "scale_weight")


class ForgeHost(Host):
    """One checkpoint in Forge or one of its kin."""

    @property
    def unet(self) -> nn.Module:
        """The module itself; patchers come and go around it."""
        return self._patcher.model.diffusion_model

    @property
    def _patcher(self) -> Any:
        return self.sd_model.forge_objects.unet

    @property
    def _prediction(self) -> Any:
        """What turns sigmas into timesteps; asked for at each call, as it may be exchanged."""
        model = self._patcher.model
        return model.predictor if hasattr(model, "predictor") else model.model_sampling

    @property
    def _is_flow(self) -> bool:
        prediction = self._prediction
        by_class = any(base.__name__ == "CONST" for base in type(prediction).__mro__)
        return by_class or getattr(prediction, "prediction_type", None) == "const"

    def tau(self, timestep: Tensor, kwargs: Mapping[str, Any]) -> float:
        """By the sigma of flow models, by the timestep of others."""
        if self._is_flow:
            return clock.from_flow_sigma(self.level(timestep, kwargs))
        return clock.from_timestep(scalar(timestep), len(self._prediction.sigmas))

    def level(self, timestep: Tensor, kwargs: Mapping[str, Any]) -> float:
        """The sigma."""
        sigmas = kwargs.get("transformer_options", {}).get("sigmas")
        return scalar(self._prediction.sigma(timestep) if sigmas is None else sigmas)

    def starts(self, sampler: Any, p: Any, steps: int) -> list[float]:
        """Sigmas."""
        if hasattr(sampler, "get_sigmas"):
            return [float(sigma) for sigma in sampler.get_sigmas(p, steps) if sigma > 0]
        return self._prediction.sigma(sampler.get_timesteps(p, steps).flip(0)).tolist()

    def text_weight(self, part: str, name: str) -> tuple[Weight, Shape] | None:
        """The weight of a linear layer of CLIP."""
        for prefix, encoder in self._encoders.get(part, {}).items():
            module = find(modules_of(encoder), name)
            if module is not None:
                return self.original(f"{prefix}.{name}.weight", module)
        return None

    @contextmanager
    def encoding(self, plan: FusionPlan) -> Iterator[list[str]]:
        """Hooks, as in the UNet."""
        missing: list[str] = []
        with ExitStack() as attached:
            for part in dict.fromkeys(layer.layer.part for layer in plan.text_layers):
                encoders = self._encoders.get(part, {})
                if not encoders:
                    missing += [layer.layer.name for layer in plan.text_layers if layer.layer.part == part]
                for encoder in encoders.values():
                    session = attached.enter_context(FusionSession(encoder, plan, part))
                    session.at(0.0)
                    missing += session.missing
            yield missing

    def tidy(self) -> int:
        """Hooks of ours on text encoders."""
        return sum(remove_fusion(encoder) for encoders in self._encoders.values() for encoder in encoders.values())

    def backup(self, name: str, module: nn.Module) -> Tensor | None:
        """As the patcher keeps it while a LoRA is merged."""
        for patcher in (self._patcher, getattr(self.sd_model.forge_objects.clip, "patcher", None)):
            loader = getattr(getattr(patcher, "model", None), "lora_loader", patcher)
            kept = getattr(loader, "backup", {}).get(name)
            if kept is not None:
                return getattr(kept, "weight", kept)
        return None

    def settle(self, module: nn.Module) -> bool:
        """The loader has merged its LoRAs by now, unless it was asked to add them in each call."""
        return not any(getattr(module, name, None) for name in _COMPUTES_WEIGHT)

    @cached_property
    def _encoders(self) -> dict[str, dict[str, nn.Module]]:
        """For each part, its encoders by the host's names."""
        clip = getattr(self.sd_model.forge_objects.clip, "cond_stage_model", None)
        found: dict[str, dict[str, nn.Module]] = {}
        for part, names in _ENCODERS.items():
            for name in names:
                encoder = getattr(getattr(clip, name, None), "transformer", None)
                if isinstance(encoder, nn.Module):
                    found.setdefault(part, {})[f"{name}.transformer"] = encoder
        return found
