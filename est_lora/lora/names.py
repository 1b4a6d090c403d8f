"""Layer names of every convention become one `LayerId`.

A file names a layer in the diffusers spelling or the original (ldm/sgm) one, with dots or, as kohya does, with
underscores. Underscores also occur inside module names (`to_q`, `proj_in`), so they are never simply replaced: a name
is read along `_UNET`, `_ORIGINAL` or `_TEXT_ENCODER`, the trees of module names that exist. The order in which a tree
lists its branches is the order in which the network runs, so it also sorts layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

UNET = "unet"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")

Tree = Mapping[str, "Tree"]
_INDEX = "#"
_END = ""  # a name may stop here, though longer ones exist
_LEAF: Tree = {}


def _leaves(*names: str) -> dict[str, Tree]:
    return dict.fromkeys(names, _LEAF)


def _each(tree: Tree) -> Tree:
    return {_INDEX: tree}


_ATTENTION: Tree = {**_leaves("to_q", "to_k", "to_v"), "to_out": {_END: _LEAF, _INDEX: _LEAF}}
_FEED_FORWARD: Tree = {"net": _each({_END: _LEAF, "proj": _LEAF})}
_TRANSFORMER: Tree = {
    **_leaves("norm", "proj_in"),
    "transformer_blocks": _each(
        {"norm1": _LEAF, "attn1": _ATTENTION, "norm2": _LEAF, "attn2": _ATTENTION, "norm3": _LEAF, "ff": _FEED_FORWARD}
    ),
    "proj_out": _LEAF,
}
_RESNET: Tree = _leaves("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")
_EMBEDDING: Tree = _leaves("linear_1", "cond_proj", "linear_2")
_LEVEL: Tree = {"resnets": _each(_RESNET), "attentions": _each(_TRANSFORMER)}
_RESAMPLE: Tree = _each(_leaves("conv"))
_UNET: Tree = {
    "time_embedding": _EMBEDDING,
    "add_embedding": _EMBEDDING,
    "conv_in": _LEAF,
    "down_blocks": _each({**_LEVEL, "downsamplers": _RESAMPLE}),
    "mid_block": _LEVEL,
    "up_blocks": _each({**_LEVEL, "upsamplers": _RESAMPLE}),
    "conv_norm_out": _LEAF,
    "conv_out": _LEAF,
}

_ORIGINAL_RESNET: Tree = {
    "in_layers": _each(_LEAF),
    "emb_layers": _each(_LEAF),
    "out_layers": _each(_LEAF),
    "skip_connection": _LEAF,
}
_ORIGINAL_BLOCK: Tree = {_END: _LEAF, **_ORIGINAL_RESNET, **_TRANSFORMER, **_leaves("op", "conv")}
_ORIGINAL: Tree = {
    "time_embed": _each(_LEAF),
    "label_emb": _each(_each(_LEAF)),
    "input_blocks": _each(_each(_ORIGINAL_BLOCK)),
    "middle_block": _each(_ORIGINAL_BLOCK),
    "output_blocks": _each(_each(_ORIGINAL_BLOCK)),
    "out": _each(_LEAF),
}

_TEXT_LAYER: Tree = {
    "layer_norm1": _LEAF,
    "self_attn": _leaves("q_proj", "k_proj", "v_proj", "out_proj"),
    "layer_norm2": _LEAF,
    "mlp": _leaves("fc1", "fc2"),
}
_TEXT_MODEL: Tree = {
    "embeddings": _leaves("token_embedding", "position_embedding"),
    "encoder": {"layers": _each(_TEXT_LAYER)},
    "final_layer_norm": _LEAF,
}
# Newer transformers drop the `text_model` level.
_TEXT_ENCODER: Tree = {"text_model": _TEXT_MODEL, **_TEXT_MODEL, "text_projection": _LEAF}

_ORIGINAL_LEAVES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ORIGINAL_ENDS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_ATTENTION_PROJECTION = re.compile(r"\.attn[12]\.(to_q|to_k|to_v|to_out\.0)$")
_INPUT_BLOCK = re.compile(r"input_blocks\.(\d+)\.0\.(in_layers|op)\b")
_DOWN_RESNET = re.compile(r"down_blocks\.(\d+)\.resnets\.(\d+)\.")

# (prefix, part, separator), the longer of two that begin alike first.
_PREFIXES = (
    ("lora_unet_", UNET, "_"),
    ("lora_te1_", "text_encoder", "_"),
    ("lora_te2_", "text_encoder_2", "_"),
    ("lora_te_", "text_encoder", "_"),
    ("lycoris_", UNET, "_"),
    ("text_encoder_2.", "text_encoder_2", "."),
    ("text_encoder.", "text_encoder", "."),
    ("model.diffusion_model.", UNET, "."),
    ("diffusion_model.", UNET, "."),
    ("unet.unet.", UNET, "."),
    ("unet.", UNET, "."),
)
_WRAPPER = "base_model.model."


@dataclass(frozen=True)
class LayerId:
    """A layer: the part of the model it belongs to, and its path there as diffusers spells it.

    Attributes:
        part: `unet`, `text_encoder` or `text_encoder_2`.
        name: e.g. `down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q`.
    """

    part: str
    name: str

    @property
    def is_attention(self) -> bool:
        """Whether this is a q, k, v or out projection of one of the UNet's attention blocks."""
        return self.part == UNET and _ATTENTION_PROJECTION.search(self.name) is not None

    @cached_property
    def order(self) -> tuple[tuple[int, str], ...]:
        """A key that sorts layers in the order in which the network runs them."""
        return (((UNET, *TEXT_ENCODERS).index(self.part), ""), *_order(self.name.split(".")))


@dataclass(frozen=True)
class UNetLayout:
    """How many residual blocks each level of a UNet has on its way down; needed to read original (ldm/sgm) names.

    Attributes:
        resnets: one number a level. Empty: two at every level, as in SD1.5 and SDXL.
    """

    resnets: tuple[int, ...] = ()

    @classmethod
    def of(cls, names: Iterable[str]) -> UNetLayout:
        """The layout of a model, from the diffusers names of its modules."""
        levels: dict[int, int] = {}
        for found in filter(None, map(_DOWN_RESNET.match, names)):
            level, index = int(found[1]), int(found[2])
            levels[level] = max(levels.get(level, 0), index + 1)
        return cls(tuple(levels[level] for level in sorted(levels)))

    @classmethod
    def of_original(cls, names: Iterable[str]) -> UNetLayout:
        """The layout of a model, from the original (ldm/sgm) names of its modules."""
        blocks = {(int(found[1]), found[2]) for found in filter(None, map(_INPUT_BLOCK.match, names))}
        resnets = [0]
        for _, kind in sorted(blocks):
            if kind == "op":
                resnets.append(0)
            else:
                resnets[-1] += 1
        return cls(tuple(resnets))

    def down(self, block: int) -> tuple[int, int] | None:
        """(level, position) of `input_blocks.<block>`, block >= 1; the position after the last is the downsampler."""
        return self._locate(block - 1, self.resnets)

    def up(self, block: int) -> tuple[int, int] | None:
        """(level, position) of `output_blocks.<block>`. A level has one more residual block than on the way down."""
        return self._locate(block, self.resnets[::-1])

    def resnets_at(self, level: int) -> int:
        """Residual blocks of a level on the way down."""
        return self.resnets[level] if self.resnets else 2

    @staticmethod
    def _locate(block: int, resnets: tuple[int, ...]) -> tuple[int, int] | None:
        if not resnets:
            return divmod(block, 3)
        for level, count in enumerate(resnets):
            if block <= count:
                return level, block
            block -= count + 1
        return None


@dataclass(frozen=True)
class Name:
    """A layer's name as a file has it, understood.

    Attributes:
        layer: which layer it is.
        convention: `kohya` where written with underscores, `peft` where wrapped by PEFT, else `diffusers`.
        original: written in the original (ldm/sgm) spelling.
    """

    layer: LayerId
    convention: str
    original: bool


@lru_cache(1 << 12)  # two files mostly have the same names
def read_name(text: str, layout: UNetLayout) -> Name | None:
    """The layer that a file calls `text` (a key without its `.lora_down.weight` or the like), or None."""
    convention = "peft" if _WRAPPER in text else "diffusers"
    text = text.removeprefix(_WRAPPER)
    part, separator = UNET, "."
    for prefix, of_part, of_separator in _PREFIXES:
        if text.startswith(prefix):
            text, part, separator = text[len(prefix) :].removeprefix(_WRAPPER), of_part, of_separator
            break
    if separator == "_":
        convention = "kohya"
    if part != UNET:
        path = _walk(text, _TEXT_ENCODER, separator)
        if path and path[0] in _TEXT_MODEL:
            path.insert(0, "text_model")
        return Name(LayerId(part, ".".join(path)), convention, False) if path else None
    if path := _walk(text, _UNET, separator):
        if path[-1] == "to_out":  # before diffusers made it a list of modules
            path.append("0")
        return Name(LayerId(UNET, ".".join(path)), convention, False)
    if (path := _walk(text, _ORIGINAL, separator)) and (name := _from_original(path, layout)):
        return Name(LayerId(UNET, name), convention, True)
    return None


def _walk(text: str | None, tree: Tree, separator: str) -> list[str] | None:
    """`text` (None: nothing is left) split along `tree`, or None where no path of the tree spells it."""
    if text is None:
        return [] if tree is _LEAF or _END in tree else None
    for token, rest in _first_tokens(text, tree, separator):
        branch = tree[_INDEX if token.isdigit() else token]
        if (path := _walk(rest, branch, separator)) is not None:
            return [token, *path]
    return None


def _first_tokens(text: str, tree: Tree, separator: str) -> Iterator[tuple[str, str | None]]:
    head, more, rest = text.partition(separator)
    # No UNet has a hundred thousand of anything; a number is spelt as it is printed: not 01, not a superscript.
    if _INDEX in tree and len(head) < 6 and head.isascii() and head.isdigit() and head == str(int(head)):
        yield head, rest if more else None
    for token in tree:
        if token in (_INDEX, _END):
            continue
        if text == token:
            yield token, None
        elif text.startswith(token + separator):
            yield token, text[len(token) + len(separator) :]


def _from_original(path: list[str], layout: UNetLayout) -> str | None:
    """A path in the original spelling in diffusers' one, or None where the layout has no such block."""
    joined = ".".join(path)
    if joined in _ORIGINAL_ENDS:
        return _ORIGINAL_ENDS[joined]
    if path[0] == "middle_block":
        index, leaf = int(path[1]), ".".join(path[2:])
        return _in_block("mid_block", index // 2, leaf) if index < 3 else None
    if path[0] not in ("input_blocks", "output_blocks"):
        return None
    block, leaf = int(path[1]), ".".join(path[3:])
    if path[0] == "output_blocks":
        if (place := layout.up(block)) is None:
            return None
        name = f"up_blocks.{place[0]}"
        return f"{name}.upsamplers.0.conv" if leaf == "conv" else _in_block(name, place[1], leaf)
    if not block or (place := layout.down(block)) is None:
        return None
    name, is_resample = f"down_blocks.{place[0]}", place[1] == layout.resnets_at(place[0])
    if is_resample:
        return f"{name}.downsamplers.0.conv" if leaf == "op" else None
    return _in_block(name, place[1], leaf)


def _in_block(block: str, index: int, leaf: str) -> str | None:
    if leaf in _ORIGINAL_LEAVES:
        return f"{block}.resnets.{index}.{_ORIGINAL_LEAVES[leaf]}"
    if leaf.partition(".")[0] in _TRANSFORMER:
        return f"{block}.attentions.{index}.{leaf}"
    return None


def _order(path: list[str]) -> Iterator[tuple[int, str]]:
    """Where each token of a diffusers path stands among its siblings; unknown tokens come last, by name."""
    tree: Tree = _TEXT_ENCODER if path[0] in _TEXT_ENCODER else _UNET
    tokens = iter(path)
    for token in tokens:
        if token.isdigit():
            yield int(token), ""
            tree = tree.get(_INDEX, _LEAF)
        elif token not in tree:
            yield 1 << 30, token
            tree = _LEAF
        elif token in _LEVEL:  # a level runs resnet 0, attention 0, resnet 1, ...
            index = next(tokens, "0")
            yield int(index) if index.isdigit() else 0, ""
            yield list(_LEVEL).index(token), ""
            tree = tree[token].get(_INDEX, _LEAF)
        else:
            yield (1 << 20 if tree.keys() >= _LEVEL.keys() else list(tree).index(token)), ""
            tree = tree[token]
