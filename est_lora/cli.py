"""The command line: `est-lora demo`, `est-lora inspect`, `est-lora measure`, `est-lora generate`."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from est_lora import __version__
from est_lora.command import Parser, ended, output_folder, whole
from est_lora.config import FIELDS, FILES, FusionConfig
from est_lora.errors import EstLoraError, quote, reason

_SIZE = re.compile(r"(\d{1,5})(?:x(\d{1,5}))?", re.ASCII)
_SEEDS = re.compile(r"\s*(\d{1,20})(?:-(\d{1,20}))?\s*", re.ASCII)
_MOST_SEED, _MOST_PICTURES = 2**63, 100_000
_NEEDS_DEMO = "needs packages that aren't installed ({}): pip install 'est-lora[demo]'"
_NEEDS_LAB = _NEEDS_DEMO.replace("[demo]", "[lab]")
_LAB = "est-lora-lab"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns what `command.ended` does."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would remark on packages that nobody here needs
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="est-lora: %(message)s", level=logging.WARNING)
    return ended("est-lora", lambda: _run(_parser().parse_args(arguments)))


def _run(args: argparse.Namespace) -> None:
    args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="est-lora",
        allow_abbrev=False,
        description="Fuses a subject LoRA with a style LoRA while the picture is made: in each layer, at each noise"
        " level, a gate picks one of the two.",
    )
    parser.add_argument("--version", action="version", version=f"est-lora {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    demo = commands.add_parser("demo", help="draw a contact sheet with the embedded model", allow_abbrev=False)
    demo.description = "Draws the same seeds with the embedded model: base, each LoRA alone, their sum, EST-LoRA."
    _add_output(demo, "est-lora-demo")
    demo.add_argument("--seed", default="0", metavar="N", help="seed of the first picture (default 0)")
    demo.set_defaults(run=_demo)

    lab = commands.add_parser("lab", help="how well fusions do, measured with the embedded model", allow_abbrev=False)
    lab.description = "Trains LoRAs, draws with them by every method, judges the pictures, and reports."
    parts = lab.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    lab_run = parts.add_parser("run", help="make all of it, or go on with it", allow_abbrev=False)
    lab_run.add_argument("-o", "--output", default=_LAB, metavar="DIR", help=f"where it is kept (default {_LAB})")
    lab_run.add_argument("--quick", action="store_true", help="a smaller one, of a quarter of an hour, that tells less")
    jobs = str(os.cpu_count() or 1)
    lab_run.add_argument(
        "--jobs", default=jobs, metavar="N", help=f"how many processes, about 1 GB each (default {jobs})"
    )
    lab_run.set_defaults(run=_lab_run)
    lab_report = parts.add_parser("report", help="write what was found", allow_abbrev=False)
    lab_report.add_argument("folder", nargs="?", default=_LAB, metavar="DIR", help=f"of the run (default {_LAB})")
    lab_report.add_argument("-o", "--output", default="docs", metavar="DIR", help="folder of the page (default docs)")
    lab_report.set_defaults(run=_lab_report)

    inspect = commands.add_parser("inspect", help="what two files hold, and what they will do", allow_abbrev=False)
    inspect.description = "Shows what is in two LoRA files and which of them acts where and when."
    for name in FILES:
        inspect.add_argument(name, metavar=name.upper(), help=f"the {name}'s .safetensors file")
    inspect.add_argument(
        "--model", metavar="PATH", help="a model (folder or file) whose weights DoRA, (IA)^3, OFT and GLoRA depend on"
    )
    inspect.add_argument("--plot", metavar="MAP.png", help="also draw the gate map")
    inspect.add_argument("--json", action="store_true", help="print JSON instead of the table")
    _add_knobs(inspect)
    inspect.set_defaults(run=_inspect)

    measure = commands.add_parser("measure", help="how different two files' pictures look", allow_abbrev=False)
    measure.description = (
        "Prints the style discrepancy of two LoRA files, which beta is by default: two pictures are drawn, one with each"
        " LoRA alone, and compared. It is remembered."
    )
    for name in FILES:
        measure.add_argument(name, metavar=name.upper(), help=f"the {name}'s .safetensors file")
    _add_model(measure)
    measure.add_argument(
        "--prompt", default="", metavar="TEXT", help="what to draw if not both files name words of their own"
    )
    _add_extractor(measure)
    measure.add_argument("--seed", metavar="N", help="seed of both pictures (default 0)")
    measure.add_argument("--side", metavar="N", help="of the square pictures, pixels (default: the model's own)")
    measure.add_argument("--steps", metavar="N", help="sampling steps (default 7)")
    measure.add_argument("--scheduler", metavar="NAME", help="e.g. euler, dpm++2m, ddim (default euler)")
    measure.add_argument("--guidance", metavar="X", help="guidance scale (default 7)")
    measure.add_argument("--again", action="store_true", help="measure also what is remembered")
    _add_device(measure)
    measure.add_argument("-o", "--output", metavar="FILE.png", help="also save both pictures there, side by side")
    measure.set_defaults(run=_measure)

    generate = commands.add_parser("generate", help="make pictures with a model of yours", allow_abbrev=False)
    generate.description = "Makes pictures with a Stable Diffusion 1, 2 or XL model: one file, or diffusers' folder."
    _add_model(generate)
    for name in FILES:
        generate.add_argument(f"--{name}", required=True, metavar="FILE", help=f"the {name}'s .safetensors file")
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="what to draw")
    generate.add_argument("--negative", default="", metavar="TEXT", help="what to keep away from")
    generate.add_argument("--steps", default="28", metavar="N", help="sampling steps (default 28)")
    generate.add_argument("--guidance", default="7", metavar="X", help="guidance scale (default 7)")
    generate.add_argument("--seed", metavar="N", help="seed; the next picture takes the next (default 0)")
    generate.add_argument("--count", metavar="N", help="how many pictures (default 1)")
    generate.add_argument("--seeds", metavar="LIST", help="instead of these two: seeds and ranges, e.g. 3,7,11-14")
    generate.add_argument("--size", metavar="WxH", help="pixels, e.g. 768x512 or 512 (default: the model's own)")
    generate.add_argument("--scheduler", metavar="NAME", help="e.g. euler, dpm++2m, ddim (default: the model's own)")
    _add_device(generate)
    _add_extractor(generate)
    _add_output(generate, "est-lora-out")
    _add_knobs(generate)
    generate.set_defaults(run=_generate)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="PATH", help="a .safetensors file or diffusers' folder")
    parser.add_argument(
        "--config",
        metavar="FOLDER",
        help="for a file: a folder in diffusers' format to configure it by, without network",
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="NAME", help="e.g. cuda, mps, cpu (default: the fastest there is)")
    parser.add_argument("--dtype", metavar="TYPE", help="float32, float16 or bfloat16 (default: float16 on cuda)")


def _add_extractor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--extractor", default="dino", metavar="NAME", help="what beta is measured with: dino or clip (default dino)"
    )
    parser.add_argument(
        "--weights", metavar="FOLDER", help="the folder of its weights (default: DINO's, fetched once, 87 MB)"
    )


def _add_output(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "-o", "--output", default=default, metavar="DIR", help=f"folder for the pictures (default {default})"
    )


def _add_knobs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("knobs of the fusion")
    for field in FIELDS:
        if field.key not in FILES and not field.webui:
            explained = f"{field.help} ({field.range}; default {field.default})".replace("%", "%%")
            metavar = "WORD" if field.choices else "X"
            group.add_argument(field.flag, dest=field.key, default=None, metavar=metavar, help=explained)


def _config(args: argparse.Namespace) -> FusionConfig:
    given = {field.key: getattr(args, field.key) for field in FIELDS if not field.webui}
    return FusionConfig.of({key: value for key, value in given.items() if value is not None})


def _demo(args: argparse.Namespace) -> None:
    seed, folder = whole("seed", args.seed, 0, 2**63), output_folder(args.output)
    try:
        from est_lora.demo.show import demo
    except ImportError as error:
        raise EstLoraError("The demo " + _NEEDS_DEMO.format(error.name)) from error
    for path in demo(folder, seed):
        print(path)


def _lab_run(args: argparse.Namespace) -> None:
    folder = output_folder(args.output)
    try:
        from est_lora.lab import report
        from est_lora.lab.folder import open_lab
        from est_lora.lab.protocol import FULL, QUICK
        from est_lora.lab.run import run
    except ImportError as error:
        raise EstLoraError("The lab " + _NEEDS_LAB.format(error.name)) from error
    lab = open_lab(folder, QUICK if args.quick else FULL)
    run(lab, whole("jobs", args.jobs, 1, 1024))
    for path in report.write(lab, folder / "report"):
        print(path)


def _lab_report(args: argparse.Namespace) -> None:
    try:
        from est_lora.lab import report
        from est_lora.lab.folder import reopen_lab
    except ImportError as error:
        raise EstLoraError("The lab " + _NEEDS_LAB.format(error.name)) from error
    for path in report.write(reopen_lab(Path(args.folder)), output_folder(args.output)):
        print(path)


def _inspect(args: argparse.Namespace) -> None:
    try:
        from est_lora import report
        from est_lora.gate import FusionPlan
        from est_lora.lora import LoraFile, ModelFile
    except ImportError as error:
        raise EstLoraError("inspect " + _NEEDS_DEMO.format(error.name)) from error
    config = _config(args)
    subject, style = (LoraFile.load(path) for path in config.pair())
    if args.model:
        weight_of = ModelFile(args.model).weight_of
        subject, style = (file.on("unet", weight_of) for file in (subject, style))
    plan = FusionPlan.of(subject, style, config)
    if args.plot:
        _save_map(plan, Path(args.plot))
    if args.json:
        print(json.dumps(report.to_json(plan), indent=1, allow_nan=False))
        for remark in plan.remarks:
            print(f"est-lora: {remark}", file=sys.stderr)
    else:
        print(report.table(plan))


def _save_map(plan: Any, path: Path) -> None:
    try:
        from est_lora.plot import gate_map

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of letters in a file's name that the font doesn't have
            gate_map(plan).savefig(path)
    except ImportError as error:
        raise EstLoraError("The gate map " + _NEEDS_DEMO.format(error.name)) from error
    except (OSError, ValueError, RuntimeError) as error:  # no such folder, or an ending that matplotlib can't write
        raise EstLoraError(f"The gate map can't be written to {quote(path)}: {reason(error)}") from error


def _measure(args: argparse.Namespace) -> None:
    wishes: dict[str, Any] = {
        name: whole(name, getattr(args, name), *bounds)
        for name, bounds in {"seed": (0, _MOST_SEED), "side": (8, 2048, 8), "steps": (1, 150)}.items()
        if getattr(args, name) is not None
    }
    if args.scheduler is not None:
        wishes["sampler"] = args.scheduler
    if args.guidance is not None:
        wishes["guidance"] = _guidance(args.guidance)
    output = _output_file(args)
    try:
        from est_lora.hosts.measuring import measure_files
        from est_lora.stored import write_whole
    except ImportError as error:
        raise EstLoraError("measure " + _NEEDS_DEMO.format(error.name)) from error
    importlib.import_module("est_lora.demo.model")
    measured = measure_files(
        Path(args.model),
        None if args.config is None else Path(args.config),
        args.subject,
        args.style,
        wishes=wishes,
        device=args.device,
        dtype=args.dtype,
        extractor=args.extractor,
        folder=None if args.weights is None else Path(args.weights),
        prompt=args.prompt,
        again=args.again,
    )
    if output is not None:
        if measured.png is None:
            raise EstLoraError("This is remembered, but its pictures aren't kept any more: add --again to draw them.")
        write_whole(output, measured.png)
    known = "remembered" if measured.remembered else "measured"
    where = "aren't kept" if measured.pictures is None else f"are in {quote(measured.pictures)}"
    print(f"est-lora: {known}; the pictures {where}.", file=sys.stderr)
    print(f"{measured.value:.6f}")


def _output_file(args: argparse.Namespace) -> Path | None:
    """Where a picture is to go, as far as it can be known that it can."""
    if args.output is None:
        return None
    path = Path(args.output)
    if path.suffix != ".png" or path.is_dir() or not path.parent.is_dir():
        raise EstLoraError(f"The pictures can't go to {quote(path)}: give a .png file in a folder that is there.")
    return path


def _generate(args: argparse.Namespace) -> None:
    fusion, folder = _config(args), output_folder(args.output)
    steps, guidance = whole("steps", args.steps, 1, 1000), _guidance(args.guidance)
    seeds, size = _seeds(args), _size(args.size)
    try:
        from est_lora.hosts.generate import Request, generate
    except ImportError as error:
        raise EstLoraError("generate " + _NEEDS_DEMO.format(error.name)) from error
    importlib.import_module("est_lora.demo.model")  # diffusers loads a class of ours only where it is imported already
    request = Request(
        model=Path(args.model),
        configs=None if args.config is None else Path(args.config),
        fusion=fusion,
        prompt=args.prompt,
        negative=args.negative,
        steps=steps,
        guidance=guidance,
        seeds=seeds,
        size=size,
        scheduler=args.scheduler,
        device=args.device,
        dtype=args.dtype,
        folder=folder,
        extractor=args.extractor,
        weights=None if args.weights is None else Path(args.weights),
    )
    for output in generate(request, lambda text: print(f"est-lora: {text}", file=sys.stderr)):
        if output.found:
            print(f"est-lora: {quote(output.path)} is there already.", file=sys.stderr)
        print(output.path, flush=True)


def _seeds(args: argparse.Namespace) -> Sequence[int]:
    """The seeds asked for, each once."""
    if args.seeds is None:
        seed = 0 if args.seed is None else whole("seed", args.seed, 0, _MOST_SEED)
        count = 1 if args.count is None else whole("count", args.count, 1, _MOST_PICTURES)
        return range(seed, seed + count)
    if args.seed is not None or args.count is not None:
        raise EstLoraError("--seeds says it all: leave --seed and --count out, or leave --seeds out.")
    seeds: dict[int, None] = {}
    for part in args.seeds.split(","):
        found = _SEEDS.fullmatch(part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not first <= last <= _MOST_SEED:
            raise EstLoraError(
                f"--seeds can't be {quote(args.seeds)}: it is a list of whole numbers and ranges of them up to"
                f" {_MOST_SEED}, as in 3,7,11-14."
            )
        if len(seeds) + last - first >= _MOST_PICTURES:
            raise EstLoraError(f"--seeds {quote(args.seeds)} is more than {_MOST_PICTURES} pictures: ask for fewer.")
        seeds |= dict.fromkeys(range(first, last + 1))
    return tuple(seeds)


def _guidance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise EstLoraError(f"--guidance can't be {quote(text)}: it is a number from 0 to 100.")
    return value


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = _SIZE.fullmatch(text)
    width, height = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not all(8 <= side <= 8192 and side % 8 == 0 for side in (width, height)):
        raise EstLoraError(f"--size can't be {quote(text)}: it is WIDTHxHEIGHT or SIDE in pixels, multiples of 8.")
    return width, height
