"""`python -m benchmarks.webui ADDRESS SUBJECT STYLE`: times the pictures of a running WebUI, with both LoRAs and without.

What a user waits for: from the request to the finished picture. In each round every way draws two pictures, one right after
somebody else's, for which the host encodes the prompt and exchanges LoRAs, and the same once more. Who begins rotates.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from tqdm import tqdm

from benchmarks.machine import cpu
from benchmarks.measure import row
from benchmarks.tables import Columns, spread, table
from est_lora import __version__
from est_lora.command import Parser, ended, output_folder, whole
from est_lora.errors import EstLoraError, quote, reason

TITLE = "EST-LoRA"
BARE, PAIR = "no LoRA", "both as <lora:>"
# Of our own: the knobs of each, beside the two files. With `beta` given, nothing is measured before a picture.
OURS: dict[str, dict[str, object]] = {
    "EST-LoRA": {"beta": 0.5},
    "EST-LoRA, branch engine": {"beta": 0.5, "engine": "branch"},
}
WAYS = (BARE, PAIR, *OURS)
AFTER, AGAIN = "after another", "once more"
_PROMPT = "a red cat"
_PATIENCE_S = 3600
_EXPLANATION = """\
Seconds from a request to its picture, medians with quartiles. "{after}": the picture before was made another way, so the
host encodes the prompt and exchanges LoRAs. "{again}": the same request again. "x {bare}": by those of the same round.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns what `command.ended` does."""
    return ended("benchmark", lambda: _run(_parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="benchmark-webui",
        allow_abbrev=False,
        description="Times pictures of a running WebUI (started with --api, and with this extension) without LoRA, with two"
        " LoRAs as <lora:> tags, and fused.",
    )
    parser.add_argument("address", metavar="ADDRESS", help="of the WebUI, such as http://127.0.0.1:7860")
    parser.add_argument("subject", metavar="SUBJECT", help="the subject's LoRA, by the name that the WebUI has for it")
    parser.add_argument("style", metavar="STYLE", help="the style's")
    parser.add_argument(
        "--rounds", default="5", metavar="N", help="how often each way draws its two pictures (default 5)"
    )
    parser.add_argument("--steps", default="28", metavar="N", help="steps of a picture (default 28)")
    parser.add_argument("--side", default="512", metavar="N", help="side of a picture in pixels (default 512)")
    parser.add_argument("-o", "--output", default="est-lora-benchmark", metavar="DIR", help="where the results go")
    return parser


def _run(args: argparse.Namespace) -> None:
    rounds = whole("rounds", args.rounds, 1, 1000)
    steps, side = whole("steps", args.steps, 1, 1000), whole("side", args.side, 64, 4096, multiple=64)
    webui = WebUI(args.address)
    planned = webui.get("/est-lora/v1/plan", subject=args.subject, style=args.style)  # which refuses what won't work
    checkpoint = webui.get("/sdapi/v1/options")["sd_model_checkpoint"]
    folder = output_folder(args.output)
    folder.mkdir(parents=True, exist_ok=True)

    def draw(way: str) -> float:
        return webui.seconds(_request(way, args.subject, args.style, steps, side))

    with tqdm(total=2 * len(WAYS) * (rounds + 1), desc="pictures") as bar:
        rows = measured(draw, rounds, bar.update)
    settings = {
        "checkpoint": checkpoint,
        "layers": len(planned["layers"]),
        "rounds": rounds,
        "steps": steps,
        "side": side,
    }
    about = {"cpu": cpu(), "date": datetime.now(timezone.utc).date().isoformat(), "est_lora": __version__}
    result = {"machine": about, "settings": settings, "rows": rows}
    text = _markdown(result)
    (folder / "WEBUI.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "WEBUI.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"Written to {folder.resolve()}.")


class WebUI:
    """A running WebUI, by its API.

    Args:
        address: as a browser has it.
    """

    def __init__(self, address: str) -> None:
        if not address.startswith(("http://", "https://")):
            raise EstLoraError(f"{quote(address)} is no address of a WebUI: it begins with http://.")
        self._address = address.rstrip("/")

    def get(self, route: str, **query: str) -> Any:
        """What a route answers.

        Raises:
            EstLoraError: nobody is there, or it refuses, with its own words.
        """
        return self._ask(urllib.request.Request(f"{self._address}{route}?{urllib.parse.urlencode(query)}"))

    def seconds(self, request: Mapping[str, Any]) -> float:
        """How long a picture takes.

        Raises:
            EstLoraError: it can't be made, or was made without the fusion that it asks for.
        """
        body = json.dumps(request).encode()
        asked = urllib.request.Request(
            f"{self._address}/sdapi/v1/txt2img", body, headers={"Content-Type": "application/json"}
        )
        start = time.perf_counter()
        answer = self._ask(asked)
        took = time.perf_counter() - start
        said = json.loads(answer["info"])["extra_generation_params"]
        if request["alwayson_scripts"] and "EST-LoRA subject" not in said:
            raise EstLoraError(
                said.get("EST-LoRA off", "The WebUI made a picture without EST-LoRA, and doesn't say why.")
            )
        return took

    def _ask(self, request: urllib.request.Request) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=_PATIENCE_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise EstLoraError(self._refusal(error)) from error
        except (OSError, ValueError) as error:
            raise EstLoraError(f"No WebUI with its API on answers at {self._address}: {reason(error)}") from error

    def _refusal(self, error: urllib.error.HTTPError) -> str:
        if error.code == 404:
            return f"The WebUI at {self._address} has no EST-LoRA, or was started without --api."
        try:
            said = json.load(error)["detail"]
        except (OSError, ValueError, LookupError, TypeError):
            said = f"HTTP {error.code}."
        return str(said)


def measured(draw: Callable[[str], float], rounds: int, tick: Callable[[], Any]) -> list[dict[str, Any]]:
    """Has pictures drawn in every way; a first round isn't counted.

    Args:
        draw: draws one in a way, and says how many seconds it took.
        rounds: that are counted.
        tick: told after each picture.

    Returns:
        For each way `what`, and under "after another" and "once more" the `seconds` and their `ratio` to those of no LoRA.
    """
    seconds: dict[str, dict[str, list[float]]] = {way: {AFTER: [], AGAIN: []} for way in WAYS}
    for number in range(rounds + 1):
        first = number % len(WAYS)
        for way in (*WAYS[first:], *WAYS[:first]):
            for when in (AFTER, AGAIN):
                seconds[way][when].append(draw(way))
                tick()
    return [
        {"what": way, **{when: row(way, took[1:], seconds[BARE][when][1:]) for when, took in seconds[way].items()}}
        for way in WAYS
    ]


def _request(way: str, subject: str, style: str, steps: int, side: int) -> dict[str, Any]:
    tags = f" <lora:{subject}:1> <lora:{style}:1>" if way == PAIR else ""
    fusion = {TITLE: {"args": [{"subject": subject, "style": style, **OURS[way]}]}} if way in OURS else {}
    picture = {"steps": steps, "width": side, "height": side, "seed": 1, "cfg_scale": 7, "sampler_name": "Euler"}
    return {"prompt": _PROMPT + tags, **picture, "alwayson_scripts": fusion}


def _markdown(result: Mapping[str, Any]) -> str:
    machine, settings = result["machine"], result["settings"]
    columns: Columns = {"picture": lambda each: each["what"]}
    for when in (AFTER, AGAIN):
        columns = {**columns, f"{when}, s": _cell(when, "seconds"), f"{when}, x {BARE}": _cell(when, "ratio")}
    setting = (
        f"{machine['date']}, est_lora {machine['est_lora']}. {settings['checkpoint']}, LoRAs of {settings['layers']} layers,"
        f" {settings['side']} x {settings['side']} pixels, {settings['steps']} steps, Euler, {settings['rounds']} rounds.\n"
    )
    explanation = _EXPLANATION.format(after=AFTER, again=AGAIN, bare=BARE)
    return "\n".join([f"# A WebUI on {machine['cpu']}\n", setting, explanation, table(columns, result["rows"])])


def _cell(when: str, what: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda each: spread(each[when][what])


if __name__ == "__main__":
    sys.exit(main())
