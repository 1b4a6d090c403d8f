"""What is asked for: axes of a grid go before the tag, the tag before the panel or the API, these before the settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from est_lora.errors import EstLoraError
from est_lora.hosts.webui import settings
from est_lora.text import tag


def combined(*asked: Mapping[str, object]) -> dict[str, object]:
    """The knobs of all that ask, the last before the first, over the settings; nothing where nobody asks."""
    knobs = {key: value for one in asked for key, value in one.items()}
    return {**settings.defaults(), **knobs} if knobs else {}


def of_tags(tags: Sequence[Mapping[str, str]]) -> Mapping[str, str]:
    """The one tag's knobs.

    Raises:
        EstLoraError: there are several tags.
    """
    if len(tags) > 1:
        raise EstLoraError(f"The prompt has {len(tags)} <{tag.NAME}:...> tags, and one fusion needs one: keep one.")
    return tags[0] if tags else {}


def check_all_read(texts: Sequence[str]) -> None:
    """Checks prompts from which the host has taken the tags.

    Raises:
        EstLoraError: one is still there.
    """
    if any(f"<{tag.NAME}:" in text for text in texts):
        raise EstLoraError(
            f"A <{tag.NAME}:...> tag wasn't read: close it with >, write no # in it (a comment begins there; a hash goes"
            " without), and put it into the prompt, not the negative one."
        )
