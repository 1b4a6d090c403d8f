"""The infotext is read back as it was written, by the format's own rules."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from est_lora.config import FIELDS, FusionConfig
from est_lora.errors import EstLoraError
from est_lora.text import infotext

PAIR = re.compile(r'(\w[\w /-]+): ("(?:[^"\\]|\\.)*"|[^,]*)(?:, |$)')
LINES = st.text(st.characters(exclude_categories=("Cs",)), max_size=60).map(
    lambda text: "\n".join(line.strip() for line in text.split("\n")).strip()
)
NAMES = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="/\\\0"), min_size=1, max_size=30).filter(
    lambda name: name.strip(". ")
)


def read(text):
    """Prompt, negative prompt and values, as a WebUI understands them."""
    *lines, last = text.split("\n")
    starts = [index for index, line in enumerate(lines) if line.startswith("Negative prompt:")]
    cut = starts[0] if starts else len(lines)
    negative = "\n".join(lines[cut:]).removeprefix("Negative prompt:").strip()
    pairs = {key: json.loads(value) if value[:1] == '"' else value for key, value in PAIR.findall(last)}
    return "\n".join(lines[:cut]), negative, pairs


def test_the_format():
    text = infotext.write(
        "a knight, (ink:1.2) <x:y>",
        "blurry",
        {"Steps": 28, "CFG scale": 7.0, "Seed": 3, "Model hash": None, "Model": 'a: "b"\n', "Version": "est-lora 1"},
    )
    assert text == (
        "a knight, (ink:1.2) <x:y>\nNegative prompt: blurry\n"
        'Steps: 28, CFG scale: 7, Seed: 3, Model: "a: \\"b\\"\\n", Version: est-lora 1'
    )
    assert infotext.write("a", "", {"Model": " a", "Style": "猫, b", "Other": "猫"}) == (
        'a\nModel: " a", Style: "猫, b", Other: 猫'
    )
    assert infotext.write("a", "", {"CFG scale": 0.1 + 0.2}) == "a\nCFG scale: 0.30000000000000004"


@given(LINES, LINES, NAMES, st.floats(-1, 1))
def test_what_is_written_is_read_back(prompt, negative, name, lean):
    config = FusionConfig(subject=f"loras/{name}.safetensors", style="ink.safetensors", lean=lean)
    values = {"Steps": 3, "Model": name, **infotext.fusion(config), "Lora hashes": "a: 1, b: 2", "Version": "x"}
    if any(line.startswith("Negative prompt:") for line in f"{prompt}\n{negative}".split("\n")):
        with pytest.raises(EstLoraError, match="begins with 'Negative prompt:'"):
            infotext.write(prompt, negative, values)
        return
    told, told_negative, pairs = read(infotext.write(prompt, negative, values))
    assert (told, told_negative) == (prompt, negative)
    assert float(pairs.pop("EST-LoRA lean", 0)) == lean
    values.pop("EST-LoRA lean", None)
    assert pairs == {key: str(value) for key, value in values.items()}


def test_only_what_differs_from_the_default_is_written():
    files = {"subject": "a/b/knight.v2.safetensors", "style": "ink.safetensors"}
    assert infotext.fusion(FusionConfig(**files)) == {"EST-LoRA subject": "knight.v2", "EST-LoRA style": "ink"}
    changed = {"beta": 0.5, "subject_weight": 0.75, "pattern": "s*", "layers": "all"}
    assert infotext.fusion(FusionConfig(**files, **changed)) == {
        "EST-LoRA subject": "knight.v2",
        "EST-LoRA style": "ink",
        "EST-LoRA subject weight": 0.75,
        "EST-LoRA beta": 0.5,
        "EST-LoRA pattern": "s*",
        "EST-LoRA layers": "all",
    }


def test_keys_are_unique_and_can_be_read():
    keys = [field.infotext for field in FIELDS]
    others = [
        "EST-LoRA dtype",
        "EST-LoRA fingerprint",
        "Steps",
        "Sampler",
        "Schedule type",
        "CFG scale",
        "Seed",
        "Size",
    ]
    assert len({*keys, *others}) == len(keys) + len(others)
    assert all(re.fullmatch(r"EST-LoRA [a-z ]+", key) for key in keys)
    assert [field.infotext for field in FIELDS if field.key == "subject_te"] == ["EST-LoRA subject te"]


def test_separators_leave_the_names_of_lora_hashes():
    assert infotext.lora_hashes([("a: b, c", "12"), ("d", "34")]) == "a b c: 12, d: 34"


def test_a_name_that_is_no_unicode_can_be_written():
    infotext.write("a", "", {"Model": "caf\udce9"}).encode("utf-8")


@pytest.mark.parametrize("prompts", [("a\n Negative prompt: b", ""), ("a", "Negative prompt: b")])
def test_a_prompt_that_would_be_read_otherwise_is_refused(prompts):
    with pytest.raises(EstLoraError, match="begins with 'Negative prompt:'"):
        infotext.write(*prompts, {})
