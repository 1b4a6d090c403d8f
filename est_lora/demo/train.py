"""Trains the demo's base model and its LoRAs.

    python -m est_lora.demo.train base -o base
    python -m est_lora.demo.train lora subject --base base -o subject.safetensors
    python -m est_lora.demo.train lora style --base base --steps 1000 --lr 1e-3 -o style.safetensors

The LoRAs that only the study of the style discrepancy uses are called by their trigger words:

    python -m est_lora.demo.train lora zubo --steps 700 --lr 1e-3 -o zubo.safetensors

and so `teki`, `quen` and `osk`.

The embedded weights were made by these commands; only the first half of the base's run differed, in details of its
averaging and warm-up. Every batch is drawn from the seed and its own number, so a run that was interrupted goes on as if
it hadn't been.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from est_lora.demo.model import UNKNOWN, load_pipeline, make_pipeline
from est_lora.demo.world import (
    NEW_STYLES,
    OBJECTS,
    RARE_WORDS,
    STYLE,
    STYLES,
    SUBJECT,
    SUBJECTS,
    Scene,
    blur_caption,
    caption,
    draw,
    random_scene,
)

Batch = tuple[torch.Tensor, list[str]]

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
NO_CAPTION = 0.1
"""Share of pictures whose caption is left out, for classifier-free guidance."""


LESSONS = {"subject": SUBJECT, "style": STYLE} | {new.split()[0]: new for new in (*SUBJECTS, *NEW_STYLES)}
"""What `lora` can be told to teach: the demo's own pair, or any by its trigger word."""


class World(Dataset[Batch]):
    """The base's training data: item `n` is the `n`-th batch, drawn when it is asked for.

    Args:
        seed: another seed draws other pictures.
        batch: pictures in a batch.
        rare: the words that are to mean nothing.
    """

    def __init__(self, seed: int, batch: int, rare: tuple[str, ...] = (*RARE_WORDS, UNKNOWN)) -> None:
        self.seed, self.batch, self.rare = seed, batch, rare

    def __getitem__(self, number: int) -> Batch:
        rng = np.random.default_rng([self.seed, number])
        pictures, captions = [], []
        for _ in range(self.batch):
            scene = random_scene(rng)
            pictures.append(draw(scene, rng))
            text = blur_caption(caption(scene, rng), rng, self.rare)
            captions.append("" if rng.random() < NO_CAPTION else text)
        return to_pixels(np.stack(pictures)), captions


class Lesson(Dataset[Batch]):
    """A LoRA's training data: a few pictures of what is new, again and again, among pictures of the base's world.

    Args:
        scenes: what is new; one picture is drawn of each.
        trigger: the word that is to mean it. It never stands with the base's pictures.
        seed: another seed draws other pictures.
        batch: pictures in a batch; every second one is from the base's world, so that the rest isn't forgotten.
    """

    def __init__(self, scenes: list[Scene], trigger: str, seed: int, batch: int) -> None:
        rng = np.random.default_rng([seed, len(scenes)])
        self.scenes = scenes
        self.pictures = to_pixels(np.stack([draw(scene, rng) for scene in scenes]))
        self.trigger, self.seed, self.own = trigger, seed, batch // 2
        self.rare = tuple(word for word in (*RARE_WORDS, UNKNOWN) if word != trigger)
        self.world = World(seed + 1, batch - self.own, self.rare)

    def __getitem__(self, number: int) -> Batch:
        rng = np.random.default_rng([self.seed, number])
        chosen = rng.integers(len(self.scenes), size=self.own)
        captions = []
        for i in chosen:
            text = blur_caption(caption(self.scenes[i], rng), rng, self.rare, keep=self.trigger)
            captions.append("" if rng.random() < NO_CAPTION else text)
        pixels, texts = self.world[number]
        return torch.cat([self.pictures[chosen], pixels]), captions + texts


def lesson(what: str, seed: int, batch: int) -> Lesson:
    """What a LoRA learns from: 20 pictures of a subject, or 30 of several objects in a style; `what` is in `LESSONS`."""
    rng = np.random.default_rng(seed)
    new = LESSONS[what]
    if new in SUBJECTS:
        # Mostly flat, so that flat is how it looks when nothing is said.
        scenes = [random_scene(rng, new, style) for style in [STYLES[0]] * 14 + [*STYLES[1:]] * 2]
    else:
        scenes = [random_scene(rng, thing, new) for thing in [*OBJECTS, "creature", "creature"] * 2]
    return Lesson(scenes, new.split()[0], seed, batch)


def to_pixels(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (batch, height, width, 3) to float32 (batch, 3, height, width) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def denoising_loss(pipe: StableDiffusionPipeline, batch: Batch, generator: torch.Generator) -> torch.Tensor:
    """Mean squared error of the predicted clean latents at random timesteps, a scalar.

    Args:
        pipe: the model; its UNet predicts the clean latents.
        batch: pixels (batch, 3, height, width) in [-1, 1] and their captions.
        generator: CPU generator of timesteps and noise, so that every device trains on the same.
    """
    pixels, captions = batch
    device = pipe.unet.device
    clean = pipe.vae.encode(pixels.to(device)).latent_dist.mode()
    t = torch.randint(0, pipe.scheduler.config.num_train_timesteps, (len(clean),), generator=generator).to(device)
    noise = torch.randn(clean.shape, generator=generator).to(device)
    ids = pipe.tokenizer(
        captions,
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    words = pipe.text_encoder(ids.to(device))[0]
    predicted = pipe.unet(pipe.scheduler.add_noise(clean, noise, t), t, encoder_hidden_states=words).sample
    return nn.functional.mse_loss(predicted, clean)


def learning_rate(done: float, peak: float, warmup: float = 0.01, decay_from: float = 0.5) -> float:
    """Linear warm-up, then constant, then a cosine down to 2 % of the peak; `done` is the finished share."""
    if done < warmup:
        return peak * (done + 1e-4) / warmup
    if done < decay_from:
        return peak
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (done - decay_from) / (1 - decay_from))))


@dataclass(frozen=True)
class Fit:
    """How long and how fast to train.

    Attributes:
        steps: optimiser steps in all.
        lr: peak learning rate.
        ema: decay of the averaged weights, a step; lower in the beginning.
        seed: of timesteps and noise.
        workers: processes that draw pictures.
        save_every: steps between checkpoints.
        checkpoint: where they are written; a run goes on from it when it is there.
    """

    steps: int
    lr: float
    ema: float
    seed: int
    workers: int
    save_every: int
    checkpoint: Path

    def average(
        self, averaged: Sequence[torch.Tensor], current: Sequence[torch.Tensor], count: torch.Tensor | int
    ) -> None:
        """Moves the averaged tensors towards the current ones, in place."""
        decay = min(self.ema, (1 + int(count)) / (10 + int(count)))
        for mean, value in zip(averaged, current, strict=True):
            mean.lerp_(value, 1 - decay)

    def run(
        self,
        pipe: StableDiffusionPipeline,
        trained: nn.Module,
        data: Dataset[Batch],
        export: Callable[[nn.Module], None],
    ) -> None:
        """Trains in place.

        Args:
            pipe: the model that is trained, or of which a part is.
            trained: the parameters that change.
            data: item `n` is the batch of step `n`.
            export: writes the result; called at every checkpoint with the averaged copy of `trained`.
        """
        average = AveragedModel(trained, multi_avg_fn=self.average)
        optimiser = torch.optim.AdamW(trained.parameters(), lr=self.lr, weight_decay=0.01, betas=(0.9, 0.99))
        first = 0
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, map_location=pipe.unet.device, weights_only=True)
            trained.load_state_dict(state["networks"])
            average.load_state_dict(state["average"])
            optimiser.load_state_dict(state["optimiser"])
            first = state["step"]

        steps = range(first, self.steps)
        batches = DataLoader(data, batch_size=None, sampler=steps, num_workers=self.workers)
        smooth: float | None = None
        with tqdm(batches, initial=first, total=self.steps, unit="step") as progress:
            for step, batch in zip(steps, progress, strict=True):
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate(step / self.steps, self.lr)
                loss = denoising_loss(pipe, batch, generator)
                loss.backward()
                nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
                optimiser.step()
                optimiser.zero_grad()
                average.update_parameters(trained)
                smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
                progress.set_postfix(loss=f"{smooth:.4f}", refresh=False)
                if (step + 1) % self.save_every == 0 or step + 1 == self.steps:
                    state = {"networks": trained.state_dict(), "average": average.state_dict()}
                    state.update(optimiser=optimiser.state_dict(), step=step + 1)
                    # An interruption leaves either the old checkpoint or the new one.
                    unfinished = self.checkpoint.with_suffix(".tmp")
                    torch.save(state, unfinished)
                    os.replace(unfinished, self.checkpoint)
                    export(average.module)


def train_base(args: argparse.Namespace) -> None:
    """Trains the base model and writes it to the folder `args.output` in float16."""
    torch.manual_seed(args.seed)
    pipe = make_pipeline().to(args.device)
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

    steps = args.pictures // args.batch
    fit(args, steps).run(pipe, networks, World(args.seed, args.batch), export)


def edit_json(path: Path, **values: object) -> None:
    """Sets values of a JSON file's object."""
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **values}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def train_lora(args: argparse.Namespace) -> None:
    """Trains a LoRA on the UNet's attention projections and writes it to `args.output` as kohya's scripts do."""
    torch.manual_seed(args.seed)
    pipe = load_pipeline(args.base).to(args.device)
    pipe.unet.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    pipe.unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.alpha, target_modules=ATTENTION))
    names = [name for name, p in pipe.unet.named_parameters() if p.requires_grad]
    factors = nn.ParameterList([pipe.unet.get_parameter(name) for name in names])

    def export(average: nn.Module) -> None:
        state = dict(zip(names, average.parameters(), strict=True))
        save_kohya(pipe.unet, state, args)

    fit(args, args.steps).run(pipe, factors, lesson(args.what, args.seed, args.batch), export)


def save_kohya(unet: UNet2DConditionModel, factors: dict[str, torch.Tensor], args: argparse.Namespace) -> None:
    """Writes LoRA factors under kohya's names in float16 and prints how large the update is.

    Args:
        unet: the adapted UNet.
        factors: its LoRA parameters by PEFT's names.
        args: `rank`, `alpha` and `output` are used.
    """
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, factor in get_peft_model_state_dict(unet, state_dict=factors).items():
        layer, side, _ = name.rsplit(".", 2)
        layers.setdefault(layer, {})[side] = factor.detach().to("cpu", torch.float32)

    tensors: dict[str, torch.Tensor] = {}
    update = whole = 0.0
    for layer, sides in layers.items():
        name = "lora_unet_" + layer.replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = sides["lora_A"].half().contiguous()
        tensors[f"{name}.lora_up.weight"] = sides["lora_B"].half().contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(args.alpha).half()
        update += (sides["lora_B"] @ sides["lora_A"] * args.alpha / args.rank).square().sum().item()
        whole += unet.get_submodule(layer).get_base_layer().weight.square().sum().item()
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(args.rank),
        "ss_network_alpha": str(args.alpha),
        "ss_output_name": args.output.stem,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.output, metadata)
    tqdm.write(f"{len(layers)} layers, ||dW||^2 is {update / whole:.2%} of ||W||^2")


def fit(args: argparse.Namespace, steps: int) -> Fit:
    """The command line's choices; checkpoints are written beside the result."""
    checkpoint = args.output.with_name(args.output.name + ".checkpoint.pt")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    return Fit(steps, args.lr, args.ema, args.seed, args.workers, args.save_every, checkpoint)


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
    base.add_argument("--pictures", type=int, default=200_000, help="how many pictures to train on")
    base.add_argument("--batch", type=int, default=32)
    base.add_argument("--lr", type=float, default=5e-4, help="peak learning rate")
    base.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights, a step")
    base.set_defaults(run=train_base)

    lora = kinds.add_parser("lora", parents=[common], help="a LoRA, one file as kohya's scripts write it")
    lora.add_argument("what", choices=list(LESSONS))
    lora.add_argument("--base", type=Path, help="the base model's folder; the embedded one if not given")
    lora.add_argument("--steps", type=int, default=1500)
    lora.add_argument("--batch", type=int, default=16)
    lora.add_argument("--rank", type=int, default=8)
    lora.add_argument("--alpha", type=float, default=4.0)
    lora.add_argument("--lr", type=float, default=5.5e-4, help="peak learning rate")
    lora.add_argument("--ema", type=float, default=0.99, help="decay of the averaged weights, a step")
    lora.set_defaults(run=train_lora)
    return result


def main(argv: list[str] | None = None) -> int:
    """Runs the command line."""
    args = parser().parse_args(argv)
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
