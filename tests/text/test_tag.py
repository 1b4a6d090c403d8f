"""The tag's grammar, and tags in prompts."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from est_lora.config import FIELDS, FusionConfig
from est_lora.errors import EstLoraError
from est_lora.text import tag
from tests.knobs import configs, settings

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


# What a WebUI takes for a tag, and what it cuts it at.
HOSTS = re.compile(r"<(\w+):([^>]+)>")
FITTING = st.text(min_size=1, max_size=12).filter(lambda name: name == name.strip() and not set(":>=#\n") & set(name))


def as_the_host_reads(written):
    ((name, content),) = HOSTS.findall(written)
    assert name == "est"
    return tag.read(content.split(":"))


@given(configs(FITTING), settings())
def test_what_is_written_means_the_same_over_these_settings_and_over_none(config, defaults):
    knobs = as_the_host_reads(tag.write(dataclasses.asdict(config), defaults))
    assert FusionConfig.of({**defaults, **knobs}) == config
    assert FusionConfig.of(knobs) == config


def test_what_is_written_is_short():
    knobs = dataclasses.asdict(FusionConfig(subject="a", style="b", lean=0.5, subject_weight=2, beta=0.1 + 0.2))
    assert tag.write(knobs, {}) == "<est:a:b:subject_weight=2:beta=0.30000000000000004:lean=0.5>"
    assert tag.write({"subject": "a", "style": "b"}, {"lean": 1.0}) == "<est:a:b:lean=0>"


@pytest.mark.parametrize("name", ["a b", "ünïcode 猫", "a.b-c_d", "a<b", "(a)", "a,b", "0123456789ab", "a'\"b", "a\tb"])
def test_a_name_that_fits_is_read_as_it_is(name):
    assert tag.fits(name)
    knobs = as_the_host_reads(tag.write({"subject": name, "style": "b"}, {}))
    assert knobs == {"subject": name, "style": "b"}


@pytest.mark.parametrize("name", ["a:b", "a>b", "a=b", "a#b", "a\nb", "a\n", " a", "a ", "\u00a0a", "a\u2003"])
def test_a_name_that_does_not_fit_is_refused(name):
    assert not tag.fits(name)
    for knobs in ({"subject": name, "style": "b"}, {"subject": "b", "style": name}):
        with pytest.raises(EstLoraError, match="can't be in a tag, which ends at : and >: give the file's hash"):
            tag.write(knobs, {})


@pytest.mark.parametrize("missing", ["subject", "style"])
def test_a_tag_without_two_files_is_not_written(missing):
    knobs = {"subject": "a", "style": "b"}
    for without in ({**knobs, missing: None}, {key: name for key, name in knobs.items() if key != missing}):
        with pytest.raises(EstLoraError, match=f"there is no {missing}: choose one"):
            tag.write(without, {})


PLAIN = st.lists(
    st.sampled_from(
        ["a", " ", "\n", "\t", ",", "(b:1.2)", "<lora:x:1>", "<est", "<", ">", "# c", "<este:x>", "<EST:x:y>", "猫"]
    ),
    max_size=5,
).map("".join)
TAGS = st.sampled_from(["<est:x:y>", "<est: x : y :beta=1>", "<est:x:y:lean=\n0>", "<est:<>"])
PROMPTS = st.tuples(PLAIN, st.lists(st.tuples(TAGS, PLAIN), max_size=3))


def whole(begin, rest):
    return begin + "".join(one + text for one, text in rest)


def bare(begin, rest):
    """All text but the tags, and but the space before each."""
    texts = [begin, *(text for _, text in rest)]
    return "".join(text.removesuffix(" ") for text in texts[:-1]) + texts[-1]


@given(PROMPTS)
def test_without_takes_out_tags_and_the_space_before_each(prompt):
    assert tag.without(whole(*prompt)) == bare(*prompt)


@given(PROMPTS)
def test_find_reads_every_tag(prompt):
    assert tag.find(whole(*prompt)) == [tag.read(one[5:-1].split(":")) for one, _ in prompt[1]]


@given(PROMPTS)
def test_put_exchanges_the_first_tag_and_takes_out_the_others(prompt):
    begin, rest = prompt
    put = tag.put(whole(*prompt), "<est:new:one>")
    if rest:
        assert put == begin + "<est:new:one>" + bare(rest[0][1], rest[1:])
    else:
        assert put == begin + (" " if begin and not begin[-1].isspace() else "") + "<est:new:one>"


@pytest.mark.parametrize(
    ("before", "after"), [("", "<est:x:y>"), ("a", "a <est:x:y>"), ("a ", "a <est:x:y>"), ("a\n", "a\n<est:x:y>")]
)
def test_put_where_there_is_none(before, after):
    assert tag.put(before, "<est:x:y>") == after


@given(PROMPTS)
def test_put_again_changes_nothing(prompt):
    put = tag.put(whole(*prompt), "<est:new:one>")
    assert tag.put(put, "<est:new:one>") == put


SPACE = st.sampled_from(["", " ", "\t ", "\n"])
RENAMED = "\0new"


@given(PLAIN, st.permutations(["subject", "style", "lean"]), st.tuples(*[SPACE] * 4), FITTING, FITTING, PLAIN)
def test_rename_changes_the_names_and_nothing_else(before, keys, spaces, subject, style, after):
    one, two, three, four = spaces
    values = {"subject": subject, "style": style, "lean": "0.5"}

    def prompt(names):
        pieces = (f"{one}{key}{two}={three}{names[key]}{four}" for key in keys)
        return f"{before}<est:{':'.join(pieces)}>{after}"

    new = {name: f"{name}{RENAMED}" for name in (subject, style)}
    assert tag.rename(prompt(values), new.__getitem__) == prompt(
        values | {"subject": new[subject], "style": new[style]}
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("<est:a:b>", "<est:A:B>"),
        ("x <est: a :b:0.5:beta=1> <lora:a:1> a", "x <est: A :B:0.5:beta=1> <lora:a:1> a"),
        ("<est:a:b><est:b:a>", "<est:A:B><est:B:A>"),
        ("<est:style=b:a>", "<est:style=B:A>"),
        ("<est:subject=s:style=e>", "<est:subject=S:style=E>"),
        ("<est:subject = t : style =y>", "<est:subject = T : style =Y>"),
        ("<est:subject=a=b:b>", "<est:subject=A=B:B>"),
        ("<est::b>", "<est::B>"),
        ("<est:lean=a:x>", "<est:lean=a:X>"),
        ("<est:a:b:1:1:a>", "<est:a:b:1:1:a>"),
        ("<est:a", "<est:a"),
        ("", ""),
    ],
)
def test_names_in_a_prompt(before, after):
    assert tag.rename(before, str.upper) == after
