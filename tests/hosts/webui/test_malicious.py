"""What strangers may send: a sentence comes back, soon, and nothing is opened, imported or run that isn't in the list."""

from __future__ import annotations

import math
import pickle
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from est_lora.config import FIELDS
from est_lora.errors import EstLoraError
from est_lora.hosts.webui import api
from est_lora.lora import reading
from tests.hosts.webui.fakes import App, HTTPException
from tests.hosts.webui.host import Processing
from tests.hosts.webui.looks import Bystander

KEYS = [field.key for field in FIELDS]
LONG = 10_000_000
LONGEST_SENTENCE = 700
SECONDS = 1.5
NAMES = [
    "../../../../etc/passwd",
    "..\\..\\windows\\win.ini",
    "/etc/passwd",
    "C:\\Windows\\win.ini",
    "\\\\server\\share\\x.safetensors",
    "file:///etc/passwd",
    "http://127.0.0.1/x.safetensors",
    "knight/../../secret",
    "./knight",
    "sub/twin",
    "sub\\twin",
    "knight.safetensors",
    "knight\x00.safetensors",
    "knight ",
    "KNIGHT",
    "knıght",
    "ｋｎｉｇｈｔ",
    "kn\u200bight",
    "\u202ethgink",
    "к\u0301night",
    "\ud800",
    "\U0010ffff",
    "\ufeffknight",
    "__import__('os').system('id')",
    "{knight.__class__.__mro__}",
    "${HOME}",
    "%(name)s%s%n",
    "`id`",
    "$(id)",
    "; rm -rf /",
    "<script>alert(1)</script>",
    "' OR 1=1 --",
    "{{7*7}}",
    "<est:knight:ink>",
    "((((((((((",
    "[" * 200,
    "{" * 200 + "}" * 200,
    "#",
    "#zzzzzzzzzzzz",
    "#" + "0" * 12,
    "#" + "a" * 64,
    "#" + "a" * 65,
    "# abcdefabcdef",
    "none",
    "None",
    "addams",
    "pickled",
    "broken",
    "giant",
    "con",
    "nul",
    "*",
    "?",
    "",
    " ",
    "\n",
    "a\nb\rc\x0bd\u2028e",
    "\x1b[31mred",
    "NaN",
    "a" * 300,
    "a." * 3000,
    "=" * 50,
    "k" * LONG,
    "猫" * (LONG // 10),
]
NUMBERS = [
    "nan",
    "-inf",
    "Infinity",
    "1e400",
    "-1e400",
    "1e-400",
    "9" * 5000,
    "9" * 100_000,
    "0x10",
    "0b1",
    "1_0",
    "１",
    "٣",
    "1,5",
    "1;2",
    "+-1",
    "1e",
    "--1",
    "None",
    "True",
    "1" + "0" * LONG,
    "\x00",
]
deep: list = []
for _ in range(400):
    deep = [deep]
VALUES = [
    None,
    True,
    False,
    0,
    -1,
    10**30,
    -(10**4000),
    math.nan,
    math.inf,
    -math.inf,
    5e-324,
    [],
    {},
    [[]],
    [None],
    ["knight"],
    {"subject": "knight"},
    {"__class__": "x"},
    {1: 2},
    b"knight",
    bytearray(b"x"),
    (1, 2),
    deep,
    {"a": deep},
    ["x"] * 100_000,
    {str(number): number for number in range(10_000)},
    "k" * LONG,
    1j,
    object(),
]


def tags(count, seed):
    """Malformed tags, from pieces that each do harm in their own way."""
    generator = random.Random(seed)
    for number in range(count):
        pieces = []
        for _ in range(generator.choice([1, 2, 2, 3, 4, 5, 6, 40])):
            kind = generator.random()
            key = generator.choice([*KEYS, "", " ", "__class__", "self", "cls", "SUBJECT", "subject\x00", "k" * 1000])
            value = generator.choice(NAMES if kind < 0.6 else NUMBERS)
            pieces.append(value if kind < 0.45 else f"{key}={value}")
        if number % 7 == 0:
            pieces[:0] = ["knight", "ink"]
        yield pieces


def bodies(count, seed):
    """API requests that no client of ours would send."""
    generator = random.Random(seed)

    def pick():
        return generator.choice(VALUES if generator.random() < 0.7 else NAMES)

    for _ in range(count):
        kind = generator.random()
        if kind < 0.5:
            given = {generator.choice([*KEYS, "", "__class__", "self", "x" * 1000]): pick() for _ in range(4)}
            yield {"args": [given]}
        elif kind < 0.8:
            yield {
                "args": [generator.choice([True, 1, "on", pick()]), *(pick() for _ in range(generator.randint(0, 12)))]
            }
        elif kind < 0.9:
            yield {"args": pick()}
        else:
            yield pick()


class Watch:
    """Notes, while it is on, what Python opens, imports and runs, and how long that takes."""

    def __init__(self):
        self.events, self._is_on = [], False
        sys.addaudithook(self._hear)

    def __enter__(self):
        self.events.clear()
        self._started, self._is_on = time.process_time(), True

    def __exit__(self, *_):
        self._is_on = False
        self.seconds = time.process_time() - self._started

    def _hear(self, event, arguments):
        if self._is_on and event in (
            "open",
            "exec",
            "compile",
            "import",
            "os.system",
            "subprocess.Popen",
            "socket.connect",
        ):
            self.events.append((event, arguments))

    def opened(self):
        return {str(arguments[0]) for event, arguments in self.events if event == "open"}

    def ran(self):
        return [event for event, _ in self.events if event not in ("open", "import")]


@pytest.fixture(scope="module")
def watch():
    return Watch()


@pytest.fixture
def safe_opened(monkeypatch):
    """What was opened by a library that Python doesn't hear of."""
    opened, original = [], reading.safe_open
    monkeypatch.setattr(reading, "safe_open", lambda path, *rest: opened.append(str(path)) or original(path, *rest))
    return opened


def plain(sentence):
    assert 0 < len(sentence) < LONGEST_SENTENCE
    assert "\n" not in sentence
    assert "\x00" not in sentence
    assert "\x1b" not in sentence
    assert "Traceback" not in sentence
    assert "failed (" not in sentence
    return True


@pytest.mark.parametrize("flavour", ["a1111", "forge"])
def test_tags(start, watch, safe_opened, flavour, files, monkeypatch):
    web = start(flavour)
    usable = {entry.filename for entry in web.networks.available_networks.values()}
    monkeypatch.setattr(web.networks, "list_available_networks", lambda: None)
    by, slowest, refused = Bystander(web, files), 0.0, 0
    for pieces in tags(170, seed=1):
        p = Processing(web, "a knight", steps=1)
        p.prompts, p.negative_prompts = ["a knight "], [""]
        p.extra_network_data = {"est": [SimpleNamespace(items=pieces, positional=pieces)]}
        web.tell("process", p)
        with watch:
            web.tell("after_extra_networks_activate", p, extra_network_data=p.extra_network_data)
        slowest = max(slowest, watch.seconds)
        assert all(plain(said) for said in p.comments)
        refused += "EST-LoRA off" in p.extra_generation_params
        assert set(safe_opened) <= usable
        assert watch.opened() <= usable
        assert not watch.ran()
        if "EST-LoRA off" not in p.extra_generation_params:
            p.est_lora.release()
    assert web.errors == []
    assert refused > 100
    assert slowest < SECONDS
    web.make(Processing(web, "a knight"))
    assert max(by.plain_off_by(call) for call in web.calls) < 1e-4


def test_api_bodies(start, watch, safe_opened, monkeypatch):
    web = start("a1111")
    usable = {entry.filename for entry in web.networks.available_networks.values()}
    monkeypatch.setattr(web.networks, "list_available_networks", lambda: None)
    slowest, refused = 0.0, 0
    for body in bodies(400, seed=2):
        with watch:
            try:
                api.check(SimpleNamespace(alwayson_scripts={"EST-LoRA": body}))
            except EstLoraError as error:
                refused += plain(str(error))
        slowest = max(slowest, watch.seconds)
        assert watch.opened() <= usable
        assert not watch.ran()
    assert not safe_opened
    assert refused > 250
    assert slowest < SECONDS


def test_plan_queries(start, watch, safe_opened, monkeypatch):
    web, app = start("forge"), App()
    web.callbacks.call("on_app_started", None, app)
    usable = {entry.filename for entry in web.networks.available_networks.values()}
    monkeypatch.setattr(web.networks, "list_available_networks", lambda: None)
    generator, slowest = random.Random(3), 0.0
    for _ in range(150):
        query = {generator.choice([*KEYS, "x"]): generator.choice(NAMES + NUMBERS) for _ in range(3)}
        with watch:
            try:
                app.get("/est-lora/v1/plan", **query)
            except HTTPException as error:
                assert error.status_code == 422
                assert plain(error.detail)
        slowest = max(slowest, watch.seconds)
        assert watch.opened() <= usable
        assert not watch.ran()
    assert set(safe_opened) <= usable
    assert slowest < SECONDS


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("pickled", "broken", "giant")])
def test_no_name_reaches_a_file_outside_the_list(start, safe_opened, name, tmp_path, monkeypatch):
    """Not even one that exists."""
    web = start("forge")
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(Path(web.networks.available_networks["ink"].filename).read_bytes())
    monkeypatch.chdir(tmp_path)
    for asked in (name, str(secret), "secret", "secret.safetensors", "./secret.safetensors"):
        with pytest.raises(EstLoraError):
            api.check(SimpleNamespace(alwayson_scripts={"EST-LoRA": {"args": [{"subject": asked, "style": "ink"}]}}))
    assert not safe_opened


@pytest.mark.parametrize("key", KEYS)
def test_a_very_deep_value_is_refused_like_any_other(start, key):
    start("a1111")
    nested: list = []
    for _ in range(5000):
        nested = [nested]
    with pytest.raises(EstLoraError):
        api.check(SimpleNamespace(alwayson_scripts={"EST-LoRA": {"args": [{key: nested}]}}))


@pytest.mark.parametrize("key", KEYS)
def test_a_very_long_number_is_refused_like_any_other(start, key):
    start("a1111")
    with pytest.raises(EstLoraError):
        api.check(SimpleNamespace(alwayson_scripts={"EST-LoRA": {"args": [{key: 10**5000}]}}))


def test_a_pickle_is_not_even_opened(web, watch, safe_opened):
    with watch, pytest.raises(EstLoraError, match="is a pickle"):
        api.plan_json({"subject": "knight", "style": "pickled"})
    assert not any(path.endswith(".pt") for path in watch.opened())
    assert not any(path.endswith(".pt") for path in safe_opened)


def test_a_pickle_that_calls_itself_safetensors_is_not_unpickled(start, tmp_path, watch):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trapped"), "w"))

    web = start("a1111")
    trap = tmp_path / "trap.safetensors"
    trap.write_bytes(pickle.dumps(Trap()))
    web.networks.available_networks["trap"] = web.networks.available_network_aliases["trap"] = SimpleNamespace(
        name="trap", filename=str(trap), hash="", shorthash="", read_hash=lambda: None
    )
    p = Processing(web, "a knight <est:knight:trap>")
    web.make(p)
    (said,) = p.comments
    assert "is a pickle, which can run code" in said
    assert not (tmp_path / "trapped").exists()
