"""The gate map: layers in the order of the network x progress, and who acts where."""

from __future__ import annotations

import io
import re
import uuid
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from est_lora.gate import BOTH, NEEDS_MODEL, NONE, STYLE, SUBJECT, FusionPlan, LayerPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by every kind of colour vision, and in grey.
COLOURS = {SUBJECT: "#2f5d9b", STYLE: "#f0a33c", BOTH: "#7fae86", NONE: "#e4e4e4", NEEDS_MODEL: "#b9a7c9"}
_COLUMNS = 800
_NARROW = 0.03  # a block of fewer of the rows has no room for its name
_MIDDLES = [(column + 0.5) / _COLUMNS for column in range(_COLUMNS)]
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)|(mid)_block")
_STYLE = re.compile(r"<defs>\s*<style.*?</style>\s*</defs>", re.DOTALL)
_REFERENCE = re.compile(r'( id="|href="#|url\(#)')
_INK = "#1f2328"
_WIDTH, _WIDTH_ON_PAGE = 9.0, 7.0
_SHARE = 1.0  # height of the lower panel, in inches like all lengths here
_MARGINS = {"left": 0.95, "right": 1.15, "top": 0.55, "bottom": 0.5, "between": 0.12}


def gate_map(plan: FusionPlan, steps: Sequence[float] = ()) -> Figure:
    """Draws `plan`: a row a layer, progress from left to right; below it the style's share of the layers over time.

    Args:
        plan: what is drawn.
        steps: the `tau` at which the steps of a sampler begin; they are marked.
    """
    height = min(max(3.6 + len(plan.layers) * 0.035, 4.5), 14)
    figure = _figure(plan, steps, width=_WIDTH, height=height, top=_MARGINS["top"])
    names = f"{plan.subject.path.stem}  x  {plan.style.path.stem}"
    figure.axes[0].set_title(
        f"{names}\n{plan.config.method}, beta {plan.beta:.3g}, alpha {plan.config.alpha:g}",
        fontsize=10,
        color=_INK,
        parse_math=False,
    )
    return figure


def gate_map_svg(plan: FusionPlan, steps: Sequence[float] = ()) -> str:
    """The same for a page, as an `<svg>` that takes the page's own text colour, light or dark; it has no title."""
    stream = io.StringIO()
    figure = _figure(plan, steps, width=_WIDTH_ON_PAGE, height=3.8, top=0.12)
    figure.patch.set_alpha(0)
    figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = stream.getvalue()
    return _kept_to_itself(svg[svg.index("<svg") :].replace(_INK, "currentColor"))


def _kept_to_itself(svg: str) -> str:
    """Without what would reach others on the same page: a style for everything, identifiers that another map has too."""
    svg = _STYLE.sub("", svg).replace("<svg", '<svg style="stroke-linejoin: round; stroke-linecap: butt"', 1)
    return _REFERENCE.sub(rf"\1est-lora-{uuid.uuid4().hex[:12]}-", svg)


def style_share(layers: list[LayerPlan], tau: float) -> float:
    """The fraction of `layers` in which the style acts at `tau`, alone or with the subject."""
    return sum(layer.acts(tau) in (STYLE, BOTH) for layer in layers) / max(len(layers), 1)


def _figure(plan: FusionPlan, steps: Sequence[float], *, width: float, height: float, top: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130)
    left, across = _MARGINS["left"] / width, 1 - (_MARGINS["left"] + _MARGINS["right"]) / width
    bottom, share = _MARGINS["bottom"] / height, _SHARE / height
    above = bottom + share + _MARGINS["between"] / height
    upper = figure.add_axes((left, above, across, 1 - above - top / height))
    lower = figure.add_axes((left, bottom, across, share), sharex=upper)
    _draw_map(upper, plan)
    _draw_share(lower, plan)
    _mark_steps(lower, steps)
    for axes in (upper, lower):
        axes.tick_params(colors=_INK)
        axes.patch.set_alpha(0)
        for spine in axes.spines.values():
            spine.set_edgecolor(_INK)
    return figure


def _draw_map(axes: Axes, plan: FusionPlan) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    order = list(COLOURS)
    grid = [_row(layer, order) for layer in plan.layers]
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
        if last - first > _NARROW * len(grid):
            ticks.append(((first + last) / 2, name))
        if first:
            axes.axhline(first, color="white", linewidth=1.2)
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelbottom=False)
    axes.set_ylabel(f"{len(grid)} layers, as in the network", color=_INK)
    seen = {order[value] for row in grid for value in set(row)}
    patches = [Patch(color=COLOURS[acts], label=acts) for acts in order if acts in seen]
    axes.legend(
        handles=patches, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9, labelcolor=_INK
    )


def _row(layer: LayerPlan, order: list[str]) -> list[int]:
    """Who acts in the middle of each column of the map, as places in `order`."""
    row: list[int] = []
    for segment, end in zip(layer.segments, [*(later.start for later in layer.segments[1:]), 1.0]):
        columns = bisect_left(_MIDDLES, end) - len(row)
        row += [order.index(segment.acts)] * columns
    return row


def _draw_share(axes: Axes, plan: FusionPlan) -> None:
    layers = [layer for layer in plan.layers if layer.gated] or list(plan.layers)
    starts = sorted({0.0, 1.0, *(segment.start for layer in layers for segment in layer.segments)})
    shares = [100 * style_share(layers, tau) for tau in starts]
    axes.fill_between(starts, shares, step="post", color=COLOURS[STYLE], alpha=0.35)
    axes.step(starts, shares, where="post", color=COLOURS[STYLE])
    axes.set(xlim=(0, 1), ylim=(0, 100))
    axes.set_ylabel("style's\nshare, %", color=_INK)
    axes.set_xlabel("progress (0 = pure noise, 1 = clean picture)", color=_INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _mark_steps(axes: Axes, steps: Sequence[float]) -> None:
    """A triangle between the two panels, and a line down, where each step begins."""
    if not steps:
        return
    axes.vlines(steps, 0, 100, colors=_INK, linewidth=0.5, alpha=0.35)
    axes.plot(steps, [104] * len(steps), "v", color=_INK, markersize=4, clip_on=False)
    axes.text(1.015, 1.04, f"{len(steps)} steps", transform=axes.transAxes, fontsize=9, color=_INK, va="center")


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
