"""The distance to the true picture: nothing for itself wherever it stands, and much for another."""

from __future__ import annotations

import dataclasses
from itertools import product

import numpy as np
import pytest

from est_lora.demo.styles import Style
from est_lora.demo.world import Pose, draw, random_scene
from est_lora.lab import registration
from est_lora.lab.registration import distance


@pytest.fixture(autouse=True)
def few_poses(monkeypatch):
    monkeypatch.setattr(registration, "RADII", np.array([18.0, 20.0]))
    monkeypatch.setattr(registration, "TILTS", np.array([0.0]))
    monkeypatch.setattr(registration, "SHIFTS", np.array([-1.0, 0.0, 1.0]))
    registration._templates.cache_clear()
    yield
    registration._templates.cache_clear()


def scene(subject, style, pose=None, background="white"):
    made = random_scene(np.random.default_rng(0), subject, style)
    return dataclasses.replace(made, pose=pose or Pose(), background=background)


@pytest.mark.parametrize(("radius", "x", "mirrored"), [*product((18.0, 20.0), (-1.0, 1.0), (False, True))])
def test_the_true_picture_is_at_no_distance_wherever_it_stands(radius, x, mirrored):
    picture = draw(scene("teki house", "quen style", Pose(radius, x, 0.0, 0.0, mirrored)))
    assert distance(picture, "teki house", "quen style", "white") == pytest.approx(0, abs=2e-3)


def test_the_background_counts_for_nothing():
    true = scene("mipo creature", "vitra style")
    picture = draw(true)
    flat = draw(dataclasses.replace(true, background="ash"))
    background = np.abs(picture.astype(int) - flat).max(2) > 12
    picture = np.where(background[..., None], np.uint8(90), picture)
    assert distance(picture, "mipo creature", "vitra style", "white") == pytest.approx(0, abs=2e-3)


@pytest.mark.parametrize(
    ("subject", "style"),
    [("mipo creature", Style()), ("mipo creature", "osk style"), ("zubo creature", "vitra style")],
)
def test_another_subject_or_style_is_far(subject, style):
    assert distance(draw(scene(subject, style)), "mipo creature", "vitra style", "white") > 0.2
