"""How the keys of a LoRA file end: which tensor of a layer each is, of what kind of layer, in whose convention."""

from __future__ import annotations

from typing import NamedTuple


class Ending(NamedTuple):
    """What a tensor is by the end of its key.

    Attributes:
        role: which of its layer's tensors; `est_lora.lora.kinds` builds a layer from tensors by their roles.
        kind: the kind of layer that has such a tensor; empty where layers of any kind may.
        convention: whose spelling it is; empty where several use it.
    """

    role: str
    kind: str = ""
    convention: str = ""


ALPHA = "alpha"
_HADAMARD = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
_KRONECKER = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")

# Read from the top: of two that fit, the upper one is meant.
_ENDINGS = {
    ".lora_down.weight": Ending("down", "lora", "kohya"),
    ".lora_up.weight": Ending("up", "lora", "kohya"),
    ".lora_A.weight": Ending("down", "lora", "peft"),
    ".lora_B.weight": Ending("up", "lora", "peft"),
    ".lora_A.default.weight": Ending("down", "lora", "peft"),
    ".lora_B.default.weight": Ending("up", "lora", "peft"),
    ".lora.down.weight": Ending("down", "lora", "diffusers"),
    ".lora.up.weight": Ending("up", "lora", "diffusers"),
    ".lora_linear_layer.down.weight": Ending("down", "lora", "diffusers"),
    ".lora_linear_layer.up.weight": Ending("up", "lora", "diffusers"),
    "_lora.down.weight": Ending("down", "lora", "diffusers-processor"),
    "_lora.up.weight": Ending("up", "lora", "diffusers-processor"),
    ".lora_mid.weight": Ending("lora_mid", "tucker"),
    **{f".hada_{name}": Ending(f"hada_{name}", "loha") for name in _HADAMARD},
    **{f".lokr_{name}": Ending(f"lokr_{name}", "lokr") for name in _KRONECKER},
    ".diff": Ending("diff", "full"),
    ".oft_blocks": Ending("oft_blocks", "oft"),
    ".on_input": Ending("on_input", "ia3"),
    **{f".{name}.weight": Ending(name, "glora") for name in ("a1", "a2", "b1", "b2")},
    # Kinds that are recognised and counted: what they mean differs between programs, or can't be added to an output.
    ".w_norm": Ending("w_norm", "norm"),
    ".b_norm": Ending("b_norm", "norm"),
    ".oft_diag": Ending("oft_diag", "old-oft"),
    ".oft_R.weight": Ending("oft_R", "peft-oft"),
    ".oft_R.default.weight": Ending("oft_R", "peft-oft"),
    ".ia3_l": Ending("ia3_l", "peft-ia3"),
    # What comes with tensors of a kind.
    ".alpha": Ending(ALPHA),
    ".dora_scale": Ending("dora_scale"),
    ".lora_magnitude_vector": Ending("lora_magnitude_vector"),
    ".lora_magnitude_vector.weight": Ending("lora_magnitude_vector"),
    ".lora_magnitude_vector.default.weight": Ending("lora_magnitude_vector"),
    ".lora_B.bias": Ending("lora_B.bias"),
    ".diff_b": Ending("diff_b"),
    ".rescale": Ending("rescale"),
    ".weight": Ending("weight"),
}


def split(key: str) -> tuple[str, Ending | None]:
    """A key as the name of its layer and what the tensor is there; None where no ending is known."""
    for text, ending in _ENDINGS.items():
        if key.endswith(text):
            return key.removesuffix(text), ending
    return key, None
