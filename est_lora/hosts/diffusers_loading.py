"""Models in diffusers' folder format, and diffusers' schedulers by the names people know them by."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError

from est_lora.errors import EstLoraError, nearest, quote, reason

_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
# Where the classes that a model's index names may come from; the embedded model's come from ourselves.
_LIBRARIES = re.compile(r"diffusers|transformers|stable_diffusion|est_lora\..+")
_TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
# What loading a damaged or unfitting model may raise.
_LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# What a model's own scheduler may have switched on and a name like `euler` doesn't mean.
_PLAIN: dict[str, Any] = {
    "algorithm_type": "dpmsolver++",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {"variance_type": "fixed_small"}),
    "deis": ("DEISMultistepScheduler", {"algorithm_type": "deis"}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++2m-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++2s": ("DPMSolverSinglestepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2-a": ("KDPM2AncestralDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
# What AUTOMATIC1111's WebUI calls diffusers' schedulers, and spacings of the noise levels.
_SAMPLERS = {
    "DDIMScheduler": "DDIM",
    "DPMSolverSDEScheduler": "DPM++ SDE",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "EulerDiscreteScheduler": "Euler",
    "HeunDiscreteScheduler": "Heun",
    "KDPM2AncestralDiscreteScheduler": "DPM2 a",
    "KDPM2DiscreteScheduler": "DPM2",
    "LCMScheduler": "LCM",
    "LMSDiscreteScheduler": "LMS",
    "UniPCMultistepScheduler": "UniPC",
}
_MULTISTEP = {
    ("dpmsolver++", 2, "midpoint"): "DPM++ 2M",
    ("sde-dpmsolver++", 2, "midpoint"): "DPM++ 2M SDE",
    ("sde-dpmsolver++", 2, "heun"): "DPM++ 2M SDE Heun",
    ("sde-dpmsolver++", 3, "midpoint"): "DPM++ 3M SDE",
}
_SCHEDULES = {"use_karras_sigmas": "Karras", "use_exponential_sigmas": "Exponential", "use_beta_sigmas": "Beta"}
_SPACINGS = {"linspace": "Uniform", "leading": "DDIM", "trailing": "SGM Uniform"}


def device_and_dtype(device: str | None, dtype: str | None) -> tuple[str, torch.dtype]:
    """What to compute on and in: as asked, else the fastest device there is, and float16 on CUDA alone.

    Raises:
        EstLoraError: there is no such device here, or it is no such type.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError, AttributeError) as error:
        raise EstLoraError(f"The device {quote(device)} can't be used here; cpu always can.") from error
    if dtype is None:
        dtype = "float16" if device.startswith("cuda") else "float32"
    if dtype not in _DTYPES:
        raise EstLoraError(f"--dtype can't be {quote(dtype)}: it is one of {', '.join(_DTYPES)}.")
    return device, _DTYPES[dtype]


def load_pipeline(folder: Path, device: str, dtype: torch.dtype) -> Any:
    """The Stable Diffusion 1, 2 or XL pipeline in `folder`, safetensors only, nothing downloaded.

    Raises:
        EstLoraError: there is no such model, or it can't be loaded.
    """
    kind = check_model_folder(folder)
    keep_quiet()
    try:
        pipe = getattr(diffusers, kind).from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True
        )
        return pipe.to(device)
    except _LOADING_ERRORS as error:
        raise EstLoraError(f"The model in {quote(folder)} can't be loaded on {device}: {reason(error)}") from error


def check_model_folder(folder: Path) -> str:
    """The class of the pipeline in `folder`, which has diffusers' format.

    Raises:
        EstLoraError: it hasn't, or it is of another class than generate can use.
    """
    index = folder / "model_index.json"
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
        kind = parts.pop("_class_name", None)
    except OSError as error:
        if not folder.exists():
            raise EstLoraError(f"There is no {quote(folder)}: check the spelling of the path.") from error
        raise EstLoraError(
            f"{quote(folder)} holds no model in diffusers' folder format: there is no readable model_index.json in it."
        ) from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise EstLoraError(f"{quote(index)} is damaged: it isn't a JSON object.") from error
    if kind not in _PIPELINES:
        raise EstLoraError(f"{quote(folder)} is a {quote(kind)}: generate takes a {' or a '.join(_PIPELINES)}.")
    for name, part in parts.items():
        library, kind_of_part = part if isinstance(part, list) and len(part) == 2 else (None, None)
        is_text_encoder = name.startswith("text_encoder")
        if library is not None and not _LIBRARIES.fullmatch(str(library)):
            raise EstLoraError(f"{quote(index)} asks for a {name} of {quote(library)}, which generate doesn't load.")
        if kind_of_part is not None and is_text_encoder and kind_of_part not in _TEXT_ENCODERS:
            raise EstLoraError(f"{quote(index)} asks for a {name} {quote(kind_of_part)}: generate knows only CLIP's.")
    return str(kind)


def keep_quiet() -> None:
    """Silences what the libraries say while they load; what can't be done is said in sentences of ours."""
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def set_scheduler(pipe: Any, name: str) -> None:
    """Gives `pipe` another scheduler, by its name in `SCHEDULERS`.

    Raises:
        EstLoraError: there is no such scheduler, or it can't run what this model predicts.
    """
    if name not in SCHEDULERS:
        near = nearest(name, SCHEDULERS) or sorted(SCHEDULERS)
        raise EstLoraError(f"There is no scheduler {quote(name)}: did you mean {' or '.join(near)}?")
    kind, options = SCHEDULERS[name]
    own = pipe.scheduler.config
    if "prediction_type" not in own or "sigma_data" in own:
        raise EstLoraError(f"This model needs its own {type(pipe.scheduler).__name__}: leave --scheduler out.")
    try:
        scheduler = getattr(diffusers, kind).from_config({**own, **_PLAIN, **options})
        _try_out(scheduler)
    except (ValueError, NotImplementedError, ImportError, TypeError, IndexError, AssertionError) as error:
        raise EstLoraError(
            f"The scheduler {quote(name)} can't run this model, which has {own.prediction_type} prediction; try ddim or"
            f" dpm++2m. It says: {reason(error)}"
        ) from error
    pipe.scheduler = scheduler


def _try_out(scheduler: Any) -> None:
    """Lets a copy of `scheduler` take one step with an empty picture; raises what it raises."""
    trial = type(scheduler).from_config(scheduler.config)
    trial.set_timesteps(20)
    start = trial.timesteps[0]
    picture = trial.scale_model_input(torch.zeros(1, 1, 4, 4), start)
    trial.step(picture, start, picture)


def settings_of(scheduler: Any) -> tuple[str, list[tuple[str, str]]]:
    """The name of a scheduler's class, and all of its settings as texts, sorted."""
    settings = {key: str(value) for key, value in scheduler.config.items() if not key.startswith("_")}
    return type(scheduler).__name__, sorted(settings.items())


def sampler_names(scheduler: Any) -> tuple[str, str | None]:
    """Sampler and schedule type as AUTOMATIC1111's WebUI names them; what it doesn't have is named as in diffusers."""
    config, kind = scheduler.config, type(scheduler).__name__
    schedule = next((name for key, name in _SCHEDULES.items() if config.get(key)), None)
    if kind == "DPMSolverMultistepScheduler":
        sampler = _MULTISTEP.get((config.algorithm_type, config.solver_order, config.solver_type))
    elif kind == "PNDMScheduler":
        sampler = "PLMS" if config.skip_prk_steps else None
    else:
        sampler = _SAMPLERS.get(kind)
    return sampler or kind, schedule or _SPACINGS.get(config.get("timestep_spacing"))
