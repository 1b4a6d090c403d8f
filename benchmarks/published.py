"""The ways in which EST-LoRA and K-LoRA were published, for comparison: every layer decides anew in every call.

Written from the papers' formulas (arXiv 2508.02165 and 2502.18461), not from their code. Each call of a layer makes both
dense updates, scores them, waits for the comparison, and applies the chosen one as a dense matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from est_lora.gate import STYLE, SUBJECT, FusionPlan, LayerPlan
from est_lora.lora import LowRankUpdate, Update

Score = Callable[[Tensor, int], Tensor]
"""A dense update's score; the number is the product of the two files' ranks."""


def energy(dense: Tensor, count: int) -> Tensor:
    """EST-LoRA: `||dW||_F^2`."""
    return torch.linalg.vector_norm(dense).square()


def largest_entries(dense: Tensor, count: int) -> Tensor:
    """K-LoRA: the sum of the `count` largest absolute entries."""
    entries = dense.abs().flatten()
    return torch.topk(entries, min(count, entries.numel())).values.sum()


class PublishedSession:
    """Like a `FusionSession`, to be attached, told `tau` and detached; but the layers decide, with every call."""

    def __init__(self, model: nn.Module, plan: FusionPlan, score: Score) -> None:
        """Takes the two updates of every layer, `gamma`, `alpha` and `beta` from `plan`, but no decision.

        Args:
            model: the UNet; its floating dtype is the one that the updates are computed in.
            plan: of two files of plain LoRAs that have the same layers.
            score: what the two updates are compared by: `energy` or `largest_entries`.
        """
        self._model = model
        self._plan = plan
        self._score = score
        self._handles: list[RemovableHandle] = []
        self.layers: dict[str, PublishedLayer] = {}

    def attach(self) -> None:
        """Hangs a hook on every layer of the plan."""
        for layer in self._plan.layers:
            module = self._model.get_submodule(layer.layer.name)
            hook = PublishedLayer(layer, module, self._plan.balance or 1.0, self._score)
            self.layers[layer.layer.name] = hook
            self._handles.append(module.register_forward_hook(hook))

    def at(self, tau: float) -> None:
        """The model is about to be called at progress `tau`: this is the style pressure there."""
        pressure = self._plan.config.alpha * tau + self._plan.beta
        for layer in self.layers.values():
            layer.pressure = pressure

    def detach(self) -> None:
        """Leaves the model as it was."""
        while self._handles:
            self._handles.pop().remove()
        self.layers = {}


class PublishedLayer:
    """The hook on one module.

    Attributes:
        pressure: `S(tau)` of this call.
        acts: whom it chose in its last call.
    """

    def __init__(self, plan: LayerPlan, module: nn.Module, gamma: float, score: Score) -> None:
        self.pressure = 0.0
        self.acts = ""
        self._factors = {
            SUBJECT: factors(plan.subject, module.weight),
            STYLE: factors(plan.style, module.weight),
        }
        self._count = self._factors[SUBJECT][1].shape[0] * self._factors[STYLE][1].shape[0]
        self._gamma = gamma
        self._score = score

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Adds the update of the file whose turn it is."""
        dense = {acts: up @ down for acts, (up, down) in self._factors.items()}
        subject, style = (self._score(update, self._count) for update in dense.values())
        # On a GPU, .item() waits for it: once per layer and call.
        self.acts = SUBJECT if (subject / (self._gamma * style)).item() > self.pressure else STYLE
        return output + functional.linear(args[0], dense[self.acts])


def factors(update: Update | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Up, with alpha / rank folded in, and down, like `weight`: once, so that this costs no call anything."""
    if not isinstance(update, LowRankUpdate):
        raise TypeError("the ways that are compared know plain LoRAs only, in both files")
    return (update.up.flatten(1).double() * update.scale).to(weight), update.down.flatten(1).to(weight)
