"""The whole laboratory in miniature: what it tells is worth nothing, but that it runs, goes on and reports is."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

from est_lora import cli
from est_lora.demo.model import LORAS
from est_lora.demo.train import Recipe
from est_lora.errors import EstLoraError
from est_lora.gate import STYLE, SUBJECT
from est_lora.lab import assistant, registration, report
from est_lora.lab.assistant import Assistant
from est_lora.lab.findings import Findings
from est_lora.lab.folder import PROTOCOL, Records, open_lab, reopen_lab
from est_lora.lab.protocol import FULL, QUICK, Cell, Pair, Protocol
from est_lora.lab.run import run

METHODS = ("style alone", "sum 1/1", "switch at half time", "EST, measured D", "EST, beta 0", "EST, beta 1")


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """A protocol of one pair, in which nothing is trained or drawn for long."""
    content = json.loads(FULL.read_text())
    content.update(
        subjects=content["subjects"][:1],
        styles=content["styles"][:1],
        trainings=[{kind: {**recipe, "steps": 2} for kind, recipe in content["trainings"][1].items()}],
        ceiling={**content["ceiling"], "steps": 2},
        extractor_steps=1,
        judge_steps=1,
        judge_pictures=3,
        single_pictures=2,
        sampling_seeds=2,
        steps=2,
        guidances=[1.0],
        methods={name: content["methods"][name] for name in METHODS},
    )
    path = tmp_path_factory.mktemp("protocol") / "protocol.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def finished(miniature, tmp_path_factory):
    """The lab, run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registration, "_RADII", np.array([20.0]))
        patch.setattr(registration, "_TILTS", np.array([0.0]))
        patch.setattr(registration, "_SHIFTS", np.array([0.0]))
        lab = open_lab(tmp_path_factory.mktemp("lab"), miniature)
        run(lab, jobs=1)
    return lab


def test_every_cell_is_drawn_and_judged(finished):
    assert finished.missing == []
    for cell in finished.protocol.cells:
        found = finished.records[("cell", *cell.pair, cell.method, cell.guidance)]
        assert {len(found[what]) for what in ("subject", "style", "parts", "distance")} == {2}
        assert finished.picture("cell", *cell.pair, cell.method, cell.guidance).is_file()


def test_what_is_done_is_not_done_again(finished, monkeypatch):
    monkeypatch.setattr(Assistant, "do", None)
    before = dict(finished.records.entries)
    again = open_lab(finished.folder, finished.folder / PROTOCOL)
    run(again, jobs=2)
    assert again.records.entries == before


def test_several_processes_find_the_same(finished, tmp_path):
    again = open_lab(shutil.copytree(finished.folder, tmp_path / "lab"), finished.folder / PROTOCOL)
    forgotten = [key for key in again.records.entries if key[0] == "drawn by code" or "sum 1/1" in key]
    before = {key: again.records.entries.pop(key) for key in forgotten}
    run(again, jobs=2)
    found = {key: again.records[key] for key in forgotten}
    for each in (*before.values(), *found.values()):
        del each["distance"]  # in this process to fewer poses
    assert found == before


def test_files_are_trained_as_the_protocol_says(finished):
    trained = {key[1]: entry for key, entry in finished.records.entries.items() if key[0] == "lora"}
    ranks = {name: entry["rank"] for name, entry in trained.items()}
    assert ranks == {"mipo-0.safetensors": 16, "vitra-0.safetensors": 4, "ceiling-mipo-vitra.safetensors": 16}
    assert all(entry["share"] > 0 for entry in trained.values())


def test_in_the_quick_run_files_that_are_there_are_not_trained_again(tmp_path, monkeypatch):
    trained = []

    def train_lora(words, recipe, path, *more, **how):
        trained.append(words)
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(LORAS["zubo creature"], path)

    monkeypatch.setattr(assistant, "train_lora", train_lora)
    lab = open_lab(tmp_path, QUICK)
    found = {name: Assistant(lab).train_lora(name) for name in lab.recipes}
    assert sorted(trained) == sorted(map(", ".join, lab.protocol.kinds))
    for words in lab.protocol.subjects + lab.protocol.styles:
        copied = lab.lora(words, 0)
        assert copied.read_bytes() == LORAS[words].read_bytes()
        assert 0.02 < found[copied.name]["share"] < 0.15
    trained.clear()
    monkeypatch.setattr(lab, "protocol", dataclasses.replace(lab.protocol, embedded=False))
    Assistant(lab).train_lora("mipo-0.safetensors")
    assert trained == ["mipo creature"]


def test_methods_draw_different_pictures(finished):
    pair = finished.protocol.pairs[0]
    strips = {finished.picture("cell", *pair, method, 1.0).read_bytes() for method in ("style alone", "sum 1/1")}
    assert len(strips) == 2


def test_the_report_has_every_gate_and_no_ranking_where_one_fails(finished, tmp_path, monkeypatch):
    found = Findings.of(finished)
    assert found.shut(1.0)  # with nothing trained
    paths = report.write(finished, tmp_path)
    page = paths[0].read_text()
    assert {path.name for path in paths} == {report.PAGE, "lab-grid-1.jpg"}
    assert all(gate.name in page for gate in found.gates)
    assert "no method is ranked" in page
    assert "What LoRAs alone lacked" in page
    assert "est-lora lab report -o docs" in page
    assert "both right" not in page
    monkeypatch.setattr(finished, "protocol", dataclasses.replace(finished.protocol, embedded=True))
    page = report.write(finished, tmp_path)[0].read_text()
    assert "est-lora lab run --quick" in page
    assert "What LoRAs alone lacked" not in page
    assert all(name in page for name in re.findall(r"\]\((lab-[^)]*)\)", page))


def test_with_all_gates_open_methods_are_ranked_by_what_was_found(finished, tmp_path, monkeypatch):
    monkeypatch.setitem(finished.protocol.gates, "single", 0)
    monkeypatch.setitem(finished.protocol.gates, "ceiling", 0)
    monkeypatch.setitem(finished.protocol.gates, "judge", 0)
    pair = finished.protocol.pairs[0]
    entry = finished.records[("cell", *pair, "style alone", 1.0)]
    monkeypatch.setitem(entry, "subject", [1, 0])
    monkeypatch.setitem(entry, "style", [1, 1])
    paths = report.write(finished, tmp_path)
    page = paths[0].read_text()
    assert {path.name for path in paths} == {
        report.PAGE,
        "lab-methods-1.png",
        "lab-beta-1.png",
        "lab-grid-1.jpg",
    }
    row = next(line for line in page.splitlines() if line.startswith("| style alone |"))
    cells = [cell.split(" (")[0] for cell in row.strip("| ").split(" | ")]
    assert cells[1:5] == ["0.50", "1.00", "0.67", "0.50"]
    assert page.count("\n| EST") == 3
    assert "What LoRAs alone lacked" not in page
    assert "with the extension's defaults (EST, measured D) 0.00 of the pictures have both right" in page
    assert "style alone (-0.50)" in page
    halves = [finished.records["half", words, 0, 1.0, "half of the time"] for words in ("mipo creature", "vitra style")]
    monkeypatch.setitem(halves[0], "right", 0.75)
    monkeypatch.setitem(halves[1], "right", 0.25)
    page = report.write(finished, tmp_path)[0].read_text()
    assert "with half of the time left out in 0.50." in page
    assert re.search(r"\| mipo creature \| [\d.]+ \| [\d.]+ \| 0\.75 \|", page)


def test_the_command_reports_from_a_folder(finished, tmp_path, capsys):
    assert cli.main(["lab", "report", str(finished.folder), "-o", str(tmp_path)]) == 0
    assert str(tmp_path / report.PAGE) in capsys.readouterr().out


def test_another_protocol_needs_another_folder(finished, miniature, tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text(miniature.read_text().replace('"steps": 2', '"steps": 3'))
    with pytest.raises(EstLoraError, match="another protocol"):
        open_lab(finished.folder, other)
    assert cli.main(["lab", "run", "-o", str(finished.folder)]) == 2
    assert "another folder" in capsys.readouterr().err


def test_a_folder_without_a_finished_lab_costs_one_sentence(tmp_path, miniature, capsys):
    with pytest.raises(EstLoraError, match="no lab"):
        reopen_lab(tmp_path)
    open_lab(tmp_path / "begun", miniature)
    with pytest.raises(EstLoraError, match=r"(\d+) of \1 pieces of work are missing"):
        reopen_lab(tmp_path / "begun")
    assert cli.main(["lab", "report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_line_that_was_cut_off_is_forgotten(tmp_path):
    records = Records(tmp_path / "records.jsonl")
    records.add(("a", 1), {"value": 0.5})
    with records.path.open("a") as file:
        file.write('{"key": ["b"')
    again = Records(records.path)
    assert again.entries == {("a", 1): {"value": 0.5}}
    again.add(("b",), {"value": 2})
    assert Records(records.path).entries == {("a", 1): {"value": 0.5}, ("b",): {"value": 2}}


@pytest.mark.parametrize("path", [FULL, QUICK])
def test_the_protocols_can_be_read(path):
    protocol = Protocol.read(path)
    assert len(protocol.cells) == len(protocol.pairs) * len(protocol.methods) * len(protocol.guidances)
    assert "sum 1/1" in protocol.methods  # what gains are counted from
    assert isinstance(protocol.recipe(protocol.styles[0], 0), Recipe)
    assert Cell(Pair(protocol.subjects[0], protocol.styles[0], 0), "sum 1/1", protocol.guidances[0]) in protocol.cells


def test_the_full_protocol_is_as_large_as_it_was_meant_to_be():
    protocol = Protocol.read(FULL)
    assert len(protocol.subjects) >= 4
    assert len(protocol.styles) >= 4
    assert len(protocol.trainings) >= 3
    assert {1.0, 2.0} <= set(protocol.guidances)
    of = [(each[SUBJECT]["rank"], each[STYLE]["rank"]) for each in protocol.trainings]
    assert any(one != other for one, other in of)
