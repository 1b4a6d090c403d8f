"""The fusion on a torch model: engines, and the session that drives them."""

from est_lora.fusion.modules import find, modules_of, original_weight
from est_lora.fusion.session import CPU, DEVICE, NEVER, FusionSession, remove_fusion

__all__ = ["CPU", "DEVICE", "NEVER", "FusionSession", "find", "modules_of", "original_weight", "remove_fusion"]
