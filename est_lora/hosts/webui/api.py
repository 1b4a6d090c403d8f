"""The host's HTTP API: requests are checked before they queue, and two routes of our own tell what may be asked."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Mapping
from typing import Any

from est_lora import report
from est_lora.config import AUTO, FIELDS, Field, FusionConfig
from est_lora.errors import EstLoraError, quote
from est_lora.hosts.webui import panel
from est_lora.hosts.webui.loras import LoraList
from est_lora.hosts.webui.paste import renamed
from est_lora.hosts.webui.preview import Preview
from est_lora.hosts.webui.request import combined
from est_lora.hosts.webui.steps import Sampling
from est_lora.plot import gate_map

_PREFIX = "/est-lora/v1"
# A route that every host has behind its own password; ours get the same guard.
_GUARDED = "/sdapi/v1/options"
_SAMPLER, _STEPS, _MOST_STEPS = "Euler", 20, 1000
_WHOLE = re.compile(r"[0-9]{1,9}")
_TYPES = {str: "string", float: "number", bool: "boolean"}


def add_routes(app: Any) -> None:
    """Adds our routes, where the host has its API on."""
    guarded = next((route for route in app.routes if getattr(route, "path", None) == _GUARDED), None)
    if guarded is None or any(getattr(route, "path", "").startswith(_PREFIX) for route in app.routes):
        return
    from fastapi import Request, Response

    def plan(request: Request) -> dict[str, Any]:
        """What the two LoRAs will do, layer by layer."""
        return _answer(plan_json, dict(request.query_params))

    def plan_png(request: Request) -> Response:
        """The same as a picture."""
        return Response(_answer(plan_picture, dict(request.query_params)), media_type="image/png")

    for endpoint in (plan, plan_png):
        endpoint.__annotations__["request"] = Request  # annotations here are text, which FastAPI can't look up
    for name, endpoint in (("schema", schema), ("plan", plan), ("plan.png", plan_png)):
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
    return report.to_json(Preview().plan(combined(knobs)))


def plan_picture(asked: Mapping[str, Any]) -> bytes:
    """The gate map of a pair as PNG; beside the knobs a request may name `sampler`, `scheduler` and `steps` to mark.

    Raises:
        EstLoraError: a knob or a file can't be used.
    """
    knobs = dict(asked)
    sampler, scheduler, steps = (knobs.pop(key, None) for key in ("sampler", "scheduler", "steps"))
    plan = Preview().plan(combined(knobs))
    marks: list[float] = []
    if sampler is not None or steps is not None:
        if not _WHOLE.fullmatch(str(steps or _STEPS)):
            raise EstLoraError(f"steps can't be {quote(steps)}: it is a whole number.")
        marks = Sampling(sampler or _SAMPLER, scheduler, min(int(steps or _STEPS), _MOST_STEPS)).taus(plan.config.clock)
    stream = io.BytesIO()
    gate_map(plan, marks).savefig(stream, format="png")
    return stream.getvalue()


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
    """Has the host refuse malformed requests with 422 before they queue; returns what undoes it.

    It also has the tags of a prompt that the host takes from an `infotext` name the files as they are called here.
    """
    from modules.api.api import Api

    def init_script_args(original: Callable[..., Any], self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        _answer(check, request)
        return original(self, request, *args, **kwargs)

    def apply_infotext(original: Callable[..., Any], self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = original(self, request, *args, **kwargs)
        if parameters and request.prompt:
            request.prompt = renamed(request.prompt, parameters)
        return parameters

    undo = [_wrap(Api, wrapper) for wrapper in (init_script_args, apply_infotext) if hasattr(Api, wrapper.__name__)]

    def undo_all() -> None:
        for one in undo:
            one()

    return undo_all


def _wrap(owner: type, wrapper: Callable[..., Any]) -> Callable[[], None]:
    """Puts `wrapper` around the method of its name, once; returns what undoes it."""
    name, ours = wrapper.__name__, "est_lora_wraps"
    there = getattr(owner, name)
    original = getattr(there, ours, there)  # under a registration before Reload UI

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(wrapped, ours, original)
    setattr(owner, name, wrapped)

    def undo() -> None:
        if getattr(owner, name) is wrapped:
            setattr(owner, name, original)

    return undo


def _answer(function: Callable[[Any], Any], asked: Any) -> Any:
    """What `function` says to a request, or 422 with the sentence of what is wrong with it."""
    from fastapi import HTTPException

    try:
        return function(asked)
    except EstLoraError as error:
        raise HTTPException(status_code=422, detail=str(error)) from error


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
