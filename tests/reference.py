"""The gate a second time, straight from its formulas: dense float64 updates, no closed forms, none of our code."""

from __future__ import annotations

import math

import numpy as np
import torch

from tests.files import Lora


def decisions(subject: Lora, style: Lora, knobs: dict, taus: list[float]) -> dict[str, tuple[float | None, list[str]]]:
    """Per layer: `rho`, and who acts at each `tau`; '?' where rounding decides."""
    k = {"alpha": 1.5, "beta": "auto", "lean": 0.0, "balance": "energy", "pattern": "s", "method": "est"}
    k |= {"layers": "attention", "other": "sum"} | knobs
    dense = {name: (_dense(subject, name), _dense(style, name)) for name in {*subject, *style}}
    energy = {name: tuple(float((d**2).sum()) for d in pair) for name, pair in dense.items()}
    gated = {name: k["layers"] == "all" or ".attn" in name for name in dense}
    both = [name for name in dense if min(energy[name]) > 0]
    beta = k["beta"]
    if beta == "auto":
        beta = 0.85 * k["alpha"] if k["method"] == "k-lora" and k["pattern"] == "s*" else 0.5
    ranked = [name for name in both if gated[name]]
    if not ranked:
        gamma = None
    elif k["balance"] == "energy" and k["method"] != "k-lora":
        gamma = math.exp(np.mean([math.log(energy[n][0] / energy[n][1]) for n in ranked]))
    else:
        ratios = np.array([np.abs(dense[n][0]).sum() / np.abs(dense[n][1]).sum() for n in ranked])
        gamma = ratios[ratios < 3 * ratios.mean()].mean()
    table = {}
    for name, pair in dense.items():
        rho = None
        if name in both and gamma is not None:
            top, bottom = energy[name]
            if k["method"] == "k-lora":
                count = subject[name].down.shape[0] * style[name].down.shape[0]
                top, bottom = (np.sort(np.abs(d).ravel())[::-1][:count].sum() for d in pair)
            rho = float(top / (gamma * bottom))
        table[name] = (rho, [_acts(tau, energy[name], gated[name], rho, beta, k) for tau in taus])
    return table


def _dense(lora: Lora, name: str) -> np.ndarray:
    return lora[name].dense.numpy() if name in lora else np.zeros(1)


def _acts(tau: float, energy: tuple, gated: bool, rho: float | None, beta: float, k: dict) -> str:
    there = [who for who, e in zip(("subject", "style"), energy) if e > 0]
    if k["method"] in ("subject", "style"):
        return k["method"] if k["method"] in there else "none"
    if k["method"] in ("est", "k-lora") and not gated and k["other"] == "off":
        return "none"
    if len(there) < 2:
        return there[0] if there else "none"
    if k["method"] == "sum" or not gated:
        return "both"
    pressure = k["alpha"] * tau + beta
    if k["pattern"] == "s*":
        pressure %= k["alpha"]
        if min(pressure, k["alpha"] - pressure) < 1e-9:
            return "?"
    pressure *= 4 ** k["lean"]
    if abs(rho - pressure) < 1e-9:
        return "?"
    return "subject" if rho > pressure else "style"


def scaled(lora: Lora, factor: float) -> Lora:
    """The same LoRA, `factor` times as strong."""
    return {name: type(f)(f.down, (f.up.double() * factor).to(torch.float32), f.alpha) for name, f in lora.items()}
