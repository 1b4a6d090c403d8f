"""Opening safetensors files, and saying why one can't be opened."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from est_lora.errors import EstLoraError, nearest, quote

_BLOCK = 1 << 20


@contextmanager
def opened(path: Path, what: str) -> Iterator[Any]:
    """The open safetensors file, a `what`; tensors taken from it stay memory-mapped.

    Raises:
        EstLoraError: there is no such file, or it can't be read, now or while it is being read.
    """
    try:
        _check_is_file(path, what)
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise EstLoraError(_why_unreadable(path, error)) from error
    except OSError as error:
        raise EstLoraError(f"{quote(path)} can't be read: {error.strerror or error}.") from error


def sha256(path: Path, *, header: bool = True) -> str:
    """SHA-256 of a safetensors file in hex; without its header, as WebUIs tell LoRAs apart."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        if not header:
            stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _check_is_file(path: Path, what: str) -> None:
    if path.is_file():
        return
    folder = path if path.is_dir() else path.parent
    there = sorted(entry.name for entry in folder.glob("*.safetensors")) if folder.is_dir() else []
    if path.is_dir():
        inside = f"there are {', '.join(map(quote, there[:5]))}" if there else "there is no .safetensors file"
        raise EstLoraError(f"{quote(path)} is a folder, not a {what} file: in it {inside}.")
    near = nearest(path.name, there) or there[:3]
    if not near:
        raise EstLoraError(f"There is no file {quote(path)}, and no .safetensors file beside it.")
    raise EstLoraError(f"There is no file {quote(path)}: did you mean {' or '.join(map(quote, near))}?")


def _why_unreadable(path: Path, error: SafetensorError) -> str:
    with path.open("rb") as stream:
        start = stream.read(2)
    if start == b"PK" or start[:1] == b"\x80":
        return f"{quote(path)} is a pickle, which can run code when it is loaded: only .safetensors files are read."
    if not start:
        return f"{quote(path)} is an empty file: download it again."
    return f"{quote(path)} isn't a whole safetensors file ({str(error).rstrip('.')}): download it again."
