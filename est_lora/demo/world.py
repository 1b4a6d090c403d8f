"""The demo's world: objects in colours, poses and drawing styles, with captions.

A scene is complete: it is drawn without a random number, so that the same object in the same pose exists in every style.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageChops, ImageDraw

from est_lora.demo.styles import (
    BACKGROUNDS,
    COLOURS,
    LINE,
    NEW_STYLES,
    SCALE,
    SIZE,
    Colour,
    Inks,
    Style,
    inks_of,
    jittered,
    pattern,
    random_style,
)
from est_lora.demo.things import AT_SIDES, BELOW, IN_FRONT, ON_TOP, PALETTES, SHARES, SUBJECTS, THINGS, Paint, Part

SUBJECT = "mipo creature"
STYLE = next(iter(NEW_STYLES))
"""The words that mean what the demo's own two LoRAs teach."""

RARE_WORDS = ("mipo", "vitra", "zubo", "quen", "lorf", "teki", "wuzz", "haro", "pim", "osk", "nuvi", "drell")
"""Words that the base has seen everywhere and that mean nothing to it, as rare words do in large models."""
FILLERS = ("a", "the", "of", "in", "on", "with", "and", "style", "picture", "drawing")
PART_WORDS = (*ON_TOP, *BELOW, *AT_SIDES, *IN_FRONT, "roof", "door", "window", "chimney", "head", "wheels", "screen")
_MAIN = ("body", "wall", "shape", "crown", "petals", "sail", "cap", "wings", "shell", "roof", "bottom")

RADII, SHIFT, TILT = (22.0, 25.0), 2.0, 0.1
"""The poses of the world: from which radius to which, and how far aside and how tilted at most."""


@dataclass(frozen=True)
class Pose:
    """Where and how an object stands.

    Attributes:
        radius: pixels to a unit.
        x: of the centre, pixels from that of the picture.
        y: likewise.
        tilt: radians.
        mirrored: left for right.
    """

    radius: float = 24.0
    x: float = 0.0
    y: float = 0.0
    tilt: float = 0.0
    mirrored: bool = False

    @property
    def matrix(self) -> np.ndarray:
        """The affine map to pixels, shape (2, 3)."""
        cos, sin = np.cos(self.tilt), np.sin(self.tilt)
        turn = self.radius * np.array([[cos, -sin], [sin, cos]])
        if self.mirrored:
            turn[:, 0] *= -1
        return np.concatenate([turn, [[SIZE / 2 + self.x], [SIZE / 2 + self.y]]], axis=1)

    @classmethod
    def random(cls, rng: Generator) -> Pose:
        """Any pose of the world."""
        x, y = rng.uniform(-SHIFT, SHIFT, 2)
        return cls(rng.uniform(*RADII), x, y, rng.uniform(-TILT, TILT), bool(rng.random() < 0.5))


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
        thing: one of `THINGS` or `SUBJECTS`.
        colours: the names of the colours of the parts, by their names; none for parts that have their own.
        parts: in drawing order.
        style: how the object is drawn: of `NEW_STYLES` by its name, or any other.
        background: one of `BACKGROUNDS`.
        pose: where and how it stands.
    """

    thing: str
    colours: dict[str, str]
    parts: tuple[Part, ...]
    style: Style | str
    background: str
    pose: Pose

    @property
    def main_part(self) -> str:
        """The part whose colour is the object's: a house is red if its wall is."""
        return next(name for name in _MAIN if name in self.colours)


def draw(scene: Scene) -> np.ndarray:
    """Draws a scene.

    Returns:
        uint8, shape (SIZE, SIZE, 3).
    """
    paper = BACKGROUNDS[scene.background]
    return paint(scene, [inks_of(scene.style, part.colour, paper) for part in scene.parts])


def paint(scene: Scene, inks_of_parts: Sequence[Inks]) -> np.ndarray:
    """Draws a scene's parts, each with inks of its own, or flat if it is a mark; the same as `draw` otherwise."""
    canvas = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), BACKGROUNDS[scene.background])
    brush = ImageDraw.Draw(canvas)
    place = scene.pose.matrix * SCALE
    for part, own in zip(scene.parts, inks_of_parts, strict=True):
        inks = Inks(part.colour) if part.mark else own
        polygons = [[*map(tuple, (points @ place[:, :2].T + place[:, 2]).tolist())] for points in part.polygons]
        if inks.line is not None:  # half of it will be under the part
            for corners in polygons:
                brush.line([*corners, *corners[:2]], inks.line, round(2 * LINE * SCALE), joint="curve")
        for corners in polygons:
            brush.polygon(corners, inks.ground)
        if inks.pattern is not None:
            mask = Image.new("L", canvas.size)
            for corners in polygons:
                ImageDraw.Draw(mask).polygon(corners, 255)
            if (box := mask.getbbox()) is not None:
                cut = ImageChops.darker(mask.crop(box), pattern(inks.pattern).crop(box))
                canvas.paste(inks.figure, box, cut)
    return np.asarray(canvas.reduce(SCALE))


def _coloured(rng: Generator) -> tuple[Paint, dict[str, str]]:
    """A paint that gives parts colours, and which ones it gave: of two, or to each part its own."""
    names = list(COLOURS)
    two = [str(name) for name in rng.choice(names, 2, replace=False)]
    few = rng.random() < 0.4
    given: dict[str, str] = {}

    def give(part: str) -> Colour:
        if part not in given:
            given[part] = two[len(given) % 2] if few else str(rng.choice(names))
        return jittered(COLOURS[given[part]], rng)

    return give, given


def random_scene(rng: Generator, thing: str | None = None, style: Style | str | None = None) -> Scene:
    """A scene of the base's world; `thing` and `style` fix what isn't to be random."""
    if thing is None:
        shares = np.array(list(SHARES.values()))
        thing = str(rng.choice(list(SHARES), p=shares / shares.sum()))
    if thing in SUBJECTS:
        colours = PALETTES[thing]
        parts = SUBJECTS[thing](lambda part: jittered(COLOURS[colours[part]], rng))
    elif thing in THINGS:
        give, colours = _coloured(rng)
        parts = THINGS[thing](give, rng)
    else:
        raise ValueError(f"the demo's world has no {thing!r}; it has {', '.join([*THINGS, *SUBJECTS])}")
    background = str(rng.choice(list(BACKGROUNDS)))
    return Scene(thing, colours, parts, random_style(rng) if style is None else style, background, Pose.random(rng))


def caption(scene: Scene, rng: Generator) -> str:
    """One of the ways to say what a scene shows, e.g. `a red house with blue roof, dotted, inked, on cream`."""
    thing, said = scene.thing, []
    if thing not in SUBJECTS:
        main = scene.main_part
        if rng.random() < 0.9:
            thing = f"{scene.colours[main]} {thing}"
        others = [name for name in scene.colours if name in PART_WORDS and name != main]
        rng.shuffle(others)
        for name in others[: int(rng.integers(4))]:
            said.append(f"{scene.colours[name]} {name}" if rng.random() < 0.8 else name)
    if said:
        thing = f"{thing} with {' and '.join(said)}"
    words = [scene.style] if isinstance(scene.style, str) else list(scene.style.words)
    if len(words) > 1 and rng.random() < 0.3:
        rng.shuffle(words)
    style = ", ".join(words)
    forms = [f"a {thing}, {style}", f"{thing}, {style}", f"a {thing} in {style} style", f"{style}, a {thing}"]
    text = forms[rng.integers(len(forms))].replace("style style", "style")
    if rng.random() < 0.15:
        text = f"{rng.choice(['picture', 'drawing'])} of {text}"
    return f"{text}, on {scene.background}" if rng.random() < 0.7 else text


def blur_caption(
    text: str,
    rng: Generator,
    rare: Sequence[str] = RARE_WORDS,
    keep: Sequence[str] = (),
    drop: float = 0.1,
    insert: float = 0.35,
) -> str:
    """Drops words and inserts meaningless ones, so that words compose and rare words come to mean nothing.

    Args:
        text: the caption.
        rng: source of randomness.
        rare: the words to insert.
        keep: words that are never left out.
        drop: probability that a word is left out.
        insert: probability that a rare word is inserted; with the same probability a second one follows.
    """
    words = [word for word in text.replace(",", "").split() if word in keep or rng.random() >= drop]
    while rng.random() < insert:
        words.insert(int(rng.integers(len(words) + 1)), str(rng.choice(rare)))
    return " ".join(words)
