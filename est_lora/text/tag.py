"""The prompt tag: `<est:subject:style>`, `<est:subject:style:1:0.8>`, and any knob by its key, `<est:a:b:beta=0.4>`.

WebUIs cut a tag at its colons and hand over the pieces; nothing is quoted, so no piece holds `:` or `>`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from est_lora.config import FIELDS, FILES
from est_lora.errors import EstLoraError, quote

NAME = "est"
_POSITIONS = (*FILES, "subject_weight", "style_weight")
_TAG = re.compile(rf"[ ]?<{NAME}:([^>]+)>")
# What ends a tag or a piece of it, and what begins a comment.
_NOT_IN_NAMES = re.compile(r"[:>=#\n]|^\s|\s$")


def read(pieces: Sequence[str]) -> dict[str, str]:
    """The knobs that a tag sets, by their keys, as text; whether they exist and fit is for `FusionConfig` to say.

    Args:
        pieces: what stands between the colons after `est`. The first without `=` are subject, style and both weights.

    Raises:
        EstLoraError: there are too many pieces, or one knob is given twice.
    """
    knobs: dict[str, str] = {}
    for key, value in _pairs(pieces):
        if key in knobs:
            raise EstLoraError(f"The tag <{NAME}:...> gives {quote(key)} twice: give it once.")
        if value:
            knobs[key] = value
    return knobs


def write(knobs: Mapping[str, object], defaults: Mapping[str, object]) -> str:
    """The tag that means `knobs` on every WebUI, also on one whose settings are those of this one.

    Args:
        knobs: every knob by its key.
        defaults: what counts here where a tag says nothing; what differs from it, or from the built-in default, is
            written.

    Raises:
        EstLoraError: subject or style is missing, or a name can't be in a tag.
    """
    pieces = []
    for key in FILES:
        name = knobs.get(key)
        if not isinstance(name, str):
            raise EstLoraError(f"A tag names two LoRAs, and there is no {key}: choose one.")
        if not fits(name):
            raise EstLoraError(f"{quote(name)} can't be in a tag, which ends at : and >: give the file's hash instead.")
        pieces.append(name)
    for field in FIELDS:
        value = knobs.get(field.key, field.default)
        if field.key not in FILES and (value != field.default or value != defaults.get(field.key, field.default)):
            pieces.append(f"{field.key}={field.text(value)}")
    return f"<{NAME}:{':'.join(pieces)}>"


def fits(name: str) -> bool:
    """Whether a LoRA's name can stand in a tag."""
    return not _NOT_IN_NAMES.search(name)


def find(prompt: str) -> list[dict[str, str]]:
    """What each tag in a prompt sets.

    Raises:
        EstLoraError: as `read`.
    """
    return [read(found[1].split(":")) for found in _TAG.finditer(prompt)]


def without(prompt: str) -> str:
    """The prompt without its tags."""
    return _TAG.sub("", prompt)


def put(prompt: str, written: str) -> str:
    """The prompt with this tag, in the place of the first one where there are any, else at the end."""
    first = _TAG.search(prompt)
    if not first:
        return f"{prompt} {written}" if prompt and not prompt[-1].isspace() else prompt + written
    before = prompt[: first.start()]
    space = " " if first[0].startswith(" ") else ""
    return f"{before}{space}{written}{without(prompt[first.end() :])}"


def rename(prompt: str, name_of: Callable[[str], str]) -> str:
    """The prompt with both files of its tags under the names that `name_of` gives; all else as it was written."""

    def renamed(found: re.Match[str]) -> str:
        start, _, content = found[0][:-1].partition(":")
        try:
            pairs = list(_pairs(content.split(":")))
        except EstLoraError:  # it is said when a picture is made
            return found[0]
        pieces = [
            _with_value(piece, value, name_of(value)) if key in FILES and value else piece
            for piece, (key, value) in zip(content.split(":"), pairs)
        ]
        return f"{start}:{':'.join(pieces)}>"

    return _TAG.sub(renamed, prompt)


def _with_value(piece: str, value: str, new: str) -> str:
    """A piece with another value, and the key and the space around both as they are."""
    start = piece.find("=") + 1  # 0 where there is no key
    return piece[:start] + piece[start:].replace(value, new, 1)


def _pairs(pieces: Sequence[str]) -> list[tuple[str, str]]:
    """The key and the value of each piece, as text."""
    positions = iter(_POSITIONS)
    pairs = []
    for piece in pieces:
        key, named, value = (part.strip() for part in piece.partition("="))
        if not named:
            key, value = next(positions, ""), key
        if not key:
            raise EstLoraError(
                f"The tag <{NAME}:...> has more to it than can be understood at {quote(piece)}: after subject, style and"
                " two weights everything is key=value."
            )
        pairs.append((key, value))
    return pairs
