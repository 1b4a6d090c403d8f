"""Checkpoints in one file, in the original naming, made from tiny diffusers pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def write_checkpoint(pipe: StableDiffusionPipeline, path: Path) -> Path:
    """Saves all weights of `pipe` as one file, as Stable Diffusion 1 (one text encoder) or XL (two) is distributed.

    The two text encoders of XL must differ in width: diffusers tells them apart by it.
    """
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in _unet(pipe.unet).items()}
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in _vae(pipe.vae).items()}
    first = {_clip_name(name): tensor for name, tensor in pipe.text_encoder.state_dict().items()}
    if hasattr(pipe, "text_encoder_2"):
        tensors |= {f"conditioner.embedders.0.transformer.{name}": tensor for name, tensor in first.items()}
        second = _open_clip(pipe.text_encoder_2)
        tensors |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in second.items()}
    else:
        first["text_model.embeddings.position_ids"] = torch.arange(16)[None]
        tensors |= {f"cond_stage_model.transformer.{name}": tensor for name, tensor in first.items()}
    # Real files have more in them than a pipeline needs.
    tensors |= {"alphas_cumprod": torch.ones(10), "model_ema.decay": torch.tensor(0.9)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    return path


def _unet(unet: torch.nn.Module) -> Tensors:
    return {unet_name(name, unet.config.down_block_types): t for name, t in unet.state_dict().items()}


def unet_name(name: str, down_block_types: tuple[str, ...]) -> str:
    """The original spelling of a tensor of diffusers' UNet."""
    stem, _, leaf = name.rpartition(".")
    if stem in _UNET_ENDS:
        return f"{_UNET_ENDS[stem]}.{leaf}"
    side, *parts = name.split(".")
    if side == "mid_block":
        kind, number, *rest = parts
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}.{_inside(kind, rest)}"
    level, kind, number, *rest = parts
    level, number = int(level), int(number)
    if kind == "downsamplers":
        return f"input_blocks.{3 * level + 3}.0.op.{rest[-1]}"
    if kind == "upsamplers":
        has_attention = "CrossAttn" in down_block_types[len(down_block_types) - 1 - level]
        return f"output_blocks.{3 * level + 2}.{2 if has_attention else 1}.conv.{rest[-1]}"
    block = f"input_blocks.{3 * level + number + 1}" if side == "down_blocks" else f"output_blocks.{3 * level + number}"
    return f"{block}.{1 if kind == 'attentions' else 0}.{_inside(kind, rest)}"


def _inside(kind: str, rest: list[str]) -> str:
    return ".".join(rest if kind == "attentions" else [_RESNET[rest[0]], *rest[1:]])


def _vae(vae: torch.nn.Module) -> Tensors:
    levels, made = len(vae.config.block_out_channels), {}
    for name, tensor in vae.state_dict().items():
        renamed = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        renamed = renamed.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
        renamed = renamed.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        for level in range(levels):
            renamed = renamed.replace(f"down_blocks.{level}.", f"down.{level}.")
            renamed = renamed.replace(f"up_blocks.{level}.", f"up.{levels - 1 - level}.")
        renamed = renamed.replace("resnets", "block")
        if "attentions.0." in renamed:
            before, _, rest = renamed.partition("mid_block.attentions.0.")
            stem, _, leaf = rest.rpartition(".")
            renamed = f"{before}mid.attn_1.{_VAE_ATTENTION[stem]}.{leaf}"
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor  # attention by 1 x 1 convolutions
        made[renamed] = tensor
    return made


def _clip_name(name: str) -> str:
    return name if name.startswith("text_model.") else f"text_model.{name}"  # transformers left it out at 5.6


def _open_clip(encoder: torch.nn.Module) -> Tensors:
    weights: Mapping[str, Tensor] = {_clip_name(name): t for name, t in encoder.state_dict().items()}
    weights = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    made = {
        "positional_embedding": weights["embeddings.position_embedding.weight"],
        "token_embedding.weight": weights["embeddings.token_embedding.weight"],
        "ln_final.weight": weights["final_layer_norm.weight"],
        "ln_final.bias": weights["final_layer_norm.bias"],
        "text_projection": weights["text_projection.weight"].T,
        "logit_scale": torch.tensor(4.6),
    }
    for layer in range(encoder.config.num_hidden_layers):
        old, new = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for leaf in ("weight", "bias"):
            fused = [weights[f"{old}.self_attn.{p}_proj.{leaf}"] for p in "qkv"]
            made[f"{new}.attn.in_proj_{leaf}"] = torch.cat(fused)
            made[f"{new}.attn.out_proj.{leaf}"] = weights[f"{old}.self_attn.out_proj.{leaf}"]
            made |= {f"{new}.{n}.{leaf}": weights[f"{old}.{o}.{leaf}"] for o, n in _OPEN_CLIP.items()}
    return made
