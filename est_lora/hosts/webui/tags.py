"""Our tag in the host's registry of tags: by it we hear of jobs that other extensions start without our script."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from est_lora.hosts.webui import panel
from est_lora.text import tag


def register(begin: Callable[[Any, tuple[object, ...], Any], None]) -> None:
    """Enters the tag; to be called when the host has made its registry anew.

    Args:
        begin: what the script does when a generation starts.
    """
    from modules import extra_networks

    class Tag(extra_networks.ExtraNetwork):  # type: ignore[misc]
        """The host asks it about every job, whether the prompt has the tag or not, before scripts hear of tags."""

        def activate(self, p: Any, params_list: Any) -> None:
            """Nothing is done for the tag here, where the order of tags would matter."""
            _join(p, begin)

        def deactivate(self, p: Any) -> None:
            """Nothing: a job ends when its sampling does."""

    extra_networks.register_extra_network(Tag(tag.NAME))


def _join(p: Any, begin: Callable[[Any, tuple[object, ...], Any], None]) -> None:
    """Puts our script back where another extension has left it out of a job of its own.

    ADetailer draws a face again by a job with the prompt of the picture, but with those scripts alone that its settings
    name; `<lora:>` works there, and so has this to.
    """
    runner = getattr(p, "scripts", None)
    ours = next((script for script in getattr(runner, "scripts", ()) if script.title() == panel.TITLE), None)
    if ours is None or ours in runner.alwayson_scripts:
        return
    runner = copy.copy(runner)
    runner.alwayson_scripts = [*runner.alwayson_scripts, ours]
    runner.callback_map = {}  # the copy shares it, and it is trusted wherever the number of scripts is the same
    p.scripts = runner
    begin(p, tuple(p.script_args[ours.args_from : ours.args_to]), ours)
