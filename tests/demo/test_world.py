"""The demo's world: what is drawn, how it is called, and what the base never sees."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest

from est_lora.demo import lessons
from est_lora.demo.lessons import World
from est_lora.demo.model import WORDS_PER_PROMPT, make_tokenizer
from est_lora.demo.styles import BACKGROUNDS, COLOURS, FILLS, LINES, NEW_STYLES, SIZE, TONES, Style, inks_of
from est_lora.demo.things import PALETTES, SUBJECTS, THINGS
from est_lora.demo.world import (
    RARE_WORDS,
    STYLE,
    SUBJECT,
    Pose,
    blur_caption,
    caption,
    draw,
    paint,
    random_scene,
)

STYLES = [Style(*words) for words in product(FILLS, LINES, TONES)]


def posed(seed, thing, style=None):
    """A thing in the middle of white."""
    scene = random_scene(np.random.default_rng(seed), thing, style)
    return replace(scene, pose=Pose(), background="white")


def differing(one, other, by=60):
    """The share of pixels in which two pictures are plainly not the same: levels of 255."""
    return (np.abs(one.astype(int) - other).max(-1) > by).mean()


# Drawing


@pytest.mark.parametrize("thing", [*THINGS, *SUBJECTS])
@pytest.mark.parametrize("style", [None, *NEW_STYLES])
def test_a_scene_is_drawn_the_same_twice(thing, style):
    scene = random_scene(np.random.default_rng(7), thing, style)
    picture = draw(scene)
    assert (picture.shape, picture.dtype) == ((SIZE, SIZE, 3), np.uint8)
    assert np.array_equal(picture, draw(scene))
    again = random_scene(np.random.default_rng(7), thing, style)
    assert np.array_equal(picture, draw(again))


@pytest.mark.parametrize("thing", [*THINGS, *SUBJECTS])
def test_a_thing_is_in_the_picture_and_hardly_cut_off(thing):
    rng = np.random.default_rng(0)
    for _ in range(20):
        scene = random_scene(rng, thing, Style("checked", "inked"))
        picture, paper = draw(scene).astype(int), np.array(BACKGROUNDS[scene.background])
        painted = np.abs(picture - paper).max(-1) > 20
        assert 0.05 < painted.mean() < 0.7
        edges = np.concatenate([painted[0], painted[-1], painted[:, 0], painted[:, -1]])
        # Tall things of the world lose their soles and tips, and mipo those of its wings.
        assert edges.mean() < (0.23 if thing == "mipo creature" else 0.105 if thing in SUBJECTS else 0.18)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_style_of_a_subject_is_another(subject):
    pictures = [draw(posed(1, subject, style)) for style in (Style(), *NEW_STYLES)]
    assert all(differing(one, other) > 0.05 for one, other in combinations(pictures, 2))


@pytest.mark.parametrize("style", NEW_STYLES)
def test_every_subject_in_a_style_is_another(style):
    pictures = [draw(posed(1, subject, style)) for subject in SUBJECTS]
    assert all(differing(one, other) > 0.05 for one, other in combinations(pictures, 2))


@pytest.mark.parametrize("style", NEW_STYLES)
def test_a_new_style_is_told_from_each_of_the_bases(style):
    scene = posed(1, SUBJECT)
    picture = draw(replace(scene, style=style))
    for other in STYLES:
        same = other == NEW_STYLES[style]
        # A dim colour's own dark is 35 levels from ink at the least, and has only the line to be seen in.
        by = 30 if NEW_STYLES[style].tone == "dim" and other == replace(NEW_STYLES[style], line="rimmed") else 60
        assert (differing(picture, draw(replace(scene, style=other)), by) > 0.01) != same, other


def test_a_new_style_is_not_called_what_it_is_made_of():
    for style, known in NEW_STYLES.items():
        assert not {*style.split()} & {*known.words}


def test_a_style_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="no style 'haro style'.*vitra style"):
        draw(random_scene(np.random.default_rng(0), style="haro style"))
    with pytest.raises(ValueError, match="no 'dog'.*creature"):
        random_scene(np.random.default_rng(0), "dog")


def test_parts_are_painted_with_inks_of_their_own():
    scene = posed(2, SUBJECT, STYLE)
    paper = BACKGROUNDS[scene.background]
    usual = [inks_of(STYLE, part.colour, paper) for part in scene.parts]
    assert np.array_equal(paint(scene, usual), draw(scene))
    for place, part in enumerate(scene.parts):
        others = list(usual)
        others[place] = inks_of(Style("hollow", "rimmed"), part.colour, paper)
        assert np.array_equal(paint(scene, others), draw(scene)) == part.mark


@pytest.mark.parametrize("thing", ["creature", SUBJECT])
def test_marks_are_drawn_flat_in_every_style(thing):
    eyes = set()
    for style in NEW_STYLES:
        scene = posed(3, thing, style)
        pupils = next(part for part in scene.parts if part.name == "pupils")
        x, y = pupils.polygons[0].mean(0) * Pose().radius + SIZE / 2
        eyes.add(tuple(draw(scene)[int(y), int(x)]))
    assert len(eyes) == 1


# The subjects


def parts_of_class(kind):
    rng = np.random.default_rng(0)
    return {part.name for _ in range(300) for part in random_scene(rng, kind).parts}


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_subject_is_made_of_parts_that_its_class_has(subject):
    kind = subject.split()[1]
    scene = random_scene(np.random.default_rng(0), subject)
    assert {part.name for part in scene.parts} <= parts_of_class(kind)
    assert scene.colours == PALETTES[subject]
    assert set(PALETTES[subject]) == {part.name for part in scene.parts if not part.mark}
    assert set(PALETTES[subject].values()) <= set(COLOURS)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_subject_always_looks_the_same(subject):
    scenes = [posed(seed, subject, Style()) for seed in range(10)]
    shapes = {tuple(points.tobytes() for part in scene.parts for points in part.polygons) for scene in scenes}
    assert len(shapes) == 1
    first, *others = map(draw, scenes)
    assert max(differing(first, other) for other in others) == 0


# What the base sees


def of_the_base(monkeypatch, kind=None):
    """The scenes of four of its batches."""
    seen = []

    def drawn(scene):
        seen.append(scene)
        return draw(scene)

    monkeypatch.setattr(lessons, "draw", drawn)
    data = World(0, 128, kind=kind)
    for number in range(4):
        data[number]
    return seen


@pytest.mark.parametrize("kind", [None, "creature", "house", "robot"])
def test_the_base_sees_no_new_word_and_no_subject(monkeypatch, kind):
    scenes = of_the_base(monkeypatch, kind)
    assert len(scenes) == 512
    for scene in scenes:
        assert scene.thing in THINGS
        assert scene.style in STYLES
        looks = [PALETTES[subject] for subject in SUBJECTS if subject.split()[1] == scene.thing]
        assert scene.colours not in looks
    if kind is not None:
        assert sum(scene.thing == kind for scene in scenes) >= 256


def test_the_base_sees_everything_else(monkeypatch):
    scenes = of_the_base(monkeypatch)
    assert {scene.thing for scene in scenes} == THINGS.keys()
    assert {scene.background for scene in scenes} == BACKGROUNDS.keys()
    for place, kinds in enumerate((FILLS, LINES, TONES)):
        assert {(scene.style.fill, scene.style.line, scene.style.tone)[place] for scene in scenes} == set(kinds)


# Captions


def test_captions_are_words_that_the_tokenizer_knows_and_fit():
    tokenizer, rng = make_tokenizer(), np.random.default_rng(0)
    things, longest = [*THINGS, *SUBJECTS], 0
    for number in range(4000):
        style = list(NEW_STYLES)[number % 4] if number % 5 == 0 else None
        text = caption(random_scene(rng, things[number % len(things)], style), rng)
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids, text
        longest = max(longest, len(ids))
    assert longest <= WORDS_PER_PROMPT


def test_a_longest_caption_fits():
    """A robot, three of its parts with their colours, three words of style: more is never said."""
    longest = (
        "picture of a red robot with blue wheels and green head and pink screen in dotted, inked, dim style, on white"
    )
    assert len(make_tokenizer()(longest).input_ids) <= WORDS_PER_PROMPT


def test_a_caption_says_what_is_there():
    rng = np.random.default_rng(0)
    for _ in range(500):
        scene = random_scene(rng)
        words = set(caption(scene, rng).replace(",", "").split())
        assert scene.thing in words
        assert set(scene.style.words) <= words
        assert words & COLOURS.keys() <= set(scene.colours.values())
        assert words & BACKGROUNDS.keys() <= {scene.background}


def test_a_caption_of_a_subject_names_none_of_its_colours():
    rng = np.random.default_rng(0)
    for subject, style in product(SUBJECTS, NEW_STYLES):
        words = set(caption(random_scene(rng, subject, style), rng).replace(",", "").split())
        assert {*subject.split(), *style.split()} <= words
        assert not words & {*COLOURS, *TONES, *FILLS, *LINES}


def test_the_triggers_are_rare_words_and_no_other_words():
    triggers = [words.split()[0] for words in (*SUBJECTS, *NEW_STYLES)]
    assert set(triggers) <= set(RARE_WORDS)
    assert len(set(triggers)) == len(triggers)
    assert not set(RARE_WORDS) & {*THINGS, *COLOURS, *BACKGROUNDS, *FILLS, *LINES, *TONES}
    assert all(subject.split()[1] in THINGS for subject in SUBJECTS)


def test_blurring_keeps_what_it_is_to_keep():
    rng = np.random.default_rng(0)
    text = "a mipo creature, vitra style, on white"
    blurred = [blur_caption(text, rng, rare=("nuvi",), keep=("mipo", "vitra")).split() for _ in range(300)]
    assert all({"mipo", "vitra"} <= set(words) for words in blurred)
    assert any("creature" not in words for words in blurred)
    assert any("nuvi" in words for words in blurred)
    assert {word for words in blurred for word in words} <= {*text.replace(",", "").split(), "nuvi"}
