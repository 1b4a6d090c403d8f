"""The panel on a page: what its buttons do, and when its map is drawn."""

from __future__ import annotations

import re
import sys

import pytest

from est_lora.config import FusionConfig
from est_lora.hosts.webui import panel
from est_lora.text.presets import Presets
from tests.hosts.webui.pages import Page
from tests.knobs import OTHERWISE

SAID = re.compile(r'<p class="est-lora-(said|error)">([^<>]*)</p>')
SETTING = {"lean": 0.25, "beta": 0.7, "hires": "off"}


@pytest.fixture
def set_up(web, tmp_path, monkeypatch):
    """Each host in turn, with presets of its own, and nobody who waits for the map."""
    web.modules["modules.paths"].data_path = str(tmp_path)
    monkeypatch.setattr(panel, "_PAUSE_S", 0)
    return web


@pytest.fixture
def page(set_up):
    return Page(set_up)


@pytest.fixture
def presets(set_up, tmp_path):
    return Presets(tmp_path / "est-lora" / "presets.json")


def use(web, **defaults):
    """The user's settings."""
    web.modules["modules.shared"].opts.data |= {f"est_lora_{key}": value for key, value in defaults.items()}


def asked(page):
    """What the panel asks for."""
    return panel.read([True, *(page[key] for key in panel.KNOBS[1:])])


def said(page):
    """The sentence that a button has led to, and whether it is about an error."""
    ((kind, sentence),) = SAID.findall(page["said"])
    assert page["said"].count("<") == 2
    return sentence, kind == "error"


def test_it_begins_with_the_users_settings(set_up):
    use(set_up, **SETTING)
    page = Page(set_up)
    assert (page["lean"], page["beta"], page["hires"], page["alpha"]) == (0.25, "0.7", "off", 1.5)


def test_exchange(page):
    page.set(
        subject="knight", style="ink", subject_weight=0.5, style_weight=1.5, subject_te=0.25, style_te=0.75, lean=0.5
    )
    page.press("Exchange")
    assert [page[key] for key in ("subject", "style", "subject_weight", "style_weight")] == ["ink", "knight", 1.5, 0.5]
    assert [page[key] for key in ("subject_te", "style_te", "lean")] == [0.75, 0.25, 0.5]
    assert page["enabled"] is False


@pytest.mark.parametrize("key", ["subject", "style"])
def test_a_card_of_the_hosts_is_chosen(page, key):
    page.set(subject="stone", style="wood", enabled=True)
    page.press(f"Use the card as {key}", picked="ink alias")
    assert [page["subject"], page["style"]] == (["ink", "wood"] if key == "subject" else ["stone", "ink"])
    assert said(page) == (f"ink is the {key}.", False)


def test_the_card_that_makes_a_pair_switches_on(page):
    page.press("Use the card as style", picked="ink")
    assert page["enabled"] is False
    page.press("Use the card as subject", picked="knight")
    assert page["enabled"] is True


def test_a_card_whose_file_is_not_in_the_list_is_not_chosen(page):
    page.set(subject="knight", style="ink")
    page.press("Use the card as subject", picked="<b>")
    assert "no LoRA &#x27;&lt;b&gt;&#x27;" in said(page)[0]
    assert (page["subject"], page["enabled"]) == ("knight", False)


def test_insert_puts_into_the_prompt_what_the_panel_says(page):
    page.set(prompt="a <lora:x:1> knight", subject="knight", style="ink", beta="0.4", lean=-0.5, method="k-lora")
    page.press("Insert tag")
    assert page["prompt"] == "a <lora:x:1> knight <est:knight:ink:beta=0.4:lean=-0.5:method=k-lora>"
    assert said(page) == ("The tag is in the prompt; from now on it goes before this panel.", False)


def test_insert_replaces_the_tag_that_is_there(page):
    page.set(prompt="a <est:x:y:lean=1> knight", subject="knight", style="ink")
    page.press("Insert tag")
    assert page["prompt"] == "a <est:knight:ink> knight"


def test_insert_says_also_what_only_the_settings_have_otherwise(set_up):
    use(set_up, **SETTING)
    page = Page(set_up)
    page.set(subject="knight", style="ink", lean=0.0)
    page.press("Insert tag")
    assert page["prompt"] == "a knight <est:knight:ink:beta=0.7:lean=0:hires=off>"


def test_an_emptied_field_is_inserted_as_the_setting(set_up):
    use(set_up, **SETTING)
    page = Page(set_up)
    page.set(subject="knight", style="ink", beta="", lean=None)
    page.press("Insert tag")
    assert page["prompt"] == "a knight <est:knight:ink:beta=0.7:lean=0.25:hires=off>"


def test_insert_gives_the_hash_of_a_file_whose_name_ends_a_tag(page, set_up):
    entry = set_up.networks.available_networks["knight"]
    entry.name = "knight: #1"
    set_up.networks.available_networks["knight: #1"] = set_up.networks.available_network_aliases["knight: #1"] = entry
    page.set(subject="knight: #1", style="ink")
    page.press("Insert tag")
    assert page["prompt"] == f"a knight <est:{entry.shorthash}:ink>"
    assert len(entry.shorthash) == 12


def test_read_takes_the_tag_out_and_sets_every_knob(page, set_up):
    knight = set_up.networks.available_networks["knight"]
    knight.read_hash()
    page.set(prompt=f"a <est:{knight.shorthash}:ink alias:0.5:beta=0.25:pattern=s*> knight", alpha=3.0, hires="off")
    page.press("Read tag")
    assert page["prompt"] == "a knight"
    assert FusionConfig.of(asked(page)) == FusionConfig(
        subject="knight", style="ink", subject_weight=0.5, beta=0.25, pattern="s*"
    )
    assert page["enabled"] is True
    assert said(page) == ("The tag was taken out of the prompt; this panel has what it said.", False)


def test_a_tag_read_over_settings_means_what_it_meant(set_up):
    use(set_up, **SETTING)
    page = Page(set_up)
    page.set(prompt="<est:knight:ink:beta=auto>")
    page.press("Read tag")
    assert FusionConfig.of(asked(page)) == FusionConfig(subject="knight", style="ink", lean=0.25, hires="off")


def test_a_tag_that_switches_off_switches_the_panel_off(page):
    page.set(prompt="<est:knight:ink:enabled=off>", enabled=True)
    page.press("Read tag")
    assert page["enabled"] is False


def test_inserted_and_read_the_panel_says_the_same(page):
    page.set(subject="knight", style="ink", beta="0.123456789", style_weight=-0.35, layers="all", other="off")
    before = asked(page)
    page.press("Insert tag")
    page.set(subject="None", style="None", beta="auto", style_weight=1.0, layers="attention", other="sum")
    page.press("Read tag")
    assert asked(page) == before


def test_a_preset_is_saved_and_offered(page, presets):
    page.set(subject="knight", style="ink", lean=0.5, preset=" mine ")
    page.press("Save")
    assert presets.load("mine")["lean"] == 0.5
    assert presets.load("mine")["subject"] == "knight"
    assert (page["preset"], page.components["preset"].choices) == ("mine", ["mine"])
    assert said(page) == ("Saved as mine.", False)


def test_an_emptied_field_is_saved_as_the_setting(set_up, presets):
    use(set_up, **SETTING)
    page = Page(set_up)
    page.set(beta="", lean=None, preset="mine")
    page.press("Save")
    assert {key: presets.load("mine")[key] for key in SETTING} == SETTING


def test_a_preset_is_loaded(page, presets):
    presets.save("mine", {"style": "ink", "beta": 0.4, "lean": 0.5, "hires": "subject"})
    page.set(enabled=True, subject="knight", style="wood", lean=-1.0, preset="mine")
    page.press("Load")
    assert [page[key] for key in ("enabled", "subject", "style", "beta", "lean", "hires")] == [
        *(True, "knight", "ink"),
        *("0.4", 0.5, "subject"),
    ]
    assert said(page) == ("mine is in the panel.", False)


def test_a_preset_is_deleted(page, presets):
    for name in ("mine", "other"):
        presets.save(name, {})
    page.set(preset="mine")
    page.press("Delete")
    assert presets.names() == page.components["preset"].choices == ["other"]
    assert page["preset"] is None
    assert said(page) == ("mine is forgotten.", False)


def test_presets_are_offered_from_the_beginning(set_up, presets):
    presets.save("mine", {})
    page = Page(set_up)
    assert (page.components["preset"].choices, page["preset"]) == (["mine"], None)


def test_what_was_wrong_with_presets_is_said_with_what_was_done(page, presets, tmp_path):
    presets.save("x", {})
    (tmp_path / "est-lora" / "presets.json").write_text("{", encoding="utf-8")
    page.set(preset="mine")
    page.press("Save")
    sentence, is_error = said(page)
    assert sentence.startswith("Saved as mine. ")
    assert "was damaged" in sentence
    assert not is_error


@pytest.mark.parametrize(
    ("values", "words", "sentence"),
    [
        ({"subject": "None", "style": "ink"}, "Insert tag", "there is no subject: choose one."),
        ({"subject": "knight", "style": ""}, "Insert tag", "there is no style: choose one."),
        (
            {"subject": "knight", "style": "ink", "beta": "<b>"},
            "Insert tag",
            "beta can&#x27;t be &#x27;&lt;b&gt;&#x27;",
        ),
        ({"subject": "a<b>:", "style": "ink"}, "Insert tag", "no LoRA &#x27;a&lt;b&gt;:&#x27;"),
        ({}, "Read tag", "There is no &lt;est:...&gt; tag in the prompt."),
        ({"prompt": "<est:knight:ink><est:knight:wood>"}, "Read tag", "has 2 &lt;est:...&gt; tags"),
        ({"prompt": "<est:knight:ink:lean=7>"}, "Read tag", "lean can&#x27;t be &#x27;7&#x27;"),
        ({"prompt": "<est:knight:ink:x=7>"}, "Read tag", "no knob &#x27;x&#x27;"),
        ({"prompt": "<est:knight:ink:1:1:1>"}, "Read tag", "more to it"),
        ({"prompt": "<est:<i>:ink>"}, "Read tag", "no LoRA &#x27;&lt;i&#x27;"),
        ({"prompt": "<est:knight:pickled>"}, "Read tag", "is a pickle"),
        ({}, "Save", "A preset can&#x27;t be called &#x27;&#x27;"),
        ({"preset": "x" * 65}, "Save", "A preset can&#x27;t be called"),
        ({"preset": "x", "beta": "much"}, "Save", "beta can&#x27;t be &#x27;much&#x27;"),
        ({"preset": "<i>"}, "Load", "There is no preset &#x27;&lt;i&gt;&#x27;"),
        ({}, "Load", "There is no preset"),
        ({"preset": "x"}, "Delete", "There is no preset &#x27;x&#x27;"),
    ],
)
def test_an_error_is_a_sentence_and_changes_nothing(page, presets, values, words, sentence):
    page.set(**values)
    before = page.values()
    page.press(words)
    told, is_error = said(page)
    assert sentence in told
    assert is_error
    told_of = {"said": "", "map": "", "known": ""}
    assert page.values() | told_of == before | told_of
    assert presets.names() == []


def test_a_failure_of_ours_is_a_sentence_too(page, monkeypatch):
    def fail(*args):
        raise RuntimeError("<b>")

    monkeypatch.setattr(panel.tag, "write", fail)
    page.set(subject="knight", style="ink")
    before = page["prompt"]
    page.press("Insert tag")
    assert said(page) == ("EST-LoRA failed (RuntimeError); the log has more.", True)
    assert page["prompt"] == before


def test_a_disabled_lora_extension_is_an_answer_to_buttons(page, monkeypatch):
    monkeypatch.delitem(sys.modules, "networks")
    page.set(prompt="<est:knight:ink>")
    page.press("Read tag")
    assert "the built-in Lora extension is disabled" in said(page)[0]


def test_the_map_is_drawn_when_the_two_are_chosen(page):
    page.set(subject="knight")
    assert "Choose a subject and a style" in page["map"]
    page.set(style="ink")
    assert "<svg" in page["map"]
    assert "4 steps" in page["map"]


@pytest.mark.parametrize(
    "change",
    [{key: value} for key, value in OTHERWISE.items()] + [{"sampling": "DDIM"}, {"scheduler": "Karras"}, {"steps": 5}],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_the_map_has_it_drawn_anew(page, change):
    page.set(subject="knight", style="ink")
    before = page["map"]
    page.set(**change)
    assert page["map"] != before


def test_the_map_is_not_drawn_anew_for_what_it_shows_already(page):
    page.set(subject="knight", style="ink")
    before = page["map"]
    page.happen("steps")
    assert page["map"] is before


def test_what_changes_while_the_map_is_drawn_is_drawn_after_it(page):
    page.set(subject="knight", style="ink")
    page.components["steps"].value = 5
    page.happen("steps", last=2)
    assert "5 steps" in page["map"]
    page.components["steps"].value = 6  # gradio drops the event of this one
    page.happen("steps", first=2)
    assert "6 steps" in page["map"]


def test_img2img_begins_on_the_way(set_up):
    page = Page(set_up, "img2img")
    page.set(subject="knight", style="ink")
    assert "3 steps" in page["map"]
    page.set(denoising_strength=0.9)
    assert "4 steps" in page["map"]


def test_the_map_is_of_the_tag_in_the_prompt(page):
    page.set(prompt="<est:knight:wood:lean=1>", subject="knight", style="ink", enabled=True)
    page.press("Insert tag")
    assert "The tag in the prompt goes before this panel." in page["map"]
    page.set(prompt="<est:nobody:ink>", lean=0.5)
    assert "no LoRA &#x27;nobody&#x27;" in page["map"]
    page.set(prompt="<est:a:b><est:a:b>", lean=0.25)
    assert "has 2 &lt;est:...&gt; tags" in page["map"]
    page.set(prompt="a knight", lean=0.0)
    assert "The tag in the prompt" not in page["map"]


def test_a_panel_that_is_off_adds_nothing_to_a_tag(page):
    page.set(prompt="<est:knight:ink>", lean=7)
    assert "<svg" in page["map"]
    page.set(enabled=True)
    assert "lean can&#x27;t be &#x27;7&#x27;" in page["map"]


def test_the_map_follows_a_tag_that_comes_and_goes_though_no_knob_changes(page):
    page.set(subject="knight", style="ink", enabled=True)
    page.press("Insert tag")
    assert "The tag in the prompt" in page["map"]
    page.press("Read tag")
    assert "The tag in the prompt" not in page["map"]
    assert "<svg" in page["map"]


def test_emptied_steps_are_no_error(page):
    page.set(subject="knight", style="ink", steps=None)
    assert "<svg" in page["map"]
    assert " steps<" not in page["map"]


def wired(page):
    """How many chains of events there are on every part."""
    return {
        name: {event: len(chain) for event, chain in made.events.items()}
        for name, made in page.components.items()
        if hasattr(made, "events")
    }


@pytest.mark.parametrize("tab", ["txt2img", "img2img"])
def test_the_order_of_the_page_does_not_matter(set_up, tab):
    early = Page(set_up, tab)
    late = Page(set_up, tab, missing=("steps", "prompt", "sampling"))
    for name in ("steps", "sampling", "prompt"):
        late.make(name)
    assert wired(late) == wired(early)
    late.set(subject="knight", style="ink")
    assert "<svg" in late["map"]


def test_it_is_wired_once_a_page(page):
    before = wired(page)
    page.make("hr_steps")
    page.make("steps")
    after = wired(page)
    assert all(after[name] == before[name] for name in before if name != "steps")


def test_without_a_part_of_the_page_it_is_not_wired(set_up):
    page = Page(set_up, missing=("steps",))
    for elem_id in ("extras_steps", "txt2img_hr_steps", "steps", "", None):
        set_up.script.after_component(set_up.modules["gradio"].Textbox(value=9), elem_id=elem_id)
    page.set(subject="knight", style="ink")
    assert page["map"] == ""
    page.make("steps")
    page.set(style="wood")
    assert "4 steps" in page["map"]


def test_built_for_the_api_beside_the_page_it_is_connected_with_nothing_of_it(page, set_up):
    before = wired(page)
    set_up.modules["gradio"].Context.root_block = type(page._context.root_block)(blocks={})
    defaults = [made.value for made in set_up.script.ui(False)]
    assert panel.read(defaults) == {}
    assert wired(page) == before
    page.set(subject="knight", style="ink")
    assert "<svg" in page["map"]


def test_both_cards_are_shown(page, set_up, tmp_path):
    shown = type("Lora", (), {"name": "lora", "find_preview": lambda self, stem: f"./{stem[-3:]}"})()
    set_up.modules["modules.ui_extra_networks"].extra_pages.append(shown)
    page.set(subject="knight", style="ink")
    assert 'src="./ght"' in page["cards"]
    assert 'src="./ink"' in page["cards"]
    page.set(subject="None")
    assert "./ght" not in page["cards"]
    page.set(prompt="<est:stone:wood>", lean=0.5)
    assert 'src="./one"' in page["cards"]
    assert 'src="./ood"' in page["cards"]
