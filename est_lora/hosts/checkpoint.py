"""Models in one file: `.safetensors` with the original (ldm, sgm) names of Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from est_lora.errors import EstLoraError, quote, reason
from est_lora.hosts.diffusers_loading import check_model_folder, keep_quiet
from est_lora.lora.reading import opened

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
# Libraries whose errors are those of the network, where they aren't operating system errors.
_NETWORK = ("httpx", "huggingface_hub")
# What else a file may be, by its names; the first that fits.
_OTHERS = (
    (re.compile(r"lora_|\.lora\.|hada_|lokr_"), "is a LoRA, not a model: give it with --subject or --style"),
    (re.compile(r"(double|single)_blocks\.\d|single_transformer_blocks\.\d"), "is a Flux model, which has no UNet"),
    (re.compile(r"joint_blocks\.\d"), "is a Stable Diffusion 3 model, which has no UNet"),
    (re.compile(r"^(unet\.)?(down|up)_blocks\.\d"), "has diffusers' names: give its folder"),
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
    header = read_header(path)
    if configs is not None and (theirs := check_model_folder(configs)) != header.pipeline:
        raise EstLoraError(
            f"{quote(path)} is a {_FAMILIES[header.pipeline]} model, and --config {quote(configs)} is for"
            f" {_FAMILIES[theirs]}: give the folder of a model of the same family."
        )
    keep_quiet()
    source: dict[str, Any] = {"image_encoder": None, "feature_extractor": None}  # not in the file, and not needed
    if configs is not None:
        source |= {"config": str(configs), "local_files_only": True}
    try:
        # The file is memory-mapped: what has the right type already is not copied.
        pipe = getattr(diffusers, header.pipeline).from_single_file(str(path), dtype=dtype, **source)
        pipe.to(device)
    except Exception as error:  # diffusers and the network have classes of their own
        raise _explained(error, path, configs) from error
    if header.unet_tensors != (expected := len(pipe.unet.state_dict())):  # diffusers is silent about these
        raise EstLoraError(
            f"The UNet in {quote(path)} has {header.unet_tensors} tensors, and {_named(configs)} knows {expected}: give"
            " --config FOLDER of a model of the same make."
        )
    if header.v_prediction and pipe.scheduler.config.get("prediction_type") != "v_prediction":
        raise EstLoraError(
            f"{quote(path)} has v prediction, and {_named(configs)} hasn't: give --config FOLDER with the same in its"
            " scheduler_config.json."
        )
    return pipe


@dataclass(frozen=True)
class Header:
    """What a checkpoint is, by the names and shapes in it.

    Attributes:
        pipeline: diffusers' class of pipeline for it.
        unet_tensors: how many tensors are of the UNet.
        v_prediction: whether it says itself that its UNet predicts v, as files of XL do by an empty tensor of that name.
    """

    pipeline: str
    unet_tensors: int
    v_prediction: bool


def read_header(path: Path) -> Header:
    """What is in the file, by its header alone.

    Raises:
        EstLoraError: it is no checkpoint that can be used.
    """
    with opened(path, "model") as file:
        names = set(file.keys())
        first = file.get_slice(_FIRST_LAYER).get_shape() if _FIRST_LAYER in names else None
    if path.suffix != _SUFFIX:  # diffusers would take it for a pickle
        raise EstLoraError(f"{quote(path)} is a safetensors file: give it a name that ends with {_SUFFIX}.")
    if first is None:
        raise EstLoraError(f"{quote(path)} {_what_else(names)}.")
    if len(first) != 4:
        raise EstLoraError(f"{quote(path)} is damaged: {quote(_FIRST_LAYER)} isn't a kernel of a convolution.")
    if first[1] != 4:
        raise EstLoraError(
            f"The UNet in {quote(path)} takes {first[1]} channels, as those for inpainting or editing do: generate takes"
            " models that begin with noise alone, of 4 channels."
        )
    if any(name.startswith(_REFINER) for name in names):
        raise EstLoraError(f"{quote(path)} is the refiner of Stable Diffusion XL: give the base model.")
    if not any(name.startswith(_VAE) for name in names):
        raise EstLoraError(f"{quote(path)} has no VAE in it: give a file of the whole model.")
    pipeline = next((pipeline for name, pipeline in _TEXT_ENCODERS.items() if name in names), None)
    if pipeline is None:
        raise EstLoraError(f"{quote(path)} has no known text encoder in it: give a file of the whole model.")
    return Header(pipeline, sum(name.startswith(_UNET) for name in names), "v_pred" in names)


def _what_else(names: set[str]) -> str:
    for pattern, is_what in _OTHERS:
        if any(pattern.search(name) for name in names):
            return is_what
    return "holds no Stable Diffusion 1, 2 or XL model in the original naming"


def _explained(error: Exception, path: Path, configs: Path | None) -> EstLoraError:
    from_network = isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _NETWORK
    if configs is None and from_network:
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
