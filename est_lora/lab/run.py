"""Carries a lab's work out, on all the processor's cores."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partialmethod
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait

import torch
import transformers
from tqdm import tqdm

from est_lora.lab.assistant import Assistant, Found
from est_lora.lab.folder import Key, Lab

_assistant: Assistant | None = None
"""That of this process, where the work is done in several."""


def run(lab: Lab, jobs: int) -> None:
    """Does what isn't done yet. Interrupted, it goes on with what was being done.

    Args:
        lab: whose work.
        jobs: how many processes; with one, all is done in this one. Their number changes
            nothing but rounding.
    """
    for stage, keys in lab.stages.items():
        todo = [key for key in keys if key not in lab.records]
        with tqdm(total=len(todo), desc=stage, unit="piece") as bar:
            for key, found in _each(lab, todo, min(jobs, len(todo))):
                lab.records.add(key, found)
                bar.set_postfix_str(" ".join(map(str, key)), refresh=False)
                bar.update()


def _each(lab: Lab, todo: Iterable[Key], jobs: int) -> Iterator[tuple[Key, Found]]:
    """What was found, in any order."""
    if jobs <= 1:
        assistant = Assistant(lab)
        for key in todo:
            yield key, assistant.do(key)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), _begin, (lab,)) as crew:
        work = {crew.submit(_do, key): key for key in todo}
        try:
            for future in as_completed(work):
                yield work[future], future.result()
        except BaseException:
            crew.shutdown(cancel_futures=True)
            raise


def _begin(lab: Lab) -> None:
    global _assistant
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)  # one bar is enough
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _assistant = Assistant(lab)


def _end_with_parent() -> None:
    """Where the parent is killed, nobody else would tell its processes."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _do(key: Key) -> Found:
    assert _assistant is not None
    return _assistant.do(key)
