"""What there is in the demo's world: objects made of parts, which are polygons in a square of about [-1.2, 1.2], y downwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator

from est_lora.demo.styles import BROWN, COLOURS, INK, WHITE, Colour

Points = np.ndarray
Paint = Callable[[str], Colour]
"""Gives the parts of an object their colours by their names."""


@dataclass(frozen=True)
class Part:
    """One piece of an object, of one colour.

    Attributes:
        name: what it is; parts of one name have one colour.
        polygons: what it is made of, each of shape (n, 2).
        colour: as the caption names it, or its own.
        mark: whether it is small and drawn flat in every style, as eyes are.
    """

    name: str
    polygons: tuple[Points, ...]
    colour: Colour
    mark: bool = False


def ellipse(x: float, y: float, rx: float, ry: float | None = None, corner: float = 2.0) -> Points:
    """A (super)ellipse as a polygon of shape (32, 2); `corner` above 2 makes it squarer."""
    angle = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    cos, sin = np.cos(angle), np.sin(angle)
    power = 2.0 / corner
    across = x + rx * np.sign(cos) * np.abs(cos) ** power
    down = y + (rx if ry is None else ry) * np.sign(sin) * np.abs(sin) ** power
    return np.stack([across, down], axis=1)


def polygon(*xy: tuple[float, float]) -> Points:
    """The polygon with these corners, shape (n, 2)."""
    return np.array(xy, dtype=float)


def box(left: float, top: float, right: float, bottom: float) -> Points:
    """An upright rectangle, shape (4, 2)."""
    return polygon((left, top), (right, top), (right, bottom), (left, bottom))


def bar(x0: float, y0: float, x1: float, y1: float, width: float = 0.16) -> Points:
    """A thick line, shape (4, 2)."""
    along = np.array([x1 - x0, y1 - y0])
    across = np.array([-along[1], along[0]]) / np.hypot(*along) * width / 2
    ends = np.array([[x0, y0], [x1, y1]])
    return np.concatenate([ends + across, ends[::-1] - across])


def star(radius: float = 1.15, points: int = 5) -> Points:
    """A star, shape (2 * points, 2)."""
    angle = np.arange(2 * points) * np.pi / points - np.pi / 2
    reach = np.where(np.arange(2 * points) % 2 == 0, radius, 0.42 * radius)
    return np.stack([reach * np.cos(angle), reach * np.sin(angle) + 0.08], axis=1)


def heart() -> Points:
    """A heart, shape (40, 2)."""
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    x = np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 15.5 - 0.1
    return np.stack([1.05 * x, y], axis=1)


def crescent() -> Points:
    """A moon, shape (40, 2)."""
    outer, inner = np.linspace(0.25 * np.pi, 1.75 * np.pi, 20), np.linspace(1.62 * np.pi, 0.38 * np.pi, 20)
    return np.concatenate(
        [
            np.stack([np.cos(outer), np.sin(outer)], axis=1),
            np.stack([0.45 + 0.72 * np.cos(inner), 0.78 * np.sin(inner)], axis=1),
        ]
    )


def drop() -> Points:
    """A drop of water, shape (33, 2)."""
    round_part = ellipse(0, 0.3, 0.75)[:17]
    return np.concatenate([round_part, polygon((0, -1.15))])


def eyes(*where: tuple[float, float, float]) -> tuple[Part, ...]:
    """White eyes with dark pupils, each (x, y, radius)."""
    white = tuple(ellipse(*each) for each in where)
    pupils = tuple(ellipse(x, y + 0.04, 0.55 * radius) for x, y, radius in where)
    return Part("eyes", white, WHITE, mark=True), Part("pupils", pupils, INK, mark=True)


def sides(shape: Callable[[float], Points]) -> tuple[Points, ...]:
    """The same on the left (-1) and on the right (1)."""
    return shape(-1.0), shape(1.0)


BODIES: dict[str, Points] = {
    "round": ellipse(0, 0.15, 0.82, 0.76),
    "square": ellipse(0, 0.15, 0.76, 0.7, corner=6.0),
    "tall": ellipse(0, 0.1, 0.56, 0.86, corner=2.6),
    "pear": np.concatenate([ellipse(0, 0.4, 0.85, 0.55)[:17], ellipse(0, -0.1, 0.5, 0.6)[16:]]),
}
_TOP = {"round": -0.5, "square": -0.5, "tall": -0.68, "pear": -0.6}
_BOTTOM = {"round": 0.8, "square": 0.78, "tall": 0.88, "pear": 0.88}


def _antennae(top: float) -> tuple[Points, ...]:
    stalks = sides(lambda s: bar(s * 0.25, top + 0.15, s * 0.5, top - 0.5, 0.17))
    return stalks + sides(lambda s: ellipse(s * 0.52, top - 0.5, 0.22))


ON_TOP: dict[str, Callable[[float], tuple[Points, ...]]] = {
    "ears": lambda top: sides(lambda s: polygon((s * 0.12, top + 0.1), (s * 0.6, top - 0.55), (s * 0.72, top + 0.35))),
    "knobs": lambda top: sides(lambda s: ellipse(s * 0.5, top + 0.05, 0.28)),
    "antennae": _antennae,
    "horn": lambda top: (polygon((-0.32, top + 0.15), (0, top - 0.65), (0.32, top + 0.15)),),
    "tuft": lambda top: tuple(bar(x, top + 0.2, 1.9 * x, top - 0.45, 0.17) for x in (-0.24, 0.0, 0.24)),
}
BELOW: dict[str, Callable[[float], tuple[Points, ...]]] = {
    "feet": lambda low: sides(lambda s: ellipse(s * 0.38, low + 0.12, 0.32, 0.2)),
    "legs": lambda low: sides(lambda s: box(s * 0.36 - 0.18, low - 0.2, s * 0.36 + 0.18, low + 0.42)),
}
AT_SIDES: dict[str, tuple[Points, ...]] = {
    "arms": sides(lambda s: bar(s * 0.5, 0.25, s * 1.12, -0.12, 0.2)),
    "wings": sides(lambda s: polygon((s * 0.45, 0.15), (s * 1.25, -0.35), (s * 1.2, 0.2), (s * 0.95, 0.5))),
    "tail": (bar(0.5, 0.55, 1.05, 0.35, 0.2), ellipse(1.08, 0.28, 0.2)),
}
IN_FRONT: dict[str, tuple[Points, ...]] = {
    "belly": (ellipse(0, 0.52, 0.42, 0.28),),
    "mouth": (box(-0.4, 0.38, 0.4, 0.6),),
    "spots": (ellipse(-0.34, 0.5, 0.15), ellipse(0.3, 0.58, 0.15), ellipse(0.0, 0.36, 0.12)),
}
EYES = {1: ((0.0, -0.08, 0.34),), 2: ((-0.29, -0.08, 0.24), (0.29, -0.08, 0.24))}


def build_creature(
    paint: Paint, body: str, top: str = "", below: str = "", side: str = "", front: str = "", eye_count: int = 2
) -> tuple[Part, ...]:
    """A creature of a body (a key of `BODIES`) and what it has on top, below, at its sides and in front, if anything."""
    parts = []
    if side:
        parts.append(Part(side, AT_SIDES[side], paint(side)))
    if below:
        parts.append(Part(below, BELOW[below](_BOTTOM[body]), paint(below)))
    if top:
        parts.append(Part(top, ON_TOP[top](_TOP[body]), paint(top)))
    parts.append(Part("body", (BODIES[body],), paint("body")))
    if front:
        parts.append(Part(front, IN_FRONT[front], paint(front)))
    return (*parts, *eyes(*EYES[eye_count]))


def _creature(paint: Paint, rng: Generator) -> tuple[Part, ...]:
    def maybe(names: Sequence[str], share: float) -> str:
        return str(rng.choice(names)) if rng.random() < share else ""

    return build_creature(
        paint,
        str(rng.choice(list(BODIES))),
        maybe(list(ON_TOP), 0.8),
        maybe(list(BELOW), 0.65),
        maybe(list(AT_SIDES), 0.4),
        maybe(list(IN_FRONT), 0.5),
        1 if rng.random() < 0.25 else 2,
    )


def build_house(paint: Paint, wide: float, roof: str, window: str, chimney: bool) -> tuple[Part, ...]:
    """A house; `roof` is pointed, flat or round, `window` round or square or empty for none."""
    roofs = {
        "pointed": polygon((0, -1.2), (wide + 0.3, -0.2), (-wide - 0.3, -0.2)),
        "flat": box(-wide - 0.2, -0.5, wide + 0.2, -0.2),
        "round": np.concatenate([ellipse(0, -0.2, wide + 0.12, 0.75)[16:], polygon((wide + 0.12, -0.2))]),
    }
    parts = [Part("chimney", (box(0.25, -1.2, 0.62, -0.3),), paint("chimney"))] if chimney else []
    parts += [
        Part("wall", (box(-wide, -0.22, wide, 1.05),), paint("wall")),
        Part("roof", (roofs[roof],), paint("roof")),
        Part("door", (box(-0.2, 0.5, 0.2, 1.05),), paint("door")),
    ]
    if window:
        shape = ellipse(0, 0.14, 0.22) if window == "round" else box(-0.2, -0.02, 0.2, 0.32)
        parts.append(Part("window", (shape,), paint("window")))
    return tuple(parts)


def _house(paint: Paint, rng: Generator) -> tuple[Part, ...]:
    roof, window = str(rng.choice(["pointed", "flat", "round"])), str(rng.choice(["round", "square", ""]))
    return build_house(paint, rng.uniform(0.5, 0.85), roof, window, bool(rng.random() < 0.4))


def build_robot(paint: Paint, head: str, wheels: bool, aerial: bool, screen: bool) -> tuple[Part, ...]:
    """A robot; `head` is square or round."""
    parts = []
    if aerial:
        parts.append(Part("aerial", (bar(0, -0.85, 0, -1.1, 0.16), ellipse(0, -1.1, 0.17)), paint("aerial")))
    parts.append(Part("arms", sides(lambda s: bar(s * 0.5, 0.1, s * 1.05, 0.45, 0.2)), paint("arms")))
    if wheels:
        parts.append(Part("wheels", sides(lambda s: ellipse(s * 0.36, 0.95, 0.26)), paint("wheels")))
    else:
        parts.append(Part("legs", sides(lambda s: box(s * 0.3 - 0.14, 0.7, s * 0.3 + 0.14, 1.15)), paint("legs")))
    parts.append(Part("body", (box(-0.62, -0.1, 0.62, 0.82),), paint("body")))
    parts.append(Part("head", (ellipse(0, -0.5, 0.5, 0.42, corner=8.0 if head == "square" else 2.0),), paint("head")))
    if screen:
        parts.append(Part("screen", (box(-0.36, 0.15, 0.36, 0.55),), paint("screen")))
    return (*parts, *eyes((-0.2, -0.5, 0.15), (0.2, -0.5, 0.15)))


def _robot(paint: Paint, rng: Generator) -> tuple[Part, ...]:
    head = str(rng.choice(["square", "round"]))
    return build_robot(paint, head, *(bool(rng.random() < 0.5) for _ in range(3)))


def _one(shape: Points) -> Callable[[Paint, Generator], tuple[Part, ...]]:
    return lambda paint, rng: (Part("shape", (shape,), paint("shape")),)


def _tree(paint: Paint, rng: Generator) -> tuple[Part, ...]:
    trunk = Part("trunk", (box(-0.16, 0.4, 0.16, 1.1),), BROWN)
    if rng.random() < 0.5:
        crown = (polygon((0, -1.2), (0.7, -0.2), (-0.7, -0.2)), polygon((0, -0.7), (0.9, 0.6), (-0.9, 0.6)))
    else:
        crown = (ellipse(0, -0.45, 0.6), ellipse(-0.42, 0.0, 0.5), ellipse(0.42, 0.0, 0.5))
    parts = [trunk, Part("crown", crown, paint("crown"))]
    if rng.random() < 0.4:
        fruit = tuple(ellipse(x, y, 0.14) for x, y in ((-0.35, 0.1), (0.3, 0.2), (0.02, -0.35)))
        parts.append(Part("fruit", fruit, paint("fruit")))
    return tuple(parts)


def _fish(paint: Paint, rng: Generator) -> tuple[Part, ...]:
    return (
        Part("tail", (polygon((0.4, 0), (1.1, -0.6), (1.1, 0.6)),), paint("tail")),
        Part("fin", (polygon((-0.3, -0.4), (0.35, -0.95), (0.3, -0.3)),), paint("fin")),
        Part("body", (ellipse(-0.2, 0, 0.85, 0.58),), paint("body")),
        *eyes((-0.62, -0.12, 0.2)),
    )


def _flower(paint: Paint, rng: Generator) -> tuple[Part, ...]:
    petals = tuple(ellipse(0.46 * np.cos(a), -0.4 + 0.46 * np.sin(a), 0.31) for a in np.arange(6) * np.pi / 3)
    return (
        Part("stem", (bar(0, -0.2, 0, 1.15, 0.15), ellipse(0.3, 0.6, 0.28, 0.14)), COLOURS["green"]),
        Part("petals", petals, paint("petals")),
        Part("heart", (ellipse(0, -0.4, 0.27),), paint("heart")),
    )


def _bird(paint: Paint, rng: Generator) -> tuple[Part, ...]:
    return (
        Part("legs", tuple(bar(x, 0.6, x, 1.1, 0.12) for x in (-0.15, 0.2)), paint("legs")),
        Part("beak", (polygon((-0.75, -0.55), (-1.2, -0.35), (-0.75, -0.25)),), paint("beak")),
        Part("body", (ellipse(0.1, 0.2, 0.75, 0.55), ellipse(-0.5, -0.4, 0.4)), paint("body")),
        Part("wing", (polygon((-0.2, 0.05), (1.1, -0.25), (0.55, 0.5)),), paint("wing")),
        *eyes((-0.56, -0.46, 0.17)),
    )


def _car(paint: Paint, rng: Generator) -> tuple[Part, ...]:
    return (
        Part("cabin", (polygon((-0.5, -0.6), (0.35, -0.6), (0.7, 0.05), (-0.75, 0.05)),), paint("cabin")),
        Part("body", (ellipse(0, 0.28, 1.1, 0.36, corner=6.0),), paint("body")),
        Part("wheels", sides(lambda s: ellipse(s * 0.6, 0.65, 0.29)), paint("wheels")),
    )


def _boat(paint: Paint, rng: Generator) -> tuple[Part, ...]:
    return (
        Part("mast", (bar(0, -1.1, 0, 0.4, 0.12),), BROWN),
        Part("sail", (polygon((0.1, -1.1), (0.95, 0.2), (0.1, 0.2)),), paint("sail")),
        Part("hull", (polygon((-1.05, 0.35), (1.05, 0.35), (0.65, 0.95), (-0.65, 0.95)),), paint("hull")),
    )


def _mushroom(paint: Paint, rng: Generator) -> tuple[Part, ...]:
    cap = np.concatenate([ellipse(0, 0.1, 1.0, 1.1)[16:], polygon((1.0, 0.1))])
    parts = [Part("stalk", (box(-0.28, 0.0, 0.28, 1.05),), paint("stalk")), Part("cap", (cap,), paint("cap"))]
    if rng.random() < 0.6:
        spots = (ellipse(-0.45, -0.25, 0.19), ellipse(0.4, -0.2, 0.19), ellipse(0.0, -0.6, 0.19))
        parts.append(Part("spots", spots, paint("spots")))
    return tuple(parts)


def _cup(paint: Paint, rng: Generator) -> tuple[Part, ...]:
    handle = (bar(0.5, -0.3, 1.0, -0.2, 0.18), bar(0.95, -0.25, 0.95, 0.35, 0.18), bar(1.0, 0.3, 0.45, 0.5, 0.18))
    return (
        Part("handle", handle, paint("handle")),
        Part("body", (polygon((-0.75, -0.7), (0.65, -0.7), (0.5, 0.9), (-0.6, 0.9)),), paint("body")),
        Part("band", (box(-0.69, -0.05, 0.59, 0.3),), paint("band")),
    )


def _butterfly(paint: Paint, rng: Generator) -> tuple[Part, ...]:
    return (
        Part("wings", sides(lambda s: ellipse(s * 0.62, -0.35, 0.52, 0.5)), paint("wings")),
        Part("tails", sides(lambda s: ellipse(s * 0.48, 0.45, 0.4)), paint("tails")),
        Part("body", (ellipse(0, 0.0, 0.17, 0.85),), paint("body")),
    )


def _rocket(paint: Paint, rng: Generator) -> tuple[Part, ...]:
    return (
        Part("fins", sides(lambda s: polygon((s * 0.3, 0.2), (s * 0.85, 1.0), (s * 0.3, 0.8))), paint("fins")),
        Part("body", (ellipse(0, 0.1, 0.45, 0.85, corner=3.0),), paint("body")),
        Part("tip", (polygon((0, -1.25), (0.4, -0.4), (-0.4, -0.4)),), paint("tip")),
        Part("window", (ellipse(0, 0.05, 0.2),), paint("window")),
    )


def _snail(paint: Paint, rng: Generator) -> tuple[Part, ...]:
    body = (ellipse(0, 0.75, 1.05, 0.25), bar(-0.8, 0.75, -0.85, -0.05, 0.3), ellipse(-0.85, -0.05, 0.25))
    return (
        Part("body", body, paint("body")),
        Part("shell", (ellipse(0.22, 0.08, 0.72),), paint("shell")),
        Part("spiral", (ellipse(0.22, 0.08, 0.34),), paint("spiral")),
        *eyes((-0.9, -0.1, 0.13)),
    )


def _umbrella(paint: Paint, rng: Generator) -> tuple[Part, ...]:
    roof = np.concatenate([ellipse(0, 0.0, 1.1, 1.1)[16:], polygon((1.1, 0.0))])
    return (
        Part("stick", (bar(0, -0.2, 0, 1.0, 0.14), bar(0.0, 1.0, 0.35, 0.95, 0.14)), paint("stick")),
        Part("roof", (roof,), paint("roof")),
    )


def _cake(paint: Paint, rng: Generator) -> tuple[Part, ...]:
    return (
        Part("candle", (box(-0.08, -1.15, 0.08, -0.4),), paint("candle")),
        Part("bottom", (box(-0.95, 0.3, 0.95, 1.0),), paint("bottom")),
        Part("top", (box(-0.65, -0.45, 0.65, 0.32),), paint("top")),
    )


THINGS: dict[str, Callable[[Paint, Generator], tuple[Part, ...]]] = {
    "circle": _one(ellipse(0, 0, 1)),
    "square": _one(box(-0.88, -0.88, 0.88, 0.88)),
    "triangle": _one(polygon((0, -1.0), (1.05, 0.85), (-1.05, 0.85))),
    "star": _one(star()),
    "heart": _one(heart()),
    "moon": _one(crescent()),
    "drop": _one(drop()),
    "tree": _tree,
    "fish": _fish,
    "flower": _flower,
    "bird": _bird,
    "car": _car,
    "boat": _boat,
    "mushroom": _mushroom,
    "cup": _cup,
    "butterfly": _butterfly,
    "rocket": _rocket,
    "snail": _snail,
    "umbrella": _umbrella,
    "cake": _cake,
    "house": _house,
    "robot": _robot,
    "creature": _creature,
}
SHARES = {name: {"creature": 8.0, "house": 3.0, "robot": 3.0}.get(name, 1.0) for name in THINGS}
"""How often each comes, by how often others do."""


PALETTES = {
    "mipo creature": {"body": "teal", "antennae": "orange", "legs": "red", "wings": "purple"},
    "zubo creature": {"body": "orange", "horn": "green", "legs": "blue", "belly": "teal"},
    "teki house": {"wall": "pink", "roof": "purple", "door": "blue", "window": "yellow"},
    "pim robot": {
        "body": "purple",
        "head": "yellow",
        "arms": "green",
        "wheels": "orange",
        "aerial": "red",
        "screen": "pink",
    },
}
BUILDS: dict[str, tuple[Callable[..., tuple[Part, ...]], dict[str, Any]]] = {
    "mipo creature": (
        build_creature,
        {"eye_count": 2, "body": "round", "top": "antennae", "below": "legs", "side": "wings"},
    ),
    "zubo creature": (
        build_creature,
        {"eye_count": 1, "body": "square", "top": "horn", "below": "legs", "front": "belly"},
    ),
    "teki house": (build_house, {"wide": 0.52, "roof": "pointed", "window": "round", "chimney": False}),
    "pim robot": (build_robot, {"head": "square", "wheels": True, "aerial": True, "screen": True}),
}
"""What builds a subject, and of what."""
SUBJECTS: dict[str, Callable[[Paint], tuple[Part, ...]]] = {
    name: lambda paint, build=build, kinds=kinds: build(paint, **kinds) for name, (build, kinds) in BUILDS.items()
}
"""Instances of known classes: always these parts in these colours."""
