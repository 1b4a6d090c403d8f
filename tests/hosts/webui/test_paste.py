"""The parameters of a picture find their way back."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from est_lora.config import FusionConfig
from est_lora.gate import FusionPlan
from est_lora.hosts.webui import infotext, panel
from est_lora.hosts.webui.loras import LoraList
from est_lora.lora import LoraFile
from tests.hosts.webui import fakes
from tests.hosts.webui.fakes import infotext_of
from tests.hosts.webui.host import Processing
from tests.hosts.webui.pages import Page
from tests.knobs import OTHERWISE, configs

NAMES = ("knight", "ink", "stone", "wood")
PAIRS = st.permutations(NAMES).map(lambda names: names[:2])


class Disk:
    """The user's LoRAs, which change their names."""

    def __init__(self, web, folder):
        self._web, self._folder = web, folder
        self.begin()

    def begin(self):
        """All files as they were."""
        shutil.rmtree(self._folder, ignore_errors=True)
        shutil.copytree(self._web.folder, self._folder)
        self._web.networks = sys.modules["networks"] = fakes.networks_module(self._folder, self._web._load_networks)

    def rename(self, **names):
        for old, new in names.items():
            (self._folder / f"{old}.safetensors").rename(self._folder / f"{new}.part")
        for new in names.values():
            (self._folder / f"{new}.part").rename(self._folder / f"{new}.safetensors")
        self._web.networks.list_available_networks()

    def delete(self, name):
        (self._folder / f"{name}.safetensors").unlink()
        self._web.networks.list_available_networks()


@pytest.fixture
def web(start):
    return start("a1111")


@pytest.fixture
def disk(web, tmp_path):
    return Disk(web, tmp_path / "loras")


@pytest.fixture
def page(web, disk, monkeypatch):
    monkeypatch.setattr(panel, "_PAUSE_S", 0)
    monkeypatch.setattr(panel, "_draw", lambda *args: [""] * 3)
    return Page(web)


def written(config, prompt="a knight"):
    """The parameters of a picture, and the beta that was used."""
    entries = [LoraList().find(name) for name in config.pair()]
    for entry in entries:
        entry.read_hash()
    plan = FusionPlan.of(*(LoraFile.load(entry.filename) for entry in entries), config)
    p = SimpleNamespace(extra_generation_params={}, lora_hashes={})
    infotext.write(p, plan, *entries)
    return infotext_of(prompt, p.extra_generation_params), plan.beta


def asked(page):
    return FusionConfig.of(panel.read([page[key] for key in panel.KNOBS]))


PLAIN = FusionConfig(subject="knight", style="ink")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(configs(st.none()), PAIRS, st.booleans())
def test_what_a_picture_says_is_what_was_asked(page, disk, config, pair, renamed):
    config = dataclasses.replace(config, enabled=True, subject=pair[0], style=pair[1])
    disk.begin()
    text, beta = written(config)
    new = {"knight": "paladin, 2: x", "ink": "512x768"} if renamed else {}
    disk.rename(**new)
    page.set(**OTHERWISE)
    page.paste(text)
    assert asked(page) == dataclasses.replace(
        config,
        subject=new.get(pair[0], pair[0]),
        style=new.get(pair[1], pair[1]),
        beta=round(beta, 6) if config.takes_discrepancy else config.beta,
    )


def test_knobs_that_a_picture_does_not_name_are_reset(page):
    page.set(**OTHERWISE)
    page.paste(written(PLAIN)[0])
    assert asked(page) == dataclasses.replace(PLAIN, beta=0.5)


def test_they_are_reset_to_what_is_built_in_whatever_the_settings_are(page, web):
    web.modules["modules.shared"].opts.data |= {"est_lora_lean": 0.5, "est_lora_hires": "off"}
    page.paste(written(PLAIN)[0])
    assert asked(page) == dataclasses.replace(PLAIN, beta=0.5)


@pytest.mark.parametrize("parameters", [{}, {"EST-LoRA off": "The WebUI has no LoRA 'x'", "EST-LoRA lean": 1}])
def test_a_picture_without_a_fusion_only_switches_off(page, parameters):
    page.set(enabled=True, subject="knight", style="ink", **OTHERWISE)
    before = page.values()
    page.paste(infotext_of("a knight", parameters))
    assert page.values() == {**before, "enabled": False}


def test_a_picture_is_made_again(page, web):
    args = [True, "knight", "ink", 0.5, 1.2, "0.4", 1.0, 0.25, "l1", "s*", "timestep", "est", "all", "off", 0.5]
    (picture,) = web.make(Processing(web, "a knight", args=args))
    page.set(subject="wood", **OTHERWISE)
    page.paste(infotext_of("a knight", picture.infotext))
    (again,) = web.make(Processing(web, page["prompt"], args=[page[key] for key in panel.KNOBS]))
    assert torch.equal(picture.latent, again.latent)
    assert again.infotext == picture.infotext


@pytest.mark.parametrize("name", ["512x768", 'a "b"', "a: b, c", "ünï 猫", "none", "1"])
def test_names_of_all_kinds(page, disk, name):
    disk.rename(knight=name)
    page.paste(written(FusionConfig(subject=name, style="ink"))[0])
    assert (page["subject"], page["style"], page["enabled"]) == (name, "ink", True)


def test_two_files_that_have_exchanged_their_names(page, disk):
    text, _ = written(PLAIN)
    disk.rename(knight="ink", ink="knight")
    for name in ("knight", "ink"):
        LoraList().find(name).read_hash()
    page.paste(text)
    assert (page["subject"], page["style"]) == ("ink", "knight")


def test_a_file_that_is_gone_is_named_as_it_was(page, disk):
    text, _ = written(PLAIN)
    disk.delete("knight")
    page.paste(text)
    assert (page["subject"], page["style"], page["enabled"]) == ("knight", "ink", True)


def test_without_a_list_of_files_names_are_as_they_were(page, monkeypatch):
    text, _ = written(PLAIN)
    monkeypatch.delitem(sys.modules, "networks")
    page.paste(text)
    assert (page["subject"], page["style"]) == ("knight", "ink")


def test_a_picture_of_another_machine_with_only_one_of_the_files(page):
    page.set(style="wood")
    page.paste(infotext_of("a", {"EST-LoRA subject": "knight"}))
    assert (page["subject"], page["style"], page["enabled"]) == ("knight", "None", True)


@pytest.mark.parametrize("value", ["much", "7", "nan", ""])
def test_what_cannot_be_used_is_the_default(page, value):
    page.set(lean=0.5)
    page.paste(infotext_of("a", {"EST-LoRA subject": "knight", "EST-LoRA style": "ink", "EST-LoRA lean": value}))
    assert page["lean"] == 0.0


def test_both_tabs_have_the_same_names_for_the_knobs(page, web):
    fields = web.script.infotext_fields
    Page(web, "img2img")
    others = web.script.infotext_fields
    assert [key for _, key in fields] == [key for _, key in others] == web.script.paste_field_names
    assert not {component for component, _ in fields} & {component for component, _ in others}
    assert len({key.key for _, key in fields}) == len(set(web.script.paste_field_names)) == len(panel.KNOBS)


class TestTags:
    """In the prompts that are pasted."""

    @pytest.fixture
    def renamed(self, page, disk):
        """What becomes of a prompt when the files have other names than in the picture."""
        text, _ = written(PLAIN)
        values = fakes.read_infotext(text)

        def renamed(prompt, **names):
            disk.rename(**names)
            values["Prompt"] = prompt
            values["Hires prompt"] = f"{prompt} again"
            page._web.callbacks.call("on_infotext_pasted", "", values)
            assert values["Hires prompt"] == f"{values['Prompt']} again"
            return values["Prompt"]

        return renamed

    def test_name_the_files_as_they_are_called_now(self, renamed):
        prompt = renamed("a <est:knight:style=ink:lean=0.5> <lora:knight:1> knight", knight="paladin")
        assert prompt == "a <est:paladin:style=ink:lean=0.5> <lora:knight:1> knight"

    def test_give_the_hash_where_the_name_cannot_be_in_a_tag(self, renamed):
        prompt = renamed("<est:knight:ink>", knight="a=b")
        short = LoraList().find("a=b").shorthash
        assert prompt == f"<est:{short}:ink>"

    def test_of_files_that_are_not_here_stay(self, renamed):
        assert renamed("<est:nobody:ink>", ink="tusche") == "<est:nobody:tusche>"

    def test_that_cannot_be_understood_stay(self, renamed):
        assert renamed("<est:knight:ink:1:1:1>", knight="paladin") == "<est:knight:ink:1:1:1>"

    def test_and_prompts_that_are_missing_are_no_error(self, web, disk):
        web.callbacks.call("on_infotext_pasted", "", {"Steps": "5"})
