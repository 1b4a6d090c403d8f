"""What the judge learns from is what it is said to be."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from est_lora.demo.styles import NEW_STYLES, SIZE
from est_lora.demo.things import PALETTES, SUBJECTS
from est_lora.lab import examples
from est_lora.lab.examples import (
    NOTHING,
    PARTS,
    STYLE_KINDS,
    SUBJECT_KINDS,
    corrupted,
    style_example,
    subject_example,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("kind", SUBJECT_KINDS)
def test_only_the_subject_itself_is_answered_by_its_name(rng, kind):
    made = [subject_example(rng, kind) for _ in range(30)]
    assert all(example.picture.shape == (SIZE, SIZE, 3) for example in made)
    answers = {example.answer for example in made}
    assert answers == (set(SUBJECTS) if kind == "the subject" else {NOTHING})


def test_all_parts_of_the_subject_itself_are_right_and_no_part_of_others(rng):
    for _ in range(20):
        example = subject_example(rng, "the subject")
        assert {owner for (owner, _), right in zip(PARTS, example.parts) if right} == {example.answer}
        assert example.parts.sum() == len(PALETTES[example.answer])


@pytest.mark.parametrize("kind", ["a part missing", "its colours without its parts", "its parts in wrong colours"])
def test_a_spoilt_subject_lacks_at_least_one_part(rng, kind):
    for _ in range(30):
        example = subject_example(rng, kind)
        right = {owner for (owner, _), is_right in zip(PARTS, example.parts) if is_right}
        assert len(right) <= 1
        assert not right or example.parts.sum() < len(PALETTES[right.pop()])


def test_a_part_of_another_kind_is_the_only_one_that_is_wrong(rng):
    for _ in range(40):
        example = subject_example(rng, "a part of another kind")
        owner = next(owner for (owner, _), right in zip(PARTS, example.parts) if right)
        # Eyes are of no colour, so there is no check of them.
        assert example.parts.sum() in {len(PALETTES[owner]) - 1, len(PALETTES[owner])}


@pytest.mark.parametrize("kind", STYLE_KINDS)
def test_only_the_style_itself_is_answered_by_its_name(rng, kind):
    answers = {style_example(rng, kind).answer for _ in range(40)}
    assert answers == (set(NEW_STYLES) if kind == "the style" else {NOTHING})


def test_what_is_nearly_a_style_is_one_thing_off_and_no_other_style_that_is_asked_for(rng, monkeypatch):
    drawn = []
    anything = examples._anything
    monkeypatch.setattr(examples, "_anything", lambda rng, style: anything(rng, drawn.append(style) or style))
    for _ in range(200):
        style_example(rng, "nearly the style")
    assert not set(drawn) & set(NEW_STYLES.values())
    for style in drawn:
        own = (style.fill, style.line, style.tone)
        others = [(one.fill, one.line, one.tone) for one in NEW_STYLES.values()]
        assert any(sum(a != b for a, b in zip(own, other)) == 1 for other in others)


def test_kinds_come_as_often_as_they_say():
    for kinds, make in ((SUBJECT_KINDS, subject_example), (STYLE_KINDS, style_example)):
        assert sum(share for share, _ in kinds.values()) == pytest.approx(1)
        rng = np.random.default_rng(1)
        made = [make(rng).kind for _ in range(300)]
        for kind, (share, _) in kinds.items():
            assert made.count(kind) / 300 == pytest.approx(share, abs=0.1)


def test_a_seed_gives_the_same_examples_in_every_process():
    code = (
        "import hashlib, numpy; from est_lora.lab.examples import SUBJECT_KINDS, style_example, subject_example;"
        "rng = numpy.random.default_rng(0); made = [subject_example(rng, kind) for kind in SUBJECT_KINDS for _ in range(4)];"
        "made += [style_example(rng) for _ in range(8)];"
        "print(hashlib.sha256(b''.join(each.picture.tobytes() for each in made)).hexdigest())"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(told) == 1


def test_corruption_leaves_a_picture_recognisable(rng):
    picture = subject_example(rng, "the subject").picture
    assert 1 < np.abs(corrupted(picture, rng).astype(float) - picture).mean() < 30
