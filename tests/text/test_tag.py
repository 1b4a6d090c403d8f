"""The tag's grammar."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from est_lora.config import FIELDS, FusionConfig
from est_lora.errors import EstLoraError
from est_lora.text import tag

KEYS = [field.key for field in FIELDS]


@pytest.mark.parametrize(
    ("text", "knobs"),
    [
        ("a:b", {"subject": "a", "style": "b"}),
        ("a:b:0.5:-1", {"subject": "a", "style": "b", "subject_weight": "0.5", "style_weight": "-1"}),
        ("a", {"subject": "a"}),
        (":b", {"style": "b"}),
        ("a:b::0.8", {"subject": "a", "style": "b", "style_weight": "0.8"}),
        ("::0.5", {"subject_weight": "0.5"}),
        ("", {}),
        (":::", {}),
        ("beta=0.4", {"beta": "0.4"}),
        ("beta=0.4:a:lean=1:b", {"beta": "0.4", "subject": "a", "lean": "1", "style": "b"}),
        ("subject=a:style=b", {"subject": "a", "style": "b"}),
        (" a : b :  beta =  auto ", {"subject": "a", "style": "b", "beta": "auto"}),
        ("a b:c d", {"subject": "a b", "style": "c d"}),
        ("subject=a=b:style==", {"subject": "a=b", "style": "="}),
        ("beta=", {}),
        ("enabled=false", {"enabled": "false"}),
        ("pattern=s*:hires=off", {"pattern": "s*", "hires": "off"}),
        ("nosuch=1", {"nosuch": "1"}),
        ("ünïcode 猫:#0123456789ab", {"subject": "ünïcode 猫", "style": "#0123456789ab"}),
        ("../../etc/passwd:b", {"subject": "../../etc/passwd", "style": "b"}),
    ],
)
def test_what_a_tag_says(text, knobs):
    assert tag.read(text.split(":")) == knobs


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a:b:1:1:x", "more to it than can be understood at 'x'"),
        ("a:b:1:1:", "more to it than can be understood at ''"),
        ("a:b:=1", "more to it than can be understood at '=1'"),
        ("=", "more to it than can be understood at '='"),
        ("a:subject=b", "gives 'subject' twice"),
        ("a:b:0.5:subject_weight=0.5", "gives 'subject_weight' twice"),
        ("beta=1:beta=1", "gives 'beta' twice"),
    ],
)
def test_what_a_tag_cannot_say(text, sentence):
    with pytest.raises(EstLoraError, match=sentence):
        tag.read(text.split(":"))


def test_no_pieces_are_no_knobs():
    assert tag.read([]) == {}


def test_keys_are_the_fields_keys_as_they_are():
    values = {"subject": "a", "style": "b"}
    for field in FIELDS:
        value = values.get(field.key, str(field.choices[-1] if field.choices else field.default))
        assert FusionConfig.of(tag.read([f"{field.key}={value}"])) == FusionConfig.of({field.key: value})
    with pytest.raises(EstLoraError, match="no knob 'Beta'"):
        FusionConfig.of(tag.read(["Beta=1"]))


PIECES = st.one_of(
    st.text(),
    st.text(alphabet=" =:<>\x00\n\u200b\u202eα1.e-_#*", max_size=12),
    st.tuples(st.sampled_from([*KEYS, "", "x", "subject "]), st.text(max_size=12)).map("=".join),
    st.tuples(st.sampled_from(KEYS), st.floats().map(str)).map("=".join),
)


@given(st.lists(PIECES, max_size=8))
def test_whatever_a_tag_says_is_understood_or_refused_in_one_sentence(pieces):
    try:
        config = FusionConfig.of(tag.read(pieces))
    except EstLoraError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 400
    else:
        assert isinstance(config, FusionConfig)


@given(
    st.permutations(KEYS).map(lambda keys: keys[:5]),
    st.sampled_from(["", " ", "\t", "\u2003"]),
)
def test_the_order_of_named_pieces_and_space_around_them_say_nothing(keys, space):
    values = {field.key: str(field.choices[0] if field.choices else field.default or "a") for field in FIELDS}
    pieces = [f"{space}{key}{space}={space}{values[key]}{space}" for key in keys]
    assert tag.read(pieces) == {key: values[key] for key in keys}
