"""AUTOMATIC1111's WebUI: its Lora extension merges into weights at each layer's next call, and keeps the originals."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from est_lora import clock
from est_lora.gate import BOTH, STYLE, SUBJECT, FusionPlan, LayerPlan
from est_lora.hosts.webui.host import Host, scalar
from est_lora.lora import Shape, Update, Weight
from est_lora.lora.names import TEXT_ENCODERS

# Where a text encoder's layers are in a model of open_clip, whose q, k and v are one matrix.
_OPEN_CLIP = {
    "self_attn.q_proj": "attn_q_proj",
    "self_attn.k_proj": "attn_k_proj",
    "self_attn.v_proj": "attn_v_proj",
    "self_attn.out_proj": "attn_out_proj",
    "mlp.fc1": "mlp_c_fc",
    "mlp.fc2": "mlp_c_proj",
}
_FUSED = ("_q_proj", "_k_proj", "_v_proj", "_out_proj")
_LAYERS = "text_model.encoder.layers."


class A1111Host(Host):
    """One checkpoint in AUTOMATIC1111's WebUI."""

    @property
    def unet(self) -> nn.Module:
        """The original UNet; ControlNet and others exchange its `forward`, not the module."""
        return self.sd_model.model.diffusion_model

    @property
    def obstacle(self) -> str | None:
        """Also an engine in place of the UNet, which has no layers to hang anything on."""
        from modules import sd_unet

        if sd_unet.current_unet is not None:
            return (
                "EST-LoRA can't reach into the compiled UNet (TensorRT) that is selected: choose None under Settings ->"
                " SD Unet."
            )
        return super().obstacle

    def tau(self, timestep: Tensor, kwargs: Mapping[str, Any]) -> float:
        """By the timestep, which may be fractional."""
        return clock.from_timestep(scalar(timestep), len(self.sd_model.alphas_cumprod))

    def level(self, timestep: Tensor, kwargs: Mapping[str, Any]) -> float:
        """The timestep."""
        return scalar(timestep)

    def starts(self, sampler: Any, p: Any, steps: int) -> list[float]:
        """Timesteps."""
        if hasattr(sampler, "get_timesteps"):
            return sampler.get_timesteps(p, steps).flip(0).tolist()
        sigmas = sampler.get_sigmas(p, steps)
        wrap = sampler.model_wrap
        return [scalar(wrap.sigma_to_t(sigma.to(wrap.sigmas.device).reshape(1))) for sigma in sigmas if sigma > 0]

    def text_weight(self, part: str, name: str) -> tuple[Weight, Shape] | None:
        """The weight of a layer of CLIP, or its part of the one matrix that open_clip has for q, k and v."""
        key = self._key(part, name)
        owner, index = self._owner(key)
        if not isinstance(owner, nn.MultiheadAttention):
            return None if owner is None else self.original(key, owner)
        width = owner.embed_dim

        def read() -> Tensor:
            kept = getattr(owner, "network_weights_backup", None) or (owner.in_proj_weight, owner.out_proj.weight)
            return (kept[1] if index == 3 else kept[0][index * width : (index + 1) * width]).detach()

        return read, (width, width)

    @contextmanager
    def encoding(self, plan: FusionPlan) -> Iterator[list[str]]:
        """One more network in the host's list, of text-encoder layers alone, for as long as text is encoded.

        The host merges it like its own at the next call of each layer. It has to be gone again before the UNet runs:
        the host would take a backup of every layer of the UNet, though the network has nothing for it.
        """
        networks = sys.modules["networks"]
        layers = self._network_layers(plan)
        missing = [layer.layer.name for layer in plan.text_layers if self._owner(self._key_of(layer))[0] is None]
        if not layers:
            yield missing
            return
        network = _network(plan, layers)
        networks.loaded_networks.append(network)
        try:
            yield missing
        finally:
            if network in networks.loaded_networks:
                networks.loaded_networks.remove(network)
            with torch.no_grad():
                for owner in {self._owner(key)[0] for key in layers}:  # at once, not at their next call
                    networks.network_apply_weights(owner)

    def tidy(self) -> int:
        """The network of ours in the host's list; what it merged, the host takes out at each layer's next call."""
        loaded = getattr(sys.modules.get("networks"), "loaded_networks", [])
        stale = [network for network in loaded if isinstance(network, _Network)]
        for network in stale:
            loaded.remove(network)
        return len(stale)

    def backup(self, name: str, module: nn.Module) -> Tensor | None:
        """As the built-in Lora extension keeps it."""
        kept = getattr(module, "network_weights_backup", None)
        return kept if isinstance(kept, Tensor) else None

    def settle(self, module: nn.Module) -> bool:
        """Has the Lora extension do what it would do when the layer is called: afterwards would be too late.

        It would take what we have merged for the checkpoint's own weight, keep that as its backup, and bring it back.
        """
        networks = sys.modules.get("networks")
        if networks is None:
            return True
        from modules import shared

        if getattr(shared.opts, "lora_functional", False):
            return False  # it restores the weight before each call
        try:
            networks.network_apply_weights(module)
        except RuntimeError:  # it has lost its backup
            return False
        return True

    @property
    def merged(self) -> object:
        """By what the Lora extension tells whether a layer is up to date."""
        loaded = getattr(sys.modules.get("networks"), "loaded_networks", [])
        return tuple((each.name, each.te_multiplier, each.unet_multiplier, each.dyn_dim) for each in loaded)

    def _network_layers(self, plan: FusionPlan) -> dict[str, _Layer]:
        config = plan.config
        layers: dict[str, _Layer] = {}
        for layer in plan.text_layers:
            acts = layer.segments[0].acts
            both = ((SUBJECT, layer.subject, config.subject_te), (STYLE, layer.style, config.style_te))
            terms = [(update, strength) for who, update, strength in both if update and acts in (who, BOTH)]
            key = self._key_of(layer)
            owner, _ = self._owner(key)
            if terms and owner is not None:
                layers[key] = _Layer(terms)
            if terms and isinstance(owner, nn.MultiheadAttention):  # the host wants all four, or none
                for end in _FUSED:
                    layers.setdefault(key.removesuffix(_fused_end(key)) + end, _Layer([]))
        return layers

    def _owner(self, key: str) -> tuple[nn.Module | None, int]:
        """The module that the host merges a layer into, and which of the four projections of its attention it is."""
        end = _fused_end(key)
        owner = self._text_modules.get(key.removesuffix(end)) if end else None
        if isinstance(owner, nn.MultiheadAttention):
            return owner, _FUSED.index(end)
        return self._text_modules.get(key), -1

    @cached_property
    def _text_modules(self) -> dict[str, nn.Module]:
        """The modules of the text encoders by the names that the host's networks know them by."""
        mapping = getattr(self.sd_model, "network_layer_mapping", {})
        return {name: module for name, module in mapping.items() if name and not name.startswith("diffusion_model")}

    def _key_of(self, layer: LayerPlan) -> str:
        return self._key(layer.layer.part, layer.layer.name)

    def _key(self, part: str, name: str) -> str:
        is_xl = getattr(self.sd_model, "is_sdxl", False)
        if part != TEXT_ENCODERS[0] and not is_xl:
            return ""  # there is only one
        prefix = f"{TEXT_ENCODERS.index(part)}_" if is_xl else ""
        plain = f"{prefix}transformer_{name.replace('.', '_')}"
        if plain in self._text_modules or not name.startswith(_LAYERS):
            return plain
        index, _, rest = name.removeprefix(_LAYERS).partition(".")
        return f"{prefix}model_transformer_resblocks_{index}_{_OPEN_CLIP.get(rest, rest)}"


class _Layer:
    """What the host's loop over networks asks of a network's layer."""

    def __init__(self, terms: list[tuple[Update, float]]) -> None:
        self._terms = terms

    def calc_updown(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The change of `weight`, and of its bias."""
        change = torch.zeros(weight.shape, dtype=torch.float64)
        bias: Tensor | None = None
        for update, strength in self._terms:
            change += update.dense().reshape(change.shape) * strength
            if update.bias is not None:
                part = update.bias.double() * strength
                bias = part if bias is None else bias + part
        # In float32 also for a half-precision weight: the host adds in what it is given, and rounds once.
        return change.to(weight.device, torch.float32), None if bias is None else bias.to(weight.device, torch.float32)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """With the host's setting that merges nothing."""
        change, bias = self.calc_updown(x.new_empty(output.shape[-1], x.shape[-1]))
        return output + functional.linear(x.float(), change, bias).to(output.dtype)


class _Network(SimpleNamespace):
    """What the host's list of networks holds."""


def _network(plan: FusionPlan, layers: dict[str, _Layer]) -> _Network:
    config = plan.config
    return _Network(
        # The host takes layers whose networks' names and strengths haven't changed for up to date.
        name=f"est-lora {plan.subject.path} {plan.style.path} {config.method}",
        te_multiplier=config.subject_te,
        unet_multiplier=config.style_te,
        dyn_dim=None,
        modules=layers,
        bundle_embeddings={},
        network_on_disk=SimpleNamespace(shorthash=None),
        mentioned_name=None,
        mtime=0,
    )


def _fused_end(key: str) -> str:
    return next((end for end in _FUSED if key.endswith(end)), "")
