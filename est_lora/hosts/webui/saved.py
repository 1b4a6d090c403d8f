"""The gate map beside a saved picture, where the user wants it."""

from __future__ import annotations

import logging
from pathlib import Path

from est_lora.hosts.webui import settings
from est_lora.hosts.webui.job import Job
from est_lora.plot import gate_map

log = logging.getLogger(__name__)


def save_map(picture: str, job: object) -> None:
    """Draws what was done to `picture`, with a mark at each call of the model, into `NAME-gate-map.png` beside it."""
    if not isinstance(job, Job) or job.done is None or not settings.saves_map():
        return
    plan, taus = job.done
    path = Path(picture)
    try:
        gate_map(plan, sorted(set(taus))).savefig(path.with_name(f"{path.stem}-gate-map.png"))
    except Exception as error:
        log.warning("The gate map of %s wasn't saved: %s", path.name, error, exc_info=not isinstance(error, OSError))
