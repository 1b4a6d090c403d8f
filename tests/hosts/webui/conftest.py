"""A stub of each host, with the extension loaded."""

from __future__ import annotations

import sys

import pytest

from est_lora import plot
from est_lora.hosts.webui.measuring import Measuring
from est_lora.hosts.webui.probes import Stopped
from est_lora.lora import LoraFile
from tests.hosts.webui import loras
from tests.hosts.webui.host import WebUI


@pytest.fixture(scope="session")
def made_loras(tmp_path_factory):
    made = {}

    def of(family):
        if family not in made:
            made[family] = loras.make(tmp_path_factory.mktemp(family), family)
        return made[family]

    return of


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    """Nobody waits for a style discrepancy, but where it is what is tested."""

    def of(self, *args):
        raise Stopped

    monkeypatch.setattr(Measuring, "of", of)


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
def note_maps(monkeypatch):
    """Notes of what a module draws maps, as it is drawn: (plan, marks)."""

    def note(module):
        drawn = []

        def gate_map(plan, marks):
            drawn.append((plan, marks))
            return plot.gate_map(plan, marks)

        monkeypatch.setattr(module, "gate_map", gate_map)
        return drawn

    return note


@pytest.fixture
def note_loads(monkeypatch):
    """Notes the files that are read, each as `spelt` has it."""

    def note(spelt):
        loaded, load = [], LoraFile.load
        monkeypatch.setattr(LoraFile, "load", lambda path, layout: loaded.append(spelt(path)) or load(path, layout))
        return loaded

    return note


@pytest.fixture
def files(made_loras):
    """The LoRAs for SD1.5."""
    return made_loras("sd15")
