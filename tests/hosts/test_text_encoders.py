"""The files' text-encoder parts on real pipelines."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from est_lora.errors import EstLoraError
from est_lora.hosts.diffusers import fuse
from tests.files import write
from tests.pipelines import SIZE, fitting_lora, stable_diffusion, stable_diffusion_xl

PREFIXES = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


@pytest.fixture(scope="module", params=[stable_diffusion, stable_diffusion_xl], ids=["sd", "xl"])
def pipe(request):
    return request.param()


def encoders(pipe):
    return {part: getattr(pipe, part) for part in PREFIXES if getattr(pipe, part, None) is not None}


def projections(encoder):
    return {name: m for name, m in encoder.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in name}


def file_for(pipe, path, seed, unet=True):
    """A kohya file for the UNet and for every text encoder there is."""
    write(path, fitting_lora(pipe.unet, seed))
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()} if unet else {}
    generator = torch.Generator().manual_seed(100 + seed)
    for part, encoder in encoders(pipe).items():
        prefix = PREFIXES[part] if len(encoders(pipe)) > 1 else "lora_te_"
        for name, module in projections(encoder).items():
            stem = prefix + ("text_model." + name.removeprefix("text_model.")).replace(".", "_")
            out, inputs = module.weight.shape
            tensors[f"{stem}.lora_down.weight"] = torch.randn(4, inputs, generator=generator) / inputs**0.5
            tensors[f"{stem}.lora_up.weight"] = torch.randn(out, 4, generator=generator) * 0.3
            tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)
    return path


@pytest.fixture
def files(pipe, tmp_path):
    return [file_for(pipe, tmp_path / f"{role}.safetensors", seed) for seed, role in enumerate(("subject", "style"), 1)]


def picture(pipe):
    request = {"num_inference_steps": 3, "height": SIZE, "width": SIZE, "output_type": "np"}
    return pipe("a red star", generator=torch.Generator().manual_seed(0), **request).images[0]


def state(pipe):
    digest = hashlib.sha256()
    count = 0
    for encoder in encoders(pipe).values():
        for name, tensor in sorted(encoder.state_dict().items()):
            digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
        count += sum(len(module._forward_hooks) for module in encoder.modules())
    return digest.hexdigest(), count


def merged(pipe, files, strengths):
    """The picture with the text-encoder parts of `files` merged into the weights by hand, and no fusion of them."""
    originals = []
    for path, strength in zip(files, strengths):
        tensors = load_file(path)
        for part, encoder in encoders(pipe).items():
            prefix = PREFIXES[part] if len(encoders(pipe)) > 1 else "lora_te_"
            for name, module in projections(encoder).items():
                stem = prefix + ("text_model." + name.removeprefix("text_model.")).replace(".", "_")
                originals.append((module, module.weight.data))
                update = tensors[f"{stem}.lora_up.weight"] @ tensors[f"{stem}.lora_down.weight"] * (2.0 / 4)
                module.weight.data = module.weight.data + strength * update
    try:
        with fuse(pipe, *files, subject_te=0, style_te=0):
            return picture(pipe)
    finally:
        for module, weight in reversed(originals):
            module.weight.data = weight


def test_a_file_with_its_text_encoder_part_equals_diffusers_own_loading(pipe, files):
    with fuse(pipe, *files, method="subject"):
        ours = picture(pipe)
    with fuse(pipe, *files, method="subject", subject_te=0):
        without = picture(pipe)
    assert np.abs(ours - without).max() > 0.02, "the text-encoder part of this test does nothing"
    try:
        pipe.load_lora_weights(files[0], adapter_name="subject")
        theirs = picture(pipe)
    finally:
        pipe.unload_lora_weights()
    np.testing.assert_allclose(ours, theirs, atol=3e-4)


@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.5, -1.5), (0.0, 1.0)])
def test_both_parts_are_added_at_their_strengths(pipe, files, strengths):
    expected = merged(pipe, files, strengths)
    with fuse(pipe, *files, subject_te=strengths[0], style_te=strengths[1]):
        np.testing.assert_allclose(picture(pipe), expected, atol=3e-4)


def test_the_encoders_are_byte_for_byte_as_before(pipe, files):
    before, plain = state(pipe), picture(pipe)
    with fuse(pipe, *files):
        assert state(pipe)[1] > before[1]
        picture(pipe)
    assert state(pipe) == before
    with pytest.raises(RuntimeError), fuse(pipe, *files):
        raise RuntimeError("in the block")
    assert state(pipe) == before
    assert np.array_equal(picture(pipe), plain)


def test_a_users_own_text_encoder_adapter_survives(pipe, files, tmp_path):
    third = file_for(pipe, tmp_path / "third.safetensors", 3)
    try:
        pipe.load_lora_weights(third, adapter_name="third")
        with_third = picture(pipe)
        with fuse(pipe, *files, method="sum"):
            ours = picture(pipe)
        assert np.array_equal(picture(pipe), with_third)
        for name, path in zip(("subject", "style"), files):
            pipe.load_lora_weights(path, adapter_name=name)
        pipe.set_adapters(["third", "subject", "style"])
        theirs = picture(pipe)
    finally:
        pipe.unload_lora_weights()
    np.testing.assert_allclose(ours, theirs, atol=3e-4)


def test_layers_of_an_encoder_that_is_not_there_are_named(tmp_path, caplog):
    xl, sd = stable_diffusion_xl(), stable_diffusion()
    file = file_for(xl, tmp_path / "a.safetensors", 1)
    extra = {key: tensor for key, tensor in load_file(file).items() if key.startswith("lora_te2_")}
    both = {key: tensor.clone() for key, tensor in load_file(file_for(sd, tmp_path / "b.safetensors", 2)).items()}
    save_file(both | extra, tmp_path / "b.safetensors")
    with fuse(sd, tmp_path / "b.safetensors", tmp_path / "b.safetensors"):
        assert f"{len(extra) // 3} layers of the files are for a text_encoder_2" in caplog.text


def test_a_wrong_shape_in_an_encoder_attaches_nothing(tmp_path):
    sd = stable_diffusion()
    path = file_for(sd, tmp_path / "a.safetensors", 1)
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    key = "lora_te_text_model_encoder_layers_1_mlp_fc1.lora_down.weight"
    tensors[key] = torch.randn(4, 7)
    save_file(tensors, path)
    before = state(sd)
    says = "doesn't fit this model: its update of text_model.encoder.layers.1.mlp.fc1"
    with pytest.raises(EstLoraError, match=says), fuse(sd, path, path):
        pass
    assert state(sd) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in sd.unet.modules())


@pytest.mark.parametrize("case", ["dora", "dora-by-input", "loha", "oft", "full"])
def test_every_kind_acts_in_the_encoders_too(pipe, tmp_path, case):
    kinds = pytest.importorskip("tests.kinds", reason="no lycoris-lora to make the kinds")
    path, tensors, changed = write(tmp_path / "a.safetensors", fitting_lora(pipe.unet, 1)), {}, {}
    for part, encoder in encoders(pipe).items():
        prefix = PREFIXES[part] if len(encoders(pipe)) > 1 else "lora_te_"
        for name, module in projections(encoder).items():
            changed[part, name] = kinds.by_lycoris(case, module, size=0.2 if case == "oft" else 0.7)
            stem = prefix + ("text_model." + name.removeprefix("text_model.")).replace(".", "_")
            tensors |= {f"{stem}.{key}": tensor for key, tensor in changed[part, name].saved.items()}
    save_file(tensors | {key: tensor.clone() for key, tensor in load_file(path).items()}, path)
    before = state(pipe)
    with fuse(pipe, path, path, method="subject") as session:
        assert session.remarks == []
        ours = picture(pipe)
    with fuse(pipe, path, path, method="subject", subject_te=0):
        without = picture(pipe)
        originals = []
        for (part, name), layer in changed.items():
            module = encoders(pipe)[part].get_submodule(name)
            originals.append((module, module.weight.data, module.bias.data))
            module.weight.data, module.bias.data = layer.weight.float(), layer.bias.detach()
        theirs = picture(pipe)
        for module, weight, bias in originals:
            module.weight.data, module.bias.data = weight, bias
    assert np.abs(ours - without).max() > 0.01, "the text-encoder part of this test does nothing"
    np.testing.assert_allclose(ours, theirs, atol=3e-4)
    assert state(pipe) == before
