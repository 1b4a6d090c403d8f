"""Reading a LoRA file: safetensors of any convention in, one update per layer out."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from est_lora.errors import EstLoraError, nearest, quote
from est_lora.lora.kinds import KINDS, build
from est_lora.lora.names import UNET, LayerId, UNetLayout, read_name
from est_lora.lora.scaling import PeftScaling
from est_lora.lora.update import Update, is_finite

LORA = "lora"

# How a key ends -> what the tensor is, and whose convention that is.
_FACTORS = {
    ".lora_down.weight": ("down", "kohya"),
    ".lora_up.weight": ("up", "kohya"),
    ".lora_A.weight": ("down", "peft"),
    ".lora_B.weight": ("up", "peft"),
    ".lora_A.default.weight": ("down", "peft"),
    ".lora_B.default.weight": ("up", "peft"),
    ".lora.down.weight": ("down", "diffusers"),
    ".lora.up.weight": ("up", "diffusers"),
    ".lora_linear_layer.down.weight": ("down", "diffusers"),
    ".lora_linear_layer.up.weight": ("up", "diffusers"),
    "_lora.down.weight": ("down", "diffusers-processor"),
    "_lora.up.weight": ("up", "diffusers-processor"),
}
_ALPHA = ".alpha"
_BIAS = ".diff_b"
# How a key ends -> the kind of layer that has such a tensor. Kinds that can't be built are recognised and counted.
_OTHER_KINDS = {
    ".lora_mid.weight": "tucker",
    ".dora_scale": "dora",
    ".lora_magnitude_vector": "dora",
    ".lora_magnitude_vector.weight": "dora",
    ".lora_magnitude_vector.default.weight": "dora",
    ".lora_A.bias": "lora-bias",
    ".lora_B.bias": "lora-bias",
    **{f".hada_{name}": "loha" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{name}": "lokr" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")},
    ".diff": "full",
    _BIAS: "full",
    ".oft_blocks": "oft",
    ".oft_diag": "oft",
    ".on_input": "ia3",
    **{f".{name}.weight": "glora" for name in ("a1", "a2", "b1", "b2", "bm")},
    ".w_norm": "norm",
    ".b_norm": "norm",
}
# Parts of other kinds that say nothing alone: (IA)^3's vector, BOFT's rescaling.
_SUPPLEMENTS = (".rescale", ".weight")
_SUFFIXES = (*_FACTORS, _ALPHA, *_OTHER_KINDS, *_SUPPLEMENTS)
_FAMILIES = {768: "SD1.5", 1024: "SD2", 2048: "SDXL"}
_WITHOUT_UNET = (
    ("Flux", re.compile(r"(double|single)_blocks[._]\d|single_transformer_blocks[._]\d")),
    ("SD3", re.compile(r"joint_blocks[._]\d|transformer[._](transformer_)?blocks[._]\d+[._]attn[._](to_|add_)")),
)
_READABLE = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A LoRA file, understood.

    Attributes:
        path: where it is.
        convention: whose names it uses; several joined with `+`.
        updates: what it does to the UNet, in the order of the network.
        text_encoder: what it does to the text encoders.
        unsupported: layers whose kind is recognised and can't be applied, with that kind.
        unknown_keys: tensors that weren't understood.
    """

    path: Path
    convention: str
    updates: Mapping[LayerId, Update]
    text_encoder: Mapping[LayerId, Update]
    unsupported: Mapping[LayerId, str]
    unknown_keys: tuple[str, ...]

    @classmethod
    def load(cls, path: str | Path, layout: UNetLayout | None = None) -> LoraFile:
        """Reads a `.safetensors` file; its tensors stay memory-mapped.

        Args:
            path: the file.
            layout: residual blocks of the model it is for, where they differ from SD1.5's and SDXL's two a level.

        Raises:
            EstLoraError: there is no such file, it isn't safetensors, it is damaged, or it holds NaN or infinity.
        """
        path = Path(path)
        try:
            _check_is_file(path)
            with safe_open(path, "pt") as file:
                return _Reader(path, file, layout or UNetLayout()).read()
        except SafetensorError as error:
            raise EstLoraError(_why_unreadable(path, error)) from error
        except OSError as error:
            raise EstLoraError(f"{quote(path)} can't be read: {error.strerror or error}.") from error

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the whole file, in hex."""
        digest = hashlib.sha256()
        with self.path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    @property
    def kinds(self) -> dict[str, int]:
        """How many layers there are of each kind, the applicable and the others."""
        count = Counter(self.unsupported.values())
        count.update(update.kind for part in (self.updates, self.text_encoder) for update in part.values())
        return dict(count.most_common())

    @property
    def ranks(self) -> list[int]:
        """The ranks that occur, ascending."""
        return sorted({update.rank for part in (self.updates, self.text_encoder) for update in part.values()})

    @property
    def unet_layers(self) -> int:
        """Layers of the UNet, of every recognised kind."""
        return len(self.updates) + sum(layer.part == UNET for layer in self.unsupported)

    @property
    def text_encoder_layers(self) -> int:
        """Layers of the text encoders, of every recognised kind."""
        return len(self.text_encoder) + sum(layer.part != UNET for layer in self.unsupported)

    @property
    def base_model(self) -> str | None:
        """The model family it was trained for, where that can be told.

        By the width of the text that its cross-attention reads; of models that have no UNet, by their layers' names.
        """
        for layer, update in self.updates.items():
            if layer.name.endswith((".attn2.to_k", ".attn2.to_v")):
                return _FAMILIES.get(update.shape[1])
        named = (family for family, found in _WITHOUT_UNET for key in self.unknown_keys if found.search(key))
        return None if self.updates else next(named, None)

    @property
    def remarks(self) -> list[str]:
        """What of this file takes no part in a fusion: one sentence a reason."""
        name, said = quote(self.path.name), []
        if self.unsupported:
            kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(self.unsupported.values()).most_common())
            said.append(f"{name} has layers of kinds that can't be applied yet ({kinds}); they are left out.")
        if self.unknown_keys:
            more = f" and {len(self.unknown_keys) - 3} more" if len(self.unknown_keys) > 3 else ""
            named = ", ".join(quote(key) for key in self.unknown_keys[:3])
            said.append(f"{name} has tensors that weren't understood and are left out: {named}{more}.")
        return said


class _Reader:
    """One reading of one open file."""

    def __init__(self, path: Path, file: Any, layout: UNetLayout) -> None:
        self._path = path
        self._file = file
        self._layout = layout
        self._scaling = PeftScaling(path, file.metadata() or {})
        self._conventions: dict[str, set[str]] = {}
        self._updates: dict[LayerId, Update] = {}
        self._unsupported: dict[LayerId, str] = {}
        self._unknown: list[str] = []

    def read(self) -> LoraFile:
        keys: list[str] = list(self._file.keys())
        if not keys:
            raise EstLoraError(f"{quote(self._path)} is an empty safetensors file: it holds no tensors.")
        layers: dict[str, dict[str, str]] = {}
        for key in keys:
            suffix = next(filter(key.endswith, _SUFFIXES), "")
            layers.setdefault(key.removesuffix(suffix), {})[suffix] = key
        for stem, by_suffix in layers.items():
            if not self._read_layer(stem, by_suffix):
                self._unknown.extend(by_suffix.values())
        ordered = sorted(self._updates, key=lambda layer: layer.order)
        conventions = self._conventions.get(UNET) or set().union(*self._conventions.values())
        return LoraFile(
            path=self._path,
            convention="+".join(sorted(conventions)) or "unknown",
            updates={layer: self._updates[layer] for layer in ordered if layer.part == UNET},
            text_encoder={layer: self._updates[layer] for layer in ordered if layer.part != UNET},
            unsupported=self._unsupported,
            unknown_keys=tuple(sorted(self._unknown)),
        )

    def _read_layer(self, stem: str, by_suffix: Mapping[str, str]) -> bool:
        """Takes in one layer, `{suffix: key}`; false if it wasn't understood."""
        name = read_name(stem.replace(".processor.", "."), self._layout)
        if name is None or name.layer in self._updates or name.layer in self._unsupported:
            return False
        conventions = {_FACTORS[suffix][1] for suffix in by_suffix if suffix in _FACTORS}
        kinds = {_OTHER_KINDS[suffix] for suffix in by_suffix if suffix in _OTHER_KINDS} or {LORA}
        if len(conventions) > 1 or not (conventions or kinds - {LORA}):
            return False
        if len(kinds) == 1 and kinds <= KINDS.keys():
            update = self._build(kinds.pop(), name.layer, by_suffix)
            if update is None:
                return False
            self._updates[name.layer] = update
        else:
            self._unsupported[name.layer] = min(kinds - {LORA})
        convention = conventions.pop() if conventions else "kohya" if name.underscored else "diffusers"
        self._conventions.setdefault(name.layer.part, set()).add(convention + "-original" * name.original)
        return True

    def _build(self, kind: str, layer: LayerId, by_suffix: Mapping[str, str]) -> Update | None:
        parts = {}
        for suffix, key in by_suffix.items():
            if suffix == _BIAS:  # named among what wasn't understood, while the weight's difference is applied
                self._unknown.append(key)
            elif suffix != _ALPHA:
                tensor = self._tensor(key)
                if tensor is None:
                    return None
                role = _FACTORS[suffix][0] if suffix in _FACTORS else suffix.strip(".").removesuffix(".weight")
                parts[role] = tensor

        def scale(rank: int) -> float:
            alpha = by_suffix.get(_ALPHA)
            return self._scaling(layer, rank) if alpha is None else self._alpha(alpha) / max(rank, 1)

        try:
            return build(kind, parts, scale)
        except ValueError as error:
            if isinstance(error, EstLoraError):
                raise
            raise EstLoraError(f"{quote(self._path)} is damaged: of {layer.name}, {error}.") from error

    def _alpha(self, key: str) -> float:
        tensor = self._file.get_tensor(key)
        if tensor.numel() != 1 or not math.isfinite(alpha := float(tensor.reshape(()).float())):
            raise EstLoraError(f"{quote(self._path)} is damaged: {quote(key)} isn't one finite number.")
        return alpha

    def _tensor(self, key: str) -> Tensor | None:
        """A tensor in a float type that torch computes with, or None where it isn't of a float type."""
        tensor: Tensor = self._file.get_tensor(key)
        if not tensor.is_floating_point():
            return None
        if tensor.dtype not in _READABLE:
            tensor = tensor.float()
        if not is_finite(tensor):
            raise EstLoraError(f"{quote(self._path)} is damaged: {quote(key)} holds NaN or infinite values.")
        return tensor


def _check_is_file(path: Path) -> None:
    if path.is_file():
        return
    folder = path if path.is_dir() else path.parent
    there = sorted(entry.name for entry in folder.glob("*.safetensors")) if folder.is_dir() else []
    if path.is_dir():
        inside = f"there are {', '.join(map(quote, there[:5]))}" if there else "there is no .safetensors file"
        raise EstLoraError(f"{quote(path)} is a folder, not a LoRA file: in it {inside}.")
    near = nearest(path.name, there) or there[:3]
    instead = f"did you mean {' or '.join(map(quote, near))}" if near else "and no .safetensors file beside it"
    raise EstLoraError(f"There is no file {quote(path)}: {instead}{'?' if near else '.'}")


def _why_unreadable(path: Path, error: SafetensorError) -> str:
    with path.open("rb") as stream:
        start = stream.read(2)
    if start == b"PK" or start[:1] == b"\x80":
        return f"{quote(path)} is a pickle, which can run code when it is loaded: only .safetensors files are read."
    if not start:
        return f"{quote(path)} is an empty file: download it again."
    return f"{quote(path)} isn't a whole safetensors file ({str(error).rstrip('.')}): download it again."
