"""The API: what is refused before it queues, the routes, and the parameters that a request may hold."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from est_lora import report
from est_lora.config import FIELDS, FusionConfig
from est_lora.gate import FusionPlan
from est_lora.hosts.webui import api
from est_lora.hosts.webui.steps import Sampling
from est_lora.lora import LoraFile
from tests.hosts.webui.fakes import App, HTTPException, infotext_of, read_infotext
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


def test_a_plan_is_over_the_settings(web, app):
    web.modules["modules.shared"].opts.data |= {"est_lora_lean": 0.5, "est_lora_alpha": 3}
    config = app.get("/est-lora/v1/plan", **NAMED, alpha="2")["config"]
    assert (config["lean"], config["alpha"]) == (0.5, 2.0)


def test_a_file_that_has_gone_is_422(web, app, monkeypatch, tmp_path):
    monkeypatch.setattr(web.networks.available_networks["ink"], "filename", str(tmp_path / "gone.safetensors"))
    for path in ("plan", "plan.png"):
        with pytest.raises(HTTPException, match="gone.safetensors") as caught:
            app.get(f"/est-lora/v1/{path}", **NAMED)
        assert caught.value.status_code == 422


class TestPicture:
    """The plan as PNG."""

    @pytest.fixture
    def drawn(self, note_maps):
        """What was drawn."""
        return note_maps(api)

    def test_it_is_a_png(self, app):
        answer = app.get("/est-lora/v1/plan.png", **NAMED)
        assert answer.media_type == "image/png"
        with Image.open(io.BytesIO(answer.content)) as picture:
            assert picture.format == "PNG"
            picture.load()

    def test_it_is_of_the_plan(self, web, app, drawn):
        web.modules["modules.shared"].opts.data["est_lora_alpha"] = 3
        app.get("/est-lora/v1/plan.png", **NAMED, lean="0.5")
        ((plan, marks),) = drawn
        assert report.to_json(plan) == app.get("/est-lora/v1/plan", **NAMED, lean="0.5")
        assert marks == []

    @pytest.mark.parametrize(
        ("asked", "meant"),
        [
            ({"steps": "4"}, Sampling("Euler", None, 4)),
            ({"sampler": "DDIM"}, Sampling("DDIM", None, 20)),
            ({"sampler": "Heun", "scheduler": "Karras", "steps": "3"}, Sampling("Heun", "Karras", 3)),
            ({"steps": "4", "scheduler": "Karras"}, Sampling("Euler", "Karras", 4)),
            ({"steps": ""}, Sampling("Euler", None, 20)),
            ({"sampler": "Heun", "steps": "99999"}, Sampling("Heun", None, 1000)),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("clock", ["timestep", "step"])
    def test_steps_are_marked(self, app, drawn, asked, meant, clock):
        app.get("/est-lora/v1/plan.png", **NAMED, **asked, clock=clock)
        ((_, marks),) = drawn
        assert marks == meant.taus(clock)
        assert marks

    @pytest.mark.parametrize("asked", [{"scheduler": "Karras"}, {"sampler": "nobody"}, {"steps": "0"}], ids=str)
    def test_none_are_marked_where_there_are_none(self, app, drawn, asked):
        app.get("/est-lora/v1/plan.png", **NAMED, **asked)
        assert drawn[0][1] == []

    @pytest.mark.parametrize(
        ("query", "sentence"),
        [
            ({"steps": "many"}, "steps can't be 'many': it is a whole number."),
            ({"steps": "-1"}, "steps can't be '-1'"),
            ({"steps": "1.5"}, "steps can't be '1.5'"),
            ({"steps": "9" * 5000}, "steps can't be '999"),
            ({"sampling": "Euler"}, "no knob 'sampling'"),
            ({"lean": "7"}, "lean can't be '7'"),
            ({"style": "giant"}, "different models"),
        ],
    )
    def test_what_cannot_be_drawn_is_422(self, app, query, sentence):
        with pytest.raises(HTTPException) as caught:
            app.get("/est-lora/v1/plan.png", **{**NAMED, **query})
        assert caught.value.status_code == 422
        assert sentence in caught.value.detail


class TestInfotextOfARequest:
    @pytest.fixture
    def apply(self, web):
        """What the host makes of a request's prompt."""
        api = web.modules["modules.api.api"].Api()

        def apply(infotext, prompt=None):
            request = SimpleNamespace(infotext=infotext, prompt=prompt)
            return api.apply_infotext(request, "txt2img", script_runner=None, mentioned_script_args={}), request.prompt

        return apply

    @pytest.fixture
    def text(self, web):
        """The parameters of a picture whose subject had another name."""
        entry = web.networks.available_networks["knight"]
        entry.read_hash()
        return infotext_of("a <est:paladin:ink:lean=1>", {"Lora hashes": f"paladin: {entry.shorthash}"})

    def test_a_tag_names_the_file_as_it_is_called_here(self, apply, text):
        assert apply(text)[1] == "a <est:knight:ink:lean=1>"

    def test_also_in_a_prompt_of_the_requests_own(self, apply, text):
        assert apply(text, "b <est:ink:paladin>")[1] == "b <est:ink:knight>"

    def test_what_the_host_answers_is_handed_on(self, apply, text):
        assert apply(text)[0] == read_infotext(text)

    @pytest.mark.parametrize("infotext", [None, ""])
    def test_without_one_nothing_is_changed(self, apply, infotext):
        assert apply(infotext, "<est:knight alias:ink alias>") == ({}, "<est:knight alias:ink alias>")
        assert apply(infotext) == ({}, None)

    def test_it_comes_off(self, web, apply, text):
        web.callbacks.call("on_script_unloaded")
        assert not hasattr(web.modules["modules.api.api"].Api.apply_infotext, "__wrapped__")
        assert apply(text)[1] == "a <est:paladin:ink:lean=1>"

    def test_a_host_without_it_still_refuses_requests(self, web):
        web.callbacks.call("on_script_unloaded")
        web.callbacks.callbacks.clear()
        del web.modules["modules.api.api"].Api.apply_infotext
        web.load_entry()
        refused(web, {"lean": 7})
