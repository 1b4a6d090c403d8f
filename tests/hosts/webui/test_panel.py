"""The panel, and what it and the API hand over."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from est_lora.config import BY_KEY, FIELDS, FusionConfig
from est_lora.errors import EstLoraError
from est_lora.hosts.webui import panel

NAMES = ["broken", "giant", "giantess", "ink", "knight", "stone", "twin", "wood"]


@pytest.fixture
def drawn(web):
    return web.script.ui(False)


def test_the_components_are_the_knobs_in_their_order(web, drawn):
    assert [component.elem_id for component in drawn] == [f"script_txt2img_estlora_{key}" for key in panel.KNOBS]
    assert drawn[0].kind == "InputAccordion"
    for component, key in zip(drawn[1:], panel.KNOBS[1:]):
        assert component.label == BY_KEY[key].label
        assert BY_KEY[key].help in component.info


def test_labels_are_unique(web, drawn):
    labels = [made.label for made in web.components if getattr(made, "label", None)]
    assert len(set(labels)) == len(labels)
    assert {component.label for component in drawn} < set(labels)


def test_the_host_keeps_nothing_among_its_defaults_that_the_settings_have(web, drawn):
    kept = [made for made in drawn if not getattr(made, "do_not_save_to_config", False)]
    assert kept == drawn[:3]


def test_identifiers_are_unique_in_both_tabs(web):
    web.script.ui(False)
    web.script.is_img2img = True
    web.script.ui(True)
    ids = [component.elem_id for component in web.components if getattr(component, "elem_id", None)]
    assert len(set(ids)) == len(ids)
    for tab in ("txt2img", "img2img"):
        assert {f"script_{tab}_estlora_{key}" for key in panel.KNOBS} <= set(ids)
    assert all(one.startswith("script_") for one in ids)


def test_untouched_it_asks_for_nothing(web, drawn):
    assert panel.read([component.value for component in drawn]) == {}


def test_switched_on_it_asks_for_defaults(web, drawn):
    values = [True, "knight", "ink", *(component.value for component in drawn[3:])]
    assert FusionConfig.of(panel.read(values)) == FusionConfig(subject="knight", style="ink")


def test_bounds_and_choices_are_the_fields(web, drawn):
    for component, key in zip(drawn, panel.KNOBS):
        field = BY_KEY[key]
        if component.kind == "Slider":
            lowest = field.low + component.step if field.above_low else field.low
            assert (component.minimum, component.maximum, component.value) == (lowest, field.high, field.default)
            field.parse(component.minimum)
            field.parse(component.maximum)
        elif component.kind == "Radio":
            assert tuple(component.choices) == field.choices
            assert component.value == field.default
    assert {field.key for field in FIELDS if field.choices} == {
        key for key, component in zip(panel.KNOBS, drawn) if component.kind == "Radio"
    }


def test_only_files_that_can_be_read_are_offered(web, drawn):
    for component in drawn[1:3]:
        assert component.choices == ["None", *NAMES]
        assert component.value == "None"
        assert component.allow_custom_value


def test_the_button_looks_on_disk_again(web, drawn):
    (button,) = [component for component in web.components if component.kind == "Refresh"]
    assert button.components == drawn[1:3]
    scans = web.networks.scans
    button.refresh()
    assert web.networks.scans == scans + 1
    del web.networks.available_networks["ink"]
    assert "ink" not in button.choices()["choices"]


def test_drawing_changes_nothing(web):
    callbacks = {name: len(found) for name, found in web.callbacks.callbacks.items()}
    scans = web.networks.scans
    for _ in range(3):
        web.script.ui(False)
    assert {name: len(found) for name, found in web.callbacks.callbacks.items()} == callbacks
    assert web.networks.scans == scans


def test_a_disabled_lora_extension_is_said_in_the_panel(web, monkeypatch):
    monkeypatch.delitem(sys.modules, "networks")
    drawn = web.script.ui(False)
    (said,) = [made.value for made in web.components if getattr(made, "elem_id", None) == "script_txt2img_estlora_map"]
    assert "the built-in Lora extension is disabled" in said
    assert drawn[1].choices == ["None"]
    button = next(component for component in web.components if component.kind == "Refresh")
    button.refresh()
    assert button.choices() == {"choices": ["None"]}


def test_the_script_is_always_on_in_both_tabs(web):
    always = web.modules["modules.scripts"].AlwaysVisible
    assert web.script.show(False) is always
    assert web.script.show(True) is always
    assert web.script.title() == "EST-LoRA"


ON = [True, "a", "b", 0.5, 1.0, "auto", 2.0, 0.0, "l1", "s*", "step", "est", "all", "off", 0.25, 0.75, "off", "branch"]
READ = {
    "enabled": True,
    "subject": "a",
    "style": "b",
    "subject_weight": 0.5,
    "style_weight": 1.0,
    "beta": "auto",
    "alpha": 2.0,
    "lean": 0.0,
    "balance": "l1",
    "pattern": "s*",
    "clock": "step",
    "method": "est",
    "layers": "all",
    "other": "off",
    "subject_te": 0.25,
    "style_te": 0.75,
    "hires": "off",
    "engine": "branch",
}


@pytest.mark.parametrize(
    ("arguments", "knobs"),
    [
        ([], {}),
        (ON, READ),
        (tuple(ON), READ),
        ([True, "None", "", None], {"enabled": True}),
        ([True, "a"], {"enabled": True, "subject": "a"}),
        (["true", "a"], {"enabled": "true", "subject": "a"}),
        ([1, "a"], {"enabled": 1, "subject": "a"}),
        ([0, "a"], {}),
        (["off", "a"], {}),
        ([None, "a"], {}),
        ([*ON, "more", "and more"], READ),
        ([{"subject": "a"}], {"enabled": True, "subject": "a"}),
        ([{}], {"enabled": True}),
        ([{"enabled": False, "subject": "a"}], {}),
        ([{"enabled": "false"}], {}),
        ([{"subject": "None"}, "a"], {"enabled": True, "subject": "None"}),
        ([{"enabled": "perhaps"}], {"enabled": "perhaps"}),
        (["perhaps", "a"], {"enabled": "perhaps", "subject": "a"}),
        ([[], "a"], {"enabled": [], "subject": "a"}),
    ],
)
def test_what_is_handed_over(arguments, knobs):
    assert panel.read(arguments) == knobs


def test_what_is_handed_over_is_a_copy():
    given = {"subject": "a"}
    panel.read([given])["style"] = "b"
    assert given == {"subject": "a"}


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(JUNK, max_size=10))
def test_junk_is_refused_by_nothing_but_our_own_error(arguments):
    try:
        FusionConfig.of(panel.read(arguments))
    except EstLoraError as error:
        assert "\n" not in str(error)
