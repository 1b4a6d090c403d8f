"""How sure the report is of what it says."""

import numpy as np
import pytest

from est_lora.lab.findings import _interval


@pytest.mark.parametrize("pictures", [1, 24])
def test_pictures_of_a_pair_that_are_alike_count_once(pictures: int) -> None:
    pairs = np.random.default_rng(0).normal(size=(16, 1))
    interval = _interval(np.repeat(pairs, pictures, 1))
    assert interval.low <= interval.mean <= interval.high
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * pairs.std() / 4, rel=0.2)


def test_pictures_of_a_pair_that_differ_count_each() -> None:
    values = np.random.default_rng(0).normal(size=(16, 24))
    interval = _interval(values)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(values.size), rel=0.5)
