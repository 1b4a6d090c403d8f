"""LoRA files become layer updates: names of every convention, one `LayerId` each."""

from est_lora.lora.file import LoraFile
from est_lora.lora.names import LayerId, UNetLayout
from est_lora.lora.update import LowRankUpdate, Update

__all__ = ["LayerId", "LoraFile", "LowRankUpdate", "UNetLayout", "Update"]
