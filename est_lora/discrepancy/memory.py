"""What has been measured, in one JSON file, and the pictures it was measured on beside it.

{"version": 1, "measurements": {"6f0c...": {"value": 0.42, "when": "2025-01-31T12:00:00+00:00", ...}}}
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from est_lora.errors import EstLoraError, quote, reason
from est_lora.stored import Table, write_whole

if TYPE_CHECKING:
    from PIL.Image import Image

_SHOWN = 256  # pixels, the longer side of a picture that is kept
_PICTURES = 200  # pairs of them, some 50 MB
_DIGITS = 16  # of a digest, in hex: enough for billions of pairs
_BOUNDS = {"seed": (0, 2**64 - 1), "side": (8, 2048), "steps": (1, 150)}
_USUAL_STEPS = 7  # two pictures cost half of one of 28 steps; docs/discrepancy.md


@dataclass(frozen=True)
class ProbeSettings:
    """How the two probe pictures are drawn; the same for both.

    Attributes:
        seed: of the noise, 0 ... 2^64 - 1.
        side: of the square pictures, pixels, 8 ... 2048, a multiple of 8.
        steps: of the sampler, 1 ... 150.
        sampler: its name, as the host calls it.
        guidance: the scale of classifier-free guidance, 0 ... 100.

    Raises EstLoraError for anything else.
    """

    seed: int
    side: int
    steps: int
    sampler: str
    guidance: float

    @classmethod
    def usual(cls, native: int) -> ProbeSettings:
        """What is taken where the user has no other wish, for a model that is made for a side of `native` pixels."""
        return cls(seed=0, side=native, steps=_USUAL_STEPS, sampler="Euler", guidance=7.0)

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise EstLoraError(
                    f"The probe pictures' {name} can't be {quote(value)}: it is a whole number in {low} ... {high}."
                )
        if self.side % 8:
            raise EstLoraError(f"The probe pictures' side can't be {self.side}: it is a multiple of 8.")
        if not isinstance(self.sampler, str) or not self.sampler.strip():
            raise EstLoraError(f"The probe pictures' sampler can't be {quote(self.sampler)}: it is the name of one.")
        number = isinstance(self.guidance, (int, float)) and not isinstance(self.guidance, bool)
        if not number or not 0 <= self.guidance <= 100:
            told = f"The probe pictures' guidance can't be {quote(self.guidance)}"
            raise EstLoraError(f"{told}: it is a number in 0 ... 100.")
        object.__setattr__(self, "guidance", float(self.guidance))  # lest 7 and 7.0 be two keys


@dataclass(frozen=True)
class Key:
    """All that a measured value depends on.

    Attributes:
        subject, style: SHA-256 of the two files, in hex.
        checkpoint: which model drew the pictures.
        extractor: which weights looked at them, `Extractor.identity`.
        settings: how the pictures were drawn.
        prompt: what they were drawn from.
    """

    subject: str
    style: str
    checkpoint: str
    extractor: str
    settings: ProbeSettings
    prompt: str

    @property
    def fields(self) -> dict[str, Any]:
        """All of it in one dictionary of texts and numbers."""
        fields = dataclasses.asdict(self)
        settings = fields.pop("settings")
        return {**fields, **settings}

    @property
    def digest(self) -> str:
        """16 hex digits that are the same on every machine: SHA-256 of the fields as sorted JSON."""
        text = json.dumps(self.fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode("ascii")).hexdigest()[:_DIGITS]


@dataclass(frozen=True)
class Measured:
    """One entry of the memory.

    Attributes:
        value: the style discrepancy, in [0, 2].
        when: when it was measured, ISO 8601; empty where the file doesn't say.
        fields: what it was measured with, as in `Key.fields`; for people to read.
    """

    value: float
    when: str
    fields: dict[str, Any]


class Memory:
    """The measured values in `folder/discrepancy.json` and the pictures of the newest 200 in `folder/probes`.

    Nothing here is fatal: what can't be read counts as never measured, and what can't be written is remembered in
    this object. Any number of processes may use one folder.

    Attributes:
        remarks: what the last call left out, set aside or couldn't do, a sentence each.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = Path(folder)
        self._table = Table(self._folder / "discrepancy.json", "measurements")
        self._unwritten: dict[str, Measured] = {}
        self.remarks: list[str] = []

    def find(self, key: Key) -> float | None:
        """The value measured for a key, or None."""
        measured = self.look(key)
        return measured.value if measured else None

    def look(self, key: Key) -> Measured | None:
        """The whole entry for a key, or None."""
        self.remarks = []
        if key.digest in self._unwritten:
            return self._unwritten[key.digest]
        try:
            entry = self._table.read().get(key.digest)
        except EstLoraError as error:
            self.remarks.append(str(error))
            return None
        self.remarks += self._table.remarks
        if entry is None:
            return None
        value: Any = entry.get("value") if isinstance(entry, dict) else None
        if not _is_value(value):
            self.remarks.append(
                f"The remembered style discrepancy {quote(value)} is left out: it is a number in 0 ... 2."
            )
            return None
        when = entry.get("when")
        fields = {name: entry[name] for name in key.fields if name in entry}
        return Measured(float(value), when if isinstance(when, str) else "", fields)

    def pictures(self, key: Key) -> Path | None:
        """The PNG with the subject's picture on the left and the style's on the right, or None where it isn't kept.

        Another process may delete it at any time, to make room for newer ones.
        """
        path = self._picture(key)
        return path if path.is_file() else None

    def keep(self, key: Key, value: float, pictures: tuple[Image, Image] | None = None) -> None:
        """Remembers a value, and the subject's and the style's picture, in place of older ones.

        Raises:
            EstLoraError: the value isn't a number in [0, 2]. But not where it can't be written: then it is remembered
                in this object, and `remarks` says so.
        """
        if not _is_value(value):
            raise EstLoraError(f"A style discrepancy can't be {quote(value)}: it is a number in 0 ... 2.")
        self.remarks = []
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        measured = Measured(float(value), now, key.fields)
        self._unwritten[key.digest] = measured
        try:
            with self._table.changing() as entries:
                entries[key.digest] = {"value": measured.value, "when": now, **measured.fields}
                self._replace_pictures(key, pictures)
        except EstLoraError as error:
            self.remarks.append(f"The style discrepancy is remembered only until the end of this program: {error}")
        else:
            del self._unwritten[key.digest]
        self.remarks += self._table.remarks

    def forget(self, key: Key) -> None:
        """Removes a value and its pictures, if there are any."""
        self.remarks = []
        self._unwritten.pop(key.digest, None)
        try:
            if key.digest in self._table.read():
                with self._table.changing() as entries:
                    entries.pop(key.digest, None)  # another process may have been faster
            self._picture(key).unlink(missing_ok=True)
        except EstLoraError as error:
            self.remarks.append(str(error))
        except OSError as error:
            self.remarks.append(f"{quote(self._picture(key))} can't be deleted: {reason(error)}")
        self.remarks += self._table.remarks

    def _picture(self, key: Key) -> Path:
        return self._folder / "probes" / f"{key.digest}.png"

    def _replace_pictures(self, key: Key, pictures: tuple[Image, Image] | None) -> None:
        """Keeps the pictures, or removes older ones; only under the table's lock."""
        path = self._picture(key)
        try:
            if pictures:
                path.parent.mkdir(exist_ok=True)
                write_whole(path, side_by_side(*map(_smaller, pictures)))
                _make_room(path)
            else:
                path.unlink(missing_ok=True)
        except (OSError, ValueError) as error:  # the disk's, and that of pictures that PIL can't convert
            self.remarks.append(f"The probe pictures can't be kept in {quote(path.parent)}: {reason(error)}")


def _make_room(newest: Path) -> None:
    """Deletes the oldest files beside a picture that are too many; only under the table's lock."""
    with suppress(OSError):  # one has just been forgotten, or is open somewhere: the next picture makes room
        others = [path for path in newest.parent.glob("*.png") if path != newest]
        others.sort(key=lambda path: path.lstat().st_mtime_ns, reverse=True)
        for old in others[_PICTURES - 1 :]:
            old.unlink()


def _smaller(picture: Image) -> Image:
    """As large as people look at it: a page sends it whenever it is drawn anew."""
    small = picture.convert("RGB")
    small.thumbnail((_SHOWN, _SHOWN))
    return small


def side_by_side(left: Image, right: Image) -> bytes:
    """The PNG of two pictures beside one another."""
    from PIL import Image

    both = Image.new("RGB", (left.width + right.width, max(left.height, right.height)))
    both.paste(left.convert("RGB"), (0, 0))
    both.paste(right.convert("RGB"), (left.width, 0))
    stream = io.BytesIO()
    both.save(stream, "PNG")
    return stream.getvalue()


def _is_value(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value <= 2  # type: ignore[operator]
