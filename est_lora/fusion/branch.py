"""The branch engine: a forward hook adds `up(down(x))` to what a layer returns. No weight is ever touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from est_lora.errors import EstLoraError
from est_lora.fusion.modules import module_shape, unwrapped
from est_lora.gate import BOTH, STYLE, SUBJECT, LayerPlan
from est_lora.lora import Shape, Update, misfit


class Term:
    """One update at its strength, ready to be added to a layer's output.

    The tensors stay outside the module and follow the input's device and dtype: the base weight's dtype may be one
    that nothing can be computed in.
    """

    def __init__(self, update: Update, weight: float, module: nn.Module) -> None:
        """Fits `update`, applied at strength `weight`, to `module`, whose shape it has."""
        self._update = update
        self._weight = weight
        # Padding, stride and any tiling patched onto it are the module's own.
        self._convolve: Callable[[Tensor, Tensor, None], Tensor] | None = getattr(module, "_conv_forward", None)
        # A 1 x 1 convolution and a linear layer are the same thing, and files don't agree on which of the two it is.
        self._kernel: Shape = () if self._convolve is None else tuple(module.kernel_size)  # type: ignore[arg-type]
        self._inputs: int = module_shape(module)[1]
        self._cast: _Cast | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """`dW x`, and what the update adds to the bias."""
        if self._cast is None or self._cast.first.device != x.device or self._cast.first.dtype != x.dtype:
            self._cast = self._for(x)
        first, up, scale, bias = self._cast
        out = functional.linear(x, first) if self._convolve is None else self._convolve(x, first, None)
        out = out * scale
        if up is not None:
            out = functional.linear(out, up) if self._convolve is None else functional.conv2d(out, up)
        return out if bias is None else out + bias

    def _for(self, x: Tensor) -> _Cast:
        """The two thin factors, or where it has none the dense update, on the device and in the dtype of `x`."""
        factors, bias = self._update.factors(), self._update.bias
        up, first, scale = factors or (None, self._update.dense(), 1.0)
        first = first.reshape(first.shape[0], self._inputs, *self._kernel)
        ones = [1] * len(self._kernel)
        if up is not None:
            up = up.reshape(*up.shape[:2], *ones).to(x.dtype).to(x.device)
        if bias is not None:
            bias = (bias.float() * self._weight).reshape(-1, *ones).to(x.dtype).to(x.device)
        return _Cast(first.to(x.dtype).to(x.device), up, scale * self._weight, bias)


class _Cast(NamedTuple):
    """`(up @ first * scale) x + bias`, or without `up` `(first * scale) x + bias`."""

    first: Tensor
    up: Tensor | None
    scale: float
    bias: Tensor | None


class BranchLayer:
    """The hook on one module: adds the terms that act now.

    Attributes:
        ran: whether it was ever called; a compiled model may pass hooks by.
    """

    def __init__(self, plan: LayerPlan, module: nn.Module, subject_weight: float, style_weight: float) -> None:
        """Prepares both updates of `plan` for `module`.

        Raises:
            EstLoraError: an update's shape isn't the module's, or it still waits for the model's own weight.
        """
        inner = unwrapped(module)
        shape = module_shape(inner)
        used = {segment.acts for segment in plan.segments}
        self._terms: dict[str, tuple[Term, ...]] = {}
        for acts, update, weight in ((SUBJECT, plan.subject, subject_weight), (STYLE, plan.style, style_weight)):
            if update is None or not used & {acts, BOTH}:
                continue
            if not update.fits(shape):
                raise misfit(f"The {acts}", plan.layer.name, update, shape)
            if update.needs_model:
                raise EstLoraError(
                    f"The {acts}'s update of {plan.layer.name} depends on the layer's own weight, and this plan was made"
                    " without the model: make it with the model's weights."
                )
            self._terms[acts] = (Term(update, weight, inner),)
        self._terms[BOTH] = tuple(term for terms in self._terms.values() for term in terms)
        self._active: tuple[Term, ...] = ()
        self.ran = False

    def activate(self, acts: str) -> None:
        """From now on `acts` (subject, style, both, none) is added."""
        self._active = self._terms.get(acts, ())

    def hangs_on(self, module: nn.Module) -> bool:
        """Whether `module` runs this hook."""
        return any(hook is self for hook in module._forward_hooks.values())

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The forward hook."""
        self.ran = True
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
