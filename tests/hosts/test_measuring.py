"""Measuring a pair's style discrepancy in diffusers, from Python."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from est_lora.demo.model import BASE, STYLE_LORA, SUBJECT_LORA
from est_lora.demo.styles import SIZE
from est_lora.discrepancy import Memory, ProbeSettings
from est_lora.errors import EstLoraError
from est_lora.hosts import measuring
from est_lora.hosts.diffusers_loading import load_pipeline
from est_lora.hosts.measuring import measure, usual
from tests.files import write
from tests.hosts.probes import PAIR, PROMPT, SETTINGS, by_hand, edit, halves
from tests.pipelines import fitting_lora, stable_diffusion, stable_diffusion_xl

WORDS = ("mipo", "vitra style")


@pytest.fixture
def pipe():
    return stable_diffusion()


def measured(pipe, **changes):
    wishes = {"prompt": PROMPT, "settings": SETTINGS, "folder": Path("weights")}
    return measure(pipe, *PAIR, **{**wishes, **changes})


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
    assert usual(pipe) == dataclasses.replace(ProbeSettings.usual(SIZE), sampler="euler")
    found = measure(pipe, SUBJECT_LORA, STYLE_LORA, prompt="mipo creature, vitra style", folder=Path("weights"))
    assert halves(found.png)[0].shape == (SIZE, SIZE, 3)
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


def test_a_picture_that_goes_while_it_is_looked_for_costs_no_number(work, pipe, monkeypatch):
    first = measured(pipe)
    first.pictures.unlink()
    monkeypatch.setattr(Memory, "pictures", lambda self, key: first.pictures)
    assert measured(pipe) == dataclasses.replace(first, remembered=True, png=None, pictures=None)


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
