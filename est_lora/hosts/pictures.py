"""Pictures on disk: numbered files that are never overwritten and never half written, and contact sheets of them."""

from __future__ import annotations

import itertools
import math
import os
import re
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

_NAME = re.compile(r"(\d{1,8})-(\d{1,20})\.png", re.ASCII)
_INFOTEXT = "parameters"
_MOST_ON_A_SHEET = 256
_SIDE, _LABEL, _GAP = 192, 16, 6


def find(folder: Path, seed: int, infotext: str) -> Path | None:
    """The whole picture in `folder` that was made with this seed and has exactly this infotext, if there is one."""
    return next((path for path, of in _numbered(folder) if of == seed and _infotext(path) == infotext), None)


def save(picture: Image.Image, folder: Path, seed: int, infotext: str) -> Path:
    """Writes a picture with its infotext under the next free number."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1 + max((_number(path) for path, _ in _numbered(folder)), default=-1)
    with _unfinished(picture, folder, infotext) as unfinished:
        while True:
            path = folder / f"{number:05d}-{seed}.png"
            try:
                os.link(unfinished, path)
            except FileExistsError:  # another process took the number
                number += 1
            except OSError:  # a file system without links
                os.replace(unfinished, path)
                return path
            else:
                return path


def contact_sheets(paths: Sequence[Path]) -> Iterator[Path]:
    """Draws pictures that `save` wrote, in their order and under their seeds; gives where each sheet of 256 is.

    A sheet's name is made of the numbers that are on it, so the same pictures have the same sheet.
    """
    for start in range(0, len(paths), _MOST_ON_A_SHEET):
        part = paths[start : start + _MOST_ON_A_SHEET]
        numbers = [_number(path) for path in part]
        name = f"{numbers[0]:05d}-{numbers[-1]:05d}-sheet"
        if any(after != before + 1 for before, after in itertools.pairwise(numbers)):
            name += f"-{zlib.crc32(repr(numbers).encode()):08x}"  # other pictures may lie between the same two
        sheet = part[0].with_name(f"{name}.png")
        with _unfinished(_sheet(part), sheet.parent) as unfinished:
            os.replace(unfinished, sheet)
        yield sheet


def _sheet(paths: Sequence[Path]) -> Image.Image:
    columns = math.ceil(math.sqrt(len(paths)))
    rows = math.ceil(len(paths) / columns)
    across, down = _SIDE + _GAP, _SIDE + _LABEL + _GAP
    sheet = Image.new("RGB", (columns * across + _GAP, rows * down + _GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_LABEL - 4)
    for index, path in enumerate(paths):
        left, top = _GAP + index % columns * across, _GAP + index // columns * down
        with Image.open(path) as picture:
            small = max(picture.size) < _SIDE
            method = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
            fitted = ImageOps.contain(picture.convert("RGB"), (_SIDE, _SIDE), method)
        sheet.paste(fitted, (left + (_SIDE - fitted.width) // 2, top + (_SIDE - fitted.height) // 2))
        seed = _NAME.fullmatch(path.name)[2]  # type: ignore[index]
        pen.text((left + _SIDE // 2, top + _SIDE + _LABEL // 2), f"seed {seed}", fill="black", font=font, anchor="mm")
    return sheet


def _numbered(folder: Path) -> Iterator[tuple[Path, int]]:
    """The pictures in `folder` and their seeds, in the order of their names."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return ((folder / name, int(found[2])) for name in names if (found := _NAME.fullmatch(name)))


def _number(path: Path) -> int:
    return int(path.name.partition("-")[0])


def _infotext(path: Path) -> str | None:
    """What is written in a picture; None where it has no infotext or isn't a whole PNG."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.load()
            text = picture.info.get(_INFOTEXT)
    except Exception:  # noqa: BLE001 - whatever Pillow says of it, it is no picture of ours
        return None
    return str(text) if text is not None else None


@contextmanager
def _unfinished(picture: Image.Image, folder: Path, infotext: str | None = None) -> Iterator[Path]:
    """A whole PNG under a name that nothing else has; it is gone afterwards."""
    info = PngInfo()
    if infotext is not None:
        info.add_text(_INFOTEXT, infotext)
    path = folder / f".{uuid.uuid4().hex}.part"
    try:
        picture.save(path, format="PNG", pnginfo=info)
        yield path
    finally:
        path.unlink(missing_ok=True)
