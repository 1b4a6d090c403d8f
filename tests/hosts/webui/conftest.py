"""A stub of each host, with the extension loaded."""

from __future__ import annotations

import sys

import pytest

from tests.hosts.webui import loras
from tests.hosts.webui.host import WebUI

# What the extension doesn't do yet, by the tests that say so; a test that passes has to leave this table.
KNOWN = {
    "TestRefiner::test_in_a_plain_picture[forge-True]": "the refiner is remarked on though there was no fusion",
    "test_what_it_does_where_tags_are_disregarded[a1111-style]": "the host tells nobody of a second pass then",
    "test_what_it_does_where_tags_are_disregarded[a1111-off]": "the host tells nobody of a second pass then",
    "test_what_it_does_where_tags_are_disregarded[forge-style]": "the host tells nobody of a second pass then",
    "test_what_it_does_where_tags_are_disregarded[forge-off]": "the host tells nobody of a second pass then",
    "test_a_second_pass_after_one_that_disregarded_tags[a1111]": "what was encoded without us is marked as ours",
}


def pytest_collection_modifyitems(items):
    for item in items:
        for name, reason in KNOWN.items():
            if item.nodeid.endswith(name):
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
