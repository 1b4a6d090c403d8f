"""The branch engine: a forward hook adds `up(down(x))` to what a layer returns. No weight is ever touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from est_lora.fusion.acting import Acting
from est_lora.fusion.modules import module_shape, unhook, unwrapped
from est_lora.lora import Shape, Update


class Term:
    """One update at its strength, ready to be added to a layer's output.

    The tensors stay outside the module and follow the input's device and dtype: the base weight's dtype may be one
    that nothing can be computed in.
    """

    def __init__(self, update: Update, strength: float, module: nn.Module) -> None:
        """Fits `update`, applied at `strength`, to `module`, whose shape it has."""
        self._update = update
        self._strength = strength
        # Padding, stride and any tiling patched onto it are the module's own.
        self._convolve: Callable[[Tensor, Tensor, None], Tensor] | None = getattr(module, "_conv_forward", None)
        # A 1 x 1 convolution and a linear layer are the same thing, and files don't agree on which of the two it is.
        self._kernel: Shape = () if self._convolve is None else tuple(module.kernel_size)  # type: ignore[arg-type]
        self._inputs: int = module_shape(module)[1]
        self._cast: _Cast | None = None

    def thin_first(self, like: Tensor) -> Tensor | None:
        """The thin factor that meets the input of a linear layer, on the device and in the dtype of `like`, if any."""
        cast = self._for(like)
        return None if self._convolve is not None or cast.up is None else cast.first

    def __call__(self, x: Tensor, output: Tensor, inner: Tensor | None = None) -> Tensor:
        """`output` and what the update adds to it.

        Args:
            x: what the layer was called with.
            output: what it returned; it may be overwritten.
            inner: the product of `x` and `thin_first`, where somebody has it already.
        """
        first, up, scale, bias = self._for(x)
        if self._convolve is not None:
            out = self._convolve(x, first, None)
            out = out if up is None else functional.conv2d(out, up)
            output = torch.add(output, out.to(output.dtype), alpha=scale)
            return output if bias is None else output + bias.to(output.dtype)
        if up is None:
            inner, up = x, first
        elif inner is None:
            inner = functional.linear(x, first)
        output = _added(output, inner.to(output.dtype), up.to(output.dtype), scale)
        return output if bias is None else output + bias.to(output.dtype)

    def _for(self, x: Tensor) -> _Cast:
        """The two thin factors, or where it has none the dense update, on the device and in the dtype of `x`."""
        cast = self._cast
        if cast is None or cast.first.device != x.device or cast.first.dtype != x.dtype:
            factors, bias = self._update.factors(), self._update.bias
            up, first, scale = factors or (None, self._update.dense(), 1.0)
            ones = [1] * len(self._kernel)
            first = first.reshape(first.shape[0], self._inputs, *self._kernel).to(x.dtype).to(x.device)
            if up is not None:
                up = up.reshape(*up.shape[:2], *ones).to(x.dtype).to(x.device)
            if bias is not None:
                bias = (bias.float() * self._strength).reshape(-1, *ones).to(x.dtype).to(x.device)
            self._cast = cast = _Cast(first, up, scale * self._strength, bias)
        return cast


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

    def __init__(self, module: nn.Module, acting: Acting) -> None:
        """Prepares the updates that act in `module`; nothing is added before `activate`."""
        self._module = module
        self._acting = acting
        self._terms: dict[Update, Term] = {}
        self._active: tuple[Term, ...] = ()
        self._shared: SharedInput | None = None
        self.ran = False

    @property
    def attached(self) -> bool:
        """Whether the module runs this hook."""
        return any(hook is self for hook in self._module._forward_hooks.values())

    def attach(self) -> None:
        """Hangs the hook on the module."""
        self._module.register_forward_hook(self)

    def share(self, shared: SharedInput) -> None:
        """Lets the first product be made together with those of the layers that have the same input."""
        self._shared = shared

    def activate(self, acts: str) -> None:
        """From now on `acts` (subject, style, both, none) is added."""
        updates = self._acting.of(acts)
        for update, strength in updates:
            if update not in self._terms:
                self._terms[update] = Term(update, strength, unwrapped(self._module))
        self._active = tuple(self._terms[update] for update, _ in updates)
        if self._shared is not None:
            self._shared.forget()

    def thin_first(self, x: Tensor) -> Tensor | None:
        """That of the term that acts now, where there is just one."""
        return self._active[0].thin_first(x) if len(self._active) == 1 else None

    def remove(self) -> None:
        """Takes the hook off. May be called at any time, and again."""
        unhook(self._module, self)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The forward hook."""
        self.ran = True
        x = args[0]
        inner = None if self._shared is None else self._shared.inner(self, x)
        for term in self._active:
            output = term(x, output, inner)
        return output


class SharedInput:
    """Layers that are called with the same tensor, one after the other: their first products are made as one."""

    def __init__(self, layers: Sequence[BranchLayer]) -> None:
        """Takes linear layers, in the order in which the model calls them."""
        self._layers = tuple(layers)
        self._stacked: Tensor | None = None
        self._sizes: list[int] = []
        self._is_stacked = False
        self._x: Tensor | None = None
        self._inner: dict[BranchLayer, Tensor] = {}

    def forget(self) -> None:
        """A layer has switched."""
        self._is_stacked, self._x, self._inner = False, None, {}

    def inner(self, layer: BranchLayer, x: Tensor) -> Tensor | None:
        """What the active term of `layer` makes of `x` first, where that has been made already."""
        if layer is self._layers[0]:
            self._begin(x)
        if self._x is not x:  # a model may well give them different tensors
            return None
        found = self._inner.pop(layer, None)
        if not self._inner:
            self._x = None
        return found

    def _begin(self, x: Tensor) -> None:
        if self._inner:  # the last time, somebody was called with another tensor: what was made for him was for nothing
            self._stacked, self._x, self._inner = None, None, {}
        stacked = self._stacked
        if not self._is_stacked or (stacked is not None and (stacked.device, stacked.dtype) != (x.device, x.dtype)):
            firsts = [layer.thin_first(x) for layer in self._layers]
            thin = [first for first in firsts if first is not None]
            self._stacked = stacked = torch.cat(thin) if len(thin) == len(firsts) else None
            self._sizes = [len(first) for first in thin]
            self._is_stacked = True
        if stacked is not None:
            parts = torch.split(functional.linear(x, stacked), self._sizes, dim=-1)
            self._x, self._inner = x, dict(zip(self._layers, parts))


def _added(output: Tensor, inner: Tensor, up: Tensor, scale: float) -> Tensor:
    """`output + inner @ up^T * scale` by one operation, in place where nobody can notice."""
    rows, added = output.reshape(-1, output.shape[-1]), (inner.reshape(-1, inner.shape[-1]), up.t())
    if output.requires_grad or up.requires_grad or rows.data_ptr() != output.data_ptr():
        return torch.addmm(rows, *added, alpha=scale).reshape(output.shape)
    rows.addmm_(*added, alpha=scale)
    return output
