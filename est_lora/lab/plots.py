"""The report's plots and grids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from est_lora.demo.styles import SIZE
from est_lora.lab.drawing import true_picture

if TYPE_CHECKING:
    from est_lora.lab.findings import Interval, Score
    from est_lora.lab.folder import Lab

_GREY = "#8a8f98"
# Told apart by every kind of colour vision: what adds, what chooses without a gate, K-LoRA, EST.
_FAMILIES = {"sum": "#f0a33c", "EST": "#2f5d9b", "K-LoRA": "#4f9d8a"}
_SWEPT = "EST, beta "


def subject_and_style(scores: list[Score]) -> Figure:
    """Every method by how often it has the subject and how often the style, with 95 % intervals."""
    figure = Figure(figsize=(8.2, 6.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    for level in (0.2, 0.4, 0.6, 0.8):
        x = np.linspace(level / (2 - level) + 1e-3, 1, 200)
        axes.plot(x, level * x / (2 * x - level), color=_GREY, linewidth=0.6, linestyle=":")
        axes.text(1.005, level / (2 - level), f"{level:g}", fontsize=7, color=_GREY, va="center")
    for number, score in enumerate(scores, start=1):
        one, other = score.subject, score.style
        axes.errorbar(
            one.mean,
            other.mean,
            xerr=_bars(one),
            yerr=_bars(other),
            fmt="o",
            color=_colour(score.method),
            markersize=5,
            linewidth=0.8,
            label=f"{number} {score.method}",
        )
        axes.annotate(str(number), (one.mean, other.mean), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="pictures with the right subject", ylabel="pictures with the right style")
    axes.set(xlim=(-0.02, 1.04), ylim=(-0.02, 1.04))
    axes.legend(fontsize=7.5, frameon=False, loc="upper left", bbox_to_anchor=(1.03, 1.0), handlelength=0.8)
    _plain(axes)
    return figure


def sweep(scores: list[Score]) -> Figure | None:
    """What `beta` does; None where it wasn't swept."""
    swept = sorted((float(score.method.removeprefix(_SWEPT)), score) for score in scores if _SWEPT in score.method)
    if len(swept) < 2:
        return None
    figure = Figure(figsize=(6.4, 3.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    lines = {"subject": _FAMILIES["K-LoRA"], "style": _FAMILIES["sum"], "both": _FAMILIES["EST"]}
    for what, colour in lines.items():
        intervals = [getattr(score, what) for _, score in swept]
        axes.errorbar(
            [beta for beta, _ in swept],
            [interval.mean for interval in intervals],
            yerr=np.hstack([_bars(interval) for interval in intervals]),
            fmt="o-",
            color=colour,
            label=what,
            markersize=5,
        )
    axes.set(xlabel="beta", ylabel="share of pictures", ylim=(0, 1))
    axes.legend(fontsize=8, frameon=False)
    _plain(axes)
    return figure


def grid(lab: Lab, guidance: float, methods: list[str], seed: int = 0) -> Figure:
    """A row a pair, a column a method, and what they should look like; all of one sampling seed."""
    protocol = lab.protocol
    pairs = [pair for pair in protocol.pairs if pair.training == 0]
    columns = [*methods, "LoRA of true pictures", "drawn by code"]
    figure = Figure(figsize=(1.05 * len(columns) + 1.0, 1.05 * len(pairs) + 0.8), dpi=110, layout="constrained")
    for row, line in enumerate(figure.subplots(len(pairs), len(columns), squeeze=False)):
        pair = pairs[row]
        both = f"{pair.subject}, {pair.style}"
        strips = [lab.picture("cell", *pair, method, guidance) for method in methods]
        pictures = [_from_strip(path, seed) for path in [*strips, lab.picture("ceiling", both, guidance)]]
        pictures.append(true_picture(pair.subject, pair.style, seed))
        for axes, picture, name in zip(line, pictures, columns):
            axes.imshow(picture, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(name.replace(", ", ",\n"), fontsize=7)
            if axes is line[0]:
                axes.set_ylabel(both.replace(", ", ",\n"), fontsize=7)
    return figure


def _from_strip(path: Any, seed: int) -> np.ndarray:
    return np.asarray(Image.open(path))[:, seed * SIZE : (seed + 1) * SIZE]


def _bars(interval: Interval) -> np.ndarray:
    """What matplotlib takes, shape (2, 1)."""
    return np.array([[interval.mean - interval.low], [interval.high - interval.mean]]).clip(0)


def _colour(method: str) -> str:
    return next((colour for family, colour in _FAMILIES.items() if method.startswith(family)), _GREY)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
