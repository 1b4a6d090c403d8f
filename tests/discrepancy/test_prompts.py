"""Trigger words: from a WebUI's card, from what kohya wrote down, whatever else may stand there."""

from __future__ import annotations

import json
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from est_lora.discrepancy import probe_prompt, trigger_words
from est_lora.discrepancy import prompts as module


@pytest.fixture
def lora(tmp_path):
    """Writes a LoRA file with the words that its card and its metadata are to say."""

    def write(card=None, tags=None, name="ink.v2"):
        path = tmp_path / f"{name}.safetensors"
        metadata = {} if tags is None else {"ss_tag_frequency": tags if isinstance(tags, str) else json.dumps(tags)}
        save_file({"x": torch.zeros(1)}, path, metadata)
        if card is not None:
            content = card if isinstance(card, bytes) else json.dumps(card).encode()
            (tmp_path / f"{name}.json").write_bytes(content)
        return path

    return write


def test_the_card_comes_first(lora):
    path = lora({"activation text": "ink wash, sumi-e", "description": "x"}, {"a": {"brush": 9}})
    assert trigger_words(path) == trigger_words(str(path)) == "ink wash, sumi-e"


@pytest.mark.parametrize(
    "card",
    [
        *(None, {}, [], 5, "ink", {"activation text": ""}, {"activation text": " ,\n, "}, {"activation text": None}),
        *({"activation text": ["ink"]}, {"activation text": 5}, {"activation text": {"ink": 1}}, {"Activation": "x"}),
        *({"activation text": "<lora:x:1>"}, {"activation text": "..., (), <3".replace("3", "")}),
        *(b"", b"{", b'{"activation text": "caf\xe9"}', b"\0" * 99, b"[" * 100_000, b"9" * 5000),
        b'{"activation text": "' + b"x" * (1 << 20) + b'"}',
    ],
    ids=lambda card: repr(card)[:40],
)
def test_without_words_on_the_card_the_captions_speak(lora, card):
    assert trigger_words(lora(card, {"a": {"brush": 9}})) == "brush"
    assert trigger_words(lora(card)) == ""


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"10_ink": {"b": 1, "a": 1, "c": 5, "d": 1}}, "c, a, b"),
        ({"10_ink": {"a": 3, "b": 2}, "5_more": {"b": 2, "c": 1}}, "b, a, c"),
        ({"x": {" a ": 2, "b": 3, "a": 2}}, "a, b"),
        ({"x": {"a, b": 2, "c": 1}}, "a, b, c"),
        ({"x": {"<lora:y:1>": 9, "knight\n<b>": 2, "": 8, " ": 7, "...": 6}}, "knight"),
        ({"x": {"a": -1, "b": 0, "c": True, "d": 2.5, "e": "9", "f": None, "g": [1], "h": 10**400}}, "h"),
        ({"x": {"a": 1}, "y": None, "z": [1], "w": 5, "v": "b"}, "a"),
        ({}, ""),
        ([{"a": 1}], ""),
        (None, ""),
        ("", ""),
        ("null", ""),
        ("{", ""),
        ('{"x": {"a": NaN, "b": Infinity, "c": 1}}', "c"),
        ("[" * 100_000, ""),
        ('{"x": {"a": ' + "9" * 5000 + "}}", ""),
        ('{"x": {"\\ud800a\\u2028b\\u0000c": 1}}', "a b c"),
        (json.dumps({"x": {"a": 1, "b" * (1 << 23): 1}}), ""),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_the_most_frequent_tags(lora, tags, expected):
    assert trigger_words(lora(None, tags)) == expected


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_of_the_card(lora, encoding):
    text = json.dumps({"activation text": "sumi-é, 墨絵"}, ensure_ascii=False)
    assert trigger_words(lora(text.encode(encoding))) == "sumi-é, 墨絵"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ink,ink , INK,wash", "ink, wash"),
        ("ink\nwash\r\n, a\tb", "ink wash, a b"),
        ("ink <lora:ink:0.8>, <est:a:b>, wash<x>", "ink, wash"),
        ("ink <lora:<x>:1>, wash", "ink lora: :1, wash"),
        ("(ink, wash:1.2)", "(ink, wash:1.2)"),
        ("<" * 1000 + "ink" + ">" * 1000, ""),
        ("a < b > c", "a c"),
        ("a > b < c", "a b c"),
        ("lora:x:1>, <b", "lora:x:1, b"),
        ("ink\ud800", "ink"),
        ("1girl, >_<, :3", "1girl, :3"),
    ],
)
def test_words_are_cleaned(lora, text, expected):
    assert trigger_words(lora({"activation text": text})) == expected


@pytest.mark.parametrize(
    "text", ["<" * (1 << 19), "<>" * (1 << 18), "<a" * (1 << 18), "," * (1 << 19), " " * (1 << 19)]
)
def test_long_nonsense_is_read_at_once(lora, text):
    began = time.monotonic()
    trigger_words(lora({"activation text": text}))
    assert time.monotonic() - began < 3


HEADERS = [
    len(header).to_bytes(8, "little") + header
    for header in (b"{" * 16, b"[]", b"5", b"{}", b'{"__metadata__": []}', b'{"__metadata__": {"ss_tag_frequency": 5}}')
]


@pytest.mark.parametrize("content", [None, b"", b"PK\3\4", b"\x80\2", b"\xff" * 99, *HEADERS])
def test_no_lora_file_has_no_words(tmp_path, content):
    path = tmp_path / "ink.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert trigger_words(path) == ""
    (tmp_path / "ink.json").write_text('{"activation text": "ink"}')
    assert trigger_words(path) == "ink"


@pytest.mark.parametrize("name", ["", "a\0b", "\ud800", "x" * 5000, ".", ".."])
def test_no_path_has_no_words(name):
    assert trigger_words(name) == ""


def test_folders_where_files_should_be(tmp_path):
    (tmp_path / "ink.safetensors").mkdir()
    (tmp_path / "ink.json").mkdir()
    assert trigger_words(tmp_path / "ink.safetensors") == ""


def test_a_file_of_another_ending_has_a_card_too(tmp_path):
    (tmp_path / "old.json").write_text('{"activation text": "old"}')
    (tmp_path / "old.pt").write_bytes(b"\x80\2")
    assert trigger_words(tmp_path / "old.pt") == trigger_words(tmp_path / "old") == "old"


@pytest.mark.parametrize(
    ("subject", "style", "expected"),
    [
        ("knight", "ink wash", "knight, ink wash"),
        ("knight, Ink Wash", "ink wash, brush", "knight, Ink Wash, brush"),
        ("", "ink wash", "a knight, in a park"),
        ("knight", "", "a knight, in a park"),
        ("", "", "a knight, in a park"),
    ],
)
def test_the_prompt_of_the_probe(lora, subject, style, expected):
    files = [lora({"activation text": words}, name=name) for words, name in ((subject, "a"), (style, "b"))]
    assert probe_prompt(*files, "a knight, <lora:x:1>, in a\n park<est:a:b>") == expected


def test_the_prompt_keeps_what_it_says_twice(tmp_path):
    assert probe_prompt(tmp_path / "a", tmp_path / "b", "ink, (ink:1.2), ink") == "ink, (ink:1.2), ink"
    assert probe_prompt(tmp_path / "a", tmp_path / "b", "<lora:x:1>") == ""


JUNK = st.text(st.sampled_from('<>,:ab1 \n"\\{}\ud800\u2028'), max_size=30) | st.text(max_size=9)


@given(JUNK)
def test_nothing_that_could_be_a_tag_is_left(text):
    words = list(module._pieces(text))
    assert not set("<>\n,\u2028\ud800") & set("".join(words))
    assert all(word == word.strip() != "" for word in words)
    assert list(module._pieces(", ".join(words))) == words
