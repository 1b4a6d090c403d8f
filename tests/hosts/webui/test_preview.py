"""What the panel shows before anything is made."""

from __future__ import annotations

import base64
import os
import shutil
import sys
from html import unescape
from html.parser import HTMLParser
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from safetensors.torch import load_file, save_file

from est_lora import report
from est_lora.config import FusionConfig
from est_lora.errors import EstLoraError
from est_lora.gate import FusionPlan
from est_lora.hosts.webui import preview
from est_lora.hosts.webui.measuring import Known
from est_lora.hosts.webui.preview import Preview, cards, say
from est_lora.hosts.webui.steps import Sampling
from est_lora.lora import LoraFile
from tests.files import ATTENTION_LAYERS, random_lora, write
from tests.hosts.webui import fakes

NAMED = {"subject": "knight", "style": "ink"}
SAMPLING = Sampling("Euler", "Automatic", 4)


@pytest.fixture(autouse=True)
def host(web):
    return web


@pytest.fixture
def loaded(note_loads):
    """The files that were opened."""
    return note_loads(os.path.basename)


@pytest.fixture
def folder(web, tmp_path):
    """The files of the host, where they may be changed."""
    shutil.copytree(web.folder, tmp_path / "loras")
    sys.modules["networks"] = web.networks = fakes.networks_module(tmp_path / "loras", web._load_networks)
    return tmp_path / "loras"


def planned(*asked):
    """What is drawn of a plan."""
    return Preview().draw(*asked)[1]


def test_the_plan_is_that_of_the_files(files):
    knobs = {**NAMED, "lean": 0.5, "method": "k-lora"}
    plan = FusionPlan.of(*(LoraFile.load(files.path(name)) for name in ("knight", "ink")), FusionConfig.of(knobs))
    assert report.to_json(Preview().plan(knobs)) == report.to_json(plan)


def test_files_are_opened_once(loaded):
    shown = Preview()
    for lean in (0.0, 0.5):
        shown.draw({**NAMED, "lean": lean}, SAMPLING)
    assert loaded == ["knight.safetensors", "ink.safetensors"]


def test_a_file_that_has_gone_is_a_sentence(folder):
    (folder / "knight.safetensors").unlink()
    with pytest.raises(EstLoraError, match="knight"):
        Preview().plan(NAMED)
    assert planned(NAMED, SAMPLING).startswith('<p class="est-lora-error">')


def test_nothing_is_looked_for_on_disk_or_hashed(host):
    scans = host.networks.scans
    drawn = planned({**NAMED, "subject": "0123456789ab"}, SAMPLING)
    assert "no LoRA &#x27;0123456789ab&#x27;" in drawn
    assert host.networks.scans == scans
    assert not any(entry.hashed for entry in host.networks.available_networks.values())


def test_no_model_is_needed(host):
    host.sd_model = None
    assert "<svg" in planned(NAMED, SAMPLING)


def test_it_is_words_and_a_map(host):
    drawn = planned(NAMED, SAMPLING)
    words = report.summary(Preview().plan(NAMED))
    assert drawn.startswith(say(words))
    box = ElementTree.fromstring(drawn.removeprefix(say(words)))
    assert (box.get("class"), box.get("role"), box.get("aria-label")) == ("est-lora-map", "img", words)
    assert [child.tag for child in box] == ["{http://www.w3.org/2000/svg}svg"]
    assert "4 steps" in drawn


def test_who_wants_no_map_has_words(host):
    host.modules["modules.shared"].opts.data["est_lora_draw_map"] = False
    assert planned(NAMED, SAMPLING) == say(report.summary(Preview().plan(NAMED)))


@pytest.mark.parametrize("clock", ["timestep", "step"])
def test_steps_are_marked_by_the_chosen_clock(monkeypatch, clock):
    marked = []
    monkeypatch.setattr(preview, "gate_map_svg", lambda plan, steps: marked.append(steps) or "")
    planned({**NAMED, "clock": clock}, SAMPLING)
    assert marked == [SAMPLING.taus(clock)]


@pytest.mark.parametrize("knobs", [{}, {"subject": "knight"}, {"style": "ink"}, {"subject": "", "style": "ink"}])
def test_until_two_are_chosen_it_asks_for_them(knobs):
    assert planned(knobs, SAMPLING) == say("Choose a subject and a style: what each will do is drawn here.")


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({**NAMED, "lean": 7}, "lean can't be '7'"),
        ({**NAMED, "style": "<b>"}, "no LoRA '<b>'"),
        ({**NAMED, "style": "broken"}, "isn't a whole safetensors file"),
        ({**NAMED, "style": "giant"}, "different models"),
        ({**NAMED, "style": "pickled"}, "is a pickle"),
        ({**NAMED, "<i>": 1}, "no knob '<i>'"),
    ],
)
def test_what_is_wrong_is_a_sentence(knobs, sentence):
    drawn = planned(knobs, SAMPLING)
    assert drawn.startswith('<p class="est-lora-error">')
    assert drawn.count("<") == 2
    assert sentence in unescape(drawn)


def test_a_failure_of_ours_is_a_sentence_and_told_in_the_log(monkeypatch, caplog):
    monkeypatch.setattr(FusionPlan, "of", lambda *args: 1 / 0)
    drawn = planned(NAMED, SAMPLING)
    assert drawn == say("The map can't be drawn (ZeroDivisionError); the log has more.", is_error=True)
    assert "Traceback" in caplog.text


def test_remarks_of_the_files_are_said(folder):
    lora = random_lora(3, ATTENTION_LAYERS)
    write(folder / "knight.safetensors", lora)
    tensors = load_file(folder / "knight.safetensors")
    key = next(key for key in tensors if "lora_up" in key)
    save_file({**tensors, "lora_unet_<b>.lora_up.weight": tensors[key].clone()}, folder / "knight.safetensors")
    plan = Preview().plan(NAMED)
    assert plan.subject.remarks
    drawn = planned(NAMED, SAMPLING)
    for remark in plan.subject.remarks:
        assert say(remark) in drawn


class Seen(HTMLParser):
    """The pictures of a piece of a page, and its texts."""

    def __init__(self):
        super().__init__()
        self.pictures, self.texts = [], []

    @classmethod
    def of(cls, html):
        seen = cls()
        seen.feed(html)
        return seen.pictures, seen.texts

    def handle_starttag(self, tag, attrs):
        assert tag in ("div", "p", "figure", "img", "figcaption")
        if tag == "img":
            self.pictures.append(dict(attrs))

    def handle_data(self, data):
        self.texts.append(data)


class TestDiscrepancy:
    @pytest.fixture
    def remembered(self, host, monkeypatch, tmp_path):
        """What is remembered of any pair, and the prompts with which it was looked up."""
        host.modules["modules.shared"].opts.data["est_lora_draw_map"] = False  # no two are of the same bytes
        (tmp_path / "both.png").write_bytes(b"two pictures")
        found, asked = [Known(1.75, tmp_path / "both.png")], []
        monkeypatch.setattr(preview, "known", lambda *pair_and_prompt: asked.append(pair_and_prompt[2]) or found[0])
        return found, asked

    def test_what_is_shown_of_it_and_of_the_plan_is_looked_up_once(self, remembered):
        measured, html = Preview().draw(NAMED, SAMPLING, "a knight")
        ((picture,), (words,)) = Seen.of(measured)
        assert words.startswith("Style discrepancy 1.75, measured on")
        assert picture["src"] == f"data:image/png;base64,{base64.b64encode(b'two pictures').decode()}"
        assert picture["alt"] == "subject: knight and style: ink"
        assert html == planned({**NAMED, "beta": 1.75}, SAMPLING)
        assert html != planned({**NAMED, "beta": 0.5}, SAMPLING)
        assert remembered[1] == ["a knight"]

    def test_without_its_pictures_it_is_a_number(self, remembered, tmp_path):
        (tmp_path / "both.png").unlink()
        measured, _ = Preview().draw(NAMED, SAMPLING)
        assert "1.75" in measured
        assert "<img" not in measured

    def test_until_it_is_known_it_is_said_so(self, remembered):
        remembered[0][0] = None
        measured, html = Preview().draw(NAMED, SAMPLING)
        assert "until then, 0.5 is drawn below" in measured
        assert html == planned({**NAMED, "beta": 0.5}, SAMPLING)

    @pytest.mark.parametrize("knobs", [{"beta": 0.3}, {"method": "sum"}, {"method": "k-lora"}, {"style": "nobody"}])
    def test_where_it_does_not_count_nothing_is_said_or_looked_up(self, remembered, knobs):
        assert Preview().draw({**NAMED, **knobs}, SAMPLING)[0] == ""
        assert remembered[1] == []

    def test_it_is_said_also_where_there_is_no_map(self, remembered):
        measured, html = Preview().draw({**NAMED, "style": "broken"}, SAMPLING)
        assert "1.75" in measured
        assert html.startswith('<p class="est-lora-error">')


class TestCards:
    @pytest.fixture(autouse=True)
    def page(self, host):
        """The host's pages of extra networks; what the second one was asked for."""
        asked = []

        def find_preview(stem):
            asked.append(stem)
            return f"./thumb?a=1&lt={os.path.basename(stem)}" if "ink" not in stem else None

        def find_embedded_preview(stem, name, metadata):
            return f"./cover?{name}" if metadata["covers"] else None

        loras = SimpleNamespace(name="lora", find_preview=find_preview, find_embedded_preview=find_embedded_preview)
        others = SimpleNamespace(name="checkpoints", find_preview=lambda stem: "./wrong")
        host.modules["modules.ui_extra_networks"].extra_pages[:] = [others, loras]
        for entry in host.networks.available_networks.values():
            entry.metadata = {"covers": entry.name == "ink"}
        return asked

    def test_both_are_shown(self, page, host):
        assert Seen.of(cards(["knight", "ink"])) == (
            [
                {"src": "./thumb?a=1&lt=knight", "alt": "Subject: knight"},
                {"src": "./cover?ink", "alt": "Style: ink"},
            ],
            ["Subject: knight", "Style: ink"],
        )
        assert page[0] == str(host.folder / "knight")

    def test_who_has_none_is_left_out(self, host):
        host.networks.available_networks["ink"].metadata["covers"] = False
        assert "Style" not in cards(["knight", "ink"])
        assert "Subject" not in cards([None, "knight"])
        assert "Style: knight" in cards([None, "knight"])
        assert cards([None, None]) == cards(["ink", None]) == ""

    @pytest.mark.parametrize("name", ["nobody", "<b>", "pickled"])
    def test_names_that_are_not_here_have_none(self, name):
        assert cards([name, name]) == ""

    def test_a_name_is_text(self, host):
        entry = host.networks.available_networks["knight"]
        host.networks.available_network_aliases['a"<b>&'] = entry
        ((picture,), captions) = Seen.of(cards(['a"<b>&', None]))
        assert picture["alt"] == 'Subject: a"<b>&'
        assert captions == ['Subject: a"<b>&']

    def test_a_page_that_fails_shows_none(self, host):
        host.networks.available_networks["ink"].metadata = None
        assert cards(["ink", None]) == ""
        host.modules["modules.ui_extra_networks"].extra_pages.clear()
        assert cards(["knight", None]) == ""


def test_a_sentence_is_text():
    assert say("<a> & 'b'") == '<p class="est-lora-said">&lt;a&gt; &amp; &#x27;b&#x27;</p>'
    assert say("x", is_error=True) == '<p class="est-lora-error">x</p>'
    assert say("") == ""
