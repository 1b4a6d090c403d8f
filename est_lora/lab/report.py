"""The report: a page with the gates above the table, plots, and grids for the eye; every figure in it is from the records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from est_lora.lab import plots
from est_lora.lab.findings import SHIPPED, WHOLE, Findings, Gate, Interval, Score
from est_lora.lab.folder import Lab
from est_lora.lab.methods import HALVES

PAGE = "lab.md"

_PAGE = """\
# Does the gate balance subject and style?

Measured on the embedded model (64 x 64 pixels), in a world that is drawn by code, so that of every subject in every
style the true picture exists. {pairs} pairs ({subjects} x {styles}), each with {trainings}, {seeds} pictures of {steps} steps for each pair, method and guidance scale.
{made}

It is a toy: what holds here may not hold for SDXL. Two classifiers say whether a picture has the right subject and the
right style; they were trained on drawn pictures and on such that only look right: the colours without the parts, the parts
in wrong colours, a part missing, half an object in the style, nearly the style. The grids show what they judged.

## Before methods are compared

{gates}

{may_rank}

{comparison}

## What half a file can do

A method that gives each layer or each step to one of two files leaves each of them about half of what it did. So often does a
file draw alone what it teaches: whole; in half of its layers, chosen by chance; in half of the time, a subject in the first
half, a style in the second.

{halves}

## For the eye

{grids}

## The ceiling, pair by pair

How often one LoRA that was taught a pair's true pictures has the subject, and the style.

{ceilings}

## The LoRAs

{loras}

{discrepancies}
"""


_TRAINED = """{trainings} pairs of LoRAs
from different training seeds, ranks and scales"""
_EMBEDDED = "the LoRAs that are part of this project"
_FULLY = """\
What is compared was fixed in a [file](../est_lora/lab/protocol.json) before this run; smaller ones came before it, to get the
gates below to hold, and showed which methods do well. All of this, every figure included, is written by two commands:

    est-lora lab run
    est-lora lab report -o docs"""
_QUICKLY = """\
This is the quick run, `est-lora lab run --quick`, which tells less than the full one: what it trains, it trains for so short
a time that not all of the gates below are likely to hold."""

_COLUMNS_MEAN = """\
Shares of pictures, with 95 % intervals over pairs, each with the pictures of all its trainings and sampling seeds. Parts:
the share of the subject's parts that are there in their colours. Distance: to the true picture, on its foreground, wherever
the object stands (0 to 1). The last column is what a method has more of both right than the plain sum."""

_TRIED = """What LoRAs alone lacked was looked at picture by picture: a missing part, one eye in place of two, a tone too near to the
usual one. More pictures of what is taught helped, and a larger share of them in each batch, parts of at least eight pixels,
tones far from the usual one, and more steps for a subject of rank 4; higher ranks did not. What helps most is a guidance
scale above 1: without it a model as small as this one leaves parts out."""

_SAVED: dict[str, dict[str, Any]] = {".png": {"metadata": {"Software": None}}, ".jpg": {}}
"""How plots and grids are saved; a grid is of so many pictures that a PNG would be three times as large."""


def write(lab: Lab, folder: Path) -> list[Path]:
    """Writes the page and its pictures into a folder; returns their paths.

    Raises:
        KeyError: the run isn't finished.
    """
    found = Findings.of(lab)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = dict(_figures(lab, found))
    for name, figure in drawn.items():
        figure.savefig(folder / name, **_SAVED[Path(name).suffix])
    (folder / PAGE).write_text(page(lab, found, list(drawn)), encoding="utf-8")
    return [folder / PAGE, *(folder / name for name in drawn)]


def _figures(lab: Lab, found: Findings) -> Iterator[tuple[str, plots.Figure]]:
    for guidance, scores in found.scores.items():
        if not found.shut(guidance):
            yield f"lab-methods-{guidance:g}.png", plots.subject_and_style(scores)
            if swept := plots.sweep(scores):
                yield f"lab-beta-{guidance:g}.png", swept
        yield f"lab-grid-{guidance:g}.jpg", plots.grid(lab, guidance, list(lab.protocol.methods))


def _number(words: Sequence[str], kind: str) -> str:
    return f"{len(words)} {kind}" + ("s" if len(words) > 1 else "")


def page(lab: Lab, found: Findings, pictures: list[str]) -> str:
    """The page's text; `pictures` are the names of its figures."""
    protocol = lab.protocol
    return _PAGE.format(
        pairs=len(protocol.subjects) * len(protocol.styles),
        subjects=_number(protocol.subjects, "subject"),
        styles=_number(protocol.styles, "style"),
        trainings=_EMBEDDED if protocol.embedded else _TRAINED.format(trainings=len(protocol.trainings)),
        made=_QUICKLY if protocol.embedded else _FULLY,
        seeds=protocol.sampling_seeds,
        steps=protocol.steps,
        gates=_gate_table(found.gates),
        may_rank=_may_rank(found, tried=not protocol.embedded),
        comparison=_comparison(found, pictures),
        halves=_half_table(found),
        grids="\n\n".join(f"![{name}]({name})" for name in pictures if "grid" in name),
        ceilings=_ceiling_table(found),
        loras=_lora_table(found),
        discrepancies=_discrepancy_table(found),
    )


def _gate_table(gates: list[Gate]) -> str:
    rows = []
    for gate in gates:
        guidance = "any" if gate.guidance is None else f"{gate.guidance:g}"
        for name, figure in gate.figures.items():
            holds = "yes" if figure >= gate.least else "**no**"
            rows.append([gate.name, guidance, name, f"{gate.least:g}", f"{figure:.3f}", holds])
    return _table(["gate", "guidance", "what", "at least", "measured", "holds"], rows)


def _table(columns: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))


def _may_rank(found: Findings, *, tried: bool) -> str:
    parts = []
    for guidance in found.scores:
        if shut := ", ".join(dict.fromkeys(gate.name for gate in found.shut(guidance))):
            parts.append(f"- **Guidance {guidance:g}: not all of them hold ({shut}), so no method is ranked.**")
        else:
            parts.append(f"- Guidance {guidance:g}: all of them hold, so methods are compared.")
    if tried and any(map(found.shut, found.scores)):
        parts += ["", _TRIED]
    return "\n".join(parts)


def _comparison(found: Findings, pictures: list[str]) -> str:
    ranked = {guidance: scores for guidance, scores in found.scores.items() if not found.shut(guidance)}
    if not ranked:
        return "What was drawn is below, for the eye."
    parts = ["## In short", ""]
    for guidance, scores in ranked.items():
        parts += [f"- {_in_short(guidance, scores)}", f"- {_of_halves(guidance, found.alone[guidance])}"]
    parts += ["", "## The comparison", "", _COLUMNS_MEAN]
    for guidance, scores in ranked.items():
        parts += ["", f"### Guidance {guidance:g}", "", _score_table(scores), ""]
        parts += [f"![{name}]({name})" for name in pictures if name.endswith(f"-{guidance:g}.png")]
    return "\n".join(parts)


def _in_short(guidance: float, scores: list[Score]) -> str:
    """How what is shipped does beside each other method: more where the whole interval says so, or less, or neither."""
    shipped = next(score for score in scores if score.method == SHIPPED)
    beside: dict[str, list[str]] = {"more than": [], "less than": [], "not told apart from": []}
    for score in sorted(scores, key=lambda score: -score.lead.mean):
        if score is not shipped:
            told = "more than" if score.lead.low > 0 else "less than" if score.lead.high < 0 else "not told apart from"
            beside[told].append(f"{score.method} ({score.lead.mean:+.2f})")
    compared = "; ".join(f"{told} {', '.join(methods)}" for told, methods in beside.items() if methods)
    return (
        f"Guidance {guidance:g}: with the extension's defaults ({SHIPPED}) {shipped.both.mean:.2f} of the pictures have both"
        f" right. That is {compared}."
    )


def _of_halves(guidance: float, alone: dict[str, dict[str, float]]) -> str:
    """Why that may be."""
    whole, layers, time = (np.mean([shares[of] for shares in alone.values()]) for of in (WHOLE, *HALVES))
    return (
        f"Guidance {guidance:g}: alone, files draw what they teach in {whole:.2f} of the pictures; with half of their layers"
        f" left out, by chance, in {layers:.2f}, and with half of the time left out in {time:.2f}. That is what routing"
        " leaves of them."
    )


def _half_table(found: Findings) -> str:
    columns = [f"{name}, guidance {guidance:g}" for guidance in found.alone for name in (WHOLE, *HALVES)]
    rows = [
        [words, *(f"{share:.2f}" for alone in found.alone.values() for share in alone[words].values())]
        for words in next(iter(found.alone.values()))
    ]
    return _table(["teaches", *columns], rows)


def _score_table(scores: list[Score]) -> str:
    columns = ["subject", "style", "harmonic mean", "both right", "parts", "distance", "both, beyond the sum"]
    rows = []
    for score in sorted(scores, key=lambda score: -score.both.mean):
        values = (score.subject, score.style, score.harmonic, score.both, score.parts, score.distance)
        rows.append([score.method, *map(_told, values), _told(score.gain, "+.2f")])
    return _table(["method", *columns], rows)


def _told(interval: Interval, spelt: str = ".2f") -> str:
    return f"{interval.mean:{spelt}} ({interval.low:{spelt}} ... {interval.high:{spelt}})"


def _ceiling_table(found: Findings) -> str:
    columns = [f"{what}, guidance {guidance:g}" for guidance in found.scores for what in ("subject", "style")]
    rows = [
        [both, *(f"{share:.2f}" for shares in by_guidance.values() for share in shares)]
        for both, by_guidance in found.ceilings.items()
    ]
    return _table(["pair", *columns], rows)


def _lora_table(found: Findings) -> str:
    rows = [
        [name, f"{lora['words']}", f"{lora['rank']}", f"{lora['alpha']:g}", f"{lora['share']:.2%}"]
        for name, lora in found.loras.items()
    ]
    return _table(["file", "teaches", "rank", "alpha", "energy of the update by that of the weights"], rows)


def _discrepancy_table(found: Findings) -> str:
    if not found.discrepancies:
        return ""
    rows = []
    for pair in dict.fromkeys(key[:2] for key in found.discrepancies):
        values = [value for key, value in found.discrepancies.items() if key[:2] == pair]
        rows.append([*pair, ", ".join(f"{value:.3f}" for value in values)])
    return "Style discrepancies, by the training of the pair:\n\n" + _table(["subject", "style", "D"], rows)
