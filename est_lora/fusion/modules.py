"""A model's modules: their names without wrappers, their shapes, and their original weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from est_lora.lora import Shape, Weight, weight_shape

# What torch.compile and peft put before or into the names of a model that they wrap.
_WRAPPERS = ("_orig_mod.", "base_model.model.")
# A level of names that newer transformers have dropped.
_TEXT_MODEL = "text_model."
# What peft's layers keep whose merged weight is the original plus a difference.
_ADDED = {"lora_A", "hada_w1_a", "lokr_w1"}
# What a module carries while the merge engine has its weight.
TAKEN = "est_lora_merged"
_SIZES = ("in_features", "out_features", "in_channels", "out_channels", "kernel_size")


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` by the names they have where nothing wraps them."""
    named = {}
    for name, module in model.named_modules():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        named[name] = module
    return named


def find(modules: Mapping[str, nn.Module], name: str) -> nn.Module | None:
    """The module that a layer's name means, or None."""
    return modules.get(name) or modules.get(name.removeprefix(_TEXT_MODEL))


def unwrapped(module: nn.Module) -> nn.Module:
    """The layer itself, where a user's own peft adapter is wrapped around it."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def unhook(module: nn.Module, hook: object) -> None:
    """Takes a forward hook off a module, however often it hangs there."""
    hooks = module._forward_hooks
    for key in [key for key, each in hooks.items() if each is hook]:
        del hooks[key]


def module_shape(module: nn.Module) -> Shape:
    """(out, in) of a linear layer, (out, in, kh, kw) of a convolution with a kernel larger than 1 x 1; () of others.

    Read off what the module says of itself: a quantised weight has another shape than the matrix it stands for.
    """
    sizes: dict[str, Any] = {name: getattr(module, name, None) for name in _SIZES}
    if isinstance(sizes["in_features"], int):
        return (sizes["out_features"], sizes["in_features"])
    if isinstance(sizes["in_channels"], int) and sizes["kernel_size"]:
        return weight_shape(sizes["out_channels"], sizes["in_channels"], *sizes["kernel_size"])
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Linear" and isinstance(weight, Tensor):  # Forge's of GGUF and nf4 don't say
        shape = getattr(getattr(weight, "quant_state", None), "shape", weight.shape)
        return (int(shape[0]), int(shape[1])) if len(shape) == 2 else ()
    return ()


def original_weight(module: nn.Module) -> tuple[Weight, Shape] | None:
    """What reads the weight that a layer came with, and its shape; None where the weight can't be read.

    What a fusion or a user's own adapter has merged into the weight is taken out of what is read, not out of the model.
    """
    layer = unwrapped(module)
    weight, shape = getattr(layer, "weight", None), module_shape(layer)
    if not isinstance(weight, Tensor) or weight.is_meta or not weight.is_floating_point():
        return None
    if not shape or weight.dim() < 2 or weight_shape(*weight.shape) != shape:  # an embedding, or packed
        return None
    wrappers = []
    while module is not layer:
        wrappers.append(module)
        module = module.base_layer  # type: ignore[assignment]
    merged = [(each, adapter) for each in wrappers for adapter in getattr(each, "merged_adapters", ())]
    if not all(_is_added(wrapper, adapter) for wrapper, adapter in merged):
        return None

    def read() -> Tensor:
        taken = getattr(layer, TAKEN, None)
        own: Any = layer.weight if taken is None else taken.original
        for wrapper, adapter in merged:
            own = own - wrapper.get_delta_weight(adapter)  # type: ignore[operator]
        original: Tensor = own.detach()
        return original

    return read, shape


def _is_added(wrapper: nn.Module, adapter: str) -> bool:
    """Whether peft merged this adapter by adding a difference, which can be taken out again."""
    names = {*getattr(wrapper, "adapter_layer_names", ())}
    variants = {**getattr(wrapper, "use_dora", {}), **dict.fromkeys(getattr(wrapper, "lora_variant", {}), True)}
    return bool(names & _ADDED) and not variants.get(adapter)
