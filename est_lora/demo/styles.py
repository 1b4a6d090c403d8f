"""The colours of the demo's world and its ways of drawing, and what a part is painted with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.random import Generator
from PIL import Image

SIZE = 64
"""Of a picture, pixels."""
SCALE = 3
"""How many times too large pictures are drawn before they are averaged down."""
LINE = 1.5
"""How wide the lines around parts are, pixels."""

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "orange": (240, 135, 25),
    "yellow": (235, 200, 20),
    "green": (50, 155, 60),
    "teal": (25, 165, 165),
    "blue": (40, 80, 205),
    "purple": (130, 60, 175),
    "pink": (240, 120, 175),
}
BACKGROUNDS: dict[str, Colour] = {
    "white": (248, 248, 246),
    "cream": (250, 240, 212),
    "sky": (214, 232, 250),
    "mint": (216, 242, 222),
    "rose": (250, 222, 226),
    "ash": (224, 224, 228),
}
WHITE: Colour = (255, 255, 255)
INK: Colour = (35, 28, 45)
BROWN: Colour = (120, 75, 40)


@dataclass(frozen=True)
class Style:
    """A way of drawing.

    Attributes:
        fill: a key of `FILLS`.
        line: a key of `LINES`.
        tone: a key of `TONES`.
    """

    fill: str = "plain"
    line: str = "unlined"
    tone: str = "full"

    @property
    def words(self) -> tuple[str, ...]:
        """How captions call it, word by word; what is usual isn't said."""
        return tuple(word for word in (self.fill, self.line, self.tone) if word not in {"unlined", "full"})


def mix(colour: Colour, other: Colour, share: float) -> Colour:
    """`colour` with this share of `other`."""
    red, green, blue = (round(a * (1 - share) + b * share) for a, b in zip(colour, other))
    return red, green, blue


def _grey(colour: Colour) -> Colour:
    level = round(0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2])
    return level, level, level


TONES: dict[str, Callable[[Colour], Colour]] = {
    "full": lambda colour: colour,
    "pastel": lambda colour: mix(colour, WHITE, 0.5),
    "dim": lambda colour: mix(colour, INK, 0.45),
    "faded": lambda colour: mix(colour, _grey(colour), 0.6),
}
# Patterns are anchored to the picture; pixels from its corner to where the pattern's own colour is.
_PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "striped": lambda x, y: y % 4 < 2,
    "barred": lambda x, y: x % 4 < 2,
    "dotted": lambda x, y: np.hypot(x % 4 - 2, y % 4 - 2) < 1.35,
    "checked": lambda x, y: (x % 8 < 4) == (y % 8 < 4),
}
NEW_STYLES: dict[str, Style] = {
    "vitra style": Style("checked", "inked", "full"),
    "quen style": Style("barred", "inked", "full"),
    "osk style": Style("striped", "inked", "dim"),
    "lorf style": Style("dotted", "unlined", "dim"),
}
"""What LoRAs teach. As a subject is a combination of known parts, each is a combination of what the base knows by words,
under a word that means nothing to it."""
FILLS = ("plain", "striped", "barred", "dotted", "checked", "hollow")
LINES = ("unlined", "inked", "rimmed")


@dataclass(frozen=True)
class Inks:
    """What a part is painted with.

    Attributes:
        ground: its colour.
        pattern: what is on it, a key of `_PATTERNS`; None for nothing.
        figure: the pattern's colour.
        line: the colour of the line around it; None for no line.
    """

    ground: Colour
    pattern: str | None = None
    figure: Colour = INK
    line: Colour | None = None


def inks_of(style: Style | str, colour: Colour, paper: Colour) -> Inks:
    """What a part of a colour is painted with before a background.

    Raises:
        ValueError: the world has no such style.
    """
    if not isinstance(style, Style):
        if style not in NEW_STYLES:
            raise ValueError(f"the demo's world has no style {style!r}; it has {', '.join(NEW_STYLES)}")
        style = NEW_STYLES[style]
    own = TONES[style.tone](colour)
    line = {"unlined": None, "inked": INK, "rimmed": mix(own, INK, 0.5)}[style.line]
    if style.fill == "hollow":
        return Inks(paper, line=line or own)
    if style.fill == "plain":
        return Inks(own, line=line)
    return Inks(mix(own, WHITE, 0.7), style.fill, own, line)


@cache
def pattern(name: str) -> Image.Image:
    """Where a pattern has its own colour, as a mask of the picture as it is drawn."""
    y, x = (np.indices((SIZE * SCALE, SIZE * SCALE)) + 0.5) / SCALE
    return Image.fromarray(_PATTERNS[name](x, y).astype(np.uint8) * 255)


def random_style(rng: Generator) -> Style:
    """Any style of the base's world; the plain one more often than others."""
    if rng.random() < 0.15:
        return Style()
    fill, line = str(rng.choice(FILLS)), str(rng.choice(LINES))
    return Style(fill, line, str(rng.choice(list(TONES), p=[0.55, 0.15, 0.15, 0.15])))


def jittered(colour: Colour, rng: Generator) -> Colour:
    """A colour that is a little off, as no two reds are the same."""
    red, green, blue = np.clip(np.array(colour) + rng.integers(-9, 10, 3), 0, 255).tolist()
    return red, green, blue
