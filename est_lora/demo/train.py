"""Trains the demo's base model, and LoRAs for it.

    python -m est_lora.demo.train base -o first
    python -m est_lora.demo.train base --start first --pictures 979200 --lr 6e-4 -o second
    python -m est_lora.demo.train base --start second --pictures 1123200 --lr 4e-4 -o base
    python -m est_lora.demo.train lora "mipo creature" --base base -o mipo.safetensors
    python -m est_lora.demo.train lora "vitra style" --base base -o vitra.safetensors

The embedded weights were made by such commands, in a world that changed: during the first stretch of the base, objects were
a fifth smaller than they are now, and until the third, lines thinner. Every batch is drawn from the seed and its own number,
so a run that was interrupted goes on as if it hadn't been. `base --start FOLDER` goes on from finished weights instead, with
the pictures that come after those they have seen.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from est_lora.demo.fitting import Fit
from est_lora.demo.lessons import World, lesson
from est_lora.demo.model import load_pipeline, make_pipeline
from est_lora.demo.styles import NEW_STYLES
from est_lora.demo.things import SUBJECTS

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
_SEEN = "training.json"


@dataclass(frozen=True)
class Recipe:
    """How a LoRA is trained.

    Attributes:
        rank: of every layer.
        alpha: its updates are scaled by `alpha / rank`.
        lr: peak learning rate.
        steps: of the optimiser.
        batch: pictures in a batch; every fourth one is from the base's world.
        ema: decay of the averaged weights, a step.
        seed: of its pictures, their order and the noise.
    """

    rank: int = 8
    alpha: float = 8.0
    lr: float = 1e-3
    steps: int = 800
    batch: int = 16
    ema: float = 0.98
    seed: int = 0


def train_base(args: argparse.Namespace) -> None:
    """Trains the base model and writes it to the folder `args.output` in float16."""
    torch.manual_seed(args.seed)
    pipe = (load_pipeline(args.start) if args.start else make_pipeline()).to(args.device)
    seen = json.loads((args.start / _SEEN).read_text(encoding="utf-8"))["pictures"] if args.start else 0
    networks = nn.ModuleDict({"unet": pipe.unet, "text_encoder": pipe.text_encoder}).train()

    def export(average: nn.Module) -> None:
        result = make_pipeline()
        for name, network in (("unet", result.unet), ("text_encoder", result.text_encoder)):
            network.load_state_dict(average.get_submodule(name).state_dict())
            nn.Module.to(network, torch.float16)
        result.save_pretrained(args.output)
        # What transformers 5 writes here, older ones can't read, and its "auto" dtype would differ from the UNet's.
        edit_json(args.output / "model_index.json", tokenizer=["transformers", "PreTrainedTokenizerFast"])
        edit_json(args.output / "tokenizer" / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
        edit_json(args.output / "text_encoder" / "config.json", dtype="float32")
        told = {"pictures": args.pictures, "batch": args.batch, "seed": args.seed, "lr": args.lr}
        (args.output / _SEEN).write_text(json.dumps(told) + "\n", encoding="utf-8")

    fit = Fit(
        first=seen // args.batch,
        steps=args.pictures // args.batch,
        lr=args.lr,
        ema=args.ema,
        seed=args.seed,
        workers=args.workers,
        save_every=args.save_every,
        checkpoint=_checkpoint(args.output),
    )
    fit.run(pipe, networks, World(args.seed, args.batch), export)


def edit_json(path: Path, **values: object) -> None:
    """Sets values of a JSON file's object."""
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **values}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def train_lora(
    words: str,
    recipe: Recipe,
    output: Path,
    base: Path | None = None,
    device: str = "cpu",
    workers: int = 0,
    save_every: int = 400,
) -> None:
    """Trains a LoRA on the UNet's attention projections and writes it as kohya's scripts do.

    Args:
        words: what it teaches, as `lesson` takes it.
        recipe: how.
        output: the `.safetensors` file.
        base: the base model's folder; None for the embedded one.
        device: where.
        workers: processes that draw pictures.
        save_every: steps between checkpoints.
    """
    torch.manual_seed(recipe.seed)
    pipe = load_pipeline(base).to(device)
    pipe.unet.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    pipe.unet.add_adapter(LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=ATTENTION))
    names = [name for name, p in pipe.unet.named_parameters() if p.requires_grad]
    factors = nn.ParameterList([pipe.unet.get_parameter(name) for name in names])

    def export(average: nn.Module) -> None:
        save_kohya(pipe.unet, dict(zip(names, average.parameters(), strict=True)), recipe, output)

    fit = Fit(
        first=0,
        steps=recipe.steps,
        lr=recipe.lr,
        ema=recipe.ema,
        seed=recipe.seed,
        workers=workers,
        save_every=save_every,
        checkpoint=_checkpoint(output),
    )
    fit.run(pipe, factors, lesson(words, recipe.seed, recipe.batch), export)


def save_kohya(unet: UNet2DConditionModel, factors: dict[str, torch.Tensor], recipe: Recipe, output: Path) -> None:
    """Writes LoRA factors under kohya's names in float16.

    Args:
        unet: the adapted UNet.
        factors: its LoRA parameters by PEFT's names.
        recipe: `rank` and `alpha` are used.
        output: the file.
    """
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, factor in get_peft_model_state_dict(unet, state_dict=factors).items():
        layer, side, _ = name.rsplit(".", 2)
        layers.setdefault(layer, {})[side] = factor.detach().to("cpu", torch.float32)

    tensors: dict[str, torch.Tensor] = {}
    for layer, sides in layers.items():
        name = "lora_unet_" + layer.replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = sides["lora_A"].half().contiguous()
        tensors[f"{name}.lora_up.weight"] = sides["lora_B"].half().contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(recipe.alpha).half()
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(recipe.rank),
        "ss_network_alpha": str(recipe.alpha),
        "ss_output_name": output.stem,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output, metadata)


def _checkpoint(output: Path) -> Path:
    """Where a run keeps what it needs to go on: beside its result."""
    output.parent.mkdir(parents=True, exist_ok=True)
    return output.with_name(output.name + ".checkpoint.pt")


def _lora(args: argparse.Namespace) -> None:
    recipe = Recipe(args.rank, args.alpha, args.lr, args.steps, args.batch, args.ema, args.seed)
    train_lora(args.words, recipe, args.output, args.base, args.device, args.workers, args.save_every)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m est_lora.demo.train", description="Trains the demo's models.")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-o", "--output", type=Path, required=True, help="where the result is written")
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    common.add_argument("--workers", type=int, default=1, help="processes that draw pictures")
    common.add_argument("--save-every", type=int, default=400, metavar="STEPS", help="steps between checkpoints")
    kinds = result.add_subparsers(required=True, metavar="base|lora")

    base = kinds.add_parser("base", parents=[common], help="the base model, a folder in diffusers' format")
    base.add_argument("--start", type=Path, metavar="FOLDER", help="finished weights to go on from")
    base.add_argument("--pictures", type=int, default=528_000, help="how many pictures it will have seen in the end")
    base.add_argument("--batch", type=int, default=48)
    base.add_argument("--lr", type=float, default=7e-4, help="peak learning rate")
    base.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights, a step")
    base.set_defaults(run=train_base)

    usual = Recipe()
    lora = kinds.add_parser("lora", parents=[common], help="a LoRA, one file as kohya's scripts write it")
    lora.add_argument("words", choices=[*SUBJECTS, *NEW_STYLES], metavar="WORDS", help="what it teaches: %(choices)s")
    lora.add_argument("--base", type=Path, help="the base model's folder; the embedded one if not given")
    lora.add_argument("--steps", type=int, default=usual.steps)
    lora.add_argument("--batch", type=int, default=usual.batch)
    lora.add_argument("--rank", type=int, default=usual.rank)
    lora.add_argument("--alpha", type=float, default=usual.alpha)
    lora.add_argument("--lr", type=float, default=usual.lr, help="peak learning rate")
    lora.add_argument("--ema", type=float, default=usual.ema, help="decay of the averaged weights, a step")
    lora.set_defaults(run=_lora)
    return result


def main(argv: list[str] | None = None) -> int:
    """Runs the command line."""
    args = parser().parse_args(argv)
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
