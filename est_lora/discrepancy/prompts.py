"""The words that LoRA files want in a prompt, and the prompt that both probe pictures are drawn from."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_MOST_TAGS = 3
_LARGEST_CARD = 1 << 20  # bytes
_LARGEST_TAGS = 1 << 24  # characters
_TAG = re.compile("<[^<>]*>")
_NOT_IN_A_WORD = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}  # of Unicode's categories; joiners of emoji are no loss
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
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("ss_tag_frequency", "")
        datasets = json.loads(text) if len(text) <= _LARGEST_TAGS else None
    except (*_DAMAGE, SafetensorError):
        return []
    return [tags for tags in datasets.values() if isinstance(tags, dict)] if isinstance(datasets, dict) else []


def _pieces(text: str) -> Iterator[str]:
    """What stands between the commas of a prompt, in one line, without tags in `<...>`, empty pieces and noise."""
    bare = _TAG.sub(" ", text).translate({ord("<"): None, ord(">"): None})  # a half of a tag finds no other half
    for piece in bare.split(","):
        shown = (" " if unicodedata.category(char) in _NOT_IN_A_WORD else char for char in piece)
        cleaned = " ".join("".join(shown).split())
        if any(map(str.isalnum, cleaned)):
            yield cleaned


def _once(pieces: Iterable[str]) -> list[str]:
    by_folded: dict[str, str] = {}
    for piece in pieces:
        by_folded.setdefault(piece.casefold(), piece)
    return list(by_folded.values())
