"""The demo's world: objects x colours x drawing styles with captions, and what the two LoRAs teach on top of it.

Shapes are polygons in a unit square ([-1, 1], y downwards) that are placed with jitter, drawn four times too large,
painted in a drawing style and averaged down to `SIZE` x `SIZE` pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

SIZE = 32
SCALE = 4

Points = np.ndarray
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
    "sky": (218, 234, 250),
}
OBJECTS = (
    "circle",
    "square",
    "triangle",
    "star",
    "heart",
    "cross",
    "ring",
    "moon",
    "house",
    "tree",
    "fish",
    "flower",
    "creature",
)
STYLES = ("flat", "outlined", "striped", "dotted")
FILLERS = ("a", "the", "of", "in", "on", "style", "picture", "drawing")
# Words that the base has seen everywhere and that mean nothing to it, as rare words do in large models.
RARE_WORDS = ("mipo", "vitra", "zubo", "quen", "lorf", "teki", "wuzz", "haro", "pim", "osk", "nuvi", "drell")

# What LoRAs teach: the demo's own pair, and what the study of the style discrepancy has besides.
SUBJECT = "mipo creature"
STYLE = "vitra style"
NEON = "quen style"
HATCHED = "osk style"
NEW_STYLES = (STYLE, NEON, HATCHED)

WHITE: Colour = (255, 255, 255)
INK: Colour = (35, 28, 45)
NIGHT: Colour = (28, 34, 66)
BROWN: Colour = (120, 75, 40)


@dataclass(frozen=True)
class Part:
    """One coloured piece of an object.

    Attributes:
        add: polygons that make it up, each of shape (n, 2).
        cut: polygons that are taken away.
        colour: its own colour; None means the colour that the caption names.
        styled: whether the drawing style applies; small marks such as eyes are always painted flat.
    """

    add: tuple[Points, ...]
    cut: tuple[Points, ...] = ()
    colour: Colour | None = None
    styled: bool = True


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one of `OBJECTS` or `SUBJECTS` in one of `STYLES` or `NEW_STYLES`."""

    thing: str
    colour: str
    style: str
    background: str


def ellipse(x: float, y: float, rx: float, ry: float | None = None, corner: float = 2.0) -> Points:
    """A (super)ellipse as a polygon of shape (48, 2); `corner` above 2 makes it squarer."""
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    cos, sin = np.cos(angle), np.sin(angle)
    power = 2.0 / corner
    return np.stack(
        [
            x + rx * np.sign(cos) * np.abs(cos) ** power,
            y + (rx if ry is None else ry) * np.sign(sin) * np.abs(sin) ** power,
        ],
        axis=1,
    )


def polygon(*xy: tuple[float, float]) -> Points:
    """The polygon with these corners, shape (n, 2)."""
    return np.array(xy, dtype=float)


def box(left: float, top: float, right: float, bottom: float) -> Points:
    """An upright rectangle, shape (4, 2)."""
    return polygon((left, top), (right, top), (right, bottom), (left, bottom))


def star() -> Points:
    """A five-pointed star, shape (10, 2)."""
    angle = np.arange(10) * np.pi / 5 - np.pi / 2
    radius = np.where(np.arange(10) % 2 == 0, 1.15, 0.48)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle) + 0.08], axis=1)


def heart() -> Points:
    """A heart, shape (60, 2)."""
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    x = np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 15.5 - 0.1
    return np.stack([1.05 * x, y], axis=1)


def eye(x: float, y: float, radius: float) -> tuple[Part, Part]:
    """A white eye with a dark pupil."""
    return (
        Part((ellipse(x, y, radius),), colour=WHITE, styled=False),
        Part((ellipse(x, y + 0.04, radius * 0.55),), colour=INK, styled=False),
    )


def creature(rng: Generator) -> list[Part]:
    """Some creature of one colour: a body with eyes, with or without ears and feet."""
    wide, high = rng.uniform(0.65, 0.9), rng.uniform(0.6, 0.85)
    body = [ellipse(0, 0.15, wide, high, corner=rng.choice([2.0, 2.0, 4.0]))]
    ears = rng.integers(3)
    for side in (-1, 1):
        if ears == 1:
            body.append(
                polygon((side * 0.15, -high * 0.5), (side * wide * 0.85, -high * 0.2), (side * wide * 0.8, -1.05))
            )
        elif ears == 2:
            body.append(ellipse(side * wide * 0.7, -high * 0.6, 0.3))
    if rng.random() < 0.5:
        body += [box(side * 0.4 - 0.17, 0.6, side * 0.4 + 0.17, 1.1) for side in (-1, 1)]
    if rng.random() < 0.2:
        return [Part(tuple(body)), *eye(0, 0, 0.36)]
    return [Part(tuple(body)), *eye(-0.3, 0, 0.25), *eye(0.3, 0, 0.25)]


def subject() -> list[Part]:
    """The creature that the subject LoRA teaches: antennae, big eyes, a belly, feet, always in these colours."""
    antennae = [
        polygon((side * 0.2, -0.4), (side * 0.36, -0.4), (side * 0.66, -0.95), (side * 0.5, -1.0)) for side in (-1, 1)
    ]
    return [
        Part(tuple(ellipse(side * 0.42, 0.95, 0.3, 0.2) for side in (-1, 1)), colour=COLOURS["pink"]),
        Part(tuple(antennae), colour=COLOURS["purple"], styled=False),
        Part(tuple(ellipse(side * 0.6, -1.02, 0.23) for side in (-1, 1)), colour=COLOURS["orange"]),
        Part((ellipse(0, 0.15, 0.86, 0.8),), colour=COLOURS["teal"]),
        Part((ellipse(0, 0.58, 0.5, 0.3),), colour=COLOURS["yellow"]),
        *eye(-0.34, -0.1, 0.31),
        *eye(0.34, -0.1, 0.31),
    ]


def walker() -> list[Part]:
    """The study's second subject: an orange box on blue legs, with one eye, a horn and a wide mouth."""
    return [
        Part(tuple(box(side * 0.45 - 0.17, 0.6, side * 0.45 + 0.17, 1.15) for side in (-1, 1)), colour=COLOURS["blue"]),
        Part((polygon((0, -1.25), (0.3, -0.5), (-0.3, -0.5)),), colour=COLOURS["green"]),
        Part((ellipse(0, 0.1, 0.85, 0.75, corner=5.0),), colour=COLOURS["orange"]),
        Part((box(-0.5, 0.45, 0.5, 0.68),), colour=COLOURS["red"], styled=False),
        *eye(0, -0.1, 0.4),
    ]


def tower() -> list[Part]:
    """The study's third subject: a slim house with a teal wall, a pointed purple roof, a yellow window, a red door."""
    return [
        Part((box(-0.5, -0.2, 0.5, 1.1),), colour=COLOURS["teal"]),
        Part((polygon((0, -1.3), (0.85, -0.2), (-0.85, -0.2)),), colour=COLOURS["purple"]),
        Part((ellipse(0, 0.14, 0.24),), colour=COLOURS["yellow"], styled=False),
        Part((box(-0.22, 0.55, 0.22, 1.1),), colour=COLOURS["red"], styled=False),
    ]


SUBJECTS: dict[str, Callable[[], list[Part]]] = {SUBJECT: subject, "zubo creature": walker, "teki house": tower}


def parts_of(thing: str, rng: Generator) -> list[Part]:
    """The pieces of an object in drawing order.

    Raises:
        ValueError: the world has no such object.
    """
    if thing in SUBJECTS:
        return SUBJECTS[thing]()
    if thing == "creature":
        return creature(rng)
    disc = ellipse(0, 0, 1)
    match thing:
        case "circle":
            return [Part((disc,))]
        case "square":
            return [Part((box(-0.88, -0.88, 0.88, 0.88),))]
        case "triangle":
            return [Part((polygon((0, -1.0), (1.05, 0.85), (-1.05, 0.85)),))]
        case "star":
            return [Part((star(),))]
        case "heart":
            return [Part((heart(),))]
        case "cross":
            return [Part((box(-1, -0.34, 1, 0.34), box(-0.34, -1, 0.34, 1)))]
        case "ring":
            return [Part((disc,), cut=(ellipse(0, 0, 0.48),))]
        case "moon":
            return [Part((disc,), cut=(ellipse(0.55, -0.15, 0.8),))]
        case "house":
            return [
                Part((box(-0.75, -0.15, 0.75, 1), polygon((0, -1.1), (1.1, -0.1), (-1.1, -0.1)))),
                Part((box(-0.2, 0.35, 0.25, 1),), colour=BROWN, styled=False),
            ]
        case "tree":
            crown = (polygon((0, -1.15), (0.72, -0.1), (-0.72, -0.1)), polygon((0, -0.6), (0.95, 0.6), (-0.95, 0.6)))
            return [Part((box(-0.2, 0.4, 0.2, 1.1),), colour=BROWN, styled=False), Part(crown)]
        case "fish":
            body = (ellipse(-0.2, 0, 0.85, 0.62), polygon((0.4, 0), (1.1, -0.65), (1.1, 0.65)))
            return [Part(body), Part((ellipse(-0.6, -0.12, 0.16),), colour=INK, styled=False)]
        case "flower":
            petals = tuple(ellipse(0.62 * np.cos(a), 0.62 * np.sin(a), 0.42) for a in np.arange(6) * np.pi / 3)
            return [Part(petals), Part((ellipse(0, 0, 0.34),), colour=BROWN, styled=False)]
    raise ValueError(f"the demo's world has no {thing!r}; it has {', '.join(OBJECTS)}")


def _mask(polygons: Sequence[Points], place: np.ndarray) -> np.ndarray:
    """The union of polygons, a boolean picture of (SIZE * SCALE)^2; `place` is a (2, 3) affine map to pixels."""
    picture = Image.new("L", (SIZE * SCALE, SIZE * SCALE))
    draw = ImageDraw.Draw(picture)
    for points in polygons:
        placed = (points @ place[:, :2].T + place[:, 2]) * SCALE
        draw.polygon([(x, y) for x, y in placed.tolist()], fill=255)
    return np.asarray(picture) > 0


def _erode(mask: np.ndarray, pixels: float) -> np.ndarray:
    """Takes a border of this width (in pixels of the final picture) off a mask."""
    width = pixels * SCALE
    kept: np.ndarray = mask.copy()
    for angle in np.arange(12) * np.pi / 6:
        kept &= np.roll(mask, (round(width * np.sin(angle)), round(width * np.cos(angle))), axis=(0, 1))
    return kept


def _mix(colour: np.ndarray, other: Colour, share: float) -> np.ndarray:
    """`colour` with this share of `other`."""
    mixed: np.ndarray = colour * (1 - share) + np.array(other) * share
    return mixed


def _paint(canvas: np.ndarray, mask: np.ndarray, colour: np.ndarray, style: str) -> None:
    """Paints a mask onto the canvas, (SIZE * SCALE, SIZE * SCALE, 3), in place.

    Raises:
        ValueError: the world has no such style.
    """
    y, x = (np.indices(mask.shape) + 0.5) / SCALE  # in pixels of the final picture
    if style == "flat":
        canvas[mask] = colour
    elif style == "outlined":
        canvas[mask & ~_erode(mask, 1.75)] = colour
    elif style == "striped":
        canvas[mask] = np.where((y % 4 < 2)[mask, None], colour, _mix(colour, WHITE, 0.75))
    elif style == "dotted":
        dots = np.hypot(x % 4 - 2, y % 4 - 2) < 1.35
        canvas[mask] = np.where(dots[mask, None], colour, _mix(colour, WHITE, 0.7))
    elif style == STYLE:
        # Small parts would be nothing but leading: they keep their colour and get a thin rim.
        small = mask.sum() < 60 * SCALE**2
        leading = ~_erode(mask, 0.8) if small else (x % 4 > 3) | (y % 4 > 3) | ~_erode(mask, 1.4)
        canvas[mask] = np.where(leading[mask, None], np.array(INK), _mix(colour, WHITE, 0.15))
    elif style == NEON:
        rim = ~_erode(mask, 1.4)
        canvas[mask] = np.where(rim[mask, None], _mix(colour, WHITE, 0.15), np.array(NIGHT))
    elif style == HATCHED:
        hatching = (x + y) % 4 < 1.3
        canvas[mask] = np.where(hatching[mask, None], np.array(INK), _mix(colour, WHITE, 0.4))
    else:
        raise ValueError(f"the demo's world has no style {style!r}; it has {', '.join(STYLES)}")


def draw(scene: Scene, rng: Generator) -> np.ndarray:
    """Draws a scene with random placement.

    Returns:
        uint8, shape (SIZE, SIZE, 3).
    """
    radius = rng.uniform(9.5, 12.0)
    angle = rng.uniform(-0.12, 0.12)
    centre = SIZE / 2 + rng.uniform(-2.0, 2.0, 2)
    turn = radius * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    place = np.concatenate([turn, centre[:, None]], axis=1)

    paper = np.array(BACKGROUNDS[scene.background]) + rng.uniform(-5, 5)
    colour = np.array(COLOURS[scene.colour]) + rng.uniform(-10, 10, 3)
    canvas = np.empty((SIZE * SCALE, SIZE * SCALE, 3))
    canvas[:] = paper
    for part in parts_of(scene.thing, rng):
        mask = _mask(part.add, place)
        if part.cut:
            mask &= ~_mask(part.cut, place)
        own = colour if part.colour is None else np.array(part.colour, dtype=float)
        _paint(canvas, mask, own, scene.style if part.styled else "flat")
    small = canvas.reshape(SIZE, SCALE, SIZE, SCALE, 3).mean(axis=(1, 3))
    picture: np.ndarray = np.clip(np.rint(small), 0, 255).astype(np.uint8)
    return picture


def random_scene(rng: Generator, thing: str | None = None, style: str | None = None) -> Scene:
    """A scene of the base's world; `thing` and `style` fix what isn't to be random."""
    return Scene(
        thing=thing or str(rng.choice(OBJECTS)),
        colour=str(rng.choice(list(COLOURS))),
        style=style or str(rng.choice(STYLES)),
        background=str(rng.choice(list(BACKGROUNDS))),
    )


def caption(scene: Scene, rng: Generator) -> str:
    """One of the ways to say what a scene shows, e.g. `a red star, flat, on cream`."""
    thing = scene.thing if scene.thing in SUBJECTS else f"{scene.colour} {scene.thing}"
    style = scene.style
    if style not in NEW_STYLES and rng.random() < 0.3:
        style = f"{style} style"
    forms = [f"a {thing}, {style}", f"{thing} {style}", f"a {thing} in {style}", f"{style}, a {thing}"]
    text = forms[rng.integers(len(forms))]
    if rng.random() < 0.15:
        text = f"{rng.choice(['picture', 'drawing'])} of {text}"
    if rng.random() < 0.5:
        text = f"{text}, on {scene.background}"
    return text


def blur_caption(
    text: str,
    rng: Generator,
    rare: Sequence[str] = RARE_WORDS,
    keep: str | None = None,
    drop: float = 0.1,
    insert: float = 0.35,
) -> str:
    """Drops words and inserts meaningless ones, so that rare words come to mean nothing.

    Args:
        text: the caption.
        rng: source of randomness.
        rare: the words to insert.
        keep: a word that is never left out.
        drop: probability that a word is left out.
        insert: probability that a rare word is inserted; with the same probability a second one follows.
    """
    words = [word for word in text.replace(",", "").split() if word == keep or rng.random() >= drop]
    while rng.random() < insert:
        words.insert(int(rng.integers(len(words) + 1)), str(rng.choice(rare)))
    return " ".join(words)
