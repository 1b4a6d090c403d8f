"""Plans of methods that the gate has no part in, and what is handed to the one it has."""

from __future__ import annotations

import pytest

from est_lora.demo.model import STYLE_LORA, SUBJECT_LORA
from est_lora.gate import NONE, STYLE, SUBJECT
from est_lora.lab.methods import halved, plan_of


def plan(method, seed=0, discrepancy=0.9):
    return plan_of(method, SUBJECT_LORA, STYLE_LORA, None, discrepancy, seed)


def test_half_time_is_half_time_in_every_layer():
    layers = [layer for layer in plan({"layers_by": "half time"}).layers if layer.gated]
    assert layers
    assert all((layer.acts(0.49), layer.acts(0.5)) == (SUBJECT, STYLE) for layer in layers)


def test_by_chance_a_layer_is_one_files_for_the_whole_picture():
    layers = plan({"layers_by": "chance"}, seed=3).layers
    assert {layer.acts(0.0) for layer in layers} == {SUBJECT, STYLE}
    assert all(layer.acts(0.0) == layer.acts(1.0) for layer in layers)
    again, other = (plan({"layers_by": "chance"}, seed=seed).layers for seed in (3, 4))
    acting = [[layer.acts(0.0) for layer in each] for each in (layers, again, other)]
    assert acting[0] == acting[1] != acting[2]


@pytest.mark.parametrize("method", [SUBJECT, STYLE])
def test_half_the_layers_act_all_the_time_and_the_others_never(method):
    whole = plan({"method": method})
    acting = [(layer.acts(0.0), layer.acts(1.0)) for layer in halved(whole, "half of the layers", 0).layers]
    assert set(acting) == {(method, method), (NONE, NONE)}
    assert 0.3 < acting.count((NONE, NONE)) / len(acting) < 0.7


@pytest.mark.parametrize(("method", "acts"), [(SUBJECT, (SUBJECT, NONE)), (STYLE, (NONE, STYLE))])
def test_half_the_time_is_the_half_that_routing_gives_it(method, acts):
    layers = halved(plan({"method": method}), "half of the time", 0).layers
    assert layers
    assert all((layer.acts(0.49), layer.acts(0.5)) == acts for layer in layers)


def test_the_discrepancy_counts_only_where_it_is_beta():
    assert plan({"beta": "measured"}, discrepancy=0.3).beta == pytest.approx(0.3)
    assert plan({"beta": 0.25}).beta == pytest.approx(0.25)


def test_knobs_are_those_of_a_request():
    assert plan({"method": "sum", "subject_weight": 0.7}).config.subject_weight == pytest.approx(0.7)
