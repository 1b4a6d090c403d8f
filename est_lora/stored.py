"""Tables in JSON files, which several processes share and people may edit by hand.

    {"version": 1, "presets": {"ink knight": {...}}}

A writer holds a lock, writes beside the file and puts the whole in its place, so readers need no lock.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from est_lora.errors import EstLoraError, quote, reason

PATIENCE = 5.0  # seconds to wait for another writer
_DAMAGE = (ValueError, RecursionError)  # all that can be wrong with a file that can be read


class Table:
    """The entries of one file, by name. Every method looks at it anew, and raises EstLoraError where it can't.

    Attributes:
        remarks: what the last look at the file set aside, a sentence each.
    """

    def __init__(self, path: Path, what: str) -> None:
        """The table at `path`, of which `what` is both its key in the file and what messages call its entries."""
        self._path = Path(os.path.realpath(path))  # a link to the file stays a link: what it points to is replaced
        self._what = what
        self.remarks: list[str] = []

    def read(self) -> dict[str, Any]:
        """All entries; none where there is no file, or where it is damaged, which is then set aside."""
        try:
            self.remarks = []
            return self._entries()
        except OSError as error:
            raise EstLoraError(f"{quote(self._path)} can't be read, see to its rights: {reason(error)}") from error
        except _DAMAGE:
            try:
                with self.changing() as entries:  # which sets it aside
                    return entries
            except EstLoraError as error:
                self.remarks.append(f"There are no {self._what}, as their file is damaged: {error}")
                return {}

    @contextmanager
    def changing(self) -> Iterator[dict[str, Any]]:
        """The entries; as the block leaves them they are written, unless it raises."""
        from filelock import FileLock

        try:
            self.remarks = []
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self._path}.lock", timeout=PATIENCE):
                content = self._read_or_set_aside()
                yield content[self._what]
                text = json.dumps(content, ensure_ascii=False, indent=2)
                write_whole(self._path, text.encode("utf-8", "backslashreplace"))  # as JSON spells half a character
        except (OSError, RecursionError) as error:
            told = f"{quote(self._path)} can't be written, see to its folder's rights and room or try again"
            raise EstLoraError(f"{told}: {reason(error)}") from error

    def _read_or_set_aside(self) -> dict[str, Any]:
        """What the file holds; only under the lock, lest a file be moved that another process has just mended."""
        try:
            return self._read()
        except _DAMAGE as damage:
            numbered = (f"{self._path.stem}.damaged-{n}{self._path.suffix}" for n in itertools.count(1))
            aside = next(path for path in map(self._path.with_name, numbered) if not os.path.lexists(path))
            os.rename(self._path, aside)
            told = f"{quote(self._path)} was damaged and is now called {quote(aside.name)}; {self._what} begin anew"
            self.remarks.append(f"{told}: {reason(damage)}")
            return self._read()

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._path.read_bytes().decode("utf-8-sig"))
        except FileNotFoundError:
            content = {self._what: {}}
        if not isinstance(content, dict) or not isinstance(content.get(self._what), dict):
            raise EstLoraError(f'it isn\'t {{"{self._what}": {{...}}}}')
        return {"version": 1, **content}

    def _entries(self) -> dict[str, Any]:
        return self._read()[self._what]  # type: ignore[no-any-return]


def write_whole(path: Path, data: bytes) -> None:
    """Puts `data` in the place of a file, all of it or nothing. Only one may write a file at a time."""
    part = path.with_name(f"{path.name}.part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
