"""What a picture says of its fusion."""

from __future__ import annotations

import pytest

from est_lora import __version__
from tests.hosts.webui.host import Processing
from tests.hosts.webui.looks import PANEL
from tests.hosts.webui.loras import PAIR
from tests.hosts.webui.networks import A1111, FORGE, UNet


def texts(web, prompt, **knobs):
    return [picture.infotext for picture in web.make(Processing(web, prompt, **knobs))]


def shorts(web, *names):
    entries = web.networks.available_networks
    for name in names:
        entries[name].read_hash()
    return [entries[name].shorthash for name in names]


@pytest.mark.parametrize("args", [None, [PANEL]])
def test_the_files_the_beta_and_the_version(web, args):
    (text,) = texts(web, f"a knight {PAIR}" if args is None else "a knight", args=args)
    subject, style = shorts(web, "knight", "ink")
    assert text == {
        "EST-LoRA subject": "knight",
        "EST-LoRA style": "ink",
        "EST-LoRA beta": 0.5,
        "EST-LoRA version": __version__,
        "Lora hashes": f"knight: {subject}, ink: {style}",
    }


def test_every_knob_that_is_not_at_its_default(web):
    (text,) = texts(web, "a knight <est:knight:ink:0.5:1:beta=0.25:lean=0:subject_te=-1:hires=off:pattern=s*>")
    assert {key: value for key, value in text.items() if key.startswith("EST-LoRA") and "version" not in key} == {
        "EST-LoRA subject": "knight",
        "EST-LoRA style": "ink",
        "EST-LoRA subject weight": 0.5,
        "EST-LoRA beta": 0.25,
        "EST-LoRA subject te": -1.0,
        "EST-LoRA hires": "off",
        "EST-LoRA pattern": "s*",
    }


def test_names_are_the_hosts_whatever_was_typed(web):
    (short,) = shorts(web, "knight")
    (text,) = texts(web, f"a knight <est:{short}:ink alias>")
    assert (text["EST-LoRA subject"], text["EST-LoRA style"]) == ("knight", "ink")


def test_hashes_stand_beside_the_hosts_own(web):
    (text,) = texts(web, f"a knight <lora:stone:0.5>{PAIR}")
    stone, subject, style = shorts(web, "stone", "knight", "ink")
    assert text["Lora hashes"] == f"stone: {stone}, knight: {subject}, ink: {style}"


def test_hashes_stay_through_a_hires_fix(web):
    (text,) = texts(web, f"a knight <lora:stone:0.5>{PAIR}", enable_hr=True)
    stone, subject, style = shorts(web, "stone", "knight", "ink")
    assert text["Lora hashes"] == f"stone: {stone}, knight: {subject}, ink: {style}"
    assert text["EST-LoRA subject"] == "knight"


def test_files_are_hashed_once(web):
    for _ in range(2):
        texts(web, [f"a knight {PAIR}"] * 2)
    assert [web.networks.available_networks[name].hashed for name in ("knight", "ink", "stone")] == [1, 1, 0]


def test_a_later_batch_says_only_its_own(web):
    prompts = [f"a knight <lora:stone>{PAIR}", "a knight <lora:stone>", "a knight <est:x:y>", "a knight <est:wood:ink>"]
    first, second, third, fourth = texts(web, prompts)
    stone, wood, ink = shorts(web, "stone", "wood", "ink")
    assert first["EST-LoRA subject"] == "knight"
    assert second == {"Lora hashes": f"stone: {stone}"}
    assert list(third) == ["EST-LoRA off"]
    assert third["EST-LoRA off"].startswith("The WebUI has no LoRA 'x'")
    assert "EST-LoRA off" not in fourth
    assert fourth["EST-LoRA subject"] == "wood"
    assert fourth["Lora hashes"] == f"wood: {wood}, ink: {ink}"


def test_a_lora_in_the_prompt_keeps_its_hash_when_a_fusion_of_it_is_refused(web):
    (text,) = texts(web, "a knight <lora:knight><est:knight:giant>")
    (short,) = shorts(web, "knight")
    assert text["Lora hashes"] == f"knight: {short}"


def test_a_lora_in_the_prompt_keeps_its_hash_when_a_fusion_of_it_had_no_effect(web):
    class Compiled(UNet):
        def forward(self, x, timesteps=None, **kwargs):
            return x * 0.1

    web.select(web.checkpoint(5, unet=Compiled(FORGE if web.is_forge else A1111, 5)))
    p = Processing(web, f"a knight <lora:ink>{PAIR}")
    web.make(p)
    (short,) = shorts(web, "ink")
    assert p.extra_generation_params["Lora hashes"] == f"ink: {short}"


def test_a_lora_in_the_prompt_keeps_its_hash_when_the_next_batch_has_no_fusion(web):
    _, text = texts(web, [f"a knight <lora:ink>{PAIR}", "a knight <lora:ink>"])
    (short,) = shorts(web, "ink")
    assert text["Lora hashes"] == f"ink: {short}"


def test_what_others_wrote_stays(web):
    p = Processing(web, [f"a knight {PAIR}", "a knight"], extra_generation_params={"Denoising strength": 0.5})
    _, last = web.make(p)
    assert last.infotext == {"Denoising strength": 0.5}


def test_a_second_pass_that_fails_alone_leaves_the_firsts_in_place(web):
    p = Processing(web, f"a knight {PAIR}", enable_hr=True, hr_prompt="a knight <est:nobody:ink>")
    (picture,) = web.make(p)
    assert picture.infotext["EST-LoRA subject"] == "knight"
    assert any("no LoRA 'nobody'" in said for said in p.comments)
    assert not any("The picture was made without EST-LoRA." in said for said in p.comments)
