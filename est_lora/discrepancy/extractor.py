"""Feature extractors: pictures in, one vector each out. Weights come from safetensors only; nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from est_lora.errors import EstLoraError, nearest, quote, reason

if TYPE_CHECKING:
    from PIL.Image import Image

_REPOSITORY = "facebook/dino-vits16"
_REVISION = "a7a4d161f5c0bd70478c05ca5777ec7cd8848021"
_CONFIG, _PREPROCESSOR, _WEIGHTS = _FILES = ("config.json", "preprocessor_config.json", "model.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_AUTOCASTING = ("cpu", "cuda")  # devices that every torch can switch automatic casts off for
# What is taken from a config: the rest of it could make transformers fetch, import or read something else.
_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps"),
    *("image_size", "patch_size", "num_channels", "qkv_bias", "projection_dim"),
)

_Embed = Callable[["Image"], Tensor]


class _Kind(NamedTuple):
    """What is an extractor's own: the classes of transformers, and where in the model's output the features are, (d)."""

    model_types: tuple[str, ...]
    config: str
    processor: str
    model: str
    options: Mapping[str, Any]
    feature: Callable[[Any], Tensor]


_KINDS = {
    "dino": _Kind(
        *(("vit",), "ViTConfig", "ViTImageProcessor", "ViTModel", {"add_pooling_layer": False}),
        lambda output: output.last_hidden_state[0, 0],  # the CLS token after the last norm
    ),
    "clip": _Kind(
        *(("clip", "clip_vision_model"), "CLIPVisionConfig", "CLIPImageProcessor", "CLIPVisionModelWithProjection", {}),
        lambda output: output.image_embeds[0],
    ),
}
NAMES = tuple(_KINDS)


class Extractor(Protocol):
    """What turns pictures into vectors that can be compared.

    Attributes:
        name: one of NAMES.
        identity: which weights it has, as `identity` tells it; part of the key that a value is remembered by.
    """

    name: str
    identity: str

    def features(self, pictures: Sequence[Image]) -> Tensor:
        """The features of pictures of any size and mode, (n, d), float32, on the CPU.

        A row depends on its own picture only. Raises EstLoraError where it can't be computed.
        """
        ...


def identity(name: str, folder: Path | None) -> str:
    """Which weights an extractor has, in a few characters, without reading them.

    Of weights in a folder it is told by the bytes of the small files, and by the size and the time of change of the
    weights' file: a file that is touched counts as another, and one that is changed but keeps both doesn't.

    Args:
        name: one of NAMES.
        folder: where its files are; None for the published DINO.

    Raises:
        EstLoraError: there is no such extractor, or the folder doesn't hold one.
    """
    _check_name(name, folder)
    if folder is None:
        return f"{name}@{_REVISION[:8]}"
    files = _files_in(name, Path(folder))
    _read_config(name, files[_CONFIG])
    digest = hashlib.sha256()
    try:
        for file, path in files.items():
            if file == _WEIGHTS:
                stat = path.stat()
                content = f"{stat.st_size} {stat.st_mtime_ns}".encode()
            else:
                content = path.read_bytes()
            digest.update(f"{file} {len(content)} ".encode() + content)
    except OSError as error:
        raise EstLoraError(f"{quote(folder)} can't be read: {reason(error)}") from error
    return f"{name}@{digest.hexdigest()[:12]}"


@contextmanager
def open_extractor(
    name: str, *, folder: Path | None, cache: Path | None, device: str | torch.device = "cpu"
) -> Iterator[Extractor]:
    """An extractor for the time of the block; its memory is free again afterwards.

    Args:
        name: one of NAMES.
        folder: where its files are, in transformers' format (config.json, preprocessor_config.json,
            model.safetensors): for `dino` a ViT, for `clip` a CLIP or its image encoder. None fetches the published
            DINO, if it isn't in the cache yet.
        cache: where fetched files are kept, in the layout of the Hugging Face cache; None for the user's own.
        device: where it computes, in float32 whatever the weights' type.

    Raises:
        EstLoraError: a library, a file or the network is missing, or the files don't hold what they should.
    """
    called = identity(name, folder)
    files = _fetched(cache) if folder is None else _files_in(name, Path(folder))
    try:
        place = torch.device(device)
        embed = _load(name, files, place)
    except EstLoraError:
        raise
    except Exception as error:  # whatever these libraries raise at files that are wrong
        where = quote(files[_CONFIG].parent)
        raise EstLoraError(f"The extractor {name!r} can't be loaded from {where}: {reason(error)}") from error
    extractor = _Opened(name, called, embed)
    del embed  # which has the model
    try:
        yield extractor
    finally:
        extractor.embed = None
        if place.type == "cuda":
            torch.cuda.empty_cache()


@dataclass
class _Opened:
    """An extractor while it is open; `embed` maps one picture to its features, (d)."""

    name: str
    identity: str
    embed: _Embed | None

    def features(self, pictures: Sequence[Image]) -> Tensor:
        if self.embed is None:
            raise EstLoraError(f"The extractor {self.name!r} is closed: open it anew.")
        if not pictures:
            raise EstLoraError(f"The extractor {self.name!r} was given no pictures: give it one or more.")
        try:
            return torch.stack([self.embed(_rgb(picture)) for picture in pictures])
        except EstLoraError:
            raise
        except Exception as error:  # of the libraries, of torch, of a device without memory
            told = f"The extractor {self.name!r} can't look at these pictures"
            raise EstLoraError(f"{told}: {reason(error)}") from error


def _check_name(name: str, folder: Path | None) -> None:
    if name not in NAMES:
        near = nearest(str(name), NAMES)
        there = f"did you mean {quote(near[0])}?" if near else f"there are {' and '.join(map(quote, NAMES))}."
        raise EstLoraError(f"There is no extractor {quote(name)}: {there}")
    if folder is None and name != "dino":
        raise EstLoraError(
            f"The extractor {name!r} is never fetched: name a folder that has its files ({', '.join(_FILES)})."
        )


def _files_in(name: str, folder: Path) -> dict[str, Path]:
    """The files of an extractor in a folder, by their names."""
    try:
        there = sorted(path.name for path in folder.iterdir() if path.is_file())
    except OSError as error:
        told = f"can't be read as a folder with {' and '.join(_FILES)} of the extractor {name!r}"
        raise EstLoraError(f"{quote(folder)} {told}: {reason(error)}") from error
    lacking = [file for file in _FILES if file not in there]
    pickles = [file for file in there if file.endswith(_PICKLES)]
    if lacking == [_WEIGHTS] and pickles:
        raise EstLoraError(
            f"{quote(folder)} has no {_WEIGHTS}, only {quote(pickles[0])}, which is a pickle, which can run code when"
            " it is loaded: put its safetensors file there."
        )
    if lacking:
        inside = f"has {', '.join(map(quote, there[:5]))}" if there else "has no files"
        more = f" and {len(there) - 5} more" if len(there) > 5 else ""
        raise EstLoraError(
            f"{quote(folder)} lacks {' and '.join(lacking)} of the extractor {name!r}, it {inside}{more}:"
            " name a folder in transformers' format."
        )
    return {file: folder / file for file in _FILES}


def _read_config(name: str, path: Path) -> dict[str, Any]:
    """The part of a config that tells of the vision transformer."""
    kinds = _KINDS[name].model_types
    content = _read_json(path)
    if content.get("model_type") not in kinds:
        raise EstLoraError(
            f"{quote(path)} isn't that of an extractor {name!r}, as it has no 'model_type'"
            f" {' or '.join(map(quote, kinds))}: name a folder in transformers' format."
        )
    part = content.get("vision_config") if content["model_type"] == "clip" else content
    return part if isinstance(part, dict) else {}


def _read_json(path: Path) -> dict[str, Any]:
    """The names and values in a file; none where it holds something else."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise EstLoraError(f"{quote(path)} can't be read: {reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise EstLoraError(f"{quote(path)} isn't JSON, download it again: {reason(error)}") from error
    return content if isinstance(content, dict) else {}


def _fetched(cache: Path | None) -> dict[str, Path]:
    """The files of the published DINO, from the cache, else from the network."""
    hub = _library("huggingface_hub", "dino")
    published = {"repo_id": _REPOSITORY, "revision": _REVISION, "cache_dir": cache}
    files = {}
    for file in _FILES:
        try:
            # Newer versions of `hf_hub_download` ask the network even for what is in the cache.
            found = hub.try_to_load_from_cache(filename=file, **published)
            if not isinstance(found, str):
                # Without a network this fails at once, and the download only after half a minute of trying again.
                hub.get_hf_file_metadata(hub.hf_hub_url(_REPOSITORY, file, revision=_REVISION))
                found = hub.hf_hub_download(filename=file, **published)
            files[file] = Path(found)
        except Exception as error:  # of the network, the disk, or the site, each library's own kind
            told = f"The DINO weights can't be fetched ({reason(error).rstrip('.')})"
            raise EstLoraError(f"{told}: connect once, or name a folder that has them.") from error
    return files


def _load(name: str, files: Mapping[str, Path], device: torch.device) -> _Embed:
    """The model of these files, and no others: transformers is given their content, and looks at no folder itself."""
    from safetensors.torch import load_file

    transformers = _library("transformers", name)
    kind = _KINDS[name]
    # The processor that works on PIL pictures, which is the only one of older versions.
    processors = getattr(transformers, f"{kind.processor}Pil", None) or getattr(transformers, kind.processor)
    processor = processors.from_dict(_read_json(files[_PREPROCESSOR]))
    config = _read_config(name, files[_CONFIG])
    built = getattr(transformers, kind.config)(**{key: config[key] for key in _FIELDS if key in config})
    try:
        weights = load_file(files[_WEIGHTS])
    except (SafetensorError, OSError) as error:
        raise _unreadable(files[_WEIGHTS], error) from error
    with _quietly(transformers):
        model, loaded = getattr(transformers, kind.model).from_pretrained(
            None, config=built, state_dict=weights, output_loading_info=True, **kind.options
        )
    lacking = sorted(key for key in loaded["missing_keys"] if not key.endswith("position_ids"))  # which are no weights
    if lacking:
        raise _misfit(files[_WEIGHTS], lacking)
    model.float().eval().to(device)

    def embed(picture: Image) -> Tensor:
        with _plainly(device):
            pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
            return kind.feature(model(pixel_values=pixels.to(device))).float().cpu()

    return embed


@contextmanager
def _quietly(transformers: ModuleType) -> Iterator[None]:
    """Without its list of weights that the model has no use for: of a pooler, of CLIP's text encoder."""
    loudness = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(loudness)


@contextmanager
def _plainly(device: torch.device) -> Iterator[None]:
    """Without gradients, and in the types that tensors have, whatever the host has switched on."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if device.type in _AUTOCASTING:
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def _rgb(picture: Image) -> Image:
    """The picture in 8-bit colours; what is transparent keeps the colour it has."""
    if picture.mode.startswith("I;16"):  # which older versions of PIL cut off at 255
        picture = picture.point(lambda value: value * (1 / 257)).convert("L")
    return picture.convert("RGB")


def _library(name: str, extractor: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(name)
    except Exception as error:  # one that doesn't fit its neighbours raises anything
        package = name.partition(".")[0].replace("_", "-")
        told = f"The extractor {extractor!r} needs {package}, which can't be imported ({reason(error).rstrip('.')})"
        raise EstLoraError(f"{told}: install it, or give beta as a number.") from error


def _unreadable(path: Path, error: Exception) -> EstLoraError:
    told = "isn't a whole safetensors file, delete it and get it again"
    return EstLoraError(f"{quote(path.resolve())} {told}: {reason(error)}")  # of a cache, the file and not the link


def _misfit(path: Path, lacking: Sequence[str]) -> EstLoraError:
    more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
    told = f"doesn't fit the {_CONFIG} beside it: it lacks {quote(lacking[0])}{more}; get both again."
    return EstLoraError(f"{quote(path)} {told}")
