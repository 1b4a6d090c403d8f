"""Jobs that other extensions start with scripts of their choice."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from est_lora.hosts.webui import tags
from est_lora.text import tag


class Named:
    args_from, args_to = 1, 3

    def __init__(self, title):
        self.title = lambda: title


class Runner:
    def __init__(self, scripts):
        self.scripts = self.alwayson_scripts = scripts
        self.callback_map = {"process": (len(scripts), scripts)}


@pytest.fixture
def registered(monkeypatch):
    """The tag as the host has it, and the jobs that were begun."""
    networks = ModuleType("modules.extra_networks")
    networks.ExtraNetwork = type("ExtraNetwork", (), {"__init__": lambda self, name: setattr(self, "name", name)})
    found = []
    networks.register_extra_network = found.append
    modules = ModuleType("modules")
    modules.extra_networks = networks
    monkeypatch.setitem(sys.modules, "modules", modules)
    monkeypatch.setitem(sys.modules, "modules.extra_networks", networks)
    begun = []
    tags.register(lambda p, *told: begun.append((p, *told)))
    (network,) = found
    assert network.name == tag.NAME
    return network, begun


def job(left_out):
    ours, other = Named("EST-LoRA"), Named("Other")
    runner = Runner([other, ours])
    if left_out:
        runner.alwayson_scripts = [other]
    return SimpleNamespace(scripts=runner, script_args=("x", True, "a", "y")), ours, runner


def test_our_script_joins_a_job_that_left_it_out(registered):
    network, begun = registered
    p, ours, runner = job(left_out=True)
    network.activate(p, [])
    assert ours in p.scripts.alwayson_scripts
    assert p.scripts.callback_map == {}
    assert begun == [(p, (True, "a"), ours)]
    assert ours not in runner.alwayson_scripts
    assert runner.callback_map
    network.activate(p, [])
    assert len(begun) == 1


def test_a_job_that_has_it_is_left_alone(registered):
    network, begun = registered
    p, _, runner = job(left_out=False)
    network.activate(p, [])
    network.deactivate(p)
    assert p.scripts is runner
    assert not begun


@pytest.mark.parametrize("scripts", [None, Runner([Named("Other")])])
def test_a_job_without_any_script_of_ours(registered, scripts):
    network, begun = registered
    p = SimpleNamespace(scripts=scripts, script_args=())
    network.activate(p, [])
    assert p.scripts is scripts
    assert not begun
