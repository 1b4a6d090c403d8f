"""The updates that act in one layer, by who acts: what both engines apply."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from est_lora.errors import EstLoraError
from est_lora.fusion.modules import module_shape, unwrapped
from est_lora.gate import BOTH, STYLE, SUBJECT, LayerPlan
from est_lora.lora import Update, misfit


@dataclass(frozen=True)
class Acting:
    """One layer's updates, each with the strength that it is applied at.

    Attributes:
        subject, style: (update, strength); None where it never acts.
    """

    subject: tuple[Update, float] | None
    style: tuple[Update, float] | None

    @classmethod
    def of_plan(cls, plan: LayerPlan, module: nn.Module, subject_strength: float, style_strength: float) -> Acting:
        """What `plan` asks for in `module`.

        Raises:
            EstLoraError: an update's shape isn't the module's, or it still waits for the model's own weight.
        """
        shape = module_shape(unwrapped(module))
        used = {segment.acts for segment in plan.segments}
        found: list[tuple[Update, float] | None] = []
        for who, update, strength in ((SUBJECT, plan.subject, subject_strength), (STYLE, plan.style, style_strength)):
            if update is None or not used & {who, BOTH}:
                found.append(None)
                continue
            if not update.fits(shape):
                raise misfit(f"The {who}", plan.layer.name, update, shape)
            if update.needs_model:
                raise EstLoraError(
                    f"The {who}'s update of {plan.layer.name} depends on the layer's own weight, and this plan was made"
                    " without the model: make it with the model's weights."
                )
            found.append((update, strength))
        return cls(*found)

    def of(self, acts: str) -> tuple[tuple[Update, float], ...]:
        """The updates to add when `acts` (subject, style, both, none) is whose turn it is."""
        turns = {SUBJECT: (self.subject,), STYLE: (self.style,), BOTH: (self.subject, self.style)}
        return tuple(each for each in turns.get(acts, ()) if each is not None)

    @property
    def change_bias(self) -> bool:
        """Whether one of them is also added to the layer's bias."""
        return any(update.bias is not None for update, _ in self.of(BOTH))
