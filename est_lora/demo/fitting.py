"""The training loop: a loss, a learning rate, checkpoints."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from est_lora.demo.lessons import Batch

_MOST_WEIGHT = 6.0


def denoising_loss(pipe: StableDiffusionPipeline, batch: Batch, generator: torch.Generator) -> torch.Tensor:
    """Mean squared error of the predicted clean latents at random timesteps, a scalar.

    A picture's error counts `min(SNR + 1, 6)` times: what is predicted where little noise is left are the fine details,
    and without the limit (as in predicting `v`) they would be nearly all that counts.

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
    plain = sdpa_kernel(SDPBackend.MATH)  # on a CPU the other kinds of attention are slow in bfloat16
    with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)), plain:
        words = pipe.text_encoder(ids.to(device))[0]
        predicted = pipe.unet(pipe.scheduler.add_noise(clean, noise, t), t, encoder_hidden_states=words).sample
    errors = (predicted.float() - clean).square().mean((1, 2, 3))
    signal = pipe.scheduler.alphas_cumprod.to(device)[t]
    return (errors * (signal / (1 - signal) + 1).clamp(max=_MOST_WEIGHT)).mean()


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16: a CPU that only imitates it takes more than twice as long as in float32."""
    told = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return not told or any(has for name, has in told.items() if "bf16" in name)


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
        first: the number of the first step, which others than these came before.
        steps: the number at which it ends.
        lr: peak learning rate.
        ema: decay of the averaged weights, a step; lower in the beginning.
        seed: of timesteps and noise.
        workers: processes that draw pictures.
        save_every: steps between checkpoints.
        checkpoint: where they are written; a run goes on from it when it is there. The losses are written beside it.
    """

    first: int
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
        first = self.first
        if not has_bfloat16(pipe.unet.device):
            pipe.unet.to(memory_format=torch.channels_last)  # the faster one in float32
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, map_location=pipe.unet.device, weights_only=True)
            trained.load_state_dict(state["networks"])
            average.load_state_dict(state["average"])
            optimiser.load_state_dict(state["optimiser"])
            first = state["step"]
            export(average.module)  # it may have been interrupted in between

        steps = range(first, self.steps)
        batches = DataLoader(data, batch_size=None, sampler=steps, num_workers=self.workers)
        smooth: float | None = None
        with tqdm(batches, initial=first, total=self.steps, unit="step") as progress:
            for step, batch in zip(steps, progress, strict=True):
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate((step - self.first) / (self.steps - self.first), self.lr)
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
                    with self.checkpoint.with_suffix(".jsonl").open("a", encoding="utf-8") as log:
                        log.write(json.dumps({"step": step + 1, "loss": round(smooth, 5)}) + "\n")
