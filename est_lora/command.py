"""What command lines share: how they read their arguments, and how they end."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from est_lora.errors import EstLoraError, quote, reason

_BAD_INPUT, _INTERRUPTED = 2, 130


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence instead of two paragraphs."""

    def error(self, message: str) -> NoReturn:
        """Raises `EstLoraError`."""
        raise EstLoraError(f"{message}; see {self.prog} --help.")


def ended(name: str, work: Callable[[], object]) -> int:
    """Does the work of a command, called `name` in what it says of errors.

    Returns:
        The exit code: 0; 2 for what a user can mend (one sentence on stderr), 130 for Ctrl-C.
    """
    try:
        work()
        sys.stdout.flush()
    except EstLoraError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return _BAD_INPUT
    except BrokenPipeError:  # a reader that has seen enough, as in `est-lora inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, a folder that can't be written to
        where = f"{quote(error.filename)} can't be used: " if error.filename else ""
        print(f"{name}: {where}{error.strerror or reason(error)}", file=sys.stderr)
        return _BAD_INPUT
    except KeyboardInterrupt:
        print(f"{name}: interrupted.", file=sys.stderr)
        return _INTERRUPTED
    return 0


def whole(name: str, text: str, low: int, high: int, multiple: int = 1) -> int:
    """The number that was given as `--name`.

    Raises:
        EstLoraError: it is none from `low` to `high`, or no multiple of `multiple`.
    """
    if not re.fullmatch(r"[0-9]{1,20}", text) or not low <= int(text) <= high or int(text) % multiple:
        kind = "a whole number" if multiple == 1 else f"a multiple of {multiple}"
        raise EstLoraError(f"--{name} can't be {quote(text)}: it is {kind} from {low} to {high}.")
    return int(text)


def output_folder(text: str) -> Path:
    """The folder that was given with `-o`, whether it is there or not.

    Raises:
        EstLoraError: it is a file.
    """
    folder = Path(text)
    if folder.exists() and not folder.is_dir():
        raise EstLoraError(f"The results can't go to {quote(folder)}: that is a file; give a folder with -o.")
    return folder
