"""Extractors: the features that the libraries' own code gives, of the weights they say, and nothing left behind."""

from __future__ import annotations

import gc
import json
import logging
import os
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from est_lora.discrepancy import discrepancy, identity, open_extractor
from est_lora.discrepancy import extractor as module
from est_lora.errors import EstLoraError
from tests.extractors import (
    PUBLISHED,
    change,
    look,
    picture,
    processor,
    write_clip,
    write_dino,
)

pytestmark = pytest.mark.usefixtures("no_network", "no_pickles")
MODES = ["RGB", "RGBA", "L", "P", "1", "CMYK", "LA"]
SIZES = [(64, 64), (33, 90), (90, 33), (32, 32), (7, 5), (2, 2), (513, 511)]
LOOKS = [*((mode, (64, 64)) for mode in MODES), *(("RGB", size) for size in SIZES[1:])]


def plain_dino(model, image):
    with torch.no_grad():
        return model(**processor("dino")(images=image, return_tensors="pt")).last_hidden_state[0, 0]


def plain_clip(model, image):
    with torch.no_grad():
        return model(**processor("clip")(images=image, return_tensors="pt")).image_embeds[0]


PLAIN = {"dino": plain_dino, "clip": plain_clip}
WIDTH = {"dino": 48, "clip": 16}


@pytest.mark.parametrize(("mode", "size"), LOOKS)
def test_features_are_those_of_the_plain_computation(made, name, mode, size):
    folder, model = made[name]
    pictures = [picture(1, mode, size), picture(2, mode, size)]
    features = look(name, folder, *pictures)
    assert (features.shape, features.dtype, features.device.type) == ((2, WIDTH[name]), torch.float32, "cpu")
    assert not features.requires_grad
    expected = torch.stack([PLAIN[name](model, each.convert("RGB")) for each in pictures])
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    by_hand = 1 - torch.nn.functional.cosine_similarity(*expected.double(), dim=0)
    assert discrepancy(features) == pytest.approx(float(by_hand), abs=1e-6)
    if size == (64, 64):
        assert discrepancy(features) > 1e-4  # else all this proves little


def test_a_picture_of_16_bits(made, name):
    folder, _ = made[name]
    assert torch.equal(look(name, folder, picture(1, "I;16")), look(name, folder, picture(1, "L")))


def test_a_picture_is_left_as_it_is(made, name):
    image = picture(1, "RGBA", (40, 30))
    before = image.tobytes()
    look(name, made[name][0], image)
    assert (image.mode, image.size, image.tobytes()) == ("RGBA", (40, 30), before)


def test_the_same_picture_has_no_discrepancy_and_the_order_is_no_matter(made, name):
    a, b = picture(1), picture(2)
    with open_extractor(name, folder=made[name][0], cache=None) as extractor:
        assert discrepancy(extractor.features([a, a.copy()])) < 1e-12
        there, back = extractor.features([a, b]), extractor.features((b, a))
        assert torch.equal(there, back.flip(0))
        assert torch.equal(extractor.features([a]), there[:1])
    assert discrepancy(there) == discrepancy(back)


@pytest.fixture
def said():
    """What transformers says."""
    records = []
    listener = logging.Handler()
    listener.emit = records.append
    logging.getLogger("transformers").addHandler(listener)
    yield records
    logging.getLogger("transformers").removeHandler(listener)


def test_a_whole_clip_will_do(tmp_path, said):
    encoder = write_clip(tmp_path / "whole", whole=True)
    said.clear()
    features = look("clip", tmp_path / "whole", picture(1))
    assert said == []  # of the text encoder's weights
    torch.testing.assert_close(features[0], plain_clip(encoder, picture(1)), rtol=1e-5, atol=1e-5)


def test_weights_of_a_pooler_are_passed_over_in_silence(made, dino, said):
    weights = load_file(dino / "model.safetensors")
    assert "pooler.dense.weight" in weights
    features = look("dino", dino, picture(1))
    assert said == []
    save_file({key: weight for key, weight in weights.items() if "pooler" not in key}, dino / "model.safetensors")
    assert torch.equal(look("dino", dino, picture(1)), features)


def test_weights_of_half_precision_are_computed_with_in_full(tmp_path):
    model = write_dino(tmp_path, torch.float16)
    torch.testing.assert_close(look("dino", tmp_path, picture(1))[0], plain_dino(model, picture(1)))


def test_what_the_host_has_switched_on_is_no_matter(made, name):
    expected = look(name, made[name][0], picture(1))
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        features = look(name, made[name][0], picture(1))
    assert torch.equal(features, expected)
    assert not features.requires_grad


def test_a_folder_needs_no_network(made, name, no_network):
    look(name, made[name][0], picture(1))
    assert no_network == []


def test_transformers_speaks_as_loud_as_before(made, name):
    import transformers

    before = transformers.logging.get_verbosity()
    try:
        for loudness in (logging.INFO, logging.WARNING):
            transformers.logging.set_verbosity(loudness)
            look(name, made[name][0], picture(1))
            assert transformers.logging.get_verbosity() == loudness
    finally:
        transformers.logging.set_verbosity(before)


def models(name):
    """The models of a kind that are in memory, by their ids."""
    kind = {"dino": "ViTModel", "clip": "CLIPVisionModelWithProjection"}[name]
    gc.collect()
    return {id(each): weakref.ref(each) for each in gc.get_objects() if type(each).__name__ == kind}


@pytest.mark.parametrize("raises", [False, True])
def test_nothing_is_left_after_the_block(folder, name, raises):
    before = models(name)
    try:
        with open_extractor(name, folder=folder, cache=None) as extractor:
            extractor.features([picture(1)])
            (model,) = [reference for key, reference in models(name).items() if key not in before]
            if raises:
                raise RuntimeError
    except RuntimeError:
        assert raises
    assert model() is None  # though `extractor` still has a name
    assert models(name).keys() == before.keys()
    with pytest.raises(EstLoraError, match=f"^The extractor '{name}' is closed: open it anew.$"):
        extractor.features([picture(1)])


@pytest.mark.parametrize("device", ["cpu", "cuda", torch.device("cuda", 1)])
def test_the_devices_memory_is_given_back(dino, monkeypatch, device):
    calls = []

    def load(name, files, place):
        model = torch.nn.Linear(1, 1)
        calls.append(weakref.ref(model))
        return lambda picture: model.weight[0].detach()

    monkeypatch.setattr(module, "_load", load)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(calls[0]()))
    with open_extractor("dino", folder=dino, cache=None, device=device) as extractor:
        assert len(extractor.features([picture(1)])) == 1
        assert len(calls) == 1
    assert calls[1:] == [None] * (torch.device(device).type == "cuda")  # by then the model is gone


def test_an_identity_tells_weights_apart(made, name, folder):
    first = identity(name, folder)
    assert first.startswith(f"{name}@")
    assert len(first) == len(name) + 13
    assert identity(name, folder) == identity(name, folder.parent / ".." / folder.parent.name / name) == first
    with open_extractor(name, folder=folder, cache=None) as extractor:
        assert (extractor.name, extractor.identity) == (name, first)

    seen = {first}
    weights, config = folder / "model.safetensors", folder / "config.json"
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    config.write_text(config.read_text() + " ")
    seen.add(identity(name, folder))
    weights.write_bytes(weights.read_bytes() + b" ")
    os.utime(weights, ns=times)
    seen.add(identity(name, folder))
    os.utime(weights, ns=(times[0], times[1] + 1000))
    seen.add(identity(name, folder))
    change(folder / "preprocessor_config.json", do_resize=False)
    seen.add(identity(name, folder))
    assert len(seen) == 5
    os.utime(config)
    (folder / "more.txt").write_text("")
    assert identity(name, folder) in seen


def test_an_identity_reads_no_weights(name, folder):
    (folder / "model.safetensors").write_bytes(b"\x80")
    assert identity(name, folder)


def test_the_published_weights_have_an_identity_of_their_own(no_network):
    assert identity("dino", None) == "dino@a7a4d161"
    assert no_network == []


def by_hand(weights, pixels, heads, epsilon):
    """What the paper says, step by step, of the published names: all blocks, the last norm, the class token."""
    act = torch.nn.functional

    def linear(x, name):
        return act.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x, name):
        return act.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], epsilon)

    patch = (weights[f"embeddings.patch_embeddings.projection.{part}"] for part in ("weight", "bias"))
    kernel, bias = patch
    patches = act.conv2d(pixels[None], kernel, bias, stride=kernel.shape[-1]).flatten(2).mT
    tokens = torch.cat([weights["embeddings.cls_token"], patches], dim=1) + weights["embeddings.position_embeddings"]
    for layer in (f"encoder.layer.{number}" for number in range(99)):
        if f"{layer}.layernorm_before.weight" not in weights:
            break
        x = norm(tokens, f"{layer}.layernorm_before")
        query, key, value = (
            linear(x, f"{layer}.attention.attention.{part}").unflatten(2, (heads, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        looked = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1) @ value
        tokens = tokens + linear(looked.transpose(1, 2).flatten(2), f"{layer}.attention.output.dense")
        x = act.gelu(linear(norm(tokens, f"{layer}.layernorm_after"), f"{layer}.intermediate.dense"))
        tokens = tokens + linear(x, f"{layer}.output.dense")
    return norm(tokens, "layernorm")[0, 0]


def write_published(folder):
    """The published files, with random weights by the published names."""
    config = PUBLISHED["config.json"]
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.position_embeddings": (1, 197, width),
        "embeddings.patch_embeddings.projection": (width, 3, 16, 16),
        "layernorm": (width,),
        "pooler.dense": (width, width),
    }
    for layer in (f"encoder.layer.{number}" for number in range(config["num_hidden_layers"])):
        shapes |= {f"{layer}.attention.attention.{part}": (width, width) for part in ("query", "key", "value")}
        shapes |= {f"{layer}.attention.output.dense": (width, width), f"{layer}.intermediate.dense": (inner, width)}
        shapes |= {f"{layer}.output.dense": (width, inner)}
        shapes |= {f"{layer}.layernorm_{place}": (width,) for place in ("before", "after")}
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for name, shape in shapes.items():
        single = name.startswith("embeddings.") and "projection" not in name
        weights[name if single else f"{name}.weight"] = 0.05 * torch.randn(shape, generator=generator)
        if not single:
            weights[f"{name}.bias"] = 0.05 * torch.randn(shape[:1], generator=generator)
        if "layernorm" in name:
            weights[f"{name}.weight"] += 1
    save_file(weights, folder / "model.safetensors")
    for file, content in PUBLISHED.items():
        (folder / file).write_text(json.dumps(content))
    return weights


def test_files_as_the_published_ones(tmp_path):
    weights = write_published(tmp_path)
    assert len(weights) == 200
    features = look("dino", tmp_path, Image.new("RGB", (512, 512), "teal"), picture(1, size=(224, 224)))
    assert features.shape == (2, 384)
    mean, std = (torch.tensor(PUBLISHED["preprocessor_config.json"][key]) for key in ("image_mean", "image_std"))
    for row, image in zip(features, [Image.new("RGB", (224, 224), "teal"), picture(1, size=(224, 224))]):
        pixels = (torch.from_numpy(np.array(image)) / 255 - mean) / std
        torch.testing.assert_close(row, by_hand(weights, pixels.permute(2, 0, 1), 6, 1e-12), rtol=1e-4, atol=1e-4)
