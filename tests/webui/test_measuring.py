"""The style discrepancy, measured in the host: what it costs, what it leaves behind, and what is remembered."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tests.extractors import write_dino
from tests.webui.pictures import HIRES, est, furthest, pair
from tests.webui.settings import settings

b64_img = pytest.importorskip("webuiapi", reason="the client isn't installed: pip install webuiapi").b64_img

SIDE, STEPS = 64, 3


@pytest.fixture(autouse=True)
def extractor(webui, tmp_path_factory):
    """A small one, in a folder of its own for each test: what it has measured, no other test has."""
    folder = tmp_path_factory.mktemp("dino")
    write_dino(folder)
    with settings(webui, extractor_folder=str(folder), probe_side=SIDE, probe_steps=STEPS):
        yield folder


def remembered(webui):
    """All that the host's memory has."""
    path = webui.folder / "est-lora" / "discrepancy.json"
    return json.loads(path.read_text(encoding="utf-8"))["measurements"] if path.is_file() else {}


def seen(webui, *names, beta="auto", probe=None, **payload):
    """A fused picture, what the probe saw of it, and the host's words."""
    (picture, *_), info = webui.pictures(est=est(*names, beta=beta), probe={"on": True, **(probe or {})}, **payload)
    return picture, json.loads(info["extra_generation_params"]["probe"]), info


def beta_of(info):
    return info["extra_generation_params"]["EST-LoRA beta"]


def area_of(*sides):
    return sum((side // 8) ** 2 for side in sides)


def test_the_first_picture_measures_and_the_second_remembers(probed, sd15):
    names = pair(probed)
    before = remembered(probed)
    first, saw, info = seen(probed, *names)
    assert saw["areas"] == [area_of(SIDE)] * 2 * STEPS + [area_of(64)] * 4
    made = {key: remembered(probed)[key] for key in remembered(probed).keys() - before.keys()}
    ((key, entry),) = made.items()
    assert (probed.folder / "est-lora" / "probes" / f"{key}.png").is_file()
    assert beta_of(info) == entry["value"] > 0
    second, saw, _ = seen(probed, *names)
    assert len(saw["areas"]) == 4
    assert np.array_equal(first, second)


def test_by_default_it_costs_at_most_half_a_picture(probed, sd15):
    with settings(probed, probe_side=None, probe_steps=None):
        _, saw, _ = seen(probed, *pair(probed))
    probes = saw["areas"][:-4]
    assert probes
    assert sum(probes) <= 0.5 * 28 * area_of(512)


def test_the_number_it_measured_makes_the_same_picture(probed, family):
    names = pair(probed, text=True, everything=True, share=0.15)
    measured, _, info = seen(probed, *names)
    assert np.array_equal(measured, seen(probed, *names, beta=beta_of(info))[0])
    assert not np.array_equal(measured, seen(probed, *names, beta=2)[0])


@pytest.mark.parametrize(
    "payload",
    [
        {"prompt": "a red cat <lora:{third}:1>"},
        HIRES,
        {"n_iter": 2},
        {"sampler_name": "Euler a"},
        {"sampler_name": "DPM++ SDE"},
        {"tiling": True},
        {"seed": 7, "subseed": 3, "subseed_strength": 0.5},
        {"init_images": True, "denoising_strength": 0.7},
    ],
    ids=lambda payload: next(iter(payload)),
)
def test_the_users_job_is_what_it_would_have_been(probed, sd15, payload):
    names = pair(probed)
    payload = dict(payload)
    if "prompt" in payload:
        payload["prompt"] = payload["prompt"].format(third=probed.lora("third"))
    if "init_images" in payload:
        payload["init_images"] = [b64_img(Image.new("RGB", (64, 64), "orange"))]
    probed.picture(**payload)  # the host's first of a kind may be another than the same again
    measuring, saw, info = seen(probed, *names, **payload)
    number = beta_of(info)
    given, without, told = seen(probed, *names, beta=number, **payload)
    assert len(saw["areas"]) == len(without["areas"]) + 2 * STEPS
    assert furthest(measuring, given) == 0
    for key in ("hooks", "networks", "sample_replaced", "calls"):
        assert saw[key] == without[key]
    for begun, *later in (saw["states"], without["states"]):
        for state in later[:1]:
            assert {**state, "job_count": begun["job_count"]} == begun
    assert [_text(one) for one in info["infotexts"]] == [_text(one) for one in told["infotexts"]]


def _text(infotext):
    return infotext.partition(', probe: "')[0]


def test_nothing_is_saved_of_it(probed, sd15):
    def files():
        return {path for path in probed.folder.glob("output*/**/*") if path.is_file()}

    before = files()
    saving = {"samples_save": True, "grid_save": False}
    _, saw, info = seen(probed, *pair(probed), n_iter=2, save_images=True, override_settings=saving)
    made = files() - before
    try:
        assert len(saw["areas"]) == 2 * STEPS + 2 * 4
        assert len(made) == 2
        assert f"Seed: {info['seed']}" in (probed.folder / "params.txt").read_text(encoding="utf-8")
    finally:
        for path in made:
            path.unlink()


@pytest.mark.parametrize("how", ["interrupt_in", "skip_in", "raise_in"])
@pytest.mark.parametrize("call", [1, STEPS + 1], ids=["subject", "style"])
def test_what_ends_early_is_not_remembered(probed, sd15, how, call):
    names = pair(probed)
    before = remembered(probed)
    weights = probed.seen(probe={"hash": True})["hash"]
    (_,), info = probed.pictures(est=est(*names, beta="auto"), probe={"on": True, "hash": True, how: call})
    saw = json.loads(info["extra_generation_params"]["probe"])
    assert remembered(probed) == before
    assert saw["hash"] == weights
    if how == "raise_in":
        assert beta_of(info) == 0.5
        assert "can't be measured (RuntimeError" in " ".join(saw["comments"])
    again, _, info = seen(probed, *names)
    assert beta_of(info) not in (0.5, None)
    assert np.array_equal(again, seen(probed, *names, beta=beta_of(info))[0])


def test_without_weights_it_is_a_half_and_a_sentence(probed, sd15, tmp_path):
    names = pair(probed)
    given = seen(probed, *names, beta=0.5)[0]
    with settings(probed, extractor_folder=str(tmp_path)):
        picture, saw, info = seen(probed, *names)
    assert np.array_equal(picture, given)
    assert len(saw["areas"]) == 4
    assert beta_of(info) == 0.5
    (comment,) = saw["comments"]
    assert comment.endswith("For beta 0.5 is taken.")


def test_the_prompt_counts_where_the_files_name_no_words(probed, sd15):
    names = pair(probed)
    first = beta_of(seen(probed, *names)[2])
    _, saw, info = seen(probed, *names, prompt="a red cat <lora:nothing:1>")
    assert (beta_of(info), len(saw["areas"])) == (first, 4)
    _, saw, _ = seen(probed, *names, prompt="a blue dog")
    assert len(saw["areas"]) == 4 + 2 * STEPS


def test_a_cards_words_count_whatever_the_prompt(probed, sd15):
    names = pair(probed)
    cards = [probed.loras / f"{name}.json" for name in names]
    try:
        for card, words in zip(cards, ("kn1ght", "1nk")):
            card.write_text(json.dumps({"activation text": words}), encoding="utf-8")
        first = seen(probed, *names)
        for prompt in ("a blue dog", "a green bird"):
            _, saw, info = seen(probed, *names, prompt=prompt)
            assert (beta_of(info), len(saw["areas"])) == (beta_of(first[2]), 4)
        assert any(entry["prompt"] == "kn1ght, 1nk" for entry in remembered(probed).values())
        with settings(probed, probe_prompt="of each picture"):
            assert len(seen(probed, *names, prompt="a blue dog")[1]["areas"]) == 4 + 2 * STEPS
    finally:
        for card in cards:
            card.unlink()
