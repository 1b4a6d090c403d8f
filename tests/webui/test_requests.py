"""What users and programs may send: a sentence for every mistake, and never a lost picture."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from est_lora.config import FIELDS
from tests.webui.pictures import est, furthest, pair

SEED = 4


@pytest.fixture(scope="module")
def files(webui):
    webui.use("sdxl")
    foreign = pair(webui)
    webui.use("sd15")
    subject, style = pair(webui)
    return {"a": subject, "b": style, "xl": foreign[0], "xl2": foreign[1]}


@pytest.fixture(scope="module")
def plain(webui, files):
    return webui.picture()


MISTAKES = {
    "<est:{a}:{b}><est:{b}:{a}>": "2 <est:...> tags",
    "<est:{a}:{b}:colour=red>": "There is no knob 'colour'",
    "<est:{a}:{b}:betta=0.4>": "did you mean beta",
    "<est:{a}:{b}:beta=9>": "beta can't be '9': it is a number in 0 ... 2, or auto",
    "<est:{a}:{b}:lean=much>": "lean can't be 'much'",
    "<est:{a}:{b}:1:1:1>": "everything is key=value",
    "<est:{a}x:{b}>": "did you mean",
    "<est:0123456789ab:{b}>": "has no LoRA '0123456789ab'",
    "<est:{xl}:{xl2}>": "doesn't fit this model",
    "<est:{xl}:{b}>": "doesn't fit this model",
    "<est:{a}:{a}>": "the same file",
    "<est:{a}>": "no style was given",
    "<est: :{b}>": "no subject was given",
    "<est:#0123456789ab:{b}>": "write no # in it",
    "<est:{a}:{b}": "close it with >",
}


@pytest.mark.parametrize("tag", MISTAKES)
def test_a_wrong_tag_costs_a_sentence_not_a_picture(webui, files, plain, tag):
    pictures, info = webui.pictures("a red cat" + tag.format(**files))
    why = info["extra_generation_params"]["EST-LoRA off"]
    assert MISTAKES[tag] in why
    assert why.endswith((".", "?"))
    if "wasn't read" not in why:  # then the words of the tag are still in the prompt
        assert furthest(pictures[0], plain) == 0
    assert "EST-LoRA subject" not in info["extra_generation_params"]


def test_names_as_the_host_resolves_them(webui, files, plain):
    expected = webui.picture(est=est(files["a"], files["b"]))
    hashes = webui.pictures(est=est(files["a"], files["b"]))[1]["extra_generation_params"]["Lora hashes"]
    short = dict(part.split(": ") for part in hashes.split(", "))
    for tag in (
        f"<est:{short[files['a']]}:{files['b']}>",
        f"<est: {files['a']} : {files['b']} >",
        f"<est:subject={files['a']}:style={files['b']}>",
    ):
        assert furthest(webui.picture("a red cat" + tag), expected) == 0
    by_hash = est(f"#{short[files['a']]}", short[files["b"]].upper())
    assert furthest(webui.picture(est=by_hash), expected) == 0


def test_the_tag_is_above_the_panel(webui, files, plain):
    swapped = est(files["b"], files["a"], beta=0.2)
    by_both = webui.picture(f"a red cat<est:{files['a']}:{files['b']}>", est=swapped)
    assert furthest(by_both, webui.picture(est=est(files["a"], files["b"], beta=0.2))) == 0
    off = est(files["b"], files["a"], enabled=False)
    assert furthest(webui.picture(est=off), plain) == 0
    by_tag = webui.picture(f"a red cat<est:{files['a']}:{files['b']}>", est=off)
    assert furthest(by_tag, webui.picture(est=est(files["a"], files["b"]))) == 0


BODIES = [
    [{"subject": "{a}", "style": "{b}", "colour": 1}],
    [{"subject": "{a}", "style": "{b}", "beta": [0.4]}],
    [{"subject": "{a}", "style": "{b}", "beta": "NaN"}],
    [{"subject": "{a}", "style": "{b}", "lean": True}],
    [{"subject": "{a}", "style": "{b}", "enabled": "perhaps"}],
    [{"subject": "{a}", "style": "nobody"}],
    [{"subject": "{a}", "style": 3}],
    [{"subject": "{a}", "style": "{b}"}, 1],
    [True, "{a}", "{b}", 1, 1, "auto", 0, "est", "more"],
    [True, "{a}", "{b}", "heavy"],
    {"subject": "{a}", "style": "{b}"},
    "text",
]


@pytest.mark.parametrize("arguments", BODIES, ids=str)
def test_a_wrong_request_is_refused_before_it_queues(webui, files, arguments):
    text = json.dumps(arguments).replace("{a}", files["a"]).replace("{b}", files["b"])
    body = {"prompt": "a cat", "alwayson_scripts": {"est-lora": {"args": json.loads(text)}}}
    for route in ("txt2img", "img2img"):
        extra = {"init_images": [""]} if route == "img2img" else {}
        answer = webui.post(route, body | extra)
        assert answer.status_code == 422
        assert len(answer.json()["detail"]) > 20


def test_the_schema_is_the_table(webui):
    schema = webui.get("schema").json()
    assert list(schema["properties"]) == [field.key for field in FIELDS]
    assert schema["properties"]["method"]["enum"] == ["est", "k-lora", "sum", "subject", "style"]


def test_the_plan_is_that_of_inspect(webui, files, capsys):
    from est_lora.cli import main

    told = webui.get("plan", subject=files["a"], style=files["b"], beta="0.4").json()
    paths = [str(next(webui.loras.glob(f"{files[which]}.safetensors"))) for which in "ab"]
    assert main(["inspect", *paths, "--json", "--beta", "0.4"]) == 0
    printed = json.loads(capsys.readouterr().out)
    for key in ("subject", "style"):
        assert told[key] | {"path": ""} == printed[key] | {"path": ""}
    assert told["balance"] == pytest.approx(printed["balance"])  # the host has a torch of its own
    for layer, other in zip(told["layers"], printed["layers"]):
        assert layer["name"] == other["name"]
        assert layer["rho"] == pytest.approx(other["rho"])
        assert [acts for _, acts in layer["segments"]] == [acts for _, acts in other["segments"]]
    for wrong in ({"subject": paths[0], "style": files["b"]}, {"subject": files["a"]}, {"a": "b"}):
        answer = webui.get("plan", **wrong)
        assert answer.status_code == 422
        assert len(answer.json()["detail"]) > 20


def malicious(count):
    draw = random.Random(SEED)
    nasty = [
        *(
            "../../../etc/passwd",
            "/etc/passwd",
            "..\\..\\windows\\win.ini",
            "C:\\x",
            "\\\\host\\share",
            "file:///etc/x",
        ),
        *("__import__('os').system('x')", "{{7*7}}", "${jndi:x}", "%s%n", "nan", "inf", "1e999", "-0", "0x10", "1_0"),
        *(
            "\u202eevil",
            "\u0000",
            "a\nb",
            "ｅｓｔ",
            "\ud7ff",
            "🦊" * 50,
            "None",
            "null",
            "[]",
            "<lora:x:1",
            "((((",
            "]]]]",
        ),
        *("9" * 5000, "a" * 100_000, "=", "==", "a=b=c", "beta=", "=1", "#", "#" * 20, "#zzzzzzzzzzzz", ":", "<", ""),
        *("beta=__class__", "subject=../x", "style=/etc/passwd", "method=eval", "layers=*", "engine=os", "enabled=2"),
    ]
    for _ in range(count):
        yield [draw.choice(nasty) for _ in range(draw.randint(0, 6))]


def test_nothing_that_is_sent_does_harm(webui, files, plain):
    """A part of them as pictures, all of them as requests; the queue goes on."""
    for index, pieces in enumerate(malicious(300)):
        answer = webui.post(
            "txt2img",
            {
                "prompt": "x",
                "steps": 1,
                "width": 64,
                "height": 64,
                "alwayson_scripts": {
                    "EST-LoRA": {"args": [{"subject": pieces[0] if pieces else None, "style": pieces}]}
                },
            },
        )
        assert answer.status_code == 422
        assert "Traceback" not in answer.text
        assert len(answer.json()["detail"]) < 700
        if index % (30 if webui.is_forge else 5) == 0:
            tag = ":".join(pieces)
            _, info = webui.pictures(f"a red cat<est:{tag}>", steps=1)
            assert "root:" not in json.dumps(info["extra_generation_params"])
    for huge in ("a" * 10_000_000, "beta=" + "9" * 10_000_000):
        webui.picture(f"a red cat<est:{files['a']}:{files['b']}:{huge}>", steps=1)
    assert furthest(webui.picture(), plain) == 0


def test_the_log_has_no_traceback_of_ours(started, webui):
    if started is None:
        pytest.skip("the log of a WebUI that runs already isn't known")
    said = started.log.read_text(errors="replace")
    assert "EST-LoRA failed" not in said
    assert not re.search(r"Error (running|calling|loading|executing).*est_lora\.py", said)


def test_its_own_lora_tag_counts_twice_and_it_says_so(webui, files):
    _, info = webui.pictures(f"a red cat<est:{files['a']}:{files['b']}><lora:{files['a']}:1>")
    assert "EST-LoRA off" not in info["extra_generation_params"]


def test_a_pickle_is_refused(webui, files, plain):
    path = Path(webui.loras) / "estlora-test-pickle.pt"
    path.write_bytes(b"\x80\x02.")
    try:
        webui.post("refresh-loras", {})
        pictures, info = webui.pictures(f"a red cat<est:estlora-test-pickle:{files['b']}>")
    finally:
        path.unlink()
    assert "pickle" in info["extra_generation_params"]["EST-LoRA off"]
    assert furthest(pictures[0], plain) == 0
