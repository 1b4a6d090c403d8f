"""Settings of our page in the host, for the time of a block."""

from __future__ import annotations

from contextlib import contextmanager

DEFAULTS = {
    "lean": 0.0,
    "beta": "auto",
    "save_map": False,
    "originals": "on the same device",
    "log": "warnings",
    "extractor_folder": "",
    "probe_side": 0,
    "probe_steps": 7,
    "probe_prompt": "of the files' own words",
}


@contextmanager
def settings(webui, **values):
    """These settings (None: the default) until the block ends, then what was there before as far as we have set it.

    The hosts' API sets those of extensions, and doesn't tell them.
    """
    before = {key: webui.settings.get(key) for key in values}
    _set(webui, values)
    try:
        yield
    finally:
        _set(webui, before)


def _set(webui, values):
    webui.settings |= values
    webui.api.set_options(
        {f"est_lora_{key}": DEFAULTS[key] if value is None else value for key, value in values.items()}
    )
