"""The API: what is refused before it queues, and the two routes."""

from __future__ import annotations

import json
import sys

import pytest

from est_lora import report
from est_lora.config import FIELDS, FusionConfig
from est_lora.gate import FusionPlan
from est_lora.lora import LoraFile
from tests.hosts.webui.fakes import App, HTTPException
from tests.hosts.webui.looks import PANEL

NAMED = {"subject": "knight", "style": "ink"}


def refused(web, *arguments, title="EST-LoRA"):
    with pytest.raises(HTTPException) as caught:
        web.api_arguments({title: {"args": list(arguments)}})
    assert caught.value.status_code == 422
    assert "\n" not in caught.value.detail
    return caught.value.detail


REFUSED = [
    ([{**NAMED, "subjet": "x"}], "no knob 'subjet': did you mean subject"),
    ([{**NAMED, "lean": 1.5}], "lean can't be '1.5': it is a number in -1 ... 1."),
    ([{**NAMED, "lean": "much"}], "lean can't be 'much'"),
    ([{**NAMED, "lean": None}], "lean can't be 'None'"),
    ([{**NAMED, "lean": True}], "lean can't be 'True'"),
    ([{**NAMED, "lean": float("nan")}], "lean can't be 'nan'"),
    ([{**NAMED, "beta": [0.5]}], "beta can't be '[0.5]'"),
    ([{**NAMED, "method": "fast"}], "method can't be 'fast': it is one of est, k-lora, sum, subject, style."),
    ([{**NAMED, "method": ["est"]}], "method can't be"),
    ([{**NAMED, "enabled": "perhaps"}], "enabled can't be 'perhaps': it is true or false."),
    ([{**NAMED, "enabled": 2}], "enabled can't be '2'"),
    ([{**NAMED, "subject": "knigth"}], "no LoRA 'knigth': did you mean 'knight'"),
    ([{**NAMED, "subject": 3}], "subject can't be '3': it is a LoRA file."),
    ([{**NAMED, "subject": {"a": 1}}], "subject can't be"),
    ([{**NAMED, "subject": ""}], "subject can't be ''"),
    ([{**NAMED, "style": "pickled"}], "'pickled.pt' is a pickle"),
    ([{**NAMED, "style": "../../etc/passwd"}], "no LoRA '../../etc/passwd'"),
    ([{"style": "nobody"}], "no LoRA 'nobody'"),
    ([NAMED, NAMED], "takes one object in args, and got 2 things."),
    ([NAMED, True], "takes one object in args, and got 2 things."),
    ([True, "knight", "ink", *[1] * 16], "takes up to 18 values in args (enabled, subject, style,"),
    ([True, "knight", "ink", 9], "subject_weight can't be '9'"),
    ([True, "knight", "ink", 1, 1, "auto", 1.5, 0, "energy", "s", "step", "klora"], "method can't be 'klora'"),
    (["perhaps", "knight", "ink"], "enabled can't be 'perhaps'"),
    ([[], "knight", "ink"], "enabled can't be '[]'"),
    ([True, NAMED], "subject can't be"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED)
def test_a_malformed_request_is_refused_with_a_sentence(web, arguments, sentence):
    assert sentence in refused(web, *arguments)


@pytest.mark.parametrize("given", [None, [], "x", 3, {"args": NAMED}, {"args": "knight"}, {"args": None}, [NAMED]])
def test_arguments_of_another_shape_are_refused(web, given):
    with pytest.raises(HTTPException) as caught:
        web.api_arguments({"EST-LoRA": given})
    assert caught.value.status_code == 422
    assert 'EST-LoRA takes {"args": [{"subject": ..., "style": ...}]}, and got ' in caught.value.detail


def test_its_name_is_read_in_any_case(web):
    assert "lean can't be" in refused(web, {**NAMED, "lean": 7}, title="eSt-LORA")


ACCEPTED = [
    [],
    [{}],
    [NAMED],
    [{"style": "ink"}],
    [{"enabled": False, "subject": "nobody", "lean": 7}],
    [False, "nobody"],
    [None],
    [True, "knight", "ink", 0.5, "0.5", "0.3", 2, "-1", "l1", "s*", "step", "k-lora"],
    [True, "None", "None"],
    [{**NAMED, "lean": "0.5", "enabled": "true", "beta": "auto"}],
]


@pytest.mark.parametrize("arguments", ACCEPTED, ids=str)
def test_a_request_that_makes_sense_goes_through_as_it_is(web, arguments):
    passed = web.api_arguments({"EST-LoRA": {"args": arguments}})
    assert passed[: len(arguments)] == arguments
    assert passed[len(arguments) :] == web.default_arguments()[len(arguments) :]


def test_requests_without_it_go_through(web):
    assert web.api_arguments({}) == web.default_arguments()
    assert web.api_arguments(None) == web.default_arguments()
    assert web.api_arguments({"ControlNet": {"args": ["x"]}})[0] == "x"
    assert web.api_arguments({"EST-LoRA": {}}) == web.default_arguments()


def test_a_refused_request_never_reaches_the_host(web):
    reached = []
    web.callbacks.call("on_script_unloaded")
    web.callbacks.callbacks.clear()
    api = web.modules["modules.api.api"].Api
    api.init_script_args = lambda self, request, *args, **kwargs: reached.append((request, args, kwargs))
    web.load_entry()
    refused(web, {"lean": 7})
    assert not reached
    web.api_arguments({"EST-LoRA": {"args": [NAMED]}})
    (((request), args, kwargs),) = reached
    assert request.alwayson_scripts == {"EST-LoRA": {"args": [NAMED]}}
    assert len(args) == 4
    assert kwargs == {}


class TestWrapping:
    def depth(self, api):
        function, depth = api.init_script_args, 0
        while hasattr(function, "__wrapped__"):
            function, depth = function.__wrapped__, depth + 1
        return depth

    def test_twice_is_once(self, web):
        api = web.modules["modules.api.api"].Api
        assert self.depth(api) == 1
        web.load_entry()
        assert self.depth(api) == 1
        refused(web, {"lean": 7})

    def test_it_comes_off(self, web):
        api = web.modules["modules.api.api"].Api
        web.callbacks.call("on_script_unloaded")
        assert self.depth(api) == 0
        assert api.init_script_args.__qualname__.startswith("api_module")
        assert web.api_arguments({"EST-LoRA": {"args": [{"lean": 7}]}})[0] == {"lean": 7}

    def test_it_comes_off_after_two_registrations(self, web):
        original = web.modules["modules.api.api"].Api.init_script_args.__wrapped__
        web.load_entry()
        web.callbacks.call("on_script_unloaded")
        assert web.modules["modules.api.api"].Api.init_script_args is original

    def test_reload_as_the_host_does_it(self, web):
        web.callbacks.call("on_script_unloaded")
        web.callbacks.callbacks.clear()
        web.load_entry()
        assert self.depth(web.modules["modules.api.api"].Api) == 1
        refused(web, {"lean": 7})

    def test_anothers_wrapper_over_it_stays(self, web):
        api = web.modules["modules.api.api"].Api
        ours = api.init_script_args
        api.init_script_args = theirs = lambda *args, **kwargs: ours(*args, **kwargs)
        web.callbacks.call("on_script_unloaded")
        assert api.init_script_args is theirs
        assert web.api_arguments({}) == web.default_arguments()


@pytest.fixture
def app(web):
    app = App()
    web.callbacks.call("on_app_started", None, app)
    return app


def paths(app):
    return [route.path for route in app.routes if getattr(route, "path", "").startswith("/est-lora")]


def test_routes_have_the_hosts_guard(app):
    assert paths(app) == ["/est-lora/v1/schema", "/est-lora/v1/plan", "/est-lora/v1/plan.png"]
    for route in app.routes[-3:]:
        assert route.dependencies == ["password"]
        assert route.methods == ["GET"]


def test_no_routes_where_the_api_is_off(web):
    app = App(paths=("/queue/status", "/internal/ping"))
    web.callbacks.call("on_app_started", None, app)
    assert paths(app) == []


def test_routes_are_added_once(web, app):
    web.load_entry()
    web.callbacks.call("on_app_started", None, app)
    assert len(paths(app)) == 3


def test_the_schema_tells_every_knob(app):
    schema = app.get("/est-lora/v1/schema")
    json.dumps(schema, allow_nan=False)
    assert schema["title"] == "EST-LoRA"
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["subject", "style"]
    assert list(schema["properties"]) == [field.key for field in FIELDS]
    for field in FIELDS:
        described = schema["properties"][field.key]
        assert described["description"] == field.help
        assert described.get("enum", []) == list(field.choices)
        if field.default is not None:
            assert described["default"] == field.default
            assert allows(described, field.default)


def allows(described, value):
    """A validator for as much of JSON Schema as is used here."""
    if "anyOf" in described:
        return any(allows(one, value) for one in described["anyOf"])
    if "const" in described:
        return value == described["const"]
    kinds = {"string": str, "boolean": bool, "number": (int, float)}
    if not isinstance(value, kinds[described["type"]]) or (described["type"] == "number" and isinstance(value, bool)):
        return False
    if "enum" in described:
        return value in described["enum"]
    if described["type"] == "number":
        return (
            described.get("minimum", value) <= value <= described["maximum"]
            and described.get("exclusiveMinimum", value - 1) < value
        )
    return True


VALUES = [-3, -2, -1, 0, 0.5, 1, 1.5, 2, 2.5, 10, 11, True, False, None, "auto", "est", "s*", "l1", "off", "", "x", []]


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.key)
def test_the_schema_allows_what_the_knob_takes_in_json(app, field):
    described = app.get("/est-lora/v1/schema")["properties"][field.key]
    for value in VALUES:
        if not allows(described, value):
            continue
        if field.type is str and not field.choices and value == "":
            continue
        FusionConfig.of({field.key: value})
    outside = [value for value in VALUES if isinstance(value, (int, float)) and not isinstance(value, bool)]
    for value in outside:
        if field.type is float and not allows(described, value):
            with pytest.raises(ValueError, match=field.key):
                FusionConfig.of({field.key: value})


@pytest.mark.parametrize("knobs", [{}, {"lean": "0.5", "balance": "l1"}, {"method": "style", "beta": "0.2"}], ids=str)
def test_the_plan_is_the_reports(app, files, knobs):
    told = app.get("/est-lora/v1/plan", **NAMED, **knobs)
    config = FusionConfig.of({**NAMED, **knobs})
    pair = (LoraFile.load(files.path(name)) for name in ("knight", "ink"))
    assert told == report.to_json(FusionPlan.of(*pair, config))
    json.dumps(told, allow_nan=False)


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ({}, "no subject was given"),
        ({"subject": "knight"}, "no style was given"),
        ({**NAMED, "x": "1"}, "no knob 'x'"),
        ({**NAMED, "lean": "7"}, "lean can't be '7'"),
        ({**NAMED, "style": "/etc/passwd"}, "no LoRA '/etc/passwd'"),
        ({**NAMED, "style": "pickled"}, "is a pickle"),
        ({**NAMED, "style": "broken"}, "isn't a whole safetensors file"),
        ({**NAMED, "style": "giant"}, "different models"),
    ],
)
def test_a_plan_that_cannot_be_made_is_422(app, query, sentence):
    with pytest.raises(HTTPException) as caught:
        app.get("/est-lora/v1/plan", **query)
    assert caught.value.status_code == 422
    assert sentence in caught.value.detail


def test_a_plan_needs_no_loaded_model(web, app):
    web.sd_model = None
    assert app.get("/est-lora/v1/plan", **NAMED)["layers"]


def test_a_disabled_lora_extension_is_422(web, app, monkeypatch):
    monkeypatch.delitem(sys.modules, "networks")
    assert "built-in Lora extension is disabled" in refused(web, PANEL)
    with pytest.raises(HTTPException, match="built-in Lora extension is disabled"):
        app.get("/est-lora/v1/plan", **NAMED)
