"""The benchmark of a running WebUI asks the right things of it, and says so where it can't be measured."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from benchmarks import webui
from benchmarks.webui import AFTER, AGAIN, BARE, PAIR, WAYS, main, measured


class FakeWebUI(ThreadingHTTPServer):
    """Answers as a WebUI with our extension does; notes which pictures were asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.requests = []
        self.said = {"EST-LoRA subject": "cat", "EST-LoRA style": "ink"}
        self.routes = {"/sdapi/v1/options": self.options, "/est-lora/v1/plan": self.plan}
        self.thread = threading.Thread(target=self.serve_forever)
        self.thread.start()

    def options(self, query):
        return 200, {"sd_model_checkpoint": "a checkpoint"}

    def plan(self, query):
        if query["subject"] != ["cat"]:
            return 422, {"detail": f"The WebUI has no LoRA '{query['subject'][0]}'."}
        return 200, {"layers": [{}] * 3}

    def draw(self, request):
        self.requests.append(request)
        said = self.said if request["alwayson_scripts"] else {}
        return 200, {"images": [], "info": json.dumps({"extra_generation_params": said})}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        url = urlsplit(self.path)
        route = self.server.routes.get(url.path, lambda query: (404, {"detail": "Not Found"}))
        self.answer(*route(parse_qs(url.query)))

    def do_POST(self):
        self.answer(*self.server.draw(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

    def answer(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def fake():
    server = FakeWebUI()
    yield server
    server.shutdown()
    server.thread.join()
    server.server_close()


def test_every_way_is_asked_for_and_written_down(fake, tmp_path, capsys):
    arguments = [fake.address, "cat", "ink", "--rounds", "2", "--steps", "4", "--side", "128", "-o", str(tmp_path)]
    assert main(arguments) == 0
    result = json.loads((tmp_path / "WEBUI.json").read_text())
    assert [row["what"] for row in result["rows"]] == list(WAYS)
    assert result["settings"] == {"checkpoint": "a checkpoint", "layers": 3, "rounds": 2, "steps": 4, "side": 128}
    table = (tmp_path / "WEBUI.md").read_text()
    assert table in capsys.readouterr().out
    assert all(f"\n| {way} |" in table for way in WAYS)
    assert len(fake.requests) == 2 * len(WAYS) * 3
    bare, pair, auto, branch = fake.requests[: 2 * len(WAYS) : 2]
    assert (bare["prompt"], bare["alwayson_scripts"]) == ("a red cat", {})
    assert (pair["prompt"], pair["alwayson_scripts"]) == ("a red cat <lora:cat:1> <lora:ink:1>", {})
    for request, knobs in ((auto, {}), (branch, {"engine": "branch"})):
        asked = {"subject": "cat", "style": "ink", "beta": 0.5, **knobs}
        assert (request["prompt"], request["alwayson_scripts"]) == ("a red cat", {"EST-LoRA": {"args": [asked]}})
    assert {(each["steps"], each["width"], each["height"]) for each in fake.requests} == {(4, 128, 128)}


def test_each_way_draws_twice_and_the_first_round_does_not_count():
    drawn, ticks = [], []
    seconds = {way: 1.0 + index for index, way in enumerate(WAYS)}

    def draw(way):
        drawn.append(way)
        is_first_round, is_again = len(drawn) <= 2 * len(WAYS), drawn[-2:-1] == [way]
        return 100.0 if is_first_round else seconds[way] / (2 if is_again else 1)

    rows = {row["what"]: row for row in measured(draw, 5, lambda: ticks.append(1))}
    assert len(drawn) == len(ticks) == 2 * len(WAYS) * 6
    assert drawn[::2] == drawn[1::2]
    assert all(one != other for one, other in zip(drawn[1::2], drawn[2::2]))
    assert len({drawn[start] for start in range(0, len(drawn), 2 * len(WAYS))}) == len(WAYS)
    for way, value in seconds.items():
        assert rows[way][AFTER]["seconds"]["median"] == value
        assert rows[way][AGAIN]["seconds"]["median"] == value / 2
        assert rows[way][AFTER]["ratio"]["median"] == pytest.approx(value / seconds[BARE])
    assert rows[PAIR][AGAIN]["ratio"]["median"] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("127.0.0.1 cat ink", "begins with http://"),
        ("{fake} cat", "--help"),
        ("{fake} cat ink --rounds 0", "from 1"),
        ("{fake} cat ink --side 100", "multiple of 64"),
        ("{fake} dog ink", "no LoRA 'dog'"),
        ("{fake}/elsewhere cat ink", "--api"),
        ("http://127.0.0.1:{closed} cat ink", "No WebUI"),
        ("{fake} cat ink -o taken", "a folder"),
    ],
)
def test_nonsense_gets_one_sentence(fake, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert main(arguments.format(fake=fake.address, closed=unused.getsockname()[1]).split()) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out
    assert not fake.requests
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_picture_without_the_fusion_is_no_measurement(fake, tmp_path, capsys):
    fake.said = {"EST-LoRA off": "Flux can't be fused."}
    assert main([fake.address, "cat", "ink", "-o", str(tmp_path)]) == 2
    assert "Flux can't be fused." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_no_webui_is_told(fake, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fake, "draw", lambda request: (500, ["oh"]))
    assert main([fake.address, "cat", "ink", "-o", str(tmp_path)]) == 2
    assert "HTTP 500" in capsys.readouterr().err
    assert webui.WebUI(fake.address).get("/est-lora/v1/plan", subject="cat") == {"layers": [{}] * 3}
