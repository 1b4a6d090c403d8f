"""Presets: named sets of knobs in one JSON file, which several processes share and people may edit by hand.

    {"version": 1, "presets": {"ink knight": {"subject_weight": 1.0, "beta": "auto", ...}}}

A writer holds a lock, writes beside the file and puts the whole in its place, so readers need no lock.
"""

from __future__ import annotations

import itertools
import json
import os
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from est_lora.config import FusionConfig
from est_lora.errors import EstLoraError, nearest, quote, reason

_PATIENCE = 5.0  # seconds to wait for another writer
_LONGEST_NAME = 64
_NOT_IN_A_NAME = {"Cc", "Cs", "Zl", "Zp"}  # control characters, halves of characters, separators of lines
_DAMAGE = (ValueError, RecursionError)  # all that can be wrong with a file that can be read


class Presets:
    """The presets in one file. Every method looks at it anew, and raises EstLoraError where it can't.

    Attributes:
        remarks: what the last look at the file left out or set aside, a sentence each.
    """

    def __init__(self, path: Path) -> None:
        self._path = Path(os.path.realpath(path))  # a link to the file stays a link: what it points to is replaced
        self.remarks: list[str] = []

    def names(self) -> list[str]:
        """The names of all presets, sorted without regard to case."""
        return sorted(self._presets(), key=str.casefold)

    def load(self, name: str) -> dict[str, object]:
        """The knobs that a preset sets, by their keys. Raises EstLoraError where there is none of that name."""
        presets = self._presets()
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
        with self._changing() as presets:
            presets[name] = _kept(vars(config))

    def delete(self, name: str) -> None:
        """Removes a preset. Raises EstLoraError where there is none of that name."""
        known = _find(name, self._presets())
        with self._changing() as presets:
            presets.pop(known, None)  # another process may have been faster

    def _presets(self) -> dict[str, Any]:
        try:
            self.remarks = []
            return _read(self._path)["presets"]  # type: ignore[no-any-return]
        except OSError as error:
            raise EstLoraError(f"{quote(self._path)} can't be read, see to its rights: {reason(error)}") from error
        except _DAMAGE:
            try:
                with self._changing() as presets:  # which sets it aside
                    return presets
            except EstLoraError as error:
                self.remarks.append(f"There are no presets, as their file is damaged: {error}")
                return {}

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Any]]:
        """The presets; as the block leaves them they are written, unless it raises."""
        from filelock import FileLock

        try:
            self.remarks = []
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self._path}.lock", timeout=_PATIENCE):
                content = self._read_or_set_aside()
                yield content["presets"]
                _write(self._path, content)
        except (OSError, RecursionError) as error:
            told = f"{quote(self._path)} can't be written, see to its folder's rights and room or try again"
            raise EstLoraError(f"{told}: {reason(error)}") from error

    def _read_or_set_aside(self) -> dict[str, Any]:
        """What the file holds; only under the lock, lest a file be moved that another process has just mended."""
        try:
            return _read(self._path)
        except _DAMAGE as damage:
            numbered = (f"{self._path.stem}.damaged-{n}{self._path.suffix}" for n in itertools.count(1))
            aside = next(path for path in map(self._path.with_name, numbered) if not os.path.lexists(path))
            os.rename(self._path, aside)
            told = f"{quote(self._path)} was damaged and is now called {quote(aside.name)}; presets begin anew"
            self.remarks.append(f"{told}: {reason(damage)}")
            return _read(self._path)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        content = {"presets": {}}
    if not isinstance(content, dict) or not isinstance(content.get("presets"), dict):
        raise EstLoraError('it isn\'t {"presets": {...}}')
    return {"version": 1, **content}


def _write(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=2)
    part = path.with_name(f"{path.name}.part")
    with open(part, "wb") as file:
        file.write(text.encode("utf-8", "backslashreplace"))  # JSON spells half a character as Python does
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


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
