"""The panel: a switch, two LoRAs and the knobs most people need. What it hands over is read here too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from est_lora.config import AUTO, FIELDS
from est_lora.errors import EstLoraError
from est_lora.hosts.webui.loras import LoraList

TITLE = "EST-LoRA"
KNOBS = ("enabled", "subject", "style", "subject_weight", "style_weight", "beta", "lean", "method")
_NOTHING = "None"
_STEP = 0.05
_BY_KEY = {field.key: field for field in FIELDS}


def build(script: Any) -> list[Any]:
    """Draws the panel; returns its components in the order of `KNOBS`."""
    import gradio as gr
    from modules.ui_common import create_refresh_button
    from modules.ui_components import InputAccordion

    with InputAccordion(value=False, label=TITLE, elem_id=script.elem_id("enabled")) as enabled:
        try:
            names = LoraList().names()
        except EstLoraError as error:
            gr.Markdown(str(error))
            names = []
        with gr.Row():
            files = [_choice(gr, script, key, [_NOTHING, *names], custom=True) for key in ("subject", "style")]
            create_refresh_button(files, _refresh, _choices, script.elem_id("refresh"))
        with gr.Row():
            weights = [_slider(gr, script, key) for key in ("subject_weight", "style_weight")]
        with gr.Row():
            beta = gr.Textbox(
                value=AUTO,
                label=_BY_KEY["beta"].label,
                info=f"{_BY_KEY['beta'].help}; {_BY_KEY['beta'].range}",
                elem_id=script.elem_id("beta"),
            )
            lean = _slider(gr, script, "lean")
            method = _choice(gr, script, "method", list(_BY_KEY["method"].choices))
    return [enabled, *files, *weights, beta, lean, method]


def read(arguments: Sequence[object]) -> dict[str, object]:
    """The knobs that the panel or the API asks for; nothing where it is switched off.

    Args:
        arguments: the values of the panel's components, or one dict of knobs in the place of the first.
    """
    first = arguments[0] if arguments else None
    if isinstance(first, Mapping):
        given: dict[str, object] = {"enabled": True, **first}
    else:
        given = {key: value for key, value in zip(KNOBS, arguments) if not _is_nothing(value)}
    try:
        is_on = _BY_KEY["enabled"].parse(given.get("enabled", False))
    except EstLoraError:
        is_on = True  # what is wrong with it is said where all knobs are checked
    return given if is_on else {}


def _is_nothing(value: object) -> bool:
    return value is None or (isinstance(value, str) and value in ("", _NOTHING))


def _choice(gr: Any, script: Any, key: str, choices: list[str], *, custom: bool = False) -> Any:
    field = _BY_KEY[key]
    return gr.Dropdown(
        choices=choices,
        value=field.default or choices[0],
        label=field.label,
        info=field.help,
        elem_id=script.elem_id(key),
        allow_custom_value=custom,  # a name whose file has gone is said in words, not by an error of the page
    )


def _slider(gr: Any, script: Any, key: str) -> Any:
    field = _BY_KEY[key]
    return gr.Slider(
        minimum=field.low,
        maximum=field.high,
        value=field.default,
        step=_STEP,
        label=field.label,
        info=field.help,
        elem_id=script.elem_id(key),
    )


def _refresh() -> None:
    try:
        LoraList().refresh()
    except EstLoraError:  # the panel says so
        return


def _choices() -> dict[str, list[str]]:
    try:
        return {"choices": [_NOTHING, *LoraList().names()]}
    except EstLoraError:
        return {"choices": [_NOTHING]}
