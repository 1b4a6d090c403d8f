"""The fusion on a torch model: engines, and the session that drives them."""

from est_lora.fusion.session import FusionSession

__all__ = ["FusionSession"]
