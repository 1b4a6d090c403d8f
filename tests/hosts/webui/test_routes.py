"""The routes in a real FastAPI, where there is one."""

from __future__ import annotations

import sys

import pytest

from est_lora.config import FIELDS, FusionConfig
from est_lora.hosts.webui import api
from tests.hosts.webui.looks import PANEL

fastapi = pytest.importorskip("fastapi")
pytest.importorskip("httpx")
PAIR = {"subject": "knight", "style": "ink"}


@pytest.fixture
def client(start, monkeypatch):
    """A client of a host that wants a password."""
    from fastapi.testclient import TestClient

    def guard(request):
        if request.headers.get("authorization") != "secret":
            raise fastapi.HTTPException(401)

    guard.__annotations__["request"] = fastapi.Request  # annotations are text here
    web = start("a1111")
    monkeypatch.setitem(sys.modules, "fastapi", fastapi)
    app = fastapi.FastAPI()
    app.add_api_route(
        "/sdapi/v1/options", lambda: {"samples_save": True}, methods=["GET"], dependencies=[fastapi.Depends(guard)]
    )
    api.add_routes(app)
    client = TestClient(app, headers={"authorization": "secret"})
    client.web = web
    return client


@pytest.mark.parametrize(
    "path", ["schema", "plan?subject=knight&style=ink", "plan.png?subject=knight&style=ink&steps=4"]
)
def test_they_want_the_password(client, path):
    assert client.get(f"/est-lora/v1/{path}").status_code == 200
    assert client.get(f"/est-lora/v1/{path}", headers={"authorization": "guess"}).status_code == 401


def test_the_plan_as_a_picture(client):
    told = client.get("/est-lora/v1/plan.png", params={**PAIR, "steps": "4"})
    assert told.headers["content-type"] == "image/png"
    assert told.content.startswith(b"\x89PNG")


def test_the_plan(client):
    told = client.get("/est-lora/v1/plan", params={**PAIR, "lean": "0.5"})
    assert told.status_code == 200
    assert told.json() == api.plan_json({**PAIR, "lean": 0.5})


@pytest.mark.parametrize(
    ("query", "sentence"),
    [({}, "no subject was given"), ({**PAIR, "lean": "7"}, "lean can't be '7'"), ({**PAIR, "x": "1"}, "no knob 'x'")],
)
def test_a_plan_that_cannot_be_made(client, query, sentence):
    told = client.get("/est-lora/v1/plan", params=query)
    assert told.status_code == 422
    assert sentence in told.json()["detail"]


def test_they_are_in_the_hosts_documentation(client):
    described = client.get("/openapi.json").json()["paths"]
    assert {f"/est-lora/v1/{name}" for name in ("schema", "plan", "plan.png")} <= described.keys()


def test_the_schema_is_json_schema(client):
    jsonschema = pytest.importorskip("jsonschema")
    schema = client.get("/est-lora/v1/schema").json()
    validator = jsonschema.validators.validator_for(schema)
    validator.check_schema(schema)
    check = validator(schema)
    assert check.is_valid(PANEL)
    for field in FIELDS:
        for value in (-3, 0, 0.5, 2, 11, True, "auto", "est", "s*", "off", "x"):
            if check.is_valid({**PAIR, field.key: value}):
                FusionConfig.of({**PAIR, field.key: value})
    assert not check.is_valid({**PAIR, "alpha": 0})
    assert not check.is_valid({**PAIR, "x": 0})
    assert not check.is_valid({"subject": "a"})


def test_a_malformed_request_is_the_hosts_own_exception(client):
    with pytest.raises(fastapi.HTTPException) as caught:
        client.web.api_arguments({"EST-LoRA": {"args": [{"lean": 7}]}})
    assert caught.value.status_code == 422
