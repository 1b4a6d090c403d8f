"""What the panel shows of a choice before anything is made: both cards, the gate map, and what it means in words."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from est_lora import report
from est_lora.config import BETA_UNMEASURED, FILES, FusionConfig
from est_lora.errors import explained
from est_lora.gate import FusionPlan
from est_lora.hosts.webui import settings
from est_lora.hosts.webui.loras import LoraList
from est_lora.hosts.webui.measuring import Known, known
from est_lora.hosts.webui.plans import Plans
from est_lora.hosts.webui.steps import Sampling
from est_lora.plot import gate_map_svg


@dataclass
class Drawn:
    """What one page shows a map of: the values that it was drawn for."""

    values: tuple[object, ...] = ()


class Preview:
    """Plans pairs for the panel. No checkpoint is touched."""

    def __init__(self, plans: Plans | None = None) -> None:
        """Takes what the pictures of the same tab have read and planned."""
        self._plans = Plans() if plans is None else plans

    def plan(self, knobs: Mapping[str, object], prompt: str = "") -> FusionPlan:
        """What will happen, as far as it is known: a style discrepancy may have been measured with `prompt`.

        Raises:
            EstLoraError: a knob or a file can't be used.
        """
        return self._plan(*_looked_up(knobs, prompt))

    def draw(self, knobs: Mapping[str, object], sampling: Sampling, prompt: str = "") -> tuple[str, str]:
        """What is known of the style discrepancy, and the plan, both as HTML.

        The first is empty where none counts; the other is a line in words, remarks, and the map, or the sentence that
        says why there is none.
        """
        if not knobs.get("subject") or not knobs.get("style"):
            return "", say("Choose a subject and a style: what each will do is drawn here.")
        measured = ""
        try:
            config, entries, found = _looked_up(knobs, prompt)
            measured = _measured(config, found)
            plan = self._plan(config, entries, found)
        except Exception as error:  # noqa: BLE001 - the page would say only that there was one
            return measured, say(explained(error, "The map can't be drawn"), is_error=True)
        words = report.summary(plan)
        drawn = [say(words), *map(say, [*plan.subject.remarks, *plan.style.remarks])]
        if plan.pair_remarks:
            drawn.append(say("Layers whose updates depend on the checkpoint's weights are decided when it is used."))
        if settings.draws_map():
            svg = gate_map_svg(plan, sampling.taus(plan.config.clock))
            drawn.append(f'<div class="est-lora-map" role="img" aria-label="{html.escape(words)}">{svg}</div>')
        return measured, "".join(drawn)

    def _plan(self, config: FusionConfig, entries: Sequence[Any], found: Known | None) -> FusionPlan:
        paths = (entry.filename for entry in entries)
        return self._plans.of(*paths, config, None if found is None else found.value)


def cards(names: Sequence[str | None]) -> str:
    """The preview pictures of LoRAs, as HTML; empty where none has one."""
    drawn = []
    for role, name in zip(("Subject", "Style"), names):
        url = _card(name) if name else None
        if url:
            about = html.escape(f"{role}: {name}")
            drawn.append(
                f'<figure><img src="{html.escape(url)}" alt="{about}"><figcaption>{about}</figcaption></figure>'
            )
    return f'<div class="est-lora-cards">{"".join(drawn)}</div>' if drawn else ""


def _looked_up(knobs: Mapping[str, object], prompt: str) -> tuple[FusionConfig, list[Any], Known | None]:
    """A request, the host's entries of its two files, and what is remembered of them where it counts."""
    config = FusionConfig.of(knobs)
    loras = LoraList()
    entries = [loras.find(name, look_again=False) for name in config.pair()]
    return config, entries, known(*entries, prompt) if config.takes_discrepancy else None


def _measured(config: FusionConfig, found: Known | None) -> str:
    """The style discrepancy of a pair and the pictures that it was measured on, as HTML; empty where it doesn't count."""
    if not config.takes_discrepancy:
        return ""
    if found is None:
        return say(
            "The first picture of this pair measures its style discrepancy; until then,"
            f" {BETA_UNMEASURED:g} is drawn below."
        )
    words = say(
        f"Style discrepancy {found.value:.3g}, measured on a picture with the subject alone (left) and one with the style alone."
    )
    try:
        drawn = base64.b64encode(found.pictures.read_bytes()).decode() if found.pictures else ""
    except OSError:
        drawn = ""
    about = html.escape(" and ".join(f"{role}: {name}" for role, name in zip(FILES, config.pair())))
    picture = f'<img src="data:image/png;base64,{drawn}" alt="{about}" title="{about}">' if drawn else ""
    return f'<div class="est-lora-measured">{words}{picture}</div>'


def say(sentence: str, *, is_error: bool = False) -> str:
    """A sentence as HTML."""
    kind = "est-lora-error" if is_error else "est-lora-said"
    return f'<p class="{kind}">{html.escape(sentence)}</p>' if sentence else ""


def _card(name: str) -> str | None:
    from modules import ui_extra_networks

    try:
        entry = LoraList().find(name, look_again=False)
        page = next(page for page in ui_extra_networks.extra_pages if page.name == "lora")
        stem = str(Path(entry.filename).with_suffix(""))
        url: Any = page.find_preview(stem) or page.find_embedded_preview(stem, entry.name, entry.metadata)
    except Exception:  # noqa: BLE001 - no picture, or a file's own words about it that nobody understands
        return None
    return url
