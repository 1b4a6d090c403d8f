"""What was measured, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

_CALLS = """\
One call of the UNet, medians. "x bare": time by that of the call without LoRA of the same round, median and quartiles.
Memory: how far the peak during calls exceeds a bare call's, without the files, which stay mapped from the disk.
"""
_PLANNING = """\
Before the first step, on the CPU, medians. "x reading": time by that of copying every tensor of both files into memory.
"""


def markdown(result: Mapping[str, Any]) -> str:
    """The whole result, with the machine named."""
    machine, settings = result["machine"], result["settings"]
    cpu = f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    where = f"{machine['gpu']} ({cpu})" if machine["gpu"] else cpu
    packages = ", ".join(f"{name} {machine[name]}" for name in ("torch", "diffusers", "safetensors", "est_lora"))
    load = "" if machine["load"] is None else f", load average {machine['load']}"
    when = f"{machine['date']}, {machine['system']}, Python {machine['python']}, {packages}{load}."
    how = f"{settings['dtype']}, batch {settings['batch']}, {settings['rounds']} rounds, {settings['repeats']} plans."
    parts = [f"# {where}\n", f"{when} {how}\n"]
    if result["calls"]:
        columns = {
            "UNet": lambda row: f"{row['unet']}, {row['latents']} x {row['latents']} latents",
            "layers": lambda row: row["layers"],
            "rank": lambda row: row["rank"],
            "LoRAs applied by": lambda row: row["what"],
            "ms": _milliseconds,
            "x bare": _ratio,
            "memory, MiB": _memory,
        }
        parts += [_CALLS, _table(columns, result["calls"])]
    if result["planning"]:
        columns = {
            "UNet": lambda row: row["unet"],
            "layers": lambda row: row["layers"],
            "rank": lambda row: row["rank"],
            "what": lambda row: row["what"],
            "ms": _milliseconds,
            "x reading": _ratio,
        }
        parts += [_PLANNING, _table(columns, result["planning"])]
    return "\n".join(parts)


def _table(columns: Mapping[str, Callable[[Mapping[str, Any]], object]], rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[str(cell(row)) for cell in columns.values()] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _milliseconds(row: Mapping[str, Any]) -> str:
    return f"{row['seconds']['median'] * 1000:.4g}"


def _ratio(row: Mapping[str, Any]) -> str:
    ratio = row["ratio"]
    return f"{ratio['median']:.3f} ({ratio['first_quartile']:.3f} ... {ratio['third_quartile']:.3f})"


def _memory(row: Mapping[str, Any]) -> str:
    return "not told" if row["memory"] is None else f"{row['memory'] / 2**20:.0f}"
