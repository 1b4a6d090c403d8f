"""The kinds of the LyCORIS family against its own implementation."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from est_lora.config import FusionConfig
from est_lora.errors import EstLoraError
from est_lora.fusion import FusionSession
from est_lora.gate import FusionPlan
from est_lora.lora import LayerId, LoraFile
from tests.files import ATTENTION_LAYERS, CONV, random_lora, write

modules = pytest.importorskip("lycoris.modules", reason="no lycoris-lora to hold the kinds against")
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule

LINEAR, PROJECTION = ATTENTION_LAYERS[0], "mid_block.attentions.0.proj_in"
LAYERS = {
    LINEAR: nn.Linear(24, 32),
    CONV: nn.Conv2d(24, 32, 3, stride=2, padding=1),
    PROJECTION: nn.Conv2d(24, 32, 1),
}
CASES = {
    "lora": (LoConModule, {}),
    "tucker": (LoConModule, {"use_tucker": True}),
    "full": (FullModule, {}),
    "loha": (LohaModule, {}),
    "loha-tucker": (LohaModule, {"use_tucker": True}),
    "lokr": (LokrModule, {}),
    "lokr-both": (LokrModule, {"decompose_both": True, "factor": 8, "lora_dim": 1}),
    "lokr-tucker": (LokrModule, {"use_tucker": True, "factor": 4}),
    "lokr-whole": (LokrModule, {"full_matrix": True}),
}


def network(case, name, seed=0):
    """The family's module for a layer, with random weights; its tensors by the names it saves them under."""
    kind, options = CASES[case]
    torch.manual_seed(seed)
    settings = {"multiplier": 1.0, "lora_dim": 2, "alpha": 0.6, "bypass_mode": False, **options}
    module = kind("lora", LAYERS[name], **settings)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    saved = module.custom_state_dict() or module.state_dict()
    return module, {key: torch.as_tensor(tensor).detach().clone().contiguous() for key, tensor in saved.items()}


def expected_update(module, saved, name):
    if "diff" in saved:
        return saved["diff"].double()
    shape = LAYERS[name].weight.shape
    if isinstance(module, LohaModule | LokrModule):
        # Their get_diff_weight takes the scale twice (lycoris-lora 4.1.3); this is what they train with.
        return module.get_weight(shape).detach().double()
    return module.get_diff_weight(shape=shape)[0].detach().double()


def load(path, name, saved):
    stem = "lora_unet_" + name.replace(".", "_")
    save_file({f"{stem}.{key}": tensor for key, tensor in saved.items()}, path)
    return LoraFile.load(path)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("case", CASES)
def test_an_update_is_the_familys_own(tmp_path, case, name):
    module, saved = network(case, name)
    file = load(tmp_path / "a.safetensors", name, saved)
    assert set(file.unknown_keys) == {key for key in file.unknown_keys if key.endswith(".diff_b")}
    update = file.updates[LayerId("unet", name)]
    kind = case.partition("-")[0]
    assert update.kind in {kind, "lora"} if kind == "tucker" else update.kind == kind
    expected = expected_update(module, saved, name)
    assert update.fits(tuple(expected.shape)) or expected.shape[2:] == (1, 1)
    difference = update.dense().reshape(expected.shape) - expected
    assert difference.norm() < 1e-5 * expected.norm()
    assert update.energy == pytest.approx(float(expected.square().sum()), rel=1e-5)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("case", CASES)
def test_the_fused_layer_is_one_with_the_weight_merged_by_hand(tmp_path, case, name):
    module, saved = network(case, name, seed=1)
    file = load(tmp_path / "a.safetensors", name, saved)
    layer = LAYERS[name]
    root = nn.Module()
    parent = root
    *path, leaf = name.split(".")
    for part in path:
        parent.add_module(part, nn.Module())
        parent = getattr(parent, part)
    parent.add_module(leaf, layer)
    plan = FusionPlan.of(file, file, FusionConfig(method="subject", subject_weight=0.7))
    x = torch.randn(2, 24, 8, 8) if isinstance(layer, nn.Conv2d) else torch.randn(2, 5, 24)
    with FusionSession(root, plan) as session, torch.no_grad():
        session.at(0.5)
        got = layer(x)
        update = 0.7 * expected_update(module, saved, name).float().reshape(layer.weight.shape)
        weight = layer.weight + update
    with torch.no_grad():
        wanted = (
            layer._conv_forward(x, weight, layer.bias) if x.dim() == 4 else nn.functional.linear(x, weight, layer.bias)
        )
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["loha", "lokr", "full"])
def test_kinds_are_gated_against_one_another(tmp_path, case):
    _, saved = network(case, LINEAR)
    file = load(tmp_path / "a.safetensors", LINEAR, saved)
    plain = random_lora(1, (LINEAR,), width=24)
    plain[LINEAR].up = torch.randn(32, 4)
    other = LoraFile.load(write(tmp_path / "b.safetensors", plain))
    for knobs in ({}, {"balance": "l1"}, {"method": "k-lora"}):
        (layer,) = FusionPlan.of(file, other, FusionConfig(**knobs)).layers
        assert layer.rho is not None
        assert layer.rho > 0
    (layer,) = FusionPlan.of(file, other, FusionConfig()).layers
    assert layer.energy_subject == pytest.approx(float(file.updates[layer.layer].dense().square().sum()))


def test_the_cases_are_of_the_forms_they_are_named_after():
    forms = {
        ("tucker", CONV): "lora_mid.weight",
        ("loha-tucker", CONV): "hada_t1",
        ("lokr", LINEAR): "lokr_w2_a",
        ("lokr-both", LINEAR): "lokr_w1_a",
        ("lokr-tucker", CONV): "lokr_t2",
        ("lokr-whole", CONV): "lokr_w2",
    }
    for (case, name), key in forms.items():
        assert key in network(case, name)[1], case


def without(saved, key):
    return {name: tensor for name, tensor in saved.items() if name != key}


@pytest.mark.parametrize(
    ("case", "key"),
    [("loha", "hada_w2_b"), ("loha-tucker", "hada_t1"), ("lokr", "lokr_w1"), ("lokr-tucker", "lokr_w2_b")],
)
def test_a_missing_tensor_is_named_with_its_fellows(tmp_path, case, key):
    _, saved = network(case, CONV)
    file = load(tmp_path / "a.safetensors", CONV, without(saved, key))
    assert file.updates == {}
    assert len(file.unknown_keys) == len(saved) - 1


@pytest.mark.parametrize(
    ("case", "key"), [("loha", "hada_w1_b"), ("loha-tucker", "hada_t1"), ("lokr-both", "lokr_w1_b")]
)
def test_factors_that_contradict_one_another_are_refused(tmp_path, case, key):
    _, saved = network(case, CONV)
    saved[key] = torch.cat([saved[key], saved[key]])
    with pytest.raises(EstLoraError, match=f"damaged: of {CONV}, two of its factors have different ranks, "):
        load(tmp_path / "a.safetensors", CONV, saved)


def test_a_difference_of_the_bias_is_named(tmp_path):
    stem = "lora_unet_" + LINEAR.replace(".", "_")
    save_file({f"{stem}.diff": torch.ones(3, 2), f"{stem}.diff_b": torch.ones(3)}, tmp_path / "a.safetensors")
    file = LoraFile.load(tmp_path / "a.safetensors")
    assert file.kinds == {"full": 1}
    assert file.unknown_keys == (f"{stem}.diff_b",)
