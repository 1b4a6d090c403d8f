"""The UNet weights of a model on disk, read one at a time: what some kinds of updates depend on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from est_lora.errors import EstLoraError, quote
from est_lora.lora.names import UNET, UNetLayout, read_name
from est_lora.lora.reading import opened
from est_lora.lora.relative import Weight
from est_lora.lora.update import Shape, weight_shape

_WEIGHT = ".weight"
# A folder may hold the same weights several times, as `....fp16.safetensors` and the like.
_MAIN = re.compile(r"diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors")


class ModelFile:
    """A model in diffusers' folder format or in one file; nothing is read of it before a weight is asked for."""

    def __init__(self, path: str | Path) -> None:
        """Looks up where the UNet's weights are.

        Args:
            path: a folder with `unet/*.safetensors` in it, or a `.safetensors` file of a whole model or a UNet.

        Raises:
            EstLoraError: there is no such model, or it has no UNet.
        """
        path = Path(path)
        self._places: dict[str, tuple[Path, str, Shape]] = {}
        for file in _files(path):
            with opened(file, "model") as tensors:
                self._note(file, tensors)
        if not self._places:
            raise EstLoraError(f"{quote(path)} holds no weights of a UNet: give a Stable Diffusion 1, 2 or XL model.")

    def weight_of(self, name: str) -> tuple[Weight, Shape] | None:
        """What reads the weight of a layer of the UNet, and its shape; None where the model has no such layer."""
        place = self._places.get(name)
        if place is None:
            return None
        path, key, shape = place

        def read() -> Tensor:
            with opened(path, "model") as tensors:
                weight: Tensor = tensors.get_tensor(key)
                return weight

        return read, shape

    def _note(self, path: Path, tensors: Any) -> None:
        for key in tensors.keys():  # noqa: SIM118 - it isn't a dict
            name = read_name(key.removesuffix(_WEIGHT), UNetLayout()) if key.endswith(_WEIGHT) else None
            shape = tensors.get_slice(key).get_shape() if name and name.layer.part == UNET else ()
            if name and len(shape) in (2, 4):
                self._places[name.layer.name] = path, key, weight_shape(*shape)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted((path / "unet").glob("*.safetensors"))
    if not found:
        raise EstLoraError(f"{quote(path)} holds no model in diffusers' folder format: it has no unet/*.safetensors.")
    return [file for file in found if _MAIN.fullmatch(file.name)] or found
