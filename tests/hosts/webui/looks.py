"""What tests look at: what a picture should have been made with, and whether a model is as it was."""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from torch.func import functional_call

from est_lora.fusion.branch import BranchLayer
from est_lora.fusion.merge import merged_into
from tests.hosts.webui.host import WebUI, pristine
from tests.hosts.webui.loras import INK, KNIGHT, Loras
from tests.hosts.webui.networks import clip_changes, tokens_of, unet_changes
from tests.reference import decisions

PANEL = {"enabled": True, "subject": KNIGHT, "style": INK}
TOLERANCE = 1e-4


class Bystander:
    """The model as it was before a picture, and what it then should have returned."""

    def __init__(self, web: WebUI, loras: Loras) -> None:
        self._loras = loras
        self._unet, self._encoders = pristine(web)

    def off_by(self, call, subject: str = KNIGHT, style: str = INK, tau: float | None = None, **knobs) -> float:
        """How far a call of the UNet is from weights merged by hand, relative to what it returned."""
        wanted = self.unet(call, self.changes(1 - call.timestep / 999 if tau is None else tau, subject, style, **knobs))
        return float((call.out - wanted).norm() / wanted.norm())

    def plain_off_by(self, call) -> float:
        wanted = self.unet(call, {})
        return float((call.out - wanted).norm() / wanted.norm())

    def unet(self, call, changes):
        with torch.no_grad():
            return functional_call(self._unet, unet_changes(self._unet, changes), call.args, call.kwargs)

    def changes(self, tau, subject=KNIGHT, style=INK, **knobs):
        """What each layer's weight changes by at `tau`."""
        ours = {"subject_weight": 1.0, "style_weight": 1.0} | knobs
        strengths = {"subject": ours.pop("subject_weight"), "style": ours.pop("style_weight")}
        files = {"subject": self._loras.unet[subject], "style": self._loras.unet[style]}
        changes = {}
        for name, (_, (acts,)) in decisions(files["subject"], files["style"], ours, [tau]).items():
            assert acts != "?"
            for who in ("subject", "style") if acts == "both" else (acts,):
                if who in files and name in files[who]:
                    changes[name] = changes.get(name, 0) + files[who][name].dense * strengths[who]
        return changes

    def encoded(self, prompts, subject=KNIGHT, style=INK, subject_te=1.0, style_te=1.0):
        """Prompts encoded with both files' parts."""
        parts = []
        for part, encoder in self._encoders.items():
            changes = {}
            for file, strength in ((subject, subject_te), (style, style_te)):
                for name, factors in self._loras.text[file].get(part, {}).items():
                    changes[name] = changes.get(name, 0) + factors.dense * strength
            with torch.no_grad():
                parts.append(functional_call(encoder, clip_changes(encoder, changes), (tokens_of(prompts),)))
        return torch.cat(parts, -1)

    def plainly_encoded(self, prompts):
        return self.encoded(prompts, subject_te=0.0, style_te=0.0)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).norm() / other.norm()) < TOLERANCE


def models(web: WebUI) -> list[nn.Module]:
    return [web.unet, *web.encoders.values()]


def state_hash(web: WebUI) -> str:
    digest = hashlib.sha256()
    for model in models(web):
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def hooks(web: WebUI) -> int:
    """Hooks on the model, whosever."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for model in models(web) for m in model.modules())


def our_layers(model: nn.Module) -> int:
    """How many layers of it a fusion has, by a hook or by their weight."""
    by_hook = sum(isinstance(hook, BranchLayer) for m in model.modules() for hook in m._forward_hooks.values())
    return by_hook + sum(merged_into(module) is not None for module in model.modules())
