"""Convention x kind x model: what each kind of file draws is what the weights merged by hand draw.

`docs/formats.md` has the table of these cells; a test holds it to them.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from est_lora.config import FusionConfig
from est_lora.errors import EstLoraError
from est_lora.fusion import FusionSession, original_weight
from est_lora.gate import FusionPlan
from est_lora.hosts.diffusers import fuse, load_plan
from est_lora.lora import LoraFile, ModelFile
from tests.checkpoints import unet_name, write_checkpoint
from tests.files import Factors, write
from tests.pipelines import SIZE, stable_diffusion, stable_diffusion_xl

pytest.importorskip("lycoris.modules", reason="no lycoris-lora to hold the kinds against")
from tests.kinds import LYCORIS, Changed, by_lycoris

MODELS = {"SD1.5": stable_diffusion, "SDXL": stable_diffusion_xl}
BLOCK = "down_blocks.1.attentions.0"
ATTENTION = tuple(
    f"{BLOCK}.transformer_blocks.0.{leaf}" for leaf in ("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "attn2.to_v")
)
LAYERS = (
    *ATTENTION,
    f"{BLOCK}.transformer_blocks.0.ff.net.0.proj",
    f"{BLOCK}.transformer_blocks.0.ff.net.2",
    f"{BLOCK}.proj_in",
    "time_embedding.linear_1",
    "down_blocks.0.downsamplers.0.conv",
    "up_blocks.0.resnets.0.conv_shortcut",
    "up_blocks.0.upsamplers.0.conv",
    "mid_block.resnets.0.conv1",
    "mid_block.resnets.0.time_emb_proj",
)


def original(name, types):
    return unet_name(f"{name}.weight", types).removesuffix(".weight")


STEMS = {
    "kohya": lambda name, types: "lora_unet_" + name.replace(".", "_"),
    "kohya, original names": lambda name, types: "lora_unet_" + original(name, types).replace(".", "_"),
    "LyCORIS": lambda name, types: "lycoris_" + name.replace(".", "_"),
    "dotted original names": lambda name, types: "diffusion_model." + original(name, types),
}
DIFFUSERS = {"diffusers": "diffusers", "diffusers, old": "diffusers-processor"}
PEFT = {
    "lora": (peft.LoraConfig, {"lora_alpha": 3}),
    "lora-stabilised": (peft.LoraConfig, {"lora_alpha": 3, "use_rslora": True}),
    "lora-patterns": (peft.LoraConfig, {"lora_alpha": 3, "rank_pattern": {"to_q": 3}, "alpha_pattern": {"to_k": 5}}),
    "lora-bias": (peft.LoraConfig, {"lora_alpha": 3, "lora_bias": True}),
    "dora": (peft.LoraConfig, {"lora_alpha": 3, "use_dora": True}),
    "loha": (peft.LoHaConfig, {"alpha": 3}),
    "loha-tucker": (peft.LoHaConfig, {"alpha": 3, "use_effective_conv2d": True}),
    "lokr": (peft.LoKrConfig, {"alpha": 3, "decompose_factor": 4}),
    "lokr-both": (peft.LoKrConfig, {"alpha": 3, "decompose_both": True, "decompose_factor": 8, "r": 1}),
    "lokr-tucker": (peft.LoKrConfig, {"alpha": 3, "decompose_factor": 4, "use_effective_conv2d": True}),
}
CELLS = [
    *((convention, case) for convention in STEMS for case in LYCORIS if "dotted" not in convention or case == "lora"),
    *((convention, "lora") for convention in DIFFUSERS),
    *(("PEFT", case) for case in PEFT),
]


@pytest.fixture(scope="module", params=MODELS)
def pipe(request):
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def plain(pipe):
    return picture(pipe)


def made(pipe, convention, case, folder, seed=0):
    """A file of that convention and kind for some layers of `pipe`, and what it makes of them."""
    modules = dict(pipe.unet.named_modules())
    path = folder / f"{seed}.safetensors"
    if convention == "PEFT":
        return by_peft(pipe.unet, case, folder / f"peft-{seed}", seed)
    if convention in DIFFUSERS:
        names = ATTENTION if convention == "diffusers, old" else LAYERS
        torch.manual_seed(seed)
        lora = {}
        for name in names:
            out, inputs, *kernel = modules[name].weight.shape
            down, up = torch.randn(4, inputs, *kernel), torch.randn(out, 4, *(1 for _ in kernel))
            lora[name] = Factors(down * 0.2, up * 0.2)
        write(path, lora, DIFFUSERS[convention])
        return path, {
            name: Changed({}, modules[name].weight + factors.dense, modules[name].bias)
            for name, factors in lora.items()
        }
    size = 0.2 if LYCORIS[case][0] in ("ia3", "oft", "boft") else 0.5
    changed = {name: by_lycoris(case, modules[name], seed, size) for name in LAYERS}
    types = pipe.unet.config.down_block_types
    stems = {name: STEMS[convention](name, types) for name in LAYERS}
    save_file({f"{stems[name]}.{key}": t for name, each in changed.items() for key, t in each.saved.items()}, path)
    return path, changed


def by_peft(unet, case, folder, seed):
    kind, options = PEFT[case]
    torch.manual_seed(seed)
    modules = dict(unet.named_modules())
    names = [name for name in LAYERS if case != "lora-bias" or modules[name].bias is not None]
    settings = {"r": 2, "target_modules": names, **options}
    model = peft.get_peft_model(copy.deepcopy(unet), kind(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn_like(parameter) * 0.4
                parameter.copy_(parameter * (1 + noise / 2) if "magnitude" in name else noise)
    model.save_pretrained(folder)
    merged = dict(model.merge_and_unload().named_modules())
    return folder / "adapter_model.safetensors", {
        name: Changed({}, merged[name].weight.detach(), merged[name].bias) for name in names
    }


def picture(pipe):
    request = {"num_inference_steps": 2, "height": SIZE, "width": SIZE, "output_type": "np"}
    return pipe("a red star", generator=torch.Generator().manual_seed(0), **request).images[0]


@contextmanager
def merged(pipe, changed):
    modules, kept = dict(pipe.unet.named_modules()), {}
    for name, layer in changed.items():
        module = modules[name]
        kept[name] = module.weight.data, None if module.bias is None else module.bias.data
        module.weight.data = layer.weight.detach().float()
        if module.bias is not None:
            module.bias.data = layer.bias.detach()
    try:
        yield
    finally:
        for name, (weight, bias) in kept.items():
            modules[name].weight.data = weight
            if bias is not None:
                modules[name].bias.data = bias


@pytest.mark.parametrize(("convention", "case"), CELLS)
def test_a_file_draws_what_the_merged_weights_draw(pipe, plain, tmp_path, convention, case):
    path, changed = made(pipe, convention, case, tmp_path)
    with merged(pipe, changed):
        expected = picture(pipe)
    assert np.abs(expected - plain).max() > 0.02, "the file of this test does nothing"
    with fuse(pipe, path, path, method="subject") as session:
        assert {layer.layer.name for layer in session.plan.layers} == set(changed)
        assert session.remarks == []
        got = picture(pipe)
    np.testing.assert_allclose(got, expected, atol=2e-4)


@pytest.mark.parametrize("case", ["dora", "oft", "boft", "ia3", "glora"])
def test_a_users_merged_adapter_is_taken_out_of_the_weight_that_an_update_depends_on(pipe, tmp_path, case):
    path, changed = made(pipe, "kohya", case, tmp_path)
    own, _ = made(pipe, "diffusers", "lora", tmp_path, seed=1)
    expected = [layer.energy_subject for layer in load_plan(FusionConfig(subject=path, style=path), pipe).layers]
    try:
        pipe.load_lora_weights(own, adapter_name="own")
        pipe.fuse_lora()
        fused = [layer.energy_subject for layer in load_plan(FusionConfig(subject=path, style=path), pipe).layers]
    finally:
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
    np.testing.assert_allclose(fused, expected, rtol=1e-3)
    assert len(expected) == len(changed)


@pytest.mark.parametrize("kind", ["dora", "oft", "boft", "ia3"])
def test_a_merged_adapter_that_cannot_be_taken_out_leaves_no_original(kind):
    configs = {
        "dora": peft.LoraConfig(use_dora=True, target_modules=["0"], init_lora_weights=False),
        "oft": peft.OFTConfig(oft_block_size=4, target_modules=["0"], init_weights=False),
        "boft": peft.BOFTConfig(boft_block_size=4, target_modules=["0"], init_weights=False),
        "ia3": peft.IA3Config(target_modules=["0"], feedforward_modules=[], init_ia3_weights=False),
    }
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), configs[kind])
    (layer,) = model.base_model.model
    plain = layer.base_layer.weight.detach().clone()
    assert torch.equal(original_weight(layer)[0](), plain)
    model.merge_adapter()
    assert not torch.equal(layer.base_layer.weight, plain)
    assert original_weight(layer) is None


def test_layers_that_are_neither_linear_nor_convolutions_are_left_out(tmp_path):
    pipe = stable_diffusion()
    path, changed = made(pipe, "kohya", "lora", tmp_path)
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    norm, embedding = "lora_unet_mid_block_attentions_0_norm", "lora_te_text_model_embeddings_token_embedding"
    tensors |= {f"{norm}.weight": torch.ones(64), f"{norm}.on_input": torch.tensor(0)}
    tensors |= {f"{embedding}.lora_down.weight": torch.ones(1, 200), f"{embedding}.lora_up.weight": torch.ones(32, 1)}
    save_file(tensors, path)
    with fuse(pipe, path, path, method="subject") as session:
        assert len(session._layers) == len(changed)
        assert "need the model's own weights" in session.remarks[0]
        assert "mid_block.attentions.0.norm" in session.remarks[0]
        picture(pipe)


def test_weights_that_are_not_finite_are_named(tmp_path):
    pipe = stable_diffusion()
    path, _ = made(pipe, "kohya", "dora", tmp_path)
    dict(pipe.unet.named_modules())[ATTENTION[0]].weight.data.fill_(float("nan"))
    with pytest.raises(EstLoraError, match=f"with the model's own weight its update of {ATTENTION[0]} isn't finite"):
        load_plan(FusionConfig(subject=path, style=path), pipe)


def test_a_file_that_nothing_can_be_read_for_is_refused_as_such(tmp_path):
    pipe = stable_diffusion()
    path, _ = made(pipe, "kohya", "oft", tmp_path)
    pipe.unet.to("meta")
    with pytest.raises(EstLoraError, match="only layers that need the model's own weights"):
        load_plan(FusionConfig(subject=path, style=path), pipe)


def test_a_model_on_disk_gives_the_same_plan(pipe, tmp_path):
    path, _ = made(pipe, "kohya", "dora", tmp_path)
    other, _ = made(pipe, "kohya", "oft", tmp_path, seed=1)
    config = FusionConfig(subject=path, style=other)
    expected = load_plan(config, pipe)
    pipe.save_pretrained(tmp_path / "model")
    pipe.unet.save_pretrained(tmp_path / "shards" / "unet", max_shard_size="300KB")
    assert len(list((tmp_path / "shards" / "unet").glob("*.safetensors"))) > 2
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "model/unet/diffusion_pytorch_model.fp16.safetensors")
    places = [tmp_path / "model", tmp_path / "shards", write_checkpoint(pipe, tmp_path / "one.safetensors")]
    for place in places:
        weight_of = ModelFile(place).weight_of
        files = (LoraFile.load(name).on("unet", weight_of) for name in (path, other))
        plan = FusionPlan.of(*files, config)
        assert [layer.rho for layer in plan.layers] == [layer.rho for layer in expected.layers]
        assert plan.remarks == []


def test_a_session_needs_a_plan_that_was_made_with_the_model(pipe, tmp_path):
    path, _ = made(pipe, "kohya", "dora", tmp_path)
    plan = load_plan(FusionConfig(subject=path, style=path, method="sum"))
    with pytest.raises(EstLoraError, match="depends on the layer's own weight"):
        FusionSession(pipe.unet, plan).attach()
    assert not any(module._forward_hooks for module in pipe.unet.modules())


def table() -> str:
    """The cells as `docs/formats.md` shows them."""
    conventions = list(dict.fromkeys(convention for convention, _ in CELLS))
    cases = list(dict.fromkeys(case for _, case in CELLS))
    rows = [["kind", *conventions], ["---"] * (1 + len(conventions))]
    models = ", ".join(MODELS)
    rows += [[case, *(models if (convention, case) in CELLS else "" for convention in conventions)] for case in cases]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def test_the_docs_have_the_table_of_these_cells():
    page = Path(__file__).parents[2] / "docs" / "formats.md"
    assert table() in page.read_text(encoding="utf-8"), f"docs/formats.md should have this table:\n{table()}"
