"""The stand-in for DINO: a small vision transformer, trained on the demo's world, in a folder as DINO's.

It learns to tell object, colour, way of drawing and background from its CLS token, and has never seen what the LoRAs
teach. It computes what transformers' ViT computes and is written by its names, so that what reads DINO reads this one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, interpolate, scaled_dot_product_attention
from tqdm import tqdm
from transformers import ViTConfig

from est_lora.demo.fitting import learning_rate
from est_lora.demo.lessons import to_pixels
from est_lora.demo.styles import BACKGROUNDS, COLOURS, FILLS, LINES, SIZE, TONES, Style
from est_lora.demo.things import THINGS
from est_lora.demo.world import Scene, draw, random_scene

LABELS = {
    "thing": tuple(THINGS),
    "colour": tuple(COLOURS),
    "fill": FILLS,
    "line": LINES,
    "tone": tuple(TONES),
    "background": tuple(BACKGROUNDS),
}
"""What the stand-in learns to tell; the colour is that of the object's main part."""
STEPS = 800
"""How long the stand-in is trained."""
_CONFIG, _PREPROCESSOR, _WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
_TOLD = "told.json"
_EPSILON = 1e-6  # of every LayerNorm
# The parts of the network, and what the files of transformers call them.
_NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "attn.proj": "attention.output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm": "layernorm",
}


class Size(NamedTuple):
    """How large a transformer is."""

    img_size: int = SIZE
    patch_size: int = 8
    embed_dim: int = 128
    depth: int = 5
    num_heads: int = 4


class Patches(nn.Module):
    """Cuts pictures (batch, 3, side, side) into tokens (batch, tokens, width)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, size.embed_dim, size.patch_size, size.patch_size)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.proj(pictures).flatten(2).mT


class Attention(nn.Module):
    """Self-attention, (batch, tokens, width) to the same."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.num_heads
        self.qkv = nn.Linear(size.embed_dim, 3 * size.embed_dim)
        self.proj = nn.Linear(size.embed_dim, size.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers, (batch, tokens, width) to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class Block(nn.Module):
    """One layer of the transformer, (batch, tokens, width) to the same."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(size.embed_dim, _EPSILON), Attention(size)
        self.norm2, self.mlp = nn.LayerNorm(size.embed_dim, _EPSILON), Mlp(size.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A vision transformer with a CLS token, pictures (batch, 3, side, side) to features (batch, width)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.patch_embed = Patches(size)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, size.embed_dim))
        tokens = 1 + (size.img_size // size.patch_size) ** 2
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, tokens, size.embed_dim))
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.depth)))
        self.norm = nn.LayerNorm(size.embed_dim, _EPSILON)

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.patch_embed(pictures)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.norm(self.blocks(x))[:, 0]


def save(network: Transformer, size: Size, folder: Path) -> None:
    """Writes the network as transformers writes a ViT; its pictures are to be scaled to [-1, 1]."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_renamed(network.state_dict()), folder / _WEIGHTS)
    prepared = {"size": size.img_size, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / _PREPROCESSOR).write_text(json.dumps(prepared, indent=2) + "\n", encoding="utf-8")
    ViTConfig(  # written last: a folder with a configuration is whole
        hidden_size=size.embed_dim,
        intermediate_size=4 * size.embed_dim,
        num_hidden_layers=size.depth,
        num_attention_heads=size.num_heads,
        image_size=size.img_size,
        patch_size=size.patch_size,
        layer_norm_eps=_EPSILON,
    ).save_pretrained(folder)


def _renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The network's weights by the names that transformers' files have."""
    result = {}
    for name, weight in weights.items():
        block, part = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+?)", name).groups()
        place = f"encoder.layer.{block}." if block else ""
        stem, dot, kind = part.rpartition(".") if part not in _NAMES else (part, "", "")
        if stem == "attn.qkv":
            for third, value in zip(("query", "key", "value"), weight.chunk(3)):
                result[f"{place}attention.attention.{third}.{kind}"] = value.contiguous()
        else:
            result[f"{place}{_NAMES[stem]}{dot}{kind}"] = weight.contiguous()
    return result


def is_there(folder: Path) -> bool:
    """Whether `folder` holds an extractor."""
    return all((folder / file).is_file() for file in (_CONFIG, _PREPROCESSOR, _WEIGHTS))


def told(folder: Path) -> dict[str, float]:
    """The share of unseen pictures of which a trained stand-in tells each label right; empty for other extractors."""
    path = folder / _TOLD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def train(folder: Path, steps: int = STEPS, batch: int = 32, seed: int = 0, size: Size | None = None) -> None:
    """Trains the stand-in, writes it to `folder`, and beside it, what `told` gives.

    Args:
        folder: where it is written.
        steps: optimiser steps.
        batch: pictures in a step.
        seed: of weights and pictures; the same gives the same network.
        size: how large it is; about a million parameters if not given.
    """
    size = size or Size()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Transformer(size)
        heads = nn.ModuleDict({label: nn.Linear(size.embed_dim, len(names)) for label, names in LABELS.items()})
    trained = nn.ModuleList([network, heads])
    optimiser = torch.optim.AdamW(trained.parameters(), weight_decay=0.05)
    with tqdm(range(steps), desc="training the stand-in extractor", unit="step") as progress:
        for step in progress:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step / steps, 1e-3, warmup=0.05, decay_from=0.3)
            pictures, labels = _batch(np.random.default_rng([seed, step]), batch)
            features = network(_blurred(pictures, np.random.default_rng([seed, step, 1])))
            loss = sum((cross_entropy(heads[label](features), labels[label]) for label in LABELS), torch.zeros(()))
            loss.backward()
            nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            progress.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    right = _right(network.eval(), heads, seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _TOLD).write_text(json.dumps(right, indent=2) + "\n", encoding="utf-8")
    save(network, size, folder)


def labels_of(scene: Scene) -> dict[str, str]:
    """What there is to tell of a scene of the base's world, by the names of `LABELS`."""
    style = scene.style
    if not isinstance(style, Style):
        raise TypeError(f"{style!r} isn't of the base's world")
    return {
        "thing": scene.thing,
        "colour": scene.colours[scene.main_part],
        "fill": style.fill,
        "line": style.line,
        "tone": style.tone,
        "background": scene.background,
    }


def _batch(rng: np.random.Generator, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Pictures (count, 3, SIZE, SIZE) in [-1, 1] and for each label its numbers, shape (count,)."""
    scenes = [random_scene(rng) for _ in range(count)]
    pictures = to_pixels(np.stack([draw(scene) for scene in scenes]))
    told_apart = [labels_of(scene) for scene in scenes]
    labels = {name: torch.tensor([names.index(each[name]) for each in told_apart]) for name, names in LABELS.items()}
    return pictures, labels


def _blurred(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Every second batch a little out of focus, as pictures that come from smaller ones are."""
    side = int(rng.integers(SIZE // 2, SIZE + 1)) if rng.random() < 0.5 else SIZE
    small = interpolate(pictures, size=(side, side), mode="bilinear", antialias=True)
    return interpolate(small, size=pictures.shape[2:], mode="bicubic").clamp(-1, 1)


@torch.inference_mode()
def _right(network: Transformer, heads: nn.ModuleDict, seed: int) -> dict[str, float]:
    """The share of 512 unseen pictures of which each label is told right."""
    pictures, labels = _batch(np.random.default_rng([seed, 0, 0, 1]), 512)
    features = network(pictures)
    return {label: float((heads[label](features).argmax(1) == labels[label]).float().mean()) for label in LABELS}
