"""`est-lora measure`, and what `est-lora generate` does where beta is to be measured."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from est_lora.cli import main
from est_lora.errors import quote
from est_lora.hosts import measuring
from est_lora.hosts.diffusers_loading import load_pipeline
from est_lora.hosts.measuring import usual
from tests.hosts.probes import PAIR, PROMPT, SETTINGS, by_hand, edit, halves


@pytest.fixture
def run(work, capsys):
    """Runs a command; gives its exit code, standard output, and standard error without progress bars."""

    def run(command, *flags):
        both = {"--model": "model", "--device": "cpu", "--weights": "weights"}
        if command == "measure":
            files, more = PAIR, {"--steps": "2"}
        else:
            files, more = (), {"--subject": PAIR[0], "--style": PAIR[1], "--steps": "2", "--size": "32", "-o": "out"}
            more["--prompt"] = PROMPT
        given = {**both, **more} | {str(flag): str(value) for flag, value in zip(flags[::2], flags[1::2])}
        code = main(
            [command, *files, *(text for flag, value in given.items() if value != "None" for text in (flag, value))]
        )
        out, err = capsys.readouterr()
        lines = [line for line in re.split(r"[\r\n]+", err) if line and not re.search(r"\d/\d+ \[", line)]
        return code, out, "".join(f"{line}\n" for line in lines)

    return run


def carried(path):
    with Image.open(path) as picture:
        return picture.info["parameters"]


def test_measure_prints_the_number(run, calls):
    code, out, err = run("measure", "--prompt", PROMPT, "--seed", 3, "--side", 24, "--guidance", 4, "-o", "both.png")
    drawn, value = by_hand(
        load_pipeline(Path("model"), "cpu", torch.float32), PAIR, diffusers.EulerDiscreteScheduler, PROMPT, SETTINGS
    )
    assert code == 0
    assert out == f"{float(out):.6f}\n"
    assert float(out) == pytest.approx(value, abs=2e-6)
    assert np.array_equal(halves(Path("both.png").read_bytes())[1], drawn[1])
    (kept,) = (measuring.memory_folder() / "probes").iterdir()
    assert err == f"est-lora: measured; the pictures are in {quote(kept)}.\n"
    assert kept.read_bytes() == Path("both.png").read_bytes()


def test_measure_remembers(run, calls):
    _, first, _ = run("measure")
    before = len(calls)
    code, again, err = run("measure", "-o", "both.png")
    assert (code, again, len(calls)) == (0, first, before)
    assert err.startswith("est-lora: remembered; the pictures are in ")
    assert halves(Path("both.png").read_bytes())[0].shape == (16, 16, 3)
    shutil.rmtree(measuring.memory_folder() / "probes")
    assert run("measure")[2] == "est-lora: remembered; the pictures aren't kept.\n"
    code, out, err = run("measure", "-o", "more.png")
    assert (code, out) == (2, "")
    assert err == "est-lora: This is remembered, but its pictures aren't kept any more: add --again to draw them.\n"
    assert (
        main(["measure", *PAIR, "--model", "model", "--weights", "weights", "--steps", "2", "--again", "-o", "m.png"])
        == 0
    )
    assert len(calls) == 2 * before


def test_measures_defaults_are_the_usual(run):
    _, out, _ = run("measure", "--steps", "None")
    settings = usual(load_pipeline(Path("model"), "cpu", torch.float32))
    assert (settings.side, settings.sampler) == (16, "euler")
    value = by_hand(
        load_pipeline(Path("model"), "cpu", torch.float32), PAIR, diffusers.EulerDiscreteScheduler, "", settings
    )[1]
    assert float(out) == pytest.approx(value, abs=2e-6)


def test_other_files_of_the_model_are_measured_again(run, calls):
    run("measure")
    before = len(calls)
    edit(Path("model/vae/diffusion_pytorch_model.safetensors"))
    assert run("measure")[2].startswith("est-lora: measured")
    assert len(calls) == 2 * before


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--steps", 0), "--steps can't be '0': it is a whole number from 1 to 150."),
        (("--side", 20), "--side can't be '20': it is a multiple of 8 from 8 to 2048."),
        (("--side", 4096), "--side can't be '4096'"),
        (("--seed", "x"), "--seed can't be 'x'"),
        (("--guidance", "nan"), "--guidance can't be 'nan'"),
        (("-o", "both.jpg"), "The pictures can't go to 'both.jpg': give a .png file"),
        (("-o", "nowhere/both.png"), "can't go to 'nowhere/both.png'"),
        (("--model", "nix"), "There is no 'nix'"),
        (("--config", "model"), "--config is for a model in one file"),
        (("--scheduler", "eulr"), "did you mean euler"),
        (("--dtype", "int8"), "--dtype can't be 'int8'"),
        (("--extractor", "dinno", "--model", "nix"), "did you mean 'dino'"),
        (("--weights", "nowhere", "--model", "nix"), "'nowhere' can't be read"),
        (("--weights", None), "The DINO weights can't be fetched"),
    ],
)
def test_what_measure_cannot_do_costs_one_sentence(run, tmp_path, flags, says):
    there = sorted(os.listdir())
    code, out, err = run("measure", *flags)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert says in err
    assert err.startswith("est-lora: ")
    assert sorted(os.listdir()) == there
    assert not (tmp_path / "caches" / "est-lora" / "probes").exists()


@pytest.mark.parametrize("command", ["measure", "generate"])
def test_ctrl_c_while_measuring(run, monkeypatch, command):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", interrupted)
    code, out, err = run(command)
    assert (code, out) == (130, "")
    assert err.endswith("est-lora: interrupted.\n")
    assert not os.path.exists("out")
    assert not (measuring.memory_folder() / "probes").exists()


def test_a_picture_carries_the_measured_number(run, calls):
    _, number, _ = run("measure", "--prompt", PROMPT, "--steps", "None")
    before = len(calls)
    code, _, err = run("generate", "--scheduler", "ddpm")
    assert (code, err) == (0, "")
    assert len(calls) == before + 2  # remembered, whatever scheduler the picture itself has
    assert f", EST-LoRA beta: {float(number)}," in carried("out/00000-0.png")
    run("generate", "--scheduler", "ddpm", "--beta", float(number), "-o", "given")
    assert Path("given/00000-0.png").read_bytes() == Path("out/00000-0.png").read_bytes()
    assert len(calls) == before + 4
    assert "is there already" in run("generate", "--scheduler", "ddpm", "--beta", float(number))[2]


def test_generate_measures_what_is_not_known(run, calls, monkeypatch):
    code, _, err = run("generate")
    assert code == 0
    assert err == "est-lora: The style discrepancy of subject and style is measured, on two pictures of 7 steps.\n"
    assert "EST-LoRA beta: " in carried("out/00000-0.png")
    monkeypatch.setattr(measuring, "open_extractor", lambda *_, **__: pytest.fail("an extractor is opened"))
    before = len(calls)
    assert run("generate")[2] == "est-lora: 'out/00000-0.png' is there already.\n"
    assert len(calls) == before


def test_another_number_is_another_picture(run):
    run("generate")
    (path,) = measuring.memory_folder().glob("*.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    for entry in content["measurements"].values():
        entry["value"] = 1.9
    path.write_text(json.dumps(content), encoding="utf-8")
    assert run("generate")[1].strip() == os.path.join("out", "00001-0.png")
    assert "EST-LoRA beta: 1.9," in carried("out/00001-0.png")


@pytest.mark.parametrize("flags", [("--beta", 0.3), ("--method", "sum"), ("--method", "k-lora"), ("--method", "style")])
def test_what_needs_no_number_measures_nothing(run, calls, flags):
    assert run("generate", *flags)[::2] == (0, "")
    assert len(calls) == 2
    assert ("EST-LoRA beta" in carried("out/00000-0.png")) == ("--beta" in flags)


@pytest.mark.parametrize("missing", ["weights", "library"])
def test_generate_goes_on_without_a_number(run, monkeypatch, missing):
    with monkeypatch.context() as patched:
        if missing == "library":
            patched.setitem(sys.modules, "huggingface_hub", None)
        code, _, err = run("generate", "--weights", None)
    assert (code, err.count("\n")) == (0, 1)
    assert err.startswith("est-lora: The style discrepancy can't be measured, and for beta 0.5 is taken: The ")
    run("generate", "--beta", 0.5, "-o", "given")
    assert Path("given/00000-0.png").read_bytes() == Path("out/00000-0.png").read_bytes()
    assert ", EST-LoRA beta: 0.5," in carried("out/00000-0.png")
    code, out, err = run("generate")  # now it can be measured
    assert "is measured" in err
    assert out.strip() == os.path.join("out", "00001-0.png")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--extractor", "dinno"), "did you mean 'dino'"),
        (("--weights", "nowhere"), "'nowhere' can't be read"),
        (("--extractor", "clip", "--weights", None), "is never fetched"),
    ],
)
def test_generate_refuses_what_is_no_extractor(run, flags, says):
    code, out, err = run("generate", "--model", "nix", *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err
    assert not os.path.exists("out")
