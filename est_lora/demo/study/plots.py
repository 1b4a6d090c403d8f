"""The page's two plots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from est_lora.demo.study.measure import BUDGET, PROMPTS, Table, has_both
from est_lora.demo.styles import SIZE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from est_lora.demo.study.figures import Findings

# Told apart by every kind of colour vision, and in grey.
_DARK, _MIDDLE, _LIGHT, _GREY = "#2f5d9b", "#4f9d8a", "#f0a33c", "#8a8f98"
_OF_SIDES = (_LIGHT, _MIDDLE, _DARK)


def spread(table: Table, found: Findings) -> Figure:
    """Every pair's `D`: a dot a seed with the reference, a mark a prompt."""
    plan = found.plan
    figure = Figure(figsize=(9.0, 1.6 + 0.38 * len(plan.pairs)), dpi=110, layout="constrained")
    seeds, prompts = figure.subplots(1, 2, sharex=True, sharey=True)
    order = np.argsort(found.means)
    rows = range(len(order))
    for row, place in zip(rows, order):
        values = table[plan.pairs[place], plan.reference]
        seeds.plot(values, [row] * len(values), "o", color=_DARK, alpha=0.55, markersize=5, markeredgewidth=0)
        seeds.plot(values.mean(), row, "|", color="black", markersize=15)
    for column, prompt in enumerate(plan.prompts):
        prompts.plot(found.by_prompt[order, column], rows, linestyle="none", **_mark(prompt, first=column == 0))
    seeds.set_yticks(rows, [str(plan.pairs[place]) for place in order], fontsize=9)
    seeds.set_title(f"{plan.seeds} seeds (bar: their mean)", fontsize=10)
    prompts.set_title(f"{len(plan.prompts)} prompts, means over {plan.prompt_seeds} seeds", fontsize=10)
    named = {line.get_label(): line for line in prompts.lines}
    prompts.legend(named.values(), named.keys(), fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for axes in (seeds, prompts):
        axes.set_xlabel("style discrepancy D")
        _plain(axes)
    return figure


def settings(found: Findings) -> Figure:
    """By steps and side: the mean `D`, and the error of a single probe against its cost."""
    plan = found.plan
    figure = Figure(figsize=(9.0, 3.7), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for colour, (side, column) in zip(_OF_SIDES[-len(plan.grid) :], plan.grid):
        of_side = [score for score in found.scores if score.probe.side == side]
        name = f"{side} pixels" + (" (native)" if side == SIZE else "")
        left.plot(column, [found.means.mean() + score.shift for score in of_side], "o-", color=colour, label=name)
        right.plot([score.probe.cost for score in of_side], [score.error for score in of_side], "o-", color=colour)
        for score in of_side:
            right.annotate(
                str(score.probe.steps),
                (score.probe.cost, score.error),
                xytext=(0, 5),
                textcoords="offset points",
                fontsize=7,
                ha="center",
                color=colour,
            )
    left.set(xlabel="steps of the probe", ylabel="D, mean over pairs and seeds", ylim=(0, None))
    left.legend(fontsize=8, frameon=False)
    best = found.best
    right.plot(best.probe.cost, best.error, "o", color="black", fillstyle="none", markersize=13)
    right.axhline(found.constant, color=_GREY, linewidth=1, linestyle="--")
    right.text(58, found.constant, "no probe: one D for all pairs", fontsize=8, color=_GREY, va="bottom", ha="right")
    right.axvline(BUDGET, color=_GREY, linewidth=1)
    right.text(BUDGET, 0, " budget", fontsize=8, color=_GREY, va="bottom")
    right.set(xlabel="cost: 2 pictures x steps x (side / native)²", ylabel="error of one probe")
    right.set_ylim(0, 1.1 * max(score.error for score in found.scores))
    right.set_xscale("log", base=2)
    ticks = [1, 2, 4, 7, 14, 28, 56]
    right.set_xticks(ticks, [str(tick) for tick in ticks])
    for axes in (left, right):
        _plain(axes)
    return figure


def _mark(prompt: str, first: bool) -> dict[str, Any]:
    """How a prompt is shown, and which words it has."""
    if first:
        return {"marker": "o", "color": _DARK, "fillstyle": "none", "markersize": 9, "label": "both words alone"}
    if has_both(prompt):
        return {"marker": "D", "color": _DARK, "markersize": 5, "label": "a sentence with both"}
    if "{" in PROMPTS[prompt]:
        return {"marker": "^", "color": _LIGHT, "markersize": 6, "label": "the words of one"}
    return {"marker": "x", "color": _GREY, "markersize": 6, "label": "the words of neither"}


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
