"""The plan against an independent computation from the formulas."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from est_lora import report
from est_lora.config import FusionConfig
from est_lora.errors import EstLoraError
from est_lora.gate import FusionPlan
from est_lora.lora import Factors, LoraFile, LowRankUpdate
from tests import reference
from tests.files import ATTENTION_LAYERS, CONV, CONVENTIONS, FEED_FORWARD, random_lora, write

TAUS = [step / 97 for step in range(98)]
METHODS = ("est", "k-lora", "sum", "subject", "style")


def messy_pair(seed):
    """Two LoRAs of unequal rank, alpha and reach, with layers that one alone has and with zero layers."""
    subject = random_lora(seed, (*ATTENTION_LAYERS[:-1], FEED_FORWARD, CONV), rank=4, alpha=2.0)
    style = random_lora(seed + 1, (*ATTENTION_LAYERS[2:], CONV), rank=6, alpha=None, size=0.3)
    subject[ATTENTION_LAYERS[5]].up.zero_()
    style[ATTENTION_LAYERS[6]].down.zero_()
    subject[ATTENTION_LAYERS[7]].up.zero_()
    style[ATTENTION_LAYERS[7]].up.zero_()
    subject[ATTENTION_LAYERS[9]].alpha = 0.5
    return subject, style


def plan_of(tmp_path, subject, style, convention="kohya", **knobs):
    files = (write(tmp_path / f"{role}.safetensors", lora, convention) for role, lora in zip("ab", (subject, style)))
    return FusionPlan.of(*(LoraFile.load(file) for file in files), FusionConfig(**knobs))


def assert_same_decisions(plan, expected):
    assert {layer.layer.name for layer in plan.layers} == set(expected)
    for layer in plan.layers:
        rho, acts = expected[layer.layer.name]
        assert layer.rho == (None if rho is None else pytest.approx(rho, rel=1e-6))
        decided = [layer.acts(tau) for tau in TAUS]
        assert [a for a, e in zip(decided, acts) if e != "?"] == [e for e in acts if e != "?"], layer.layer.name


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_every_convention_decides_as_the_formulas_say(tmp_path, convention, method):
    subject, style = messy_pair(CONVENTIONS.index(convention) * 10)
    if convention == "diffusers-processor":  # that convention never had anything but attention
        subject, style = ({n: f for n, f in lora.items() if ".attn" in n} for lora in (subject, style))
    for balance, pattern in itertools.product(("energy", "l1"), ("s", "s*")):
        knobs = {"method": method, "balance": balance, "pattern": pattern}
        assert_same_decisions(
            plan_of(tmp_path, subject, style, convention, **knobs), reference.decisions(subject, style, knobs, TAUS)
        )


knob_sets = st.fixed_dictionaries(
    {
        "alpha": st.sampled_from([0.3, 1.0, 1.5, 4.0]),
        "beta": st.sampled_from(["auto", 0.0, 0.13, 0.8, 2.0]),
        "lean": st.sampled_from([-1.0, -0.3, 0.0, 0.7]),
        "balance": st.sampled_from(["energy", "l1"]),
        "pattern": st.sampled_from(["s", "s*"]),
        "method": st.sampled_from(METHODS),
        "layers": st.sampled_from(["attention", "all"]),
        "other": st.sampled_from(["sum", "off"]),
    }
)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), knobs=knob_sets)
def test_random_pairs_and_knobs_decide_as_the_formulas_say(tmp_path_factory, seed, knobs):
    subject, style = messy_pair(seed)
    plan = plan_of(tmp_path_factory.mktemp("pair"), subject, style, **knobs)
    assert_same_decisions(plan, reference.decisions(subject, style, knobs, TAUS))


def test_one_lora_in_each_convention_gives_one_plan(tmp_path):
    subject, style = random_lora(1), random_lora(2, rank=6, alpha=None)
    for lora in (subject, style):
        for factors in lora.values():
            factors.alpha = None  # the processor convention has no place for alpha
    tables = set()
    for convention in CONVENTIONS:
        told = report.to_json(plan_of(tmp_path, subject, style, convention))
        tables.add(json.dumps([told["layers"], told["balance"]]))
    assert len(tables) == 1


def test_one_lora_with_alpha_gives_one_plan_in_every_convention_that_carries_it(tmp_path):
    subject, style = random_lora(1, alpha=3.0), random_lora(2, alpha=1.0)
    plans = [plan_of(tmp_path, subject, style, c) for c in CONVENTIONS if c != "diffusers-processor"]
    for plan in plans[1:]:
        assert [layer.segments for layer in plan.layers] == [layer.segments for layer in plans[0].layers]


def energies(plan):
    return [layer.rho for layer in plan.layers]


@settings(max_examples=30, deadline=None)
@given(exponent=st.floats(-3, 3), which=st.sampled_from([0, 1]), seed=st.integers(0, 1000))
def test_scaling_a_file_leaves_the_energy_plan_and_moves_the_l1_plan(tmp_path_factory, exponent, which, seed):
    folder = tmp_path_factory.mktemp("scale")
    pair = [random_lora(seed), random_lora(seed + 1, rank=3)]
    before = {balance: plan_of(folder, *pair, balance=balance) for balance in ("energy", "l1")}
    factor = 10.0**exponent
    pair[which] = reference.scaled(pair[which], factor)
    after = {balance: plan_of(folder, *pair, balance=balance) for balance in ("energy", "l1")}
    assert energies(after["energy"]) == pytest.approx(energies(before["energy"]), rel=1e-5)
    for old, new in zip(before["energy"].layers, after["energy"].layers):
        assert [s.acts for s in new.segments] == [s.acts for s in old.segments]
        assert [s.start for s in new.segments] == pytest.approx([s.start for s in old.segments], abs=1e-5)
    moved = factor if which == 0 else 1 / factor
    assert energies(after["l1"]) == pytest.approx([rho * moved for rho in energies(before["l1"])], rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), rank=st.integers(1, 8))
def test_exchanging_the_files_inverts_every_rho(tmp_path_factory, seed, rank):
    folder = tmp_path_factory.mktemp("swap")
    one, other = random_lora(seed), random_lora(seed + 1, rank=rank, size=5.0)
    there, back = plan_of(folder, one, other), plan_of(folder, other, one)
    assert energies(back) == pytest.approx([1 / rho for rho in energies(there)], rel=1e-9)
    assert there.balance == pytest.approx(1 / back.balance)


def test_the_typical_layer_switches_when_pressure_reaches_one(tmp_path):
    lora = random_lora(3)
    plan = plan_of(tmp_path, lora, reference.scaled(lora, 0.01))
    assert energies(plan) == pytest.approx([1.0] * len(plan.layers))
    assert {round(layer.segments[1].start, 6) for layer in plan.layers} == {round((1 - 0.5) / 1.5, 6)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_neither_overflow_nor_vanish(tmp_path, dtype):
    for size in (1e-5, 200.0):
        subject, style = random_lora(1, size=size, dtype=dtype), random_lora(2, dtype=dtype)
        plan = plan_of(tmp_path, subject, style)
        expected = reference.decisions(subject, style, {}, TAUS)
        assert_same_decisions(plan, expected)


def test_an_update_too_large_for_any_training_is_refused(tmp_path):
    lora = random_lora(1)
    lora[ATTENTION_LAYERS[1]].up *= 1e35
    with pytest.raises(EstLoraError, match=f"update of {ATTENTION_LAYERS[1]} is too large"):
        plan_of(tmp_path, lora, random_lora(2))


def test_a_text_encoder_update_too_large_is_refused_too(tmp_path):
    path = write(tmp_path / "a.safetensors", random_lora(1))
    stem = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    huge = {f"{stem}.lora_{side}.weight": torch.full((2, 2), 1e38) for side in ("down", "up")}
    save_file({key: tensor.clone() for key, tensor in load_file(path).items()} | huge, path)
    with pytest.raises(EstLoraError, match=r"update of text_model.encoder.layers.0.mlp.fc1 is too large"):
        FusionPlan.of(LoraFile.load(path), LoraFile.load(path), FusionConfig())


def test_measured_discrepancy_is_what_auto_uses(tmp_path):
    files = [LoraFile.load(write(tmp_path / f"{n}.safetensors", random_lora(n))) for n in (1, 2)]
    assert FusionPlan.of(*files, FusionConfig(), discrepancy=0.31).beta == 0.31
    assert FusionPlan.of(*files, FusionConfig(beta=0.2), discrepancy=0.31).beta == 0.2
    assert FusionPlan.of(*files, FusionConfig()).beta == 0.5
    assert FusionPlan.of(*files, FusionConfig(method="k-lora", pattern="s*", alpha=2.0), 0.31).beta == 1.7


@pytest.mark.parametrize("knobs", [{}, {"balance": "l1"}, {"method": "k-lora"}, {"layers": "all"}], ids=str)
def test_planned_again_nothing_is_computed_again(tmp_path, monkeypatch, knobs):
    pair = messy_pair(5)
    first = plan_of(tmp_path, *pair, **knobs)
    asked = FusionConfig(beta=0.2, alpha=2.0, lean=0.5, subject_weight=0.3, **knobs)
    expected = FusionPlan.of(*(LoraFile.load(file.path) for file in (first.subject, first.style)), asked)
    for kind in (LowRankUpdate, Factors):
        monkeypatch.setattr(kind, "dense" if kind is LowRankUpdate else "energy", property(pytest.fail))
    assert report.to_json(FusionPlan.of(first.subject, first.style, asked)) == report.to_json(expected)


def test_what_is_remembered_of_an_update_does_not_depend_on_the_order(tmp_path):
    pair = messy_pair(6)
    settings = [{"method": "k-lora"}, {"balance": "l1"}, {}, {"method": "k-lora", "layers": "all"}]
    for order in itertools.permutations(settings):
        plan = plan_of(tmp_path, *pair, **order[0])
        for knobs in order[1:]:
            asked = FusionConfig(**knobs)
            again = FusionPlan.of(plan.subject, plan.style, asked)
            assert report.to_json(again) == report.to_json(plan_of(tmp_path, *pair, **knobs))
    known = [update.numbers for file in (plan.subject, plan.style) for update in file.updates.values()]
    assert {type(number) for numbers in known for number in numbers.values()} == {float}
