"""The weights that updates depend on are those the checkpoint came with, whatever the user's own LoRA has made of them."""

from __future__ import annotations

import pytest
import torch

from est_lora.hosts.webui.job import host_of
from tests.hosts.webui.host import Processing
from tests.hosts.webui.networks import TEXT_LAYERS, OpenClip

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
ORIGINAL = "middle_block.1.transformer_blocks.0.attn1.to_q"


def read(found):
    return found[0]().clone()


def test_of_the_unet(web):
    weight = web.unet.get_submodule(ORIGINAL).weight.clone()
    assert read(host_of(Processing(web))._unet_weight(LAYER)).equal(weight)
    web.make(Processing(web, "a knight <lora:stone>"))
    assert not web.unet.get_submodule(ORIGINAL).weight.equal(weight)
    assert read(host_of(Processing(web))._unet_weight(LAYER)).equal(weight)


def test_of_a_layer_that_is_not_there(web):
    host = host_of(Processing(web))
    assert host._unet_weight("mid_block.attentions.7.proj_in") is None
    assert host.text_weight("text_encoder", "text_model.encoder.layers.9.mlp.fc1") is None


@pytest.mark.parametrize(
    "flavour",
    ["a1111", "forge"],
)
def test_sd15_has_no_second_text_encoder(start, flavour):
    host = host_of(Processing(start(flavour)))
    assert host.text_weight("text_encoder", TEXT_LAYERS[0]) is not None
    assert host.text_weight("text_encoder_2", TEXT_LAYERS[0]) is None


@pytest.mark.parametrize("name", TEXT_LAYERS)
def test_of_text_encoders(web_xl, name):
    host = host_of(Processing(web_xl))
    for part, encoder in web_xl.encoders.items():
        found = host.text_weight(part, name)
        assert found[1] == tuple(read(found).shape)
        assert read(found).equal(weight_of(encoder, name))


def weight_of(encoder, name):
    if not isinstance(encoder, OpenClip):
        return encoder.get_submodule(name).weight
    number, leaf = name.removeprefix("text_model.encoder.layers.").split(".", 1)
    block = encoder.get_submodule(f"transformer.resblocks.{number}")
    attention = block.attn
    q, k, v = attention.in_proj_weight.chunk(3)
    return {
        "self_attn.q_proj": q,
        "self_attn.k_proj": k,
        "self_attn.v_proj": v,
        "self_attn.out_proj": attention.out_proj.weight,
        "mlp.fc1": block.mlp.c_fc.weight,
        "mlp.fc2": block.mlp.c_proj.weight,
    }[leaf]


def test_of_a_fused_layer_that_the_host_has_changed(start):
    web = start("a1111", "sdxl")
    attention = web.encoders["text_encoder_2"].get_submodule("transformer.resblocks.0.attn")
    kept = attention.in_proj_weight.clone(), attention.out_proj.weight.clone()
    attention.network_weights_backup = kept
    with torch.no_grad():
        attention.in_proj_weight.zero_()
        attention.out_proj.weight.zero_()
    host = host_of(Processing(web))
    parts = (*kept[0].chunk(3), kept[1])
    for end, weight in zip(("q", "k", "v", "out"), parts):
        found = host.text_weight("text_encoder_2", f"text_model.encoder.layers.0.self_attn.{end}_proj")
        assert read(found).equal(weight)
