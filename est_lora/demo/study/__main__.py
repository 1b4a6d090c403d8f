"""Measures how steady the style discrepancy is, and writes the page about it.

    python -m est_lora.demo.study -o docs
    python -m est_lora.demo.study -o docs --loras FOLDER

`FOLDER` has LoRAs of more of the demo's subjects and styles than the two and two that are embedded (`python -m
est_lora.demo.train lora` makes them). A run that was interrupted goes on where it was: the features of what is drawn are kept in the cache.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import transformers

from est_lora.demo.model import LORAS, load_pipeline
from est_lora.demo.study import extractor, page, plots
from est_lora.demo.study.figures import Findings
from est_lora.demo.study.measure import Bench, Plan, loras_in, quick
from est_lora.demo.styles import SIZE
from est_lora.discrepancy import open_extractor
from est_lora.errors import EstLoraError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m est_lora.demo.study", description="Measures how steady the style discrepancy is."
    )
    cache = Path.home() / ".cache" / "est-lora-study"
    result.add_argument("-o", "--output", type=Path, default=Path("docs"), help="folder of the page and its plots")
    result.add_argument(
        "--extractor", type=Path, metavar="FOLDER", help="an extractor; the trained stand-in if not given"
    )
    result.add_argument(
        "--loras",
        type=Path,
        metavar="FOLDER",
        help="LoRAs of the demo's subjects and styles, called mipo.safetensors and so on; the embedded ones if not given",
    )
    result.add_argument("--cache", type=Path, default=cache, help="where the stand-in and what was drawn are kept")
    result.add_argument("--quick", action="store_true", help="a miniature that tells nothing, to see that it runs")
    return result


def main(argv: list[str] | None = None) -> int:
    """Runs the command line."""
    args = parser().parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # the models are so small that threads cost more than they bring
    try:
        study(args)
    except EstLoraError as error:
        print(f"The study can't be made: {error}", file=sys.stderr)
        return 2
    return 0


def study(args: argparse.Namespace) -> None:
    """Measures, and writes the page and its plots.

    Raises:
        EstLoraError: the extractor can't be read, or there are no two pairs.
    """
    loras = loras_in(args.loras) if args.loras else LORAS
    plan = quick(loras) if args.quick else Plan(loras)
    args.cache.mkdir(parents=True, exist_ok=True)
    steps = 20 if args.quick else extractor.STEPS
    folder = args.extractor or args.cache / f"stand-in-{SIZE}px-{steps}"
    if args.extractor is None and not extractor.is_there(folder):
        print(f"There is no stand-in extractor in {folder} yet: it is trained, which takes minutes.")
        extractor.train(folder, steps)
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    with open_extractor("dino", folder=folder, cache=None) as opened:
        table = Bench(pipe, opened.features, args.cache, opened.identity).measure(plan)
    found = Findings.of(table, plan)
    args.output.mkdir(parents=True, exist_ok=True)
    for path, figure in {page.SPREAD: plots.spread(table, found), page.SETTINGS: plots.settings(found)}.items():
        figure.savefig(args.output / path, metadata={"Software": None})
        print(args.output / path)
    (args.output / page.PAGE).write_text(page.write(found, extractor.told(folder)), encoding="utf-8")
    print(args.output / page.PAGE)
    print(page.in_short(found))


if __name__ == "__main__":
    sys.exit(main())
