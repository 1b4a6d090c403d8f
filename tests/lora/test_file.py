"""Reading files: what is understood, what is counted, what is named, what is refused."""

from __future__ import annotations

import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import save_file

from est_lora.errors import EstLoraError
from est_lora.lora import LayerId, LoraFile
from tests.files import ATTENTION_LAYERS, CONV, CONVENTIONS, FEED_FORWARD, random_lora, write

EVERYTHING = (*ATTENTION_LAYERS, FEED_FORWARD, CONV)
TE = "text_model.encoder.layers.{}.self_attn.q_proj"


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_updates_of_every_convention_and_type(tmp_path, convention, dtype):
    names = ATTENTION_LAYERS if convention == "diffusers-processor" else EVERYTHING
    alpha = None if convention == "diffusers-processor" else 3.0
    lora = random_lora(5, names, alpha=alpha, dtype=dtype)
    file = LoraFile.load(write(tmp_path / "a.safetensors", lora, convention))
    assert {layer.name for layer in file.updates} == set(names)
    for layer, update in file.updates.items():
        expected = lora[layer.name].dense
        assert update.shape == tuple(expected.shape)
        torch.testing.assert_close(update.dense(), expected, rtol=1e-7, atol=1e-7)
        assert update.energy == pytest.approx(float((expected**2).sum()), rel=1e-6)
    assert file.unknown_keys == ()
    assert file.kinds == {"lora": len(names)}
    assert file.ranks == [4]
    assert file.convention == {
        "peft-wrapped": "peft",
        "diffusers-twice": "diffusers",
        "diffusers-bare": "diffusers",
        "lycoris": "kohya",
        "original-dotted": "peft-original",
    }.get(convention, convention)


def test_layers_come_in_the_order_of_the_network(tmp_path):
    lora = random_lora(1)
    backwards = dict(reversed(lora.items()))
    file = LoraFile.load(write(tmp_path / "a.safetensors", backwards))
    assert [layer.name for layer in file.updates] == list(ATTENTION_LAYERS)


def test_sha256_is_that_of_the_bytes(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    import hashlib

    assert LoraFile.load(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("prefix", "part"),
    [("lora_te_", "text_encoder"), ("lora_te1_", "text_encoder"), ("lora_te2_", "text_encoder_2")],
)
def test_text_encoder_layers_are_kept_apart(tmp_path, prefix, part):
    path = write(tmp_path / "a.safetensors", random_lora(1))
    tensors = _tensors(path)
    for layer in range(2):
        name = prefix + TE.format(layer).replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, 8)
        tensors[f"{name}.lora_up.weight"] = torch.randn(8, 4)
    save_file(tensors, path)
    file = LoraFile.load(path)
    assert [layer.part for layer in file.text_encoder] == [part, part]
    assert file.text_encoder_layers == 2
    assert file.unet_layers == len(ATTENTION_LAYERS)
    assert file.remarks == []


def test_what_is_not_understood_is_named(tmp_path):
    path = write(tmp_path / "a.safetensors", random_lora(1))
    strange = {
        "emb_params": torch.ones(3),
        "lora_unet_down_blocks_9_bogus.lora_down.weight": torch.ones(2, 2),
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(2, 2),
        "lora_unet_mid_block_attentions_0_proj_out.alpha": torch.tensor(1.0),
    }
    save_file(_tensors(path) | strange, path)
    file = LoraFile.load(path)
    assert set(file.unknown_keys) == set(strange)
    assert len(file.updates) == len(ATTENTION_LAYERS)
    (remark,) = file.remarks
    assert "'emb_params'" in remark
    assert "and 1 more" in remark


def test_thousands_of_unknown_tensors_are_counted_not_recited(tmp_path):
    path = write(tmp_path / "a.safetensors", random_lora(1))
    strange = {f"model.layers.{index}.{'x' * 100}.weight": torch.zeros(1) for index in range(5000)}
    save_file(_tensors(path) | strange, path)
    file = LoraFile.load(path)
    assert set(file.unknown_keys) == set(strange)
    (remark,) = file.remarks
    assert "and 4997 more" in remark
    assert len(remark) < 500


def test_alpha_zero_of_peft_is_zero(tmp_path):
    lora = random_lora(1, rank=4, alpha=None)
    assert {update.scale for update in _load(tmp_path, lora, {"unet.lora_alpha": 0}).updates.values()} == {0.0}


def test_metadata_that_lies_changes_nothing(tmp_path):
    lies = {
        "ss_network_dim": "999",
        "ss_network_alpha": "-1e300",
        "ss_network_module": "lycoris.kohya",
        "ss_base_model_version": "sdxl_base_v1-0",
        "modelspec.architecture": "flux-1-dev/lora",
        "sshs_model_hash": "0" * 64,
        "format": "np",
    }
    honest = LoraFile.load(write(tmp_path / "a.safetensors", random_lora(1)))
    lying = LoraFile.load(write(tmp_path / "b.safetensors", random_lora(1), metadata=lies))
    assert (lying.convention, lying.kinds, lying.ranks) == (honest.convention, honest.kinds, honest.ranks)
    assert lying.base_model == honest.base_model
    assert {layer: update.energy for layer, update in lying.updates.items()} == {
        layer: update.energy for layer, update in honest.updates.items()
    }


@pytest.mark.parametrize("pair", [("kohya", "peft"), ("diffusers", "peft"), ("lycoris", "kohya")])
def test_a_layer_that_stands_there_twice_is_used_once_and_named(tmp_path, pair):
    lora, repeated = random_lora(1), ATTENTION_LAYERS[:5]
    tensors = _tensors(write(tmp_path / "a.safetensors", lora, pair[0]))
    other = _tensors(write(tmp_path / "b.safetensors", random_lora(2, repeated, rank=2), pair[1]))
    save_file(tensors | other, tmp_path / "a.safetensors")
    file = LoraFile.load(tmp_path / "a.safetensors")
    assert len(file.updates) == len(ATTENTION_LAYERS)
    assert {layer.name for layer in file.repeated} == set(repeated)
    assert len(file.repeated) == len(repeated)
    assert file.unknown_keys == ()
    (remark,) = file.remarks
    assert "more than once" in remark
    assert "and 2 more" in remark
    for layer, update in file.updates.items():  # one of the two, whole; never factors of both
        either = {4: lora, 2: random_lora(2, repeated, rank=2)}[update.rank][layer.name]
        scale = 1.0 if update.scale == 1.0 else either.alpha / update.rank
        product = either.up.double() @ either.down.double() * scale
        torch.testing.assert_close(update.dense(), product, rtol=1e-7, atol=1e-7)


def test_scaling_beside_the_weights(tmp_path):
    lora = random_lora(1, rank=4, alpha=None)
    plain = {layer.name: update.scale for layer, update in _load(tmp_path, lora, {}).updates.items()}
    assert set(plain.values()) == {1.0}
    config = {"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 2}}
    scales = {layer.name: u.scale for layer, u in _load(tmp_path, lora, config).updates.items()}
    assert {scale for name, scale in scales.items() if name.endswith("attn1.to_q")} == {0.5}
    assert {scale for name, scale in scales.items() if not name.endswith("attn1.to_q")} == {2.0}
    stabilised = _load(tmp_path, lora, {"unet.lora_alpha": 8, "unet.use_rslora": True})
    assert {update.scale for update in stabilised.updates.values()} == {4.0}


@pytest.mark.parametrize(
    "lie",
    [
        "nan",
        "[1]",
        '{"unet.lora_alpha": 1e200}',
        '{"unet.lora_alpha": 1' + "0" * 400 + "}",
        '{"unet.lora_alpha": "x"}',
        '{"unet.lora_alpha": NaN}',
        "[" * 5000,
        "{",
    ],
)
def test_metadata_that_is_no_use_counts_for_nothing(tmp_path, lie):
    path = write(tmp_path / "a.safetensors", random_lora(1, alpha=None), "peft", {"lora_adapter_metadata": lie})
    assert {update.scale for update in LoraFile.load(path).updates.values()} == {1.0}


def test_scaling_in_pefts_own_config_file(tmp_path):
    path = write(tmp_path / "adapter_model.safetensors", random_lora(1, rank=4, alpha=None), "peft-wrapped")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 16, "r": 4}))
    assert {update.scale for update in LoraFile.load(path).updates.values()} == {4.0}


def test_integers_are_no_factors(tmp_path):
    path = tmp_path / "a.safetensors"
    stem = "unet." + ATTENTION_LAYERS[0]
    save_file(
        {f"{stem}.lora_A.weight": torch.ones(2, 4).char(), f"{stem}.lora_B.weight": torch.ones(4, 2).char()}, path
    )
    assert len(LoraFile.load(path).unknown_keys) == 2


def test_a_zero_rank_layer_is_a_zero_layer(tmp_path):
    lora = random_lora(1)
    lora[ATTENTION_LAYERS[0]].down = torch.zeros(0, 24)
    lora[ATTENTION_LAYERS[0]].up = torch.zeros(24, 0)
    file = LoraFile.load(write(tmp_path / "a.safetensors", lora))
    update = file.updates[LayerId("unet", ATTENTION_LAYERS[0])]
    assert update.energy == 0.0
    assert update.dense().abs().sum() == 0


BAD = {
    "text": (b"this is not a safetensors file, only text", "isn't a whole safetensors file"),
    "nothing": (b"", "empty file"),
    "huge header": (struct.pack("<Q", 1 << 60) + b"{}", "isn't a whole safetensors file"),
    "pickle": (pickle.dumps({"a": 1}), "pickle"),
    "zip": (b"PK\x03\x04" + b"\0" * 64, "pickle"),
    "no tensors": (struct.pack("<Q", 2) + b"{}", "holds no tensors"),
    "broken header": (struct.pack("<Q", 8) + b'{"a": 1,', "isn't a whole safetensors file"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_safetensors_file_is_refused_with_a_sentence(tmp_path, case):
    content, expected = BAD[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(EstLoraError, match=expected) as error:
        LoraFile.load(path)
    assert_one_sentence(error, "bad.safetensors")


def test_a_truncated_file_is_refused(tmp_path):
    path = write(tmp_path / "cut.safetensors", random_lora(1))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(EstLoraError, match="isn't a whole safetensors file") as error:
        LoraFile.load(path)
    assert_one_sentence(error, "cut.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("which", ["down", "up"])
def test_nan_and_infinity_are_refused(tmp_path, value, dtype, which):
    lora = random_lora(1, dtype=dtype)
    getattr(lora[ATTENTION_LAYERS[3]], which)[1, 2] = value
    with pytest.raises(EstLoraError, match="NaN or infinite") as error:
        LoraFile.load(write(tmp_path / "a.safetensors", lora))
    assert_one_sentence(error, "a.safetensors")


def test_an_alpha_that_is_no_number_is_refused(tmp_path):
    lora = random_lora(1, alpha=float("nan"))
    with pytest.raises(EstLoraError, match="isn't one finite number|holds NaN or infinite"):
        LoraFile.load(write(tmp_path / "a.safetensors", lora))


def test_factors_of_different_ranks_are_refused(tmp_path):
    lora = random_lora(1)
    lora[ATTENTION_LAYERS[0]].up = torch.randn(24, 7)
    with pytest.raises(EstLoraError, match="different ranks, 4 and 7") as error:
        LoraFile.load(write(tmp_path / "a.safetensors", lora))
    assert_one_sentence(error, ATTENTION_LAYERS[0])


def test_a_folder_is_refused_and_its_files_are_named(tmp_path):
    write(tmp_path / "inside.safetensors", random_lora(1))
    with pytest.raises(EstLoraError, match="is a folder.*'inside.safetensors'") as error:
        LoraFile.load(tmp_path)
    assert_one_sentence(error)


def test_a_missing_file_is_refused_and_the_nearest_names_are_given(tmp_path):
    for name in ("watercolour", "Character_v2", "other"):
        write(tmp_path / f"{name}.safetensors", random_lora(1, ATTENTION_LAYERS[:1]))
    with pytest.raises(EstLoraError, match="did you mean 'Character_v2.safetensors'") as error:
        LoraFile.load(tmp_path / "charakter_v2.safetensors")
    assert_one_sentence(error)
    with pytest.raises(EstLoraError, match="can't be read: File name too long"):
        LoraFile.load("x" * 5000)
    with pytest.raises(EstLoraError, match="no .safetensors file beside it"):
        LoraFile.load(tmp_path / "nowhere" / "a.safetensors")


def assert_one_sentence(error, *named):
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith((".", "?"))
    assert all(name in text for name in named)


def _tensors(path):
    from safetensors.torch import load_file

    return {key: tensor.clone() for key, tensor in load_file(path).items()}


def _load(tmp_path, lora, config):
    header = {"lora_adapter_metadata": json.dumps(config)} if config else None
    return LoraFile.load(write(tmp_path / "a.safetensors", lora, "peft", header))
