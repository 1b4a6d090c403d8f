"""A model on disk, in either of its two forms: opening it, and all files that its pictures depend on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from est_lora.errors import EstLoraError, quote
from est_lora.hosts.checkpoint import load_checkpoint
from est_lora.hosts.diffusers_loading import load_pipeline

_CONFIGURATIONS = (".json", ".txt")  # also of schedulers and tokenizers


def open_model(model: Path, configs: Path | None, device: str, dtype: torch.dtype) -> Any:
    """The pipeline of a model.

    Args:
        model: a folder in diffusers' format, or a checkpoint in one `.safetensors` file.
        configs: for a checkpoint, a folder in diffusers' format whose configurations serve.
        device: where to compute.
        dtype: what to compute in.

    Raises:
        EstLoraError: there is no such model, or it can't be loaded.
    """
    if model.is_file() or (model.suffix == ".safetensors" and not model.is_dir()):
        return load_checkpoint(model, configs, device, dtype)
    if configs is not None:
        raise EstLoraError(f"--config is for a model in one file, and {quote(model)} isn't a file: leave --config out.")
    return load_pipeline(model, device, dtype)


def files_of(model: Path, configs: Path | None) -> list[Path]:
    """The files of a model that a picture depends on; both as for `open_model`."""
    if not model.is_file():
        return _files_in(model, (*_CONFIGURATIONS, ".safetensors"))
    return [model, *(_files_in(configs, _CONFIGURATIONS) if configs else [])]


def _files_in(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(place, name)) not in seen]
        found += [path for name in names if (path := Path(place, name)).suffix in endings and path.is_file()]
    return sorted(found)
