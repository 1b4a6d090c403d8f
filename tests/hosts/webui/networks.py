"""A tiny UNet and tiny text encoders with the names that the hosts' models have, and really computing."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.files import CONTEXT, WIDTH, original_name

TEXT_LAYERS = tuple(
    f"text_model.encoder.layers.{layer}.{leaf}"
    for layer in (0, 1)
    for leaf in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        "mlp.fc1",
        "mlp.fc2",
    )
)
FIRST_WIDTH = {"sd15": CONTEXT, "sdxl": 16}  # of the first text encoder; together with the second it is CONTEXT
SECOND_WIDTH = CONTEXT - FIRST_WIDTH["sdxl"]
VOCABULARY, TOKENS, HEADS = 64, 6, 4
_RESNETS = ("input_blocks.1", "input_blocks.2", "input_blocks.4", "input_blocks.5", "output_blocks.5")
_ATTENTIONS = ("input_blocks.4.1", "middle_block.1", "output_blocks.5.1")


class ForgeLinear(nn.Module):
    """As Forge's own: no `nn.Linear`, but a weight and its sizes."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / in_features**0.5)
        self.bias = nn.Parameter(torch.randn(out_features) * 0.1) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class _Merging:
    """As everything in A1111: it asks the Lora extension to merge before it computes."""

    def forward(self, *args, **kwargs):
        if "networks" in sys.modules:
            sys.modules["networks"].network_apply_weights(self)
        return super().forward(*args, **kwargs)


class MergingLinear(_Merging, nn.Linear):
    pass


class MergingConv2d(_Merging, nn.Conv2d):
    pass


class MergingAttention(_Merging, nn.MultiheadAttention):
    pass


A1111 = SimpleNamespace(linear=MergingLinear, conv=MergingConv2d, attention=MergingAttention)
FORGE = SimpleNamespace(linear=ForgeLinear, conv=nn.Conv2d, attention=None)


def put(root: nn.Module, name: str, module: nn.Module) -> None:
    """Hangs `module` into the tree under its dotted name."""
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    root.add_module(leaf, module)


class UNet(nn.Module):
    """Two levels of two residual blocks, attention where `tests.files.BLOCKS` has it."""

    def __init__(self, kind: SimpleNamespace, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        put(self, "time_embed.0", kind.linear(8, WIDTH))
        put(self, "input_blocks.0.0", kind.conv(4, WIDTH, 3, padding=1))
        put(self, "input_blocks.3.0.op", kind.conv(WIDTH, WIDTH, 3, padding=1))
        put(self, "out.2", kind.conv(WIDTH, 4, 3, padding=1))
        for block in _RESNETS:
            put(self, f"{block}.0.in_layers.2", kind.conv(WIDTH, WIDTH, 3, padding=1))
        for block in _ATTENTIONS:
            inside = f"{block}.transformer_blocks.0"
            for number, source in ((1, WIDTH), (2, CONTEXT)):
                put(self, f"{inside}.attn{number}.to_q", kind.linear(WIDTH, WIDTH, bias=False))
                put(self, f"{inside}.attn{number}.to_k", kind.linear(source, WIDTH, bias=False))
                put(self, f"{inside}.attn{number}.to_v", kind.linear(source, WIDTH, bias=False))
                put(self, f"{inside}.attn{number}.to_out.0", kind.linear(WIDTH, WIDTH))
            put(self, f"{inside}.ff.net.0.proj", kind.linear(WIDTH, 8 * WIDTH))
            put(self, f"{inside}.ff.net.2", kind.linear(4 * WIDTH, WIDTH))
        self.eval().requires_grad_(False)

    def forward(self, x, timesteps=None, context=None, control=None, transformer_options=None, y=None):
        part = self.get_submodule
        angles = timesteps.float()[:, None] / torch.tensor([3.0, 10.0, 100.0, 1000.0])
        time = part("time_embed.0")(torch.cat([angles.sin(), angles.cos()], -1))
        h = part("input_blocks.0.0")(x) + time[:, :, None, None]
        for block in ("input_blocks.1", "input_blocks.2", "input_blocks.3", "input_blocks.4", "input_blocks.5"):
            h = self._block(block, h, context)
        h = self._attention("middle_block.1", h, context)
        h = self._block("output_blocks.5", h, context)
        return part("out.2")(functional.silu(h))

    def _block(self, block: str, h: Tensor, context: Tensor) -> Tensor:
        if block == "input_blocks.3":
            return h + self.get_submodule(f"{block}.0.op")(functional.silu(h))
        h = h + self.get_submodule(f"{block}.0.in_layers.2")(functional.silu(h))
        return self._attention(f"{block}.1", h, context) if f"{block}.1" in _ATTENTIONS else h

    def _attention(self, block: str, h: Tensor, context: Tensor) -> Tensor:
        part = self.get_submodule(f"{block}.transformer_blocks.0").get_submodule
        tokens = h.flatten(2).transpose(1, 2)
        for name in ("attn1", "attn2"):
            x = functional.layer_norm(tokens, tokens.shape[-1:])
            source = x if name == "attn1" else context
            q, k, v = part(f"{name}.to_q")(x), part(f"{name}.to_k")(source), part(f"{name}.to_v")(source)
            tokens = tokens + part(f"{name}.to_out.0")(functional.scaled_dot_product_attention(q, k, v))
        value, gate = part("ff.net.0.proj")(functional.layer_norm(tokens, tokens.shape[-1:])).chunk(2, -1)
        tokens = tokens + part("ff.net.2")(value * functional.gelu(gate))
        return h + functional.layer_norm(tokens, tokens.shape[-1:]).transpose(1, 2).reshape(h.shape)


class Clip(nn.Module):
    """The first text encoder, in transformers' names."""

    def __init__(self, kind: SimpleNamespace, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        put(self, "text_model.embeddings.token_embedding", nn.Embedding(VOCABULARY, width))
        for name in TEXT_LAYERS:
            inputs, outputs = _text_sizes(name, width)
            put(self, name, kind.linear(inputs, outputs))
        self.eval().requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.get_submodule("text_model.embeddings.token_embedding")(tokens)
        for number in (0, 1):
            part = self.get_submodule(f"text_model.encoder.layers.{number}").get_submodule
            n = functional.layer_norm(x, x.shape[-1:])
            q, k, v = (_heads(part(f"self_attn.{p}_proj")(n)) for p in "qkv")
            mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + part("self_attn.out_proj")(mixed)
            x = x + part("mlp.fc2")(functional.gelu(part("mlp.fc1")(functional.layer_norm(x, x.shape[-1:]))))
        return x


class OpenClip(nn.Module):
    """A1111's second text encoder, in open_clip's names: q, k and v are one matrix."""

    def __init__(self, kind: SimpleNamespace, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.token_embedding = nn.Embedding(VOCABULARY, width)
        for number in (0, 1):
            block = f"transformer.resblocks.{number}"
            put(self, f"{block}.attn", kind.attention(width, HEADS, batch_first=True))
            put(self, f"{block}.mlp.c_fc", kind.linear(width, 4 * width))
            put(self, f"{block}.mlp.c_proj", kind.linear(4 * width, width))
        self.eval().requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens)
        for number in (0, 1):
            part = self.get_submodule(f"transformer.resblocks.{number}").get_submodule
            n = functional.layer_norm(x, x.shape[-1:])
            x = x + part("attn")(n, n, n, need_weights=False)[0]
            x = x + part("mlp.c_proj")(functional.gelu(part("mlp.c_fc")(functional.layer_norm(x, x.shape[-1:]))))
        return x


def tokens_of(prompts: list[str]) -> Tensor:
    """Numbers that differ where prompts do."""
    rows = []
    for prompt in prompts:
        generator = torch.Generator().manual_seed(sum((i + 1) * ord(c) for i, c in enumerate(prompt.strip())))
        rows.append(torch.randint(0, VOCABULARY, (TOKENS,), generator=generator))
    return torch.stack(rows)


def unet_changes(unet: nn.Module, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of `unet` with `changes` by diffusers' names merged in."""
    return _changed(unet, {original_name(name): change for name, change in changes.items()})


def clip_changes(encoder: nn.Module, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a text encoder with `changes` by diffusers' names merged in."""
    if not isinstance(encoder, OpenClip):
        return _changed(encoder, changes)
    merged = {name: tensor.double().clone() for name, tensor in encoder.state_dict().items()}
    for name, change in changes.items():
        number, _, leaf = name.removeprefix("text_model.encoder.layers.").partition(".")
        block = f"transformer.resblocks.{number}"
        if leaf in ("mlp.fc1", "mlp.fc2"):
            merged[f"{block}.mlp.{'c_fc' if leaf == 'mlp.fc1' else 'c_proj'}.weight"] += change
        elif leaf == "self_attn.out_proj":
            merged[f"{block}.attn.out_proj.weight"] += change
        else:
            index = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj").index(leaf)
            width = change.shape[0]
            merged[f"{block}.attn.in_proj_weight"][index * width : (index + 1) * width] += change
    return {name: tensor.float() for name, tensor in merged.items()}


def _changed(model: nn.Module, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    merged = dict(model.state_dict())
    for name, change in changes.items():
        weight = merged[f"{name}.weight"]
        merged[f"{name}.weight"] = (weight.double() + change.reshape(weight.shape)).float()
    return merged


def _text_sizes(name: str, width: int) -> tuple[int, int]:
    return (
        (width, 4 * width) if name.endswith("fc1") else (4 * width, width) if name.endswith("fc2") else (width, width)
    )


def text_sizes(name: str, width: int) -> tuple[int, int]:
    """Inputs and outputs of a layer of a text encoder."""
    return _text_sizes(name, width)


def _heads(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:2], HEADS, -1).transpose(1, 2)
