"""The memory: what is kept is found, whoever else writes, dies, edits by hand or takes away the disk."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from est_lora.discrepancy import Key, Memory, ProbeSettings
from est_lora.errors import EstLoraError, quote

ROOT = Path(__file__).parent.parent.parent
SETTINGS = ProbeSettings(seed=42, side=512, steps=20, sampler="Euler a", guidance=7)
KEY = Key("5a" * 32, "c7" * 32, "model.safetensors [6ce0161689]", "dino@733b42a2", SETTINGS, "knight, ink wash")
VALUES = st.floats(0, 2)
MOST = 200  # pictures
KEEPS = """
import sys
from pathlib import Path
from PIL import Image
from est_lora.discrepancy import Key, Memory, ProbeSettings
memory, who = Memory(Path(sys.argv[1])), sys.argv[2]
red = Image.effect_noise((64, 64), 50)
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[3])):
    key = Key(who, str(number), "", "", ProbeSettings(0, 64, 1, "Euler", 1), "")
    memory.keep(key, number / 1000 % 2, (red, red))
    assert not memory.remarks, memory.remarks
    print(number, flush=True)
"""


def key_of(who, number):
    return Key(who, str(number), "", "", ProbeSettings(0, 64, 1, "Euler", 1), "")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data" / "est-lora"


@pytest.fixture
def memory(folder):
    return Memory(folder)


def write(folder, content):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "discrepancy.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def pair(size=(8, 8)):
    return Image.new("RGB", size, "red"), Image.new("RGB", size, "blue")


def fails_with(code):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code), str(args[0]))

    return fail


@given(
    st.dictionaries(st.text(max_size=9), VALUES, min_size=1, max_size=4),
    st.integers(0, 2**64 - 1),
    st.floats(0, 100),
)
def test_what_is_kept_is_found(values, seed, guidance):
    with tempfile.TemporaryDirectory() as name:
        settings = dataclasses.replace(SETTINGS, seed=seed, guidance=guidance)
        keys = {prompt: dataclasses.replace(KEY, settings=settings, prompt=prompt) for prompt in values}
        for prompt, value in values.items():
            Memory(Path(name)).keep(keys[prompt], value)
        memory = Memory(Path(name))
        for prompt, value in values.items():
            found = memory.find(keys[prompt])
            assert found == value
            assert isinstance(found, float)
            assert memory.look(keys[prompt]).fields == keys[prompt].fields
            assert memory.remarks == []
            assert memory.pictures(keys[prompt]) is None
        gone = next(iter(values))
        memory.forget(keys[gone])
        assert [prompt for prompt in values if memory.find(keys[prompt]) is None] == [gone]
        assert set(os.listdir(name)) <= {"discrepancy.json", "discrepancy.json.lock"}


def test_looking_makes_no_files(folder, memory):
    assert memory.find(KEY) is memory.look(KEY) is memory.pictures(KEY) is None
    memory.forget(KEY)
    assert memory.remarks == []
    assert not folder.exists()


def test_what_the_file_says(folder, memory):
    memory.keep(KEY, 0.5, pair())
    content = json.loads((folder / "discrepancy.json").read_text())
    (entry,) = content["measurements"].values()
    when = datetime.fromisoformat(entry.pop("when"))
    assert timedelta(0) <= datetime.now(timezone.utc) - when < timedelta(minutes=1)
    assert content == {
        "version": 1,
        "measurements": {
            KEY.digest: {
                "value": 0.5,
                "subject": "5a" * 32,
                "style": "c7" * 32,
                "checkpoint": "model.safetensors [6ce0161689]",
                "extractor": "dino@733b42a2",
                "seed": 42,
                "side": 512,
                "steps": 20,
                "sampler": "Euler a",
                "guidance": 7.0,
                "prompt": "knight, ink wash",
            }
        },
    }
    assert memory.look(KEY).when == when.isoformat()


def test_keeping_again_replaces(folder, memory):
    memory.keep(KEY, 0.5, pair())
    memory.keep(KEY, 1, pair((16, 8)))
    assert memory.find(KEY) == 1
    assert Image.open(memory.pictures(KEY)).size == (32, 8)
    memory.keep(KEY, 1.5)
    assert memory.pictures(KEY) is None  # they would be of another value
    assert list((folder / "probes").iterdir()) == []


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_the_pictures_are_side_by_side(folder, memory, mode):
    left, right = Image.new("RGB", (8, 6), "red").convert(mode), Image.new("RGB", (4, 10), "blue").convert(mode)
    memory.keep(KEY, 0.5, (left, right))
    path = memory.pictures(KEY)
    assert path == folder / "probes" / f"{KEY.digest}.png"
    both = Image.open(path)
    assert (both.format, both.mode, both.size) == ("PNG", "RGB", (12, 10))
    assert both.crop((0, 0, 8, 6)).tobytes() == left.convert("RGB").tobytes()
    assert both.crop((8, 0, 12, 10)).tobytes() == right.convert("RGB").tobytes()
    memory.forget(KEY)
    assert memory.pictures(KEY) is memory.find(KEY) is None
    assert not path.exists()


@pytest.mark.parametrize("error", [ValueError("conversion not supported"), OSError("image file is truncated")])
def test_pictures_that_cannot_be_converted_cost_no_value(memory, error):
    def fail(_):
        raise error

    left, right = pair()
    left.convert = fail
    memory.keep(KEY, 0.5, (left, right))
    (remark,) = memory.remarks
    assert remark.startswith("The probe pictures can't be kept in ")
    assert remark.endswith(f": {error}.")
    assert memory.find(KEY) == 0.5
    assert memory.pictures(KEY) is None


CHANGES = {
    "subject": "0" * 64,
    "style": "0" * 64,
    "checkpoint": "another",
    "extractor": "clip@0",
    "prompt": "knight",
    "seed": 43,
    "side": 520,
    "steps": 21,
    "sampler": "Euler",
    "guidance": 7.5,
}


def changed(name, value):
    if name in KEY.fields.keys() - vars(KEY).keys():
        return dataclasses.replace(KEY, settings=dataclasses.replace(SETTINGS, **{name: value}))
    return dataclasses.replace(KEY, **{name: value})


def test_every_field_makes_another_key(memory):
    assert CHANGES.keys() == KEY.fields.keys()
    memory.keep(KEY, 0.5)
    others = [changed(*change) for change in CHANGES.items()]
    others.append(dataclasses.replace(KEY, subject=KEY.style, style=KEY.subject))
    assert len({KEY.digest, *(other.digest for other in others)}) == len(others) + 1
    assert [memory.find(other) for other in others] == [None] * len(others)


def test_a_digest_is_the_same_everywhere():
    assert KEY.digest == "57beb47e0d8d30dc"
    assert dataclasses.replace(KEY, settings=dataclasses.replace(SETTINGS, guidance=7.0)).digest == KEY.digest
    code = f"from est_lora.discrepancy import *; print(({KEY!r}).digest)"
    environment = os.environ | {"PYTHONHASHSEED": "7", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert done.stdout.decode().strip() == KEY.digest


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("seed", -1, "seed can't be '-1': it is a whole number in 0 ... 18446744073709551615."),
        ("seed", 2**64, "it is a whole number in 0 ... "),
        ("seed", 1.0, "seed can't be '1.0'"),
        ("seed", True, "seed can't be 'True'"),
        ("seed", "7", "seed can't be '7'"),
        ("seed", 10**5000, "seed can't be 'a very long int'"),
        ("side", 0, "side can't be '0': it is a whole number in 8 ... 2048."),
        ("side", 2056, "side can't be '2056'"),
        ("side", 100, "side can't be 100: it is a multiple of 8."),
        ("steps", 0, "steps can't be '0': it is a whole number in 1 ... 150."),
        ("steps", 151, "steps can't be '151'"),
        ("sampler", "", "sampler can't be '': it is the name of one."),
        ("sampler", " ", "sampler can't be ' '"),
        ("sampler", None, "sampler can't be 'None'"),
        ("guidance", -0.1, "guidance can't be '-0.1': it is a number in 0 ... 100."),
        ("guidance", 100.1, "guidance can't be '100.1'"),
        ("guidance", math.nan, "guidance can't be 'nan'"),
        ("guidance", math.inf, "guidance can't be 'inf'"),
        ("guidance", True, "guidance can't be 'True'"),
        ("guidance", "7", "guidance can't be '7'"),
    ],
    ids=lambda value: quote(value)[:24],
)
def test_settings_out_of_bounds(name, value, said):
    with pytest.raises(EstLoraError) as raised:
        dataclasses.replace(SETTINGS, **{name: value})
    assert str(raised.value).startswith("The probe pictures' ")
    assert said in str(raised.value)


@pytest.mark.parametrize(
    "bounds",
    [
        {"seed": 0, "side": 8, "steps": 1, "guidance": 0},
        {"seed": 2**64 - 1, "side": 2048, "steps": 150, "guidance": 100},
    ],
)
def test_settings_at_their_bounds(bounds):
    settings = dataclasses.replace(SETTINGS, **bounds)
    assert {name: getattr(settings, name) for name in bounds} == bounds
    assert isinstance(settings.guidance, float)


@pytest.mark.parametrize("value", [-0.1, 2.1, math.nan, math.inf, -math.inf, None, "1", True, 10**400])
def test_what_is_no_discrepancy_is_not_kept(folder, memory, value):
    with pytest.raises(EstLoraError, match="^A style discrepancy can't be .*: it is a number in 0 ... 2.$"):
        memory.keep(KEY, value)
    assert memory.find(KEY) is None
    assert not folder.exists()


@pytest.mark.parametrize("text", ["-0.1", "2.1", "NaN", "Infinity", "null", '"1"', "true", "[1]", "{}", "9" * 400])
def test_what_is_no_discrepancy_is_not_found(folder, memory, text):
    write(folder, f'{{"measurements": {{"{KEY.digest}": {{"value": {text}}}}}}}'.encode())
    assert memory.find(KEY) is None
    (remark,) = memory.remarks
    assert remark.startswith("The remembered style discrepancy ")
    assert remark.endswith(" is left out: it is a number in 0 ... 2.")
    assert len(remark) < 200
    memory.keep(KEY, 0.5)
    assert memory.find(KEY) == 0.5
    assert memory.remarks == []


@pytest.mark.parametrize("entry", [{"value": 1}, {"value": 1, "when": 5, "prompt": [], "more": 1}, {"value": 1.0}])
def test_entries_that_people_wrote(folder, memory, entry):
    write(folder, {"measurements": {KEY.digest: entry}})
    measured = memory.look(KEY)
    assert (measured.value, measured.when, memory.remarks) == (1, "", [])
    assert measured.fields.keys() <= {"prompt"}


@pytest.mark.parametrize("entry", [None, 0.5, [0.5], "0.5"])
def test_entries_of_another_kind(folder, memory, entry):
    write(folder, {"measurements": {KEY.digest: entry, "other": entry}})
    assert memory.find(KEY) is None
    memory.keep(KEY, 0.25)
    assert memory.find(KEY) == 0.25
    content = json.loads((folder / "discrepancy.json").read_text())
    assert content["measurements"]["other"] == entry


DAMAGED = [b"", b"{", b"[]", b"null", b"{}", b'{"measurements": []}', b'{"presets": {}}', b"\0" * 512, b"[" * 200_000]


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: repr(content[:24]))
def test_a_damaged_file_is_set_aside(folder, memory, content):
    write(folder, content)
    assert memory.find(KEY) is None
    (remark,) = memory.remarks
    assert "'discrepancy.damaged-1.json'; measurements begin anew: " in remark
    assert memory.find(KEY) is None
    assert memory.remarks == []
    write(folder, content + b"\xff")
    memory.keep(KEY, 0.5)
    assert "'discrepancy.damaged-2.json'" in memory.remarks[0]
    write(folder, content)
    memory.forget(KEY)
    assert "'discrepancy.damaged-3.json'" in memory.remarks[0]
    assert (folder / "discrepancy.damaged-1.json").read_bytes() == content


@pytest.mark.parametrize("where", ["os.open", "os.replace", "os.fsync", "builtins.open", "pathlib.Path.mkdir"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written(folder, monkeypatch, where, code):
    memory, other = Memory(folder), dataclasses.replace(KEY, prompt="other")
    if where != "pathlib.Path.mkdir":
        memory.keep(KEY, 0.5, pair())
    before = (folder / "discrepancy.json").read_bytes() if folder.exists() else None
    with monkeypatch.context() as patch:
        patch.setattr(where, fails_with(code))
        memory.keep(other, 0.25, pair())
        assert "remembered only until the end of this program: " in memory.remarks[-1]
        assert os.strerror(code) in memory.remarks[-1]
    assert memory.find(other) == 0.25
    assert memory.look(other).fields == other.fields
    assert memory.remarks == []
    assert Memory(folder).find(other) is None
    if before is not None:
        assert (folder / "discrepancy.json").read_bytes() == before
        assert memory.find(KEY) == 0.5
    memory.keep(other, 0.75, pair())
    assert Memory(folder).find(other) == memory.find(other) == 0.75


def test_what_others_do_is_seen(folder, memory):
    memory.keep(KEY, 0.5)
    other = Memory(folder)
    other.keep(KEY, 0.75)
    assert memory.find(KEY) == 0.75
    other.forget(KEY)
    assert memory.find(KEY) is None


def test_what_is_only_in_this_object_can_be_forgotten(memory, monkeypatch):
    monkeypatch.setattr(os, "replace", fails_with(errno.ENOSPC))
    memory.keep(KEY, 0.5)
    assert memory.find(KEY) == 0.5
    memory.forget(KEY)
    assert memory.find(KEY) is None


def test_pictures_that_cannot_be_written_cost_no_value(folder, memory, monkeypatch):
    folder.mkdir(parents=True)
    (folder / "probes").write_text("a file")
    memory.keep(KEY, 0.5, pair())
    (remark,) = memory.remarks
    assert remark.startswith("The probe pictures can't be kept in ")
    assert Memory(folder).find(KEY) == 0.5
    assert memory.pictures(KEY) is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux' full disk")
def test_a_full_disk(folder, memory):
    memory.keep(KEY, 0.5, pair())
    other = dataclasses.replace(KEY, prompt="other")
    (folder / "probes" / f"{other.digest}.png.part").symlink_to("/dev/full")
    memory.keep(other, 0.25, pair())
    assert "No space left on device" in memory.remarks[0]
    assert Memory(folder).find(other) == 0.25
    assert memory.pictures(other) is None
    (folder / "discrepancy.json.part").symlink_to("/dev/full")
    memory.keep(KEY, 0.75)
    assert "No space left on device" in memory.remarks[0]
    assert (memory.find(KEY), Memory(folder).find(KEY)) == (0.75, 0.5)


def test_files_where_folders_should_be_and_the_other_way_round(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "discrepancy.json").mkdir(parents=True)
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper", tmp_path / "folder"):
        memory = Memory(folder)
        assert memory.find(KEY) is None
        assert memory.remarks
        memory.keep(KEY, 0.5, pair())
        assert memory.remarks
        assert memory.find(KEY) == 0.5
        memory.forget(KEY)
        assert memory.find(KEY) is None


def test_pictures_that_cannot_be_deleted(folder, memory, monkeypatch):
    memory.keep(KEY, 0.5, pair())
    monkeypatch.setattr(Path, "unlink", fails_with(errno.EACCES))
    memory.forget(KEY)
    (remark,) = memory.remarks
    assert f"{KEY.digest}.png' can't be deleted: " in remark
    assert memory.find(KEY) is None


@pytest.fixture
def keeper():
    """Starts a process that keeps `count` values as soon as it is told to."""
    processes = []

    def start(folder, who, count, code=KEEPS):
        command = [sys.executable, "-c", code, folder, who, str(count)]
        process = subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def tell(*processes):
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()


def test_two_processes_lose_nothing_and_readers_never_see_half(folder, keeper):
    processes = [keeper(folder, who, 40) for who in "ab"]
    write(folder, {"measurements": {"old": {"prompt": "x" * 200_000}}})
    tell(*processes)
    memory = Memory(folder)
    while any(process.poll() is None for process in processes):
        json.loads((folder / "discrepancy.json").read_bytes())  # which has no second look
        if memory.find(key_of("a", 0)) is not None:
            Image.open(memory.pictures(key_of("a", 0))).load()
        assert memory.remarks == []
    assert [process.communicate()[0].split()[-1] for process in processes] == ["39", "39"]
    for who in "ab":
        assert [memory.find(key_of(who, number)) for number in range(40)] == [number / 1000 for number in range(40)]
        assert all(memory.pictures(key_of(who, number)) for number in range(40))
    assert not list(folder.rglob("*.part"))


def test_a_process_killed_at_any_moment_leaves_whole_files(folder, keeper):
    write(folder, {"measurements": {"old": {"prompt": "x" * 200_000}}})
    moments = random.Random(0)
    processes = [keeper(folder, str(time_killed), 45) for time_killed in range(4)]  # all of whose pictures are kept
    for who, process in enumerate(processes):
        tell(process)
        assert process.stdout.readline() == "0\n"
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        done = [0, *process.communicate()[0].split()]
        memory = Memory(folder)
        assert None not in [memory.find(key_of(str(who), number)) for number in done]
        for number in done:
            Image.open(memory.pictures(key_of(str(who), number))).load()
        assert memory.remarks == []
        assert "old" in json.loads((folder / "discrepancy.json").read_bytes())["measurements"]
    memory.keep(KEY, 0.5, pair())
    assert memory.remarks == []


@pytest.mark.parametrize(("before", "kept"), [("fsync", 0), ("replace", 0), ("unlock", 1)])
def test_a_process_killed_between_two_steps(folder, keeper, before, kept):
    Memory(folder).keep(KEY, 0.5, pair())
    die = "(lambda *args: os.kill(os.getpid(), 9))"
    patch = f"import filelock; filelock.FileLock.release = {die}" if before == "unlock" else f"os.{before} = {die}"
    process = keeper(folder, "new", 1, f"import os; {patch}\n{KEEPS}")
    process.communicate("\n")
    assert process.returncode == -9
    memory = Memory(folder)
    assert memory.find(KEY) == 0.5
    assert (memory.find(key_of("new", 0)) is not None) == bool(kept)
    assert (memory.pictures(key_of("new", 0)) is not None) == bool(kept)
    memory.keep(key_of("new", 0), 1, pair())
    assert memory.remarks == []
    assert memory.pictures(key_of("new", 0))
    assert not list(folder.rglob("*.part"))


def test_large_pictures_are_kept_small(tmp_path):
    memory = Memory(tmp_path)
    memory.keep(KEY, 0.5, (Image.new("RGB", (1024, 1024), "red"), Image.new("RGB", (1024, 1024), "blue")))
    with Image.open(memory.pictures(KEY)) as kept:
        assert kept.size == (512, 256)
        assert [kept.getpixel((x, 128)) for x in (0, 511)] == [(255, 0, 0), (0, 0, 255)]


@pytest.fixture
def full(folder):
    """All the pictures that there may be, the oldest first, of an hour ago or so."""
    probes = folder / "probes"
    probes.mkdir(parents=True)
    old = [probes / f"{number:016x}.png" for number in range(MOST)]
    for number, path in enumerate(old):
        path.touch()
        os.utime(path, (time.time() - 7200 + number,) * 2)
    return old


def test_the_oldest_picture_makes_room_and_its_value_still_counts(folder, memory, full):
    memory.keep(KEY, 0.5, pair())
    assert sorted((folder / "probes").iterdir()) == sorted([*full[1:], memory.pictures(KEY)])
    os.utime(memory.pictures(KEY), (1, 1))
    memory.keep(key_of("another", 0), 0.25, pair())
    assert memory.pictures(key_of("another", 0))
    assert memory.pictures(KEY) is None
    assert Memory(folder).find(KEY) == 0.5
    assert len(os.listdir(folder / "probes")) == MOST


def test_the_picture_just_kept_stays_whatever_the_clock_says(memory, full):
    for path in full:
        os.utime(path, (time.time() + 7200,) * 2)
    memory.keep(KEY, 0.5, pair())
    assert memory.pictures(KEY)


def test_drawing_again_takes_nobodys_room(folder, memory, full):
    memory.keep(KEY, 0.5, pair())
    before = set(os.listdir(folder / "probes"))
    memory.keep(KEY, 0.75, pair())
    assert set(os.listdir(folder / "probes")) == before


@pytest.mark.parametrize("where", ["unlink", "lstat"])
@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOENT])
def test_room_that_cannot_be_made_costs_nothing(folder, memory, monkeypatch, full, where, code):
    with monkeypatch.context() as patch:
        patch.setattr(Path, where, fails_with(code))
        memory.keep(KEY, 0.5, pair())
        memory.keep(key_of("another", 0), 0.5, pair())
    assert memory.remarks == []
    assert memory.pictures(KEY)
    assert len(os.listdir(folder / "probes")) == MOST + 2
    memory.keep(key_of("a third", 0), 0.5, pair())
    assert len(os.listdir(folder / "probes")) == MOST


def test_two_processes_make_room_at_once(folder, keeper, full):
    processes = [keeper(folder, who, 40) for who in "ab"]
    tell(*processes)
    assert [process.communicate()[0].split()[-1] for process in processes] == ["39", "39"]
    memory = Memory(folder)
    new = [memory.pictures(key_of(who, number)) for who in "ab" for number in range(40)]
    assert sorted((folder / "probes").iterdir()) == sorted([*full[80:], *new])
