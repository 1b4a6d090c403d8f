"""`est-lora generate` with models in diffusers' folder format."""

from __future__ import annotations

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from est_lora.cli import main
from est_lora.errors import EstLoraError
from est_lora.hosts.diffusers import fuse
from est_lora.hosts.diffusers_loading import set_scheduler
from tests.files import Factors, write
from tests.pipelines import SIZE, fitting_lora, stable_diffusion, stable_diffusion_xl


@pytest.fixture(params=[stable_diffusion, stable_diffusion_xl], ids=["sd", "xl"])
def arguments(request, tmp_path):
    pipe = request.param()
    pipe.save_pretrained(tmp_path / "model")
    for seed, role in enumerate(("subject", "style")):
        write(tmp_path / f"{role}.safetensors", fitting_lora(pipe.unet, seed))
    flags = {"--model": "model", "--subject": "subject.safetensors", "--style": "style.safetensors"}
    paths = [text for flag, name in flags.items() for text in (flag, str(tmp_path / name))]
    return ["generate", *paths, "--prompt", "a star", "--steps", "2", "--size", str(SIZE), "-o", str(tmp_path / "out")]


def test_a_picture_is_made(arguments, tmp_path, capsys):
    assert (
        main([*arguments, "--negative", "red", "--scheduler", "euler", "--dtype", "bfloat16", "--device", "cpu"]) == 0
    )
    (path,) = capsys.readouterr().out.split()
    assert path == str(tmp_path / "out" / "00000-0.png")
    with Image.open(path) as picture:
        assert picture.size == (SIZE, SIZE)


def test_a_model_of_pickles_is_refused(arguments, tmp_path, capsys):
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "can't be loaded" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_half_a_download_is_refused(arguments, tmp_path, capsys, part):
    (weights,) = (tmp_path / "model" / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "can't be loaded" in err


def test_a_scheduler_takes_over_nothing_of_another():
    pipe = stable_diffusion()
    own = {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"}
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **own)
    set_scheduler(pipe, "dpm++2m")
    assert (pipe.scheduler.config.use_karras_sigmas, pipe.scheduler.config.algorithm_type) == (False, "dpmsolver++")
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, use_exponential_sigmas=True)
    set_scheduler(pipe, "dpm++2m-karras")
    assert pipe.scheduler.config.use_karras_sigmas


@pytest.mark.parametrize(
    ("own", "name", "says"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(), "euler", "needs its own FlowMatchEulerDiscreteScheduler"),
        (diffusers.EDMEulerScheduler(), "ddim", "needs its own EDMEulerScheduler"),
        (diffusers.DDIMScheduler(num_train_timesteps=10), "lcm", "'lcm' can't run this model"),
        (diffusers.DDPMScheduler(beta_schedule="sigmoid"), "euler", "'euler' can't run this model"),
        (diffusers.DDIMScheduler(prediction_type="sample"), "euler-a", "which has sample prediction"),
    ],
)
def test_a_scheduler_that_does_not_suit_the_model_is_refused(own, name, says):
    pipe = stable_diffusion()
    pipe.scheduler = own
    with pytest.raises(EstLoraError, match=says):
        set_scheduler(pipe, name)
    assert pipe.scheduler is own


def test_layers_that_the_model_lacks_are_named(tmp_path, caplog):
    pipe = stable_diffusion()
    lora = fitting_lora(pipe.unet, 1)
    first = next(iter(lora.values()))
    lora["down_blocks.0.attentions.7.proj_in"] = Factors(first.down.clone(), first.up.clone())
    files = [write(tmp_path / f"{n}.safetensors", lora) for n in "ab"]
    with fuse(pipe, *files):
        assert "left out: 1, e.g. down_blocks.0.attentions.7.proj_in" in caplog.text
