"""Models in one file: `.safetensors` with the original (ldm, sgm) names of Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open

from est_lora.errors import EstLoraError, quote, reason
from est_lora.hosts.diffusers_loading import LOADING_ERRORS, check_model_folder, keep_quiet

_SUFFIX = ".safetensors"
_UNET = "model.diffusion_model."
_FIRST_LAYER = f"{_UNET}input_blocks.0.0.weight"
_VAE = ("first_stage_model.", "vae.")
# One tensor of the text encoder -> the pipeline that has such an encoder.
_TEXT_ENCODERS = {
    "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": "StableDiffusionPipeline",
    "cond_stage_model.model.token_embedding.weight": "StableDiffusionPipeline",
    "conditioner.embedders.1.model.positional_embedding": "StableDiffusionXLPipeline",
}
_REFINER = "conditioner.embedders.0.model."
_FAMILIES = {"StableDiffusionPipeline": "Stable Diffusion 1 or 2", "StableDiffusionXLPipeline": "Stable Diffusion XL"}
# What else a file may be, by its names; the first that fits.
_OTHERS = (
    (re.compile(r"lora_|\.lora\.|hada_|lokr_"), "is a LoRA, not a model: give it with --subject or --style"),
    (re.compile(r"(double|single)_blocks\.\d|single_transformer_blocks\.\d"), "is a Flux model, which has no UNet"),
    (re.compile(r"joint_blocks\.\d"), "is a Stable Diffusion 3 model, which has no UNet"),
    (
        re.compile(r"^(unet\.)?(down|up)_blocks\.\d"),
        "has diffusers' names: give its folder",
    ),
    (re.compile(r"(encoder|decoder)\.(conv_in|mid)\."), "is a VAE alone: give the whole model"),
)


def load_checkpoint(path: Path, configs: Path | None, device: str, dtype: torch.dtype) -> Any:
    """The pipeline whose weights are all in one file, in the original naming.

    Args:
        path: the file.
        configs: a folder in diffusers' format whose configurations, tokenizers and scheduler serve; its weights aren't
            read. None: diffusers' own choice for such a file, which it may fetch from the network.
        device: where to compute.
        dtype: what to compute in.

    Raises:
        EstLoraError: it isn't such a file, the two don't go together, or there is nowhere to fetch from.
    """
    kind = pipeline_kind(path)
    if configs is not None and (theirs := check_model_folder(configs)) != kind:
        raise EstLoraError(
            f"{quote(path)} is a {_FAMILIES[kind]} model, and --config {quote(configs)} is for {_FAMILIES[theirs]}: give"
            " the folder of a model of the same family."
        )
    keep_quiet()
    source = {"config": str(configs), "local_files_only": True} if configs is not None else {}
    try:
        # The file is memory-mapped: what has the right type already is not copied.
        pipe = getattr(diffusers, kind).from_single_file(str(path), dtype=dtype, **source)
        pipe.to(device)
    except Exception as error:
        raise _explained(error, path, configs) from error
    if pipe.scheduler.config.get("prediction_type") != "v_prediction" and _is_v_prediction(path):
        raise EstLoraError(
            f"{quote(path)} has v prediction, and {_named(configs)} hasn't: give --config FOLDER with the same in its"
            " scheduler_config.json."
        )
    return pipe


def pipeline_kind(path: Path) -> str:
    """The class of diffusers' pipeline that the file's content is for; reads only its header.

    Raises:
        EstLoraError: it is no such file.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(2)
        if start == b"PK" or start[:1] == b"\x80":
            raise EstLoraError(
                f"{quote(path)} is a pickle, which can run code when it is loaded: give a {_SUFFIX} file, or a folder."
            )
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            channels = file.get_slice(_FIRST_LAYER).get_shape()[1] if _FIRST_LAYER in names else 0
    except SafetensorError as error:
        raise EstLoraError(
            f"{quote(path)} isn't a whole safetensors file ({str(error).rstrip('.')}): download it again."
        ) from error
    except OSError as error:
        raise EstLoraError(f"{quote(path)} can't be read: {error.strerror or error}.") from error
    if path.suffix != _SUFFIX:  # diffusers would take it for a pickle
        raise EstLoraError(f"{quote(path)} is a safetensors file: give it a name that ends with {_SUFFIX}.")
    if not channels:
        raise EstLoraError(f"{quote(path)} {_what_else(names)}.")
    if channels != 4:
        raise EstLoraError(
            f"The UNet in {quote(path)} takes {channels} channels, as those for inpainting or editing do: generate takes"
            " models that begin with noise alone, of 4 channels."
        )
    if any(name.startswith(_REFINER) for name in names):
        raise EstLoraError(f"{quote(path)} is the refiner of Stable Diffusion XL: give the base model.")
    if not any(name.startswith(_VAE) for name in names):
        raise EstLoraError(f"{quote(path)} has no VAE in it: give a file of the whole model.")
    kind = next((kind for name, kind in _TEXT_ENCODERS.items() if name in names), None)
    if kind is None:
        raise EstLoraError(f"{quote(path)} has no known text encoder in it: give a file of the whole model.")
    return kind


def _is_v_prediction(path: Path) -> bool:
    """Whether the file says so itself, by an empty tensor of that name, as v-prediction models of XL do."""
    with safe_open(path, "pt") as file:
        return "v_pred" in file.keys()  # noqa: SIM118 (the file is no mapping)


def _what_else(names: set[str]) -> str:
    for pattern, is_what in _OTHERS:
        if any(pattern.search(name) for name in names):
            return is_what
    return "holds no Stable Diffusion 1, 2 or XL model in the original naming"


def _explained(error: Exception, path: Path, configs: Path | None) -> EstLoraError:
    # Network libraries have no common error; diffusers raises its own and any.
    if configs is None and (isinstance(error, OSError) or not isinstance(error, LOADING_ERRORS)):
        return EstLoraError(
            f"The configuration for {quote(path)} can't be fetched from the network: give --config FOLDER, the folder of"
            " any model of the same family in diffusers' format."
        )
    if isinstance(error, NotImplementedError):  # a parameter that the file had nothing for can't be moved
        return EstLoraError(
            f"{quote(path)} lacks tensors that {_named(configs)} asks for: it is damaged, or the configuration is that of"
            " another model."
        )
    return EstLoraError(f"The model in {quote(path)} can't be loaded with {_named(configs)}: {reason(error)}")


def _named(configs: Path | None) -> str:
    return "diffusers' own configuration" if configs is None else f"--config {quote(configs)}"
