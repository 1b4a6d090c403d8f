"""The session: a plan carried out on a model, one noise level at a time."""

from __future__ import annotations

import logging
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import filterfalse
from types import TracebackType
from typing import Any

import torch
from torch import nn

from est_lora.errors import EstLoraError, reason
from est_lora.fusion.acting import Acting
from est_lora.fusion.branch import BranchLayer, SharedInput
from est_lora.fusion.merge import MergedLayer, is_plain, merged_into, without_autocast
from est_lora.fusion.modules import find, module_shape, modules_of, unwrapped
from est_lora.gate import NONE, FusionPlan, LayerPlan, Segment
from est_lora.lora.names import UNET

log = logging.getLogger(__name__)

# Where original weights wait while others take their place.
DEVICE, CPU, NEVER = "device", "cpu", "never"
# The projections that a self-attention calls with one tensor, and a cross-attention.
_SHARING = {"attn1": ("to_q", "to_k", "to_v"), "attn2": ("to_k", "to_v")}


@dataclass(eq=False)
class _Layer:
    """One layer of the plan that this model has, and what carries it out."""

    plan: LayerPlan
    module: nn.Module
    acting: Acting
    engine: BranchLayer | MergedLayer
    acts: str = NONE


class FusionSession:
    """Carries out `plan` on `model`: `attach()`, `at(tau)` before each call of the model, `detach()`.

    While it is attached, a layer has a forward hook (the branch engine) or other values for a weight (the merge engine).
    The hooks are gone and the weights are the original ones after `detach()`, after the `with` block (however it ends),
    and when the session is garbage-collected.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: FusionPlan,
        part: str = UNET,
        modules: Mapping[str, nn.Module] | None = None,
        originals: str = DEVICE,
        may_merge: Callable[[nn.Module], bool] | None = None,
    ) -> None:
        """Prepares nothing yet.

        Args:
            model: the `part` of a pipeline that layers belong to.
            plan: what every layer does.
            part: `unet`, `text_encoder` or `text_encoder_2`.
            modules: the modules of `model` by diffusers' names, where it has others itself.
            originals: where weights wait while others take their place: `device`, where they are, if there is room for
                both; `cpu`, in main memory; `never`: with `engine = auto`, no weight is exchanged.
            may_merge: told each layer before its weight is exchanged for the first time, when the model is about to be
                called: the host may bring the weight up to date, and says whether it leaves it alone from then on.
        """
        self.model = model
        self.plan = plan
        self.part = part
        self.tau: float | None = None
        self.missing: tuple[str, ...] = ()
        self._modules = modules
        self._originals = originals
        self._may_merge = may_merge
        self._layers: list[_Layer] = []
        self._is_decided = False
        self._is_compiled = False
        self._ran = False
        self._starts: list[float] = []
        self._interval: int | None = None
        self._release: weakref.finalize | None = None  # type: ignore[type-arg]

    @property
    def attached(self) -> bool:
        """Whether the model runs with this plan: not before `attach`, nor once another session took its place."""
        if self._release is None or not self._release.alive:
            return False
        return all(layer.engine.attached for layer in self._layers[:1])

    @property
    def ran(self) -> bool:
        """Whether any layer was seen to be called since the last `attach`."""
        return self._ran or any(layer.engine.ran for layer in self._layers)

    @property
    def merged(self) -> int:
        """How many layers have nothing to do in a call, since their updates are in the weights."""
        return len(self._merging)

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
        """Takes the model, in place of any earlier session that still has it. Nothing acts before `at`.

        Raises:
            EstLoraError: an update's shape isn't its layer's, or the model has none of the layers. Nothing is attached.
        """
        self.detach()
        layers = self._matched()
        modules = [*self.model.modules()]
        self._is_compiled = any(map(_is_compiled, modules))
        if stale := _remove_from(modules):
            log.warning("An earlier fusion was still on this model (%d layers); it has been taken off.", stale)
        # Registered before the first layer is touched: an interrupt in the loop leaves none behind.
        self._release = weakref.finalize(self, _remove, layers)
        try:
            mergeable = self._mergeable(layers, modules)
            for layer in layers:
                if layer.module in mergeable:
                    layer.engine = MergedLayer(layer.module, layer.acting, self._originals == CPU)
                layer.engine.attach()
        except BaseException:
            self.detach()
            _remove_from(modules)  # an interrupt may fall between hanging a hook and noting its handle
            raise
        self._layers = layers
        self._ran = False
        self._is_decided = False
        self._starts = sorted({segment.start for layer in layers for segment in layer.plan.segments})
        self._interval = None
        if self._is_compiled:
            self._decide(None)  # in a call of compiled code it would be too late for hooks

    def at(self, tau: float, device: torch.device | None = None) -> None:
        """The model is about to be called at progress `tau` in [0, 1].

        Args:
            tau: see above.
            device: what it is about to compute on, where that is known: a weight that isn't there is being streamed.

        Raises:
            EstLoraError: the session isn't attached.
        """
        if not self.attached:
            raise EstLoraError("This fusion session isn't attached to its model: call attach() first.")
        self.tau = tau
        interval = bisect_right(self._starts, tau)
        if interval != self._interval:
            if not self._is_decided:
                self._decide(device)
            try:
                self._activate(tau)
            except RuntimeError as error:  # of a device that has no memory left
                if not self.merged:
                    raise
                log.warning("There is no room for other weights (%s): layers add the updates instead.", reason(error))
                self.unmerge()
            self._interval = interval

    def unmerge(self) -> None:
        """Gives all weights back, and goes on with hooks: somebody else is about to change weights."""
        self._branch(self._merging)
        if self.tau is not None:
            self._activate(self.tau)

    def detach(self) -> None:
        """Leaves the model as it was. May be called at any time, and again."""
        self._ran = self.ran
        if self._release is not None and self._release.alive:
            self._release()
            self._recompile()  # torch before 2.6 fails where it looks for the hooks that it compiled
        self._layers = []

    def __enter__(self) -> FusionSession:
        self.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    @property
    def _merging(self) -> list[_Layer]:
        return [layer for layer in self._layers if isinstance(layer.engine, MergedLayer)]

    def _activate(self, tau: float) -> None:
        changed = [(layer, acts) for layer in self._layers if (acts := layer.plan.acts(tau)) != layer.acts]
        with without_autocast([layer.module for layer, _ in changed]):
            for layer, acts in changed:
                layer.engine.activate(acts)
                layer.acts = acts

    def _mergeable(self, layers: Sequence[_Layer], everything: Sequence[nn.Module]) -> set[nn.Module]:
        """The modules whose weights may be exchanged, as far as can be told before the model is called."""
        engine = self.plan.config.engine
        if self.part != UNET or engine == "branch" or (engine == "auto" and self._originals == NEVER):
            return set()
        if any("_diffusers_hook" in vars(module) for module in everything):
            return set()  # weights come and go
        users = Counter(map(_address, everything))
        modules = (layer.module for layer in layers if not layer.acting.change_bias)
        return {module for module in modules if is_plain(module) and users[_address(module)] == 1}

    def _decide(self, device: torch.device | None) -> None:
        """Which layers keep the merge engine, now that the model is about to be called and its weights have settled."""
        self._is_decided = True
        settled = [layer for layer in self._merging if self._may_merge is None or self._may_merge(layer.module)]
        kept = [layer for layer in settled if is_plain(layer.module, device)]
        if self._originals != CPU and not _is_room_for([layer.module for layer in kept]):
            kept = []
        self._branch([*filterfalse(set(kept).__contains__, self._merging)])
        if self.part == UNET and self.plan.config.engine == "merge" and len(kept) < len(self._layers):
            log.warning(
                "engine = merge: %d of %d layers keep the branch engine, as their weights are quantised, shared, streamed"
                " or the host's to change, or there is no room for a second copy.",
                *(len(self._layers) - len(kept), len(self._layers)),
            )
        if not self._is_compiled:
            self._share()
            watched = kept[0].engine if kept else None
            if isinstance(watched, MergedLayer):
                watched.watch()

    def _branch(self, layers: Sequence[_Layer]) -> None:
        for layer in layers:
            layer.engine.remove()
            layer.engine, layer.acts = BranchLayer(layer.module, layer.acting), NONE
            layer.engine.attach()
        self._recompile()

    def _share(self) -> None:
        """Layers that are called with one tensor make their first products together."""
        branches = {
            layer.plan.layer.name: layer.engine
            for layer in self._layers
            if isinstance(layer.engine, BranchLayer) and len(module_shape(layer.module)) == 2
        }
        for parent in {name.rpartition(".")[0] for name in branches}:
            names = (f"{parent}.{leaf}" for leaf in _SHARING.get(parent.rpartition(".")[2], ()))
            together = [branches[name] for name in names if name in branches]
            if len(together) > 1:
                shared = SharedInput(together)
                for branch in together:
                    branch.share(shared)

    def _recompile(self) -> None:
        """What was compiled without hooks never looks for any again."""
        if self._is_compiled and self.merged < len(self._layers):
            torch.compiler.reset()

    def _matched(self) -> list[_Layer]:
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
                acting = Acting.of_plan(plan, module, *strengths)
                matched.append(_Layer(plan, module, acting, BranchLayer(module, acting)))
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


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


def remove_fusion(model: nn.Module) -> int:
    """Takes every hook off `model` and every merged update out of it, whoever left it there; returns how many."""
    return _remove_from(model.modules())


def _remove_from(modules: Iterable[nn.Module]) -> int:
    found: list[BranchLayer | MergedLayer] = []
    for module in modules:
        found += [hook for hook in module._forward_hooks.values() if isinstance(hook, BranchLayer)]
        if (merged := merged_into(module)) is not None:
            found.append(merged)
    for engine in found:
        engine.remove()
    return len(found)


def _remove(layers: Sequence[_Layer]) -> None:
    for layer in layers:
        layer.engine.remove()


def _address(module: nn.Module) -> int:
    """Where the weight of a module lies; 0 for a module without one."""
    weight = module._parameters.get("weight")
    return 0 if weight is None or weight.is_meta else weight.data_ptr()


def _is_room_for(modules: Sequence[nn.Module]) -> bool:
    """Whether their weights fit a second time, in half of the memory that is free: the model needs some to compute."""
    weights: list[Any] = [module.weight for module in modules]
    if not weights:
        return True
    needed, device = sum(weight.nbytes for weight in weights), weights[0].device
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        try:
            import psutil
        except ImportError:  # nobody tells
            return True
        free = psutil.virtual_memory().available
    return bool(2 * needed <= free)
