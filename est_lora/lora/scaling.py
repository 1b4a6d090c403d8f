"""The scaling that PEFT and diffusers keep beside the weights instead of in them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from est_lora.lora.names import LayerId

# diffusers writes PEFT's config of every part, its keys prefixed with the part's name, under this key of the header.
_IN_HEADER = "lora_adapter_metadata"
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_FILE = "adapter_model.safetensors"
_MOST_BYTES = 1 << 20
_MOST = 1e9


class PeftScaling:
    """`alpha / rank`, or `alpha / sqrt(rank)` where rank-stabilised, for files whose tensors carry no alpha."""

    def __init__(self, path: Path, header: Mapping[str, str]) -> None:
        """Reads the header, or the `adapter_config.json` that PEFT puts beside an `adapter_model.safetensors`."""
        self._of_parts = _object(header.get(_IN_HEADER, ""))
        self._of_all = _object(_text_beside(path)) if not self._of_parts else {}

    def __call__(self, layer: LayerId, rank: int | None) -> float:
        """The scale of a layer's update; 1 (alpha = rank) where nothing, or nothing usable, is written.

        `rank` is None where the layer's tensors don't tell it.
        """
        rank = self._get(layer, "r") if rank is None else rank
        alpha = self._get(layer, "lora_alpha")
        if alpha is None:
            alpha = self._get(layer, "alpha")  # LoHa's and LoKr's word for it
        patterns = self._get(layer, "alpha_pattern")
        if isinstance(patterns, dict):
            # Regular expressions to PEFT; taken literally here, because nothing that was downloaded is run.
            named = (value for name, value in patterns.items() if f".{layer.name}".endswith(f".{name}"))
            alpha = next(named, alpha)
        if not (_is_usable(alpha) and _is_usable(rank) and rank > 0):
            return 1.0
        return float(alpha) / (math.sqrt(rank) if self._get(layer, "use_rslora") is True else rank)

    def _get(self, layer: LayerId, key: str) -> Any:
        return self._of_parts.get(f"{layer.part}.{key}", self._of_all.get(key))


def _is_usable(value: object) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _MOST


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def config_beside(path: Path) -> Path | None:
    """The `adapter_config.json` that belongs to the file at `path`, where PEFT saved it."""
    config = path.with_name(_ADAPTER_CONFIG)
    return config if path.name == _ADAPTER_FILE and config.is_file() else None


def _text_beside(path: Path) -> str:
    config = config_beside(path)
    try:
        if config is None or config.stat().st_size > _MOST_BYTES:
            return ""
        return config.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
