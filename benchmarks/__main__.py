"""`python -m benchmarks`: measures, prints Markdown tables, and writes them and the same as JSON into a folder."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

import diffusers
import torch
from tqdm import tqdm

from benchmarks import measure
from benchmarks.tables import markdown
from benchmarks.unets import SIZES, Size, attention_projections, build, write_pair
from est_lora import __version__
from est_lora.errors import EstLoraError, quote, reason

_PLANNED_ANYWAY = 32
_DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
_CPU_LATENTS = 32
_LEFT_OUT = "0: leave this part out"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise EstLoraError(f"{message}; see {self.prog} --help.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0, 2 for what a user can mend (one sentence on stderr), 130 for Ctrl-C."""
    try:
        result, folder = _run(_parser().parse_args(arguments))
        text = markdown(result)
        (folder / "RESULT.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (folder / "RESULT.md").write_text(text, encoding="utf-8")
    except EstLoraError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that can't be written to
        where = f"{quote(error.filename)} can't be used: " if error.filename else ""
        print(f"benchmark: {where}{error.strerror or reason(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmark: interrupted.", file=sys.stderr)
        return 130
    print(text)
    print(f"Written to {folder.resolve()}.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="benchmark",
        allow_abbrev=False,
        description="Times one UNet call without LoRA, with est-lora, and as EST-LoRA and K-LoRA were published, and"
        " times the planning of a pair of files. Weights and LoRAs are random; nothing is downloaded.",
    )
    sizes, every = ", ".join(SIZES), "sd15 sdxl"
    parser.add_argument("--unets", nargs="+", default=every.split(), metavar="NAME", help=f"{sizes} (default {every})")
    parser.add_argument(
        "--ranks", nargs="+", default=["8", "64"], metavar="N", help="ranks of the LoRAs (default 8 64)"
    )
    parser.add_argument(
        "--rounds", default="12", metavar="N", help=f"timed calls of each kind (default 12; {_LEFT_OUT})"
    )
    parser.add_argument("--repeats", default="8", metavar="N", help=f"timed plans (default 8; {_LEFT_OUT})")
    parser.add_argument(
        "--latents", metavar="N", help="side of the latents (default: 32; on cuda 64 for SD1.5, 128 for SDXL)"
    )
    parser.add_argument("--batch", default="2", metavar="N", help="latents a call (default 2, as guidance needs)")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu or cuda (default cpu)")
    parser.add_argument(
        "--dtype", metavar="TYPE", help=f"{', '.join(_DTYPES)} (default: float16 on cuda, else float32)"
    )
    parser.add_argument("-o", "--output", default="est-lora-benchmark", metavar="DIR", help="where the results go")
    return parser


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    sizes = [_choice("unets", name, SIZES) for name in dict.fromkeys(args.unets)]
    ranks = [_whole("ranks", text, 1, 1024) for text in dict.fromkeys(args.ranks)]
    rounds, repeats = _whole("rounds", args.rounds, 0, 10_000), _whole("repeats", args.repeats, 0, 10_000)
    if not rounds and not repeats:
        raise EstLoraError("With --rounds 0 and --repeats 0 there is nothing to measure: leave one of them out.")
    batch = _whole("batch", args.batch, 1, 64)
    latents = args.latents and _whole("latents", args.latents, 8, 512, of=8)
    device = _device(args.device)
    dtype = _choice("dtype", args.dtype or ("float16" if device.type == "cuda" else "float32"), _DTYPES)
    folder = Path(args.output)
    if folder.exists() and not folder.is_dir():
        raise EstLoraError(f"The results can't go to {quote(folder)}: that is a file; give a folder with -o.")
    folder.mkdir(parents=True, exist_ok=True)

    calls: list[measure.Row] = []
    planning: list[measure.Row] = []
    for size in sizes:
        side = latents or (size.latents if device.type == "cuda" else _CPU_LATENTS)
        if repeats:
            planning += _planning(size, sorted({*ranks, _PLANNED_ANYWAY}), repeats)
        if rounds:
            calls += _calls(size, ranks, rounds, side, batch, device, dtype)
    settings = {"rounds": rounds, "repeats": repeats, "batch": batch, "dtype": str(dtype).removeprefix("torch.")}
    return {"machine": _machine(device), "settings": settings, "calls": calls, "planning": planning}, folder


def _planning(size: Size, ranks: Sequence[int], repeats: int) -> list[measure.Row]:
    rows = []
    names = build(size, "meta")
    for rank in ranks:
        with tempfile.TemporaryDirectory() as folder, tqdm(total=repeats) as bar:
            bar.set_description(f"{size.title}, rank {rank}: plans")
            paths = write_pair(Path(folder), names, rank)
            about = {"unet": size.title, "layers": len(attention_projections(names)), "rank": rank}
            rows += [{**about, **row} for row in measure.measure_planning(paths, repeats, bar.update)]
    return rows


def _calls(
    size: Size, ranks: Sequence[int], rounds: int, latents: int, batch: int, device: torch.device, dtype: torch.dtype
) -> list[measure.Row]:
    rows = []
    model = build(size, device, dtype)
    total = measure.UNTIMED_CALLS + rounds * measure.TIMED_CALLS
    for rank in ranks:
        with tempfile.TemporaryDirectory() as folder, tqdm(total=total) as bar:
            bar.set_description(f"{size.title}, rank {rank}: calls")
            paths = write_pair(Path(folder), model, rank)
            layers = len(attention_projections(model))
            about = {"unet": size.title, "layers": layers, "rank": rank, "latents": latents}
            measured = measure.measure_calls(model, paths, latents, batch, rounds, bar.update)
            rows += [{**about, **row} for row in measured]
    return rows


def _machine(device: torch.device) -> dict[str, Any]:
    return {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "safetensors": importlib.metadata.version("safetensors"),
        "est_lora": __version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
        # Of the last quarter of an hour: what exceeds the threads was something else's.
        "load": round(os.getloadavg()[2], 1) if hasattr(os, "getloadavg") else None,
    }


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _whole(name: str, text: str, low: int, high: int, of: int = 1) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high or int(text) % of:
        multiple = f", a multiple of {of}" if of > 1 else ""
        raise EstLoraError(f"--{name} can't be {quote(text)}: it is a whole number from {low} to {high}{multiple}.")
    return int(text)


def _choice(name: str, text: str, choices: dict[str, Any]) -> Any:
    if text not in choices:
        raise EstLoraError(f"--{name} can't be {quote(text)}: it is one of {', '.join(choices)}.")
    return choices[text]


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
