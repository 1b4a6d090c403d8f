"""LoRA files become layer updates: names of every convention, one `LayerId` each."""

from est_lora.lora.file import LoraFile
from est_lora.lora.model import ModelFile
from est_lora.lora.names import LayerId, UNetLayout
from est_lora.lora.relative import RelativeUpdate, Weight
from est_lora.lora.update import Factors, LowRankUpdate, Numbers, Shape, Update, misfit, shape_text, weight_shape

__all__ = [
    "Factors",
    "LayerId",
    "LoraFile",
    "LowRankUpdate",
    "ModelFile",
    "Numbers",
    "RelativeUpdate",
    "Shape",
    "UNetLayout",
    "Update",
    "Weight",
    "misfit",
    "shape_text",
    "weight_shape",
]
