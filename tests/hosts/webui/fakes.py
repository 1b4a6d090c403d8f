"""Fakes of the hosts' Python modules, as far as an extension sees them."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from tests.files import ATTENTION_LAYERS, CONV, FEED_FORWARD, original_name
from tests.hosts.webui.networks import TEXT_LAYERS


class OnDisk:
    """An entry of the built-in extension's list; the hash is only known once somebody wanted it."""

    def __init__(self, networks: ModuleType, path: Path) -> None:
        self._networks = networks
        self.name, self.filename = path.stem, str(path)
        metadata = _metadata(path) if path.suffix == ".safetensors" else {}
        self.alias = metadata.get("ss_output_name", self.name)
        self.hash, self.shorthash = "", ""
        self.hashed = 0

    def read_hash(self) -> None:
        if self.hash:
            return
        self.hashed += 1
        content = Path(self.filename).read_bytes()
        start = 8 + struct.unpack("<Q", content[:8])[0] if self.filename.endswith(".safetensors") else 0
        self.hash = hashlib.sha256(content[start:]).hexdigest()
        self.shorthash = self.hash[:12]
        self._networks.available_network_hash_lookup[self.shorthash] = self


def networks_module(folder: Path, load: Any) -> ModuleType:
    """The built-in Lora extension; `load(networks, [(entry, strength)])` makes them act."""
    fake = ModuleType("networks")
    fake.available_networks, fake.available_network_aliases = {}, {}
    fake.forbidden_network_aliases, fake.available_network_hash_lookup = {}, {}
    fake.loaded_networks = []
    fake.scans = 0

    def list_available_networks() -> None:
        fake.scans += 1
        for table in (
            fake.available_networks,
            fake.available_network_aliases,
            fake.forbidden_network_aliases,
            fake.available_network_hash_lookup,
        ):
            table.clear()
        fake.forbidden_network_aliases.update({"none": 1, "Addams": 1})
        for path in sorted(folder.rglob("*")):
            if path.suffix not in (".safetensors", ".pt", ".ckpt"):
                continue
            entry = OnDisk(fake, path)
            fake.available_networks[entry.name] = entry
            if entry.alias in fake.available_network_aliases:
                fake.forbidden_network_aliases[entry.alias.lower()] = 1
            fake.available_network_aliases[entry.name] = entry
            fake.available_network_aliases[entry.alias] = entry

    def load_networks(names: list[str], strengths: list[float]) -> None:
        found = [fake.available_network_aliases.get(name) for name in names]
        load(fake, [(name, *pair) for name, *pair in zip(names, found, strengths) if pair[0] is not None])

    fake.list_available_networks = list_available_networks
    fake.load_networks = load_networks
    fake.network_apply_weights = lambda module: apply_weights(module, fake.loaded_networks)
    list_available_networks()
    return fake


class UserNetwork:
    """What A1111 makes of a `<lora:>` tag."""

    def __init__(self, name: str, entry: OnDisk, strength: float) -> None:
        self.name, self.mentioned_name, self.network_on_disk = name, name, entry
        self.te_multiplier = self.unet_multiplier = strength
        self.dyn_dim, self.mtime, self.bundle_embeddings = None, 0, {}
        self.modules = {
            key: SimpleNamespace(calc_updown=lambda weight, change=change: (change.reshape(weight.shape), None))
            for key, change in user_changes(entry.filename, strength)
        }


def user_changes(path: str, strength: float, separator: str = "_"):
    """The host's name of each layer of a kohya file for SD1, and its change."""
    tensors = load_file(path)
    unet = {f"lora_unet_{n.replace('.', '_')}": f"diffusion_model.{original_name(n)}" for n in _UNET_NAMES}
    text = {f"lora_te_{n.replace('.', '_')}": f"transformer.{n}" for n in TEXT_LAYERS}
    for key, own in {**unet, **text}.items():
        if f"{key}.lora_up.weight" in tensors:
            up, down = tensors[f"{key}.lora_up.weight"], tensors[f"{key}.lora_down.weight"]
            scale = tensors[f"{key}.alpha"] / down.shape[0] * strength
            product = (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
            yield own.replace(".", separator), product * scale


def apply_weights(module: nn.Module, loaded: list[Any]) -> None:
    """Lazy merging: from the backup whenever the loaded networks or their strengths are others than at the last call."""
    key = getattr(module, "network_layer_name", None)
    wanted = tuple((net.name, net.te_multiplier, net.unet_multiplier, net.dyn_dim) for net in loaded)
    if key is None or getattr(module, "network_current_names", ()) == wanted:
        return
    is_attention = isinstance(module, nn.MultiheadAttention)
    own = (module.in_proj_weight, module.out_proj.weight) if is_attention else (module.weight,)
    bias = module.out_proj.bias if is_attention else module.bias
    with torch.no_grad():
        if getattr(module, "network_weights_backup", None) is None:
            copies = tuple(weight.clone() for weight in own)
            module.network_weights_backup = copies if is_attention else copies[0]
            module.network_bias_backup = None if bias is None else bias.clone()
        kept = module.network_weights_backup
        for weight, backup in zip(own, kept if is_attention else (kept,)):
            weight.copy_(backup)
        if bias is not None:
            bias.copy_(module.network_bias_backup)
        for network in loaded:
            _add(network, key, own, bias, is_attention)
    module.network_current_names = wanted


def _add(network: Any, key: str, own: tuple[nn.Parameter, ...], bias: nn.Parameter | None, is_attention: bool) -> None:
    if not is_attention:
        if key in network.modules:
            change, extra = network.modules[key].calc_updown(own[0])
            own[0].copy_((own[0].to(change.dtype) + change).to(own[0].dtype))
            if extra is not None:
                bias.add_(extra)
        return
    parts = [network.modules.get(f"{key}_{end}_proj") for end in ("q", "k", "v", "out")]
    if not all(parts):
        return
    changes = [part.calc_updown(weight) for part, weight in zip(parts, (*own[0].chunk(3), own[1]))]
    own[0].add_(torch.vstack([change for change, _ in changes[:3]]))
    own[1].add_(changes[3][0])
    if changes[3][1] is not None:
        bias.add_(changes[3][1])


class ScriptCallbacks(ModuleType):
    """What extensions register for."""

    def __init__(self) -> None:
        super().__init__("modules.script_callbacks")
        self.callbacks: dict[str, list[Any]] = {}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda callback, **_: self.callbacks.setdefault(name, []).append(callback)

    def call(self, name: str, *args: Any) -> None:
        for callback in self.callbacks.get(name, []):
            callback(*args)


class Script:
    """The base of all scripts."""

    filename: str | None = None
    args_from = args_to = 0
    alwayson = True
    is_img2img = False

    def title(self) -> str:
        raise NotImplementedError

    def elem_id(self, name: str) -> str:
        title = "".join(c for c in self.title().lower() if c.isalnum() or c == "_")
        return f"script_{'img2img' if self.is_img2img else 'txt2img'}_{title}_{name}"


def scripts_module() -> ModuleType:
    fake = ModuleType("modules.scripts")
    fake.Script, fake.AlwaysVisible, fake.scripts_data = Script, object(), []
    return fake


class HTTPException(Exception):
    """FastAPI's."""

    def __init__(self, status_code: int, detail: str) -> None:
        super().__init__(detail)
        self.status_code, self.detail = status_code, detail


def api_module(defaults: list[Any]) -> ModuleType:
    """The API: it copies what a request says into the arguments of the scripts."""
    fake = ModuleType("modules.api.api")

    class Api:
        def init_script_args(
            self,
            request,
            default_script_args,
            selectable_scripts,
            selectable_idx,
            script_runner,
            *,
            input_script_args=None,
        ):
            arguments = list(default_script_args)
            for given in (request.alwayson_scripts or {}).values():
                for index in range(min(len(arguments), len(given.get("args", ())))):
                    arguments[index] = given["args"][index]
            return arguments

        def apply_infotext(self, request, tabname, *, script_runner=None, mentioned_script_args=None):
            if not request.infotext:
                return {}
            parameters = read_infotext(request.infotext)
            if request.prompt is None:
                request.prompt = parameters["Prompt"]
            return parameters

    fake.Api, fake.defaults = Api, defaults
    return fake


_SIZE = re.compile(r"^(\d+)x(\d+)$")
_PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def infotext_of(prompt: str, parameters: dict[str, Any]) -> str:
    """The text that a picture carries."""
    values = {"Steps": 5, "Sampler": "Euler", "Seed": 1, **parameters}
    pairs = ((key, str(value)) for key, value in values.items() if value is not None)
    quoted = (
        (key, json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",\n:") else value)
        for key, value in pairs
    )
    return f"{prompt}\n" + ", ".join(f"{key}: {value}" for key, value in quoted)


def read_infotext(text: str) -> dict[str, Any]:
    """What the host makes of it: everything is text."""
    *prompt, last = text.strip().split("\n")
    found = {}
    for key, value in _PARAMETER.findall(last):
        size = _SIZE.match(value)
        if size:
            found |= {f"{key}-1": size[1], f"{key}-2": size[2]}
        else:
            found[key] = json.loads(value) if value[:1] == value[-1:] == '"' else value
    return {**found, "Prompt": "\n".join(line.strip() for line in prompt)}


class App:
    """As much of FastAPI as routes need."""

    def __init__(
        self, paths: tuple[str, ...] = ("/sdapi/v1/options",), guards: tuple[Any, ...] = ("password",)
    ) -> None:
        self.routes = [SimpleNamespace(path=path, dependencies=list(guards)) for path in paths]
        self.routes.append(SimpleNamespace())  # a mount has no path

    def add_api_route(self, path, endpoint, *, methods, dependencies=None, response_model=None) -> None:
        self.routes.append(SimpleNamespace(path=path, endpoint=endpoint, methods=methods, dependencies=dependencies))

    def get(self, path: str, **query: str) -> Any:
        endpoint = next(route.endpoint for route in self.routes if getattr(route, "path", None) == path)
        return endpoint(SimpleNamespace(query_params=query)) if endpoint.__annotations__.get("request") else endpoint()


class Component(SimpleNamespace):
    """Notes how it was made, and what happens when."""

    kind = ""

    def __init__(self, kind: str, args: tuple[Any, ...], knobs: dict[str, Any]) -> None:
        super().__init__(kind=kind, args=args, **knobs)
        self.events: dict[str, list[dict[str, Any]]] = {}

    def __repr__(self) -> str:
        return f"<{self.kind} {getattr(self, 'elem_id', '')}>"

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def change(self, **event: Any) -> Event:
        return Event([self.events.setdefault("change", [])], event)

    def click(self, **event: Any) -> Event:
        return Event([self.events.setdefault("click", [])], event)

    def input(self, **event: Any) -> Event:
        return Event([self.events.setdefault("input", [])], event)

    def release(self, **event: Any) -> Event:
        return Event([self.events.setdefault("release", [])], event)


class Event:
    """Something that happens, here or in several places, and what happens after it."""

    def __init__(self, chains: list[list[dict[str, Any]]], event: dict[str, Any]) -> None:
        self._chains = chains
        for chain in chains:
            chain.append(event)

    def then(self, **event: Any) -> Event:
        return Event(self._chains, event)


def on(triggers: Sequence[Any], *, js: str, **event: Any) -> Event:
    """One event for several triggers."""
    chains = [trigger.__self__.events.setdefault(trigger.__name__, []) for trigger in triggers]
    return Event(chains, {"_js": js, **event})


def gradio_module(built: list[Any], is_4: bool) -> ModuleType:
    """Components of one page."""
    fake = ModuleType("gradio")

    def component(kind: str) -> Any:
        def make(*args: Any, **knobs: Any) -> Any:
            made = Component(kind, args, {"value": args[0] if args else None, **knobs})
            enter(fake, built, made)
            return made

        return make

    @contextmanager
    def layout(*args: Any, **knobs: Any):
        yield

    for kind in ("Dropdown", "Slider", "Textbox", "Markdown", "Radio", "HTML", "Button", "State", "Checkbox", "Number"):
        setattr(fake, kind, component(kind))
    fake.Row = fake.Accordion = layout
    if is_4:
        fake.on = on
    fake.update = lambda **changes: {"__type__": "update", **changes}
    fake.Context = SimpleNamespace(root_block=SimpleNamespace(blocks={}))
    return fake


class State:
    """What the host tells of its job, and what stops it."""

    job, job_no, job_count, sampling_step, sampling_steps = "", 0, 0, 0, 0
    textinfo = current_latent = current_image = None
    interrupted = skipped = False

    def begin(self, job: str) -> None:
        self.job, self.job_count, self.interrupted, self.skipped = job, -1, False, False

    def end(self) -> None:
        self.job, self.job_count = "", 0

    def interrupt(self) -> None:
        self.interrupted = True

    def assign_current_image(self, image: Any) -> None:
        self.current_image = image


def shared_module() -> ModuleType:
    """The host's settings."""
    fake = ModuleType("modules.shared")

    class OptionInfo(SimpleNamespace):
        def __init__(self, default, label, component=None, component_args=None, section=None):
            super().__init__(
                default=default,
                label=label,
                component=component,
                arguments=component_args,
                section=section,
                about="",
                reloads=False,
                onchange=None,
            )

        def info(self, about: str) -> OptionInfo:
            self.about = about
            return self

        def needs_reload_ui(self) -> OptionInfo:
            self.reloads = True
            return self

    options: dict[str, OptionInfo] = {}
    fake.state, fake.total_tqdm = State(), SimpleNamespace(clear=lambda: None)
    fake.OptionInfo = OptionInfo
    fake.opts = SimpleNamespace(data={}, options=options, add_option=options.__setitem__)
    return fake


def enter(gradio: ModuleType, built: list[Any], made: Component) -> None:
    """Puts a new component on the page that is being built."""
    made._id = len(built)
    built.append(made)
    gradio.Context.root_block.blocks[made._id] = made


def accordion(gradio: ModuleType, built: list[Any]) -> Any:
    @contextmanager
    def make(**knobs: Any):
        made = Component("InputAccordion", (), knobs)
        enter(gradio, built, made)
        yield made

    return make


def setup_img2img_steps(p: Any, steps: int | None = None) -> tuple[int, int]:
    """The full number of steps, and how many of them are done."""
    strength = min(p.denoising_strength, 0.999)
    if steps is not None:
        return (int(steps / strength) if p.denoising_strength > 0 else 0), steps - 1
    return p.steps, int(strength * p.steps)


def _metadata(path: Path) -> dict[str, str]:
    with path.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        return json.loads(stream.read(length)).get("__metadata__", {})


_UNET_NAMES = (*ATTENTION_LAYERS, FEED_FORWARD, CONV)
