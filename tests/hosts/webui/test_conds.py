"""Encoded prompts come from the host's cache only where they were encoded with the same files and strengths."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from tests.hosts.webui.host import Processing
from tests.hosts.webui.looks import PANEL, Bystander, close
from tests.hosts.webui.loras import PAIR

MARK = "est-lora text encoders"


@pytest.fixture
def by(web, files):
    return Bystander(web, files)


def made(web, prompt="a knight ", **knobs):
    p = Processing(web, prompt, **knobs)
    web.make(p)
    return p


def marks(p):
    return p.extra_network_data.get(MARK)


def test_a_plain_picture_has_no_mark(web):
    p = made(web)
    assert MARK not in p.extra_network_data
    assert MARK not in made(web, args=[{**PANEL, "enabled": False}]).extra_network_data


def test_files_without_a_text_encoder_part_leave_no_mark(web):
    assert MARK not in made(web, "a knight <est:stone:wood>").extra_network_data


def test_a_refused_fusion_leaves_no_mark(web):
    assert MARK not in made(web, "a knight <est:knight:nobody>").extra_network_data


@pytest.mark.parametrize(
    "change",
    [
        {"subject_te": 0.5},
        {"style_te": 0.5},
        {"method": "subject"},
        {"style": "wood"},
        {"subject": "ink", "style": "knight"},
    ],
    ids=str,
)
def test_the_mark_changes_with_what_text_is_encoded_with(web, change):
    assert marks(made(web, args=[PANEL])) != marks(made(web, args=[{**PANEL, **change}]))


@pytest.mark.parametrize("change", [{"lean": 0.5}, {"beta": 1}, {"subject_weight": 0.5}, {"method": "k-lora"}], ids=str)
def test_text_is_not_encoded_again_for_what_only_the_unet_heeds(web, by, change):
    made(web, args=[PANEL])
    count = web.encodings
    p = made(web, args=[{**PANEL, **change}])
    if change != {"method": "k-lora"}:
        assert web.encodings == count
    assert close(p.c, by.encoded(["a knight "]))


def test_the_mark_changes_with_the_files_content(web, files):
    marked = marks(made(web, args=[PANEL]))
    path = files.path("knight")
    stamp = path.stat()
    try:
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
        assert marks(made(web, args=[PANEL])) != marked
    finally:
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def test_a_file_replaced_between_two_pictures_is_read_again(start, files, tmp_path):
    web = start("forge")
    folder = shutil.copytree(files.folder, tmp_path / "copy")
    web.folder = folder
    web.networks.__dict__.update(type(web)("forge", "sd15", folder).networks.__dict__)
    by = Bystander(web, files)
    made(web, args=[PANEL])
    shutil.copy(folder / "ink.safetensors", folder / "knight.safetensors")
    p = made(web, args=[PANEL])
    assert close(p.c, by.encoded(["a knight "], "ink", "ink"))


def test_fusion_after_plain_and_plain_after_fusion(web, by):
    plain = made(web)
    fused = made(web, args=[PANEL])
    again = made(web)
    assert close(plain.c, by.plainly_encoded(["a knight "]))
    assert close(fused.c, by.encoded(["a knight "]))
    assert close(again.c, by.plainly_encoded(["a knight "]))
    assert close(again.uc, by.plainly_encoded([""]))


def test_the_same_fusion_again_comes_from_the_cache(web):
    made(web, f"a knight {PAIR}")
    count = web.encodings
    made(web, f"a knight {PAIR}")
    assert web.encodings == count


def test_fusion_after_plain_in_a_second_pass(web, by):
    for hires, strengths in (("same", (1.0, 1.0)), ("off", (0.0, 0.0)), ("style", (0.0, 1.0)), ("same", (1.0, 1.0))):
        p = made(web, args=[{**PANEL, "hires": hires}], enable_hr=True)
        assert close(p.hr_c, by.encoded(["a knight "], subject_te=strengths[0], style_te=strengths[1])), hires
        plain = made(web, enable_hr=True)
        assert close(plain.hr_c, by.plainly_encoded(["a knight "])), hires
        assert close(plain.hr_uc, by.plainly_encoded([""])), hires


@pytest.mark.parametrize("before", ["same", "off", "style"])
@pytest.mark.parametrize("after", ["same", "off", "style"])
def test_one_second_pass_after_another(web, by, before, after):
    strengths = {"same": (1.0, 1.0), "off": (0.0, 0.0), "style": (0.0, 1.0)}
    for hires in (before, after):
        p = made(web, args=[{**PANEL, "hires": hires}], enable_hr=True)
        assert close(p.hr_c, by.encoded(["a knight "], subject_te=strengths[hires][0], style_te=strengths[hires][1]))


@pytest.mark.parametrize("hires", ["same", "off"])
def test_plain_after_fusion_where_the_second_pass_takes_the_firsts_conds(web, by, hires):
    web.first_pass_conds_for_second = True
    made(web, args=[{**PANEL, "hires": hires}], enable_hr=True)
    plain = made(web, enable_hr=True)
    assert close(plain.hr_c, by.plainly_encoded(["a knight "]))
    assert close(plain.hr_uc, by.plainly_encoded([""]))


def test_plain_after_a_fusion_that_failed_where_the_second_pass_takes_the_firsts_conds(web, by):
    web.first_pass_conds_for_second = True
    with pytest.raises(RuntimeError):
        made(web, args=[PANEL], enable_hr=True, fails_at=2)
    plain = made(web, enable_hr=True)
    assert close(plain.hr_c, by.plainly_encoded(["a knight "]))


def test_in_a_job_that_disregards_tags(web, by):
    fused = made(web, args=[PANEL], disable_extra_networks=True)
    assert close(fused.c, by.encoded(["a knight "]))
    assert close(made(web, disable_extra_networks=True).c, by.plainly_encoded(["a knight "]))
    assert close(made(web).c, by.plainly_encoded(["a knight "]))


def test_a_second_pass_after_one_that_disregarded_tags(web, by):
    made(web, args=[PANEL], enable_hr=True, disable_extra_networks=True)
    assert close(made(web, args=[PANEL], enable_hr=True).hr_c, by.encoded(["a knight "]))
    assert close(made(web, enable_hr=True, disable_extra_networks=True).hr_c, by.plainly_encoded(["a knight "]))
    assert close(made(web, enable_hr=True).hr_c, by.plainly_encoded(["a knight "]))


def test_layers_that_the_checkpoint_does_not_have_are_said(start, made_loras):
    web = start("forge", "sdxl")
    del web.sd_model.forge_objects.clip.cond_stage_model.clip_g
    web.encode = lambda prompts: torch.zeros(1, 6, 40)
    p = made(web, f"a knight {PAIR}")
    (said,) = p.comments
    assert said.startswith(
        "Text-encoder layers of the files that this checkpoint doesn't have are left out: 12, e.g. text"
    )
