"""Nothing is left behind, however a picture ends."""

from __future__ import annotations

import json

import pytest

from tests.webui.pictures import FILES, est, furthest, pair


@pytest.fixture
def clean(probed, family):
    """After the test the model must be as before: the same bytes, no hooks, the same plain picture."""
    before = probed.seen(probe={"hash": True})
    picture = probed.picture()
    yield probed
    after = probed.seen(probe={"hash": True})
    for what in ("hash", "hooks", "networks", "sample_replaced"):
        assert after[what] == before[what], what
    assert not after["sample_replaced"]
    assert furthest(probed.picture(), picture) == 0


@pytest.fixture
def knobs(clean):
    return est(*pair(clean, **FILES[1]))


def test_a_normal_end(clean, knobs):
    clean.picture(est=knobs)


@pytest.mark.parametrize("event", ["interrupt_at", "skip_at"])
def test_broken_off(clean, knobs, event):
    seen = clean.seen(est=knobs, probe={event: 2, "hash": True})
    assert len(seen["calls"]) < 4


def test_an_exception_inside_sampling(clean, knobs):
    with pytest.raises(RuntimeError, match="500"):
        clean.picture(est=knobs, probe={"raise_at": 2})


def test_a_job_inside_a_job(clean, knobs):
    tag = f"a red cat<est:{knobs['subject']}:{knobs['style']}>"
    alone = clean.pictures(tag, n_iter=2)[0]
    nested, info = clean.pictures(tag, n_iter=2, probe={"nested": True})
    of_inner = json.loads(info["extra_generation_params"]["probe"])["nested"]
    assert "EST-LoRA version" in of_inner
    assert "EST-LoRA off" not in of_inner
    for one, other in zip(alone, nested):
        assert furthest(one, other) == 0


def test_another_checkpoint(clean, knobs, family):
    clean.picture(est=knobs)
    clean.use("sd15" if family == "sdxl" else "sdxl")
    clean.picture()
    clean.use(family)


def test_a_refiner(clean, knobs, family):
    other = clean.checkpoint(family, seed=1).stem
    _, info = clean.pictures(est=knobs, steps=6, refiner_checkpoint=other, refiner_switch_at=0.5)
    assert "Refiner" in info["extra_generation_params"]
    clean.use("sd15" if family == "sdxl" else "sdxl")
    clean.use(family)


def test_reload_ui(clean, knobs, started):
    if started is None:
        pytest.skip("a WebUI that runs already isn't reloaded: name its folder with --webui")
    before = clean.picture(est=knobs)
    starts = started.starts()
    clean.picture(est=knobs, probe={"reload": True})
    started.wait_for_next(starts)
    assert furthest(clean.picture(est=knobs), before) == 0
    assert clean.api.get_scripts()["txt2img"].count("est-lora") == 1
