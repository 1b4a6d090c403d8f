"""The two engines in a real WebUI: one picture, and the host's own LoRAs beside them."""

from __future__ import annotations

import json

import pytest

from tests.webui.pictures import FILES, HIRES, est, furthest, pair, sampler
from tests.webui.test_restore import clean  # noqa: F401

# Without "DPM adaptive", which chooses its steps by how far two guesses are apart: it turns a rounding error into others.
SAMPLERS = (
    "Euler",
    "Euler a",
    "Heun",
    "DPM2",
    "DPM++ SDE",
    "DPM++ 2M",
    "LMS",
    "DPM fast",
    "HeunPP2",
    "Restart",
    "DDIM",
    "PLMS",
    "UniPC",
    "LCM",
)


def drawn(webui, knobs, engine, prompt="a red cat", **payload):
    """The picture, and what the probe saw: of this engine, how many layers had their updates in the weights."""
    pictures, info = webui.pictures(prompt, est={**knobs, "engine": engine}, probe={"hash": True}, **payload)
    return pictures[0], json.loads(info["extra_generation_params"]["probe"])


@pytest.mark.parametrize("how", FILES, ids=["attention", "everything"])
@pytest.mark.parametrize("payload", [{}, HIRES, {"n_iter": 2}], ids=["one", "hires", "two"])
def test_both_engines_draw_the_same(clean, family, how, payload):  # noqa: F811
    knobs = est(*pair(clean, **how))
    merged, saw = drawn(clean, knobs, "merge", **payload)
    branched, looked = drawn(clean, knobs, "branch", **payload)
    assert saw["merged"] > 0
    assert looked["merged"] == 0
    assert furthest(merged, branched) <= 1
    assert furthest(merged, clean.picture(**payload)) > 20
    assert saw["hash"] == looked["hash"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_with_every_sampler(probed, sd15, name):
    drawn_by = sampler(probed, name)
    knobs = est(*pair(probed))
    merged, saw = drawn(probed, knobs, "auto", steps=6, **drawn_by)
    branched, _ = drawn(probed, knobs, "branch", steps=6, **drawn_by)
    assert saw["merged"] > 0
    assert furthest(merged, branched) <= 1


def test_a_third_lora_that_was_never_loaded_before(clean, family):  # noqa: F811
    """The host keeps the weights it finds then as the checkpoint's own: ours mustn't be among them."""
    knobs = est(*pair(clean))
    third = f"a red cat <lora:{clean.lora(f'new-to-{family}', everything=True)}:0.8>"
    merged, saw = drawn(clean, knobs, "merge", third)
    branched, _ = drawn(clean, knobs, "branch", third)
    assert saw["merged"] > 0
    assert furthest(merged, branched) <= 1
    alone = clean.picture(third)
    assert furthest(merged, alone) > 20
    clean.picture()  # the host takes its own out
    assert furthest(clean.picture(third), alone) == 0
    clean.picture()


def test_a_lora_whose_strength_changes_in_the_middle(clean, family):  # noqa: F811
    if clean.is_forge:
        pytest.skip("here the host's LoRAs are merged before the first step")
    knobs = est(*pair(clean))
    third = f"a red cat <lora:{clean.lora('third', everything=True)}:0.8>"
    drawn_by = {
        engine: clean.picture(third, est={**knobs, "engine": engine}, probe={"weaken_at": 2})
        for engine in ("merge", "branch")
    }
    assert furthest(drawn_by["merge"], drawn_by["branch"]) <= 1
    assert furthest(drawn_by["merge"], clean.picture(third, est=knobs)) > 1
    clean.picture()


@pytest.mark.parametrize("at", [1, 7])
def test_an_exception_at_a_call(clean, family, at):  # noqa: F811
    with pytest.raises(RuntimeError, match="500"):
        clean.picture(est=est(*pair(clean, **FILES[1]), engine="merge"), steps=8, probe={"raise_at": at})


def test_many_pictures_in_a_row(clean, family):  # noqa: F811
    names = [clean.lora(f"pool{index}", everything=index % 2 == 0) for index in range(4)]
    for index in range(20):
        subject, style = names[index % 4], names[(index * 3 + 1) % 4]
        if subject != style:
            clean.picture(est=est(subject, style, method=("est", "sum", "style")[index % 3]))
