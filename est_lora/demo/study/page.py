"""The page: prose that holds whatever was measured, and the figures in it."""

from __future__ import annotations

from textwrap import fill

import numpy as np

from est_lora.demo.model import LORAS
from est_lora.demo.study.figures import Findings
from est_lora.demo.study.measure import BUDGET, PROMPTS, has_both
from est_lora.demo.styles import SIZE

PAGE = "discrepancy.md"
SPREAD, SETTINGS = "discrepancy-spread.png", "discrepancy-probe.png"
SEED = 0
"""The default seed. Any would do as well; it has to be the same one for every pair."""

_PAGE = """\
# How steady the style discrepancy is

`D = 1 - cos(f(subject's probe picture), f(style's probe picture))` is where `beta = auto` comes from: two pictures of one
prompt, seed and sampler, drawn with each LoRA alone. Here is how much `D` depends on the pair, and how much on the way
it is probed: on the embedded model ({side} x {side} pixels), {pairs} pairs ({subjects} subjects x {styles} styles), DDIM.
The reference is {reference_steps} steps at the native side with the prompt "subject's words, style's words".
Everything below is written by one command:

    {command}
{files}
{extractor}

## In short

{in_short}

## Pairs and seeds

{pair_table}

Standard deviation between the pairs: {between:.3f}, without what the seeds leave in these means. Seeds are 0 to {last_seed}.
The last two columns: the share of gated layers x progress in which the other file acts once `beta` is moved by 0.1 from
`D`. It is at most 0.1 / alpha = {most_hands}, which it would be if every layer had its switch within the picture.

![D of every pair, by seed and by prompt]({spread})

## What moves D

Standard deviations. "Alike" is what all pairs do together, "each for itself" the rest, which is what changes the pairs'
order; "pair's share" is the variance between pairs over the sum of it and the variance within.

{spread_table}

Steps are those of the table below at the native side, sides those at {reference_steps} steps; `D` is averaged over the
seeds where it isn't the seed that is varied.

| prompt | D, mean over pairs | deviation between pairs | deviation by seed |
| --- | --- | --- | --- |
{prompt_table}

A prompt that names no colour leaves each picture its own, which an extractor that tells colours takes for a difference;
the row with a colour shows how much of the seed's part that is.

## Which probe

The error is that of one probe (two pictures, one seed) against the reference's mean over the seeds, root mean square
over pairs and seeds; the shift is its mean. The rank correlation is that of the pairs' means over all seeds. Cost is 2
pictures x steps x (side / native)^2, and the budget {budget:g} (half a picture of 28 steps; in brackets what is beyond it).
The last column spends the whole budget on several seeds and takes their mean.

{score_table}

For comparison: one `D` for all pairs, their mean, has the error {constant:.3f}; `beta = 0.5`, what is used without
a measurement, {half:.3f}. Where a probe's error isn't below the first of the two, its `D` tells
less of a pair than one number for all would.

![D by steps, and the error of a probe by its cost]({settings})

## The defaults that follow

{defaults}
"""

_STAND_IN = """\
**The extractor is a stand-in, not DINO.** It is a vision transformer of a million parameters, trained for this study on
the embedded model's own world to tell, from its CLS token, the object ({thing:.0%} right on unseen pictures), the
colour of its main part ({colour:.0%}), how it is filled ({fill:.0%}), outlined ({line:.0%}) and toned ({tone:.0%}), and
the background ({background:.0%}); it never saw what the LoRAs teach.
So the sizes of `D` below say nothing about `D` under DINO, neither its level nor its spread between real LoRAs. Nor do
steps and sides carry over as they are: this model needs few steps, was trained at one side only, and puts one object
into the middle. What should carry over is what needs no extractor: that the seed, a prompt without the trigger words, too
few steps and too small a side change the pictures that are compared, how `D` turns into layers that change hands, and
how the choice is made."""
_COMMAND = "python -m est_lora.demo.study -o docs"
_FILES = """
`FOLDER` has a LoRA of each subject and style, made by `python -m est_lora.demo.train lora "{first}" -o
FOLDER/{name}` and so on.
"""
_GIVEN = """\
The extractor is one that was given, and not the stand-in that this study trains by itself."""

_SPOKEN = {
    "seed": "the seed",
    "prompt, with both trigger words": "the wording of a prompt with both trigger words",
    "prompt, any": "the choice among all prompts",
    "steps": "the steps",
    "side": "the side",
}
"""What is varied, as a sentence has it."""

_IN_SHORT = """\
- Defaults: {steps} steps at {share:g} of the native side, seed {seed}; cost {cost:g} of {budget:g}.
- `D` is {mean:.3f} on average, from {least:.3f} to {most:.3f} by pair; between pairs it has a standard deviation of
  {between:.3f}.
- Within a pair the seed moves it by {by_seed:.3f}, the wording of a prompt with both trigger words by {by_words:.3f}, any
  prompt by {by_prompt:.3f} (standard deviations). {order}
- The default probe is off by {error:.3f}, which is {comparison} the {constant:.3f} of giving all pairs their mean; a
  single probe with the reference's own settings is off by {reference_error:.3f}.
- 0.1 more of `beta` moves {hands} of the gated layers x progress from the subject to the style. The default probe's error
  moves {hands_probe} from one to the other, the reference's with one seed {hands_reference}, and 0.5 instead of `D`
  {hands_half}."""

_DEFAULTS = """\
- **steps: {steps}**, **side: {share:g} of the native side**. It is the probe with the smallest error among the {count}
  within the budget: {error:.3f} at a cost of {cost:g}. With pairs and seeds drawn anew (with repetition) it is the best in
  {wins:.0%} of {resamples} draws, {sureness}.
- **seed: {seed}**, the same for every pair and request, so that a pair has one `D` and one plan. By seed the error of this
  probe goes from {least:.3f} to {most:.3f}; which seeds are the good ones is a property of this model and carries over to no
  other, so none is searched for.
{several}- **prompt: one with the trigger words of both.** {prompt_reason}"""

_SEVERAL = """\
- With more than two pictures: the same budget spent on {seeds} seeds of {steps} steps at {share:g} of the native side, and
  the mean taken, the error is {error_of_seeds:.3f} instead of {error:.3f}: another seed brings more than more steps do. For
  a pair that is used often, a mean over several seeds is worth its time.
"""


def write(found: Findings, told: dict[str, float]) -> str:
    """The whole page.

    Args:
        found: the figures.
        told: what the stand-in tells right; empty where another extractor was given.
    """
    plan = found.plan
    embedded = plan.loras == LORAS
    first, path = next(iter(plan.loras.items()))
    return _PAGE.format(
        side=SIZE,
        command=_COMMAND if embedded else f"{_COMMAND} --loras FOLDER",
        files="" if embedded else _FILES.format(first=first, name=path.name),
        pairs=len(plan.pairs),
        subjects=len(plan.subjects),
        styles=len(plan.styles),
        reference_steps=plan.reference.steps,
        extractor=_STAND_IN.format(side=SIZE, **told) if told else _GIVEN,
        in_short=in_short(found),
        pair_table=_pair_table(found),
        between=found.between,
        last_seed=plan.seeds - 1,
        most_hands=_percent(0.1 / 1.5),
        spread=SPREAD,
        spread_table=_spread_table(found),
        prompt_table=_prompt_table(found),
        budget=BUDGET,
        score_table=_score_table(found),
        constant=found.constant,
        half=found.half,
        settings=SETTINGS,
        defaults=_defaults(found),
    )


def in_short(found: Findings) -> str:
    """The main figures, a point each."""
    best, spreads = found.best, found.spreads
    reference = next(score for score in found.scores if score.probe == found.plan.reference)
    text = _IN_SHORT.format(
        steps=best.probe.steps,
        share=best.probe.side / SIZE,
        seed=SEED,
        cost=best.probe.cost,
        budget=BUDGET,
        mean=found.means.mean(),
        least=found.means.min(),
        most=found.means.max(),
        between=found.between,
        by_seed=spreads["seed"].within,
        by_words=spreads["prompt, with both trigger words"].within,
        by_prompt=spreads["prompt, any"].within,
        order=_order(found),
        error=best.error,
        comparison="less than" if best.error < found.constant else "more than",
        constant=found.constant,
        reference_error=reference.error,
        hands=_percent(found.hands[0.1].mean()),
        hands_probe=_percent(found.hands_probe),
        hands_reference=_percent(found.hands_reference),
        hands_half=_percent(found.hands_half),
    )
    return _bullets(text)


def _order(found: Findings) -> str:
    beyond = [_SPOKEN[name] for name, each in found.spreads.items() if each.within > found.between]
    if not beyond:
        return "Nothing that was varied moves it more than the choice of the pair does."
    *others, last = beyond
    who = f"{', '.join(others)} and {last} move" if others else f"{last} moves"
    return f"Of all that was varied, {who} it more than the choice of the pair does."


def _bullets(text: str) -> str:
    """The points of a list, each wrapped anew."""
    points = [" ".join(point.split()) for point in f"\n{text}".split("\n- ")[1:]]
    return "\n".join(fill(f"- {point}", 120, subsequent_indent="  ", break_on_hyphens=False) for point in points)


def _pair_table(found: Findings) -> str:
    rows = zip(found.plan.pairs, found.means, found.seed_deviation, found.hands[-0.1], found.hands[0.1])
    return _table(
        ["subject", "style", "D", "deviation by seed", "beta - 0.1", "beta + 0.1"],
        [
            [pair.subject, pair.style, f"{mean:.3f}", f"{deviation:.3f}", _percent(less), _percent(more)]
            for pair, mean, deviation, less, more in rows
        ],
    )


def _spread_table(found: Findings) -> str:
    rows = [["pair", str(len(found.plan.pairs)), f"{found.between:.3f}", "", "", ""]]
    for name, spread in found.spreads.items():
        share = found.between**2 / (found.between**2 + spread.within**2)
        figures = [f"{value:.3f}" for value in (spread.within, spread.common, spread.own)]
        rows.append([name, str(spread.levels), *figures, f"{share:.0%}"])
    return _table(["varied", "values", "moves D by", "alike", "each for itself", "pair's share"], rows)


def _prompt_table(found: Findings) -> str:
    columns = zip(found.plan.prompts, found.by_prompt.T, found.deviation_by_prompt)
    rows = []
    for name, column, deviation in columns:
        words = PROMPTS[name].format(subject="*subject*", style="*style*")
        rows.append(f"| {words} | {column.mean():.3f} | {column.std(ddof=1):.3f} | {deviation:.3f} |")
    return "\n".join(rows)


def _score_table(found: Findings) -> str:
    rows = []
    for score in found.scores:
        probe = score.probe
        row = [
            str(probe.side),
            str(probe.steps),
            f"{probe.cost:g}" if score.affordable else f"({probe.cost:g})",
            f"{score.shift:+.3f}",
            f"{score.error:.3f}",
            f"{score.order:.2f}",
            f"{score.error_of_seeds:.3f} ({score.seeds})" if score.affordable else "",
        ]
        rows.append([f"**{cell}**" for cell in row] if score is found.best else row)
    head = ["side", "steps", "cost", "shift", "error", "pairs' rank correlation", "error of several seeds (how many)"]
    return _table(head, rows)


def _defaults(found: Findings) -> str:
    best = found.best
    reason = "A prompt without them shows little of what the two files were trained for"
    if neither := _mean_with(found, [name for name in found.plan.prompts if "{" not in PROMPTS[name]]):
        both = _mean_with(found, [name for name in found.plan.prompts if has_both(name)])
        reason += f": `D` is {neither:.3f} on average with the words of neither, and {both:.3f} with those of both"
    text = _DEFAULTS.format(
        steps=best.probe.steps,
        share=best.probe.side / SIZE,
        count=sum(score.affordable for score in found.scores),
        error=best.error,
        cost=best.probe.cost,
        wins=found.wins,
        resamples=1000,
        sureness="so the choice is firm" if found.wins > 0.9 else "so others of the table come close",
        seed=SEED,
        least=found.seed_errors.min(),
        most=found.seed_errors.max(),
        several=_several(found),
        prompt_reason=f"{reason}.",
    )
    return _bullets(text)


def _several(found: Findings) -> str:
    best = found.best_of_seeds
    if best.seeds == 1:
        return ""
    return _SEVERAL.format(
        seeds=best.seeds,
        steps=best.probe.steps,
        share=best.probe.side / SIZE,
        error_of_seeds=best.error_of_seeds,
        error=found.best.error,
    )


def _mean_with(found: Findings, prompts: list[str]) -> float:
    """`D` over pairs, seeds and these prompts; 0 where there are none."""
    columns = [found.by_prompt[:, found.plan.prompts.index(name)] for name in prompts]
    return float(np.mean(columns)) if columns else 0.0


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
