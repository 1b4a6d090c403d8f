"""The benchmark measures the right things. What it measures is no test's business: a timing says nothing of a change."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import measure
from benchmarks.__main__ import main
from benchmarks.published import PublishedSession, energy, largest_entries
from benchmarks.unets import SIZES, attention_projections, build, inputs, write_pair
from est_lora.config import FusionConfig
from est_lora.fusion import FusionSession
from est_lora.gate import FusionPlan
from est_lora.lora import LoraFile

TAUS = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


@pytest.fixture(scope="module")
def model():
    return build(SIZES["tiny"], "cpu")


def hooks(module):
    return [hook for each in module.modules() for hook in each._forward_hooks.values()]


@pytest.mark.parametrize(("size", "layers"), [("sd15", 128), ("sdxl", 560)])
def test_the_real_sizes_have_the_real_layers(size, layers):
    assert len(attention_projections(build(SIZES[size], "meta"))) == layers


def test_one_command_measures_everything(tmp_path, capsys):
    arguments = f"--unets tiny --ranks 4 2 --rounds 1 --repeats 1 --latents 8 --batch 1 -o {tmp_path}"
    assert main(arguments.split()) == 0
    result = json.loads((tmp_path / "RESULT.json").read_text())
    assert [(row["rank"], row["what"]) for row in result["calls"]] == [
        (rank, what) for rank in (4, 2) for what in (measure.BARE, *measure.WAYS)
    ]
    assert [(row["rank"], row["what"]) for row in result["planning"]] == [
        (rank, what) for rank in (2, 4, 32) for what in (measure.READING, measure.LOADING, *measure.PLANS)
    ]
    for row in result["calls"] + result["planning"]:
        assert row["layers"] == 32
        assert 0 < row["seconds"]["first_quartile"] <= row["seconds"]["median"] <= row["seconds"]["third_quartile"]
        assert row["ratio"]["median"] > 0
    assert result["machine"]["torch"] == torch.__version__
    table = (tmp_path / "RESULT.md").read_text()
    assert table in capsys.readouterr().out
    assert sum(line.startswith("| tiny") for line in table.splitlines()) == len(result["calls"] + result["planning"])


@pytest.mark.parametrize(
    ("config", "score"),
    [
        (FusionConfig(balance="l1"), energy),
        (FusionConfig(balance="l1", beta=0.1, alpha=2.0), energy),
        (FusionConfig(method="k-lora"), largest_entries),
    ],
)
def test_the_published_ways_decide_as_the_plan_does_and_give_the_same_output(model, tmp_path, config, score):
    plan = FusionPlan.of(*map(LoraFile.load, write_pair(tmp_path, model, 4)), config)
    ours, theirs = measure.with_same_weights(model), measure.with_same_weights(model)
    published, given = PublishedSession(theirs, plan, score), inputs(model, 8, 1)
    published.attach()
    chosen = set()
    with torch.no_grad(), FusionSession(ours, plan) as session:
        bare = measure.Variant(model, given)(0.0)
        for tau in TAUS:
            expected, output = (
                measure.Variant(ours, given, session)(tau),
                measure.Variant(theirs, given, published)(tau),
            )
            acting = {layer.layer.name: layer.acts(tau) for layer in plan.layers}
            assert {name: layer.acts for name, layer in published.layers.items()} == acting
            assert torch.allclose(output, expected, atol=1e-5)
            chosen |= {tuple(acting.values())}
        assert not torch.allclose(expected, bare, atol=1e-3)
    assert len(chosen) > 2, "the layers switch at different times"
    published.detach()
    assert not hooks(theirs)
    assert torch.equal(measure.Variant(theirs, given)(0.0), bare)


def test_no_hook_stays_and_none_is_on_the_bare_model(model, tmp_path, monkeypatch):
    seen, trees = [], []

    def watched(original):
        trees.append(copied := same_weights(original))
        return copied

    same_weights = measure.with_same_weights
    monkeypatch.setattr(measure, "with_same_weights", watched)
    rows = measure.measure_calls(model, write_pair(tmp_path, model, 2), 8, 1, 2, lambda: seen.append(len(hooks(model))))
    assert [row["what"] for row in rows] == [measure.BARE, *measure.WAYS]
    assert seen == [0] * (measure.UNTIMED_CALLS + 2 * measure.TIMED_CALLS)
    assert len(trees) == len(measure.WAYS)
    assert all(not hooks(tree) and tree.conv_in.weight is model.conv_in.weight for tree in trees)


def test_every_variant_is_called_once_a_round_and_the_first_one_changes():
    called = []
    variants = {name: lambda tau, name=name: called.append((name, tau)) for name in "abc"}
    seconds = measure.in_pairs(variants, 4, torch.device("cpu"), lambda: None)
    assert ["".join(name for name, _ in called[start : start + 3]) for start in (0, 3, 6, 9)] == [
        "abc",
        "bca",
        "cab",
        "abc",
    ]
    assert [tau for _, tau in called[::3]] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert all(len(times) == 4 for times in seconds.values())


def test_the_peak_is_told_even_if_it_is_gone_again():
    def work():
        torch.ones(16 << 20)  # 64 MiB

    rise = measure.peak_rise(torch.device("cpu"), work)
    assert rise is None or 60 < rise / 2**20 < 80


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--unets sd3", "sd15"),
        ("--ranks 0", "from 1 to 1024"),
        ("--ranks many", "from 1 to 1024"),
        ("--rounds -1", "from 0"),
        ("--rounds 0 --repeats 0", "nothing to measure"),
        ("--latents 12", "multiple of 8"),
        ("--batch 0", "from 1"),
        ("--device toaster", "cpu or cuda"),
        ("--device cuda:99", "on this machine"),
        ("--dtype int8", "float32"),
        ("--speed 3", "--help"),
        ("-o {file}", "a folder"),
    ],
)
def test_nonsense_gets_one_sentence(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    assert main(arguments.format(file="taken").split()) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
