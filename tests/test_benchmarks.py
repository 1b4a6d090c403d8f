"""The benchmark measures the right things. What it measures is no test's business: a timing says nothing of a change."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from benchmarks import measure
from benchmarks.__main__ import main
from benchmarks.bounds import judged
from benchmarks.published import PublishedSession, energy, largest_entries
from benchmarks.unets import SIZES, attention_projections, build, inputs, write_pair
from benchmarks.ways import WAYS
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


def plan_of(folder, model, config):
    return FusionPlan.of(*map(LoraFile.load, write_pair(folder, model, 4)), config)


@pytest.mark.parametrize(("size", "layers"), [("sd15", 128), ("sdxl", 560)])
def test_the_real_sizes_have_the_real_layers(size, layers):
    assert len(attention_projections(build(SIZES[size], "meta"))) == layers


def test_one_command_measures_everything(tmp_path, capsys):
    arguments = f"--unets tiny --ranks 4 2 --steps 2 --repeats 1 --latents 8 --batch 1 --together 3 -o {tmp_path}"
    assert main(arguments.split()) == 0
    result = json.loads((tmp_path / "RESULT.json").read_text())
    assert [(row["rank"], row["way"]) for row in result["pictures"]] == [
        (rank, way) for rank in (4, 2) for way in (None, *(way for way in WAYS if way != "merge-cpu"))
    ]
    assert [(row["rank"], row["what"]) for row in result["planning"]] == [
        (rank, what)
        for rank in (4, 2)
        for what in (measure.READING, measure.LOADING, *measure.PLANS, measure.FIRST, measure.SECOND, measure.OTHER)
    ]
    assert {row["layers"] for row in result["pictures"] + result["planning"]} == {32}
    for row in result["pictures"]:
        parts = [row[part] for part in ("set_up", "switching", "steps", "restoring")]
        assert row["total"] == pytest.approx(sum(parts))
        assert row["ratio"]["value"] == pytest.approx(row["total"] / row["bare"])
        assert all(part > 0 for part in parts) == (row["way"] is not None)
    assert {row["what"] for row in result["bounds"]} == {WAYS["auto"].title}
    assert result["left_out"] == []
    assert result["machine"]["torch"] == torch.__version__
    table = (tmp_path / "RESULT.md").read_text()
    assert table in capsys.readouterr().out
    lines = table.splitlines()
    assert all(
        sum(line.startswith(f"| {way.title} |") for line in lines) == 2 * (not way.on_gpu) for way in WAYS.values()
    )
    assert sum(line.startswith("| tiny") for line in lines) == len(result["planning"] + result["bounds"])
    assert (tmp_path / "RESULT.png").read_bytes().startswith(b"\x89PNG")


def test_what_needs_a_package_that_is_not_there_is_left_out_and_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(WAYS, "peft", dataclasses.replace(WAYS["peft"], needs="no_such_package"))
    arguments = f"--unets tiny --ranks 2 --steps 1 --repeats 0 --latents 8 --ways branch peft -o {tmp_path}"
    assert main(arguments.split()) == 0
    result = json.loads((tmp_path / "RESULT.json").read_text())
    assert [row["way"] for row in result["pictures"]] == [None, "branch"]
    assert f"installed: {WAYS['peft'].title}." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "score"),
    [
        (FusionConfig(balance="l1"), energy),
        (FusionConfig(balance="l1", beta=0.1, alpha=2.0), energy),
        (FusionConfig(method="k-lora"), largest_entries),
    ],
)
def test_the_published_ways_decide_as_the_plan_does_and_give_the_same_output(model, tmp_path, config, score):
    plan = plan_of(tmp_path, model, config)
    ours, theirs = measure.with_same_weights(model), measure.with_same_weights(model)
    published, given = PublishedSession(theirs, plan, score), inputs(model, 8, 1)
    published.attach()
    chosen = set()
    with torch.no_grad(), FusionSession(ours, plan) as session:
        for tau in TAUS:
            session.at(tau)
            published.at(tau)
            expected, output = measure.Run(ours, given).call(tau), measure.Run(theirs, given).call(tau)
            acting = {layer.layer.name: layer.acts(tau) for layer in plan.layers}
            assert {name: layer.acts for name, layer in published.layers.items()} == acting
            assert torch.allclose(output, expected, atol=1e-5)
            chosen |= {tuple(acting.values())}
    assert len(chosen) > 2, "the layers switch at different times"
    published.detach()
    assert not hooks(theirs)


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_every_way_gives_its_picture_and_the_model_back_and_leaves_the_bare_one_alone(model, tmp_path, way):
    config = FusionConfig(method="sum") if way in {"merged", "peft"} else WAYS[way].config
    expected, given = measure.with_same_weights(model), inputs(model, 8, 1)
    tree, before = measure.with_same_weights(model), {name: value.clone() for name, value in model.state_dict().items()}
    bare = measure.Run(model, given).call(0.0)
    session = WAYS[way].session(tree, plan_of(tmp_path, model, WAYS[way].config))
    for _ in range(2):
        session.attach()
        with FusionSession(expected, plan_of(tmp_path, model, config)) as reference:
            for tau in (0.0, 0.3, 1.0):
                session.at(tau)
                reference.at(tau)
                output = measure.Run(tree, given).call(tau)
                assert torch.allclose(output, measure.Run(expected, given).call(tau), atol=1e-5)
                assert not torch.allclose(output, measure.Run(model, given).call(tau), atol=1e-3)
        assert torch.equal(measure.Run(model, given).call(0.0), bare)
        session.detach()
        assert torch.equal(measure.Run(tree, given).call(0.0), bare)
        assert not hooks(tree)
        after = tree.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())


def test_nothing_stays_on_any_tree_and_nothing_is_ever_on_the_bare_one(model, tmp_path, monkeypatch):
    seen, trees = [], []

    def watched(original):
        trees.append(copied := same_weights(original))
        return copied

    same_weights = measure.with_same_weights
    monkeypatch.setattr(measure, "with_same_weights", watched)
    paths = write_pair(tmp_path, model, 2)
    rows = measure.measure_pictures(
        model, paths, list(WAYS), 8, 1, 2, 2, 3, "cpu", lambda: seen.append(len(hooks(model)))
    )
    assert [row["way"] for row in rows] == [None, *WAYS]
    assert seen == [0] * measure.calls_of_pictures(len(WAYS), steps=2, pictures=2, together=3)
    assert len(trees) == len(WAYS)
    places = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    for tree in trees:
        assert not hooks(tree)
        assert {name: weight.data_ptr() for name, weight in tree.named_parameters()} == places


class Clock:
    """Stands still but for what is waited for."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setitem(measure.CLOCKS, "wall", lambda: self.now)

    def wait(self, seconds):
        self.now += seconds


class Slow(torch.nn.Module):
    """A UNet, and a session on it, that take their time."""

    def __init__(self, clock, call, told=None):
        super().__init__()
        self.some = torch.nn.Linear(1, 1)
        self._clock, self._call, self._told = clock, call, told

    def forward(self, timestep, return_dict):
        self._told.append((self._call, timestep))
        self._clock.wait(self._call)
        return (timestep,)

    def attach(self):
        self._clock.wait(100)

    def at(self, tau):
        self._clock.wait(1000 if tau else 20)

    def detach(self):
        self._clock.wait(5)


def test_every_part_of_a_picture_counts_and_who_goes_first_changes(monkeypatch):
    clock, told = Clock(monkeypatch), []
    trees = [Slow(clock, seconds, told) for seconds in (2, 3, 4)]
    bare, *runs = measure.Run(trees[0], {}), *(measure.Run(tree, {}, tree) for tree in trees[1:])
    measure.side_by_side([bare, *runs], steps=4, pictures=2, tick=lambda: None)
    assert [call for call, _ in told] == [2, 3, 4, 3, 4, 2, 4, 2, 3, 2, 3, 4] + [3, 4, 2, 4, 2, 3, 2, 3, 4, 3, 4, 2]
    assert [timestep for _, timestep in told[:12:3]] == pytest.approx([999, 749.25, 499.5, 249.75])
    made = measure.picture_row("this", runs[0], bare.calls)
    assert {part: made[part] for part in ("set_up", "switching", "steps", "restoring", "total", "bare")} == {
        "set_up": 120,
        "switching": 3000,
        "steps": 12,
        "restoring": 5,
        "total": 3137,
        "bare": 8,
    }
    assert made["ratio"] == pytest.approx({"value": 3137 / 8, "low": 3137 / 8, "high": 3137 / 8})
    assert made["step_ratio"]["median"] == 1.5


def test_the_noise_of_the_steps_is_told():
    run = measure.Run(torch.nn.Linear(1, 1), {})
    run.set_up, run.switching, run.restoring = [0.0], [[0.0] * 27], [0.0]
    run.calls, drift = [[1.1, 0.9] * 14], [[1.0, 1.0] * 14]
    ratio = measure.picture_row("this", run, drift)["ratio"]
    assert ratio["value"] == pytest.approx(1)
    assert 0.95 < ratio["low"] < 0.98
    assert 1.02 < ratio["high"] < 1.05
    run.calls, drift = [[2.2, 1.1] * 14], [[2.0, 1.0] * 14]
    assert measure.picture_row("this", run, drift)["ratio"] == pytest.approx({"value": 1.1, "low": 1.1, "high": 1.1})


def of(way, value, noise=0.01, rank=8):
    return {"way": way, "rank": rank, "ratio": {"value": value, "low": value - noise, "high": value + noise}}


@pytest.mark.parametrize(
    ("auto", "branch", "rank", "on_gpu", "kept"),
    [
        (1.02, 1.04, 8, False, ["yes", "yes", "yes"]),
        (1.025, 1.04, 8, False, ["within the noise", "yes", "yes"]),
        (1.025, 1.04, 8, True, ["yes", "yes", "yes"]),
        (1.05, 1.02, 8, False, ["no", "no", "yes"]),
        (1.01, 1.12, 8, False, ["yes", "yes", "no"]),
        (1.01, 1.12, 128, False, ["yes", "yes", "yes"]),
        (1.01, 1.12, 32, False, ["yes", "yes"]),
    ],
)
def test_the_bounds_are_judged(auto, branch, rank, on_gpu, kept):
    rows = [of(None, 1.0, 0.0, rank), of("branch", branch, rank=rank), of("auto", auto, rank=rank)]
    assert [said["kept"] for said in judged(rows, on_gpu)] == kept
    assert judged(rows[:1], on_gpu) == []


def test_the_peak_is_told_even_if_it_is_gone_again():
    def work():
        torch.ones(16 << 20)  # 64 MiB

    rise = measure.peak_rise(torch.device("cpu"), work)
    assert rise is None or 60 < rise / 2**20 < 80


def test_the_time_of_the_processor_is_for_one_thread(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert main(["--clock", "cpu", "-o", str(tmp_path / "new")]) == 2
    assert "OMP_NUM_THREADS=1" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--unets sd3", "sd15"),
        ("--ranks 0", "from 1 to 1024"),
        ("--ranks many", "from 1 to 1024"),
        ("--ways magic", "remerging"),
        ("--steps -1", "from 0"),
        ("--steps 0 --repeats 0", "nothing to measure"),
        ("--pictures 0", "from 1"),
        ("--together 0", "from 1"),
        ("--clock sun", "wall, cpu"),
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
