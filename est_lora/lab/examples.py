"""What the judge learns from and is tested with: the real thing, and what only looks like it.

The hard negatives are what a fusion that fails would draw: the right colours without the parts, the right parts in
wrong colours, a part that is missing or of another kind; an object that is half in the style, or in what is nearly it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image

from est_lora.demo.styles import (
    BACKGROUNDS,
    COLOURS,
    FILLS,
    LINES,
    NEW_STYLES,
    SIZE,
    TONES,
    Style,
    inks_of,
    jittered,
    random_style,
)
from est_lora.demo.things import (
    AT_SIDES,
    BELOW,
    BUILDS,
    IN_FRONT,
    ON_TOP,
    PALETTES,
    SUBJECTS,
    Part,
    build_creature,
    build_house,
    build_robot,
    ellipse,
)
from est_lora.demo.world import Scene, draw, paint, random_scene

NOTHING = "none"
"""The judge's answer where there is none of what it knows."""
PARTS = tuple((subject, name) for subject in SUBJECTS for name in PALETTES[subject])
"""What part checks look for: of a subject, a part by its name."""


@dataclass(frozen=True)
class Example:
    """A picture and what is right about it.

    Attributes:
        picture: uint8, (SIZE, SIZE, 3).
        answer: a subject's or a style's words, or `NOTHING`.
        kind: what it was made to be.
        parts: for each of `PARTS` whether it is there, in its place and its colour; NaN where that isn't known.
    """

    picture: np.ndarray
    answer: str
    kind: str
    parts: np.ndarray


def any_style(rng: Generator) -> Style | str:
    """Old and new ones alike, but none that leaves nothing of a colour."""
    if rng.random() < 0.5:
        return str(rng.choice(list(NEW_STYLES)))
    style = random_style(rng)
    return any_style(rng) if (style.fill, style.line) == ("hollow", "inked") else style


def corrupted(picture: np.ndarray, rng: Generator) -> np.ndarray:
    """With as much noise, blur, unevenness and change of brightness as pictures of the model have."""
    pixels = picture.astype(np.float32)
    if rng.random() < 0.5:
        soft = sum(np.roll(pixels, shift, axis) for axis in (0, 1) for shift in (-1, 1)) / 4
        pixels += rng.uniform(0.0, 0.6) * (soft - pixels)
    pixels = pixels * rng.uniform(0.94, 1.04) + rng.uniform(-6, 6, 3)
    rough = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((SIZE, SIZE), Image.BICUBIC)
    pixels += rng.uniform(0.0, 0.15) * (np.asarray(rough, np.float32) - 127.5)
    pixels += rng.normal(0.0, rng.uniform(0.0, 14.0), pixels.shape)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def unsteady(scene: Scene, rng: Generator) -> Scene:
    """The same as an unsteady hand draws it: its edges wobble by up to some 2 pixels, patterns don't."""
    waves = rng.uniform(3.0, 16.0, (8, 1)) * _directions(rng, 8)  # radians to a unit
    phases, moves = rng.uniform(0, 2 * np.pi, 8), rng.uniform(0, 0.045) * _directions(rng, 8)

    def wobbled(points: np.ndarray) -> np.ndarray:
        steps = np.linspace(0, 1, 24 // len(points) + 1, endpoint=False)[:, None]
        dense = (points[:, None] + steps * (np.roll(points, -1, axis=0) - points)[:, None]).reshape(-1, 2)
        return dense + np.sin(dense @ waves.T + phases) @ moves

    return _with(scene, [replace(part, polygons=tuple(map(wobbled, part.polygons))) for part in scene.parts])


def _directions(rng: Generator, count: int) -> np.ndarray:
    """Unit vectors, shape (count, 2)."""
    angles = rng.uniform(0, 2 * np.pi, count)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


# ---- subjects


def _unknown() -> np.ndarray:
    return np.full(len(PARTS), np.nan)


def _checked(subject: str, right: Callable[[str], bool]) -> np.ndarray:
    """Which parts of a subject are right; of other subjects none is."""
    return np.array([float(owner == subject and right(name)) for owner, name in PARTS])


def _with(scene: Scene, parts: Sequence[Part]) -> Scene:
    return replace(scene, parts=tuple(parts))


def _is_subject(subject: str, rng: Generator) -> tuple[Scene, np.ndarray]:
    return random_scene(rng, subject, any_style(rng)), _checked(subject, lambda name: True)


def _part_missing(subject: str, rng: Generator) -> tuple[Scene, np.ndarray]:
    scene = random_scene(rng, subject, any_style(rng))
    gone = set(rng.choice(list(PALETTES[subject])[1:], rng.integers(1, 3), replace=False))
    return _with(scene, [part for part in scene.parts if part.name not in gone]), _checked(
        subject, lambda name: name not in gone
    )


def _colours_alone(subject: str, rng: Generator) -> tuple[Scene, np.ndarray]:
    """The main part, or something of its colour, and blots in the colours of the others."""
    scene = random_scene(rng, subject, any_style(rng))
    names = list(PALETTES[subject])
    main = next(part for part in scene.parts if part.name == names[0])
    keeps = rng.random() < 0.5
    parts = [main if keeps else replace(main, polygons=(ellipse(0, 0.1, *rng.uniform(0.6, 0.95, 2)),))]
    for part in scene.parts:
        if part.name in names[1:]:
            where = rng.uniform(-0.75, 0.75, (rng.integers(1, 3), 2))
            blots = tuple(ellipse(x, y, *rng.uniform(0.12, 0.32, 2)) for x, y in where)
            parts.append(replace(part, polygons=blots))
    return _with(scene, parts), _checked(subject, lambda name: keeps and name == names[0])


def _wrong_colours(subject: str, rng: Generator) -> tuple[Scene, np.ndarray]:
    """At least two parts, or the main one, in other colours."""
    scene, own = random_scene(rng, subject, any_style(rng)), PALETTES[subject]
    names = list(own)
    wrong = set(rng.choice(names, rng.integers(2, len(names) + 1), replace=False))
    if rng.random() < 0.3:
        wrong.add(names[0])
    other = {
        name: str(rng.choice([colour for colour in COLOURS if not _alike(colour, own[name])]))
        for name in names  # not of the set: the order of its strings is another in every process
        if name in wrong
    }
    parts = [
        replace(part, colour=jittered(COLOURS[other[part.name]], rng)) if part.name in other else part
        for part in scene.parts
    ]
    return _with(scene, parts), _checked(subject, lambda name: name not in wrong)


def _alike(one: str, other: str) -> bool:
    """Whether two colours can't be told apart in every tone."""
    return one == other or {one, other} in (
        {"red", "pink"},
        {"red", "orange"},
        {"orange", "yellow"},
        {"blue", "purple"},
    )


def _another_instance(subject: str, rng: Generator) -> tuple[Scene, np.ndarray]:
    """The subject's class and colours, with parts of another kind."""
    scene, own = random_scene(rng, subject, any_style(rng)), PALETTES[subject]
    colours = iter(rng.permutation(list(own.values())))
    given: dict[str, str] = {}

    def give(name: str) -> tuple[int, int, int]:
        if name not in given:
            given[name] = own.get(name) or str(next(colours, rng.choice(list(COLOURS))))
        return jittered(COLOURS[given[name]], rng)

    match subject.split()[1]:
        case "creature":
            tops, fronts = [name for name in ON_TOP if name not in own], [name for name in IN_FRONT if name not in own]
            below = str(rng.choice([name for name in BELOW if name not in own]))
            body, eyes = ("round", 2) if "mipo" in subject else ("square", 1)
            side = str(rng.choice(["", *AT_SIDES]))
            parts = build_creature(give, body, str(rng.choice(tops)), below, side, str(rng.choice(fronts)), eyes)
        case "house":
            roof = str(rng.choice(["flat", "round"]))
            parts = build_house(give, rng.uniform(0.5, 0.7), roof, str(rng.choice(["square", ""])), chimney=False)
        case _:
            parts = build_robot(give, "round", wheels=False, aerial=bool(rng.random() < 0.5), screen=False)
    return _with(scene, parts), _unknown()


_OTHER_KINDS: dict[str, Sequence[Any]] = {
    "body": ("round", "square", "tall"),
    "top": tuple(ON_TOP),
    "below": tuple(BELOW),
    "front": tuple(IN_FRONT),
    "eye_count": (1, 2),
    "roof": ("pointed", "flat", "round"),
    "head": ("square", "round"),
    "wheels": (True, False),
}
"""What a subject may have in another kind than its own, by what builds it, where the eye can tell."""


def _one_other_kind(subject: str, rng: Generator) -> tuple[Scene, np.ndarray]:
    """The subject but for one thing, which is of another kind in the same colour."""
    scene, own = random_scene(rng, subject, any_style(rng)), PALETTES[subject]
    build, kinds = BUILDS[subject]
    changed = str(rng.choice([name for name in kinds if name in _OTHER_KINDS]))
    other = rng.choice([kind for kind in _OTHER_KINDS[changed] if kind != kinds[changed]])
    gone = "wheels" if changed == "wheels" else str(kinds[changed])
    parts = build(lambda name: jittered(COLOURS[own.get(name) or own[gone]], rng), **{**kinds, changed: other.item()})
    return _with(scene, parts), _checked(subject, lambda name: name not in {gone, changed})


def _of_the_world(subject: str, rng: Generator) -> tuple[Scene, np.ndarray]:
    kind = subject.split()[1] if rng.random() < 0.5 else None
    return random_scene(rng, kind, any_style(rng)), _unknown()


SUBJECT_KINDS: dict[str, tuple[float, Callable[[str, Generator], tuple[Scene, np.ndarray]]]] = {
    "the subject": (0.40, _is_subject),
    "a part missing": (0.12, _part_missing),
    "a part of another kind": (0.12, _one_other_kind),
    "its colours without its parts": (0.10, _colours_alone),
    "its parts in wrong colours": (0.10, _wrong_colours),
    "another of its class in its colours": (0.06, _another_instance),
    "anything of the world": (0.10, _of_the_world),
}
"""How often the subject's judge sees what, and how it is made."""


def subject_example(rng: Generator, kind: str | None = None) -> Example:
    """An example for the judge of subjects; `kind` is a key of `SUBJECT_KINDS`."""
    kind = kind or str(rng.choice(list(SUBJECT_KINDS), p=[share for share, _ in SUBJECT_KINDS.values()]))
    subject = str(rng.choice(list(SUBJECTS)))
    scene, parts = SUBJECT_KINDS[kind][1](subject, rng)
    return Example(
        corrupted(draw(unsteady(scene, rng)), rng), subject if kind == "the subject" else NOTHING, kind, parts
    )


# ---- styles


def _anything(rng: Generator, style: Style | str) -> Scene:
    thing = str(rng.choice(list(SUBJECTS))) if rng.random() < 0.4 else None
    return unsteady(random_scene(rng, thing, style), rng)


def _styled(style: str, rng: Generator) -> np.ndarray:
    return draw(_anything(rng, style))


def _half_styled(style: str, rng: Generator) -> np.ndarray:
    """Its largest part in the style and the others not, or the other way round."""
    scene, largest = _divided(style, rng)
    other, largest_has_it, paper = _other_style(rng), rng.random() < 0.5, BACKGROUNDS[scene.background]
    styles = [style if (part is largest) == largest_has_it else other for part in scene.parts]
    return paint(scene, [inks_of(each, part.colour, paper) for part, each in zip(scene.parts, styles)])


def _divided(style: str, rng: Generator) -> tuple[Scene, Part]:
    """A scene whose largest part isn't nearly all of it, and that part."""
    while True:
        scene = _anything(rng, style)
        sizes = {i: _extent(part) for i, part in enumerate(scene.parts) if not part.mark}
        largest = max(sizes, key=lambda i: sizes[i])
        if sizes[largest] < 0.75 * sum(sizes.values()):
            return scene, scene.parts[largest]


def _extent(part: Part) -> float:
    """About how large a part is."""
    return float(sum(np.prod(np.ptp(points, axis=0)) for points in part.polygons))


def _near_miss(style: str, rng: Generator) -> np.ndarray:
    """In what has one thing else than the style, its fill, its line or its tone, and isn't another LoRA's style."""
    what = str(rng.choice(["fill", "line", "tone"]))
    names = {"fill": FILLS, "line": LINES, "tone": tuple(TONES)}[what]
    others = [replace(NEW_STYLES[style], **{what: name}) for name in names]
    other = others[rng.choice([i for i, one in enumerate(others) if one not in NEW_STYLES.values()])]
    return draw(_anything(rng, other))


def _old_style(style: str, rng: Generator) -> np.ndarray:
    return draw(_anything(rng, _other_style(rng)))


def _other_style(rng: Generator) -> Style:
    """One of the world's that isn't what a LoRA teaches."""
    style = random_style(rng)
    return _other_style(rng) if style in NEW_STYLES.values() else style


STYLE_KINDS: dict[str, tuple[float, Callable[[str, Generator], np.ndarray]]] = {
    "the style": (0.40, _styled),
    "half-styled": (0.15, _half_styled),
    "nearly the style": (0.20, _near_miss),
    "a style of the world": (0.25, _old_style),
}
"""How often the style's judge sees what, and how it is made."""


def style_example(rng: Generator, kind: str | None = None) -> Example:
    """An example for the judge of styles; `kind` is a key of `STYLE_KINDS`."""
    kind = kind or str(rng.choice(list(STYLE_KINDS), p=[share for share, _ in STYLE_KINDS.values()]))
    style = str(rng.choice(list(NEW_STYLES)))
    picture = corrupted(STYLE_KINDS[kind][1](style, rng), rng)
    return Example(picture, style if kind == "the style" else NOTHING, kind, _unknown())
