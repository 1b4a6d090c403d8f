"""The fusion on a torch model: engines, and the session that drives them."""

from est_lora.fusion.branch import remove_branches
from est_lora.fusion.modules import find, modules_of, original_weight
from est_lora.fusion.session import FusionSession

__all__ = ["FusionSession", "find", "modules_of", "original_weight", "remove_branches"]
