"""The infotext: what a picture was made with, in the format of AUTOMATIC1111's WebUI.

The prompt, a line `Negative prompt: ...` where there is one, and a last line `key: value, key: value, ...`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import PurePath

from est_lora.config import FIELDS, FILES, FusionConfig
from est_lora.errors import EstLoraError

HASHES = "Lora hashes"
_NEGATIVE = "Negative prompt:"
# What separates names from hashes, and one pair from the next, can't be in a name.
_SEPARATORS = str.maketrans("", "", ":,")


def write(prompt: str, negative: str, values: Mapping[str, object]) -> str:
    """The infotext of a picture.

    Args:
        prompt: what was to be drawn; it may have several lines.
        negative: what was to be kept away from; empty for nothing.
        values: the rest by its keys, in the order of writing; what is None is left out.

    Raises:
        EstLoraError: a line of a prompt would be read as the beginning of the negative prompt, or it isn't Unicode.
    """
    for name, text in (("prompt", prompt), ("negative prompt", negative)):
        if any(line.strip().startswith(_NEGATIVE) for line in text.split("\n")):
            raise EstLoraError(
                f"A line of the {name} begins with {_NEGATIVE!r}: give what follows as the negative prompt, without that."
            )
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise EstLoraError(f"The {name} isn't Unicode text: save or type it as UTF-8.")
    lines = [prompt, f"{_NEGATIVE} {negative}"] if negative else [prompt]
    written = ((key, _text(value)) for key, value in values.items() if value is not None)
    lines.append(", ".join(f"{key}: {_quoted(text)}" for key, text in written))
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode("utf-8")  # a file's name may be no Unicode


def fusion(config: FusionConfig) -> dict[str, object]:
    """The keys and values of a fusion: the names of the two files, and every knob that isn't at its default."""
    return {
        field.infotext: PurePath(value).stem if field.key in FILES else value
        for field in FIELDS
        if (value := getattr(config, field.key)) != field.default
    }


def lora_hashes(pairs: Iterable[tuple[str, str]]) -> str:
    """The value of `HASHES` for names and their short hashes."""
    return ", ".join(f"{name.translate(_SEPARATORS)}: {short}" for name, short in pairs)


def lora_hash(name: str, written: str) -> str | None:
    """The short hash that the value of `HASHES` has for a name."""
    for pair in written.split(","):
        known, _, short = pair.partition(":")
        if known.strip() == name.translate(_SEPARATORS).strip():
            return short.strip() or None
    return None


def _text(value: object) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _quoted(text: str) -> str:
    """`text` as a JSON string where it would not be read back as it is."""
    plain = text == text.strip() and not any(mark in text for mark in ',:\n"')
    return text if plain else json.dumps(text, ensure_ascii=False)
