"""A WebUI without a browser: a loaded checkpoint, and the order in which the host calls its scripts."""

from __future__ import annotations

import copy
import importlib.util
import re
import sys
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from est_lora.config import FIELDS
from tests.hosts.webui import fakes
from tests.hosts.webui.networks import A1111, FIRST_WIDTH, FORGE, SECOND_WIDTH, Clip, OpenClip, UNet, tokens_of
from tests.hosts.webui.samplers import ALPHAS, Call, Predictor, sampler_modules, sampler_of

ENTRY = Path(__file__).parents[3] / "scripts" / "est_lora.py"
_TAG = re.compile(r"<(\w+):([^>]+)>")
_COMMENT = re.compile(r"#[^\n]*(\n|$)")


class Params:
    """One tag of a prompt."""

    def __init__(self, items: list[str]) -> None:
        self.items, self.positional, self.named = items, [], {}
        for item in items:
            parts = item.split("=", 2)
            if len(parts) == 2:
                self.named[parts[0]] = parts[1]
            else:
                self.positional.append(item)

    def __eq__(self, other: object) -> bool:
        return self.items == other.items


def parse_prompts(prompts: list[str]) -> tuple[list[str], dict[str, list[Params]]]:
    """The prompts without tags, and the tags of the first."""
    first: dict[str, list[Params]] = defaultdict(list)
    for name, content in _TAG.findall(prompts[0]):
        first[name].append(Params(content.split(":")))
    return [_TAG.sub("", prompt) for prompt in prompts], first


class ForgeObjects:
    def __init__(self, unet: Any, clip: Any) -> None:
        self.unet, self.clip = unet, clip

    def shallow_copy(self) -> ForgeObjects:
        return ForgeObjects(self.unet, self.clip)


@dataclass
class Picture:
    """What a batch gave."""

    latent: Tensor
    infotext: dict[str, Any]


@dataclass
class WebUI:
    """The host. `flavour` is `a1111` or `forge`, `family` `sd15` or `sdxl`."""

    flavour: str
    family: str
    folder: Path
    modules: dict[str, ModuleType] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    components: list[Any] = field(default_factory=list)
    others: list[Any] = field(default_factory=list)
    tilings: list[Any] = field(default_factory=list)
    first_pass_conds_for_second: bool = False

    def __post_init__(self) -> None:
        self.sd_model = self.selected = self.checkpoint(seed=1)
        self.caches: dict[str, list[Any]] = {}
        self.cached = [None, None]
        self.encodings = 0
        self.callbacks = fakes.ScriptCallbacks()
        self.networks = fakes.networks_module(self.folder, self._load_networks)
        self.sd_unet = ModuleType("modules.sd_unet")
        self.sd_unet.current_unet = None
        self._forge_backup: dict[str, Tensor] = {}

    @property
    def is_forge(self) -> bool:
        return self.flavour == "forge"

    def install(self) -> None:
        """Puts the fakes where Python looks for modules, and loads the extension's entry file as the host does."""
        samplers = ModuleType("modules.sd_samplers_common")
        samplers.setup_img2img_steps = fakes.setup_img2img_steps
        common, components = ModuleType("modules.ui_common"), ModuleType("modules.ui_components")
        common.create_refresh_button = self._refresh_button
        gradio = fakes.gradio_module(self.components, is_4=self.is_forge)
        components.InputAccordion = fakes.accordion(gradio, self.components)
        fastapi, paths = ModuleType("fastapi"), ModuleType("modules.paths")
        fastapi.HTTPException, fastapi.Request = fakes.HTTPException, SimpleNamespace
        fastapi.Response = lambda content, media_type: SimpleNamespace(content=content, media_type=media_type)
        paths.data_path = paths.models_path = str(self.folder)
        context = ModuleType("gradio.context")
        context.Context = gradio.Context
        processing, devices = ModuleType("modules.processing"), ModuleType("modules.devices")
        processing.StableDiffusionProcessingTxt2Img = lambda **knobs: Processing(self, **knobs)
        processing.process_images = self.process_images
        devices.device = "cpu"
        queue = ModuleType("modules.call_queue")
        queue.queue_lock = nullcontext()
        extra = ModuleType("modules.ui_extra_networks")
        extra.extra_pages = []
        named = [
            ModuleType("modules"),
            ModuleType("modules.api"),
            fakes.api_module([]),
            fakes.scripts_module(),
            self.callbacks,
            self.sd_unet,
            samplers,
            common,
            components,
            gradio,
            context,
            fastapi,
            paths,
            processing,
            devices,
            queue,
            extra,
            fakes.shared_module(),
            self.networks,
            *sampler_modules(),
        ]
        if self.is_forge:
            processing.apply_circular_forge = lambda sd_model, tiling: self.tilings.append(tiling)
        else:  # Forge has both, Forge Neo hasn't
            hijack = ModuleType("modules.sd_hijack")
            hijack.model_hijack = SimpleNamespace(apply_circular=self.tilings.append)
            named.append(hijack)
        self.modules = {module.__name__: module for module in named}
        models = self.modules["modules.sd_models"]
        models.model_data = self
        models.apply_token_merging = lambda sd_model, ratio: None
        for name, module in self.modules.items():
            parent, _, leaf = name.rpartition(".")
            if parent:
                setattr(self.modules[parent], leaf, module)
        self.modules["modules.shared"].sd_model = self.sd_model
        sys.modules.update(self.modules)
        self.load_entry()

    def load_entry(self) -> None:
        """What the host does at the start and at Reload UI."""
        spec = importlib.util.spec_from_file_location("est_lora.py", ENTRY)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.script = module.EstLora()
        runner = SimpleNamespace(alwayson_scripts=[*self.others, self.script], callback_map={"process": "all"})
        module.scripts.scripts_txt2img = module.scripts.scripts_img2img = runner
        self.script.args_to = len(self.default_arguments())

    def default_arguments(self) -> list[Any]:
        return [False, "None", "None", *(field.default for field in FIELDS[3:])]

    def api_arguments(self, scripts: dict[str, Any]) -> list[Any]:
        """The script arguments that a request with these `alwayson_scripts` gives."""
        api = self.modules["modules.api.api"].Api()
        return api.init_script_args(SimpleNamespace(alwayson_scripts=scripts), self.default_arguments(), None, 0, None)

    # -- the model

    def checkpoint(self, seed: int, family: str | None = None, unet: nn.Module | None = None) -> Any:
        """A loaded checkpoint."""
        family, kind = family or self.family, FORGE if self.is_forge else A1111
        xl = family == "sdxl"
        unet = unet or UNet(kind, seed)
        first = Clip(kind, FIRST_WIDTH[family], seed + 1)
        info = SimpleNamespace(name=f"model-{seed}", sha256=f"{seed:064x}", seed=seed, family=family)
        if self.is_forge:
            model = _forge_model(unet, first, Clip(kind, SECOND_WIDTH, seed + 2) if xl else None, info)
        else:
            model = _a1111_model(unet, first, OpenClip(kind, SECOND_WIDTH, seed + 2) if xl else None, info)
        model.selected_info = info
        return model

    def select(self, sd_model: Any) -> None:
        """The user selects a checkpoint."""
        self.sd_model = self.selected = sd_model

    @property
    def unet(self) -> nn.Module:
        return self.unet_of(self.sd_model)

    def unet_of(self, sd_model: Any) -> nn.Module:
        return sd_model.forge_objects.unet.model.diffusion_model if self.is_forge else sd_model.model.diffusion_model

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """The text encoders by diffusers' parts."""
        model = self.sd_model
        if self.is_forge:
            clip = model.forge_objects.clip.cond_stage_model
            found = {"text_encoder": clip.clip_l.transformer}
            return found | ({"text_encoder_2": clip.clip_g.transformer} if model.is_sdxl else {})
        if not model.is_sdxl:
            return {"text_encoder": model.cond_stage_model.wrapped.transformer}
        first, second, _ = model.conditioner.embedders
        return {"text_encoder": first.wrapped.transformer, "text_encoder_2": second.wrapped.model}

    def encode(self, prompts: list[str]) -> Tensor:
        """The prompts as the UNet takes them."""
        self.encodings += 1
        tokens = tokens_of(prompts)
        return torch.cat([encoder(tokens).float() for encoder in self.encoders.values()], -1)

    def load_into_same_modules(self, other: Any) -> None:
        """Another checkpoint's weights in the modules that are there."""
        mine, self.sd_model = (self.unet, *self.encoders.values()), other
        theirs, self.sd_model = (self.unet, *self.encoders.values()), self.selected
        for model, weights in zip(mine, theirs):
            model.load_state_dict(weights.state_dict())
            for module in model.modules():
                for name in ("network_weights_backup", "network_bias_backup", "network_current_names"):
                    vars(module).pop(name, None)
        self.sd_model.sd_checkpoint_info = other.sd_checkpoint_info

    def reload(self) -> None:
        """The checkpoint that the user selected, after another one was loaded for a part of a picture."""
        self.sd_model = self.selected
        info = self.sd_model.selected_info
        if self.sd_model.sd_checkpoint_info is not info:
            self.load_into_same_modules(self.checkpoint(info.seed, info.family))
            self.sd_model.sd_checkpoint_info = info

    # -- the user's own LoRAs

    def _load_networks(self, networks: ModuleType, wanted: list[tuple[str, Any, float]]) -> None:
        networks.loaded_networks.clear()
        networks.loaded_networks += [fakes.UserNetwork(*each) for each in wanted]
        for _, entry, _ in wanted:
            entry.read_hash()
        if not self.is_forge:
            return
        sd_model, names = self.sd_model, dict(self.unet.named_parameters(prefix="diffusion_model"))
        loader = sd_model.forge_objects_original.unet.lora_loader
        with torch.no_grad():
            for key, original in loader.backup.items():
                names[key].copy_(original)
            loader.backup.clear()
            for _, entry, strength in wanted:
                for key, change in fakes.user_changes(entry.filename, strength, "."):
                    weight = names.get(f"{key}.weight")
                    if weight is not None:
                        loader.backup.setdefault(f"{key}.weight", weight.clone())
                        weight += change.reshape(weight.shape)
        sd_model.forge_objects_after_applying_lora = sd_model.forge_objects.shallow_copy()

    def activate(self, p: Processing, tags: dict[str, list[Params]]) -> None:
        """The tags of a prompt begin to act."""
        wanted = tags.get("lora", [])
        strengths = [float(params.positional[1]) if len(params.positional) > 1 else 1.0 for params in wanted]
        self.networks.load_networks([params.positional[0] for params in wanted], strengths)
        if not getattr(p, "is_hr_pass", False) or not hasattr(p, "lora_hashes"):
            p.lora_hashes = {}
        for network in self.networks.loaded_networks:
            if network.network_on_disk.shorthash and network.mentioned_name:
                p.lora_hashes[network.mentioned_name] = network.network_on_disk.shorthash
        if p.lora_hashes:
            p.extra_generation_params["Lora hashes"] = ", ".join(f"{k}: {v}" for k, v in p.lora_hashes.items())
        self.tell("after_extra_networks_activate", p, extra_network_data=tags, batch_number=p.iteration)

    # -- scripts and pictures

    def tell(self, callback: str, p: Processing, **kwargs: Any) -> None:
        """Calls all scripts; what they raise is printed, and the picture goes on."""
        alone = getattr(p, "scripts", None)  # a job that is to have but some of them
        assert alone is None or alone.callback_map == {}
        for script in alone.alwayson_scripts if alone else (*self.others, self.script):
            function = getattr(script, callback, None)
            if function is None:
                continue
            try:
                function(p, *(p.script_args if script is self.script else ()), **kwargs)
            except Exception as error:  # noqa: BLE001
                self.errors.append(error)

    def make(self, p: Processing) -> list[Picture]:
        """All batches of a job."""
        p.all_prompts = p.prompt if isinstance(p.prompt, list) else [p.prompt] * p.n_iter
        p.all_hr_prompts = [p.hr_prompt or prompt for prompt in p.all_prompts]
        p.all_prompts, p.all_hr_prompts = (
            [_COMMENT.sub("\n", prompt) for prompt in prompts] for prompts in (p.all_prompts, p.all_hr_prompts)
        )
        p.negative_prompts = [p.negative_prompt]
        self.tell("process", p)
        pictures = []
        with torch.no_grad():
            for number, prompt in enumerate(p.all_prompts):
                p.iteration = number
                self.reload()
                if self.is_forge:
                    self.sd_model.forge_objects = self.sd_model.forge_objects_original.shallow_copy()
                p.prompts = [prompt]
                self.tell("before_process_batch", p)
                p.prompts, p.extra_network_data = parse_prompts([prompt])
                if p.enable_hr:
                    p.hr_prompts, p.hr_extra_network_data = parse_prompts([p.all_hr_prompts[number]])
                if not p.disable_extra_networks:
                    self.activate(p, p.extra_network_data)
                if self.is_forge:
                    self.sd_model.forge_objects = self.sd_model.forge_objects_after_applying_lora.shallow_copy()
                self.tell("process_batch", p, batch_number=number)
                p.setup_conds()
                latent = p.sample(
                    conditioning=p.c,
                    unconditional_conditioning=p.uc,
                    seeds=[1],
                    subseeds=[1],
                    subseed_strength=0,
                    prompts=p.prompts,
                )
                self.tell("post_sample", p)
                self.tell("postprocess_batch", p)
                self.tell("postprocess_image", p)
                pictures.append(Picture(latent, dict(p.extra_generation_params)))
        self.tell("postprocess", p)
        return pictures

    def process_images(self, p: Processing) -> Any:
        """A job of a script's own."""
        self.modules["modules.shared"].state.job_count = 9
        pictures = self.make(p)
        images = []
        for picture in pictures:
            levels = (picture.latent[0, :3].permute(1, 2, 0).tanh() * 127 + 128).byte().numpy()
            images.append(Image.fromarray(levels))
            self.modules["modules.shared"].state.assign_current_image(images[-1])
        return SimpleNamespace(images=images)

    def _refresh_button(self, components: Any, refresh: Any, choices: Any, elem_id: str) -> Any:
        made = SimpleNamespace(kind="Refresh", components=components, refresh=refresh, choices=choices, elem_id=elem_id)
        self.components.append(made)
        return made


class Processing:
    """`p`: one job."""

    enable_hr = False
    is_hr_pass = False
    iteration = 0
    scheduler = hr_scheduler = "Automatic"
    sampler_noise_scheduler_override = None

    def __init__(self, web: WebUI, prompt: str | list[str] = "a knight", *, args: Any = None, **knobs: Any) -> None:
        self.web = web
        self.prompt, self.hr_prompt, self.negative_prompt, self.n_iter = prompt, "", "", 1
        self.script_args = web.default_arguments() if args is None else list(args)
        self.steps, self.hr_second_pass_steps, self.denoising_strength = 5, 0, 0.6
        self.sampler_name, self.sampler = "Euler", None
        self.disable_extra_networks = False
        self.refiner_checkpoint_info, self.refiner, self.refiner_at = None, None, 3
        self.refines_pass = (False, True)
        self.hr_checkpoint: Any = None
        self.hr_checkpoint_info = None
        self.extra_generation_params: dict[str, Any] = {}
        self.comments: dict[str, int] = {}
        self.fails_at: int | None = None
        self.hr_extra_network_data = None
        self.tiling = False
        self.cached_c = self.cached_uc = web.cached
        vars(self).update(knobs)

    @property
    def sd_model(self) -> Any:
        return self.web.sd_model

    def get_token_merging_ratio(self) -> float:
        return 0.0

    def close(self) -> None:
        self.sampler = None

    def comment(self, text: str) -> None:
        self.comments[text] = 1

    def conds(self, name: str, prompts: list[str], tags: Any, *others: str) -> Tensor:
        """Encoded prompts, from the cache where nothing that the host looks at has changed."""
        web = self.web
        hires_steps = (self.hr_second_pass_steps or self.steps) if name.startswith("hr_") else None
        key = (prompts, self.steps, hires_steps, web.sd_model.sd_checkpoint_info, tags)
        caches = web.caches if self.cached_c is self.cached_uc is web.cached else {}
        for place in (name, *others):
            cache = caches.setdefault(place, [None, None])
            if cache[0] is not None and cache[0] == key:
                return cache[1]
        cache = caches[name]
        cache[1] = web.encode(prompts)
        cache[0] = key
        return cache[1]

    def setup_conds(self) -> None:
        web = self.web
        if self.is_hr_pass:
            self.hr_c = None
            self.calculate_hr_conds()
            return
        self.uc = self.conds("uc", self.negative_prompts, self.extra_network_data)
        self.c = self.conds("c", self.prompts, self.extra_network_data)
        self.hr_c = self.hr_uc = None
        if not self.enable_hr or self.hr_checkpoint is not None:
            return
        if web.first_pass_conds_for_second:
            self.calculate_hr_conds()
        elif web.is_forge:
            web.activate(self, self.hr_extra_network_data)
            self.calculate_hr_conds()
            web.activate(self, self.extra_network_data)

    def calculate_hr_conds(self) -> None:
        if self.hr_c is not None:
            return
        self.hr_uc = self.conds("hr_uc", self.negative_prompts, self.hr_extra_network_data, "uc")
        self.hr_c = self.conds("hr_c", self.hr_prompts, self.hr_extra_network_data, "c")

    def sample(self, conditioning, unconditional_conditioning, seeds, subseeds, subseed_strength, prompts) -> Tensor:
        web = self.web
        self.sampler = sampler_of(self)
        torch.manual_seed(self.iteration + getattr(self, "seed", 0))
        x = torch.randn(1, 4, 5, 5)
        self._before_sampling(x)
        latent = self.sampler.run(self, x, conditioning, unconditional_conditioning)
        if not self.enable_hr:
            return latent
        web.reload()
        if self.hr_checkpoint is not None:
            web.sd_model = self.hr_checkpoint
        self.is_hr_pass = True
        self.sampler = sampler_of(self)
        if not self.disable_extra_networks:
            web.activate(self, self.hr_extra_network_data)
        self.calculate_hr_conds()
        if web.is_forge:
            web.tell("process_before_every_sampling", self)
        self._before_sampling(latent)
        latent = self.sampler.run(self, latent, self.hr_c, self.hr_uc)
        self.sampler = None
        self.is_hr_pass = False
        return latent

    def _before_sampling(self, x: Tensor) -> None:
        model = self.web.sd_model
        if self.web.is_forge:
            model.forge_objects = model.forge_objects_after_applying_lora.shallow_copy()
        self.web.tell("process_before_every_sampling", self, x=x)


class ImageProcessing(Processing):
    """img2img."""

    init_images = ("a picture",)


def _forge_model(unet: nn.Module, first: nn.Module, second: nn.Module | None, info: Any) -> Any:
    inner = SimpleNamespace(diffusion_model=unet, predictor=Predictor())
    loader = SimpleNamespace(backup={})
    inner.lora_loader = loader
    patcher = SimpleNamespace(model=inner, lora_loader=loader)
    encoders = nn.Module()
    for name, encoder in (("clip_l", first), ("clip_g", second)):
        if encoder is not None:
            encoders.add_module(name, nn.Module())
            getattr(encoders, name).transformer = encoder
    clip = SimpleNamespace(cond_stage_model=encoders, patcher=SimpleNamespace(model=encoders))
    objects = ForgeObjects(patcher, clip)
    return SimpleNamespace(
        forge_objects=objects,
        forge_objects_original=objects.shallow_copy(),
        forge_objects_after_applying_lora=objects.shallow_copy(),
        is_sdxl=second is not None,
        sd_checkpoint_info=info,
    )


def _a1111_model(unet: nn.Module, first: nn.Module, second: nn.Module | None, info: Any) -> Any:
    inner = nn.Module()
    inner.diffusion_model = unet
    mapping: dict[str, nn.Module] = {}
    model = SimpleNamespace(
        model=inner,
        alphas_cumprod=ALPHAS,
        is_sdxl=second is not None,
        sd_checkpoint_info=info,
        network_layer_mapping=mapping,
    )
    holders = [nn.Module()]
    holders[0].transformer = first
    if second is None:
        model.cond_stage_model = SimpleNamespace(wrapped=holders[0])
    else:
        holders.append(nn.Module())
        holders[1].model = second
        sizes = nn.Module()
        model.conditioner = SimpleNamespace(embedders=[*(SimpleNamespace(wrapped=h) for h in holders), sizes])
    named = [(f"{i}_" if second else "", holder) for i, holder in enumerate(holders)]
    for prefix, root in (*named, ("", inner)):
        for name, module in root.named_modules():
            key = prefix + name.replace(".", "_")
            mapping[key] = module
            module.network_layer_name = key
    return model


def pristine(web: WebUI) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Copies of the UNet and the text encoders, on which nothing acts."""
    copies = copy.deepcopy((web.unet, web.encoders))
    for root in (copies[0], *copies[1].values()):
        for module in root.modules():
            module.network_layer_name = None
            for table in (module._forward_hooks, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs):
                table.clear()
    return copies
