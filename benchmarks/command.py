"""What the benchmarks' commands share: how they read their arguments, and how they end."""

from __future__ import annotations

import argparse
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from est_lora.errors import EstLoraError, quote, reason


class Parser(argparse.ArgumentParser):
    """One whose complaints are sentences like all others."""

    def error(self, message: str) -> NoReturn:
        """Raises `EstLoraError`."""
        raise EstLoraError(f"{message}; see {self.prog} --help.")


def ended(work: Callable[[], tuple[str, Path]]) -> int:
    """Prints what `work` returns, the result and the folder that it is in.

    Returns:
        0; 2 for what a user can mend (one sentence on stderr), 130 for Ctrl-C.
    """
    try:
        text, folder = work()
    except EstLoraError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that can't be written to
        where = f"{quote(error.filename)} can't be used: " if error.filename else ""
        print(f"benchmark: {where}{error.strerror or reason(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmark: interrupted.", file=sys.stderr)
        return 130
    print(text)
    print(f"Written to {folder.resolve()}.")
    return 0


def whole(name: str, text: str, low: int, high: int, of: int = 1) -> int:
    """The number that was given as `--name`.

    Raises:
        EstLoraError: it is none from `low` to `high`, or no multiple of `of`.
    """
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high or int(text) % of:
        multiple = f", a multiple of {of}" if of > 1 else ""
        raise EstLoraError(f"--{name} can't be {quote(text)}: it is a whole number from {low} to {high}{multiple}.")
    return int(text)


def choice(name: str, text: str, choices: dict[str, Any]) -> Any:
    """What was chosen as `--name`.

    Raises:
        EstLoraError: it isn't among `choices`.
    """
    if text not in choices:
        raise EstLoraError(f"--{name} can't be {quote(text)}: it is one of {', '.join(choices)}.")
    return choices[text]


def folder_for_results(text: str) -> Path:
    """The folder given with `-o`, which is there then.

    Raises:
        EstLoraError: it is a file.
    """
    folder = Path(text)
    if folder.exists() and not folder.is_dir():
        raise EstLoraError(f"The results can't go to {quote(folder)}: that is a file; give a folder with -o.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cpu() -> str:
    """The processor's name."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
