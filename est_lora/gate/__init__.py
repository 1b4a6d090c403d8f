"""The gate: energies, balance, style pressure, and the plan that follows from them. Pure mathematics."""

from est_lora.gate.plan import FusionPlan, LayerPlan
from est_lora.gate.schedule import BOTH, NEEDS_MODEL, NONE, STYLE, SUBJECT, Schedule, Segment

__all__ = ["BOTH", "NEEDS_MODEL", "NONE", "STYLE", "SUBJECT", "FusionPlan", "LayerPlan", "Schedule", "Segment"]
