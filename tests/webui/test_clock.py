"""What the gate is told: the noise level of every call, whatever the sampler does."""

from __future__ import annotations

import pytest

from tests.webui.pictures import HIRES, est, furthest, pair, sampler

SAMPLERS = [
    *("Euler", "Heun", "DPM2 a", "DPM++ 2M Karras", "DPM++ SDE", "DPM adaptive", "UniPC", "DDIM", "LCM"),
    *("Euler a", "DPM fast", "Restart", "PLMS"),
]
TRAINED = 1000


def expected(t):
    return min(max(1 - t / (TRAINED - 1), 0), 1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_tau_is_that_of_the_call(probed, sd15, name):
    drawn_by = sampler(probed, name)
    subject, style = pair(probed)
    steps = 2 if name == "DPM adaptive" else 5
    seen = probed.seen(est=est(subject, style), probe={}, steps=steps, **drawn_by)
    assert len(seen["calls"]) >= 2
    for t, tau in seen["calls"]:
        assert tau == pytest.approx(expected(t), abs=1e-6)
    if name != "DPM adaptive":
        knobs = {"est": est(subject, style), "steps": steps, **drawn_by}
        assert furthest(probed.picture(**knobs), probed.picture(**knobs)) == 0


def test_a_second_pass_begins_late(probed, family):
    subject, style = pair(probed)
    seen = probed.seen(est=est(subject, style), probe={}, steps=8, **HIRES)
    second = seen["calls"][seen["passes"][1] :]
    assert seen["calls"][0][1] < 0.01
    assert 0.2 < second[0][1] < 0.7
    for t, tau in seen["calls"]:
        assert tau == pytest.approx(expected(t), abs=1e-6)


@pytest.mark.parametrize("name", ["Euler", "DDIM", "DPM2 a"])
def test_the_published_clock_counts_steps(probed, sd15, name):
    subject, style = pair(probed)
    knobs = est(subject, style, clock="step")
    seen = probed.seen(est=knobs, probe={}, steps=8, **sampler(probed, name))
    taus = [tau for _, tau in seen["calls"]]
    assert all(later > earlier - 1e-6 for earlier, later in zip(taus, taus[1:]))
    assert taus[0] == pytest.approx(0, abs=0.02)
    assert {round(tau * 8, 1) for tau in taus} >= {0, 1, 2, 3, 4, 5, 6}


def test_a_sampler_without_steps_keeps_the_timestep_clock(probed, sd15):
    subject, style = pair(probed)
    seen = probed.seen(est=est(subject, style, clock="step"), probe={}, steps=4, **sampler(probed, "DPM fast"))
    for t, tau in seen["calls"]:
        assert tau == pytest.approx(expected(t), abs=1e-6)
