"""Measuring a pair's style discrepancy in diffusers: from Python, by `est-lora measure`, and for `est-lora generate`."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import re
import shutil
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from est_lora.cli import main
from est_lora.demo.model import BASE, STYLE_LORA, SUBJECT_LORA
from est_lora.discrepancy import Memory, ProbeSettings
from est_lora.errors import EstLoraError, quote
from est_lora.hosts import measuring
from est_lora.hosts.diffusers import fuse
from est_lora.hosts.diffusers_loading import load_pipeline
from est_lora.hosts.measuring import measure, usual
from tests.extractors import write_dino
from tests.files import write
from tests.pipelines import fitting_lora, stable_diffusion, stable_diffusion_xl

SETTINGS = ProbeSettings(seed=3, side=24, steps=2, sampler="euler", guidance=4.0)
PROMPT = "a star"
WORDS = ("mipo", "vitra style")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, a pair that fits it, and the weights of an extractor."""
    folder = tmp_path_factory.mktemp("made")
    pipe = stable_diffusion()
    pipe.save_pretrained(folder / "model")
    for seed, role in enumerate(("subject", "style")):
        write(folder / f"{role}.safetensors", fitting_lora(pipe.unet, seed, size=1.0))
    (folder / "weights").mkdir()
    try:
        write_dino(folder / "weights")
    except ImportError as error:
        pytest.skip(f"{error.name} is missing")
    return folder


@pytest.fixture
def work(made, tmp_path, monkeypatch):
    """A copy of them to work in, and a place to remember."""
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "work"


@pytest.fixture
def calls(monkeypatch):
    """The calls of any UNet so far."""
    made, forward = [], diffusers.UNet2DConditionModel.forward

    def counted(self, *args, **kwargs):
        made.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", counted)
    return made


@pytest.fixture
def pipe():
    return stable_diffusion()


PAIR = ("subject.safetensors", "style.safetensors")


def measured(pipe, **changes):
    wishes = {"prompt": PROMPT, "settings": SETTINGS, "folder": Path("weights")}
    return measure(pipe, *PAIR, **{**wishes, **changes})


def by_hand(pipe, pair, scheduler, prompt, settings):
    """Both pictures, and the discrepancy of them, with nothing but the libraries' own means."""
    pipe.scheduler, drawn = scheduler.from_config(pipe.scheduler.config), []
    for method in ("subject", "style"):
        generator = torch.Generator().manual_seed(settings.seed)
        request = {"height": settings.side, "width": settings.side, "num_inference_steps": settings.steps}
        request["negative_prompt"] = ""  # which isn't nothing to XL
        with fuse(pipe, *pair, method=method):
            drawn += pipe(prompt, guidance_scale=settings.guidance, generator=generator, **request).images
    return drawn, 1 - float(torch.cosine_similarity(*(look(picture).double() for picture in drawn), dim=0))


def look(picture):
    """What the library itself sees in a picture."""
    config = json.loads(Path("weights/config.json").read_text(encoding="utf-8"))
    if "architecture" not in config:
        from transformers import ViTImageProcessor, ViTModel

        model = ViTModel.from_pretrained("weights", add_pooling_layer=False).eval()
        pixels = ViTImageProcessor.from_pretrained("weights")(images=picture, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            return model(pixels).last_hidden_state[0, 0]
    import timm.data

    model = timm.create_model(config["architecture"], num_classes=0, **config["model_args"]).eval()
    model.load_state_dict(load_file("weights/model.safetensors"))
    prepared = timm.data.resolve_data_config({}, pretrained_cfg=config["pretrained_cfg"])
    with torch.no_grad():
        return model.forward_features(timm.data.create_transform(**prepared)(picture)[None])[0, 0]


def halves(png):
    with Image.open(io.BytesIO(png)) as both:
        pixels = np.asarray(both)
    return pixels[:, : pixels.shape[1] // 2], pixels[:, pixels.shape[1] // 2 :]


# The number


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_xl], ids=["sd", "xl"])
@pytest.mark.parametrize(
    ("sampler", "scheduler"), [("euler", diffusers.EulerDiscreteScheduler), ("ddim", diffusers.DDIMScheduler)]
)
def test_it_is_that_of_the_two_pictures(work, make, sampler, scheduler):
    pipe = make()
    for seed, path in enumerate(PAIR):
        write(Path(path), fitting_lora(pipe.unet, seed, size=1.0))
    found = measured(pipe, settings=dataclasses.replace(SETTINGS, sampler=sampler))
    drawn, value = by_hand(make(), PAIR, scheduler, PROMPT, SETTINGS)
    assert value > 1e-4
    assert found.value == pytest.approx(value, abs=2e-6)
    assert found.value == round(found.value, 6)
    left, right = halves(found.png)
    assert np.array_equal(left, drawn[0])
    assert np.array_equal(right, drawn[1])
    assert not np.array_equal(left, right)
    assert found.pictures.read_bytes() == found.png


def test_the_files_words_are_drawn(work, pipe):
    for path, words in zip(PAIR, WORDS):
        Path(path).with_suffix(".json").write_text(json.dumps({"activation text": words}))
    found = measured(pipe)
    drawn, _ = by_hand(stable_diffusion(), PAIR, diffusers.EulerDiscreteScheduler, ", ".join(WORDS), SETTINGS)
    assert np.array_equal(halves(found.png)[0], drawn[0])
    assert measured(pipe, prompt="a heart").remembered
    Path(PAIR[1]).with_suffix(".json").unlink()
    assert not measured(pipe, prompt="a heart").remembered


def test_the_embedded_model_is_measured_at_its_own_side(work):
    pipe = load_pipeline(BASE, "cpu", torch.float32)
    assert usual(pipe) == dataclasses.replace(ProbeSettings.usual(32), sampler="euler")
    found = measure(pipe, SUBJECT_LORA, STYLE_LORA, prompt="mipo creature, vitra style", folder=Path("weights"))
    assert halves(found.png)[0].shape == (32, 32, 3)
    assert found.value > 0


# The memory


def test_it_is_measured_once(work, pipe, calls, monkeypatch):
    first = measured(pipe)
    assert not first.remembered
    assert len(calls) == 2 * SETTINGS.steps
    monkeypatch.setattr(measuring, "open_extractor", lambda *_, **__: pytest.fail("an extractor is opened"))
    assert measured(stable_diffusion()) == dataclasses.replace(first, remembered=True)
    assert len(calls) == 2 * SETTINGS.steps


def test_it_is_measured_again_if_asked_to(work, pipe, calls):
    first = measured(pipe)
    assert measured(pipe, again=True) == first
    assert len(calls) == 4 * SETTINGS.steps


def edit(path):
    save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path)


def other_weights(pipe):
    with torch.no_grad():
        pipe.vae.decoder.conv_out.weight += 0.01


def an_adapter(pipe):
    from peft import LoraConfig

    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))


def other_noise(pipe):
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, beta_end=0.013)


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: {"prompt": "a heart"},
        *(
            lambda pipe, name=name, value=value: {"settings": dataclasses.replace(SETTINGS, **{name: value})}
            for name, value in {"seed": 4, "side": 32, "steps": 3, "sampler": "ddim", "guidance": 5}.items()
        ),
        lambda pipe: {"model": "another"},
        lambda pipe: edit(PAIR[0]),
        lambda pipe: edit(PAIR[1]),
        lambda pipe: edit("weights/model.safetensors"),
        other_weights,
        an_adapter,
        other_noise,
    ],
)
def test_all_that_it_depends_on_is_part_of_the_key(work, pipe, calls, change):
    measured(pipe)
    changes = change(pipe) or {}
    before = len(calls)
    assert not measured(pipe, **changes).remembered
    assert len(calls) > before
    assert measured(pipe, **changes).remembered


def test_an_adapters_strength_is_part_of_the_key(pipe):
    an_adapter(pipe)
    before = measuring._told_by_weights(pipe)
    assert measuring._told_by_weights(pipe) == before
    pipe.unet.set_adapters("default", 0.5)
    half = measuring._told_by_weights(pipe)
    pipe.unet.disable_adapters()
    assert len({before, half, measuring._told_by_weights(pipe)}) == 3


def test_the_settings_beside_a_lora_are_part_of_the_key(work, pipe):
    folder = Path("peft")
    folder.mkdir()
    lora = {name: dataclasses.replace(f, alpha=None) for name, f in fitting_lora(pipe.unet, 0, size=1.0).items()}
    subject = write(folder / "adapter_model.safetensors", lora, "peft")
    values = set()
    for alpha in (4, 16):
        (folder / "adapter_config.json").write_text(f'{{"r": 4, "lora_alpha": {alpha}}}')
        found = measure(pipe, subject, PAIR[1], prompt=PROMPT, settings=SETTINGS, folder=Path("weights"))
        assert not found.remembered
        values.add(found.value)
    assert len(values) == 2


def test_a_folder_that_cannot_be_written_to(work, pipe, calls, caplog):
    Path("taken").write_text("a file")
    memory = Memory(Path("taken"))
    found = measured(pipe, memory=memory)
    assert (found.remembered, found.pictures) == (False, None)
    assert found.png
    assert "remembered only until the end of this program" in caplog.text
    before = len(calls)
    assert measured(pipe, memory=memory) == dataclasses.replace(found, remembered=True, png=None)
    assert len(calls) == before


@pytest.mark.parametrize("caches", ["", "relative", None])
def test_where_the_command_line_remembers(monkeypatch, tmp_path, caches):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", caches) if caches is not None else monkeypatch.delenv("XDG_CACHE_HOME", False)
    assert measuring.memory_folder() == tmp_path / ".cache" / "est-lora"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert measuring.memory_folder() == tmp_path / "caches" / "est-lora"


# What it leaves behind


def state(pipe):
    """All of a pipe that measuring could change, and where the random numbers are."""
    modules = [
        module for part in pipe.components.values() if isinstance(part, torch.nn.Module) for module in part.modules()
    ]
    hooks = [list(vars(m)[name]) for m in modules for name in vars(m) if name.endswith("_hooks") and vars(m)[name]]
    weights = {
        (part, name): tensor.clone()
        for part in ("unet", "text_encoder", "vae")
        for name, tensor in getattr(pipe, part).state_dict().items()
    }
    kept = {
        "scheduler": (id(pipe.scheduler), dict(pipe.scheduler.config), pipe.scheduler.num_inference_steps),
        "config": dict(pipe.config),
        "bar": dict(vars(pipe).get("_progress_bar_config", {"none": 0})),
        "hooks": hooks,
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
    }
    return kept, weights


def raised_by(error, at):
    """Raises at a call of the UNet; and all calls take random numbers."""
    count = []

    def hook(module, args):
        count.append(None)
        random.random()
        np.random.rand()
        torch.rand(1)
        if len(count) == at:
            raise error

    return hook


@pytest.mark.parametrize("bar", [{"disable": True, "desc": "mine"}, None])
@pytest.mark.parametrize(
    ("error", "at", "expected"),
    [
        (None, 0, None),
        (RuntimeError("out of memory"), 1, EstLoraError),
        (RuntimeError("out of memory"), 2 * SETTINGS.steps, EstLoraError),
        (ZeroDivisionError(), 2, ZeroDivisionError),
        (KeyboardInterrupt(), SETTINGS.steps + 1, KeyboardInterrupt),
    ],
)
def test_all_is_as_before(work, pipe, error, at, expected, bar):
    del pipe._progress_bar_config
    if bar is not None:
        pipe.set_progress_bar_config(**bar)
    pipe.unet.register_forward_pre_hook(raised_by(error, at))
    before, weights = state(pipe)
    if expected is None:
        measured(pipe)
    else:
        with pytest.raises(expected):
            measured(pipe)
        assert not Memory(measuring.memory_folder())._table.read()
    after, weights_after = state(pipe)
    assert after == before
    assert weights.keys() == weights_after.keys()
    assert all(torch.equal(weights[name], weights_after[name]) for name in weights)


def test_its_progress_is_shown_as_the_pipes_is(work, pipe, capsys):
    pipe.set_progress_bar_config(ncols=60)
    measured(pipe)
    err = capsys.readouterr().err
    assert "probe 1 of 2: 100%" in err
    assert "probe 2 of 2: 100%" in err
    pipe.set_progress_bar_config(disable=True)
    measured(pipe, again=True)
    assert capsys.readouterr().err == ""


# What can't be done


def blacked_out(pipe):
    draws = type(pipe).__call__

    class Checked(type(pipe)):
        def __call__(self, *args, **kwargs):
            made = draws(self, *args, **kwargs)
            made.nsfw_content_detected = [True]
            return made

    pipe.__class__ = Checked


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda pipe: {"extractor": "dinno"}, "There is no extractor 'dinno': did you mean 'dino'"),
        (lambda pipe: {"extractor": "clip", "folder": None}, "is never fetched: name a folder"),
        (lambda pipe: {"folder": None}, "The DINO weights can't be fetched"),
        (lambda pipe: {"folder": Path("nowhere")}, "'nowhere' can't be read"),
        (
            lambda pipe: {"settings": dataclasses.replace(SETTINGS, sampler="eulr")},
            "There is no scheduler 'eulr': did you mean euler",
        ),
        (lambda pipe: Path(PAIR[1]).unlink(), "There is no file 'style.safetensors'"),
        (lambda pipe: Path(PAIR[0]).write_text("no LoRA"), "isn't a whole safetensors file"),
        (lambda pipe: pipe.unet.to("meta"), "weights of the unet aren't in memory: say which model it is"),
        (lambda pipe: delattr(pipe, "unet"), "has no UNet"),
        (blacked_out, "The picture with the subject alone was blacked out by the model's safety checker"),
    ],
)
def test_what_cannot_be_measured_costs_one_sentence(work, pipe, change, says):
    changes = change(pipe)
    changes = changes if isinstance(changes, dict) else {}
    with pytest.raises(EstLoraError) as raised:
        measured(pipe, **changes)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (measuring.memory_folder() / "probes").exists()


def test_an_image_to_image_pipeline_is_refused(work):
    with pytest.raises(
        EstLoraError, match=r"Img2ImgPipeline begins with a picture.*AutoPipelineForText2Image\.from_pipe"
    ):
        measured(stable_diffusion(image_to_image=True))


# The commands


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


@pytest.mark.parametrize("missing", ["weights", "library"])
def test_generate_goes_on_without_a_number(run, monkeypatch, missing):
    with monkeypatch.context() as patched:
        if missing == "library":
            patched.setitem(sys.modules, "huggingface_hub", None)
        code, _, err = run("generate", "--weights", None)
    assert (code, err.count("\n")) == (0, 1)
    assert err.startswith("est-lora: The style discrepancy can't be measured, and for beta 0.5 is taken: The ")
    assert "EST-LoRA beta" not in carried("out/00000-0.png")
    run("generate", "--beta", 0.5, "-o", "given")
    with Image.open("given/00000-0.png") as given, Image.open("out/00000-0.png") as taken:
        assert np.array_equal(given, taken)
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
