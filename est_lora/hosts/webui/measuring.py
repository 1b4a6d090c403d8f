"""The style discrepancy of a pair in a WebUI: remembered, or measured on two small pictures."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from est_lora.discrepancy import DIGITS, Key, Memory, bare, discrepancy, open_extractor, probe_prompt
from est_lora.discrepancy import identity as identity_of
from est_lora.errors import EstLoraError
from est_lora.hosts.drawing import random_kept
from est_lora.hosts.webui import probes, settings

log = logging.getLogger(__name__)

_PATIENCE_S = 600
_JOB = "EST-LoRA measures"
T = TypeVar("T")


class Measuring:
    """Measures what isn't remembered yet. The memory is on disk; this only notes what can't be had at the moment."""

    def __init__(self) -> None:
        self._memory = memory()
        self._missing: dict[tuple[object, ...], tuple[float, str]] = {}

    def of(self, p: Any, script: Any, subject: Any, style: Any) -> float:
        """`D` of a pair.

        Args:
            p: the user's job, which is about to read the prompts of a batch.
            script: our script, as the host runs it.
            subject, style: the host's entries of the two files.

        Raises:
            EstLoraError: it isn't known, and can't be measured.
            probes.Stopped: the user didn't wait for it.
        """
        key = key_of(p.sd_model, subject, style, p.prompts[0])
        found = self._memory.find(key)
        if found is not None:
            return found
        noted_at, why = self._missing.get(settings.extractor(), (0.0, ""))
        if why and time.monotonic() - noted_at < _PATIENCE_S:  # not at each picture again
            raise EstLoraError(why)
        return self.measure(p, script, subject, style, key)

    def measure(self, p: Any, script: Any, subject: Any, style: Any, key: Key) -> float:
        """Draws both pictures, compares them, and remembers; `p` is None where there is no job. Raises what `of` does."""
        from modules import devices, paths, shared

        chosen = settings.extractor()
        name, folder = chosen
        words = shared.state.textinfo
        shared.state.textinfo = "EST-LoRA loads what it compares pictures with"
        with ExitStack() as opened:
            opened.enter_context(random_kept())  # a model that is being built draws numbers too
            try:
                cache = Path(paths.models_path, "est-lora")
                extractor = opened.enter_context(
                    open_extractor(name, folder=folder, cache=cache, device=devices.device)
                )
            except EstLoraError as error:
                self._missing[chosen] = (time.monotonic(), str(error))
                raise
            finally:
                shared.state.textinfo = words
            pair = {"subject": subject.name, "style": style.name}
            pictures = probes.draw(p, script, pair, key.settings, key.prompt)
            value = round(discrepancy(extractor.features(pictures)), DIGITS)
        self._memory.keep(key, value, pictures)
        for remark in self._memory.remarks:
            log.warning("%s", remark)
        log.info("The style discrepancy of %s and %s is %g.", subject.name, style.name, value)
        return value


@dataclass(frozen=True)
class Known:
    """What is remembered of a pair: `value`, and the file of both pictures where there is one."""

    value: float
    pictures: Path | None


def known(subject: Any, style: Any, prompt: str) -> Known | None:
    """What is remembered of two entries and the model that is loaded. Nothing is loaded or hashed for it.

    Raises:
        EstLoraError: a setting can't be used.
    """
    from modules import sd_models

    model = sd_models.model_data.sd_model
    if getattr(model, "sd_checkpoint_info", None) is None or not (subject.hash and style.hash):
        return None
    key, kept = key_of(model, subject, style, prompt), memory()
    value = kept.find(key)
    return None if value is None else Known(value, kept.pictures(key))


def measure_now(script: Any, subject: Any, style: Any, prompt: str) -> float | None:
    """Measures a pair anew when the host has time for it; None where the user has cancelled it.

    Raises:
        EstLoraError: it can't be measured.
    """
    from modules import call_queue, sd_models, shared

    def work() -> float | None:
        if hasattr(sd_models, "forge_model_reload"):
            sd_models.forge_model_reload()
        key = key_of(shared.sd_model, subject, style, prompt)
        try:
            return script.measuring.measure(None, script, subject, style, key)
        except probes.Stopped:
            return None

    with call_queue.queue_lock:
        shared.state.begin(job=_JOB)
        try:
            return _on_main_thread(work)
        finally:
            shared.state.end()


def cancel() -> None:
    """Ends `measure_now`; a picture that is being made goes on."""
    from modules import shared

    if shared.state.job == _JOB:
        shared.state.interrupt()


def _on_main_thread(work: Callable[[], T]) -> T:
    """What `work` returns or raises; on the thread that Forge and its kin do all their drawing on."""
    try:
        from modules_forge import main_thread
    except ImportError:
        return work()
    done: list[T] = []
    failed: list[Exception] = []

    def note() -> None:
        try:
            done.append(work())
        except Exception as error:  # noqa: BLE001 - raised again on the thread that asked
            failed.append(error)

    main_thread.run_and_wait_result(note)
    if failed:
        raise failed[0]
    return done[0]


def memory() -> Memory:
    """What all processes of this WebUI remember."""
    from modules.paths import data_path

    return Memory(Path(data_path, "est-lora"))


def key_of(sd_model: Any, subject: Any, style: Any, prompt: str) -> Key:
    """Under what a discrepancy is remembered.

    Args:
        sd_model: the loaded model.
        subject, style: the host's entries of the two files.
        prompt: the picture's own, which counts where a file names no words of its own.

    Raises:
        EstLoraError: a setting can't be used.
    """
    for entry in (subject, style):
        entry.read_hash()
    name, folder = settings.extractor()
    return Key(
        subject=subject.hash or _stamp(subject.filename),
        style=style.hash or _stamp(style.filename),
        checkpoint=_checkpoint(sd_model.sd_checkpoint_info),
        extractor=identity_of(name, folder),
        settings=settings.probe(is_xl=bool(getattr(sd_model, "is_sdxl", False))),
        prompt=bare(prompt) if settings.draws_own_prompt() else probe_prompt(subject.filename, style.filename, prompt),
    )


def _checkpoint(info: Any) -> str:
    return getattr(info, "sha256", None) or _stamp(info.filename)


def _stamp(path: str) -> str:
    """For a host that is told not to hash files."""
    try:
        stat = Path(path).stat()
    except OSError:  # it has been loaded, and is gone
        return Path(path).name
    return f"{Path(path).name} {stat.st_size} {stat.st_mtime_ns}"
