"""What was measured, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.tables import place


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG: one panel a UNet, one group of bars a way, one bar a rank, as long as `x no LoRA`.

    Args:
        result: with pictures in it.
        path: the file.
    """
    from matplotlib.figure import Figure

    rows = [row for row in result["pictures"] if row["way"]]
    titles, ranks = (list(dict.fromkeys(row[name] for row in rows)) for name in ("what", "rank"))
    unets = list(dict.fromkeys(row["unet"] for row in rows))
    figure = Figure(figsize=(9, len(unets) * (1 + 0.18 * len(titles) * (len(ranks) + 1))), layout="constrained")
    height = 1 / (len(ranks) + 1)
    for panel, unet in zip(figure.subplots(len(unets), squeeze=False)[:, 0], unets):
        for number, rank in enumerate(ranks):
            mine = [row for row in rows if (row["unet"], row["rank"]) == (unet, rank)]
            places = [titles.index(row["what"]) + (number - (len(ranks) - 1) / 2) * height for row in mine]
            values = [row["ratio"]["value"] for row in mine]
            apart = [
                [max(row["ratio"]["value"] - row["ratio"]["low"], 0) for row in mine],
                [max(row["ratio"]["high"] - row["ratio"]["value"], 0) for row in mine],
            ]
            bars = panel.barh(places, values, height, xerr=apart, label=f"rank {rank}", error_kw={"linewidth": 0.8})
            panel.bar_label(bars, [f"{value:.2f}" for value in values], padding=6, fontsize=7)
        panel.set_yticks(range(len(titles)), titles)
        panel.invert_yaxis()
        panel.axvline(1, color="black", linewidth=0.8)
        panel.margins(x=0.08)
        panel.set_xlabel(f"{unet}: time of a picture of {result['settings']['steps']} steps, x no LoRA")
        panel.legend(fontsize=8)
    figure.suptitle(place(result["machine"]), fontsize=9)
    figure.savefig(path, dpi=120)
