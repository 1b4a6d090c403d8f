"""The study of the style discrepancy, in miniature, with a transformer of random weights."""

from __future__ import annotations

import shutil
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from est_lora.config import FusionConfig
from est_lora.demo.model import LORAS, make_tokenizer
from est_lora.demo.study import extractor
from est_lora.demo.study.__main__ import main
from est_lora.demo.study.extractor import Size, Transformer
from est_lora.demo.study.figures import Spread, changed
from est_lora.demo.study.measure import BUDGET, PROMPTS, Plan, has_both, loras_in
from est_lora.demo.styles import NEW_STYLES, SIZE, Style
from est_lora.demo.things import SUBJECTS, THINGS
from est_lora.demo.world import random_scene
from est_lora.discrepancy import open_extractor
from est_lora.errors import EstLoraError
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
    assert "4 pairs (2 subjects x 2 styles)" in page
    assert "--loras" not in page
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
    assert set(extractor.told(tmp_path / "one")) == {"thing", "colour", "fill", "line", "tone", "background"}


def test_the_page_says_what_a_stand_in_tells(tmp_path):
    extractor.train(tmp_path / "tiny", steps=1, batch=4, size=TINY._replace(img_size=SIZE))
    assert main(["--quick", "--extractor", str(tmp_path / "tiny"), "--cache", str(tmp_path), "-o", str(tmp_path)]) == 0
    page = (tmp_path / "discrepancy.md").read_text(encoding="utf-8")
    for label, share in extractor.told(tmp_path / "tiny").items():
        assert f"{share:.0%}" in page, label
    assert f"({SIZE} x {SIZE} pixels)" in page


@pytest.mark.parametrize("thing", THINGS)
def test_every_scene_of_the_base_has_a_label_of_each_kind(thing):
    rng = np.random.default_rng(0)
    for scene in (random_scene(rng, thing) for _ in range(20)):
        labels = extractor.labels_of(scene)
        assert labels.keys() == extractor.LABELS.keys()
        assert all(labels[name] in names for name, names in extractor.LABELS.items())
        assert labels["thing"] == thing
        assert Style(labels["fill"], labels["line"], labels["tone"]) == scene.style
        assert labels["colour"] in scene.colours.values()


def test_what_the_loras_teach_is_not_in_the_stand_ins_world():
    with pytest.raises(TypeError, match="vitra style"):
        extractor.labels_of(random_scene(np.random.default_rng(0), style="vitra style"))
    assert not set(extractor.LABELS["thing"]) & set(SUBJECTS)


@pytest.fixture
def more(tmp_path):
    """A folder with LoRAs of three subjects and two styles, and what doesn't belong to them."""
    folder = tmp_path / "loras"
    folder.mkdir()
    subjects, styles = (sorted(LORAS[words] for words in LORAS if words in known) for known in (SUBJECTS, NEW_STYLES))
    for number, (name, source) in enumerate(zip(("zubo", "teki", "pim"), [*subjects, *subjects])):
        scaled = {key: value * (1 + 0.1 * number) for key, value in load_file(source).items()}
        save_file(scaled, folder / f"{name}.safetensors")
    for name, source in zip(("quen", "lorf"), styles):
        shutil.copy(source, folder / f"{name}.safetensors")
    (folder / "someone.safetensors").write_bytes(b"")
    return folder


def test_a_folder_gives_more_pairs(tiny, tmp_path, more):
    arguments = ["--quick", "--extractor", str(tiny[1]), "--cache", str(tmp_path / "cache"), "--loras", str(more)]
    assert main([*arguments, "-o", str(tmp_path)]) == 0
    page = (tmp_path / "discrepancy.md").read_text(encoding="utf-8")
    assert "6 pairs (3 subjects x 2 styles)" in page
    rows = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in page.splitlines()]
    subjects, styles = ("zubo creature", "teki house", "pim robot"), ("quen style", "lorf style")
    assert [row for row in rows if row[:1] and row[0] in SUBJECTS] == list(product(subjects, styles))
    assert "--loras FOLDER" in page


def test_the_words_of_a_file_are_known_by_its_name(more):
    found = loras_in(more)
    assert {words: path.name for words, path in found.items()} == {
        "zubo creature": "zubo.safetensors",
        "teki house": "teki.safetensors",
        "pim robot": "pim.safetensors",
        "quen style": "quen.safetensors",
        "lorf style": "lorf.safetensors",
    }
    (more / "quen.safetensors").unlink()
    assert len(Plan(loras_in(more)).pairs) == 3
    (more / "lorf.safetensors").unlink()
    with pytest.raises(EstLoraError, match="3 subjects and 0 styles"):
        loras_in(more)


@pytest.mark.parametrize("folder", ["", "no-such"])
def test_a_folder_without_pairs_costs_one_sentence(tmp_path, capsys, folder):
    arguments = ["--quick", "--loras", str(tmp_path / folder), "--cache", str(tmp_path / "cache"), "-o", str(tmp_path)]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "mipo.safetensors" in err
    assert list(tmp_path.iterdir()) == []


def test_every_lora_of_the_plan_is_there_and_the_budget_leaves_a_choice():
    plan = Plan()
    assert len(plan.pairs) >= 4
    assert all(LORAS[words].is_file() for pair in plan.pairs for words in pair)
    affordable = {probe.side for probe in plan.settings if probe.cost <= BUDGET}
    assert affordable == {side for side, _ in plan.grid}
    assert plan.reference in plan.settings
    assert [has_both(name) for name in PROMPTS].count(True) == 5


def test_all_prompts_are_words_that_the_model_knows():
    tokenizer = make_tokenizer()
    for pair in Plan().pairs:
        for name in PROMPTS:
            assert tokenizer.unk_token_id not in tokenizer(pair.prompt(name)).input_ids


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
