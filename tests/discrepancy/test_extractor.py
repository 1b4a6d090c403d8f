"""Extractors: the features that the libraries' own code gives, of the weights they say, and nothing left behind."""

from __future__ import annotations

import gc
import json
import logging
import os
import weakref

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from est_lora.discrepancy import discrepancy, identity, open_extractor
from est_lora.discrepancy import extractor as module
from est_lora.errors import EstLoraError
from tests.discrepancy.folders import (
    ARCHITECTURE,
    CONFIG,
    PREPROCESSING,
    change,
    clip_processor,
    look,
    picture,
    write_clip,
    write_dino,
)

pytestmark = pytest.mark.usefixtures("no_network", "no_pickles")
MODES = ["RGB", "RGBA", "L", "P", "1", "CMYK", "LA"]
SIZES = [(64, 64), (33, 90), (90, 33), (32, 32), (7, 5), (2, 2), (513, 511)]
LOOKS = [*((mode, (64, 64)) for mode in MODES), *(("RGB", size) for size in SIZES[1:])]


def plain_dino(model, image):
    """What the paper says, step by step: all blocks, the last norm, the class token."""
    from timm.data import create_transform, resolve_data_config

    transform = create_transform(**resolve_data_config(pretrained_cfg=PREPROCESSING), is_training=False)
    with torch.no_grad():
        patches = model.patch_embed(transform(image)[None])
        tokens = torch.cat([model.cls_token, patches], dim=1) + model.pos_embed
        for block in model.blocks:
            tokens = block(tokens)
        return model.norm(tokens)[0, 0]


def plain_clip(model, image):
    with torch.no_grad():
        return model(**clip_processor()(images=image, return_tensors="pt")).image_embeds[0]


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


def test_a_whole_clip_will_do(tmp_path):
    encoder = write_clip(tmp_path / "whole", whole=True)
    said = []
    listener = logging.Handler()
    listener.emit = said.append
    logging.getLogger("transformers").addHandler(listener)
    try:
        features = look("clip", tmp_path / "whole", picture(1))
    finally:
        logging.getLogger("transformers").removeHandler(listener)
    assert said == []  # of the text encoder's weights
    torch.testing.assert_close(features[0], plain_clip(encoder, picture(1)), rtol=1e-5, atol=1e-5)


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


def test_transformers_speaks_as_loud_as_before(made):
    import transformers

    before = transformers.logging.get_verbosity()
    try:
        for loudness in (logging.INFO, logging.WARNING):
            transformers.logging.set_verbosity(loudness)
            look("clip", made["clip"][0], picture(1))
            assert transformers.logging.get_verbosity() == loudness
    finally:
        transformers.logging.set_verbosity(before)


def models(name):
    """The models of a kind that are in memory, by their ids."""
    kind = {"dino": "VisionTransformer", "clip": "CLIPVisionModelWithProjection"}[name]
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

    def load(files, place):
        model = torch.nn.Linear(1, 1)
        calls.append(weakref.ref(model))
        return lambda picture: model.weight[0].detach()

    monkeypatch.setattr(module, "_dino", load)
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
    if name == "clip":
        change(folder / "preprocessor_config.json", do_resize=False)
        seen.add(identity(name, folder))
    assert len(seen) == 4 + (name == "clip")
    os.utime(config)
    (folder / "more.txt").write_text("")
    assert identity(name, folder) in seen


def test_an_identity_reads_no_weights(name, folder):
    (folder / "model.safetensors").write_bytes(b"\x80")
    assert identity(name, folder)


def test_the_published_weights_have_an_identity_of_their_own(no_network):
    assert identity("dino", None) == "dino@733b42a2"
    assert no_network == []


def test_a_config_and_a_model_of_full_size(tmp_path):
    """A config in the form that timm publishes them in, and a model of full size."""
    import timm

    published = {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "num_features": 384,
        "global_pool": "token",
        "pretrained_cfg": {
            "tag": "dino",
            "custom_load": False,
            "input_size": [3, 224, 224],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "crop_mode": "center",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        },
    }
    model = timm.create_model(ARCHITECTURE, num_classes=0)
    assert CONFIG.keys() - published.keys() == {"model_args"}
    (tmp_path / "config.json").write_text(json.dumps(published))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    image = Image.new("RGB", (512, 512), "teal")
    features = look("dino", tmp_path, image)
    assert features.shape == (1, 384)
    from torchvision import transforms

    prepare = transforms.Compose(
        [
            transforms.Resize(248, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    with torch.no_grad():
        expected = model.eval().forward_features(prepare(image)[None])[:, 0]
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
