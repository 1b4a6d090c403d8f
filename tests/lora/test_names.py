"""Layer names of every convention, against the module names of real UNets and diffusers' own conversion."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from est_lora.lora import LayerId, UNetLayout
from est_lora.lora.names import UNET, read_name

diffusers = pytest.importorskip("diffusers", reason="no diffusers to hold the names against")
from tests.models import SD15, SDXL, projections, unet

MODELS = {"SD1.5": unet(SD15), "SDXL": unet(SDXL), "one a level": unet(SD15, layers_per_block=1)}
# Original block numbers of SDXL and SD1.5, each with what it is in diffusers, counted off the two published models.
ORIGINALS = {
    "input_blocks.0.0": "conv_in",
    "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
    "input_blocks.2.0.emb_layers.1": "down_blocks.0.resnets.1.time_emb_proj",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.4.0.skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks.4.1.proj_in": "down_blocks.1.attentions.0.proj_in",
    "input_blocks.8.1.transformer_blocks.9.ff.net.2": "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2",
    "middle_block.0.out_layers.3": "mid_block.resnets.0.conv2",
    "middle_block.1.transformer_blocks.3.attn2.to_v": "mid_block.attentions.0.transformer_blocks.3.attn2.to_v",
    "middle_block.2.in_layers.2": "mid_block.resnets.1.conv1",
    "output_blocks.2.1.transformer_blocks.0.attn1.to_q": "up_blocks.0.attentions.2.transformer_blocks.0.attn1.to_q",
    "output_blocks.2.1.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.3.1.proj_out": "up_blocks.1.attentions.0.proj_out",
    "output_blocks.8.0.skip_connection": "up_blocks.2.resnets.2.conv_shortcut",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "out.2": "conv_out",
}


@pytest.mark.parametrize("model", MODELS)
def test_every_layer_of_a_real_unet_is_found_by_its_kohya_and_its_dotted_name(model):
    names = list(projections(MODELS[model]))
    assert len(names) > 180
    for name in names:
        for text in ("lora_unet_" + name.replace(".", "_"), "unet." + name, "base_model.model.unet." + name):
            found = read_name(text, UNetLayout())
            assert found is not None, text
            assert found.layer == LayerId(UNET, name)
            assert not found.original


@pytest.mark.parametrize("original", ORIGINALS)
def test_original_names(original):
    for text in ("lora_unet_" + original.replace(".", "_"), "diffusion_model." + original):
        found = read_name(text, UNetLayout())
        assert found is not None
        assert (found.layer.name, found.original) == (ORIGINALS[original], True)


def test_original_names_of_sdxl_as_diffusers_reads_them():
    blocks = [
        *(f"input_blocks_{n}_1" for n in (4, 5, 7, 8)),
        "middle_block_1",
        *(f"output_blocks_{n}_1" for n in range(6)),
    ]
    stems = [
        f"lora_unet_{block}_transformer_blocks_{depth}_{leaf}"
        for block in blocks
        for depth in range(2)
        for leaf in ("attn1_to_q", "attn2_to_out_0", "ff_net_0_proj", "ff_net_2")
    ]
    ends = {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(4, 2), "alpha": torch.tensor(1.0)}
    tensors = {f"{stem}.{end}": tensor for stem in stems for end, tensor in ends.items()}
    theirs, _ = diffusers.StableDiffusionXLPipeline.lora_state_dict(tensors, unet_config=MODELS["SDXL"].config)
    ours = {f"unet.{read_name(stem, UNetLayout()).layer.name}" for stem in stems}
    plain = (re.sub(r"[._]lora\..*", "", key).replace(".processor", "") for key in theirs)
    assert ours == {re.sub(r"to_out$", "to_out.0", key) for key in plain}
    assert len(ours) == len(stems)


def test_the_models_own_layout_moves_original_names():
    layout = UNetLayout.of(projections(MODELS["one a level"]))
    assert layout == UNetLayout((1, 1, 1, 1))
    for original, name in {
        "input_blocks.2.0.op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks.3.1.proj_in": "down_blocks.1.attentions.0.proj_in",
        "output_blocks.5.1.proj_in": "up_blocks.2.attentions.1.proj_in",
    }.items():
        found = read_name("diffusion_model." + original, layout)
        assert found is not None
        assert found.layer.name == name
    assert read_name("diffusion_model.input_blocks.9.0.in_layers.2", layout) is None


@pytest.mark.parametrize(
    ("text", "part", "name"),
    [
        ("lora_te_text_model_encoder_layers_11_mlp_fc1", "text_encoder", "text_model.encoder.layers.11.mlp.fc1"),
        ("lora_te1_text_model_encoder_layers_0_self_attn_out_proj", "text_encoder", None),
        ("lora_te2_text_model_encoder_layers_31_self_attn_k_proj", "text_encoder_2", None),
        ("text_encoder.text_model.encoder.layers.2.self_attn.q_proj", "text_encoder", None),
        ("text_encoder_2.text_model.encoder.layers.2.self_attn.v_proj", "text_encoder_2", None),
        ("text_encoder.encoder.layers.2.mlp.fc2", "text_encoder", "text_model.encoder.layers.2.mlp.fc2"),
        ("base_model.model.text_encoder.text_model.encoder.layers.2.mlp.fc2", "text_encoder", None),
    ],
)
def test_text_encoders_are_kept_apart(text, part, name):
    found = read_name(text, UNetLayout())
    assert found is not None
    assert found.layer.part == part
    assert found.layer.name.startswith("text_model.encoder.layers.")
    assert name is None or found.layer.name == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "lora_unet_",
        "lora_unet_down_blocks",
        "lora_unet_down_blocks_1",
        "lora_unet_down_blocks_01_attentions_0_proj_in",
        "lora_unet_down_blocks_-1_attentions_0_proj_in",
        "lora_unet_down_blocks_\u0663_attentions_0_proj_in",
        "lora_unet_down_blocks_1_attentions_0_proj_in_",
        "lora_unet_down_blocks_1_attentions_0_proj.in",
        "lora_unet_single_blocks_3_linear1",
        "transformer.single_transformer_blocks.0.attn.to_q",
        "lora_unet_middle_block_7_proj_in",
        "lora_unet_input_blocks_0_1_proj_in",
        "lora_unet_input_blocks_3_0_in_layers_2",
        "lora_unet_out_7",
        "lora_te_text_model_encoder",
    ],
)
def test_what_is_no_layer_is_not_taken_for_one(text):
    assert read_name(text, UNetLayout()) is None


@given(st.text(alphabet="lora_untdwbcksip.0123456789\u00b2", max_size=80))
def test_no_text_breaks_it(text):
    for prefix in ("", "lora_unet_", "lora_te_", "unet.", "base_model.model."):
        found = read_name(prefix + text, UNetLayout((2, 1)))
        assert found is None or found.layer.name


@pytest.mark.parametrize("model", MODELS)
def test_order_is_that_of_the_network(model):
    called = sorted(projections(MODELS[model]), key=lambda name: LayerId(UNET, name).order)

    def before(first, second):
        assert called.index(first) < called.index(second), (first, second)

    block = "down_blocks.1.attentions.0.transformer_blocks.0"
    before("time_embedding.linear_1", "conv_in")
    before("conv_in", "down_blocks.0.resnets.0.conv1")
    before("down_blocks.1.resnets.0.conv2", f"{block}.attn1.to_q")
    before(f"{block}.attn1.to_q", f"{block}.attn1.to_k")
    before(f"{block}.attn1.to_v", f"{block}.attn1.to_out.0")
    before(f"{block}.attn1.to_out.0", f"{block}.attn2.to_q")
    before(f"{block}.attn2.to_out.0", f"{block}.ff.net.0.proj")
    before(f"{block}.ff.net.2", "down_blocks.1.attentions.0.proj_out")
    before("down_blocks.1.attentions.0.proj_out", "down_blocks.1.downsamplers.0.conv")
    before("down_blocks.1.downsamplers.0.conv", "down_blocks.2.resnets.0.conv1")
    before("mid_block.resnets.0.conv1", "mid_block.attentions.0.proj_in")
    before("mid_block.attentions.0.proj_out", "mid_block.resnets.1.conv1")
    before("mid_block.resnets.1.conv1", "up_blocks.0.resnets.0.conv1")
    before("up_blocks.1.attentions.1.proj_out", "up_blocks.1.upsamplers.0.conv")
    before("up_blocks.2.resnets.1.conv2", "conv_out")
    if model != "one a level":
        before("down_blocks.1.attentions.0.proj_out", "down_blocks.1.resnets.1.conv1")


def test_which_layers_are_attention_projections():
    gated = [name for name in projections(MODELS["SD1.5"]) if LayerId(UNET, name).is_attention]
    assert len(gated) == 128
    assert len([name for name in projections(MODELS["SDXL"]) if LayerId(UNET, name).is_attention]) == 560
    assert not any("ff" in name or "proj_" in name for name in gated)
