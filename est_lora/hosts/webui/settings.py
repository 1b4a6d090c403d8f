"""The page of settings: what a knob is where neither a tag, the panel nor a request says so, and a few of the house."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from est_lora.config import FIELDS, FILES, Field
from est_lora.discrepancy import NAMES, ProbeSettings
from est_lora.errors import EstLoraError
from est_lora.fusion import CPU, DEVICE, NEVER

log = logging.getLogger(__name__)

_SECTION = ("est_lora", "EST-LoRA")
_PREFIX = "est_lora_"
_DRAW_MAP, _SAVE_MAP, _LOG = "est_lora_draw_map", "est_lora_save_map", "est_lora_log"
_LEVELS = {"warnings": logging.WARNING, "every fusion": logging.INFO, "every layer": logging.DEBUG}
_STEP = 0.05
_ORIGINALS = "est_lora_originals"
_KEPT = {"on the same device": DEVICE, "in main memory": CPU, "nowhere: don't merge": NEVER}
_EXTRACTOR, _FOLDER = "est_lora_extractor", "est_lora_extractor_folder"
_PROBE = "est_lora_probe_"
_PROMPTS = ("of the files' own words", "of each picture")
_NATIVE, _NATIVE_XL = 512, 1024  # the side that models are made for, pixels

KNOBS = tuple(field for field in FIELDS if field.key not in ("enabled", *FILES))


def register() -> None:
    """Has the host show the page when it makes its settings, and sets the log's level."""
    from modules import script_callbacks

    script_callbacks.on_ui_settings(_add)
    _set_log_level()


def defaults() -> dict[str, object]:
    """The knobs as the user has set them; one that can't be used is told in the log and is the built-in default."""
    found: dict[str, object] = {}
    for field in KNOBS:
        try:
            found[field.key] = field.parse(_read(_PREFIX + field.key, field.default))
        except EstLoraError as error:
            log.warning("Settings -> %s: %s", _SECTION[1], error)
            found[field.key] = field.default
    return found


def draws_map() -> bool:
    """Whether the panel draws the gate map."""
    return bool(_read(_DRAW_MAP, True))


def saves_map() -> bool:
    """Whether the gate map is saved beside each picture."""
    return bool(_read(_SAVE_MAP, False))


def originals() -> str:
    """Where weights of the UNet wait while a fusion has others in their place."""
    return _KEPT.get(str(_read(_ORIGINALS, "")), DEVICE)


def extractor() -> tuple[str, Path | None]:
    """What compares pictures: its name, and the folder of its weights where the user has named one."""
    folder = str(_read(_FOLDER, "") or "").strip()
    return str(_read(_EXTRACTOR, NAMES[0])), Path(folder).expanduser() if folder else None


def probe(*, is_xl: bool) -> ProbeSettings:
    """How the pictures are drawn that a style discrepancy is measured on.

    Raises:
        EstLoraError: a setting can't be used.
    """
    usual = ProbeSettings.usual(_NATIVE_XL if is_xl else _NATIVE)
    numbers = {name: _whole(_PROBE + name, getattr(usual, name)) for name in ("seed", "side", "steps")}
    sampler = str(_read(_PROBE + "sampler", usual.sampler))
    guidance = _read(_PROBE + "guidance", usual.guidance)
    return ProbeSettings(**{**numbers, "side": numbers["side"] or usual.side}, sampler=sampler, guidance=guidance)


def draws_own_prompt() -> bool:
    """Whether each picture's own prompt is measured with, whatever words the files name."""
    return _read(_PROBE + "prompt", _PROMPTS[0]) == _PROMPTS[1]


def component(field: Field) -> tuple[str, dict[str, Any]]:
    """The name of the gradio component that edits a knob, and its arguments."""
    if field.choices:
        return "Radio", {"choices": list(field.choices)}
    if field.auto:
        return "Textbox", {"max_lines": 1}
    # A lower bound that is excluded is one step below what can be chosen.
    low = field.low + _STEP if field.above_low else field.low
    return "Slider", {"minimum": low, "maximum": field.high, "step": _STEP}


def _add() -> None:
    import gradio as gr
    from modules import shared

    def add(key: str, default: object, label: str, kind: Any, arguments: dict[str, Any], about: str = "") -> Any:
        option = shared.OptionInfo(default, label, kind, arguments, section=_SECTION)
        shared.opts.add_option(key, option.info(about) if about else option)
        return option

    for field in KNOBS:
        kind, arguments = component(field)
        default = field.text(field.default) if field.auto else field.default
        add(_PREFIX + field.key, default, field.label, getattr(gr, kind), arguments, field.help).needs_reload_ui()
    _add_measuring(add)
    add(_DRAW_MAP, True, "Draw the gate map in the panel", gr.Checkbox, {})
    add(_SAVE_MAP, False, "Save the gate map beside each saved picture", gr.Checkbox, {}, "NAME-gate-map.png")
    about = "a picture needs memory for them a second time, and is drawn as fast as one without LoRAs"
    add(_ORIGINALS, next(iter(_KEPT)), "Original weights wait", gr.Radio, {"choices": list(_KEPT)}, about)
    add(_LOG, next(iter(_LEVELS)), "Log", gr.Radio, {"choices": list(_LEVELS)}).onchange = _set_log_level


def _add_measuring(add: Callable[..., Any]) -> None:
    import gradio as gr
    from modules import sd_samplers

    usual = ProbeSettings.usual(_NATIVE)
    names = {"choices": [sampler.name for sampler in sd_samplers.all_samplers]}
    add(_EXTRACTOR, NAMES[0], "Style discrepancy: compare pictures with", gr.Radio, {"choices": list(NAMES)})
    weights = "DINO's are fetched when they are first needed (87 MB); CLIP needs a folder"
    add(_FOLDER, "", "Style discrepancy: folder of its weights", gr.Textbox, {"max_lines": 1}, weights)
    about = "0: what the model is made for, 512, with SDXL 1024"
    add(_PROBE + "side", 0, "Probe: side in pixels", gr.Slider, {"minimum": 0, "maximum": 1024, "step": 64}, about)
    add(_PROBE + "steps", usual.steps, "Probe: steps", gr.Slider, {"minimum": 1, "maximum": 50, "step": 1})
    add(_PROBE + "seed", usual.seed, "Probe: seed", gr.Number, {"precision": 0})
    add(_PROBE + "sampler", usual.sampler, "Probe: sampler", gr.Dropdown, names)
    add(_PROBE + "guidance", usual.guidance, "Probe: CFG scale", gr.Slider, {"minimum": 1, "maximum": 15, "step": 0.5})
    about = "the words are the card's activation text, else the most frequent tags of the training"
    add(_PROBE + "prompt", _PROMPTS[0], "Probe: prompt", gr.Radio, {"choices": list(_PROMPTS)}, about)


def _set_log_level() -> None:
    """Lets the chosen level through; a host whose own log is off gets a handler, as it would print warnings alone."""
    logger = logging.getLogger("est_lora")
    logger.setLevel(_LEVELS.get(str(_read(_LOG, "")), logging.WARNING))
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())


def _whole(key: str, default: int) -> Any:
    """A whole number, which a page may have made 7.0 of; anything else as it is."""
    value = _read(key, default)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _read(key: str, default: object) -> object:
    from modules import shared

    return shared.opts.data.get(key, default)
