"""What a picture says of its fusion, in the WebUI's own table of parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from est_lora import __version__
from est_lora.config import FIELDS
from est_lora.discrepancy import DIGITS
from est_lora.gate import FusionPlan
from est_lora.text.infotext import HASHES, fusion, lora_hashes

_VERSION = "EST-LoRA version"
_OFF = "EST-LoRA off"
_INFOTEXT = {field.key: field.infotext for field in FIELDS}


def write(p: Any, plan: FusionPlan, subject: Any, style: Any) -> None:
    """Every knob that isn't at its default, the style discrepancy where it counts, the version, and the files' hashes."""
    config = plan.config
    if config.takes_discrepancy:
        config = dataclasses.replace(config, beta=round(plan.beta, DIGITS))
    names = {_INFOTEXT["subject"]: subject.name, _INFOTEXT["style"]: style.name}
    p.extra_generation_params.update(fusion(config) | names | {_VERSION: __version__})
    # In the host's own table, from which it writes its line again before a second pass.
    p.lora_hashes = _Hashes(
        getattr(p, "lora_hashes", {}), {entry.name: entry.shorthash for entry in (subject, style) if entry.shorthash}
    )
    _write_hashes(p)


def refuse(p: Any, why: str) -> None:
    """That there was no fusion, though one was asked for."""
    clear(p)
    p.extra_generation_params[_OFF] = why


def refused(p: Any) -> str:
    """Why there was no fusion, though one was asked for; empty where there was."""
    return str(p.extra_generation_params.get(_OFF, ""))


def clear(p: Any) -> None:
    """Takes out what was written for an earlier batch of the same job."""
    for key in (_VERSION, _OFF, *_INFOTEXT.values()):
        p.extra_generation_params.pop(key, None)
    if isinstance(hashes := getattr(p, "lora_hashes", {}), _Hashes):
        p.lora_hashes = hashes.without_ours()
    _write_hashes(p)


class _Hashes(dict[str, str]):
    """The host's table of hashes by name, with ours in it."""

    def __init__(self, theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
        super().__init__({**theirs, **ours})
        self._added = ours.keys() - theirs.keys()

    def without_ours(self) -> dict[str, str]:
        return {name: short for name, short in self.items() if name not in self._added}


def _write_hashes(p: Any) -> None:
    if hashes := lora_hashes(getattr(p, "lora_hashes", {}).items()):
        p.extra_generation_params[HASHES] = hashes
    else:
        p.extra_generation_params.pop(HASHES, None)
