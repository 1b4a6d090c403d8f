"""A WebUI extension for the tests alone: looks into the running host, and makes things go wrong on request.

Its one argument is a dict; what it saw comes back as JSON in the picture's parameters, under "probe".
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import sys

import torch
from modules import processing, scripts, shared
from safetensors.torch import load_file

_ASKED, _SEEN, _HOOKS, _COUNT = "_probe_asked", "_probe_seen", "_probe_hooks", "_probe_count"
# Forge's family gives CLIP-L a layer that checkpoints don't have and pictures don't depend on; in Neo it's another at each load.
_MADE_UP = "clip_l.transformer.text_projection.weight"
_STATE = ("job", "job_no", "job_count", "sampling_step", "sampling_steps", "textinfo", "id_live_preview")


def state():
    """What the host tells of the job."""
    return {name: getattr(shared.state, name, None) for name in _STATE}


class Probe(scripts.Script):
    """`{"record", "hash", "raise_at", "interrupt_at", "skip_at", "nested", "reload", "reference"}`.

    `{"raise_in", "interrupt_in", "skip_in"}` count every call of the UNet since the job began, whoever makes it.
    `{"weaken_at"}`: after that call the strength of the picture's own LoRAs is halved, as LoRA schedulers do in A1111.
    """

    def title(self):
        """Its name in the API."""
        return "EST-LoRA probe"

    def show(self, is_img2img):
        """Everywhere."""
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        """One hidden component, in whose place the dict comes."""
        import gradio as gr

        return [gr.Textbox(value="", visible=False, label="probe")]

    def process(self, p, *args):
        """Notes what is asked for."""
        setattr(p, _ASKED, args[0] if args and isinstance(args[0], dict) else {})
        setattr(p, _SEEN, {"calls": [], "passes": [], "areas": [], "states": [state()]})
        setattr(p, _HOOKS, [])
        if getattr(p, _ASKED):
            self._count(p)

    def process_batch(self, p, *args, **kwargs):
        """Looks at what the host's progress bar is made of, when everything else has had its turn."""
        getattr(p, _SEEN)["states"].append(state())

    def _count(self, p):
        asked, areas = getattr(p, _ASKED), getattr(p, _SEEN)["areas"]

        def count(module, positional):
            areas.append(positional[0].shape[2] * positional[0].shape[3])
            if len(areas) == asked.get("raise_in"):
                getattr(p, _COUNT).remove()
                raise RuntimeError("the probe was told to fail here")
            if len(areas) == asked.get("interrupt_in"):
                shared.state.interrupt()
            if len(areas) == asked.get("skip_in"):
                shared.state.skip()

        setattr(p, _COUNT, unet(p).register_forward_pre_hook(count))

    def process_before_every_sampling(self, p, *args, **kwargs):
        """Looks at each call of the UNet from outside."""
        asked, seen = getattr(p, _ASKED), getattr(p, _SEEN)
        if not asked:
            return
        self._remove(p)
        seen["passes"].append(len(seen["calls"]))
        model = unet(p)
        hooks = getattr(p, _HOOKS)
        if "reference" in asked:
            hooks += Reference(p, model, **asked["reference"]).hang()

        def called(module, positional, named, output):
            t = positional[1] if len(positional) > 1 else named["timesteps"]
            session = getattr(getattr(p, "est_lora", None), "session", None)
            seen["calls"].append([float(t.flatten()[0]), None if session is None else session.tau])
            count = len(seen["calls"])
            seen["merged"] = max(seen.get("merged", 0), getattr(session, "merged", 0))
            if count == asked.get("weaken_at"):
                for network in sys.modules["networks"].loaded_networks:
                    network.unet_multiplier /= 2
            if count == asked.get("raise_at"):
                self._remove(p)
                getattr(p, _COUNT).remove()
                raise RuntimeError("the probe was told to fail here")
            if count == asked.get("interrupt_at"):
                shared.state.interrupt()
            if count == asked.get("skip_at"):
                shared.state.skip()

        hooks.append(model.register_forward_hook(called, with_kwargs=True))

    def postprocess_image(self, p, pp, *args):
        """Starts a job of its own in the middle of another, as ADetailer does."""
        if getattr(p, _ASKED, {}).get("nested"):
            getattr(p, _SEEN)["nested"] = []
            inner = processing.StableDiffusionProcessingImg2Img(
                init_images=[pp.image],
                prompt=p.prompt,
                seed=p.seed,
                steps=p.steps,
                width=p.width,
                height=p.height,
                cfg_scale=p.cfg_scale,
                sampler_name=p.sampler_name,
                scheduler=p.scheduler,
                denoising_strength=0.5,
                do_not_save_samples=True,
                do_not_save_grid=True,
            )
            inner.distilled_cfg_scale = getattr(p, "distilled_cfg_scale", None)
            runner = copy.copy(scripts.scripts_img2img)
            runner.alwayson_scripts = []
            inner.scripts = runner
            inner.script_args = [None] * len(runner.inputs)
            made = processing.process_images(inner)
            getattr(p, _SEEN)["nested"] = [*made.extra_generation_params]

    def postprocess_batch(self, p, *args, **kwargs):
        """Reports."""
        asked, seen = getattr(p, _ASKED), getattr(p, _SEEN)
        self._remove(p)
        if not asked:
            return
        if p.iteration == p.n_iter - 1:
            getattr(p, _COUNT).remove()
        model = unet(p)
        modules = [module for each in (model, *encoders(p)) for module in each.modules()]
        seen["hooks"] = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
        seen["comments"] = [*p.comments]
        seen["sample_replaced"] = "sample" in vars(p)
        networks = sys.modules.get("networks")
        seen["networks"] = [net.name for net in getattr(networks, "loaded_networks", [])]
        if asked.get("hash"):
            seen["hash"] = [digest(model), digest(*encoders(p))]
        p.extra_generation_params["probe"] = json.dumps(seen)
        if asked.get("reload"):
            shared.state.request_restart()

    @staticmethod
    def _remove(p):
        while getattr(p, _HOOKS):
            getattr(p, _HOOKS).pop().remove()


def unet(p):
    """The module that is called for every noise level."""
    forge = getattr(p.sd_model, "forge_objects", None)
    return p.sd_model.model.diffusion_model if forge is None else forge.unet.model.diffusion_model


def encoders(p):
    """The text encoders."""
    forge = getattr(p.sd_model, "forge_objects", None)
    if forge is not None:
        return [forge.clip.cond_stage_model]
    return [getattr(p.sd_model, name) for name in ("cond_stage_model", "conditioner") if hasattr(p.sd_model, name)][:1]


def digest(*models):
    """A hash of every weight of a checkpoint, to the last bit."""
    total = hashlib.blake2b()
    for model in models:
        for name, tensor in sorted(model.state_dict().items()):
            if name != _MADE_UP:
                total.update(name.encode())
                total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


class Reference:
    """EST-LoRA once more, in the plainest way: every layer chooses anew at every call, and adds a dense matrix.

    Nothing of the extension takes part. Layers are found by the host's own table of names.
    """

    def __init__(self, p, model, subject, style, beta=0.5, alpha=1.5):
        networks = sys.modules["networks"]
        self.alpha, self.beta, self.model, self.pressure = alpha, beta, model, None
        files = [dense(networks.available_networks[name].filename) for name in (subject, style)]
        energies = {
            key: [float((file[key].double() ** 2).sum()) for file in files] for key in files[0].keys() & files[1].keys()
        }
        gamma = math.exp(sum(math.log(ours / theirs) for ours, theirs in energies.values()) / len(energies))
        self.layers = [
            (module, [file[key] for file in files], energies[key][0] / (gamma * energies[key][1]))
            for key, module in modules_by_key(p, networks, subject).items()
        ]
        assert len(self.layers) == len(energies), "the host's table doesn't know all layers of the file"

    def hang(self):
        """Returns the handles."""
        handles = [self.model.register_forward_pre_hook(self.tell, with_kwargs=True)]
        for module, changes, rho in self.layers:
            handles.append(module.register_forward_hook(self.hook(changes, rho)))
        return handles

    def tell(self, module, positional, named):
        """One noise level later."""
        t = float((positional[1] if len(positional) > 1 else named["timesteps"]).flatten()[0])
        self.pressure = self.alpha * min(max(1 - t / 999, 0), 1) + self.beta

    def hook(self, changes, rho):
        """One layer's."""

        def choose(module, positional, output):
            change = changes[0] if rho > self.pressure else changes[1]
            x = positional[0]
            return output + torch.nn.functional.linear(x, change.to(x.dtype)).to(output.dtype)

        return choose


def dense(path):
    """`dW` of each layer of a plain file in kohya's convention."""
    tensors = load_file(path)
    changes = {}
    for key in tensors:
        if key.endswith(".lora_up.weight"):
            name = key.removesuffix(".lora_up.weight")
            up, down = tensors[key].flatten(1), tensors[f"{name}.lora_down.weight"].flatten(1)
            changes[name] = up @ down * (float(tensors[f"{name}.alpha"]) / down.shape[0])
    return changes


def modules_by_key(p, networks, name):
    """The modules that the host would change for each layer of a file."""
    forge = getattr(p.sd_model, "forge_objects", None)
    if forge is None:
        found = networks.load_network(name, networks.available_networks[name])
        return {module.network_key.partition(".")[0]: module.sd_module for module in found.modules.values()}
    try:
        from backend.patcher.lora import model_lora_keys_unet
    except ImportError:
        from ldm_patched.modules.lora import model_lora_keys_unet

    keys = model_lora_keys_unet(forge.unet.model, {})
    wanted = dense(networks.available_networks[name].filename)
    return {key: forge.unet.model.get_submodule(keys[key].removesuffix(".weight")) for key in wanted}
