"""What was measured, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from benchmarks.bounds import quotient

Columns = Mapping[str, Callable[[Mapping[str, Any]], object]]

_PICTURES = """\
A picture of {steps} steps, in seconds. Set-up: attaching, and what the first step needs beforehand. Switching: what the
other steps need beforehand. Steps: the calls of the UNet. "x no LoRA": the total by the bare calls that alternated with
these, and between which values the noise leaves it (95 %). "x in a step": of single calls, the median. Memory: how far
the peak of a picture exceeds a bare one's on the device (on a CPU give or take 50 MiB), without the files, which stay
mapped from the disk; what merges keeps the original weights on the device, unless it says otherwise. "x automatic": what
the picture takes by what it takes with our automatic choice, each by its own bare calls.
"""
_PLANNING = """\
Before the first step, on the CPU, medians. "x reading": time by that of copying every tensor of both files into memory.
"""


def markdown(result: Mapping[str, Any]) -> str:
    """The whole result, with the machine named."""
    settings = result["settings"]
    clock = "" if settings["clock"] == "wall" else " Times are the processor's, as other jobs ran beside it."
    parts = [f"# {place(result['machine'])}\n", f"{_circumstances(result['machine'])}{clock}\n"]
    if result["pictures"]:
        parts += [_PICTURES.format(steps=settings["steps"])]
    for (unet, rank), group in groupby(result["pictures"], lambda row: (row["unet"], row["rank"])):
        rows = list(group)
        parts += [f"## {unet}, rank {rank}\n", f"{_setting(rows[0], settings)}\n"]
        parts += [table(_columns(rows), rows)]
    if result["left_out"]:
        parts += [f"Left out, because a package isn't installed: {', '.join(result['left_out'])}.\n"]
    if result["bounds"]:
        parts += ["## Bounds\n", table(_BOUNDS, result["bounds"])]
    if result["planning"]:
        parts += ["## Planning\n", _PLANNING, table(_PLANS, result["planning"])]
    return "\n".join(parts)


def place(machine: Mapping[str, Any]) -> str:
    """The processor, and the GPU if that is what was measured."""
    cpu = f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    return f"{machine['gpu']} ({cpu})" if machine["gpu"] else cpu


def ratio(value: Mapping[str, float]) -> str:
    """A ratio with its interval."""
    return f"{value['value']:.3f} ({value['low']:.3f} ... {value['high']:.3f})"


def spread(value: Mapping[str, float]) -> str:
    """A median with its quartiles."""
    return f"{value['median']:.3f} ({value['first_quartile']:.3f} ... {value['third_quartile']:.3f})"


def _circumstances(machine: Mapping[str, Any]) -> str:
    names = ("torch", "diffusers", "peft", "safetensors", "est_lora")
    packages = ", ".join(f"{name} {machine[name]}" for name in names if machine[name])
    load = "" if machine["load"] is None else f", load average {machine['load']}"
    return f"{machine['date']}, {machine['system']}, Python {machine['python']}, {packages}{load}."


def _setting(row: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    pictures = "one picture" if settings["pictures"] == 1 else f"medians of {settings['pictures']} pictures"
    return (
        f"{row['layers']} layers, {row['latents']} x {row['latents']} latents, batch {settings['batch']},"
        f" {settings['dtype']}, {pictures}."
    )


def _columns(rows: Sequence[Mapping[str, Any]]) -> Columns:
    columns = {
        "LoRAs applied by": lambda row: row["what"],
        "set-up": lambda row: _seconds(row["set_up"]),
        "switching": lambda row: _seconds(row["switching"]),
        "steps": lambda row: _seconds(row["steps"]),
        "restoring": lambda row: _seconds(row["restoring"]),
        "total": lambda row: _seconds(row["total"]),
        "x no LoRA": lambda row: ratio(row["ratio"]),
        "x in a step": lambda row: f"{row['step_ratio']['median']:.3f}",
        "memory, MiB": _memory,
        "layers merged": lambda row: "" if row["merged"] is None else row["merged"],
    }
    automatic = next((row for row in rows if row["way"] == "auto"), None)
    if automatic:
        columns["x automatic"] = lambda row: f"{quotient(row, automatic)['value']:.2f}"
    return columns


_BOUNDS: Columns = {
    "UNet": lambda row: row["unet"],
    "rank": lambda row: row["rank"],
    "what": lambda row: row["what"],
    "by": lambda row: row["against"],
    "at most": lambda row: row["bound"],
    "measured": lambda row: ratio(row["ratio"]),
    "kept": lambda row: row["kept"],
}
_PLANS: Columns = {
    "UNet": lambda row: row["unet"],
    "layers": lambda row: row["layers"],
    "rank": lambda row: row["rank"],
    "what": lambda row: row["what"],
    "ms": lambda row: f"{row['seconds']['median'] * 1000:.4g}",
    "x reading": lambda row: spread(row["ratio"]),
}


def table(columns: Columns, rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows under the names of `columns`."""
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[str(cell(row)) for cell in columns.values()] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _memory(row: Mapping[str, Any]) -> str:
    return "not told" if row["memory"] is None else f"{row['memory'] / 2**20:.0f}"
