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
from tests.discrepancy.folders import ARCHITECTURE, PREPROCESSING, SMALLER, change, look, picture, refusal

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


FILES = {"dino": ["config.json", "model.safetensors"]}
FILES["clip"] = ["config.json", "preprocessor_config.json", "model.safetensors"]


@pytest.mark.parametrize(("name", "lacking"), [(name, file) for name in NAMES for file in FILES[name]])
def test_a_folder_that_lacks_a_file(folder, name, lacking):
    (folder / lacking).unlink()
    said = refusal(name, folder)
    rest = ", ".join(repr(file) for file in sorted(FILES[name]) if file != lacking)
    assert f"{name}' lacks {lacking} of the extractor '{name}', it has {rest}: name a folder in " in said
    with pytest.raises(EstLoraError, match="lacks"):
        identity(name, folder)


def test_folders_that_are_none(tmp_path, name):
    assert f"lacks {' and '.join(FILES[name])} of" in refusal(name, tmp_path)
    assert "it has no files: name a folder" in refusal(name, tmp_path)
    told = f"can't be read as a folder with {' and '.join(FILES[name])} of the extractor '{name}': [Errno 2]"
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
        *([], None, 5, "x", {}, {"model_type": "vit"}, {"model_type": ["clip"]}, {"architecture": ARCHITECTURE}),
        *({"architecture": 5, "pretrained_cfg": {}}, {"architecture": ARCHITECTURE, "pretrained_cfg": []}),
    ],
)
def test_a_config_of_another_kind(folder, name, content):
    (folder / "config.json").write_text(json.dumps(content))
    said = refusal(name, folder)
    assert f"config.json' isn't that of an extractor '{name}', as it has no " in said
    with pytest.raises(EstLoraError, match="isn't that of an extractor"):
        identity(name, folder)


def test_the_folder_of_the_other_extractor(made):
    assert "lacks preprocessor_config.json of the extractor 'clip'" in refusal("clip", made["dino"][0])
    said = (
        "isn't that of an extractor 'dino', as it has no 'architecture' and 'pretrained_cfg': name a folder in timm's"
    )
    assert said in refusal("dino", made["clip"][0])


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


KEYS = {"dino": "norm.weight", "clip": "visual_projection.weight"}


def test_weights_that_are_too_few(folder, name):
    weights = load_file(folder / "model.safetensors")
    del weights[KEYS[name]]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    said = refusal(name, folder)
    assert f"doesn't fit the config.json beside it: it lacks '{KEYS[name]}'; get both again." in said


def test_weights_of_another_model(dino, clip):
    weights = load_file(dino / "model.safetensors")
    save_file(weights | {"head.weight": torch.ones(1)}, dino / "model.safetensors")
    assert "it has 'head.weight' too much; get both again." in refusal("dino", dino)
    save_file({f"model.{key}": weight for key, weight in weights.items()}, dino / "model.safetensors")
    assert f"it lacks 'cls_token' and {2 * len(weights) - 1} more; get both again." in refusal("dino", dino)
    save_file(load_file(dino / "model.safetensors"), clip / "model.safetensors", {"format": "pt"})
    assert " more; get both again." in refusal("clip", clip)


def test_weights_of_another_shape(folder, name):
    weights = load_file(folder / "model.safetensors")
    weights[KEYS[name]] = weights[KEYS[name]][..., :-1].contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    said = refusal(name, folder)
    assert "doesn't fit the config.json beside it: it has 'norm.weight' of another" in said or name == "clip"
    assert "can't be loaded from" in said or name == "dino"


def test_weights_that_are_not_finite(dino):
    weights = load_file(dino / "model.safetensors")
    save_file(weights | {"norm.weight": weights["norm.weight"] * math.nan}, dino / "model.safetensors")
    with pytest.raises(EstLoraError, match="all zero or not finite"):
        discrepancy(look("dino", dino, picture(1), picture(2)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("checkpoint_path", "x.pth"), ("pretrained", True), ("pretrained_cfg", {}), ("num_classes", 5)),
        *(("scriptable", True), ("pretrained_strict", False), ("model_name", "resnet18")),
    ],
)
def test_a_config_may_not_load_other_files(dino, key, value):
    change(dino / "config.json", model_args=SMALLER | {key: value})
    assert f"The 'model_args' in config.json can't set '{key}': take it out." in refusal("dino", dino)


@pytest.mark.parametrize("value", [5, "x", [1]])
def test_model_args_of_another_kind(dino, value):
    change(dino / "config.json", model_args=value)
    assert "The 'model_args' in config.json can't be " in refusal("dino", dino)


@pytest.mark.parametrize("value", [{"nosuch": 1}, {"embed_dim": -1}, {"embed_dim": "x"}, {"depth": "2"}])
def test_model_args_that_make_no_model(dino, value):
    change(dino / "config.json", model_args=value)
    assert "The extractor 'dino' can't be loaded from " in refusal("dino", dino)


@pytest.mark.parametrize("name", ["nosuch", "hf-hub:timm/vit_small_patch16_224.dino", "local-dir:/tmp", "", "../x"])
def test_architectures_that_timm_does_not_have(dino, name, no_network):
    change(dino / "config.json", architecture=name)
    said = refusal("dino", dino)
    assert f" has no model {name!r}: install a newer one." in said
    assert no_network == []


def test_an_architecture_without_a_class_token(dino):
    change(dino / "config.json", architecture="resnet10t", model_args={})
    assert "is of 'resnet10t', which has no class token: name a folder with a vision" in refusal("dino", dino)


@pytest.mark.parametrize(
    "preprocessing", [{"mean": "x"}, {"mean": [1, 2]}, {"interpolation": "nosuch"}, {"input_size": 5}, {"crop_pct": -1}]
)
def test_preprocessing_that_makes_no_sense(dino, preprocessing):
    change(dino / "config.json", pretrained_cfg=PREPROCESSING | preprocessing)
    with pytest.raises(EstLoraError, match="^The extractor 'dino' can't (be loaded from|look at these pictures)"):
        look("dino", dino, picture(1))


def test_preprocessing_that_does_not_fit_the_model(dino):
    change(dino / "config.json", pretrained_cfg=PREPROCESSING | {"input_size": [3, 48, 48]})
    with pytest.raises(EstLoraError, match="^The extractor 'dino' can't look at these pictures: .*48.*32"):
        look("dino", dino, picture(1))


@pytest.mark.parametrize("content", ["{", "[]", '{"size": {"x": 1}}'])
def test_a_processor_that_makes_no_sense(clip, content):
    (clip / "preprocessor_config.json").write_text(content)
    with pytest.raises(EstLoraError, match="^The extractor 'clip' can't (be loaded from|look at these pictures)"):
        look("clip", clip, picture(1))


@pytest.mark.parametrize("device", ["nowhere", "cuda:99", "", "meta:x"])
def test_devices_that_are_not_there(made, name, device):
    assert refusal(name, made[name][0], device=device).startswith(f"The extractor '{name}' can't be loaded from ")


def test_no_pictures(made, name):
    with pytest.raises(EstLoraError, match=f"^The extractor '{name}' was given no pictures: give it one or more.$"):
        look(name, made[name][0])


def test_things_that_are_no_pictures(made, name):
    with pytest.raises(EstLoraError, match=f"^The extractor '{name}' can't look at these pictures: "):
        look(name, made[name][0], "picture.png")


@pytest.mark.parametrize(("name", "library"), [("dino", "timm"), ("dino", "timm.data"), ("clip", "transformers")])
@pytest.mark.parametrize(
    "error", [ImportError("No module named 'x'"), RuntimeError("operator x::nms does not exist\nx")]
)
def test_a_library_that_cannot_be_imported(made, monkeypatch, name, library, error):
    imported = importlib.import_module

    def fail(asked):
        if asked == library:
            raise error
        return imported(asked)

    monkeypatch.setattr(importlib, "import_module", fail)
    why = str(error).partition("\n")[0]
    package = library.partition(".")[0]
    told = f"The extractor '{name}' needs {package}, which can't be imported ({why}): install it, or give beta"
    assert refusal(name, made[name][0]).startswith(told)
