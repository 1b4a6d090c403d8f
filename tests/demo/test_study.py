"""The study of the style discrepancy, in miniature, with a transformer of random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from est_lora.config import FusionConfig
from est_lora.demo.model import LORAS
from est_lora.demo.study import extractor
from est_lora.demo.study.__main__ import main
from est_lora.demo.study.extractor import Size, Transformer
from est_lora.demo.study.figures import Spread, changed
from est_lora.demo.study.measure import BUDGET, PROMPTS, Plan, has_both
from est_lora.demo.world import SIZE
from est_lora.discrepancy import open_extractor
from est_lora.hosts.diffusers import load_plan

TINY = Size(img_size=16, embed_dim=24, depth=2, num_heads=3)


@pytest.fixture
def tiny(tmp_path):
    torch.manual_seed(1)
    network = Transformer(TINY).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    extractor.save(network, TINY, tmp_path / "tiny")
    return network, tmp_path / "tiny"


def test_what_reads_real_extractors_reads_the_stand_in(tiny):
    network, folder = tiny
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    with open_extractor("dino", folder=folder, cache=None) as opened:
        read = opened.features([Image.fromarray(pixels)])
    with torch.no_grad():
        own = network(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1)
    assert torch.allclose(read, own, atol=1e-5)


def test_the_study_writes_its_page_and_plots_and_draws_nothing_twice(tiny, tmp_path, capsys, monkeypatch):
    arguments = ["--quick", "--extractor", str(tiny[1]), "--cache", str(tmp_path / "cache")]
    assert main([*arguments, "-o", str(tmp_path / "first")]) == 0
    assert "Defaults: " in capsys.readouterr().out
    page = (tmp_path / "first" / "discrepancy.md").read_text(encoding="utf-8")
    assert "stand-in" in page
    assert "nan" not in page
    for plot in ("discrepancy-spread.png", "discrepancy-probe.png"):
        assert plot in page
        with Image.open(tmp_path / "first" / plot) as picture:
            assert min(picture.size) > 250

    monkeypatch.setattr("est_lora.demo.study.measure.Bench._draw", None)
    assert main([*arguments, "-o", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "discrepancy.md").read_text(encoding="utf-8") == page


def test_a_folder_that_holds_no_extractor_costs_one_sentence(tmp_path, capsys):
    assert main(["--quick", "--extractor", str(tmp_path), "--cache", str(tmp_path / "c"), "-o", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
    assert not (tmp_path / "discrepancy.md").exists()


def test_the_stand_in_is_trained_from_its_seed(tmp_path):
    for name in ("one", "other"):
        extractor.train(tmp_path / name, steps=2, batch=4, size=TINY._replace(img_size=SIZE))
        assert extractor.is_there(tmp_path / name)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other
    assert set(extractor.told(tmp_path / "one")) == {"thing", "colour", "style", "background"}


def test_every_lora_of_the_plan_is_there_and_the_budget_leaves_a_choice():
    plan = Plan()
    assert len(plan.pairs) >= 4
    assert all(LORAS[words].is_file() for pair in plan.pairs for words in pair)
    affordable = {probe.side for probe in plan.settings if probe.cost <= BUDGET}
    assert affordable == {side for side, _ in plan.grid}
    assert plan.reference in plan.settings
    assert [has_both(name) for name in PROMPTS].count(True) == 5


def test_spread_tells_what_all_pairs_do_from_what_each_does():
    together = np.array([[0.1, 0.3], [0.5, 0.7]])
    against = np.array([[0.1, 0.3], [0.7, 0.5]])
    deviation = 0.2 / np.sqrt(2)
    assert Spread.of(together) == pytest.approx((2, deviation, deviation, 0.0), abs=1e-9)
    assert Spread.of(against) == pytest.approx((2, deviation, 0.0, deviation), abs=1e-9)


def test_what_changes_hands_is_beta_over_alpha_where_every_layer_switches():
    pair = Plan().pairs[0]

    def plan(beta):
        return load_plan(FusionConfig(subject=str(LORAS[pair.subject]), style=str(LORAS[pair.style]), beta=beta))

    one, other = plan(0.5), plan(0.6)
    within = [layer for layer in one.layers if 0.6 < layer.rho < 2.0]  # which switch inside the picture with both
    assert within
    assert changed(one, one) == 0
    assert changed(one, other) == changed(other, one)
    assert len(within) / len(one.layers) * 0.1 / 1.5 <= changed(one, other) + 1e-9
    assert changed(one, other) <= 0.1 / 1.5 + 1e-9
