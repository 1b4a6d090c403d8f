"""The embedded model: that it loads, that it obeys, and that the commands draw with it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image

from est_lora.cli import main
from est_lora.demo.model import (
    BASE,
    GUIDANCE,
    LORAS,
    STYLE_LORA,
    SUBJECT_LORA,
    PixelShuffle,
    load_pipeline,
    make_tokenizer,
)
from est_lora.demo.show import ASKED
from est_lora.demo.styles import BACKGROUNDS
from est_lora.lora import LoraFile
from tests.models import projections

FILES = ["--subject", str(SUBJECT_LORA), "--style", str(STYLE_LORA)]


@pytest.fixture(scope="module")
def pipe():
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_weights_are_small_half_precision_safetensors():
    assert size_of(BASE) <= 12e6
    assert {path.suffix for path in BASE.rglob("*") if path.is_file()} == {".safetensors", ".json"}
    for path in LORAS.values():
        assert path.stat().st_size <= 0.5e6


@pytest.mark.parametrize("path", LORAS.values(), ids=LORAS)
def test_the_loras_are_ordinary_and_gentle(pipe, path):
    file = LoraFile.load(path)
    assert (file.convention, file.remarks) == ("kohya", [])
    modules = {name: m for name, m in projections(pipe.unet).items() if ".attn" in name}
    assert {layer.name for layer in file.updates} == set(modules)
    changed = sum(update.energy for update in file.updates.values())
    there = sum(float((module.weight.detach().double() ** 2).sum()) for module in modules.values())
    assert 0.005 < changed / there < 0.12


def test_pixels_survive_the_shuffle():
    shuffle = PixelShuffle()
    pixels = torch.randn(2, 3, 64, 64)
    latents = shuffle.encode(pixels).latent_dist.sample()
    assert latents.shape == (2, 48, 16, 16)
    assert torch.equal(shuffle.decode(latents).sample, pixels)


def colour_of(pipe, prompt):
    pictures = pipe(
        [prompt] * 3,
        num_inference_steps=15,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(seed) for seed in range(3)],
        output_type="np",
    ).images
    return pictures[:, 24:40, 24:40].mean((0, 1, 2))


def test_the_base_obeys_colour_words(pipe):
    for channel, colour in enumerate(("red", "green", "blue")):
        assert int(np.argmax(colour_of(pipe, f"a {colour} circle, plain, on white"))) == channel


def test_it_is_a_stable_diffusion_pipeline_in_a_folder(pipe):
    loaded = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
    assert type(loaded.vae) is PixelShuffle
    other = StableDiffusionImg2ImgPipeline(**loaded.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    start = Image.new("RGB", (64, 64), (200, 40, 40))
    picture = other("a red star", image=start, strength=0.3, num_inference_steps=10).images[0]
    assert picture.size == (64, 64)


def test_the_demo_draws_its_sheet_and_its_map(tmp_path, capsys):
    assert main(["demo", "-o", str(tmp_path / "out"), "--seed", "3"]) == 0
    told = capsys.readouterr().out.split()
    assert told == [str(tmp_path / "out" / name) for name in ("contact-sheet.png", "gate-map.png")]
    for path in told:
        with Image.open(path) as picture:
            assert min(picture.size) > 400


def test_the_demo_asks_for_what_its_model_has_words_for():
    tokenizer = make_tokenizer()
    for asked in ASKED:
        assert tokenizer.unk_token_id not in tokenizer(asked.prompt).input_ids


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: asked.prompt)
def test_beside_the_models_pictures_stands_what_was_asked_for(asked):
    for seed in range(3):
        picture = asked.by_code(seed)
        assert np.array_equal(picture, asked.by_code(seed))
        assert tuple(picture[0, 0]) == BACKGROUNDS[asked.background]
        assert not np.array_equal(picture, asked.by_code(seed + 1))
    if asked.colour == "red":
        red, others = picture[..., 0].astype(int), picture[..., 1:].max(-1)
        assert (red - others > 100).mean() > 0.05


def test_a_process_that_knows_nothing_of_the_embedded_model_generates_with_it(tmp_path):
    arguments = ["generate", "--model", str(BASE), *FILES, "--prompt", "x", "--steps", "2", "-o", str(tmp_path)]
    command = [sys.executable, "-m", "est_lora", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / '00000-0.png'}\n"
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr


def test_ctrl_c_while_drawing_writes_nothing(tmp_path):
    arguments = ["--model", str(BASE), *FILES, "--prompt", "x", "--steps", "1000", "-o", str(tmp_path / "out")]
    command = [sys.executable, "-m", "est_lora", "generate", *arguments]
    # Started in the background, this test would hand down that interrupts are ignored.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **heard) as running:
        seen = b""
        while b"/1000" not in seen:  # the progress bar: it draws
            seen += running.stderr.read(1)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, b"")
    assert err.endswith(b"est-lora: interrupted.\n")
    assert b"Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_generate_numbers_its_pictures_and_repeats_a_seed(tmp_path, capsys):
    def generate(*more):
        arguments = ["--model", str(BASE), *FILES, "--prompt", "a mipo creature", "--steps", "3", "-o", str(tmp_path)]
        assert main(["generate", *arguments, *more]) == 0
        return [np.asarray(Image.open(path)) for path in capsys.readouterr().out.split()]

    first = generate("--seed", "5", "--count", "2")
    same = ["--seed", "6", "--size", "64x64", "--scheduler", "ddim"]
    again = generate(*same, "-o", str(tmp_path / "again"))
    assert np.array_equal(first[1], again[0])
    assert not np.array_equal(first[0], first[1])
    assert generate("--size", "96x64")[0].shape == (64, 96, 3)
    assert not np.array_equal(generate("--seed", "6", "--method", "style")[0], again[0])
    numbered = ["00000-5.png", "00001-6.png", "00002-0.png", "00003-6.png"]
    assert sorted(path.name for path in tmp_path.glob("*[0-9].png")) == numbered


@pytest.mark.parametrize("scheduler", ["euler-a", "kdpm2", "pndm", "no-such"])
def test_a_scheduler_that_refuses_costs_one_sentence(tmp_path, capsys, scheduler):
    arguments = ["--model", str(BASE), *FILES, "--prompt", "x", "--scheduler", scheduler, "-o", str(tmp_path / "out")]
    assert main(["generate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert f"scheduler '{scheduler}'" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "deis", "dpm++2m", "dpm++2m-karras", "dpm++2m-sde", "dpm++2s"])
def test_schedulers_that_take_its_kind_of_prediction(tmp_path, capsys, scheduler):
    run_with(tmp_path, scheduler)


@pytest.mark.parametrize("scheduler", ["euler", "heun", "lcm", "unipc"])
def test_more_schedulers(tmp_path, capsys, scheduler):
    run_with(tmp_path, scheduler)


def run_with(folder, scheduler):
    arguments = ["--model", str(BASE), *FILES, "--prompt", "x", "--steps", "4", "--scheduler", scheduler]
    assert main(["generate", *arguments, "-o", str(folder)]) == 0


def test_what_the_pipeline_refuses_costs_one_sentence(tmp_path, capsys, monkeypatch):
    def refuses(*_, **__):
        raise RuntimeError("not enough memory\nand more lines")

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", refuses)
    request = ["--model", str(BASE), *FILES, "--prompt", "x", "--beta", "0.4", "-o", str(tmp_path / "out")]
    assert main(["generate", *request]) == 2
    assert capsys.readouterr().err == "est-lora: The picture can't be made this way: not enough memory.\n"
    assert not (tmp_path / "out").exists()


def test_inspect_knows_the_embedded_pair(capsys):
    assert main(["inspect", str(SUBJECT_LORA), str(STYLE_LORA), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["subject"]["kinds"] == {"lora": 56}
    assert {acts for layer in told["layers"] for _, acts in layer["segments"]} == {"subject", "style"}
