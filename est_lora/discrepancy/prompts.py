"""The words that LoRA files want in a prompt, and the prompt that both probe pictures are drawn from."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_MOST_TAGS = 3
_LARGEST_CARD = 1 << 20  # in bytes
_LARGEST_HEADER = 1 << 23
_TAG = re.compile("<[^<>]*>")
_NOT_IN_A_WORD = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff<>]")  # a half of a tag finds no other half
_DAMAGE = (OSError, ValueError, RecursionError)


def trigger_words(path: str | Path) -> str:
    """The words that a LoRA file says it is called by, comma-separated; empty where it says none.

    First come the words that a WebUI's card keeps beside the file (`<stem>.json`, "activation text"), else the three
    tags that the training captions had most often (kohya's `ss_tag_frequency`: {dataset: {tag: count}}, summed over
    the datasets; of equally many the alphabetically first). What can't be read or understood counts as absent.
    """
    return ", ".join(_once(_pieces(_of_the_card(path)))) or ", ".join(_of_the_captions(path))


def probe_prompt(subject: str | Path, style: str | Path, prompt: str) -> str:
    """The prompt for the pictures of two LoRA files: the trigger words of both, each once.

    Where a file names none, it is `prompt`, that of the user's own picture, without the tags in `<...>`: those would
    bring in networks.
    """
    words = [trigger_words(subject), trigger_words(style)]
    return ", ".join(_once(_pieces(", ".join(words)))) if all(words) else bare(prompt)


def bare(prompt: str) -> str:
    """A prompt without the tags in `<...>`, in one line."""
    return ", ".join(_pieces(prompt))


def _of_the_card(path: str | Path) -> str:
    try:
        with open(os.path.splitext(path)[0] + ".json", "rb") as file:
            card = json.loads(file.read(_LARGEST_CARD))
    except _DAMAGE:
        return ""
    words = card.get("activation text") if isinstance(card, dict) else None
    return words if isinstance(words, str) else ""


def _of_the_captions(path: str | Path) -> list[str]:
    count: Counter[str] = Counter()
    for tags in _tag_frequencies(path):
        for tag, times in tags.items():
            if type(times) is int and times > 0:
                for piece in _pieces(tag):
                    count[piece] += times
    return sorted(count, key=lambda tag: (-count[tag], tag))[:_MOST_TAGS]


def _tag_frequencies(path: str | Path) -> list[dict[str, Any]]:
    """kohya's table of how often each tag was in the captions, one for each of the datasets."""
    try:
        with open(path, "rb") as file:  # of a safetensors file: the length of its header, 8 bytes, and the header
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), _LARGEST_HEADER)))
        datasets = json.loads(header["__metadata__"]["ss_tag_frequency"])
        return [tags for tags in datasets.values() if isinstance(tags, dict)]
    except (*_DAMAGE, AttributeError, LookupError, TypeError):  # parts of it are missing, or of another kind
        return []


def _pieces(text: str) -> Iterator[str]:
    """What stands between the commas of a prompt, in one line, without tags in `<...>`, empty pieces and noise."""
    for piece in _NOT_IN_A_WORD.sub(" ", _TAG.sub(" ", text)).split(","):
        if any(map(str.isalnum, piece)):
            yield " ".join(piece.split())


def _once(pieces: Iterable[str]) -> list[str]:
    by_folded: dict[str, str] = {}
    for piece in pieces:
        by_folded.setdefault(piece.casefold(), piece)
    return list(by_folded.values())
