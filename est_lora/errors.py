"""The one error a user can cause, and how it names what was asked and what is there."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable
from pathlib import PurePath

log = logging.getLogger(__name__)

_LONGEST_QUOTE = 80
_LONGEST_REASON = 240


class EstLoraError(ValueError):
    """A user's mistake or an unusable file. Its text is one sentence: what was asked, what is there, what to do."""


def quote(value: object) -> str:
    """`value` as it may stand in a message: one line, in quotes, cut at 80 characters (a path keeps its end)."""
    try:
        text = str(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a list of lists of lists ...
        text = f"a very long {type(value).__name__}"
    if len(text) > _LONGEST_QUOTE:
        text = f"...{text[-_LONGEST_QUOTE:]}" if isinstance(value, PurePath) else f"{text[:_LONGEST_QUOTE]}..."
    return repr(text)


def reason(error: Exception) -> str:
    """What another library says went wrong, as the end of a sentence of ours: its first sentence, one line, cut."""
    first = str(error).strip().partition("\n")[0].partition(". ")[0][:_LONGEST_REASON]
    return first.rstrip(" .:({[") + "."


def explained(error: Exception, failed: str = "EST-LoRA failed") -> str:
    """What a user is told of any error: its own sentence, or that something of ours `failed`, and the log has the rest."""
    if isinstance(error, EstLoraError):
        return str(error)
    log.error("%s.", failed, exc_info=error)
    return f"{failed} ({type(error).__name__}); the log has more."


def nearest(asked: str, there: Iterable[str], most: int = 3) -> list[str]:
    """The names in `there` that look most like `asked`, best first, compared without regard to case."""
    by_folded = {name.casefold(): name for name in there}
    return [
        by_folded[name]
        for name in difflib.get_close_matches(asked[:_LONGEST_QUOTE].casefold(), by_folded, n=most, cutoff=0.4)
    ]
