"""Presets: what is saved is loaded, whoever else writes, dies, edits by hand or takes away the disk."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from est_lora import stored
from est_lora.config import AUTO, BY_KEY, FIELDS, FusionConfig
from est_lora.errors import EstLoraError
from est_lora.text.presets import Presets

ROOT = Path(__file__).parent.parent.parent
ALWAYS = BY_KEY.keys() - {"enabled", "subject", "style"}
NAMES = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=64).map(str.strip).filter(bool)
VALUES = {field.key: st.floats(max(field.low, -9), field.high, exclude_min=field.above_low) for field in FIELDS[3:]}
VALUES |= {field.key: st.sampled_from(field.choices) for field in FIELDS if field.choices}
VALUES |= {"enabled": st.booleans(), "subject": st.text(min_size=1), "style": st.text(min_size=1)}
VALUES["beta"] |= st.just(AUTO)
KNOBS = st.fixed_dictionaries({}, optional=VALUES)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
SAVES = """
import sys
from pathlib import Path
from est_lora.text.presets import Presets
path, who = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[3])):
    Presets(path).save(f"{who} {number}", {"lean": number / 1000})
    print(number, flush=True)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data" / "est-lora" / "presets.json"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def fails_with(code):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code), str(args[0]))

    return fail


def refusal(method, *args):
    """The one line that a call is refused with."""
    with pytest.raises(EstLoraError) as raised:
        method(*args)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600
    return str(raised.value)


@pytest.fixture
def saver():
    """Starts a process that saves `count` presets as soon as it is told to."""
    processes = []

    def start(path, who, count, code=SAVES):
        command = [sys.executable, "-c", code, path, who, str(count)]
        process = subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        processes.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def tell(process):
    process.stdin.write("\n")
    process.stdin.flush()


@given(st.dictionaries(NAMES, KNOBS, min_size=1, max_size=4))
def test_what_is_saved_is_loaded(given_presets):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "presets.json")
        for name, knobs in given_presets.items():
            Presets(path).save(f" {name}\n", knobs)
        presets = Presets(path)
        assert presets.names() == sorted(given_presets, key=str.casefold)
        for name, knobs in given_presets.items():
            loaded = presets.load(name)
            assert FusionConfig.of(loaded) == FusionConfig.of(knobs | {"enabled": True})
            assert loaded.keys() == ALWAYS | (knobs.keys() & {"subject", "style"})
            assert presets.remarks == []
        gone = next(iter(given_presets))
        presets.delete(gone)
        assert presets.names() == sorted(given_presets.keys() - {gone}, key=str.casefold)
        assert set(os.listdir(folder)) <= {"presets.json", "presets.json.lock"}


def test_a_file_that_isnt_there_holds_nothing_and_isnt_made_by_looking(path):
    presets = Presets(path)
    assert presets.names() == []
    assert refusal(presets.load, "ink") == "There is no preset 'ink': none is saved yet."
    assert refusal(presets.delete, "ink") == "There is no preset 'ink': none is saved yet."
    assert "can't be called" in refusal(presets.save, "", {})
    assert "There is no knob 'nosuch'" in refusal(presets.save, "ink", {"nosuch": 1})
    assert not path.parent.exists()


def test_all_knobs_are_written_and_never_whether_there_is_fusion(path):
    Presets(path).save("ink", {"enabled": False, "lean": 0.25, "subject": None, "style": Path("a/ink.safetensors")})
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["version"] == 1
    defaults = {key: BY_KEY[key].default for key in ALWAYS}
    assert content["presets"] == {"ink": defaults | {"lean": 0.25, "style": str(Path("a/ink.safetensors"))}}


def test_saving_again_replaces_all_of_it(path):
    presets = Presets(path)
    presets.save("ink", {"lean": 0.5, "subject": "a"})
    presets.save(" ink ", {"beta": 1})
    assert presets.names() == ["ink"]
    assert presets.load("ink") == {key: BY_KEY[key].default for key in ALWAYS} | {"beta": 1.0}


def test_people_can_read_the_file(path):
    Presets(path).save("ünïcode 猫 👩‍🎨", {"subject": "caf\udce9"})
    assert '\n    "ünïcode 猫 👩‍🎨": {\n' in path.read_text(encoding="utf-8")
    assert Presets(path).load("ünïcode 猫 👩‍🎨")["subject"] == "caf\udce9"


@pytest.mark.parametrize("name", ["", " \t\n", "a\nb", "a\0", "a\x7f", "a\u2028b", "\udce9", "x" * 65, None, 3])
def test_what_a_preset_cannot_be_called(path, name):
    assert "can't be called" in refusal(Presets(path).save, name, {})
    assert not path.exists()
    refusal(Presets(path).load, name)


@pytest.mark.parametrize(
    "name", ["x" * 64, " " * 9 + "x" * 64, "../../etc/passwd", '"', "__proto__", "a  b", "{}", "0"]
)
def test_what_else_it_can_be_called(path, name):
    Presets(path).save(name, {"lean": 0.5})
    assert Presets(path).names() == [name.strip()]
    assert Presets(path).load(name)["lean"] == 0.5
    Presets(path).delete(name)
    assert Presets(path).names() == []


def test_the_nearest_names_are_named(path):
    for name in ("Ink knight", "ink night", "b", "A", "c"):
        Presets(path).save(name, {})
    assert Presets(path).names() == ["A", "b", "c", "Ink knight", "ink night"]
    assert (
        refusal(Presets(path).load, "ink nigt")
        == "There is no preset 'ink nigt': did you mean 'ink night' or 'Ink knight'?"
    )
    assert refusal(Presets(path).delete, "zzz") == "There is no preset 'zzz': did you mean 'A' or 'Ink knight' or 'b'?"


def test_what_people_write_by_hand(path):
    knobs = {"beta": "0.4", "alpha": "much", "lean": 7, "layer": "all", "hires": None, "style_te": float("nan")}
    knobs |= {"subject": None, "style": "", "enabled": True, "layers": "all", "method": ["est"], "balance": {"a": 1}}
    write(path, b"\xef\xbb\xbf" + json.dumps({"presets": {" ink ": knobs, "five": 5}}).encode())
    presets = Presets(path)
    assert presets.names() == [" ink ", "five"]
    assert presets.load(" ink ") == {"beta": 0.4, "layers": "all"}
    told = "\n".join(presets.remarks)
    assert len(presets.remarks) == told.count("Left out of the preset ' ink ': ") == 8
    assert "Left out of the preset ' ink ': alpha can't be 'much': it is a number in > 0 ... 10." in presets.remarks
    assert "Left out of the preset ' ink ': There is no knob 'layer': did you mean layers" in told
    assert "'five' isn't a set of knobs" in refusal(presets.load, "five")
    assert presets.remarks == []
    assert "did you mean ' ink '?" in refusal(presets.load, "ink")
    presets.delete(" ink ")
    presets.delete("five")
    assert presets.names() == []


def test_what_a_newer_version_wrote_stays(path):
    newer = {"version": 2, "order": ["b"], "presets": {"b": {"glow": 1e400, "lean": 1}, "c": [None]}, "é": {"x": {}}}
    write(path, newer)
    Presets(path).save("a", {})
    Presets(path).delete("c")
    del newer["presets"]["c"]
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["presets"].pop("a")["lean"] == 0
    assert content == newer


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=3), JSON.filter(lambda it: not isinstance(it, dict)), JSON)
def test_whatever_shape_a_file_has_it_is_understood_or_set_aside(entries, other, knobs):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "presets.json")
        for content in ({"presets": other}, other, {**entries, "presets": {**entries, "knobs": knobs}}):
            write(path, content)
            presets = Presets(path)
            for name in presets.names():
                try:
                    FusionConfig.of(presets.load(name))
                except EstLoraError as error:
                    assert "isn't a set of knobs" in str(error)
            presets.save("a new one", {})
        after = json.loads(path.read_text(encoding="utf-8"))
        del after["presets"]["a new one"]
        assert after == {"version": 1, **content}
        assert len(os.listdir(folder)) == 4


DAMAGED = [
    b"",
    b" ",
    b"{",
    b"[]",
    b"null",
    b"5",
    b'"presets"',
    b"{}",
    b'{"version": 1}',
    b'{"presets": null}',
    b'{"presets": [{"ink": {}}]}',
    b'{"presets": {"ink": {}}',
    b'{"presets": {"ink": {},}}',
    b"{'presets': {}}",
    b'{"presets": {}} {}',
    b'{"presets": {"a\nb": {}}}',
    b'{"presets": {"caf\xe9": {}}}',
    '{"presets": {}}'.encode("utf-16"),
    b"\0" * 512,
    b"[" * 200_000,
    b'{"presets": ' + b'{"a":' * 200_000,
    b'{"presets": {"ink": ' + b"9" * 5000 + b"}}",
    b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
]


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: repr(content[:24]))
def test_a_damaged_file_is_set_aside(path, content):
    write(path, content)
    presets = Presets(path)
    assert presets.names() == []
    (remark,) = presets.remarks
    assert "'presets.damaged-1.json'; presets begin anew: " in remark
    assert "\n" not in remark
    assert len(remark) < 600
    assert presets.names() == presets.remarks == []

    write(path, content + b"\xff")
    presets.save("ink", {"lean": 0.5})
    assert "'presets.damaged-2.json'" in presets.remarks[0]
    presets.save("other", {})
    assert presets.remarks == []
    assert presets.load("ink")["lean"] == 0.5
    assert path.with_name("presets.damaged-1.json").read_bytes() == content
    assert path.with_name("presets.damaged-2.json").read_bytes() == content + b"\xff"


@pytest.mark.parametrize("where", ["os.rename", "os.open", "os.replace", "os.fsync"])
def test_a_damaged_file_that_stays_where_it_is_is_no_end(path, monkeypatch, where):
    write(path, b"{")
    monkeypatch.setattr(where, fails_with(errno.EROFS))
    presets = Presets(path)
    assert presets.names() == []
    assert presets.remarks
    assert "Read-only file system" in presets.remarks[-1]
    assert "Read-only file system" in refusal(presets.save, "ink", {})
    kept = [each for each in path.parent.iterdir() if each.suffix == ".json"]
    assert [each.read_bytes() for each in kept] == [b"{"]


@pytest.mark.parametrize("where", ["os.open", "os.replace", "os.fsync", "builtins.open", "os.mkdir"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_store_that_cannot_be_written(path, monkeypatch, where, code):
    Presets(path).save("ink", {"lean": 0.5})
    target = path.parent / "deeper" / "presets.json" if where == "os.mkdir" else path
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(where, fails_with(code))
        said = refusal(Presets(target).save, "other", {})
        if target == path:
            assert os.strerror(code) in refusal(Presets(path).delete, "ink")
    assert f"{target.name}' can't be written" in said
    assert os.strerror(code) in said
    assert path.read_bytes() == before
    Presets(path).save("other", {})
    assert Presets(path).names() == ["ink", "other"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux' full disk")
def test_a_full_disk(path):
    Presets(path).save("ink", {})
    path.with_name("presets.json.part").symlink_to("/dev/full")
    assert "No space left on device" in refusal(Presets(path).save, "other", {})
    assert Presets(path).names() == ["ink"]


def test_a_folder_where_the_file_should_be_and_the_other_way_round(path):
    path.mkdir(parents=True)
    presets = Presets(path)
    for method, *args in [(presets.names,), (presets.load, "a"), (presets.delete, "a"), (presets.save, "a", {})]:
        assert "presets.json' can't be" in refusal(method, *args)
    inside = path / "file"
    inside.write_text("")
    for method, *args in [(Presets(inside / "p").names,), (Presets(inside / "p").save, "a", {})]:
        assert "p' can't be" in refusal(method, *args)
    assert [each.name for each in path.iterdir()] == ["file"]


def test_a_file_too_deep_to_be_written_again(path, monkeypatch):
    def fail(*args, **kwargs):  # some Pythons write less deep than they read
        raise RecursionError("maximum recursion depth exceeded")

    write(path, {"presets": {"ink": {}}})
    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", fail)
        assert "maximum recursion depth exceeded" in refusal(Presets(path).save, "other", {})
    assert Presets(path).names() == ["ink"]


@pytest.mark.parametrize("depth", [100, 900, 980, 1000, 1200, 1400, 2000, 9000])
def test_a_file_of_any_depth_is_kept(path, depth):
    deep = b'{"presets": {"b": ' + b"[" * depth + b"]" * depth + b"}}"
    write(path, deep)
    presets = Presets(path)
    presets.names()
    try:
        presets.save("a", {})
    except EstLoraError as error:
        assert "recursion" in str(error)
    else:
        assert presets.names()[0] == "a"
    kept = {b"".join(each.read_bytes().split()) for each in path.parent.iterdir()}
    assert any(b"[" * depth + b"]" * depth in each for each in kept)


def test_a_link_stays_a_link(path, tmp_path):
    link = tmp_path / "link.json"
    link.symlink_to(path)
    Presets(link).save("ink", {})
    assert link.is_symlink()
    assert Presets(path).names() == Presets(link).names() == ["ink"]
    assert {each.name for each in tmp_path.iterdir()} == {"link.json", "data"}


def test_a_lock_that_another_holds(path, monkeypatch, saver):
    monkeypatch.setattr(stored, "PATIENCE", 0.2)
    Presets(path).save("ink", {})
    lock = "import sys, filelock; lock = filelock.FileLock(sys.argv[1] + '.lock'); lock.acquire()"
    holder = saver(path, "x", 0, f"{lock}\n{SAVES}")
    began = time.monotonic()
    said = refusal(Presets(path).save, "other", {})
    assert time.monotonic() - began < 5
    assert "presets.json.lock' could not be acquired" in said
    assert Presets(path).names() == ["ink"]
    write(path, b"{")
    presets = Presets(path)
    assert presets.names() == []
    assert "their file is damaged: " in presets.remarks[0]
    assert path.read_bytes() == b"{"
    holder.communicate("\n")
    Presets(path).save("other", {})
    assert Presets(path).names() == ["other"]


@pytest.fixture
def meanwhile(path, monkeypatch):
    """Has another process write the file just before a lock is had."""

    def set_content(content):
        class Lock(FileLock):
            def __enter__(self):
                write(path, content)
                return super().__enter__()

        monkeypatch.setattr("filelock.FileLock", Lock)

    return set_content


def test_a_file_that_was_mended_meanwhile_is_not_set_aside(path, meanwhile):
    write(path, b"{")
    meanwhile({"presets": {"ink": {}}})
    presets = Presets(path)
    assert presets.names() == ["ink"]
    assert presets.remarks == []


def test_what_another_deleted_meanwhile_is_deleted(path, meanwhile):
    Presets(path).save("ink", {})
    meanwhile({"presets": {"other": {}}})
    Presets(path).delete("ink")
    assert Presets(path).names() == ["other"]


def test_two_processes_lose_nothing_and_readers_never_see_half(path, saver):
    processes = [saver(path, who, 50) for who in "ab"]
    write(path, {"presets": {"old": {"subject": "x" * 200_000}}})
    for process in processes:
        tell(process)
    presets, seen = Presets(path), 0
    while any(process.poll() is None for process in processes):
        json.loads(path.read_bytes())  # which has no second look
        names = presets.names()
        assert presets.remarks == []
        assert len(names) >= seen
        seen = len(names)
    assert [process.communicate()[0].split()[-1] for process in processes] == ["49", "49"]
    assert set(presets.names()) == {"old", *(f"{who} {number}" for who in "ab" for number in range(50))}
    assert presets.load("b 49")["lean"] == 0.049
    assert {each.name for each in path.parent.iterdir()} == {"presets.json", "presets.json.lock"}


def test_a_process_killed_at_any_moment_leaves_a_whole_file(path, saver):
    write(path, {"presets": {f"old {number}": {"subject": "x" * 5000} for number in range(50)}})
    moments = random.Random(0)
    for time_killed in range(30):
        process = saver(path, str(time_killed), 10**6)
        tell(process)
        assert process.stdout.readline() == "0\n"
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        done = [0, *process.communicate()[0].split()]
        presets = Presets(path)
        names = presets.names()
        assert presets.remarks == []
        assert {f"{time_killed} {number}" for number in done} <= set(names)
        assert sum(name.startswith("old ") for name in names) == 50
    Presets(path).save("the lock is free", {})


def test_all_of_it_is_on_the_disk_before_it_takes_the_place(path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.with_name("presets.json.part").read_bytes()))
    Presets(path).save("ink", {})
    assert synced == [path.read_bytes()]


@pytest.mark.parametrize(("before", "kept"), [("fsync", 1), ("replace", 1), ("unlock", 2)])
def test_a_process_killed_between_two_steps(path, before, kept, saver):
    Presets(path).save("old", {})
    die = "(lambda *args: os.kill(os.getpid(), 9))"
    patch = f"import filelock; filelock.FileLock.release = {die}" if before == "unlock" else f"os.{before} = {die}"
    process = saver(path, "new", 1, f"import os; {patch}\n{SAVES}")
    process.communicate("\n")
    assert process.returncode == -9
    presets = Presets(path)
    assert presets.names() == ["new 0", "old"][-kept:]
    assert presets.remarks == []
    presets.save("next", {})
    assert len(presets.names()) == kept + 1
    assert not path.with_name("presets.json.part").exists()
