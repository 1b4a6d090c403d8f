"""Every kind against its family's own implementation."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from est_lora.config import FusionConfig
from est_lora.errors import EstLoraError
from est_lora.fusion import FusionSession, original_weight
from est_lora.gate import FusionPlan
from est_lora.lora import LayerId, LoraFile, LowRankUpdate
from tests.files import ATTENTION_LAYERS, CONV, random_lora, write

pytest.importorskip("lycoris.modules", reason="no lycoris-lora to hold the kinds against")
from tests.kinds import LYCORIS, by_lycoris

LINEAR, PROJECTION = ATTENTION_LAYERS[0], "mid_block.attentions.0.proj_in"
torch.manual_seed(5)
LAYERS = {
    LINEAR: nn.Linear(24, 32),
    CONV: nn.Conv2d(24, 32, 3, stride=2, padding=1),
    PROJECTION: nn.Conv2d(24, 32, 1),
}
NEED_MODEL = ("dora", "ia3", "oft", "boft", "glora")


def load(path, name, saved, on_model=True):
    stem = "lora_unet_" + name.replace(".", "_")
    save_file({f"{stem}.{key}": tensor for key, tensor in saved.items()}, path)
    file = LoraFile.load(path)
    return file.on("unet", {name: original_weight(LAYERS[name])}.get) if on_model else file


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("case", LYCORIS)
def test_an_update_is_the_familys_own(tmp_path, case, name):
    changed = by_lycoris(case, LAYERS[name])
    file = load(tmp_path / "a.safetensors", name, changed.saved)
    assert file.unknown_keys == ()
    update = file.updates[LayerId("unet", name)]
    kind = LYCORIS[case][0]
    if name != CONV:  # only a kernel has a Tucker form
        kind = {"tucker": "lora", "dora-tucker": "dora"}.get(kind, kind)
    assert update.kind == kind
    weight = LAYERS[name].weight.detach().double()
    expected = changed.weight - weight
    assert expected.norm() > 0.02 * weight.norm()
    assert update.fits(tuple(expected.shape)) or expected.shape[2:] == (1, 1)
    difference = update.dense().reshape(expected.shape) - expected
    # What depends on the weight is told from it in float32 by the family itself: so exact is the whole, not the part.
    assert difference.norm() < 1e-5 * (weight + expected if kind.startswith(NEED_MODEL) else expected).norm()
    assert update.energy == pytest.approx(float(expected.square().sum()), rel=1e-5)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("case", LYCORIS)
def test_the_fused_layer_is_one_with_the_weight_merged_by_hand(tmp_path, case, name):
    layer = LAYERS[name]
    changed = by_lycoris(case, layer, seed=1)
    file = load(tmp_path / "a.safetensors", name, changed.saved)
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
    with torch.no_grad():
        weight = layer.weight + 0.7 * (changed.weight.float() - layer.weight)
        bias = layer.bias + 0.7 * (changed.bias - layer.bias)
        wanted = layer._conv_forward(x, weight, bias) if x.dim() == 4 else nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", LYCORIS)
def test_two_thin_factors_are_the_dense_update(tmp_path, case):
    layer = nn.Conv2d(96, 128, 3)
    update = load(tmp_path / "a.safetensors", CONV, by_lycoris(case, layer).saved, on_model=False).updates
    (update,) = update.values()
    if LYCORIS[case][0].startswith((*NEED_MODEL, "full")) or case == "lokr-whole":
        assert update.factors() is None
        return
    up, down, scale = update.factors()
    product = (up.flatten(1).double() @ down.flatten(1).double() * scale).reshape(update.shape)
    torch.testing.assert_close(product, update.dense(), rtol=1e-5, atol=1e-5 * float(update.dense().abs().max()))


def test_factors_that_are_not_thin_are_not_made(tmp_path):
    saved = by_lycoris("loha", LAYERS[LINEAR]).saved
    wide = {key: torch.cat([tensor] * 2, int(key.endswith("_a"))) for key, tensor in saved.items() if "hada" in key}
    (update,) = load(tmp_path / "a.safetensors", LINEAR, saved).updates.values()
    assert update.factors() is not None  # 4 * (32 + 24) * 2 <= 32 * 24
    (update,) = load(tmp_path / "a.safetensors", LINEAR, wide).updates.values()
    assert update.factors() is None
    assert update.energy == pytest.approx(float(update.dense().square().sum()))


@pytest.mark.parametrize("case", ["loha", "lokr", "full", "dora", "oft"])
def test_kinds_are_gated_against_one_another(tmp_path, case):
    file = load(tmp_path / "a.safetensors", LINEAR, by_lycoris(case, LAYERS[LINEAR]).saved)
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
        ("full", CONV): "diff_b",
        ("oft-constrained", LINEAR): "rescale",
    }
    for (case, name), key in forms.items():
        assert key in by_lycoris(case, LAYERS[name]).saved, case
    by_output, by_input = (by_lycoris(case, LAYERS[CONV]).saved["dora_scale"] for case in ("dora", "dora-by-input"))
    assert (by_output.shape, by_input.shape) == ((32, 1, 1, 1), (1, 24, 1, 1))
    assert by_lycoris("boft", LAYERS[LINEAR]).saved["oft_blocks"].dim() == 4
    unbounded = by_lycoris("oft", LAYERS[LINEAR]).saved["oft_blocks"]
    assert (unbounded - unbounded.mT).norm() > 0.03 * 32, "the constraint of this test constrains nothing"


@pytest.mark.parametrize("case", LYCORIS)
def test_what_depends_on_the_model_waits_for_it(tmp_path, case):
    changed = by_lycoris(case, LAYERS[LINEAR])
    file = load(tmp_path / "a.safetensors", LINEAR, changed.saved, on_model=False)
    (update,) = file.updates.values()
    assert update.needs_model == LYCORIS[case][0].startswith(NEED_MODEL)
    plain = LoraFile.load(write(tmp_path / "b.safetensors", random_lora(1)))
    if update.needs_model:
        with pytest.raises(EstLoraError, match=f"{update.kind} can't be computed without"):
            update.dense()
        nowhere = file.on("unet", lambda name: None)
        assert (nowhere.updates, nowhere.unreadable) == ({}, {LayerId("unet", LINEAR): update.kind})
        assert "need the model's own weights" in nowhere.remarks[0]
        assert LINEAR in nowhere.remarks[0]
        assert nowhere.kinds == file.kinds
        assert nowhere.unet_layers == 1
    else:
        assert file.on("unet", lambda name: None).updates == file.updates
    assert plain.on("unet", lambda name: None).updates == plain.updates


def without(saved, key):
    return {name: tensor for name, tensor in saved.items() if name != key}


@pytest.mark.parametrize(
    ("case", "key"),
    [
        ("loha", "hada_w2_b"),
        ("loha-tucker", "hada_t1"),
        ("lokr", "lokr_w1"),
        ("lokr-tucker", "lokr_w2_b"),
        ("ia3", "weight"),
        ("glora", "a2.weight"),
        ("dora", "lora_up.weight"),
    ],
)
def test_a_missing_tensor_is_named_with_its_fellows(tmp_path, case, key):
    saved = by_lycoris(case, LAYERS[CONV]).saved
    file = load(tmp_path / "a.safetensors", CONV, without(saved, key))
    assert file.updates == {}
    assert len(file.unknown_keys) == len(saved) - 1


@pytest.mark.parametrize(
    ("case", "key"), [("loha", "hada_w1_b"), ("loha-tucker", "hada_t1"), ("lokr-both", "lokr_w1_b")]
)
def test_factors_that_contradict_one_another_are_refused(tmp_path, case, key):
    saved = by_lycoris(case, LAYERS[CONV]).saved
    saved[key] = torch.cat([saved[key], saved[key]])
    with pytest.raises(EstLoraError, match=f"damaged: of {CONV}, two of its factors have different ranks, "):
        load(tmp_path / "a.safetensors", CONV, saved)


@pytest.mark.parametrize(
    ("case", "key", "says"),
    [
        ("dora", "dora_scale", "its 64 magnitudes are for another shape than 32 x 24"),
        ("dora-by-input", "dora_scale", "its 48 magnitudes are for another shape than 32 x 24"),
        ("oft-constrained", "rescale", "64 outputs are rescaled and 32 rotated"),
        ("full", "diff_b", "the bias has 64 entries for 32 outputs"),
    ],
)
def test_what_is_added_to_a_kind_must_fit_it(tmp_path, case, key, says):
    saved = by_lycoris(case, LAYERS[LINEAR]).saved
    saved[key] = torch.cat([saved[key], saved[key]], int(saved[key].shape[0] == 1))
    with pytest.raises(EstLoraError, match=f"damaged: of {LINEAR}, {says}"):
        load(tmp_path / "a.safetensors", LINEAR, saved)


@pytest.mark.parametrize("case", LYCORIS)
def test_an_update_of_another_width_is_refused_on_a_model(tmp_path, case):
    saved = by_lycoris(case, nn.Linear(16, 16)).saved
    with pytest.raises(
        EstLoraError, match=f"'a.safetensors' doesn't fit this model: its update of {LINEAR} is .*32 x 24"
    ):
        load(tmp_path / "a.safetensors", LINEAR, saved)


@pytest.mark.parametrize(
    ("case", "key", "shape"),
    [
        ("dora-by-input", "dora_scale", (1, 12)),
        ("dora-by-input", "dora_scale", (1, 1)),
        ("oft", "diff_b", (5,)),
        ("oft", "diff_b", (1,)),
        ("ia3", "diff_b", (1,)),
    ],
)
def test_what_comes_with_an_update_must_fit_the_layer_too(tmp_path, case, key, shape):
    saved = by_lycoris(case, LAYERS[LINEAR]).saved | {key: torch.ones(shape)}
    with pytest.raises(EstLoraError, match="doesn't fit this model|is damaged"):
        load(tmp_path / "a.safetensors", LINEAR, saved)


def test_a_flattened_kernel_of_glora_is_not_understood(tmp_path):
    saved = by_lycoris("glora", LAYERS[CONV]).saved
    flat = {key: tensor.flatten(1) if tensor.dim() else tensor for key, tensor in saved.items()}
    file = load(tmp_path / "a.safetensors", CONV, flat, on_model=False)
    assert file.updates == {}
    assert len(file.unknown_keys) == len(saved)


@pytest.mark.parametrize("case", ["lora", "tucker", "loha", "loha-tucker", "lokr", "lokr-tucker", "dora", "glora"])
@pytest.mark.parametrize("rank", [1, 3])
def test_ranks_from_one_up(tmp_path, case, rank):
    narrow = nn.Conv2d(4, 64, 3)  # like a UNet's first layer: fewer inputs than a usual rank
    for name, layer in ((CONV, LAYERS[CONV]), (LINEAR, LAYERS[LINEAR]), (CONV, narrow)):
        for wide in (rank, 6):
            changed = by_lycoris(case, layer, rank=wide)
            stem = "lora_unet_" + name.replace(".", "_")
            save_file({f"{stem}.{key}": t for key, t in changed.saved.items()}, tmp_path / "a.safetensors")
            file = LoraFile.load(tmp_path / "a.safetensors").on("unet", {name: original_weight(layer)}.get)
            (update,) = file.updates.values()
            expected = changed.weight - layer.weight.detach().double()
            assert (update.dense().reshape(expected.shape) - expected).norm() < 2e-5 * (changed.weight.norm())
            if factors := update.factors():
                product = factors.up.double().flatten(1) @ factors.down.double().flatten(1) * factors.scale
                assert (product.reshape(expected.shape) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("size", [1e-21, 1e-6, 1.0, 1e25])
@pytest.mark.parametrize("left_over", [1.0, 0.1, 1e-3])
def test_the_energy_keeps_its_digits_where_columns_cancel(size, left_over):
    generator = torch.Generator().manual_seed(7)
    up, down = torch.randn(640, 4, generator=generator), torch.randn(4, 1280, generator=generator)
    up[:, 2:] = up[:, :2] * (1 + left_over * torch.randn(640, 2, generator=generator))
    down[2:] = -down[:2]
    update = LowRankUpdate(down, up * size, 0.5)
    product = (up * size).double() @ down.double() * 0.5
    assert update.energy == pytest.approx(float(product.square().sum()), rel=1e-6, abs=0)


@pytest.mark.parametrize("size", [1e-12, 1e-9, 1e9, 1e12])
def test_the_energy_keeps_its_digits_where_both_factors_are_tiny_or_huge(size):
    up, down = torch.full((640, 1), size), torch.full((1, 1280), size)
    assert LowRankUpdate(down, up, 0.5).energy == pytest.approx(640 * 1280 * size**4 / 4, rel=1e-6, abs=0)


def test_factors_that_were_made_hold_in_half_precision(tmp_path):
    """LyCORIS begins with factors of very different magnitude; their products are balanced before they are rounded."""
    torch.manual_seed(0)
    layer = nn.Linear(640, 640, bias=False)
    sides = {"hada_w1_a": (640, 8), "hada_w1_b": (8, 640), "hada_w2_a": (640, 8), "hada_w2_b": (8, 640)}
    saved = {key: torch.randn(shape) * (1e-5 if key == "hada_w2_a" else 1.0) for key, shape in sides.items()}
    (update,) = load(tmp_path / "a.safetensors", LINEAR, saved, on_model=False).updates.values()
    up, down, scale = update.factors()
    x = torch.randn(16, 640) * 300
    got = ((x.half() @ down.half().T) * scale) @ up.half().T
    wanted = x.double() @ update.dense().T
    assert (got.double() - wanted).norm() < 2e-3 * wanted.norm()
    assert layer.weight.shape == update.shape


def test_glora_of_either_age(tmp_path):
    changed = by_lycoris("glora", LAYERS[LINEAR])
    pairs = (("a1.weight", "a2.weight"), ("b1.weight", "b2.weight"))
    old = changed.saved | {one: changed.saved[other] for pair in pairs for one, other in (pair, pair[::-1])}
    updates = [load(tmp_path / "a.safetensors", LINEAR, saved).updates for saved in (changed.saved, old)]
    new, old = (next(iter(each.values())).dense() for each in updates)
    torch.testing.assert_close(new, old)


def test_factors_without_dimensions_are_not_understood(tmp_path):
    saved = by_lycoris("tucker", LAYERS[CONV]).saved
    for key in ("lora_up.weight", "lora_down.weight"):
        for shape in ((), (4,), (4, 4, 1)):
            file = load(tmp_path / "a.safetensors", CONV, saved | {key: torch.ones(shape)})
            assert file.updates == {}
            assert len(file.unknown_keys) == len(saved)


@pytest.mark.parametrize(
    ("suffix", "shape", "kind"),
    [
        ("diff", (3,), "norm"),
        ("w_norm", (3,), "norm"),
        ("diff_b", (3,), "bias"),
        ("oft_diag", (2, 4, 4), "old-oft"),
        ("oft_R.weight", (4, 6), "peft-oft"),
        ("ia3_l", (1, 3), "peft-ia3"),
    ],
)
def test_kinds_that_cannot_be_applied_are_counted_and_named(tmp_path, suffix, shape, kind):
    path = write(tmp_path / "a.safetensors", random_lora(1, ATTENTION_LAYERS[1:2]))
    stem = "lora_unet_" + LINEAR.replace(".", "_")
    file = load(path, LINEAR, {suffix: torch.ones(shape)})
    assert file.kinds == {kind: 1}
    assert file.unsupported == {LayerId("unet", LINEAR): kind}
    assert file.unknown_keys == ()
    assert f"1 {kind}" in file.remarks[0]
    assert stem not in file.remarks[0]
