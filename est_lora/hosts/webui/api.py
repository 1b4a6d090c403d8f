"""The host's HTTP API: requests are checked before they queue, and two routes of our own tell what may be asked."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from est_lora import report
from est_lora.config import AUTO, FIELDS, Field, FusionConfig
from est_lora.errors import EstLoraError, quote
from est_lora.gate import FusionPlan
from est_lora.hosts.webui import panel
from est_lora.hosts.webui.loras import LoraList
from est_lora.lora import LoraFile

_PREFIX = "/est-lora/v1"
# A route that every host has behind its own password; ours get the same guard.
_GUARDED = "/sdapi/v1/options"
_TYPES = {str: "string", float: "number", bool: "boolean"}


def add_routes(app: Any) -> None:
    """Adds our routes, where the host has its API on."""
    guarded = next((route for route in app.routes if getattr(route, "path", None) == _GUARDED), None)
    if guarded is None or any(getattr(route, "path", "").startswith(_PREFIX) for route in app.routes):
        return
    from fastapi import HTTPException, Request

    def plan(request: Request) -> dict[str, Any]:
        """What the two LoRAs will do, layer by layer."""
        try:
            return plan_json(dict(request.query_params))
        except EstLoraError as error:
            raise HTTPException(status_code=422, detail=str(error)) from error

    plan.__annotations__["request"] = Request  # annotations here are text, which FastAPI can't look up
    for name, endpoint in (("schema", schema), ("plan", plan)):
        app.add_api_route(
            f"{_PREFIX}/{name}", endpoint, methods=["GET"], dependencies=guarded.dependencies, response_model=None
        )


def schema() -> dict[str, Any]:
    """The knobs that a request may hold, as JSON Schema."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": panel.TITLE,
        "type": "object",
        "properties": {field.key: _property(field) for field in FIELDS},
        "required": ["subject", "style"],
        "additionalProperties": False,
    }


def plan_json(knobs: Mapping[str, object]) -> dict[str, Any]:
    """The plan of a pair, as `est-lora inspect --json` prints it; the files are looked up in the host's list only.

    Raises:
        EstLoraError: a knob or a file can't be used.
    """
    config = FusionConfig.of(knobs)
    subject, style = (LoraFile.load(LoraList().find(name).filename) for name in config.pair())
    return report.to_json(FusionPlan.of(subject, style, config))


def check(request: Any) -> None:
    """Looks at what a request to make pictures asks of us.

    Raises:
        EstLoraError: it can't be carried out.
    """
    scripts = getattr(request, "alwayson_scripts", None) or {}
    for title, given in scripts.items():
        if str(title).casefold() == panel.TITLE.casefold():
            _check_arguments(given)


def _check_arguments(given: object) -> None:
    arguments = given.get("args", []) if isinstance(given, Mapping) else None
    if not isinstance(arguments, (list, tuple)):
        raise EstLoraError(
            f'{panel.TITLE} takes {{"args": [{{"subject": ..., "style": ...}}]}}, and got {quote(given)} instead.'
        )
    if arguments and isinstance(arguments[0], Mapping):
        if len(arguments) > 1:
            raise EstLoraError(f"{panel.TITLE} takes one object in args, and got {len(arguments)} things.")
    elif len(arguments) > len(panel.KNOBS):
        raise EstLoraError(
            f"{panel.TITLE} takes up to {len(panel.KNOBS)} values in args ({', '.join(panel.KNOBS)}), and got"
            f" {len(arguments)}."
        )
    knobs = panel.read(arguments)
    if not knobs:
        return
    config = FusionConfig.of(knobs)
    loras = LoraList()
    for name in (config.subject, config.style):  # a tag in the prompt may name the one that isn't here
        if name is not None:
            loras.find(name)


def guard_requests() -> Callable[[], None]:
    """Has the host refuse malformed requests with 422 before they queue; returns what undoes it."""
    from modules.api.api import Api

    ours = "est_lora_wraps"
    original = getattr(Api.init_script_args, ours, Api.init_script_args)  # of a registration before Reload UI

    @functools.wraps(original)
    def init_script_args(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        from fastapi import HTTPException

        try:
            check(request)
        except EstLoraError as error:
            raise HTTPException(status_code=422, detail=str(error)) from error
        return original(self, request, *args, **kwargs)

    setattr(init_script_args, ours, original)
    Api.init_script_args = init_script_args

    def undo() -> None:
        if Api.init_script_args is init_script_args:
            Api.init_script_args = original

    return undo


def _property(field: Field) -> dict[str, Any]:
    described: dict[str, Any] = {"type": _TYPES[field.type], "description": field.help}
    if field.choices:
        described["enum"] = list(field.choices)
    if field.type is float:
        described["exclusiveMinimum" if field.above_low else "minimum"] = field.low
        described["maximum"] = field.high
    if field.auto:
        number = {key: described.pop(key) for key in ("type", "minimum", "maximum")}
        described["anyOf"] = [{"const": AUTO}, number]
    if field.default is not None:
        described["default"] = field.default
    return described
