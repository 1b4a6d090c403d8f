"""`python -m benchmarks`: measures, prints Markdown tables, and writes them, the same as JSON, and a chart into a folder."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import diffusers
import torch
from tqdm import tqdm

from benchmarks import measure
from benchmarks.bounds import judged
from benchmarks.chart import draw
from benchmarks.machine import cpu
from benchmarks.tables import markdown
from benchmarks.unets import SIZES, Size, attention_projections, build, write_pair
from benchmarks.ways import WAYS
from est_lora import __version__
from est_lora.command import Parser, ended, output_folder, whole
from est_lora.errors import EstLoraError, quote, reason

_DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
_LATENTS = {"cpu": 32, "cuda": 128}  # 256 x 256 and 1024 x 1024 pixels
_PICTURES = {"cpu": 1, "cuda": 5}
_LEFT_OUT = "0: leave this part out"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns what `command.ended` does."""
    return ended("benchmark", lambda: _run(_parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="benchmark",
        allow_abbrev=False,
        description="Times whole pictures of a UNet without LoRA, with est-lora, and with other ways of applying two LoRAs,"
        " and the planning of a pair of files. Weights and LoRAs are random; nothing is downloaded.",
    )

    def add(name: str, help: str, default: Sequence[str] | str | None = None, **more: Any) -> None:
        shown = "" if default is None else f" (default {default if isinstance(default, str) else ' '.join(default)})"
        parser.add_argument(f"--{name}", default=default, help=help + shown, **{"metavar": "N", **more})

    add("unets", ", ".join(SIZES), ["sd15", "sdxl"], nargs="+", metavar="NAME")
    add("ranks", "ranks of the LoRAs", ["8", "32", "128"], nargs="+")
    add("ways", "ways of applying LoRAs that are timed", list(WAYS), nargs="+", metavar="NAME")
    add("steps", f"steps of a picture; {_LEFT_OUT}", "28")
    add("pictures", f"how often each picture is made {_by_device(_PICTURES)}")
    add(
        "together",
        "how many ways are timed, and are in memory, at a time; the fewer, the nearer to the bare calls",
        "2",
    )
    add("repeats", f"timed plans; {_LEFT_OUT}", "8")
    add("latents", f"side of the latents {_by_device(_LATENTS)}")
    add("batch", "latents a call, 2 as guidance needs", "2")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu or cuda (default cpu)")
    parser.add_argument(
        "--dtype", metavar="TYPE", help=f"{', '.join(_DTYPES)} (default: float16 on cuda, else float32)"
    )
    add(
        "clock",
        "wall, or cpu: only what this process uses of one thread, however busy the machine is",
        "wall",
        metavar="NAME",
    )
    parser.add_argument("-o", "--output", default="est-lora-benchmark", metavar="DIR", help="where the results go")
    return parser


def _by_device(values: Mapping[str, int]) -> str:
    return f"(default {values['cpu']}; on cuda {values['cuda']})"


def _run(args: argparse.Namespace) -> None:
    sizes = [_choice("unets", name, SIZES) for name in dict.fromkeys(args.unets)]
    ranks = [whole("ranks", text, 1, 1024) for text in dict.fromkeys(args.ranks)]
    for name in args.ways:
        _choice("ways", name, WAYS)
    asked = [name for name in WAYS if name in args.ways]
    left_out = [WAYS[name].title for name in asked if WAYS[name].missing]
    steps, repeats = whole("steps", args.steps, 0, 1000), whole("repeats", args.repeats, 0, 10_000)
    if not steps and not repeats:
        raise EstLoraError("With --steps 0 and --repeats 0 there is nothing to measure: leave one of them out.")
    together = whole("together", args.together, 1, 100)
    batch = whole("batch", args.batch, 1, 64)
    device = _device(args.device)
    ways = [name for name in asked if not WAYS[name].missing and (device.type == "cuda" or not WAYS[name].on_gpu)]
    pictures = whole("pictures", args.pictures or str(_PICTURES[device.type]), 1, 1000)
    latents = whole("latents", args.latents or str(_LATENTS[device.type]), 8, 512, multiple=8)
    _choice("clock", args.clock, measure.CLOCKS)
    if args.clock == "cpu" and (device.type != "cpu" or torch.get_num_threads() != 1):
        raise EstLoraError("--clock cpu says how long something takes on one thread only: set OMP_NUM_THREADS=1.")
    dtype = _choice("dtype", args.dtype or ("float16" if device.type == "cuda" else "float32"), _DTYPES)
    folder = output_folder(args.output)
    folder.mkdir(parents=True, exist_ok=True)

    settings = {"steps": steps, "pictures": pictures, "together": together, "repeats": repeats, "batch": batch}
    settings |= {"clock": args.clock, "dtype": str(dtype).removeprefix("torch.")}
    result: dict[str, Any] = {"settings": settings, "pictures": [], "left_out": left_out, "bounds": [], "planning": []}
    text = ""
    for size in sizes:
        model = build(size, device if steps else "meta", dtype)
        for rank in ranks:
            about = {"unet": size.title, "layers": len(attention_projections(model)), "rank": rank}
            with tempfile.TemporaryDirectory() as files:
                paths = write_pair(Path(files), model, rank)
                if repeats:
                    with _bar(size, rank, "plans", repeats) as bar:
                        rows = measure.measure_planning(paths, repeats, args.clock, bar.update)
                    result["planning"] += [{**about, **row} for row in rows]
                if steps:
                    calls = measure.calls_of_pictures(len(ways), steps, pictures, together)
                    with _bar(size, rank, "calls", calls) as bar:
                        rows = measure.measure_pictures(
                            model, paths, ways, latents, batch, steps, pictures, together, args.clock, bar.update
                        )
                    rows = [{**about, "latents": latents, **row} for row in rows]
                    result["pictures"] += rows
                    result["bounds"] += [{**about, **row} for row in judged(rows, on_gpu=device.type == "cuda")]
            text = _written({"machine": _machine(device), **result}, folder)  # what is done survives an interrupt
        del model  # before the next one takes its place
    print(text)
    print(f"Written to {folder.resolve()}.")


def _choice(name: str, text: str, choices: Mapping[str, Any]) -> Any:
    if text not in choices:
        raise EstLoraError(f"--{name} can't be {quote(text)}: it is one of {', '.join(choices)}.")
    return choices[text]


def _written(result: Mapping[str, Any], folder: Path) -> str:
    text = markdown(result)
    (folder / "RESULT.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "RESULT.md").write_text(text, encoding="utf-8")
    if result["pictures"]:
        draw(result, folder / "RESULT.png")
    return text


def _bar(size: Size, rank: int, what: str, total: int) -> Any:
    return tqdm(total=total, desc=f"{size.title}, rank {rank}: {what}")


def _machine(device: torch.device) -> dict[str, Any]:
    return {
        "cpu": cpu(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "peft": importlib.metadata.version("peft") if importlib.util.find_spec("peft") else None,
        "safetensors": importlib.metadata.version("safetensors"),
        "est_lora": __version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
        # Of the last quarter of an hour: what exceeds the threads was something else's.
        "load": round(os.getloadavg()[2], 1) if hasattr(os, "getloadavg") else None,
    }


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in {"cpu", "cuda"}:
        raise EstLoraError(f"--device can't be {quote(text)}: it is cpu or cuda.")
    if device.type == "cuda":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise EstLoraError(f"--device can't be {quote(text)} on this machine: {reason(error)}") from error
    return device


if __name__ == "__main__":
    sys.exit(main())
