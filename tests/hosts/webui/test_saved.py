"""The gate map beside saved pictures."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from PIL import Image

from est_lora.hosts.webui import saved
from tests.hosts.webui.host import Processing
from tests.hosts.webui.loras import PAIR


@pytest.fixture
def save(web, tmp_path):
    """Makes a picture and has the host save it; returns the files there are then."""
    web.modules["modules.shared"].opts.data["est_lora_save_map"] = True

    def save(prompt=f"a knight {PAIR}", name="00001.v2.png", **knobs):
        p = Processing(web, prompt, **knobs)
        web.make(p)
        web.callbacks.call("on_image_saved", SimpleNamespace(filename=str(tmp_path / name), p=p))
        return sorted(path.name for path in tmp_path.iterdir())

    return save


@pytest.fixture
def drawn(note_maps):
    """What maps were drawn of."""
    return note_maps(saved)


def test_it_is_a_picture_beside_the_picture(save, tmp_path):
    assert save() == ["00001.v2-gate-map.png"]
    with Image.open(tmp_path / "00001.v2-gate-map.png") as picture:
        assert picture.format == "PNG"


def test_it_is_of_what_was_done(save, drawn, web):
    save(sampler_name="Heun", steps=3)
    ((plan, taus),) = drawn
    assert plan.subject.path.stem == "knight"
    assert taus == sorted(set(taus))
    assert len(taus) == 3
    assert taus == pytest.approx(sorted({1 - call.timestep / 999 for call in web.calls}))


def test_it_is_of_the_first_pass(save, drawn, web):
    save(prompt=f"a knight {PAIR[:-1]}:hires=style>", enable_hr=True, steps=3)
    ((plan, taus),) = drawn
    assert plan.config.method == "est"
    assert taus == pytest.approx(sorted({1 - call.timestep / 999 for call in web.calls if not call.second_pass}))


def test_a_later_batch_has_its_own(save, drawn):
    save(prompt=[f"a knight {PAIR}", "a knight <est:stone:wood>"])
    assert [plan.subject.path.stem for plan, _ in drawn] == ["stone"]


@pytest.mark.parametrize(
    "prompt",
    ["a knight", "a knight <est:nobody:ink>", [f"a knight {PAIR}", "a knight"], [f"a knight {PAIR}", "a <est:x:y>"]],
)
def test_a_picture_without_a_fusion_has_none(save, prompt):
    assert save(prompt) == []


def test_who_does_not_want_it_has_none(save, web):
    web.modules["modules.shared"].opts.data["est_lora_save_map"] = False
    assert save() == []


def test_pictures_that_are_not_of_ours(web, tmp_path):
    web.modules["modules.shared"].opts.data["est_lora_save_map"] = True
    for p in (None, SimpleNamespace(), SimpleNamespace(est_lora="x")):
        web.callbacks.call("on_image_saved", SimpleNamespace(filename=str(tmp_path / "a.png"), p=p))
    assert not [*tmp_path.iterdir()]


def test_a_folder_that_cannot_be_written_to_is_told_in_the_log(save, caplog):
    assert save(name="nowhere/a.png") == []
    assert "The gate map of a.png wasn't saved: " in caplog.text
    assert "Traceback" not in caplog.text


def test_a_map_that_fails_is_told_in_the_log_and_harms_nobody(save, caplog, monkeypatch):
    monkeypatch.setattr(saved, "gate_map", lambda plan, taus: 1 / 0)
    assert save(name="a.png") == []
    assert "The gate map of a.png wasn't saved: " in caplog.text
    assert "Traceback" in caplog.text
