"""The WebUI's own list of LoRAs, by which users know their files. Nothing is opened that isn't in it."""

from __future__ import annotations

import logging
import re
import sys
import time
from pathlib import Path
from typing import Any

from est_lora.errors import EstLoraError, nearest, quote
from est_lora.text import tag

log = logging.getLogger(__name__)

_HASH = re.compile(r"#?([0-9a-fA-F]{12,64})")
_SHORT = 12
_PATIENCE_S = 20
_SUFFIX = ".safetensors"


class LoraList:
    """What the built-in Lora extension has found on disk."""

    def __init__(self) -> None:
        """Finds that extension.

        Raises:
            EstLoraError: it is disabled.
        """
        networks: Any = sys.modules.get("networks")
        if not hasattr(networks, "available_network_aliases"):
            raise EstLoraError(
                "EST-LoRA uses the WebUI's own list of LoRAs, and the built-in Lora extension is disabled: enable it in"
                " the Extensions tab and restart."
            )
        self._networks = networks

    def names(self) -> list[str]:
        """The names of all safetensors files, as the host spells them."""
        entries = self._networks.available_networks.values()
        return sorted((entry.name for entry in entries if _usable(entry)), key=str.casefold)

    def refresh(self) -> None:
        """Looks on disk again."""
        self._networks.list_available_networks()

    def find(self, name: str, *, look_again: bool = True) -> Any:
        """The host's entry (`filename`, `name`, `shorthash`) for a name, an alias, or a hash of 12 digits or more.

        A hash may have a `#` before it; in prompts that begins a comment, so there it goes without.

        Args:
            name: what is asked for.
            look_again: on disk, and into files whose hash isn't known; that may take a while.

        Raises:
            EstLoraError: there is none, or it isn't a safetensors file.
        """
        entry = (self._by_name if look_again else self._listed)(name) or self._by_hash(name, compute=look_again)
        if entry is None:
            names = self.names()
            near = [quote(near) for near in nearest(name, [*names, *self._aliases()])]
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {len(names)} in its list."
            raise EstLoraError(f"The WebUI has no LoRA {quote(name)}: {hint}")
        if not _usable(entry):
            raise EstLoraError(
                f"{quote(Path(entry.filename).name)} is a pickle, which can run code when it is loaded: only {_SUFFIX}"
                " files are read."
            )
        return entry

    def find_same(self, name: str, short: str | None) -> Any:
        """The entry that a picture means: of its name, unless that is another file now; else of its short hash.

        Raises:
            EstLoraError: as `find`.
        """
        entry = self._by_name(name)
        if short and (entry is None or entry.shorthash not in ("", None, short)):
            entry = self._by_hash(short) or entry
        return self.find(name) if entry is None else entry

    def name_in_tag(self, name: str) -> str:
        """A name as a tag can hold it: the hash where it has letters that end a tag or a piece of it.

        Raises:
            EstLoraError: as `find`.
        """
        if tag.fits(name):
            return name
        entry = self.find(name)
        entry.read_hash()
        return str(entry.shorthash)

    def same_file(self, name: str, entry: Any) -> bool:
        """Whether `name` in a `<lora:>` tag means the file of `entry`."""
        found = self._listed(name)
        return found is not None and found.filename == entry.filename

    def _aliases(self) -> list[str]:
        return [alias for alias, entry in self._networks.available_network_aliases.items() if _usable(entry)]

    def _by_name(self, name: str) -> Any:
        if (found := self._listed(name)) is None:
            self.refresh()
            found = self._listed(name)
        return found

    def _listed(self, name: str) -> Any:
        """As the host resolves `<lora:name>`: an alias that two files share means neither."""
        networks = self._networks
        shared = name.lower() in networks.forbidden_network_aliases
        return (networks.available_networks if shared else networks.available_network_aliases).get(name)

    def _by_hash(self, name: str, *, compute: bool = True) -> Any:
        if not (found := _HASH.fullmatch(name)):
            return None
        short = found[1][:_SHORT].lower()
        lookup = self._networks.available_network_hash_lookup
        unknown = [entry for entry in self._networks.available_networks.values() if not entry.hash]
        if compute and short not in lookup and unknown:
            log.warning("Hashing up to %d LoRA files, each once, to find %s.", len(unknown), short)
            deadline = time.monotonic() + _PATIENCE_S
            for entry in unknown:
                entry.read_hash()  # the host remembers it: the next search goes on from here
                if short in lookup or time.monotonic() > deadline:
                    break
        return lookup.get(short)


def _usable(entry: Any) -> bool:
    return str(entry.filename).lower().endswith(_SUFFIX)
