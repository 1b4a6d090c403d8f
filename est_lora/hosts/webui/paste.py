"""The way back: what the parameters of a picture say becomes the panel's choice, also where a file has a new name."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from est_lora.config import BY_KEY, FILES, Field
from est_lora.errors import EstLoraError
from est_lora.hosts.webui.loras import LoraList
from est_lora.text import tag
from est_lora.text.infotext import HASHES, lora_hash

_PROMPTS = ("Prompt", "Hires prompt")
NOTHING = "None"


@dataclass(frozen=True)
class Pasted:
    """What the host asks for the value of a component; equal for one knob in both tabs, by which it copies between them.

    Attributes:
        key: of the knob.
    """

    key: str

    def __call__(self, parameters: Mapping[str, Any]) -> object:
        """The value, or None to leave the component as it is.

        A picture without a fusion switches the panel off and changes nothing else in it; one with a fusion sets every
        knob, those it doesn't name to the built-in defaults.
        """
        is_fused = _written(BY_KEY["subject"], parameters) is not None
        if self.key == "enabled":
            return is_fused
        return _value(BY_KEY[self.key], parameters) if is_fused else None


def shown(field: Field, value: object) -> Any:
    """A knob's value as its component in the panel shows it."""
    if value is None:
        return NOTHING
    return field.text(value) if field.auto else value


def rename_tags(parameters: dict[str, Any]) -> None:
    """Has the tags of the prompts that are being pasted name the files as they are called here."""
    for key in _PROMPTS:
        if isinstance(prompt := parameters.get(key), str):
            parameters[key] = renamed(prompt, parameters)


def renamed(prompt: str, parameters: Mapping[str, Any]) -> str:
    """A prompt of a picture with these parameters, its tags naming the files as they are called here."""
    return tag.rename(prompt, lambda name: _name(name, parameters, in_tag=True))


def _value(field: Field, parameters: Mapping[str, Any]) -> Any:
    written = _written(field, parameters)
    if field.key in FILES:
        return _name(str(written), parameters) if written else NOTHING
    value = field.default
    with suppress(EstLoraError):  # somebody has changed the text by hand
        value = field.default if written is None else field.parse(written)
    return shown(field, value)


def _written(field: Field, parameters: Mapping[str, Any]) -> Any:
    """What the picture says of a knob; a file called 512x768 is a size to the host, which takes it apart."""
    size = [parameters.get(f"{field.infotext}-{number}") for number in (1, 2)]
    return parameters.get(field.infotext, None if None in size else "x".join(map(str, size)))


def _name(written: str, parameters: Mapping[str, Any], *, in_tag: bool = False) -> str:
    """What a file is called here: by the hash that the picture has for it, else by its name as it stands there."""
    try:
        loras = LoraList()
        name = str(loras.find_same(written, lora_hash(written, str(parameters.get(HASHES, "")))).name)
        return loras.name_in_tag(name) if in_tag else name
    except EstLoraError:
        return written
