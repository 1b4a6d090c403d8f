"""A picture's time, part by part, the time of planning, and the peak of the memory in use.

A machine's speed drifts by more than what is to be told apart, so times are compared in pairs: in every step of a picture
the bare UNet and a few ways of applying LoRAs are called one right after the other, in an order that rotates, each way on
a tree of modules of its own that shares the bare one's tensors. A way's total is everything that the picture costs with
it, and its ratio is that total by the sum of the bare calls of the very same steps.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor, nn

from benchmarks.unets import inputs
from benchmarks.ways import WAYS, Session
from est_lora.config import FusionConfig
from est_lora.gate import FusionPlan
from est_lora.hosts.webui.plans import Plans
from est_lora.lora import LoraFile

BARE = "no LoRA"
READING, LOADING = "reading both files", "LoraFile.load of both"
PLANS = {
    "FusionPlan.of, balance=energy": FusionConfig(),
    "FusionPlan.of, balance=l1": FusionConfig(balance="l1"),
    "FusionPlan.of, method=k-lora": FusionConfig(method="k-lora"),
}
FIRST, SECOND = "all of it, a WebUI's first picture", "its second picture"
OTHER = "its third picture, with another beta"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_DENSE_EVERY = 4
_RESAMPLED = 2000

Paths = Sequence[Path]
Row = dict[str, Any]
Tick = Callable[[], Any]


class Run:
    """Pictures that one UNet makes with one way of applying LoRAs, or with none, and what each part of them took.

    Attributes:
        set_up: seconds of attaching and of the first step's `at`, one a picture.
        switching: seconds of the other steps' `at`, one list a picture.
        calls: seconds of each step's call, one list a picture.
        restoring: seconds of detaching, one a picture.
        merged: how many layers had nothing to do in a call of the last picture, where the session tells.
    """

    def __init__(
        self, model: nn.Module, given: Mapping[str, Any], session: Session | None = None, clock: str = "wall"
    ) -> None:
        """`session`, if any, belongs to `model`; `given` is what a call takes but for the timestep."""
        self._model = model
        self._given = given
        self._session = session
        self._device = next(model.parameters()).device
        self._clock = CLOCKS[clock]
        self.set_up: list[float] = []
        self.switching: list[list[float]] = []
        self.calls: list[list[float]] = []
        self.restoring: list[float] = []
        self.merged: int | None = None

    def begin(self) -> None:
        """Begins a picture."""
        self.switching.append([])
        self.calls.append([])
        self.set_up.append(self._timed(self._session.attach) if self._session else 0.0)

    def step(self, tau: float) -> None:
        """One step of it, at progress `tau`."""
        told = self._timed(lambda: self._session.at(tau)) if self._session else 0.0
        if self.calls[-1]:
            self.switching[-1].append(told)
        else:
            self.set_up[-1] += told
        self.calls[-1].append(self._timed(lambda: self.call(tau)))

    def end(self) -> None:
        """Ends it."""
        self.merged = getattr(self._session, "merged", None)
        self.restoring.append(self._timed(self._session.detach) if self._session else 0.0)

    def try_out(self, taus: Sequence[float], tick: Tick) -> None:
        """A picture of these steps."""
        self.begin()
        try:
            for tau in taus:
                self.step(tau)
                tick()
        finally:
            self.end()

    def call(self, tau: float) -> Tensor:
        """One call at progress `tau`."""
        output: Tensor = self._model(timestep=999.0 * (1.0 - tau), **self._given, return_dict=False)[0]
        return output

    def _timed(self, work: Callable[[], Any]) -> float:
        _wait_for(self._device)
        start = self._clock()
        work()
        _wait_for(self._device)
        return self._clock() - start


def calls_of_pictures(ways: int, steps: int, pictures: int, together: int) -> int:
    """How often `measure_pictures` calls the UNet."""
    groups = -(-ways // together)
    return 2 + 2 * ways + (ways + groups) * steps * pictures


@torch.no_grad()
def measure_pictures(
    model: UNet2DConditionModel,
    paths: Paths,
    ways: Sequence[str],
    latents: int,
    batch: int,
    steps: int,
    pictures: int,
    together: int,
    clock: str,
    tick: Tick,
) -> list[Row]:
    """Times pictures of `model` without LoRA and with those of two files, applied in several ways.

    Plans are made beforehand, see `measure_planning`. Every way is tried out before it is timed, which is when its memory
    is measured.

    Args:
        model: the UNet; it is left as it was.
        paths: the subject's file and the style's.
        ways: which of `WAYS`.
        latents: side of the latents.
        batch: how many latents a call takes.
        steps: of a picture; step `i` is at `tau = i / steps`.
        pictures: how often each picture is made; the median of a step's times is what counts.
        together: how many ways are timed side by side, against the same bare calls. What they hold in memory adds up.
        clock: which of `CLOCKS`; `cpu` counts what this process alone has used, which other jobs on the machine don't
            lengthen. With one thread on a quiet machine it is the same as `wall`.
        tick: told after every call, `calls_of_pictures` times.

    Returns:
        `picture_row` of the bare UNet and of every way.
    """
    given = inputs(model, latents, batch)
    bare = Run(model, given)
    bare.try_out([0.0], tick)  # what the first call of all allocates for good is nobody's
    bare_peak = peak_rise(model.device, lambda: bare.try_out([0.0], tick))
    files = [LoraFile.load(path) for path in paths]
    rows: list[Row] = []
    bare_calls: list[list[float]] = []
    for start in range(0, len(ways), together):
        runs, peaks = {}, {}
        for way in ways[start : start + together]:
            tree = with_same_weights(model)
            session = WAYS[way].session(tree, FusionPlan.of(*files, WAYS[way].config))
            peaks[way] = peak_rise(model.device, partial(Run(tree, given, session).try_out, [0.0, 1.0], tick))
            runs[way] = Run(tree, given, session, clock)
        bare = Run(model, given, clock=clock)
        side_by_side([bare, *runs.values()], steps, pictures, tick)
        bare_calls += bare.calls
        for way, run in runs.items():
            memory = None if peaks[way] is None else peaks[way] - (bare_peak or 0)
            rows.append({"way": way, **picture_row(WAYS[way].title, run, bare.calls), "memory": memory})
    bare.calls = bare_calls
    first = {"way": None, **picture_row(BARE, bare, bare_calls), "memory": None if bare_peak is None else 0}
    return [first, *rows]


def side_by_side(runs: Sequence[Run], steps: int, pictures: int, tick: Tick) -> None:
    """Makes pictures with all of `runs`, step by step; who goes first rotates with the steps."""
    for picture in range(pictures):
        try:
            for run in runs:
                run.begin()
            for index in range(steps):
                first = (picture + index) % len(runs)
                for run in (*runs[first:], *runs[:first]):
                    run.step(index / steps)
                    tick()
        finally:
            for run in runs:
                run.end()


def picture_row(what: str, run: Run, bare_calls: Sequence[Sequence[float]]) -> Row:
    """One line of a table, in seconds: medians of the pictures.

    Returns:
        `set_up`, `switching`, `steps`, `restoring`, their sum `total`, and `bare`, the sum of the bare calls of the same
        steps. `ratio` is `total / bare` with the 95 % interval that resampling the steps gives, which is how much of it
        may be noise; `step_ratio` is of single calls, median and quartiles, and `each_step` what it was read off.
    """
    calls, bare = np.median(run.calls, axis=0), np.median(bare_calls, axis=0)
    parts = {
        "set_up": float(np.median(run.set_up)),
        "switching": float(np.median(run.switching, axis=0).sum()),
        "steps": float(calls.sum()),
        "restoring": float(np.median(run.restoring)),
    }
    total = sum(parts.values())
    chosen = np.random.default_rng(0).integers(len(calls), size=(_RESAMPLED, len(calls)))
    resampled = (total - parts["steps"] + calls[chosen].sum(1)) / bare[chosen].sum(1)
    low, high = (float(value) for value in np.quantile(resampled, [0.025, 0.975]))
    return {
        "what": what,
        "merged": run.merged,
        **parts,
        "total": total,
        "bare": float(bare.sum()),
        "ratio": {"value": total / float(bare.sum()), "low": low, "high": high},
        "step_ratio": _spread(calls / bare),
        "each_step": {"calls": calls.tolist(), "bare": bare.tolist()},
    }


def measure_planning(paths: Paths, repeats: int, clock: str, tick: Tick) -> list[Row]:
    """Times what happens before the first step, and sets it against reading both files in the same repetition.

    The files are in the system's cache: what is measured is no disk. Every plan is made of files loaded anew, because
    updates remember their energies; but for what a WebUI keeps from one picture to the next. Plans that need the dense
    updates take so long that they are made in every fourth repetition only.

    Args:
        paths: the subject's file and the style's.
        repeats: how often.
        clock: which of `CLOCKS`.
        tick: told after every repetition.
    """
    seconds: dict[str, list[float]] = {name: [] for name in (READING, LOADING, *PLANS, FIRST, SECOND, OTHER)}
    base: dict[str, list[float]] = {name: [] for name in seconds}
    now = CLOCKS[clock]
    _read(paths)
    for repeat in range(repeats):
        start = now()
        _read(paths)
        took = {READING: now() - start}
        for name, config in PLANS.items():
            if repeat % _DENSE_EVERY and config != FusionConfig():
                continue
            start = now()
            subject, style = map(LoraFile.load, paths)
            loaded = now()
            FusionPlan.of(subject, style, config)
            took[name] = now() - loaded
            took.setdefault(LOADING, loaded - start)
        plans = Plans()
        for name, config in ((FIRST, FusionConfig()), (SECOND, FusionConfig()), (OTHER, FusionConfig(beta=0.3))):
            start = now()
            plans.of(*map(str, paths), config)
            took[name] = now() - start
        for name, value in took.items():
            seconds[name].append(value)
            base[name].append(took[READING])
        tick()
    return [row(name, seconds[name], base[name]) for name in seconds]


def row(what: str, seconds: Sequence[float], base: Sequence[float]) -> Row:
    """One line of a table: medians and quartiles of `seconds`, and of their ratios to `base`, pair by pair."""
    return {"what": what, "seconds": _spread(seconds), "ratio": _spread(np.divide(seconds, base))}


def with_same_weights(model: nn.Module) -> nn.Module:
    """Another tree of modules and parameters that shares the memory of `model`'s.

    Hooks on one are not on the other, and to put other values into a parameter (`weight.data = ...`, not `weight.add_`)
    leaves the other's alone.
    """
    same = {id(weight): nn.Parameter(weight.data, requires_grad=False) for weight in model.parameters()}
    return copy.deepcopy(model, {**same, **{id(buffer): buffer for buffer in model.buffers()}})


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


def _spread(values: Any) -> dict[str, float]:
    low, median, high = (float(value) for value in np.quantile(values, [0.25, 0.5, 0.75]))
    return {"median": median, "first_quartile": low, "third_quartile": high}
