"""The session: a plan carried out on a model, one noise level at a time."""

from __future__ import annotations

import logging
import weakref
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from types import TracebackType

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from est_lora.errors import EstLoraError
from est_lora.fusion.branch import BranchLayer, remove_branches
from est_lora.fusion.modules import find, module_shape, modules_of, unwrapped
from est_lora.gate import NONE, FusionPlan, LayerPlan, Segment
from est_lora.lora.names import UNET

log = logging.getLogger(__name__)


class FusionSession:
    """Carries out `plan` on `model`: `attach()`, `at(tau)` before each call of the model, `detach()`.

    Nothing of the model is changed but forward hooks, and those are gone after `detach()`, after the `with` block
    (however it ends), and when the session is garbage-collected.
    """

    def __init__(
        self, model: nn.Module, plan: FusionPlan, part: str = UNET, modules: Mapping[str, nn.Module] | None = None
    ) -> None:
        """Prepares nothing yet.

        Args:
            model: the `part` of a pipeline that layers belong to.
            plan: what every layer does.
            part: `unet`, `text_encoder` or `text_encoder_2`.
            modules: the modules of `model` by diffusers' names, where it has others itself.
        """
        self.model = model
        self._modules = modules
        self.plan = plan
        self.part = part
        self.tau: float | None = None
        self.missing: tuple[str, ...] = ()
        self._layers: list[tuple[BranchLayer, LayerPlan, nn.Module]] = []
        self._ran = False
        self._starts: list[float] = []
        self._interval: int | None = None
        self._release: weakref.finalize | None = None  # type: ignore[type-arg]

    @property
    def attached(self) -> bool:
        """Whether the model runs with this plan: not before `attach`, nor once another session took its place."""
        if self._release is None or not self._release.alive:
            return False
        return all(layer.hangs_on(module) for layer, _, module in self._layers[:1])

    @property
    def ran(self) -> bool:
        """Whether any layer was called since the last `attach`."""
        return self._ran or any(layer.ran for layer, _, _ in self._layers)

    @property
    def remarks(self) -> list[str]:
        """What a user should know: of the files, and of layers that this model doesn't have."""
        said = self.plan.remarks if self.part == UNET else []
        if self.missing:
            count, example = len(self.missing), self.missing[0]
            said.append(
                "Layers of the files that this model doesn't have, or that are neither linear nor convolutions, are left"
                f" out: {count}, e.g. {example}."
            )
        return said

    def attach(self) -> None:
        """Hangs the hooks on the model, in place of any that an earlier session left there. Nothing acts before `at`.

        Raises:
            EstLoraError: an update's shape isn't its layer's, or the model has none of the layers. Nothing is attached.
        """
        self.detach()
        layers = self._matched()
        if stale := remove_branches(self.model):
            log.warning("An earlier fusion was still on this model (%d layers); it has been taken off.", stale)
        if _is_compiled(self.model):
            torch.compiler.reset()  # what was compiled without hooks never looks for any again
        handles: list[RemovableHandle] = []
        # Registered before the first hook hangs: an interrupt in the loop leaves none behind.
        self._release = weakref.finalize(self, _remove, handles)
        try:
            for layer, _, module in layers:
                handles.append(module.register_forward_hook(layer))
        except BaseException:
            self.detach()
            remove_branches(self.model)  # an interrupt may fall between hanging a hook and noting its handle
            raise
        self._ran = False
        self._layers = layers
        self._starts = sorted({segment.start for _, plan, _ in layers for segment in plan.segments})
        self._interval = None

    def at(self, tau: float) -> None:
        """The model is about to be called at progress `tau` in [0, 1].

        Raises:
            EstLoraError: the session isn't attached.
        """
        if not self.attached:
            raise EstLoraError("This fusion session isn't attached to its model: call attach() first.")
        self.tau = tau
        interval = bisect_right(self._starts, tau)
        if interval != self._interval:
            for layer, plan, _ in self._layers:
                layer.activate(plan.acts(tau))
            self._interval = interval

    def detach(self) -> None:
        """Leaves the model as it was. May be called at any time, and again."""
        if self._release is not None and self._release.alive:
            self._release()
            if _is_compiled(self.model):
                torch.compiler.reset()  # torch before 2.6 fails where it looks for the hooks that it compiled
        self._ran = self.ran
        self._layers = []

    def __enter__(self) -> FusionSession:
        self.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def _matched(self) -> list[tuple[BranchLayer, LayerPlan, nn.Module]]:
        modules = modules_of(self.model) if self._modules is None else self._modules
        config = self.plan.config
        if self.part == UNET:
            layers, strengths = self.plan.layers, (config.subject_weight, config.style_weight)
        else:
            layers = tuple(plan for plan in self.plan.text_layers if plan.layer.part == self.part)
            strengths = (config.subject_te, config.style_te)
        matched, missing = [], []
        for plan in layers:
            if not _ever_acts(plan.segments):
                continue
            name = plan.layer.name
            module = find(modules, name)
            if module is None or not module_shape(unwrapped(module)):  # not there, or an embedding or a norm
                missing.append(name)
            elif _is_fused_away(name, modules):
                raise EstLoraError(
                    f"The projections of {name.rpartition('.')[0]} are fused into one, which leaves no place for a LoRA:"
                    " call pipe.unfuse_qkv_projections() first."
                )
            else:
                layer = BranchLayer(plan, module, *strengths)
                matched.append((layer, plan, module))
        if missing and not matched and self.part == UNET:
            raise EstLoraError(
                f"None of the {len(missing)} layers that the two LoRAs change is in this model, e.g. {missing[0]}:"
                " choose LoRAs that were made for it."
            )
        self.missing = tuple(missing)
        return matched


def _is_fused_away(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether diffusers calls another module, of q, k and v in one, in place of this projection."""
    parent, _, leaf = name.rpartition(".")
    processor = getattr(modules.get(parent), "processor", None)
    return leaf in ("to_q", "to_k", "to_v") and type(processor).__name__.startswith("Fused")


def _ever_acts(segments: Sequence[Segment]) -> bool:
    return any(segment.acts != NONE for segment in segments)


def _is_compiled(model: nn.Module) -> bool:
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()
