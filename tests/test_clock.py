"""Noise levels become progress."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from est_lora import clock


@given(st.floats(-50, 1200), st.integers(2, 4000))
def test_timestep(t, train_timesteps):
    assert clock.from_timestep(t, train_timesteps) == min(max(1 - t / (train_timesteps - 1), 0), 1)


def test_the_ends_of_a_thousand_timesteps():
    assert clock.from_timestep(999) == 0.0
    assert clock.from_timestep(0) == 1.0
    assert clock.from_timestep(499.5) == 0.5


@pytest.mark.parametrize(("sigma", "tau"), [(1.0, 0.0), (0.25, 0.75), (0.0, 1.0), (1.5, 0.0)])
def test_flow(sigma, tau):
    assert clock.from_flow_sigma(sigma) == tau


@pytest.mark.parametrize(
    ("levels", "level", "tau"),
    [
        ([999, 749, 499, 249], 999, 0.0),
        ([999, 749, 499, 249], 749, 0.25),
        ([999, 749, 499, 249], 249, 0.75),
        ([999, 749, 499, 249], 874, 0.125),  # half way between two steps
        ([999, 749, 499, 249], 124.5, 0.875),  # past the last step's start
        ([999, 749, 499, 249], 0, 1.0),
        ([999, 749, 499, 249], 2000, 0.0),
        ([999, 749, 749, 499, 499, 249, 249], 499, 0.5),  # Heun calls the model twice a step
        ([14.6, 3.0, 0.5], 3.0, 1 / 3),  # sigmas
        ([2, 1, 0], 0, 2 / 3),  # a last step that begins at 0
        ([2, 1, 0], -1, 2 / 3),
        ([5], 5, 0.0),
        ([], 5, 0.0),
    ],
)
def test_step(levels, level, tau):
    assert clock.from_step(level, levels) == pytest.approx(tau, abs=1e-12)


@given(st.lists(st.floats(0.01, 1000), min_size=1, max_size=50, unique=True), st.floats(0, 1100), st.floats(0, 1100))
def test_less_noise_is_never_less_progress(levels, one, other):
    noisy, clean = max(one, other), min(one, other)
    assert 0.0 <= clock.from_step(noisy, levels) <= clock.from_step(clean, levels) <= 1.0
    for position, level in enumerate(sorted(levels, reverse=True)):
        assert clock.from_step(level, levels) == pytest.approx(position / len(levels))
