"""The ways of applying two LoRAs that are compared: each is a session that is attached, told `tau` and detached."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from benchmarks.published import PublishedSession, energy, factors, largest_entries
from est_lora.config import FusionConfig
from est_lora.fusion import FusionSession
from est_lora.gate import BOTH, STYLE, SUBJECT, FusionPlan, LayerPlan

_FILES = (SUBJECT, STYLE)


class Session(Protocol):
    """What carries a plan out on a model, as a `FusionSession` does."""

    def attach(self) -> None:
        """Prepares the model."""

    def at(self, tau: float) -> None:
        """The model is about to be called at progress `tau`."""

    def detach(self) -> None:
        """Leaves the model as it was."""


@dataclass(frozen=True)
class Way:
    """One way of applying two LoRAs.

    Attributes:
        title: what tables call it.
        session: makes what carries a plan out on a model.
        config: what is asked of the plan.
        needs: a package that it can't do without, if any.
        on_gpu: whether it differs from another way only there.
    """

    title: str
    session: Callable[[Any, FusionPlan], Session]
    config: FusionConfig = field(default_factory=FusionConfig)
    needs: str = ""
    on_gpu: bool = False

    @property
    def missing(self) -> bool:
        """Whether the package that it needs isn't installed."""
        return bool(self.needs) and importlib.util.find_spec(self.needs) is None


class _Layer(NamedTuple):
    module: nn.Module
    original: nn.Parameter
    plan: LayerPlan
    factors: tuple[tuple[Tensor, Tensor], ...]


class MergedBeforehand:
    """Every weight is `W + dW_subject + dW_style` for the whole picture, which is what two `<lora:>` do.

    The originals stay where they are, and the model gets other tensors: detaching costs nothing.
    """

    def __init__(self, model: nn.Module, plan: FusionPlan) -> None:
        self._model = model
        self._plan = plan
        self._layers: list[_Layer] = []

    def attach(self) -> None:
        """Gives the model other weights."""
        for plan in self._plan.layers:
            module = self._model.get_submodule(plan.layer.name)
            original = module.weight
            thin = factors(plan.subject, original), factors(plan.style, original)
            module.weight = nn.Parameter(torch.empty_like(original), requires_grad=False)
            self._layers.append(self._begun(_Layer(module, original, plan, thin)))

    def at(self, tau: float) -> None:
        """Nothing depends on `tau`."""

    def detach(self) -> None:
        """Gives the model its own weights back."""
        while self._layers:
            layer = self._layers.pop()
            layer.module.weight = layer.original

    def _begun(self, layer: _Layer) -> _Layer:
        _merge(layer, BOTH)
        return layer._replace(factors=())


class RemergedEachStep(MergedBeforehand):
    """Before every step, every weight is merged anew from the original one: what per-step LoRA extensions do."""

    def at(self, tau: float) -> None:
        """Merges everything, whatever has changed."""
        for layer in self._layers:
            _merge(layer, layer.plan.acts(tau))

    def _begun(self, layer: _Layer) -> _Layer:
        return layer


class PeftAdapters:
    """Two adapters of diffusers and peft, both active at weight 1, not merged."""

    def __init__(self, model: UNet2DConditionModel, plan: FusionPlan) -> None:
        self._model = model
        self._files = [
            _peft_file([(layer.layer.name, getattr(layer, file)) for layer in plan.layers]) for file in _FILES
        ]

    def attach(self) -> None:
        """What `pipe.load_lora_weights` (of files already read) and `pipe.set_adapters` do."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # of the first adapter
            for name, (tensors, alphas) in zip(_FILES, self._files, strict=True):
                self._model.load_lora_adapter(
                    dict(tensors), prefix="unet", adapter_name=name, network_alphas=dict(alphas), low_cpu_mem_usage=True
                )
        self._model.set_adapters(list(_FILES), [1.0, 1.0])

    def at(self, tau: float) -> None:
        """Nothing depends on `tau`."""

    def detach(self) -> None:
        """Takes the adapters off again."""
        if getattr(self._model, "peft_config", None):
            self._model.unload_lora()


# The keys are what the command line calls them. Neighbours are timed side by side, see `measure`: those that hold other
# weights in memory are kept apart, as what is free decides what the automatic choice is.
WAYS = {
    "merged": Way("both merged beforehand", MergedBeforehand),
    "peft": Way("diffusers + peft, two adapters", PeftAdapters, needs="peft"),
    "remerging": Way("re-merging at each step", RemergedEachStep),
    "published-est": Way("EST-LoRA as published", partial(PublishedSession, score=energy), FusionConfig(balance="l1")),
    "published-k": Way(
        "K-LoRA as published", partial(PublishedSession, score=largest_entries), FusionConfig(method="k-lora")
    ),
    "merge": Way("ours: merge", FusionSession, FusionConfig(engine="merge")),
    "merge-cpu": Way(
        "ours: merge, originals in main memory",
        partial(FusionSession, originals="cpu"),
        FusionConfig(engine="merge"),
        on_gpu=True,
    ),
    "branch": Way("ours: branch", FusionSession, FusionConfig(engine="branch")),
    "auto": Way("ours: automatic choice", FusionSession),
}


def _merge(layer: _Layer, acting: str) -> None:
    """The weight becomes the sum; the update that doesn't act is multiplied by 0 and computed all the same."""
    base: Tensor = layer.original
    merged: Tensor = layer.module.weight
    for file, (up, down) in zip(_FILES, layer.factors, strict=True):
        torch.addmm(base, up * float(acting in (file, BOTH)), down, out=merged)
        base = merged


def _peft_file(layers: list[tuple[str, Any]]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tensors and the alphas of a file as diffusers' loader has them once it has read it."""
    tensors, alphas = {}, {}
    for name, update in layers:
        tensors[f"unet.{name}.lora_A.weight"] = update.down.flatten(1)
        tensors[f"unet.{name}.lora_B.weight"] = update.up.flatten(1)
        alphas[f"unet.{name}.alpha"] = update.scale * update.down.shape[0]
    return tensors, alphas
