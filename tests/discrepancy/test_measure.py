"""The style discrepancy of two vectors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from est_lora.discrepancy import discrepancy
from est_lora.errors import EstLoraError

NUMBERS = st.floats(-1e3, 1e3, width=32).filter(lambda number: number == 0 or abs(number) > 1e-3)
ROWS = st.integers(1, 6).flatmap(
    lambda d: st.tuples(*[st.lists(NUMBERS, min_size=d, max_size=d).filter(any) for _ in range(2)])
)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 0], [1, 0], 0),
        ([1, 0], [0, 1], 1),
        ([1, 0], [-3, 0], 2),
        ([3, 4], [4, 3], 1 - 24 / 25),
        ([1, 0], [1, 1], 1 - math.sqrt(0.5)),
        ([2], [5], 0),
    ],
)
@pytest.mark.parametrize("size", [1, 1e-200, 1e200])
def test_known_angles(a, b, expected, size):
    assert discrepancy(torch.tensor([a, b], dtype=torch.float64) * size) == pytest.approx(expected, abs=1e-7)


@given(ROWS, st.floats(1e-3, 1e3))
def test_it_depends_on_the_angle_only(rows, scale):
    a, b = (torch.tensor(row, dtype=torch.float64) for row in rows)
    value = discrepancy(torch.stack([a, b]))
    assert 0 <= value <= 2
    assert value == discrepancy(torch.stack([b, a]))
    assert value == pytest.approx(discrepancy(torch.stack([a * scale, b])), abs=1e-12)
    assert value == pytest.approx(2 - discrepancy(torch.stack([a, -b])), abs=1e-12)
    assert discrepancy(torch.stack([a, a])) == pytest.approx(0, abs=1e-12)


def test_it_is_computed_in_float64():
    """In float32 the cosine of so small an angle is 1."""
    a = torch.tensor([1.0, 0.0])
    b = torch.tensor([1.0, 1e-5])
    assert discrepancy(torch.stack([a, b])) == pytest.approx(0.5e-10, rel=1e-3)


def test_it_never_leaves_its_range():
    random = torch.randn(500, 7, generator=torch.Generator().manual_seed(0))
    values = [discrepancy(torch.stack([row, sign * row])) for row in random for sign in (1, -1)]
    assert min(values) >= 0
    assert max(values) <= 2


@pytest.mark.parametrize(
    "features",
    [[[0, 0], [1, 0]], [[1, 0], [0, 0]], [[math.nan, 1], [1, 0]], [[1, 0], [1, math.inf]], [[-math.inf, 1], [1, 0]]],
)
def test_features_without_a_direction(features):
    with pytest.raises(EstLoraError, match="can't be measured, as a picture's features are all zero or not finite"):
        discrepancy(Tensor(features))


@pytest.mark.parametrize("shape", [(2,), (1, 3), (3, 3), (2, 0), (2, 3, 4), (0, 3)])
def test_features_of_another_shape(shape):
    with pytest.raises(EstLoraError, match=rf"these are {' x '.join(map(str, shape))}: give 2 x d\.$"):
        discrepancy(torch.ones(shape))


def test_gradients_and_other_types_are_no_matter():
    features = torch.tensor([[3.0, 4.0], [4.0, 3.0]], requires_grad=True)
    assert isinstance(discrepancy(features), float)
    assert discrepancy(features.half()) == pytest.approx(0.04)
