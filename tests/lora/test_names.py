"""Layer names of every convention become one `LayerId`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from est_lora.lora import UNetLayout
from est_lora.lora.names import read_name

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


@pytest.mark.parametrize("original", ORIGINALS)
def test_original_names(original):
    for text in ("lora_unet_" + original.replace(".", "_"), "diffusion_model." + original):
        found = read_name(text, UNetLayout())
        assert found is not None
        assert (found.layer.name, found.original) == (ORIGINALS[original], True)


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
