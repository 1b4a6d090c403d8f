"""Layer names against the module names of real UNets, and against diffusers' own conversion."""

from __future__ import annotations

import re

import pytest
import torch

from est_lora.lora import LayerId, UNetLayout
from est_lora.lora.names import UNET, read_name

diffusers = pytest.importorskip("diffusers", reason="no diffusers to hold the names against")
from tests.models import SD15, SDXL, projections, unet

MODELS = {
    "SD1.5": unet(SD15),
    "SDXL": unet(SDXL),
    "one a level": unet(SD15, layers_per_block=1),
    "unequal levels": unet(SD15, layers_per_block=(1, 2, 3, 1)),
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


@pytest.mark.parametrize("model", MODELS)
def test_original_names_cover_exactly_the_residual_blocks_a_model_has(model):
    names = set(projections(MODELS[model]))
    layout = UNetLayout.of(names)
    found = set()
    for side in ("input_blocks", "output_blocks"):
        for block in range(20):
            name = read_name(f"diffusion_model.{side}.{block}.0.in_layers.2", layout)
            found |= {name.layer.name} if name else set()
    assert found == {name for name in names if re.match(r"(down|up)_blocks\.\d\.resnets\.\d\.conv1", name)}
