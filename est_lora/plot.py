"""The gate map: layers in the order of the network x progress, and who acts where."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from est_lora.gate import BOTH, NEEDS_MODEL, NONE, STYLE, SUBJECT, FusionPlan, LayerPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by every kind of colour vision, and in grey.
COLOURS = {SUBJECT: "#2f5d9b", STYLE: "#f0a33c", BOTH: "#7fae86", NONE: "#e4e4e4", NEEDS_MODEL: "#b9a7c9"}
_COLUMNS = 800
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)|(mid)_block")


def gate_map(plan: FusionPlan) -> Figure:
    """Draws `plan`: a row a layer, progress from left to right; below it the style's share of the layers over time."""
    from matplotlib.figure import Figure

    rows = len(plan.layers)
    figure = Figure(figsize=(9, min(max(3.6 + rows * 0.035, 4.5), 14)), dpi=130, layout="constrained")
    share_height = 1.3 / figure.get_figheight()
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1 - share_height, share_height))
    _draw_map(upper, plan)
    _draw_share(lower, plan)
    names = f"{plan.subject.path.stem}  x  {plan.style.path.stem}"
    upper.set_title(
        f"{names}\n{plan.config.method}, beta {plan.beta:.3g}, alpha {plan.config.alpha:g}",
        fontsize=10,
        parse_math=False,
    )
    return figure


def style_share(layers: list[LayerPlan], tau: float) -> float:
    """The fraction of `layers` in which the style acts at `tau`, alone or with the subject."""
    return sum(layer.acts(tau) in (STYLE, BOTH) for layer in layers) / max(len(layers), 1)


def _draw_map(axes: Axes, plan: FusionPlan) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    order = list(COLOURS)
    taus = [(column + 0.5) / _COLUMNS for column in range(_COLUMNS)]
    grid = [[order.index(layer.acts(tau)) for tau in taus] for layer in plan.layers]
    axes.imshow(
        grid,
        cmap=ListedColormap(list(COLOURS.values())),
        vmin=0,
        vmax=len(order) - 1,
        aspect="auto",
        interpolation="nearest",
        extent=(0.0, 1.0, float(len(grid)), 0.0),
    )
    ticks = []
    for name, first, last in _blocks(plan):
        ticks.append(((first + last) / 2, name))
        if first:
            axes.axhline(first, color="white", linewidth=1.2)
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_ylabel(f"{len(grid)} layers, in the order of the network")
    seen = {order[value] for row in grid for value in row}
    patches = [Patch(color=COLOURS[acts], label=acts) for acts in order if acts in seen]
    axes.legend(handles=patches, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)


def _draw_share(axes: Axes, plan: FusionPlan) -> None:
    layers = [layer for layer in plan.layers if layer.gated] or list(plan.layers)
    starts = sorted({0.0, 1.0, *(segment.start for layer in layers for segment in layer.segments)})
    shares = [100 * style_share(layers, tau) for tau in starts]
    axes.fill_between(starts, shares, step="post", color=COLOURS[STYLE], alpha=0.35)
    axes.step(starts, shares, where="post", color=COLOURS[STYLE])
    axes.set(xlim=(0, 1), ylim=(0, 100), ylabel="style's\nshare, %")
    axes.set_xlabel("progress (0 = pure noise, 1 = clean picture)")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _blocks(plan: FusionPlan) -> Iterator[tuple[str, int, int]]:
    """(name, first row, row after the last) of each block of the network."""
    start = 0
    for name, layers in groupby(plan.layers, key=_block):
        end = start + len(list(layers))
        yield name, start, end
        start = end


def _block(layer: LayerPlan) -> str:
    found = _BLOCK.match(layer.layer.name)
    if found:
        return " ".join(filter(None, found.groups()))
    return "out" if layer.layer.name.startswith(("conv_norm_out", "conv_out")) else "in"
