"""Feature extractors: pictures in, one vector each out. Weights come from safetensors only; nothing is unpickled."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from est_lora.errors import EstLoraError, nearest, quote, reason

if TYPE_CHECKING:
    from PIL.Image import Image

NAMES = ("dino", "clip")
_REPOSITORY = "timm/vit_small_patch16_224.dino"
_REVISION = "733b42a211ebe03aa7327050699cfcee7cd96123"
_CONFIG, _PREPROCESSOR, _WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
_FILES = {"dino": (_CONFIG, _WEIGHTS), "clip": (_CONFIG, _PREPROCESSOR, _WEIGHTS)}
_FORMATS = {"dino": "timm's", "clip": "transformers'"}
_CLIP_KINDS = ("clip", "clip_vision_model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_AUTOCASTING = ("cpu", "cuda")  # devices that every torch can switch automatic casts off for

_Embed = Callable[["Image"], Tensor]


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
    if _check_name(name, folder) is None:
        return f"{name}@{_REVISION[:8]}"
    files = _files_in(name, Path(folder))  # type: ignore[arg-type]
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
        folder: where its files are: for `dino` those of a vision transformer of timm (config.json, model.safetensors),
            for `clip` those of transformers (and preprocessor_config.json). None fetches the published DINO, if it
            isn't in the cache yet.
        cache: where fetched files are kept, in the layout of the Hugging Face cache; None for the user's own.
        device: where it computes, in float32 whatever the weights' type.

    Raises:
        EstLoraError: a library, a file or the network is missing, or the files don't hold what they should.
    """
    called = identity(name, folder)
    files = _fetched(cache) if folder is None else _files_in(name, Path(folder))
    try:
        place = torch.device(device)
        embed = (_dino if name == "dino" else _clip)(files, place)
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


def _check_name(name: str, folder: Path | None) -> Path | None:
    if name not in NAMES:
        near = nearest(str(name), NAMES)
        there = f"did you mean {quote(near[0])}?" if near else f"there are {' and '.join(map(quote, NAMES))}."
        raise EstLoraError(f"There is no extractor {quote(name)}: {there}")
    if folder is None and name != "dino":
        needed = ", ".join(_FILES[name])
        raise EstLoraError(f"The extractor {name!r} is never fetched: name a folder that has its files ({needed}).")
    return folder


def _files_in(name: str, folder: Path) -> dict[str, Path]:
    """The files of an extractor in a folder, by their names."""
    try:
        there = sorted(path.name for path in folder.iterdir() if path.is_file())
    except OSError as error:
        needed = " and ".join(_FILES[name])
        raise EstLoraError(
            f"{quote(folder)} can't be read as a folder with {needed} of the extractor {name!r}: {reason(error)}"
        ) from error
    lacking = [file for file in _FILES[name] if file not in there]
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
            f" name a folder in {_FORMATS[name]} format."
        )
    return {file: folder / file for file in _FILES[name]}


def _read_config(name: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise EstLoraError(f"{quote(path)} can't be read: {reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise EstLoraError(f"{quote(path)} isn't JSON, download it again: {reason(error)}") from error
    content = config if isinstance(config, dict) else {}
    if name == "dino":
        fits = isinstance(content.get("architecture"), str) and isinstance(content.get("pretrained_cfg"), dict)
        wanted = "'architecture' and 'pretrained_cfg'"
    else:
        fits = content.get("model_type") in _CLIP_KINDS
        wanted = f"'model_type' {' or '.join(map(quote, _CLIP_KINDS))}"
    if not fits:
        raise EstLoraError(
            f"{quote(path)} isn't that of an extractor {name!r}, as it has no {wanted}:"
            f" name a folder in {_FORMATS[name]} format."
        )
    return content


def _fetched(cache: Path | None) -> dict[str, Path]:
    """The files of the published DINO, from the cache, else from the network."""
    hub = _library("huggingface_hub", "dino")
    published = {"repo_id": _REPOSITORY, "revision": _REVISION, "cache_dir": cache}
    files = {}
    for file in _FILES["dino"]:
        try:
            # Newer versions of `hf_hub_download` ask the network even for what is in the cache.
            found = hub.try_to_load_from_cache(filename=file, **published)
            files[file] = Path(found if isinstance(found, str) else hub.hf_hub_download(filename=file, **published))
        except Exception as error:  # of the network, the disk, or the site, each library's own kind
            told = f"The DINO weights can't be fetched ({reason(error).rstrip('.')})"
            raise EstLoraError(f"{told}: connect once, or name a folder that has them.") from error
    return files


def _dino(files: Mapping[str, Path], device: torch.device) -> _Embed:
    """A vision transformer of timm: the CLS token after the last norm, as in `forward_features(x)[:, 0]`."""
    timm, data = _library("timm", "dino"), _library("timm.data", "dino")
    config = _read_config("dino", files[_CONFIG])
    model = timm.create_model(_architecture(timm, config), pretrained=False, num_classes=0, **_model_args(timm, config))
    if getattr(model, "cls_token", None) is None:
        raise EstLoraError(
            f"{quote(files[_CONFIG])} is of {quote(config['architecture'])}, which has no class token:"
            " name a folder with a vision transformer."
        )
    prepared = data.create_transform(
        **data.resolve_data_config({}, pretrained_cfg=config["pretrained_cfg"]), is_training=False
    )
    _fill(model, files[_WEIGHTS])
    model.float().eval().to(device)

    def embed(picture: Image) -> Tensor:
        with _plainly(device):
            tokens: Tensor = model.forward_features(prepared(picture)[None].to(device))
            return tokens[0, 0].float().cpu()

    return embed


def _architecture(timm: ModuleType, config: Mapping[str, Any]) -> str:
    """The name of a model that timm itself has, as names can also be addresses."""
    name: str = config["architecture"]
    if not timm.is_model(name):
        raise EstLoraError(f"timm {timm.__version__} has no model {quote(name)}: install a newer one.")
    return name


def _model_args(timm: ModuleType, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config changes of its architecture; never what is `create_model`'s own, which could load other files."""
    given = config.get("model_args") or {}
    if not isinstance(given, dict):
        raise EstLoraError(f"The 'model_args' in {_CONFIG} can't be {quote(given)}: they are names with values.")
    own = {*inspect.signature(timm.create_model).parameters, "num_classes"}
    if refused := sorted(key for key in given if key in own or key.startswith("pretrained")):
        raise EstLoraError(f"The 'model_args' in {_CONFIG} can't set {quote(refused[0])}: take it out.")
    return given


def _fill(model: torch.nn.Module, path: Path) -> None:
    """Loads all weights of a model, and no others, from a safetensors file."""
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    there, wanted = weights.keys(), model.state_dict()
    wrong = [
        *(f"lacks {quote(key)}" for key in wanted if key not in there),
        *(f"has {quote(key)} too much" for key in there if key not in wanted),
        *(
            f"has {quote(key)} of another shape"
            for key in there & wanted.keys()
            if weights[key].shape != wanted[key].shape
        ),
    ]
    if wrong:
        raise _misfit(path, wrong)
    model.load_state_dict(weights)


def _clip(files: Mapping[str, Path], device: torch.device) -> _Embed:
    """The image encoder of a CLIP in transformers' format: `image_embeds`."""
    transformers = _library("transformers", "clip")
    folder, weights = str(files[_CONFIG].parent), files[_WEIGHTS]
    # The processor that works on PIL pictures, which is the only one of older versions.
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    processor = kind.from_pretrained(folder, local_files_only=True)
    loudness = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # lest it list the weights of the text encoder, if there is one
    try:
        model, loaded = transformers.CLIPVisionModelWithProjection.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except SafetensorError as error:
        raise _unreadable(weights, error) from error
    finally:
        transformers.logging.set_verbosity(loudness)
    lacking = sorted(key for key in loaded["missing_keys"] if not key.endswith("position_ids"))  # which are no weights
    if lacking:
        raise _misfit(weights, [f"lacks {quote(key)}" for key in lacking])
    model.float().eval().to(device)

    def embed(picture: Image) -> Tensor:
        with _plainly(device):
            pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
            embedded: Tensor = model(pixel_values=pixels.to(device)).image_embeds
            return embedded[0].float().cpu()

    return embed


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


def _misfit(path: Path, wrong: Sequence[str]) -> EstLoraError:
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return EstLoraError(f"{quote(path)} doesn't fit the {_CONFIG} beside it: it {wrong[0]}{more}; get both again.")
