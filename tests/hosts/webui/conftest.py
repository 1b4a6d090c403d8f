"""A stub of each host, with the extension loaded."""

from __future__ import annotations

import sys

import pytest

from tests.hosts.webui import loras
from tests.hosts.webui.host import WebUI

# What the extension doesn't do yet, by the tests that say so; a test that passes has to leave this table.
KNOWN = {
    "TestEncodingFails::test_the_next_picture_is_plain[forge]": "hooks stay on text encoders until the next sampling",
    "TestEncodingFails::test_the_next_fusion_is_its_own[forge]": "hooks stay on text encoders until the next sampling",
    "TestEncodingFails::test_the_next_picture_disregards_tags": "what is on text encoders stays until the next sampling",
    "TestRefiner::test_draws_its_part_alone[forge-object]": "Forge reads the prompts again when it switches",
    "TestRefiner::test_draws_its_part_alone[forge-modules]": "Forge reads the prompts again when it switches",
    "TestRefiner::test_in_one_of_two_passes[forge-object-False-same]": "Forge reads the prompts again when it switches",
    "TestRefiner::test_in_one_of_two_passes[forge-object-False-off]": "Forge reads the prompts again when it switches",
    "TestRefiner::test_in_one_of_two_passes[forge-object-True-same]": "Forge reads the prompts again when it switches",
    "TestRefiner::test_in_one_of_two_passes[forge-object-True-off]": "Forge reads the prompts again when it switches",
    "TestRefiner::test_in_one_of_two_passes[forge-modules-False-same]": "Forge reads the prompts again when it switches",
    "TestRefiner::test_in_one_of_two_passes[forge-modules-False-off]": "Forge reads the prompts again when it switches",
    "TestRefiner::test_in_one_of_two_passes[forge-modules-True-same]": "Forge reads the prompts again when it switches",
    "TestRefiner::test_in_one_of_two_passes[forge-modules-True-off]": "Forge reads the prompts again when it switches",
    "TestRefiner::test_in_one_of_two_passes[a1111-modules-False-same]": "taken for a compiled model",
    "TestRefiner::test_in_one_of_two_passes[a1111-modules-False-off]": "taken for a compiled model",
    "TestRefiner::test_of_another_family_changes_nothing_of_what_was_made[forge]": "Forge reads the prompts again when it switches",
    "TestRefiner::test_what_it_encoded_is_not_taken_for_a_fusion[a1111]": "the mark doesn't tell the checkpoint",
    "test_a_lora_in_the_prompt_keeps_its_hash_when_the_next": "a hash is taken out by its name",
    "test_a_second_pass_that_fails_alone": "a second pass that is refused takes the first one's text with it",
    "test_plain_after_fusion_where_the_second_pass_takes_the_firsts_conds[a1111-off]": "no mark on the second pass's tags",
    "test_plain_after_fusion_where_the_second_pass_takes_the_firsts_conds[forge-off]": "no mark on the second pass's tags",
    "test_plain_after_a_fusion_that_failed_where": "no mark on the second pass's tags",
    "test_a_very_deep_value": "quoting is recursive",
    "test_a_very_long_number_is_refused_like_any_other[enabled]": "a switch is read through its digits",
}


def pytest_collection_modifyitems(items):
    for item in items:
        for name, reason in KNOWN.items():
            if name in item.nodeid:
                item.add_marker(pytest.mark.xfail(strict=True, reason=reason))


@pytest.fixture(scope="session")
def made_loras(tmp_path_factory):
    made = {}

    def of(family):
        if family not in made:
            made[family] = loras.make(tmp_path_factory.mktemp(family), family)
        return made[family]

    return of


@pytest.fixture
def start(made_loras, monkeypatch):
    """Starts a host; whatever it has put among Python's modules is gone afterwards."""
    before = dict(sys.modules)
    started = []

    def start(flavour, family="sd15"):
        web = WebUI(flavour, family, made_loras(family).folder)
        web.install()
        started.append(web)
        return web

    yield start
    for name in [name for name in sys.modules if name not in before or sys.modules[name] is not before[name]]:
        if any(name in web.modules for web in started):
            del sys.modules[name]
            if name in before:
                sys.modules[name] = before[name]
    assert [error for web in started for error in web.errors] == []


@pytest.fixture(params=["a1111", "forge"])
def web(request, start):
    """Each host in turn, with a checkpoint of SD1.5."""
    return start(request.param)


@pytest.fixture(params=["a1111", "forge"])
def web_xl(request, start):
    """Each host in turn, with a checkpoint of SDXL."""
    return start(request.param, "sdxl")


@pytest.fixture
def files(made_loras):
    """The LoRAs for SD1.5."""
    return made_loras("sd15")
