"""The knobs and the table they are read off."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from est_lora.config import FIELDS, FusionConfig
from est_lora.errors import EstLoraError, quote

PUBLISHED = {  # key: (default, an accepted value, refused values)
    "subject": (None, "a.safetensors", ["", 3, b"a"]),
    "style": (None, "b.safetensors", ["", 3]),
    "subject_weight": (1, -2, [-2.01, 2.01, "x", None, True]),
    "style_weight": (1, 2, [-3, 3, [], {}]),
    "beta": ("auto", 2, [-0.1, 2.1, "AUTO", None, math.nan, 10**5000, torch.ones(2)]),
    "alpha": (1.5, 10, [0, -1, 10.5, math.inf, "auto"]),
    "lean": (0, -1, [-1.1, 1.1]),
    "balance": ("energy", "l1", ["L1", None, 1]),
    "pattern": ("s", "s*", ["", "s**"]),
    "clock": ("timestep", "step", ["sigma"]),
    "method": ("est", "k-lora", ["klora", "sums"]),
    "layers": ("attention", "all", ["none"]),
    "other": ("sum", "off", ["subject"]),
    "subject_te": (1, 0, [-2.5, "none"]),
    "style_te": (1, -2, [2.5, None]),
    "enabled": (True, False, ["yes", 2, None, 0.5]),
    "hires": ("same", "off", ["none", "est"]),
    "engine": ("auto", "merge", ["fast", 1]),
}


def test_the_table_and_the_dataclass_are_one():
    assert [field.key for field in FIELDS] == [field.name for field in dataclasses.fields(FusionConfig)]
    assert {field.key for field in FIELDS} == set(PUBLISHED)
    for field in FIELDS:
        assert field.default == PUBLISHED[field.key][0]
        assert field.help
        assert field.default is None or field.parse(field.default) == field.default


@pytest.mark.parametrize("key", PUBLISHED)
def test_what_a_knob_takes_and_what_it_refuses(key):
    _, good, bad = PUBLISHED[key]
    assert getattr(FusionConfig(**{key: good}), key) == good
    assert getattr(FusionConfig.of({key: str(good)}), key) == good
    for value in bad:
        with pytest.raises(EstLoraError, match=f"^{key} can't be"):
            FusionConfig(**{key: value})


@given(st.sampled_from([field.key for field in FIELDS]), st.text() | st.floats() | st.none() | st.integers())
def test_any_value_is_taken_or_refused_in_one_sentence(key, value):
    try:
        config = FusionConfig.of({key: value})
    except EstLoraError as error:
        assert len(str(error)) < 300
        assert "\n" not in str(error)
    else:
        field = next(field for field in FIELDS if field.key == key)
        assert field.parse(getattr(config, key)) == getattr(config, key)


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(EstLoraError, match="no knob 'subject_wieght': did you mean subject_weight"):
        FusionConfig.of({"subject_wieght": 1})


def test_numbers_typed_as_text_become_numbers():
    config = FusionConfig.of({"beta": " 0.40 ", "lean": "-1", "subject_weight": "1e-1"})
    assert (config.beta, config.lean, config.subject_weight) == (0.4, -1.0, 0.1)


def test_two_files_are_needed():
    with pytest.raises(EstLoraError, match="no subject was given"):
        FusionConfig(style="b").pair()
    with pytest.raises(EstLoraError, match="no style was given"):
        FusionConfig(subject="a").pair()
    assert FusionConfig(subject="a", style="b").pair() == ("a", "b")


def test_quotes_stay_short_and_on_one_line():
    assert len(quote("x" * 10_000)) < 100
    assert "\n" not in quote("a\nb")
