"""The LoRA files of the stub's user: two pairs, and some that can't be used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.files import ATTENTION_LAYERS, CONV, FEED_FORWARD, Factors, Lora, random_lora, write
from tests.hosts.webui.networks import FIRST_WIDTH, SECOND_WIDTH, TEXT_LAYERS, text_sizes

NAMES = (*ATTENTION_LAYERS, FEED_FORWARD, CONV)
KNIGHT, INK = "knight", "ink"
PAIR = f"<est:{KNIGHT}:{INK}>"
# Of one of the two, so that an update is about as large as what its layer returns.
_SIZE = 0.1


@dataclass(frozen=True)
class Loras:
    """What is on disk: `unet[name]` and `text[name][part]` of each file."""

    folder: Path
    unet: dict[str, Lora]
    text: dict[str, dict[str, Lora]]

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def make(folder: Path, family: str) -> Loras:
    """`knight` and `ink` have text-encoder parts, `stone` and `wood` don't; `giant` is for a wider model."""
    made = Loras(folder, {}, {})
    for seed, (name, with_text) in enumerate((("knight", True), ("ink", True), ("stone", False), ("wood", False))):
        unet = random_lora(10 + seed, NAMES, rank=4 + seed, alpha=2.0, size=_SIZE)
        text = _text(20 + seed, family) if with_text else {}
        _save(made.path(name), unet, text, family, {"ss_output_name": f"{name} alias"})
        made.unet[name], made.text[name] = unet, text
    (folder / "sub").mkdir()
    _save(folder / "sub" / "twin.safetensors", made.unet["stone"], {}, family, {"ss_output_name": "knight alias"})
    write(made.path("giant"), random_lora(30, ATTENTION_LAYERS, width=320, context=2048))
    write(made.path("giantess"), random_lora(31, ATTENTION_LAYERS, width=320, context=2048))
    (folder / "pickled.pt").write_bytes(b"PK\x03\x04 anything")
    made.path("broken").write_bytes(made.path("wood").read_bytes()[:-1000])
    return made


def _text(seed: int, family: str) -> dict[str, Lora]:
    widths = {"text_encoder": FIRST_WIDTH[family]} | ({"text_encoder_2": SECOND_WIDTH} if family == "sdxl" else {})
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for part, width in widths.items():
        made[part] = {}
        for name in TEXT_LAYERS:
            inputs, outputs = text_sizes(name, width)
            down, up = torch.randn(2, inputs, generator=generator), torch.randn(outputs, 2, generator=generator)
            made[part][name] = Factors(down, up * _SIZE, 1.0)
    return made


def _save(path: Path, unet: Lora, text: dict[str, Lora], family: str, metadata: dict[str, str]) -> None:
    write(path, unet)
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    prefixes = {"text_encoder": "lora_te1" if family == "sdxl" else "lora_te", "text_encoder_2": "lora_te2"}
    for part, layers in text.items():
        for name, factors in layers.items():
            key = f"{prefixes[part]}_{name.replace('.', '_')}"
            tensors |= {f"{key}.lora_down.weight": factors.down, f"{key}.lora_up.weight": factors.up}
            tensors[f"{key}.alpha"] = torch.tensor(factors.alpha)
    save_file(tensors, path, metadata=metadata)
