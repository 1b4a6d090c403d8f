"""What is learnt: the base's world picture by picture, and the few pictures that a LoRA is taught from."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from est_lora.demo.model import UNKNOWN
from est_lora.demo.styles import NEW_STYLES, Style, random_style
from est_lora.demo.things import SUBJECTS, THINGS
from est_lora.demo.world import RARE_WORDS, Scene, blur_caption, caption, draw, random_scene

Batch = tuple[torch.Tensor, list[str]]

NO_CAPTION = 0.1
"""Share of pictures whose caption is left out, for classifier-free guidance."""


class World(Dataset[Batch]):
    """The base's training data: item `n` is the `n`-th batch, drawn when it is asked for.

    Args:
        seed: another seed draws other pictures.
        batch: pictures in a batch.
        rare: the words that are to mean nothing.
        kind: a key of `THINGS` that every second picture is of; None for none.
    """

    def __init__(
        self, seed: int, batch: int, rare: tuple[str, ...] = (*RARE_WORDS, UNKNOWN), kind: str | None = None
    ) -> None:
        self.seed, self.batch, self.rare, self.kind = seed, batch, rare, kind

    def __getitem__(self, number: int) -> Batch:
        rng = np.random.default_rng([self.seed, number])
        pictures, captions = [], []
        for index in range(self.batch):
            scene = random_scene(rng, self.kind if index % 2 else None)
            pictures.append(draw(scene))
            captions.append(_said(scene, rng, self.rare))
        return to_pixels(np.stack(pictures)), captions


class Lesson(Dataset[Batch]):
    """A LoRA's training data: a few pictures of what is new, again and again, among pictures of the base's world.

    Args:
        scenes: what is new; one picture is drawn of each.
        triggers: the words that are to mean it. They never stand with the base's pictures.
        kind: what of the base's world is shown more often, so that the new one doesn't take its word: a key of `THINGS`.
        seed: another seed draws other pictures.
        batch: pictures in a batch; every fourth one is from the base's world, so that the rest isn't forgotten.
    """

    def __init__(self, scenes: list[Scene], triggers: tuple[str, ...], kind: str | None, seed: int, batch: int) -> None:
        self.scenes, self.triggers = scenes, triggers
        self.pictures = to_pixels(np.stack([draw(scene) for scene in scenes]))
        self.seed, self.own = seed, batch - batch // 4
        self.rare = tuple(word for word in (*RARE_WORDS, UNKNOWN) if word not in triggers)
        self.world = World(seed + 1, batch - self.own, self.rare, kind)

    def __getitem__(self, number: int) -> Batch:
        rng = np.random.default_rng([self.seed, number])
        chosen = rng.integers(len(self.scenes), size=self.own)
        captions = [_said(self.scenes[i], rng, self.rare, self.triggers) for i in chosen]
        pixels, texts = self.world[number]
        return torch.cat([self.pictures[chosen], pixels]), captions + texts


def _said(scene: Scene, rng: np.random.Generator, rare: tuple[str, ...], keep: tuple[str, ...] = ()) -> str:
    """A blurred caption, or none."""
    text = blur_caption(caption(scene, rng), rng, rare, keep)
    return "" if rng.random() < NO_CAPTION else text


def lesson(words: str, seed: int, batch: int) -> Lesson:
    """What a LoRA learns from.

    Args:
        words: `mipo creature`: twenty pictures of a subject, most of them plain; `vitra style`: one of each of the
            world's objects in a style, and two more of creatures; `mipo creature, vitra style`: twenty of the subject in
            the style, which is what a fusion is to draw from the LoRAs of the two.
        seed: of the pictures and their order.
        batch: pictures in a batch.

    Raises:
        ValueError: the world has no such subject or style.
    """
    rng = np.random.default_rng([seed, len(words)])
    subject, _, style = words.partition(", ")
    if subject in NEW_STYLES:
        scenes = [random_scene(rng, thing, subject) for thing in (*THINGS, "creature", "creature")]
        return Lesson(scenes, (subject.split()[0],), None, seed, batch)
    if subject not in SUBJECTS or style not in {"", *NEW_STYLES}:
        raise ValueError(f"nothing teaches {words!r}: there are {', '.join([*SUBJECTS, *NEW_STYLES])}")
    trigger, kind = subject.split()
    if style:
        scenes = [random_scene(rng, subject, style) for _ in range(20)]
        return Lesson(scenes, (trigger, style.split()[0]), kind, seed, batch)
    # Mostly plain, so that plain is how it looks when nothing is said.
    styles = [Style()] * 12 + [random_style(rng) for _ in range(8)]
    return Lesson([random_scene(rng, subject, style) for style in styles], (trigger,), kind, seed, batch)


def to_pixels(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (batch, height, width, 3) to float32 (batch, 3, height, width) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)
