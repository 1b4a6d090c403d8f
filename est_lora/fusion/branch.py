"""The branch engine: a forward hook adds `up(down(x))` to what a layer returns. No weight is ever touched."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from est_lora.errors import EstLoraError
from est_lora.gate import BOTH, STYLE, SUBJECT, LayerPlan
from est_lora.lora import LowRankUpdate, Update

Shape = tuple[int, ...]
_SIZES = ("in_features", "out_features", "in_channels", "out_channels", "kernel_size")


class Term:
    """One update at its strength, ready to be added to a layer's output.

    The tensors stay outside the module and follow the input's device and dtype: the base weight's dtype may be one
    that nothing can be computed in.
    """

    def __init__(self, update: Update, weight: float, module: nn.Module) -> None:
        """Fits `update`, applied at strength `weight`, to `module`, whose shape it has."""
        self._update = update
        # Padding, stride and any tiling patched onto it are the module's own.
        self._convolve: Callable[[Tensor, Tensor, None], Tensor] | None = getattr(module, "_conv_forward", None)
        # A 1 x 1 convolution and a linear layer are the same thing, and files don't agree on which of the two it is.
        self._kernel: Shape = () if self._convolve is None else tuple(module.kernel_size)  # type: ignore[arg-type]
        self._inputs: int = module_shape(module)[1]
        self._scale = update.scale * weight if isinstance(update, LowRankUpdate) else weight
        self._cast: tuple[Tensor, Tensor | None] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """`dW x`, without the bias."""
        if self._cast is None or self._cast[0].device != x.device or self._cast[0].dtype != x.dtype:
            self._cast = self._for(x)
        first, up = self._cast
        out = functional.linear(x, first) if self._convolve is None else self._convolve(x, first, None)
        out = out * self._scale
        if up is None:
            return out
        return functional.linear(out, up) if self._convolve is None else functional.conv2d(out, up)

    def _for(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """A LoRA's two thin factors, or the dense update of any other kind, on the device and in the dtype of `x`."""
        update = self._update
        first = update.down if isinstance(update, LowRankUpdate) else update.dense()
        first = first.reshape(first.shape[0], self._inputs, *self._kernel).to(x.dtype).to(x.device)
        if not isinstance(update, LowRankUpdate):
            return first, None
        return first, update.up.reshape(*update.up.shape[:2], *(1 for _ in self._kernel)).to(x.dtype).to(x.device)


class BranchLayer:
    """The hook on one module: adds the terms that act now."""

    def __init__(self, plan: LayerPlan, module: nn.Module, subject_weight: float, style_weight: float) -> None:
        """Prepares both updates of `plan` for `module`.

        Raises:
            EstLoraError: an update's shape isn't the module's.
        """
        inner = module
        while isinstance(wrapped := getattr(inner, "base_layer", None), nn.Module):  # a user's own peft adapter
            inner = wrapped
        shape = module_shape(inner)
        used = {segment.acts for segment in plan.segments}
        self._terms: dict[str, tuple[Term, ...]] = {}
        for acts, update, weight in ((SUBJECT, plan.subject, subject_weight), (STYLE, plan.style, style_weight)):
            if update is None or not used & {acts, BOTH}:
                continue
            if not update.fits(shape):
                raise EstLoraError(
                    f"The {acts} doesn't fit this model: its update of {plan.layer.name} is {_by(update.shape)}, the"
                    f" layer is {_by(shape)}; choose a LoRA and a model of the same family."
                )
            self._terms[acts] = (Term(update, weight, inner),)
        self._terms[BOTH] = tuple(term for terms in self._terms.values() for term in terms)
        self._active: tuple[Term, ...] = ()

    def activate(self, acts: str) -> None:
        """From now on `acts` (subject, style, both, none) is added."""
        self._active = self._terms.get(acts, ())

    def hangs_on(self, module: nn.Module) -> bool:
        """Whether `module` runs this hook."""
        return any(hook is self for hook in module._forward_hooks.values())

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The forward hook."""
        for term in self._active:
            output = output + term(args[0]).to(output.dtype)
        return output


def remove_branches(model: nn.Module) -> int:
    """Takes every branch hook off `model`, whoever left it there; returns how many there were."""
    found = 0
    for module in model.modules():
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, BranchLayer)]:
            del module._forward_hooks[key]
            found += 1
    return found


def module_shape(module: nn.Module) -> Shape:
    """(out, in) of a linear layer, (out, in, kh, kw) of a convolution with a kernel larger than 1 x 1; () of others.

    Read off what the module says of itself: a quantised weight has another shape than the matrix it stands for.
    """
    sizes: dict[str, Any] = {name: getattr(module, name, None) for name in _SIZES}
    if isinstance(sizes["in_features"], int):
        return (sizes["out_features"], sizes["in_features"])
    if isinstance(sizes["in_channels"], int) and sizes["kernel_size"]:
        kernel = tuple(sizes["kernel_size"])
        return (sizes["out_channels"], sizes["in_channels"], *(kernel if math.prod(kernel) > 1 else ()))
    return ()


def _by(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "neither linear nor a convolution"
