"""Grids of the host's X/Y/Z plot over our knobs."""

from __future__ import annotations

import re

import numpy as np
import pytest

from est_lora.config import BY_KEY, FIELDS
from est_lora.hosts.webui.axes import KNOBS
from tests.webui.pictures import HIRES, est, furthest, pair

ANNOUNCED = "X/Y/Z plot will create"
METHODS = BY_KEY["method"].choices
LEANS = (-0.5, 0, 0.5)
SMALL = {"width": 64, "height": 64, "steps": 4}


@pytest.fixture
def files(webui, sd15):
    return pair(webui)


@pytest.fixture
def knobs(files):
    return est(*files)


def inputs(webui, tab="txt2img"):
    """The inputs of the plot's page in the order in which a request gives them, and the axes there are."""
    (found,) = [
        script
        for script in webui.api.custom_get("script-info", baseurl=True)
        if script["name"] == "x/y/z plot" and script["is_img2img"] == (tab == "img2img")
    ]
    return found["args"], found["args"][0]["choices"]


def plot(webui, tab="txt2img", **axes):
    """The script's part of a request: up to three axes, by their knobs, with what is typed into their fields."""
    args, choices = inputs(webui, tab)
    values = [arg["value"] for arg in args]
    labels = [arg["label"] for arg in args]
    for letter in "XYZ":
        values[labels.index(f"{letter} type")] = 0  # nothing; what is told is the label, and what is asked the index
    for letter, (key, text) in zip("XYZ", axes.items()):
        values[labels.index(f"{letter} type")] = choices.index(f"[EST] {BY_KEY[key].label}")
        values[labels.index(f"{letter} values")] = text
    values[labels.index("Include Sub Images")] = values[labels.index("Use text inputs instead of dropdowns")] = True
    return {"script_name": "x/y/z plot", "script_args": values}


def grid(webui, prompt="a red cat", knobs=None, payload=(), **axes):
    """The cells of a grid row by row, and what each says of itself; the whole is left away."""
    payload = dict(payload)
    tab = "img2img" if "init_images" in payload else "txt2img"
    (whole, *cells), info = webui.pictures(prompt, est=knobs, **plot(webui, tab, **axes), **payload)
    assert whole.size > cells[0].size
    return cells, info["infotexts"][1:]


def told(infotext, key):
    found = re.search(re.escape(BY_KEY[key].infotext) + r": ([^,\n]+)", infotext)
    return found[1] if found else str(BY_KEY[key].default)


def ours(infotext):
    """From our first word on; before it is the checkpoint's name, in which Forge may be a picture behind."""
    return infotext.partition("EST-LoRA")[2]


def test_every_axis_is_there_once(webui):
    for tab in ("txt2img", "img2img"):
        _, choices = inputs(webui, tab)
        found = [label for label in choices if label.startswith("[EST] ")]
        assert found == [f"[EST] {field.label}" for field in FIELDS if field.key in KNOBS]


def test_a_row_over_the_methods(webui, knobs):
    cells, infotexts = grid(webui, knobs=knobs, method=",".join(METHODS))
    assert len(cells) == len(METHODS)
    for cell, infotext, method in zip(cells, infotexts, METHODS):
        (single,), info = webui.pictures(est={**knobs, "method": method})
        assert furthest(cell, single) == 0
        assert ours(infotext) == ours(info["infotexts"][0])


def test_a_grid_over_methods_and_lean(webui, knobs):
    cells, infotexts = grid(webui, knobs=knobs, method=",".join(METHODS), lean="-0.5-0.5 [3]")
    wanted = [(method, lean) for lean in LEANS for method in METHODS]
    assert [(told(text, "method"), float(told(text, "lean"))) for text in infotexts] == wanted
    for index in range(0, len(cells), 4):
        method, lean = wanted[index]
        assert furthest(cells[index], webui.picture(est={**knobs, "method": method, "lean": lean})) == 0
    assert furthest(cells[0], cells[10]) > 10


def test_numbers_may_be_ranges_and_beta_a_word_too(webui, knobs):
    cells, infotexts = grid(webui, knobs=knobs, beta="auto, 0-1 (+0.5), 0.1-0.7 [3]")
    assert [float(told(text, "beta")) for text in infotexts] == [0.5, 0, 0.5, 1, 0.1, 0.4, 0.7]
    assert furthest(cells[0], cells[2]) == 0


def test_files_may_come_from_axes_alone(webui, files):
    subject, style = files
    wanted = webui.picture(est=est(*files))
    (cell,), (infotext,) = grid(webui, subject=subject, style=style)
    assert furthest(cell, wanted) == 0
    assert told(infotext, "subject") == subject
    cells, _ = grid(webui, knobs={"style": style}, subject=f"{subject},{webui.lora('another')}")
    assert furthest(cells[0], wanted) == 0
    assert furthest(cells[1], wanted) > 10


def test_an_axis_is_above_the_tag(webui, files):
    subject, style = files
    prompt = f"a red cat<est:{subject}:{style}:method=sum:lean=0.5>"
    (cell,), (infotext,) = grid(webui, prompt, est(style, subject, lean=-1), method="k-lora")
    assert furthest(cell, webui.picture(est=est(*files, method="k-lora", lean=0.5))) == 0
    assert told(infotext, "lean") == "0.5"


def test_the_second_pass_of_a_hires_fix(webui, knobs):
    cells, _ = grid(webui, knobs=knobs, hires="same,off", payload=HIRES)
    for cell, hires in zip(cells, ("same", "off")):
        assert furthest(cell, webui.picture(est={**knobs, "hires": hires}, **HIRES)) == 0


def test_from_a_picture(webui, knobs):
    from PIL import Image
    from webuiapi import b64_img

    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    start = {"init_images": [b64_img(Image.fromarray(noise))], "denoising_strength": 0.6, "steps": 8}
    cells, _ = grid(webui, knobs=knobs, method="est,style", payload=start)
    for cell, method in zip(cells, ("est", "style")):
        assert furthest(cell, webui.picture(est={**knobs, "method": method}, **start)) == 0


def test_nothing_to_fuse_is_a_sentence(webui, sd15):
    cells, infotexts = grid(webui, method="est,sum")
    plain = webui.picture()
    for cell, infotext in zip(cells, infotexts):
        assert furthest(cell, plain) == 0
        assert "no subject was given" in infotext


MISTAKES = [
    ({"subject": "{subject},{subject}x"}, "did you mean '{subject}'"),
    ({"lean": "0,0.5", "style": "{style},nobody"}, "The WebUI has no LoRA 'nobody'"),
    ({"method": "est,est2"}, "method can't be 'est2': it is one of est, k-lora, sum, subject, style."),
    ({"lean": "0,much"}, "lean can't be 'much': it is a number in -1 ... 1."),
    ({"beta": "0-3 [4]"}, "beta can't be '3.0': it is a number in 0 ... 2, or auto."),
    ({"hires": ""}, "has no values"),
]


@pytest.mark.parametrize(("axes", "sentence"), MISTAKES, ids=[sentence for _, sentence in MISTAKES])
def test_a_wrong_value_stops_the_grid_before_the_first_picture(webui, started, files, axes, sentence):
    subject, style = files
    typed = {key: text.format(subject=subject, style=style) for key, text in axes.items()}
    before = started and started.log.read_text(errors="replace").count(ANNOUNCED)
    body = {"prompt": "x", **SMALL, "alwayson_scripts": {"est-lora": {"args": [est(subject, style)]}}}
    answer = webui.post("txt2img", {**body, **plot(webui, **typed)})
    assert answer.status_code == 422
    assert sentence.format(subject=subject) in answer.json()["detail"]
    assert before == (started and started.log.read_text(errors="replace").count(ANNOUNCED))


def test_the_model_is_as_it_was(probed, family):
    before, picture = probed.seen(probe={"hash": True}), probed.picture()
    knobs = est(*pair(probed))
    grid(probed, knobs=knobs, method=",".join(METHODS))
    after = probed.seen(probe={"hash": True})
    for what in ("hash", "hooks", "networks", "sample_replaced"):
        assert after[what] == before[what], what
    assert furthest(probed.picture(), picture) == 0


def test_reload_ui_doubles_none(probed, sd15, started, request):
    if started is None or "--nowebui" in request.config.getoption("--webui-args"):
        pytest.skip("there is no UI to reload, or it isn't ours to reload")
    knobs = est(*pair(probed))
    starts = started.starts()
    probed.picture(est=knobs, probe={"reload": True})
    started.wait_for_next(starts)
    test_every_axis_is_there_once(probed)
    cells, _ = grid(probed, knobs=knobs, method="est,sum")
    for cell, method in zip(cells, ("est", "sum")):
        assert furthest(cell, probed.picture(est={**knobs, "method": method})) == 0
