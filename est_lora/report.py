"""A plan put into words: the JSON object, the table, and one line for people."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from est_lora.gate import NEEDS_MODEL, NONE, STYLE, SUBJECT, FusionPlan, LayerPlan
from est_lora.lora import LoraFile


def to_json(plan: FusionPlan) -> dict[str, Any]:
    """The plan as plain data; what `est-lora inspect --json` prints."""
    return {
        "subject": _file(plan.subject),
        "style": _file(plan.style),
        "config": dataclasses.asdict(plan.config),
        "beta_used": plan.beta,
        "balance": plan.balance,
        "layers": [_layer(layer) for layer in plan.layers],
        "only_subject": plan.only_subject,
        "only_style": plan.only_style,
    }


def summary(plan: FusionPlan) -> str:
    """What the pair will do, in one line."""
    gated = [layer for layer in plan.layers if layer.gated]
    said = []
    switching = sorted(layer.segments[1].start for layer in gated if _pattern(layer) == (SUBJECT, STYLE))
    if switching:
        middle = switching[len(switching) // 2]
        said.append(
            f"{len(switching)} of {len(gated)} gated layers begin with the subject and go over to the style"
            f" between {switching[0]:.0%} and {switching[-1]:.0%} of the way, half of them by {middle:.0%}"
        )
    counts = Counter(_pattern(layer) for layer in gated)
    for acts, number in counts.most_common():
        count = f"{number}" if said else f"{number} of {len(gated)} gated layers"
        if acts == (NEEDS_MODEL,):
            said.append(f"{count} need the model to be decided")
        elif len(acts) == 1:
            where = "use neither" if acts[0] == NONE else f"use {'both' if acts[0] == 'both' else 'the ' + acts[0]}"
            said.append(f"{count} {where} throughout")
        elif acts != (SUBJECT, STYLE):
            said.append(f"{count} go {' - '.join(acts)}")
    return "; ".join(said) + "." if said else "No layer is gated."


def coverage(plan: FusionPlan) -> str:
    """How many layers of the UNet are gated, added and left out, and why, in one line."""
    gated = [layer for layer in plan.layers if layer.gated]
    alone = sum(layer.subject is None or layer.style is None for layer in gated)
    said = [f"{len(gated)} gated" + (f" ({alone} of them in one file alone, which acts there)" if alone else "")]
    for acts, count in Counter(layer.segments[0].acts for layer in plan.layers if not layer.gated).most_common():
        if acts == NONE:
            said.append(f"{count} left out (other {plan.config.other}, method {plan.config.method})")
        else:
            said.append(f"{count} outside the gate and added ({acts})")
    for role, file in ((SUBJECT, plan.subject), (STYLE, plan.style)):
        if left := len(file.unsupported) + len(file.unreadable):
            said.append(f"{left} of the {role}'s left out (see its remarks)")
    return f"{len(plan.layers)} layers: " + ", ".join(said)


def table(plan: FusionPlan) -> str:
    """Both files, the pair, and a row a layer, as text."""
    balance = "none (no gated layer has both energies)" if plan.balance is None else f"{plan.balance:.6g}"
    config = plan.config
    lines = [
        *_described("subject", plan.subject),
        *_described("style", plan.style),
        "",
        f"method {config.method} - balance {balance} - style pressure {_pressure(plan)}",
        coverage(plan),
        summary(plan),
        *plan.pair_remarks,
        "",
        *_columns([("layer", "E subject", "E style", "rho", "who acts"), *map(_row, plan.layers)]),
    ]
    return "\n".join(lines)


def _file(file: LoraFile) -> dict[str, Any]:
    return {
        "path": str(file.path),
        "sha256": file.sha256,
        "convention": file.convention,
        "kinds": file.kinds,
        "ranks": file.ranks,
        "unet_layers": file.unet_layers,
        "text_encoder_layers": file.text_encoder_layers,
        "unknown_keys": list(file.unknown_keys),
    }


def _layer(plan: LayerPlan) -> dict[str, Any]:
    return {
        "name": plan.layer.name,
        "gated": plan.gated,
        "energy_subject": plan.energy_subject,
        "energy_style": plan.energy_style,
        "rho": plan.rho,
        "segments": [[segment.start, segment.acts] for segment in plan.segments],
    }


def _described(role: str, file: LoraFile) -> list[str]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in file.kinds.items())
    ranks = ", ".join(map(str, file.ranks)) or "-"
    model = f" - for {file.base_model}" if file.base_model else ""
    text = f"{file.text_encoder_layers} text-encoder layers" if file.text_encoder_layers else "no text-encoder part"
    return [
        f"{role:8} {file.path}",
        f"{'':8} {file.convention} - {kinds} - rank {ranks} - {file.unet_layers} UNet layers, {text}{model}",
        *(f"{'':8} {remark}" for remark in file.remarks),
    ]


def _pressure(plan: FusionPlan) -> str:
    rising = f"{plan.config.alpha:g} tau + {plan.beta:.4g}"
    if plan.config.pattern == "s*":
        rising = f"({rising}) mod {plan.config.alpha:g}"
    return f"({rising}) * 4^{plan.config.lean:g}" if plan.config.lean else rising


def _row(plan: LayerPlan) -> tuple[str, ...]:
    rho = "-" if plan.rho is None else f"{plan.rho:.4g}"
    acts = plan.segments[0].acts + "".join(
        f", {segment.acts} from {segment.start:.1%}" for segment in plan.segments[1:]
    )
    return (plan.layer.name, _energy(plan.energy_subject), _energy(plan.energy_style), rho, acts)


def _energy(energy: float | None) -> str:
    return "?" if energy is None else f"{energy:.4g}"


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _pattern(plan: LayerPlan) -> tuple[str, ...]:
    return tuple(segment.acts for segment in plan.segments)
