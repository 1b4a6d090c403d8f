"""What outlives a picture, so that the next one starts at once: files that are read, and plans that are made."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Hashable
from pathlib import Path
from typing import Generic, TypeVar

from est_lora.config import FusionConfig
from est_lora.gate import FusionPlan
from est_lora.hosts.webui.host import Host
from est_lora.lora import LayerId, LoraFile, Numbers, RelativeUpdate, UNetLayout

_FILES = 4  # two pairs, as a pair is often compared with another
_PLANS = 4  # the panel's, the picture's, and those of the two small pictures that are measured

T = TypeVar("T")


class Plans:
    """The files and plans that one tab used last, by what they were made of.

    Files stay mapped; one that has changed on disk is read anew. No checkpoint is kept alive: of updates that depend on
    its weights only their numbers are kept.
    """

    def __init__(self) -> None:
        self._files: _Recent[LoraFile] = _Recent(_FILES)
        self._numbers: _Recent[defaultdict[LayerId, Numbers]] = _Recent(_FILES)
        self._plans: _Recent[FusionPlan] = _Recent(_PLANS)

    def of(
        self, subject: str, style: str, config: FusionConfig, discrepancy: float | None = None, host: Host | None = None
    ) -> FusionPlan:
        """The plan of two files.

        Args:
            subject, style: their paths.
            config: the knobs.
            discrepancy: as in `FusionPlan.of`.
            host: the checkpoint that it is for; None where none is to be asked.

        Raises:
            EstLoraError: a file can't be used, or not with the other, or not with the checkpoint.
        """
        layout, checkpoint = _layout(host), host and _Checkpoint(host)
        keys = [(path, _stamp(path), layout) for path in (subject, style)]
        files = [self._file(key) for key in keys]
        whole = (*keys, config, discrepancy, checkpoint)
        plan = self._plans.find(whole)
        if plan is None:
            if host is not None:
                files = [host.fit(file, self._numbers_of((key, checkpoint))) for key, file in zip(keys, files)]
            plan = FusionPlan.of(*files, config, discrepancy)
            if not any(map(_reads_weights, files)):
                self._plans.keep(whole, plan)
        return plan

    def _file(self, key: tuple[str, Hashable, UNetLayout]) -> LoraFile:
        file = self._files.find(key)
        if file is None:
            path, _, layout = key
            file = self._files.keep(key, LoraFile.load(path, layout))
        return file

    def _numbers_of(self, key: Hashable) -> defaultdict[LayerId, Numbers]:
        numbers = self._numbers.find(key)
        return self._numbers.keep(key, defaultdict(dict)) if numbers is None else numbers


class _Recent(Generic[T]):
    """The few values that were used last. Pictures and the page are made on different threads."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, key: Hashable) -> T | None:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def keep(self, key: Hashable, value: T) -> T:
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self._most:
                self._values.popitem(last=False)
        return value


class _Checkpoint:
    """Which checkpoint is in which UNet, without keeping the UNet alive.

    A1111 loads one checkpoint after another into the same modules. Once the UNet has gone, this equals nothing else:
    the next one may be where it was.
    """

    def __init__(self, host: Host) -> None:
        self._unet = weakref.ref(host.unet)
        self._entry = host.checkpoint  # the host's entry in its list
        self._hash = hash((id(host.unet), id(host.checkpoint)))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Checkpoint):
            return False
        return self._unet() is other._unet() and self._entry is other._entry


def _stamp(path: str) -> Hashable:
    """What changes with the file."""
    try:
        stat = Path(path).stat()
    except OSError:  # it has gone since the host looked
        return object()
    return stat.st_mtime_ns, stat.st_size


def _layout(host: Host | None) -> UNetLayout:
    """The usual one for every model that has it, so that pictures find the files that the panel has read."""
    return UNetLayout() if host is None or set(host.layout.resnets) == {2} else host.layout


def _reads_weights(file: LoraFile) -> bool:
    updates = (*file.updates.values(), *file.text_encoder.values())
    return any(isinstance(update, RelativeUpdate) and not update.needs_model for update in updates)
