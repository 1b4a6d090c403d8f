"""Extractors that can't be had: one sentence for all that can be wrong with a folder, and nothing is unpickled."""

from __future__ import annotations

import importlib
import json
import math
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from est_lora.discrepancy import NAMES, discrepancy, identity, open_extractor
from est_lora.errors import EstLoraError
from tests.extractors import change, look, picture, refusal

pytestmark = pytest.mark.usefixtures("no_network", "no_pickles")


@pytest.mark.parametrize("where", [None, "folder"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dinno", "There is no extractor 'dinno': did you mean 'dino'?"),
        ("x", "There is no extractor 'x': there are 'dino' and 'clip'."),
        ("", "There is no extractor '': there are 'dino' and 'clip'."),
        ("Dino", "There is no extractor 'Dino': did you mean 'dino'?"),
    ],
)
def test_no_such_extractor(dino, name, where, said):
    for call in (identity, lambda *args: open_extractor(args[0], folder=args[1], cache=None).__enter__()):
        with pytest.raises(EstLoraError) as raised:
            call(name, where and dino)
        assert str(raised.value) == said


def test_clip_needs_a_folder(no_network):
    said = "The extractor 'clip' is never fetched: name a folder that has its files"
    assert refusal("clip", None) == f"{said} (config.json, preprocessor_config.json, model.safetensors)."
    with pytest.raises(EstLoraError, match="is never fetched"):
        identity("clip", None)
    assert no_network == []


FILES = ["config.json", "preprocessor_config.json", "model.safetensors"]


@pytest.mark.parametrize("lacking", FILES)
def test_a_folder_that_lacks_a_file(folder, name, lacking):
    (folder / lacking).unlink()
    said = refusal(name, folder)
    rest = ", ".join(repr(file) for file in sorted(FILES) if file != lacking)
    assert f"{name}' lacks {lacking} of the extractor '{name}', it has {rest}: name a folder in " in said
    with pytest.raises(EstLoraError, match="lacks"):
        identity(name, folder)


def test_folders_that_are_none(tmp_path, name):
    assert f"lacks {' and '.join(FILES)} of" in refusal(name, tmp_path)
    assert "it has no files: name a folder" in refusal(name, tmp_path)
    told = f"can't be read as a folder with {' and '.join(FILES)} of the extractor '{name}': [Errno 2]"
    assert told in refusal(name, tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "[Errno 20] Not a directory" in refusal(name, tmp_path / "file")
    for number in range(7):
        (tmp_path / f"{number}.txt").write_text("")
    assert "it has '0.txt', '1.txt', '2.txt', '3.txt', '4.txt' and 3 more: name" in refusal(name, tmp_path)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "dino.pth", "clip.ckpt"])
def test_a_folder_that_has_only_a_pickle(folder, name, file):
    (folder / "model.safetensors").rename(folder / file)
    assert f"only '{file}', which is a pickle, which can run code when it is loaded: put" in refusal(name, folder)
    with pytest.raises(EstLoraError, match="is a pickle"):
        identity(name, folder)


class Dangerous:
    def __reduce__(self):
        return os.abort, ()


def test_a_pickle_beside_the_weights_is_left_alone(folder, name):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Dangerous()))
    assert len(look(name, folder, picture(1))) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"\0" * 99, b"caf\xe9", b"[" * 200_000, b"9" * 5000])
def test_a_config_that_is_no_json(folder, name, content):
    (folder / "config.json").write_bytes(content)
    assert "config.json' isn't JSON, download it again: " in refusal(name, folder)


@pytest.mark.parametrize(
    "content",
    [
        *([], None, 5, "x", {}, {"model_type": "dinov2"}, {"model_type": ["vit"]}, {"model_type": None}),
        {"architectures": ["ViTModel"]},
    ],
)
def test_a_config_of_another_kind(folder, name, content):
    (folder / "config.json").write_text(json.dumps(content))
    said = refusal(name, folder)
    assert f"config.json' isn't that of an extractor '{name}', as it has no " in said
    with pytest.raises(EstLoraError, match="isn't that of an extractor"):
        identity(name, folder)


def test_the_folder_of_the_other_extractor(made):
    wanted = {"dino": "'vit'", "clip": "'clip' or 'clip_vision_model'"}
    for name, other in (NAMES, NAMES[::-1]):
        told = f"isn't that of an extractor '{name}', as it has no 'model_type' {wanted[name]}: name a folder in tr"
        assert told in refusal(name, made[other][0])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"",
        lambda content: content[:7],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: b"PK\3\4" + content,
        lambda content: pickle.dumps(Dangerous()),
    ],
    ids=["empty", "7 bytes", "half", "one byte less", "one byte more", "huge header", "zip", "pickle"],
)
def test_weights_that_are_no_whole_file(folder, name, spoil):
    weights = folder / "model.safetensors"
    weights.write_bytes(spoil(weights.read_bytes()))
    assert "model.safetensors' isn't a whole safetensors file, delete it and get it again: " in refusal(name, folder)


def test_weights_in_a_folder_of_their_name(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    assert "lacks model.safetensors" in refusal(name, folder)


KEYS = {"dino": "layernorm.weight", "clip": "visual_projection.weight"}


def test_weights_that_are_too_few(folder, name):
    weights = load_file(folder / "model.safetensors")
    del weights[KEYS[name]]
    save_file(weights, folder / "model.safetensors")
    said = refusal(name, folder)
    assert f"doesn't fit the config.json beside it: it lacks '{KEYS[name]}'; get both again." in said


def test_weights_of_another_model(dino, clip):
    weights = [load_file(folder / "model.safetensors") for folder in (dino, clip)]
    for name, folder, others in zip(NAMES, (dino, clip), reversed(weights)):
        save_file(others, folder / "model.safetensors")
        said = refusal(name, folder)
        assert "doesn't fit the config.json beside it: it lacks '" in said
        assert " more; get both again." in said


def test_weights_of_fewer_layers_than_the_config_says(dino):
    change(dino / "config.json", num_hidden_layers=3)
    assert "doesn't fit the config.json beside it: it lacks '" in refusal("dino", dino)


def test_weights_of_another_shape(folder, name):
    weights = load_file(folder / "model.safetensors")
    weights[KEYS[name]] = weights[KEYS[name]][..., :-1].contiguous()
    save_file(weights, folder / "model.safetensors")
    assert f"The extractor '{name}' can't be loaded from " in refusal(name, folder)


def test_weights_that_are_not_finite(dino):
    weights = load_file(dino / "model.safetensors")
    save_file(weights | {"layernorm.weight": weights["layernorm.weight"] * math.nan}, dino / "model.safetensors")
    with pytest.raises(EstLoraError, match="all zero or not finite"):
        discrepancy(look("dino", dino, picture(1), picture(2)))


@pytest.mark.parametrize(
    "added",
    [
        {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoImageProcessor": "evil.Model"}},
        {"auto_map": {"AutoModel": "somebody/evil--evil.Model"}, "trust_remote_code": True, "_commit_hash": "main"},
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "dataset": "c4"}},
        {"attn_implementation": "somebody/evil", "_attn_implementation": "somebody/evil", "use_kernels": True},
        {"_attn_implementation_internal": "somebody/evil"},
        {"transformers_weights": "../evil.safetensors", "_name_or_path": "somebody/evil"},
        {"architectures": ["EvilModel"], "image_processor_type": "EvilProcessor", "processor_class": "EvilProcessor"},
        {"torch_dtype": "evil", "dtype": "evil", "backbone": "somebody/evil", "use_pretrained_backbone": True},
        {"output_attentions": True, "output_hidden_states": True, "return_dict": False, "torchscript": True},
    ],
)
def test_what_a_config_names_beyond_the_model_is_neither_fetched_nor_run(made, folder, name, added, no_network):
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    for file in ("config.json", "preprocessor_config.json"):
        change(folder / file, **added)
    assert torch.equal(look(name, folder, picture(1)), look(name, made[name][0], picture(1)))
    assert no_network == []


def test_other_files_of_the_folder_are_left_alone(made, folder, name, no_network):
    evil = {"base_model_name_or_path": "somebody/evil", "peft_type": "LORA", "image_processor": {"do_resize": False}}
    for file in (
        "adapter_config.json",
        "processor_config.json",
        "model.safetensors.index.json",
        "generation_config.json",
    ):
        (folder / file).write_text(json.dumps(evil))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Dangerous()))
    assert torch.equal(look(name, folder, picture(1)), look(name, made[name][0], picture(1)))
    assert no_network == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_size": "x"},
        {"hidden_size": -1},
        {"num_attention_heads": 0},
        {"hidden_act": "nosuch"},
        {"patch_size": 0},
    ],
)
def test_configs_that_make_no_model(dino, wrong):
    change(dino / "config.json", **wrong)
    assert "The extractor 'dino' can't be loaded from " in refusal("dino", dino)


@pytest.mark.parametrize("part", [None, 5, [], {}])
def test_a_whole_clip_without_its_image_encoder(clip, part):
    (clip / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": part}))
    assert "The extractor 'clip' can't be loaded from " in refusal("clip", clip)


@pytest.mark.parametrize(
    "preprocessing",
    [{"image_mean": "x"}, {"image_mean": [1, 2]}, {"size": {"x": 1}}, {"size": -1}],
)
def test_preprocessing_that_makes_no_sense(folder, name, preprocessing):
    change(folder / "preprocessor_config.json", **preprocessing)
    with pytest.raises(EstLoraError, match=f"^The extractor '{name}' can't (be loaded from|look at these pictures)"):
        look(name, folder, picture(1))


def test_preprocessing_that_does_not_fit_the_model(dino):
    change(dino / "preprocessor_config.json", size=48)
    with pytest.raises(EstLoraError, match="^The extractor 'dino' can't look at these pictures: .*48.*32"):
        look("dino", dino, picture(1))


@pytest.mark.parametrize("content", [b"", b"{", b"\0" * 99, b"caf\xe9"])
def test_a_processor_that_is_no_json(folder, name, content):
    (folder / "preprocessor_config.json").write_bytes(content)
    assert "preprocessor_config.json' isn't JSON, download it again: " in refusal(name, folder)


@pytest.mark.parametrize("device", ["nowhere", "cuda:99", "", "meta:x"])
def test_devices_that_are_not_there(made, name, device):
    assert refusal(name, made[name][0], device=device).startswith(f"The extractor '{name}' can't be loaded from ")


def test_no_pictures(made, name):
    with pytest.raises(EstLoraError, match=f"^The extractor '{name}' was given no pictures: give it one or more.$"):
        look(name, made[name][0])


def test_things_that_are_no_pictures(made, name):
    with pytest.raises(EstLoraError, match=f"^The extractor '{name}' can't look at these pictures: "):
        look(name, made[name][0], "picture.png")


@pytest.mark.parametrize(
    "error", [ImportError("No module named 'x'"), RuntimeError("operator x::nms does not exist\nx")]
)
def test_a_library_that_cannot_be_imported(made, monkeypatch, name, error):
    imported = importlib.import_module

    def fail(asked, *args):
        if asked == "transformers":
            raise error
        return imported(asked, *args)

    monkeypatch.setattr(importlib, "import_module", fail)
    why = str(error).partition("\n")[0]
    told = f"The extractor '{name}' needs transformers, which can't be imported ({why}): install it, or give beta"
    assert refusal(name, made[name][0]).startswith(told)
