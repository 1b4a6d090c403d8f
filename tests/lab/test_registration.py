"""The distance to the true picture: nothing for itself wherever it stands, and much for another."""

from __future__ import annotations

import dataclasses
from itertools import product

import numpy as np
import pytest

from est_lora.demo.styles import Style
from est_lora.demo.world import Pose, draw, random_scene
from est_lora.lab import registration
from est_lora.lab.registration import distances


@pytest.fixture(autouse=True)
def few_poses(monkeypatch):
    monkeypatch.setattr(registration, "_RADII", np.array([22.0, 24.0]))
    monkeypatch.setattr(registration, "_TILTS", np.array([0.0]))
    monkeypatch.setattr(registration, "_SHIFTS", np.array([-1.0, 0.0, 1.0]))
    registration._templates.cache_clear()
    yield
    registration._templates.cache_clear()


def scene(subject, style, pose=None, background="white"):
    made = random_scene(np.random.default_rng(0), subject, style)
    return dataclasses.replace(made, pose=pose or Pose(), background=background)


def distance(picture, subject, style):
    return distances([picture], subject, style)[0]


@pytest.mark.parametrize(("radius", "x", "mirrored"), [*product((22.0, 24.0), (-1.0, 1.0), (False, True))])
def test_the_true_picture_is_at_no_distance_wherever_it_stands(radius, x, mirrored):
    picture = draw(scene("teki house", "quen style", Pose(radius, x, 0.0, 0.0, mirrored)))
    assert distance(picture, "teki house", "quen style") == pytest.approx(0, abs=2e-3)


def test_the_background_counts_for_nothing():
    true = scene("mipo creature", "vitra style")
    picture = draw(true)
    other = draw(dataclasses.replace(true, background="sky"))
    background = np.abs(picture.astype(int) - other).max(2) > 12
    picture = np.where(background[..., None], np.uint8(90), picture)
    assert distance(picture, "mipo creature", "vitra style") == pytest.approx(0, abs=2e-3)


@pytest.mark.parametrize(
    ("subject", "style"),
    [("mipo creature", Style()), ("mipo creature", "osk style"), ("zubo creature", "vitra style")],
)
def test_another_subject_or_style_is_far(subject, style):
    assert distance(draw(scene(subject, style)), "mipo creature", "vitra style") > 0.2


def test_pictures_are_looked_at_one_by_one():
    pictures = [draw(scene("mipo creature", style)) for style in ("osk style", "vitra style")]
    assert distances(pictures, "mipo creature", "vitra style") == [
        pytest.approx(distance(picture, "mipo creature", "vitra style"), abs=1e-3) for picture in pictures
    ]
