"""`est-lora generate` with models in one file, in the original naming."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from est_lora.cli import main
from est_lora.hosts.checkpoint import load_checkpoint, read_header
from tests.checkpoints import write_checkpoint
from tests.files import write
from tests.pipelines import SIZE, fitting_lora, stable_diffusion, stable_diffusion_xl

MAKERS = {"sd": stable_diffusion, "xl": lambda: stable_diffusion_xl(second_width=40)}


@pytest.fixture(scope="module", params=MAKERS)
def made(request, tmp_path_factory):
    """A folder with the model in both formats, its configurations alone, and two LoRAs."""
    return make(request.param, tmp_path_factory.mktemp("made"))


@pytest.fixture
def sd(tmp_path):
    return make("sd", tmp_path)


def make(name, folder):
    pipe = MAKERS[name]()
    pipe.save_pretrained(folder / "model")
    write_checkpoint(pipe, folder / "model.safetensors")
    shutil.copytree(folder / "model", folder / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    for seed, role in enumerate(("subject", "style")):
        write(folder / f"{role}.safetensors", fitting_lora(pipe.unet, seed))
    return folder


def generate(folder, capsys, *flags, out="out"):
    """Exit code, the pictures as arrays, and standard error."""
    files = [text for role in ("subject", "style") for text in (f"--{role}", str(folder / f"{role}.safetensors"))]
    request = ["--prompt", "a red star", "--steps", "3", "--size", str(SIZE), "--device", "cpu"]
    code = main(["generate", *files, *request, "-o", str(folder / out), *map(str, flags)])
    printed, err = capsys.readouterr()
    return code, [np.asarray(Image.open(path)) for path in printed.splitlines()], err


def test_one_file_draws_what_the_folder_draws(made):
    pipe = load_checkpoint(made / "model.safetensors", made / "configs", "cpu", torch.float32)
    folder = type(pipe).from_pretrained(made / "model")
    drawn = []
    for each in (pipe, folder):
        each.set_progress_bar_config(disable=True)
        request = {"num_inference_steps": 3, "height": SIZE, "width": SIZE, "output_type": "np"}
        drawn.append(each("a red star", generator=torch.Generator().manual_seed(3), **request).images)
    assert np.array_equal(*drawn)
    assert drawn[0].std() > 0.01


def test_fused_too(made, capsys):
    code, (one,), _ = generate(made, capsys, "--model", made / "model.safetensors", "--config", made / "configs")
    assert code == 0
    _, (other,), _ = generate(made, capsys, "--model", made / "model", out="folder")
    _, (subject,), _ = generate(made, capsys, "--model", made / "model", "--method", "subject", out="subject")
    assert np.array_equal(one, other)
    assert not np.array_equal(one, subject)


def test_weights_take_the_type_asked_for(made, tmp_path):
    half = {name: t.half() if t.is_floating_point() else t for name, t in load_file(made / "model.safetensors").items()}
    save_file(half, tmp_path / "half.safetensors")
    pipe = load_checkpoint(tmp_path / "half.safetensors", made / "configs", "cpu", torch.bfloat16)
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.bfloat16}


def test_content_tells_the_family(tmp_path, made):
    shutil.copy(made / "model.safetensors", tmp_path / "lora.safetensors")
    expected = json.loads((made / "model" / "model_index.json").read_text())["_class_name"]
    assert read_header(tmp_path / "lora.safetensors").pipeline == expected


class Bomb:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


def edited(path, *, drop=(), add=None):
    kept = {name: tensor for name, tensor in load_file(path).items() if not any(part in name for part in drop)}
    save_file({**kept, **(add or {})}, path)


CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
FLUX, SD3 = "model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "joint_blocks.0.x_block.attn.qkv.weight"
BAD_FILES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "text": lambda path: path.write_text("no model at all"),
    "empty": lambda path: path.write_bytes(b""),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Bomb(path.parent / "exploded"))),
    "torch pickle": lambda path: torch.save({"x": Bomb(path.parent / "exploded")}, path),
    "lora": lambda path: shutil.copy(path.with_name("subject.safetensors"), path),
    "flux": lambda path: save_file({FLUX: torch.ones(2)}, path),
    "sd3": lambda path: save_file({SD3: torch.ones(2)}, path),
    "vae": lambda path: shutil.copy(path.with_name("model") / "vae" / "diffusion_pytorch_model.safetensors", path),
    "original vae": lambda path: edited(path, drop=("model.diffusion_model", "cond_stage")),
    "diffusers unet": lambda path: shutil.copy(
        path.with_name("model") / "unet" / "diffusion_pytorch_model.safetensors", path
    ),
    "nothing known": lambda path: save_file({"x": torch.ones(2)}, path),
    "no text encoder": lambda path: edited(path, drop=("cond_stage",)),
    "no vae": lambda path: edited(path, drop=("first_stage",)),
    "inpainting": lambda path: edited(path, add={CONV_IN: torch.ones(32, 9, 3, 3)}),
    "refiner": lambda path: edited(path, add={"conditioner.embedders.0.model.text_projection": torch.ones(2)}),
    "a tensor missing": lambda path: edited(path, drop=("output_blocks.3.1.proj_in.weight",)),
    "text encoder damaged": lambda path: edited(path, drop=("layers.1.mlp.fc1.weight",)),
    "another width": lambda path: edited(path, add={CONV_IN: torch.ones(16, 4, 3, 3)}),
    "no kernel": lambda path: edited(path, add={CONV_IN: torch.ones(())}),
    "more layers": lambda path: edited(path, add={CONV_IN.replace("0.0.weight", "9.9.weight"): torch.ones(2)}),
    "missing": lambda path: path.rename(path.with_name("model2.safetensors")),
    "v prediction": lambda path: edited(path, add={"v_pred": torch.zeros(0)}),
}
SAYS = {
    "truncated": "isn't a whole safetensors file",
    "text": "isn't a whole safetensors file",
    "empty": "is an empty file",
    "pickle": "is a pickle, which can run code",
    "torch pickle": "is a pickle, which can run code",
    "lora": "is a LoRA, not a model: give it with --subject or --style",
    "flux": "is a Flux model",
    "sd3": "is a Stable Diffusion 3 model",
    "vae": "is a VAE alone",
    "original vae": "is a VAE alone",
    "diffusers unet": "has diffusers' names: give its folder",
    "nothing known": "holds no Stable Diffusion 1, 2 or XL model",
    "no text encoder": "has no known text encoder in it",
    "no vae": "has no VAE in it",
    "inpainting": "takes 9 channels",
    "refiner": "is the refiner",
    "a tensor missing": "lacks tensors that --config",
    "text encoder damaged": "lacks tensors that --config",
    "another width": "can't be loaded with --config",
    "no kernel": "isn't a kernel of a convolution",
    "more layers": "tensors, and --config",
    "missing": "did you mean 'model2.safetensors'",
    "v prediction": "has v prediction, and --config",
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_is_no_model_costs_one_sentence(sd, capsys, case):
    BAD_FILES[case](sd / "model.safetensors")
    assert_refused(sd, capsys, SAYS[case], "--model", sd / "model.safetensors", "--config", sd / "configs")
    assert not (sd / "exploded").exists()


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".bin"])
def test_no_pickle_is_read_whatever_its_name(sd, capsys, ending):
    model = sd / f"model{ending}"
    torch.save({"x": Bomb(sd / "exploded")}, model)
    assert_refused(sd, capsys, "is a pickle, which can run code", "--model", model, "--config", sd / "configs")
    assert not (sd / "exploded").exists()
    shutil.copy(sd / "model.safetensors", model)
    assert_refused(sd, capsys, "a name that ends with .safetensors", "--model", model, "--config", sd / "configs")


def test_config_must_be_a_folder_of_the_same_family(made, sd, capsys):
    xl = "XL" in read_header(made / "model.safetensors").pipeline
    model, configs = sd / "model.safetensors", (made if xl else sd) / "configs"
    if xl:
        assert_refused(sd, capsys, "is a Stable Diffusion 1 or 2 model, and", "--model", model, "--config", configs)
        model = made / "model.safetensors"
        assert_refused(sd, capsys, "is a Stable Diffusion XL model, and", "--model", model, "--config", sd / "configs")
    for folder, says in {
        sd / "nowhere": "There is no ",
        sd / "subject.safetensors": "no readable model_index.json",
        sd / "configs" / "unet": "no readable model_index.json",
    }.items():
        assert_refused(sd, capsys, says, "--model", model, "--config", folder)
    (configs / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert_refused(sd, capsys, "is a 'FluxPipeline'", "--model", sd / "model.safetensors", "--config", configs)


def test_an_incomplete_config_costs_one_sentence(sd, capsys):
    shutil.rmtree(sd / "configs" / "tokenizer")
    says = "can't be loaded with --config"
    assert_refused(sd, capsys, says, "--model", sd / "model.safetensors", "--config", sd / "configs")


def test_config_with_a_folder_costs_one_sentence(sd, capsys):
    assert_refused(sd, capsys, "leave --config out", "--model", sd / "model", "--config", sd / "configs")


def test_without_config_and_network_one_sentence_says_what_to_do(sd, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    says = "can't be fetched from the network: give --config FOLDER"
    assert_refused(sd, capsys, says, "--model", sd / "model.safetensors")


def test_without_config_diffusers_fetches_its_own(sd, capsys, monkeypatch):
    asked = []

    def fetch(name, **_):
        asked.append(name)
        return str(sd / "configs")

    monkeypatch.setattr("diffusers.loaders.single_file.snapshot_download", fetch)
    code, pictures, _ = generate(sd, capsys, "--model", sd / "model.safetensors")
    assert (code, len(pictures), len(asked)) == (0, 1, 1)
    assert asked[0].startswith("stable-diffusion-v1-5/")


def assert_refused(folder, capsys, says, *flags):
    code, pictures, err = generate(folder, capsys, *flags)
    assert (code, pictures) == (2, [])
    assert says in err
    assert err.count("\n") == 1, err
    assert err.startswith("est-lora: ")
    assert not (folder / "out").exists()
