"""The page of settings, what is saved beside pictures, and what the API makes of a picture's parameters."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from tests.webui.pictures import est, pair
from tests.webui.settings import settings

SAVED = {"save_images": True, "override_settings": {"samples_save": True}}


@pytest.fixture(autouse=True)
def page_of_settings(webui):
    if webui.api.get_cmd_flags().get("nowebui"):
        pytest.skip("a WebUI without a page has no page of settings")


def test_a_setting_counts_where_nobody_says_otherwise(webui, sd15):
    names = pair(webui)
    given = webui.picture(est=est(*names, lean=-0.5))
    said = webui.picture(est=est(*names, lean=0.5))
    with settings(webui, lean=-0.5):
        assert np.array_equal(webui.picture(est=est(*names)), given)
        assert np.array_equal(webui.picture(f"a red cat <est:{':'.join(names)}>"), given)
        assert np.array_equal(webui.picture(est=est(*names, lean=0.5)), said)
        _, info = webui.pictures(est=est(*names))
    assert "EST-LoRA lean: -0.5" in info["infotexts"][0]


@pytest.mark.usefixtures("sd15")
def test_the_page(page, webui):
    """What is set and applied in the browser counts for the next picture, without a restart."""
    names = pair(webui)
    given, usual = webui.picture(est=est(*names, lean=-0.5, engine="branch")), webui.picture(est=est(*names))
    with settings(webui, lean=None, originals=None, log=None):  # they are the defaults again afterwards
        page.settings("EST-LoRA")
        page.apply_settings(est_lora_lean=-0.5, est_lora_originals="nowhere: don't merge", est_lora_log="every fusion")
        assert np.array_equal(webui.picture(est=est(*names)), given)
    assert np.array_equal(webui.picture(est=est(*names)), usual)


def test_the_map_is_saved_beside_the_picture(webui, sd15):
    names = pair(webui)

    def maps():
        return set(webui.folder.rglob("output*/**/*-gate-map.png"))

    before = maps()
    webui.picture(est=est(*names), **SAVED)
    assert maps() == before
    with settings(webui, save_map=True):
        webui.picture(**SAVED)
        assert maps() == before
        webui.picture(est=est(*names), **SAVED)
        (made,) = maps() - before
    try:
        assert Image.open(made).width > 1000
        assert [path for path in made.parent.iterdir() if path.stem == made.stem.removesuffix("-gate-map")]
    finally:
        made.unlink()


def test_the_plan_as_a_picture(webui, sd15):
    subject, style = pair(webui)
    query = {"subject": subject, "style": style, "sampler": "Euler", "steps": "7"}
    answer = webui.get("plan.png", **query)
    assert answer.headers["content-type"] == "image/png"
    with_steps = Image.open(io.BytesIO(answer.content)).convert("RGB")
    del query["sampler"], query["steps"]
    without = Image.open(io.BytesIO(webui.get("plan.png", **query).content)).convert("RGB")
    assert with_steps.size == without.size
    assert with_steps.tobytes() != without.tobytes()
    assert webui.get("plan.png", subject="nobody", style=style).status_code == 422
    assert webui.get("plan.png", subject=subject, style=style, steps="many").status_code == 422


@pytest.mark.parametrize("is_renamed", [False, True])
def test_parameters_in_a_request(webui, sd15, is_renamed):
    if webui.is_forge:
        pytest.skip("this host's own `infotext` doesn't work")
    names = pair(webui)
    (picture, *_), info = webui.pictures(f"a red cat <est:{':'.join(names)}:lean=-0.5>", seed=3)
    old = webui.loras / f"{names[0]}.safetensors"
    if is_renamed:
        old.rename(old.with_stem(f"{names[0]}-renamed"))
        webui.post("refresh-loras", {})
    try:
        answer = webui.post("txt2img", {"infotext": info["infotexts"][0]})
        assert answer.status_code == 200, answer.text
        assert np.array_equal(webui.decode(answer.json()["images"][0]), picture)
    finally:
        if is_renamed:
            old.with_stem(f"{names[0]}-renamed").rename(old)
            webui.post("refresh-loras", {})
