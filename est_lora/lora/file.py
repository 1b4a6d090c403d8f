"""Reading a LoRA file: safetensors of any convention in, one update per layer out."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from est_lora.errors import EstLoraError, quote
from est_lora.lora.keys import ALPHA, Ending, split
from est_lora.lora.kinds import KINDS, Scale, build
from est_lora.lora.names import UNET, LayerId, UNetLayout, read_name
from est_lora.lora.reading import opened, sha256
from est_lora.lora.relative import RelativeUpdate, Weight
from est_lora.lora.scaling import PeftScaling
from est_lora.lora.update import Numbers, Shape, Update, is_finite, misfit, shape_text

_FAMILIES = {768: "SD1.5", 1024: "SD2", 2048: "SDXL"}
_WITHOUT_UNET = (
    ("Flux", re.compile(r"(double|single)_blocks[._]\d|single_transformer_blocks[._]\d")),
    ("SD3", re.compile(r"joint_blocks[._]\d|transformer[._](transformer_)?blocks[._]\d+[._]attn[._](to_|add_)")),
)
# No layer has more weights than this; factors of a few bytes can claim any number.
_MOST_WEIGHTS = 1 << 26
# What tensors may be of: floats, and whole numbers where there is only one.
_READABLE = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A LoRA file, understood.

    Attributes:
        path: where it is.
        convention: whose names it uses; several joined with `+`.
        updates: what it does to the UNet, in the order of the network.
        text_encoder: what it does to the text encoders.
        unsupported: layers whose kind is recognised and can't be applied, with that kind.
        repeated: layers that it has more than once; the first is used.
        unreadable: layers whose kind needs the model's own weight, which can't be had, with that kind.
        unknown_keys: tensors that weren't understood.
    """

    path: Path
    convention: str
    updates: Mapping[LayerId, Update]
    text_encoder: Mapping[LayerId, Update]
    unsupported: Mapping[LayerId, str]
    unknown_keys: tuple[str, ...]
    repeated: tuple[LayerId, ...] = ()
    unreadable: Mapping[LayerId, str] = dataclasses.field(default_factory=dict)

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
        with opened(path, "LoRA") as file:
            return _Reader(path, file, layout or UNetLayout()).read()

    def on(
        self,
        part: str,
        weight_of: Callable[[str], tuple[Weight, Shape] | None],
        numbers: defaultdict[LayerId, Numbers] | None = None,
    ) -> LoraFile:
        """The same file on a model: updates that depend on the weights they change are given these.

        Args:
            part: the part of the model, `unet`, `text_encoder` or `text_encoder_2`.
            weight_of: the weight of a layer of that part, by its name, with its shape; None where there is none.
            numbers: what has been computed of these updates on this model; what will be is put there too.

        Raises:
            EstLoraError: an update is for a layer of another shape.
        """
        numbers = defaultdict(dict) if numbers is None else numbers
        found: dict[LayerId, Update] = {}
        unreadable = dict(self.unreadable)
        for layer, update in (*self.updates.items(), *self.text_encoder.items()):
            weight = weight_of(layer.name) if layer.part == part else None
            if weight is not None and not update.applies_to(weight[1]):
                raise misfit(quote(self.path.name), layer.name, update, weight[1])
            if layer.part != part or not isinstance(update, RelativeUpdate):
                found[layer] = update
            elif weight is not None:
                found[layer] = update.on(*weight, numbers[layer])
            else:
                unreadable[layer] = update.kind
        return dataclasses.replace(
            self,
            updates={layer: update for layer, update in found.items() if layer.part == UNET},
            text_encoder={layer: update for layer, update in found.items() if layer.part != UNET},
            unreadable=unreadable,
        )

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the whole file, in hex."""
        return sha256(self.path)

    @property
    def kinds(self) -> dict[str, int]:
        """How many layers there are of each kind, the applicable and the others."""
        count = Counter([*self.unsupported.values(), *self.unreadable.values()])
        count.update(update.kind for part in (self.updates, self.text_encoder) for update in part.values())
        return dict(count.most_common())

    @property
    def ranks(self) -> list[int]:
        """The ranks that occur, ascending."""
        updates = (*self.updates.values(), *self.text_encoder.values())
        return sorted({update.rank for update in updates if update.shape})

    @property
    def unet_layers(self) -> int:
        """Layers of the UNet, of every recognised kind."""
        return len(self.updates) + sum(layer.part == UNET for layer in (*self.unsupported, *self.unreadable))

    @property
    def text_encoder_layers(self) -> int:
        """Layers of the text encoders, of every recognised kind."""
        return len(self.text_encoder) + sum(layer.part != UNET for layer in (*self.unsupported, *self.unreadable))

    @property
    def base_model(self) -> str | None:
        """The model family it was trained for, where that can be told.

        By the width of the text that its cross-attention reads; of models that have no UNet, by their layers' names.
        """
        for layer, update in self.updates.items():
            if update.shape and layer.name.endswith((".attn2.to_k", ".attn2.to_v")):
                return _FAMILIES.get(update.shape[1])
        named = (family for family, found in _WITHOUT_UNET for key in self.unknown_keys if found.search(key))
        return None if self.updates else next(named, None)

    @property
    def remarks(self) -> list[str]:
        """What of this file takes no part in a fusion: one sentence a reason."""
        name, said = quote(self.path.name), []
        if self.unsupported:
            kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(self.unsupported.values()).most_common())
            said.append(f"{name} has layers of kinds that can't be applied ({kinds}); they are left out.")
        if self.unreadable:
            said.append(
                f"{name} has layers that need the model's own weights, which this model doesn't have or doesn't show:"
                f" {_some([layer.name for layer in self.unreadable])}; they are left out."
            )
        if self.repeated:
            said.append(
                f"{name} has layers more than once, as if written in two conventions:"
                f" {_some([layer.name for layer in self.repeated])}; the first of each is used."
            )
        if self.unknown_keys:
            keys = _some([quote(key) for key in self.unknown_keys])
            said.append(f"{name} has tensors that weren't understood and are left out: {keys}.")
        return said


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


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
        self._repeated: list[LayerId] = []
        self._unknown: list[str] = []

    def read(self) -> LoraFile:
        keys: list[str] = list(self._file.keys())
        if not keys:
            raise EstLoraError(f"{quote(self._path)} is an empty safetensors file: it holds no tensors.")
        layers: dict[str, dict[str, Ending | None]] = {}
        for key in keys:
            name, ending = split(key)
            layers.setdefault(name, {})[key] = ending
        for name, endings in layers.items():
            if not self._read_layer(name, endings):
                self._unknown.extend(endings)
        ordered = sorted(self._updates, key=lambda layer: layer.order)
        conventions = self._conventions.get(UNET) or set().union(*self._conventions.values())
        return LoraFile(
            path=self._path,
            convention="+".join(sorted(conventions)) or "unknown",
            updates={layer: self._updates[layer] for layer in ordered if layer.part == UNET},
            text_encoder={layer: self._updates[layer] for layer in ordered if layer.part != UNET},
            unsupported=self._unsupported,
            unknown_keys=tuple(sorted(self._unknown)),
            repeated=tuple(dict.fromkeys(self._repeated)),
        )

    def _read_layer(self, text: str, endings: Mapping[str, Ending | None]) -> bool:
        """Takes in one layer: its name in the file, and its keys with their endings. False if it wasn't understood."""
        name = read_name(text.replace(".processor.", "."), self._layout)
        known = {key: ending for key, ending in endings.items() if ending}
        if name is None or len(known) < len(endings):
            return False
        if name.layer in self._updates or name.layer in self._unsupported:
            self._repeated.append(name.layer)
            return True
        convention = _whole_convention(known)
        kept = {key: ending for key, ending in known.items() if ending.convention in ("", convention)}
        if len(kept) < len(known):  # its factors are there again under another convention's names
            self._repeated.append(name.layer)
        kind = self._kind(kept)
        if kind in KINDS:
            update = self._build(kind, name.layer, kept)
            if update is None:
                return False
            self._updates[name.layer] = update
        elif kind:
            self._unsupported[name.layer] = kind
        else:
            return False
        convention = (convention or name.convention) + "-original" * name.original
        self._conventions.setdefault(name.layer.part, set()).add(convention)
        return True

    def _kind(self, endings: Mapping[str, Ending]) -> str:
        """The kind that a layer's tensors are of; empty where they are of several, or of none."""
        kinds = {ending.kind for ending in endings.values()} - {""}
        if kinds == {"lora", "tucker"}:
            return "tucker"
        if not kinds and any(ending.role == "diff_b" for ending in endings.values()):
            return "bias"
        kind = kinds.pop() if len(kinds) == 1 else ""
        differences = (key for key, ending in endings.items() if ending.role == "diff")
        if kind == "full" and all(len(self._file.get_slice(key).get_shape()) == 1 for key in differences):
            return "norm"
        return kind

    def _build(self, kind: str, layer: LayerId, endings: Mapping[str, Ending]) -> Update | None:
        parts: dict[str, Tensor] = {}
        alpha = None
        for key, ending in endings.items():
            if ending.role == ALPHA:
                alpha = self._alpha(key)
            elif ending.role in parts or (tensor := self._tensor(key)) is None:
                return None
            else:
                parts[ending.role] = tensor
        try:
            update = build(kind, parts, Scale(alpha, partial(self._scaling, layer)))
            if update and math.prod(update.shape) > _MOST_WEIGHTS:
                raise ValueError(f"the update of {shape_text(update.shape)} is larger than any layer")
        except ValueError as error:
            if isinstance(error, EstLoraError):
                raise
            raise EstLoraError(f"{quote(self._path)} is damaged: of {layer.name}, {error}.") from error
        return update

    def _alpha(self, key: str) -> float:
        tensor = self._tensor(key)
        if tensor is None or tensor.numel() != 1 or not math.isfinite(alpha := float(tensor.reshape(()))):
            raise EstLoraError(f"{quote(self._path)} is damaged: {quote(key)} isn't one finite number.")
        return alpha

    def _tensor(self, key: str) -> Tensor | None:
        """A tensor as it is in the file, or None where it is neither floats nor one number."""
        try:
            tensor: Tensor = self._file.get_tensor(key)
        except (AttributeError, TypeError):  # a type that this torch doesn't have
            return None
        if tensor.dtype not in _READABLE:
            return None
        if not tensor.is_floating_point():
            return tensor.float() if tensor.numel() == 1 else None
        if not is_finite(tensor):
            raise EstLoraError(f"{quote(self._path)} is damaged: {quote(key)} holds NaN or infinite values.")
        return tensor


def _whole_convention(endings: Mapping[str, Ending]) -> str:
    """The first convention that a layer has both factors in, else the first that it has any in; empty for none."""
    conventions = list(dict.fromkeys(ending.convention for ending in endings.values() if ending.convention))
    whole = (of for of in conventions if sum(ending.convention == of for ending in endings.values()) > 1)
    return next(whole, conventions[0] if conventions else "")
