"""The fusion in a real WebUI, against the host's own LoRAs and against a plain computation of its own."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.webui.pictures import FILES, HIRES, est, furthest, pair

HOSTS_OWN = {"subject": "<lora:{0}:1>", "style": "<lora:{1}:1>", "sum": "<lora:{0}:1><lora:{1}:1>"}


@pytest.mark.parametrize("how", FILES, ids=["attention", "everything"])
@pytest.mark.parametrize("method", HOSTS_OWN)
def test_one_file_and_the_sum_are_the_hosts_own(webui, family, how, method):
    subject, style = pair(webui, **how)
    theirs = webui.picture("a red cat" + HOSTS_OWN[method].format(subject, style))
    ours = webui.picture(est=est(subject, style, method=method))
    assert furthest(ours, theirs) <= 1
    assert furthest(ours, webui.picture()) > 20


def test_every_layer_chooses_as_a_plain_computation_does(probed, family):
    subject, style = pair(probed)
    plain = probed.picture()
    theirs = probed.picture(steps=8, probe={"reference": {"subject": subject, "style": style}})
    ours = probed.picture(steps=8, est=est(subject, style))
    assert furthest(ours, theirs) <= 1
    for method in ("subject", "style", "sum"):
        assert furthest(ours, probed.picture(steps=8, est=est(subject, style, method=method))) > 10
    assert furthest(probed.picture(), plain) == 0


def test_tag_and_api_are_one(webui, family):
    subject, style = pair(webui, **FILES[1])
    knobs = {"subject_weight": 0.8, "style_weight": 1.1, "beta": 0.4, "lean": -0.2, "style_te": 0.5, "layers": "all"}
    of_api, info = webui.pictures(est=est(subject, style, **knobs))
    pieces = ":".join(f"{key}={value}" for key, value in knobs.items() if not key.endswith("_weight"))
    of_tag, told = webui.pictures(f"a red cat<est:{subject}:{style}:0.8:1.1:{pieces}>")
    assert furthest(of_api[0], of_tag[0]) == 0
    kept = info["extra_generation_params"]
    assert kept["EST-LoRA subject"] == subject
    assert kept["EST-LoRA beta"] == 0.4
    assert kept["Lora hashes"].count(":") == 2
    assert {key: kept[key] for key in kept if "LoRA" in key} == {
        key: value for key, value in told["extra_generation_params"].items() if "LoRA" in key
    }
    listed = [True, subject, style, 0.8, 1.1, 0.4, 1.5, -0.2, "energy"]
    shorter = est(subject, style, subject_weight=0.8, style_weight=1.1, beta=0.4, lean=-0.2)
    assert furthest(webui.picture(est=listed), webui.picture(est=shorter)) == 0


def test_the_same_after_a_restart(started, webui, family):
    if started is None:
        pytest.skip("a WebUI that runs already isn't restarted: name its folder with --webui")
    subject, style = pair(webui, **FILES[1])
    before = webui.picture(est=est(subject, style))
    started.stop()
    started.start()
    webui.use(family)
    assert furthest(webui.picture(f"a red cat<est:{subject}:{style}>"), before) == 0


def test_files_that_the_host_ignores_in_silence(webui, family):
    named = webui.lora("peft", convention="peft", everything=True, text=True)
    _, style = pair(webui)
    plain = webui.picture()
    if not webui.is_forge:
        assert furthest(webui.picture(f"a red cat<lora:{named}:1>"), plain) == 0
    assert furthest(webui.picture(est=est(named, style, method="subject")), plain) > 20


@pytest.mark.parametrize(
    "request_of",
    [
        {"cfg_scale": 1},
        {"batch_size": 2},
        {"prompt": "a red cat AND a blue dog :0.7"},
        {"prompt": " ".join(["word"] * 90), "negative_prompt": "ugly"},
        {"sampler_name": "DPM2 a"},
        HIRES,
        {**HIRES, "hr_prompt": "a blue dog {tags}"},
    ],
    ids=["cfg1", "batch", "and", "long", "second-order", "hires", "hires-prompt"],
)
def test_every_way_of_sampling(webui, sd15, request_of):
    subject, style = pair(webui, **FILES[1])

    def pictures(tags, knobs=None):
        texts = {"prompt": "a red cat", **request_of}
        texts["prompt"] += tags
        if "hr_prompt" in texts:
            texts["hr_prompt"] = texts["hr_prompt"].format(tags=tags)
        return webui.pictures(est=knobs, **texts)[0]

    theirs = pictures(f"<lora:{subject}:1>")
    ours = pictures("", est(subject, style, method="subject"))
    of_tag = pictures(f"<est:{subject}:{style}:method=subject>")
    assert len(ours) == len(theirs)
    for own, other, tagged in zip(ours, theirs, of_tag):
        assert furthest(own, other) <= 1
        assert furthest(own, tagged) == 0


@pytest.mark.parametrize("masked", [False, True], ids=["img2img", "inpainting"])
def test_from_a_picture(webui, sd15, masked):
    from webuiapi import b64_img

    subject, style = pair(webui)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    start = {"init_images": [b64_img(Image.fromarray(noise))], "denoising_strength": 0.6, "steps": 8}
    if masked:
        mask = Image.new("L", (64, 64))
        mask.paste(255, (16, 16, 48, 48))
        start |= {"mask": b64_img(mask), "inpainting_fill": 1}
    webui.picture(f"a red cat<lora:{style}:1>", **start)  # Forge's first masked picture with a LoRA is another one
    theirs = webui.picture(f"a red cat<lora:{style}:1>", **start)
    ours = webui.picture(est=est(subject, style, method="style"), **start)
    assert furthest(ours, theirs) <= 1
    assert furthest(ours, webui.picture(**start)) > 20


def test_each_batch_has_its_own_tag(webui, sd15):
    subject, style = pair(webui, **FILES[1])
    both, info = webui.pictures(f"a red cat<est:{subject}:{style}>", n_iter=2)
    one = webui.picture(f"a red cat<est:{subject}:{style}>", seed=2)
    assert furthest(both[-1], one) == 0
    assert all(f"EST-LoRA subject: {subject}" in text for text in info["infotexts"])


@pytest.mark.parametrize("hires", ["same", "subject", "style", "off"])
def test_what_the_second_pass_does(probed, sd15, hires):
    subject, style = pair(probed)
    knobs = est(subject, style, hires=hires)
    seen = probed.seen(est=knobs, probe={}, **HIRES)
    first, second = seen["calls"][: seen["passes"][1]], seen["calls"][seen["passes"][1] :]
    assert all(tau is not None for _, tau in first)
    assert all((tau is None) == (hires == "off") for _, tau in second)
    same = probed.picture(est=est(subject, style), **HIRES)
    assert (furthest(probed.picture(est=knobs, **HIRES), same) > 5) == (hires != "same")


def test_a_third_lora_goes_on_beside_it(webui, family):
    subject, style = pair(webui, **FILES[1])
    third = webui.lora("third", **FILES[1])
    theirs = webui.picture(f"a red cat<lora:{subject}:1><lora:{third}:0.7>")
    ours, info = webui.pictures(f"a red cat<lora:{third}:0.7><est:{subject}:{style}:method=subject>")
    assert furthest(ours[0], theirs) <= 1
    for name in (subject, style, third):
        assert name in info["extra_generation_params"]["Lora hashes"]
    theirs = webui.picture(f"a red cat<lora:{third}:0.7>")
    webui.picture(est=est(subject, style))
    assert furthest(webui.picture(f"a red cat<lora:{third}:0.7>"), theirs) == 0


def test_text_is_encoded_anew_when_only_the_panel_changes(webui, family):
    subject, style = pair(webui, **FILES[1])
    pictures = [
        webui.picture(est=est(subject, style, subject_te=strength, style_te=0, subject_weight=0, style_weight=0))
        for strength in (0, 1, 0)
    ]
    assert furthest(pictures[0], pictures[1]) > 5
    assert furthest(pictures[0], pictures[2]) == 0
    assert furthest(pictures[0], webui.picture()) == 0
