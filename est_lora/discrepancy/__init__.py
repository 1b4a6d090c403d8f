"""The style discrepancy: how different the pictures of two LoRAs look to a feature extractor, and what is remembered.

    D = 1 - cos(f(subject picture), f(style picture))

Both pictures are drawn from the same prompt and seed, one with each LoRA alone; `f` is the CLS token of DINO ViT-S/16
after its last norm (EST-LoRA, arXiv 2508.02165).
"""

from est_lora.discrepancy.extractor import NAMES, Extractor, identity, open_extractor
from est_lora.discrepancy.measure import DIGITS, discrepancy
from est_lora.discrepancy.memory import Key, Measured, Memory, ProbeSettings, side_by_side
from est_lora.discrepancy.prompts import bare, probe_prompt, trigger_words

__all__ = [
    "DIGITS",
    "NAMES",
    "Extractor",
    "Key",
    "Measured",
    "Memory",
    "ProbeSettings",
    "bare",
    "discrepancy",
    "identity",
    "open_extractor",
    "probe_prompt",
    "side_by_side",
    "trigger_words",
]
