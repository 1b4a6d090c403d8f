"""The merge engine: while an update acts, a layer's weight is `W0 + dW`, and nothing is left to do in a call."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from est_lora.fusion.acting import Acting
from est_lora.fusion.modules import TAKEN, unhook
from est_lora.lora import Update

_PLAIN = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
# What layers have whose weights somebody else manages: peft, accelerate, diffusers.
_MANAGED = ("base_layer", "_hf_hook", "_diffusers_hook")


class MergedLayer:
    """One module's weight, exchanged for its sum with the updates that act.

    The original is never written to: the parameter is given other values, and its own back at the end. So nothing drifts,
    however often a layer switches, and there is nothing to compute when it ends.

    Attributes:
        ran: whether it was ever called, since it has been watched.
    """

    def __init__(self, module: nn.Module, acting: Acting, on_cpu: bool = False) -> None:
        """Prepares the exchange.

        Args:
            module: a module that `is_plain`.
            acting: the updates that act in it, of its shape.
            on_cpu: whether the original waits in main memory, wherever it was.
        """
        self._module = module
        self._acting = acting
        self._on_cpu = on_cpu
        self._weight: Any = None
        self._original: Tensor | None = None
        self._writes: int | None = None
        self.ran = False

    @property
    def original(self) -> Tensor:
        """What the weight is without any update."""
        own: Any = self._module.weight
        original: Tensor = own.data if self._original is None else self._original
        return original

    @property
    def attached(self) -> bool:
        """Whether the module's weight is this session's."""
        return merged_into(self._module) is self

    def attach(self) -> None:
        """Takes the layer, whose weight is as it was until `activate`."""
        setattr(self._module, TAKEN, self)

    def activate(self, acts: str) -> None:
        """From now on `acts` (subject, style, both, none) is in the weight.

        Raises:
            RuntimeError: the device has no memory for another weight. What is in this one may be half done then; the
                original is as it was.
        """
        weight: Any = self._module.weight
        if weight is not self._weight:  # the host has put another one there
            self._put_back()
            self._weight = weight
        updates = self._acting.of(acts)
        if not updates:
            self._put_back()
            return
        original = self.original
        mine = weight.data if self._original is not None and _writes(weight) == self._writes else None
        merged = _sum(original.to(weight.device), updates, mine)
        if self._original is None:
            self._original = original.cpu() if self._on_cpu else original
        weight.data = merged
        self._writes = _writes(weight)

    def watch(self) -> None:
        """Looks whether the layer is called at all: a model may run in a form that passes its layers by."""
        self._module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """The forward hook, which is gone after the first call."""
        self.ran = True
        unhook(module, self)

    def remove(self) -> None:
        """Gives the weight back as it was. May be called at any time, and again."""
        unhook(self._module, self)
        if self.attached:
            self._put_back()
            delattr(self._module, TAKEN)

    def _put_back(self) -> None:
        """The original, on the device and in the dtype that the host has meanwhile moved the layer to.

        Unless the host has written into the weight: then that is what it wants to be there.
        """
        weight, original = self._weight, self._original
        if original is not None and _writes(weight) == self._writes and weight.shape == original.shape:
            weight.data = original.to(weight.device, weight.dtype)
        self._original = None


def is_plain(module: nn.Module, device: torch.device | None = None) -> bool:
    """Whether a sum can take the place of the module's weight: floats of its own, and nobody else manages them.

    Args:
        module: the layer as the model calls it.
        device: what the model computes on, where that is known; a weight elsewhere is being streamed.
    """
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.is_meta or weight.dtype not in _PLAIN:
        return False
    if device is not None and weight.device != device:
        return False
    return weight.layout is torch.strided and not any(hasattr(module, name) for name in _MANAGED)


def without_autocast(modules: Sequence[nn.Module]) -> AbstractContextManager[object]:
    """While it lasts, sums for these modules' weights aren't made in the half precision that a host may compute in."""
    kinds = {weight.device.type for module in modules for weight in module.parameters(recurse=False)}
    disabled = ExitStack()
    for kind in kinds & {"cpu", "cuda", "xpu"}:
        disabled.enter_context(torch.autocast(kind, enabled=False))
    return disabled


def merged_into(module: nn.Module) -> MergedLayer | None:
    """What has the module's weight for a session."""
    found = getattr(module, TAKEN, None)
    return found if isinstance(found, MergedLayer) else None


def _sum(original: Tensor, updates: Sequence[tuple[Update, float]], into: Tensor | None = None) -> Tensor:
    """`W0` and the updates at their strengths, added in float32 and rounded once.

    Args:
        original: `W0`, (out, in) or (out, in, kh, kw).
        updates: each with its strength; at least one.
        into: a tensor like `original`, which is overwritten: fresh memory costs more than the sum does.
    """
    exact = torch.promote_types(original.dtype, torch.float32)
    with torch.inference_mode(original.is_inference()), torch.no_grad():  # the new weight is to be of the same mode
        if into is None or into.stride() != original.stride() or into.is_inference() != original.is_inference():
            into = torch.empty_like(original)
        total, last = original.to(exact).flatten(1), len(updates) - 1
        for index, (update, strength) in enumerate(updates):
            is_there = index == last and into.dtype == exact and into.is_contiguous()
            out = into.flatten(1) if is_there else None
            factors = update.factors()
            if factors is None:
                dense = update.dense().to(exact).to(original.device).reshape(total.shape)
                total = torch.add(total, dense, alpha=strength, out=out)
            else:
                up, down = (factor.to(original.device).to(exact).flatten(1) for factor in factors[:2])
                total = torch.addmm(total, up, down, alpha=factors.scale * strength, out=out)
        return into if total.data_ptr() == into.data_ptr() else into.copy_(total.reshape(into.shape))


def _writes(weight: Tensor) -> int | None:
    """How often a tensor has been written to; None where torch doesn't count."""
    try:
        return weight._version
    except RuntimeError:
        return None
