"""Checkpoints with random weights that the WebUIs themselves load, small enough for a picture in seconds on a CPU.

The UNets have the real layouts, so every layer has its real name; only their widths differ. A1111 builds the model that a
.yaml beside the checkpoint describes, so all of it can be tiny. Forge tells the families apart by some of the UNet's widths
and takes the sizes of the text encoders and the autoencoder from files of its own, so only the UNet can be narrower.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.checkpoints import _clip_name, _open_clip, _unet, _vae
from tests.models import SD15, SDXL

_TOKENS = 77
_SIZES = 6 * 256  # SDXL's embedded numbers: height and width of the original, the crop and the target


@dataclass(frozen=True)
class _Encoder:
    """A text encoder's size."""

    width: int
    layers: int
    heads: int

    def config(self) -> dict[str, int]:
        """The size in transformers' words, for `CLIPTextConfig` and for a config.json alike."""
        return {
            "vocab_size": 49408,
            "max_position_embeddings": _TOKENS,
            "hidden_size": self.width,
            "intermediate_size": 4 * self.width,
            "projection_dim": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
        }


@dataclass(frozen=True)
class _Autoencoder:
    """The autoencoder's widths from the picture inwards, and how many blocks each level has."""

    widths: tuple[int, ...]
    blocks: int


_CLIP_L, _CLIP_G, _FULL_VAE = _Encoder(768, 12, 12), _Encoder(1280, 32, 20), _Autoencoder((128, 256, 512, 512), 2)
_TINY_CLIP, _TINY_VAE = _Encoder(64, 2, 4), _Autoencoder((32, 32, 32, 32), 1)
# The second encoder can only be one that open_clip knows by name; this is the smallest.
_TINY_OPEN_CLIP_NAME, _TINY_OPEN_CLIP = "ViT-S-16-alt", _Encoder(256, 10, 4)


def write_sd15(path: Path, *, tiny: bool = False, seed: int = 0) -> Path:
    """Writes a checkpoint of Stable Diffusion 1's layout.

    Args:
        path: the `.safetensors` file.
        tiny: one for A1111; it gets a .yaml and a folder with a tokenizer beside it, and must stay there.
        seed: other weights, same layout.
    """
    text, vae, widths = (_TINY_CLIP, _TINY_VAE, (32, 64, 128, 128)) if tiny else (_CLIP_L, _FULL_VAE, (320,) * 4)
    config = _narrow(SD15, widths, text.width)
    with torch.device("meta"):
        shapes = _common(config, vae)
        encoder = CLIPTextModel(CLIPTextConfig(**text.config())).state_dict()
    shapes |= {f"cond_stage_model.transformer.{_clip_name(name)}": tensor for name, tensor in encoder.items()}
    _save(shapes, seed, path, "cond_stage_model.transformer")
    if tiny:
        embedder = {"version": _clip_folder(path, text)}
        network = _network(widths) | {
            "image_size": 32,
            "attention_resolutions": [4, 2, 1],
            "num_heads": 8,
            "transformer_depth": 1,
            "context_dim": text.width,
        }
        parameters = {
            "linear_start": 0.00085,
            "linear_end": 0.012,
            "num_timesteps_cond": 1,
            "timesteps": 1000,
            "image_size": 64,
            "channels": 4,
            "conditioning_key": "crossattn",
            "scale_factor": 0.18215,
            "use_ema": False,
            "unet_config": _part("ldm.modules.diffusionmodules.openaimodel.UNetModel", network),
            "first_stage_config": _part("ldm.models.autoencoder.AutoencoderKL", _autoencoder(vae)),
            "cond_stage_config": _part("ldm.modules.encoders.modules.FrozenCLIPEmbedder", embedder),
        }
        _describe(path, "ldm.models.diffusion.ddpm.LatentDiffusion", parameters)
    return path


def write_sdxl(path: Path, *, tiny: bool = False, seed: int = 0) -> Path:
    """Writes a checkpoint of SDXL's layout; the arguments are `write_sd15`'s.

    Forge's has 1.2 billion weights, most of them in the second text encoder.
    """
    first, second, vae = (_TINY_CLIP, _TINY_OPEN_CLIP, _TINY_VAE) if tiny else (_CLIP_L, _CLIP_G, _FULL_VAE)
    widths = (32, 64, 128) if tiny else (320,) * 3
    config = _narrow(SDXL, widths, first.width + second.width)
    config |= {"projection_class_embeddings_input_dim": second.width + _SIZES}
    with torch.device("meta"):
        shapes = _common(config, vae)
        encoder = CLIPTextModel(CLIPTextConfig(**first.config())).state_dict()
        pooling = _open_clip(CLIPTextModelWithProjection(CLIPTextConfig(**second.config())))
    shapes |= {f"conditioner.embedders.0.transformer.{_clip_name(name)}": tensor for name, tensor in encoder.items()}
    shapes |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in pooling.items()}
    _save(shapes, seed, path, "conditioner.embedders.0.transformer")
    if tiny:
        network = _network(widths) | {
            "attention_resolutions": [4, 2],
            "num_head_channels": 8,
            "transformer_depth": list(SDXL["transformer_layers_per_block"]),
            "context_dim": first.width + second.width,
            "use_linear_in_transformer": True,
            "num_classes": "sequential",
            "adm_in_channels": second.width + _SIZES,
        }
        denoiser = {"num_idx": 1000} | {
            f"{part}_config": {"target": f"sgm.modules.diffusionmodules.{target}"}
            for part, target in (
                ("weighting", "denoiser_weighting.EpsWeighting"),
                ("scaling", "denoiser_scaling.EpsScaling"),
                ("discretization", "discretizer.LegacyDDPMDiscretization"),
            )
        }
        parameters = {
            "scale_factor": 0.13025,
            "disable_first_stage_autocast": True,
            "denoiser_config": _part("sgm.modules.diffusionmodules.denoiser.DiscreteDenoiser", denoiser),
            "network_config": _part("sgm.modules.diffusionmodules.openaimodel.UNetModel", network),
            "conditioner_config": _part("sgm.modules.GeneralConditioner", _embedders(path, first)),
            "first_stage_config": _part("sgm.models.autoencoder.AutoencoderKLInferenceWrapper", _autoencoder(vae)),
        }
        _describe(path, "sgm.models.diffusion.DiffusionEngine", parameters)
    return path


def _narrow(config: Mapping[str, Any], widths: tuple[int, ...], context: int) -> dict[str, Any]:
    return {**config, "block_out_channels": widths, "cross_attention_dim": context, "attention_head_dim": 8}


def _common(config: Mapping[str, Any], vae: _Autoencoder) -> dict[str, Tensor]:
    unet = UNet2DConditionModel(**config)
    levels = len(vae.widths)
    autoencoder = AutoencoderKL(
        block_out_channels=vae.widths,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=vae.blocks,
        latent_channels=4,
    )
    shapes = {f"model.diffusion_model.{name}": tensor for name, tensor in _unet(unet).items()}
    return shapes | {f"first_stage_model.{name}": tensor for name, tensor in _vae(autoencoder).items()}


def _save(shapes: Mapping[str, Tensor], seed: int, path: Path, encoder: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: _drawn(name, shapes[name].shape, generator).half() for name in sorted(shapes)}
    tensors[f"{encoder}.text_model.embeddings.position_ids"] = torch.arange(_TOKENS)[None]
    save_file(tensors, path, metadata={"format": "pt"})


def _drawn(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Weights that neither fade nor blow up over the depth of a network, and with which the words matter."""
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 0:
        return torch.tensor(4.6)  # logit_scale, which no picture depends on
    if len(shape) == 1:
        return 1 + 0.1 * noise if name.endswith("weight") else 0.05 * noise
    if "embedding" in name:
        return noise if "token" in name else 0.3 * noise  # which word it is counts for more than where it stands
    # A softmax of small products is an average over all words, the same for every prompt: q and k get larger ones.
    gain = 1.5 if ".attn" in name else 1.0
    return gain * noise / math.sqrt(math.prod(shape[1:]))


def _part(target: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {"target": target, "params": parameters}


def _network(widths: tuple[int, ...]) -> dict[str, Any]:
    return {
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": 2,
        "use_spatial_transformer": True,
        "use_checkpoint": False,
        "legacy": False,
    }


def _autoencoder(vae: _Autoencoder) -> dict[str, Any]:
    return {
        "embed_dim": 4,
        "monitor": "val/rec_loss",
        "ddconfig": {
            "double_z": True,
            "z_channels": 4,
            "resolution": 256,
            "in_channels": 3,
            "out_ch": 3,
            "ch": vae.widths[0],
            "ch_mult": [width // vae.widths[0] for width in vae.widths],
            "num_res_blocks": vae.blocks,
            "attn_resolutions": [],
            "dropout": 0.0,
        },
        "lossconfig": {"target": "torch.nn.Identity"},
    }


def _embedders(path: Path, first: _Encoder) -> dict[str, Any]:
    """SDXL's conditions: the words, twice, and three pairs of numbers."""
    modules = "sgm.modules.encoders.modules"
    version = _clip_folder(path, first)
    words = {"version": version, "layer": "hidden", "layer_idx": first.layers - 1}
    pooling = {
        "arch": _TINY_OPEN_CLIP_NAME,
        "version": "none",
        "layer": "penultimate",
        "always_return_pooled": True,
        "legacy": False,
    }
    sizes = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
    embedders = [
        {"input_key": "txt", **_part(f"{modules}.FrozenCLIPEmbedder", words)},
        {"input_key": "txt", **_part(f"{modules}.FrozenOpenCLIPEmbedder2", pooling)},
        *({"input_key": key, **_part(f"{modules}.ConcatTimestepEmbedderND", {"outdim": 256})} for key in sizes),
    ]
    return {"emb_models": [{"is_trainable": False, **embedder} for embedder in embedders]}


def _clip_folder(path: Path, text: _Encoder) -> str:
    """A folder that transformers makes a tokenizer and the tiny encoder from, without asking the network.

    The tokenizer knows letters, not words: which words a picture is of makes no difference here.
    """
    folder = path.with_suffix(".clip").absolute()
    folder.mkdir(exist_ok=True)
    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    known = [*letters, *(f"{letter}</w>" for letter in letters)]
    ends = ["<|startoftext|>", "<|endoftext|>"]
    filler = [f"<|{number}|>" for number in range(text.config()["vocab_size"] - len(known) - len(ends))]
    vocabulary = {token: number for number, token in enumerate([*known, *filler, *ends])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    config = {"model_type": "clip_text_model", **text.config()}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


def _describe(path: Path, target: str, parameters: Mapping[str, Any]) -> None:
    model = {"model": _part(target, parameters)}
    path.with_suffix(".yaml").write_text(json.dumps(model, indent=1), encoding="utf-8")  # any JSON is YAML
