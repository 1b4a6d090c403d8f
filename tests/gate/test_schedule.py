"""Segments in closed form against the style pressure evaluated point by point."""

from __future__ import annotations

import math

from hypothesis import example, given
from hypothesis import strategies as st

from est_lora.gate import Schedule

positive = st.floats(1e-6, 1e6)
schedules = st.builds(
    Schedule,
    alpha=st.floats(1e-3, 10),
    beta=st.floats(0, 2),
    lean=st.floats(-1, 1),
    pattern=st.sampled_from(["s", "s*"]),
)


def acts_at(segments, tau):
    return [segment.acts for segment in segments if segment.start <= tau][-1]


@given(schedules, positive, st.floats(0, 1))
def test_segments_say_what_the_pressure_says(schedule, rho, tau):
    pressure = schedule.pressure(tau)
    wrapped = (schedule.alpha * tau + schedule.beta) / schedule.alpha
    near_wrap = schedule.pattern == "s*" and abs(wrapped - round(wrapped)) < 1e-9
    if near_wrap or math.isclose(rho, pressure, rel_tol=1e-6, abs_tol=1e-9):
        return
    assert acts_at(schedule.segments(rho), tau) == ("subject" if rho > pressure else "style")


@given(schedules, positive)
@example(Schedule(1.5, 0.0, 0.0, "s*"), 0.3)
@example(Schedule(1.5, 0.5, 0.0, "s*"), 0.5)
@example(Schedule(1.0, 2.0, 0.0, "s*"), 1.0)
def test_switches_at_most_once_with_s_and_never_once_with_s_star(schedule, rho):
    segments = schedule.segments(rho)
    switches = len(segments) - 1
    assert switches in ((0, 1) if schedule.pattern == "s" else (0, 2))
    starts = [segment.start for segment in segments]
    assert starts[0] == 0.0
    assert all(0 <= a < b <= 1 for a, b in zip(starts, starts[1:]))
    assert all(a.acts != b.acts for a, b in zip(segments, segments[1:]))
    if schedule.pattern == "s" and switches:
        assert [segment.acts for segment in segments] == ["subject", "style"]


def test_style_wins_at_equality():
    assert Schedule(1.5, 0.25).segments(1.0) == ((0.0, "subject"), (0.5, "style"))
    assert Schedule(1.5, 0.5).segments(0.5) == ((0.0, "style"),)


def test_a_segment_may_begin_at_the_very_end():
    assert Schedule(1.5, 0.5).segments(2.0) == ((0.0, "subject"), (1.0, "style"))
    assert Schedule(1.5, 0.0, 0.0, "s*").segments(0.75) == ((0.0, "subject"), (0.5, "style"), (1.0, "subject"))


@given(st.floats(0.01, 5), st.floats(0, 2), st.floats(-1, 0.9))
def test_leaning_to_the_style_never_lengthens_the_subject(rho, beta, lean):
    def subject_until(schedule):
        segments = schedule.segments(rho)
        return 0.0 if segments[0].acts == "style" else segments[1].start if len(segments) > 1 else 2.0

    assert subject_until(Schedule(1.5, beta, lean + 0.1)) <= subject_until(Schedule(1.5, beta, lean))
