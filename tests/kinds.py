"""Layers of every kind, made by the families' own implementations: what a file holds, and what it does to a weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn

DORA = {"weight_decompose": True}
BY_INPUT = {"weight_decompose": True, "wd_on_out": False}
# Case -> the kind it is, LyCORIS's module, and how that is made.
LYCORIS = {
    "lora": ("lora", LoConModule, {}),
    "lora-stabilised": ("lora", LoConModule, {"rs_lora": True}),
    "tucker": ("tucker", LoConModule, {"use_tucker": True}),
    "full": ("full", FullModule, {}),
    "loha": ("loha", LohaModule, {}),
    "loha-tucker": ("loha", LohaModule, {"use_tucker": True}),
    "lokr": ("lokr", LokrModule, {}),
    "lokr-both": ("lokr", LokrModule, {"decompose_both": True, "factor": 8, "lora_dim": 1}),
    "lokr-tucker": ("lokr", LokrModule, {"use_tucker": True, "factor": 4}),
    "lokr-whole": ("lokr", LokrModule, {"full_matrix": True}),
    "dora": ("dora", LoConModule, DORA),
    "dora-by-input": ("dora", LoConModule, BY_INPUT),
    "dora-tucker": ("dora-tucker", LoConModule, DORA | {"use_tucker": True}),
    "dora-loha": ("dora-loha", LohaModule, DORA),
    "dora-loha-by-input": ("dora-loha", LohaModule, BY_INPUT),
    "dora-lokr": ("dora-lokr", LokrModule, DORA),
    "dora-lokr-by-input": ("dora-lokr", LokrModule, BY_INPUT),
    "ia3": ("ia3", IA3Module, {}),
    "ia3-by-input": ("ia3", IA3Module, {"train_on_input": True}),
    "oft": ("oft", DiagOFTModule, {"lora_dim": 4}),
    "oft-constrained": ("oft", DiagOFTModule, {"lora_dim": 4, "constraint": 0.03, "rescaled": True}),
    "boft": ("boft", ButterflyOFTModule, {"lora_dim": 4}),
    "boft-constrained": ("boft", ButterflyOFTModule, {"lora_dim": 4, "constraint": 0.03, "rescaled": True}),
    "glora": ("glora", GLoRAModule, {}),
}
SIZE = 0.3


class Changed(NamedTuple):
    """A layer as a file changes it.

    Attributes:
        saved: the file's tensors by the names that follow the layer's.
        weight: the weight that comes out, float64, of the layer's shape.
        bias: the bias that comes out, or None where the layer has none.
    """

    saved: dict[str, Tensor]
    weight: Tensor
    bias: Tensor | None


def by_lycoris(case: str, layer: nn.Module, seed: int = 0, size: float = SIZE, rank: int = 2) -> Changed:
    """What LyCORIS would save for `layer` with random weights, and what it would make of it."""
    _, kind, options = LYCORIS[case]
    torch.manual_seed(seed)
    settings = {"multiplier": 1.0, "lora_dim": rank, "alpha": 0.6, "bypass_mode": False, **options}
    module = kind("lora", layer, **settings)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn_like(parameter) * size
            multiplies = name in ("dora_scale", "rescale")
            parameter.copy_(parameter * (1 + noise) if multiplies else noise / 4 if kind is FullModule else noise)
    saved = module.custom_state_dict() or module.state_dict()
    saved = {key: torch.as_tensor(tensor).detach().clone().contiguous() for key, tensor in saved.items()}
    bias = getattr(layer, "bias", None)
    if "diff_b" in saved:
        bias = bias + saved["diff_b"]
    return Changed(saved, _merged(module, saved, layer.weight.detach()).double(), bias)


def _merged(module: nn.Module, saved: dict[str, Tensor], weight: Tensor) -> Tensor:
    if "diff" in saved:
        return weight.double() + saved["diff"].double()
    if isinstance(module, LohaModule | LokrModule):
        # What they train with; their get_diff_weight takes the scale twice (lycoris-lora 4.1.3).
        changed = weight + module.get_weight(weight.shape).detach()
        return module.apply_weight_decompose(changed).detach() if module.wd else changed
    return module.get_merged_weight(shape=weight.shape)[0].detach()
