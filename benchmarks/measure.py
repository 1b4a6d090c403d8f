"""Time in pairs, and the peak of the memory in use."""

from __future__ import annotations

import copy
import ctypes
import gc
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor, nn

from benchmarks.published import PublishedSession, energy, largest_entries
from benchmarks.unets import inputs
from est_lora.config import FusionConfig
from est_lora.fusion import FusionSession
from est_lora.gate import FusionPlan
from est_lora.lora import LoraFile

BARE, READING, LOADING = "no LoRA", "reading both files", "LoraFile.load of both"
PLANS = {
    "FusionPlan.of, balance=energy": FusionConfig(),
    "FusionPlan.of, balance=l1": FusionConfig(balance="l1"),
    "FusionPlan.of, method=k-lora": FusionConfig(method="k-lora"),
}
# What a way to apply two LoRAs is called, what is asked of the plan, and what carries it out.
WAYS: dict[str, tuple[FusionConfig, Callable[[nn.Module, FusionPlan], Any]]] = {
    "est-lora, branch engine": (FusionConfig(), FusionSession),
    "EST-LoRA as published": (FusionConfig(balance="l1"), lambda model, plan: PublishedSession(model, plan, energy)),
    "K-LoRA as published": (
        FusionConfig(balance="l1"),
        lambda model, plan: PublishedSession(model, plan, largest_entries),
    ),
}
# Two bare calls, and two with each way, at tau = 0 and 1, to see the memory it takes.
UNTIMED_CALLS = 2 + 2 * len(WAYS)
TIMED_CALLS = 1 + len(WAYS)
_DENSE_EVERY = 4

Paths = Sequence[Path]
Row = dict[str, Any]


class Variant:
    """A UNet that is called with one way of applying LoRAs, or with none."""

    def __init__(self, model: nn.Module, given: Mapping[str, Any], session: Any = None) -> None:
        """`session`, if any, belongs to `model`; `given` is what a call takes but for the timestep."""
        self._model = model
        self._given = given
        self._session = session

    def __call__(self, tau: float) -> Tensor:
        """One call at progress `tau`; what it costs to tell the session is part of it."""
        if self._session is not None:
            self._session.at(tau)
        output: Tensor = self._model(timestep=999.0 * (1.0 - tau), **self._given, return_dict=False)[0]
        return output


@torch.no_grad()
def measure_calls(
    model: UNet2DConditionModel, paths: Paths, latents: int, batch: int, rounds: int, tick: Callable[[], Any]
) -> list[Row]:
    """Times calls of `model` without LoRA and with those of two files, applied in each of `WAYS`.

    A round is one step of a picture of `rounds` steps, `tau` going from 0 to 1. Every variant is called once in it, in an
    order that is rotated from round to round, and its time is set against that of the bare call of the same round.

    Args:
        model: the UNet; it is left as it was.
        paths: the subject's file and the style's.
        latents: side of the latents.
        batch: how many latents a call takes.
        rounds: how often each variant is timed.
        tick: told after every call, `UNTIMED_CALLS + rounds * TIMED_CALLS` times.

    Returns:
        One row a variant: what, seconds, ratio (see `row`) and `memory`, the bytes by which the peak of a call exceeds
        that of a bare one; None where this machine doesn't tell.
    """
    given = inputs(model, latents, batch)
    variants = {BARE: Variant(model, given)}
    peaks: dict[str, int | None] = {}

    def try_out(name: str, taus: Iterable[float]) -> None:
        for tau in taus:
            variants[name](tau)
            tick()

    with ExitStack() as undone:
        try_out(BARE, [0.0])  # what the first call of all allocates for good is nobody's
        peaks[BARE] = peak_rise(model.device, lambda: try_out(BARE, [0.0]))
        for name, (config, make) in WAYS.items():
            plan = FusionPlan.of(*map(LoraFile.load, paths), config)
            mine = with_same_weights(model)
            session = make(mine, plan)
            undone.callback(session.detach)
            variants[name] = Variant(mine, given, session)

            def begin(name: str = name, session: Any = session) -> None:
                session.attach()
                try_out(name, [0.0, 1.0])

            peaks[name] = peak_rise(model.device, begin)
        seconds = in_pairs(variants, rounds, model.device, tick)
    memory = {name: None if peak is None else peak - (peaks[BARE] or 0) for name, peak in peaks.items()}
    return [{**row(name, seconds[name], seconds[BARE]), "memory": memory[name]} for name in variants]


def in_pairs(
    variants: Mapping[str, Variant], rounds: int, device: torch.device, tick: Callable[[], Any]
) -> dict[str, list[float]]:
    """Seconds of each variant's call in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for index in range(rounds):
        tau = index / max(rounds - 1, 1)
        first = index % len(names)
        for name in names[first:] + names[:first]:
            _wait_for(device)
            start = time.perf_counter()
            variants[name](tau)
            _wait_for(device)
            seconds[name].append(time.perf_counter() - start)
            tick()
    return seconds


def measure_planning(paths: Paths, repeats: int, tick: Callable[[], Any]) -> list[Row]:
    """Times what happens before the first step, and sets it against reading both files in the same repetition.

    The files are in the system's cache: what is measured is no disk. Every plan is made of files loaded anew, because
    updates remember their energies. Plans that need the dense updates take so long that they are made in every fourth
    repetition only.

    Args:
        paths: the subject's file and the style's.
        repeats: how often.
        tick: told after every repetition.
    """
    seconds: dict[str, list[float]] = {name: [] for name in (READING, LOADING, *PLANS)}
    base: dict[str, list[float]] = {name: [] for name in seconds}
    _read(paths)
    for repeat in range(repeats):
        start = time.perf_counter()
        _read(paths)
        took = {READING: time.perf_counter() - start}
        for name, config in PLANS.items():
            if repeat % _DENSE_EVERY and config != FusionConfig():
                continue
            start = time.perf_counter()
            subject, style = map(LoraFile.load, paths)
            loaded = time.perf_counter()
            FusionPlan.of(subject, style, config)
            took[name] = time.perf_counter() - loaded
            took.setdefault(LOADING, loaded - start)
        for name, value in took.items():
            seconds[name].append(value)
            base[name].append(took[READING])
        tick()
    return [row(name, seconds[name], base[name]) for name in seconds]


def row(what: str, seconds: Sequence[float], base: Sequence[float]) -> Row:
    """One line of a table: medians and quartiles of `seconds`, and of their ratios to `base`, pair by pair."""
    ratios = np.divide(seconds, base)
    return {"what": what, "seconds": _spread(seconds), "ratio": _spread(ratios)}


def with_same_weights(model: nn.Module) -> nn.Module:
    """Another tree of modules with the very tensors of `model`: hooks on one are not on the other."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def peak_rise(device: torch.device, work: Callable[[], Any]) -> int | None:
    """By how many bytes the memory in use rises above its present level, at most, while `work` runs.

    On a GPU that is what torch has allocated there, on a CPU the process's resident memory.

    Returns:
        None where the system doesn't tell: on a CPU, anywhere but on Linux.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    told = _reset_peak()
    before = _status("VmRSS") if told else 0
    work()
    return _status("VmHWM") - before if told else None


def _reset_peak() -> bool:
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed, but kept for the next time, would hide what comes next
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak, restarts from the present level
    except (OSError, TypeError, AttributeError):
        return False
    return True


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _read(paths: Paths) -> list[Tensor]:
    """Every tensor of the files, copied into memory."""
    tensors = []
    for path in paths:
        with safe_open(path, "pt") as file:
            tensors.extend(file.get_tensor(key).clone() for key in file.keys())  # noqa: SIM118
    return tensors


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, median, high = (float(value) for value in np.quantile(values, [0.25, 0.5, 0.75]))
    return {"median": median, "first_quartile": low, "third_quartile": high}
