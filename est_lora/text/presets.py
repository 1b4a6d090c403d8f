"""Presets: named sets of knobs in one JSON file, which several processes share and people may edit by hand.

{"version": 1, "presets": {"ink knight": {"subject_weight": 1.0, "beta": "auto", ...}}}
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from pathlib import Path

from est_lora.config import FusionConfig
from est_lora.errors import EstLoraError, nearest, quote
from est_lora.stored import Table

_LONGEST_NAME = 64
_NOT_IN_A_NAME = {"Cc", "Cs", "Zl", "Zp"}  # control characters, halves of characters, separators of lines


class Presets:
    """The presets in one file. Every method looks at it anew, and raises EstLoraError where it can't."""

    def __init__(self, path: Path) -> None:
        self._table = Table(path, "presets")

    @property
    def remarks(self) -> list[str]:
        """What the last look at the file left out or set aside, a sentence each."""
        return self._table.remarks

    def names(self) -> list[str]:
        """The names of all presets, sorted without regard to case."""
        return sorted(self._table.read(), key=str.casefold)

    def load(self, name: str) -> dict[str, object]:
        """The knobs that a preset sets, by their keys. Raises EstLoraError where there is none of that name."""
        presets = self._table.read()
        knobs = presets[_find(name, presets)]
        if not isinstance(knobs, dict):
            raise EstLoraError(f"The preset {quote(name)} isn't a set of knobs: save it anew or delete it.")
        loaded = {}
        for key, value in knobs.items():
            try:
                loaded[key] = getattr(FusionConfig.of({key: value}), key)
            except EstLoraError as error:
                self.remarks.append(f"Left out of the preset {quote(name)}: {error}")
        return _kept(loaded)

    def save(self, name: str, knobs: Mapping[str, object]) -> None:
        """Writes a preset, in place of an older one of that name. Raises EstLoraError for a bad name or knob.

        Knobs that aren't given are written too, so that it means the same when a default changes; but never `enabled`,
        nor a subject or style that isn't given.
        """
        name, config = _checked(name), FusionConfig.of(knobs)
        with self._table.changing() as presets:
            presets[name] = _kept(vars(config))

    def delete(self, name: str) -> None:
        """Removes a preset. Raises EstLoraError where there is none of that name."""
        known = _find(name, self._table.read())
        with self._table.changing() as presets:
            presets.pop(known, None)  # another process may have been faster


def _kept(knobs: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in knobs.items() if key != "enabled" and value is not None}


def _checked(name: str) -> str:
    text = name.strip() if isinstance(name, str) else ""
    if 0 < len(text) <= _LONGEST_NAME and _NOT_IN_A_NAME.isdisjoint(map(unicodedata.category, text)):
        return text
    raise EstLoraError(f"A preset can't be called {quote(name)}: give it 1 to {_LONGEST_NAME} characters in one line.")


def _find(name: str, presets: Mapping[str, object]) -> str:
    """The name as it stands in the file, where people may have put spaces around it."""
    for known in (str(name), str(name).strip()):
        if known in presets:
            return known
    near = nearest(str(name), presets) or sorted(presets)[:3]
    there = f"did you mean {' or '.join(map(quote, near))}?" if near else "none is saved yet."
    raise EstLoraError(f"There is no preset {quote(name)}: {there}")
