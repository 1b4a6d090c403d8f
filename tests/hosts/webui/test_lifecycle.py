"""A picture from its prompt to its last step: what the UNet and the text encoders were changed by."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from tests.hosts.webui.host import ImageProcessing, Processing
from tests.hosts.webui.looks import PANEL, TOLERANCE, Bystander, close, hooks
from tests.hosts.webui.loras import PAIR
from tests.hosts.webui.networks import A1111, FORGE, UNet
from tests.hosts.webui.samplers import FlowPredictor


@pytest.fixture
def by(web, files):
    return Bystander(web, files)


def made(web, prompt="a knight", **knobs):
    p = Processing(web, prompt, **knobs)
    return p, web.make(p)


def test_a_plain_picture_is_the_hosts(web, by):
    p, _ = made(web)
    assert all(by.plain_off_by(call) < TOLERANCE for call in web.calls)
    assert close(p.c, by.plainly_encoded(["a knight"]))
    assert not p.comments
    assert not any("EST" in key for key in p.extra_generation_params)
    assert set(p.extra_network_data) == set()


@pytest.mark.parametrize("sampler", ["Euler", "Heun", "DPM adaptive", "DDIM"])
def test_every_call_has_the_layers_that_its_noise_level_chooses(web, by, sampler):
    p, _ = made(web, f"a knight {PAIR}", sampler_name=sampler)
    assert len(web.calls) >= 5
    assert max(by.off_by(call) for call in web.calls) < TOLERANCE
    assert min(by.plain_off_by(call) for call in web.calls) > 100 * TOLERANCE
    assert len({call.timestep for call in web.calls}) == 5
    assert not p.comments


def test_the_choice_changes_on_the_way(web, by):
    made(web, f"a knight {PAIR}")
    first, last = web.calls[0], web.calls[-1]
    assert by.off_by(last, tau=1 - first.timestep / 999) > 100 * TOLERANCE


def test_text_is_encoded_with_both_files(web, by):
    p, _ = made(web, f"a knight {PAIR}")
    assert close(p.c, by.encoded(["a knight "]))
    assert close(p.uc, by.encoded([""]))
    assert not close(p.c, by.plainly_encoded(["a knight "]))


def test_both_text_encoders_of_sdxl(web_xl, made_loras):
    by = Bystander(web_xl, made_loras("sdxl"))
    p, _ = made(web_xl, "a knight <est:knight:ink:subject_te=0.5:style_te=-1>")
    assert close(p.c, by.encoded(["a knight "], subject_te=0.5, style_te=-1.0))
    assert max(by.off_by(call) for call in web_xl.calls) < TOLERANCE
    assert not p.comments


@pytest.mark.parametrize(
    "knobs",
    [
        {"subject_weight": 0.6, "style_weight": -1.2},
        {"beta": 0.1, "alpha": 2.0},
        {"lean": 0.7},
        {"balance": "l1"},
        {"pattern": "s*"},
        {"method": "sum"},
        {"method": "k-lora"},
        {"method": "style"},
        {"layers": "all"},
        {"other": "off"},
    ],
    ids=str,
)
def test_a_knob_reaches_the_unet(web, by, knobs):
    made(web, "a knight <est:knight:ink:" + ":".join(f"{key}={value}" for key, value in knobs.items()) + ">")
    assert max(by.off_by(call, **knobs) for call in web.calls) < TOLERANCE


def same_latents(web, *jobs):
    latents = [made(web, prompt, **knobs)[1][0].latent for prompt, knobs in jobs]
    return all(latent.equal(latents[0]) for latent in latents[1:])


def test_tag_panel_and_api_are_one(web):
    panel = [True, "knight", "ink", 0.7, 1, "0.3", 1.5, 0.2]
    named = {"subject": "knight", "style": "ink", "subject_weight": 0.7, "beta": 0.3, "lean": 0.2}
    api = web.api_arguments({"EST-LoRA": {"args": [named]}})
    assert same_latents(
        web,
        ("a knight <est:knight:ink:0.7:beta=0.3:lean=0.2>", {}),
        ("a knight <est:style=ink:subject=knight:lean=0.2:subject_weight=0.7:beta=0.3>", {}),
        ("a knight <est: knight : ink :0.7: beta = 0.3 :lean=0.2>", {}),
        ("a knight ", {"args": panel}),
        ("a knight ", {"args": api}),
        ("a knight ", {"args": web.api_arguments({"est-lora": {"args": panel}})}),
    )


def test_names_may_be_aliases_or_hashes(web):
    entries = web.networks.available_networks
    for name in ("knight", "ink"):
        entries[name].read_hash()
    assert same_latents(
        web,
        ("a knight <est:knight:ink>", {}),
        (f"a knight <est:{entries['knight'].shorthash}:{entries['ink'].hash.upper()}>", {}),
        ("a knight ", {"args": [{"subject": f"#{entries['knight'].shorthash}", "style": entries["ink"].shorthash}]}),
        ("a knight <est:knight:ink alias>", {}),
    )


def test_a_hash_that_nobody_has_asked_for_yet_is_found(web, by):
    known = web.networks.available_networks["knight"]
    known.read_hash()
    short = known.shorthash
    web.networks.list_available_networks()
    p, _ = made(web, f"a knight <est:{short}:ink>")
    assert not p.comments
    assert max(by.off_by(call) for call in web.calls) < TOLERANCE


def test_a_file_that_came_after_the_host_looked_is_found(web, by):
    for table in (web.networks.available_networks, web.networks.available_network_aliases):
        table.clear()
    p, _ = made(web, f"a knight {PAIR}")
    assert not p.comments
    assert max(by.off_by(call) for call in web.calls) < TOLERANCE


def test_an_alias_of_two_files_means_neither(web):
    p, _ = made(web, "a knight <est:knight alias:ink>")
    assert "no LoRA 'knight alias'" in " ".join(p.comments)


def test_the_tag_says_more_than_the_panel(web, by):
    args = web.api_arguments({"EST-LoRA": {"args": [{**PANEL, "style": "wood", "lean": 1, "beta": 0.2}]}})
    made(web, "a knight <est:style=ink:lean=-0.5>", args=args)
    assert max(by.off_by(call, lean=-0.5, beta=0.2) for call in web.calls) < TOLERANCE


def test_a_tag_alone_switches_on(web, by):
    made(web, f"a knight {PAIR}", args=[False, "stone", "wood", 1, 1, "auto", 0, "est"])
    assert max(by.off_by(call) for call in web.calls) < TOLERANCE


@pytest.mark.parametrize(
    ("prompt", "args"),
    [
        ("a knight <est:knight:ink:enabled=false>", None),
        ("a knight <est:enabled=off>", [{**PANEL}]),
        ("a knight ", [{**PANEL, "enabled": False}]),
        ("a knight ", [False, "knight", "ink"]),
        ("a knight ", [None, "knight", "ink"]),
    ],
)
def test_switched_off(web, by, prompt, args):
    p, _ = made(web, prompt, args=args)
    assert all(by.plain_off_by(call) < TOLERANCE for call in web.calls)
    assert close(p.c, by.plainly_encoded(["a knight "]))
    assert not p.comments
    assert not p.extra_generation_params


REFUSED = [
    ("<est:knight:ink><est:stone:wood>", "The prompt has 2 <est:...> tags"),
    ("<est:knigth:ink>", "no LoRA 'knigth': did you mean 'knight'"),
    ("<est:qqqq:ink>", "no LoRA 'qqqq': there are 8 in its list"),
    ("<est:0123456789ab:ink>", "no LoRA '0123456789ab'"),
    ("<est:knight:knight>", "Subject and style are the same file, 'knight.safetensors'"),
    ("<est:knight>", "no style was given"),
    ("<est:knight:ink:2.5>", "subject_weight can't be '2.5'"),
    ("<est:knight:ink:enginee=auto>", "no knob 'enginee': did you mean engine"),
    ("<est:knight:ink:beta=1:beta=2>", "gives 'beta' twice"),
    ("<est:knight:ink:1:1:x>", "more to it than can be understood at 'x'"),
    ("<est:knight:pickled>", "'pickled.pt' is a pickle"),
    ("<est:knight:broken>", "isn't a whole safetensors file"),
    ("<est:giant:giantess>", "24 x 24"),
    ("<est:giant:ink>", "'giant.safetensors' doesn't fit this model"),
]


@pytest.mark.parametrize(
    ("prompt", "negative"),
    [("a knight <est:knight:ink", ""), ("a knight <est:#0123456789ab:ink>", ""), ("a knight", f"blurry {PAIR}")],
)
def test_a_tag_that_the_host_could_not_read_is_pointed_out(web, by, prompt, negative):
    p, _ = made(web, prompt, negative_prompt=negative)
    (said,) = p.comments
    assert said.startswith("A <est:...> tag wasn't read: close it with >")
    assert all(by.plain_off_by(call) < TOLERANCE for call in web.calls)


@pytest.mark.parametrize(("tag", "sentence"), REFUSED)
def test_a_mistake_is_said_in_one_sentence_and_the_picture_is_made(web, by, tag, sentence, caplog):
    p, _ = made(web, f"a knight {tag}")
    (said,) = p.comments
    assert sentence in said
    assert "\n" not in said
    assert said.endswith(" The picture was made without EST-LoRA.")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("est_lora.hosts.webui.job")] == [
        said
    ]
    assert len(web.calls) == 5
    assert all(by.plain_off_by(call) < TOLERANCE for call in web.calls)
    assert close(p.c, by.plainly_encoded(["a knight "]))
    assert p.extra_generation_params == {"EST-LoRA off": said.removesuffix(" The picture was made without EST-LoRA.")}


def test_the_lora_extension_is_disabled(web, by, monkeypatch):
    monkeypatch.delitem(sys.modules, "networks")
    monkeypatch.setattr(
        web, "activate", lambda p, tags: web.tell("after_extra_networks_activate", p, extra_network_data=tags)
    )
    p, _ = made(web, f"a knight {PAIR}")
    (said,) = p.comments
    assert "the built-in Lora extension is disabled: enable it" in said
    assert all(by.plain_off_by(call) < TOLERANCE for call in web.calls)


def test_a_compiled_unet_in_place_of_the_real_one(start):
    web = start("a1111")
    web.sd_unet.current_unet = object()
    p, _ = made(web, f"a knight {PAIR}")
    (said,) = p.comments
    assert "TensorRT" in said


def test_a_checkpoint_without_a_unet(web):
    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.double_blocks = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, x, timesteps=None, **kwargs):
            return torch.zeros_like(x)

    web.select(web.checkpoint(5, unet=Transformer()))
    p, _ = made(web, f"a knight {PAIR}")
    (said,) = p.comments
    assert "this checkpoint has none: it is a Transformer" in said


@pytest.mark.parametrize("at_each_call", [False, True], ids=["in-its-place", "at-each-call"])  # as reForge and Neo do
def test_a_unet_that_the_host_compiles(web, by, monkeypatch, at_each_call):
    def compiled(unet):
        return torch.compile(unet, backend="eager", dynamic=True)

    holder = web.sd_model.forge_objects.unet.model if web.is_forge else web.sd_model.model
    if at_each_call:
        monkeypatch.setattr(type(web), "unet", property(lambda web: compiled(web.unet_of(web.sd_model))))
    else:
        holder.diffusion_model = compiled(holder.diffusion_model)
    try:
        pictures = [made(web, prompt)[1][0].latent for prompt in ("a knight", f"a knight {PAIR}") * 2]
    finally:
        torch.compiler.reset()
    fused = [PAIR in call.p.prompt for call in web.calls]
    assert sum(fused) == len(web.calls) // 2
    assert max(by.off_by(call) for call, is_fused in zip(web.calls, fused) if is_fused) < TOLERANCE
    assert max(by.plain_off_by(call) for call, is_fused in zip(web.calls, fused) if not is_fused) < TOLERANCE
    assert pictures[2].equal(pictures[0])
    assert not web.calls[0].p.comments and not web.calls[-1].p.comments
    assert len(list(web.unet.modules())) and not hooks(web)


def test_a_unet_whose_layers_are_never_called_is_said(web):
    class Compiled(UNet):
        def forward(self, x, timesteps=None, **kwargs):
            return x * 0.1

    web.select(web.checkpoint(5, unet=Compiled(FORGE if web.is_forge else A1111, 5)))
    p, _ = made(web, f"a knight {PAIR}")
    (said,) = p.comments
    assert said.startswith("EST-LoRA had no effect: this UNet runs in a compiled form")
    assert list(p.extra_generation_params) == ["EST-LoRA off"]


def test_the_users_own_lora_acts_beside(web):
    plain = made(web, "a knight <lora:stone:0.5>")
    alone = made(web, f"a knight {PAIR}")
    both = made(web, f"a knight <lora:stone:0.5>{PAIR}")
    assert not both[1][0].latent.allclose(plain[1][0].latent, atol=1e-3)
    assert not both[1][0].latent.allclose(alone[1][0].latent, atol=1e-3)
    assert not both[0].comments


def test_a_lora_that_would_count_twice_is_said(web):
    p, _ = made(web, f"a knight <lora:ink:0.5>{PAIR}")
    (said,) = p.comments
    assert said == "The style 'ink' is also in the prompt as <lora:...>: it counts twice; take that tag out."


def test_batches_may_have_different_tags(web, by):
    prompts = [f"a knight {PAIR}", "a knight ", "a knight <est:stone:wood>", "a knight <est:none:wood>"]
    _, pictures = made(web, prompts)
    calls = [web.calls[start : start + 5] for start in range(0, 20, 5)]
    assert max(by.off_by(call) for call in calls[0]) < TOLERANCE
    assert max(by.plain_off_by(call) for call in calls[1]) < TOLERANCE
    assert max(by.off_by(call, "stone", "wood") for call in calls[2]) < TOLERANCE
    assert max(by.plain_off_by(call) for call in calls[3]) < TOLERANCE
    assert [sorted(key for key in picture.infotext if "EST" in key)[-2:] for picture in pictures] == [
        ["EST-LoRA subject", "EST-LoRA version"],
        [],
        ["EST-LoRA subject", "EST-LoRA version"],
        ["EST-LoRA off"],
    ]


def test_a_remark_is_made_once(web, caplog):
    p, _ = made(web, [f"a knight <lora:ink:0.5>{PAIR}"] * 3)
    (said,) = p.comments
    assert [record.getMessage() for record in caplog.records].count(said) == 1


def test_img2img_begins_where_its_noise_is(web, by):
    web.make(ImageProcessing(web, f"a knight {PAIR}", denoising_strength=0.5, steps=8))
    assert web.calls[0].timestep < 700
    assert max(by.off_by(call) for call in web.calls) < TOLERANCE


def test_tags_are_disregarded_where_the_host_disregards_them(web, by):
    p, _ = made(web, "a knight <est:stone:wood>", disable_extra_networks=True)
    assert all(by.plain_off_by(call) < TOLERANCE for call in web.calls)
    assert not p.comments
    web.calls.clear()
    made(web, "a knight <est:stone:wood>", disable_extra_networks=True, args=[PANEL])
    assert max(by.off_by(call) for call in web.calls) < TOLERANCE


@pytest.mark.parametrize("sampler", ["Euler", "Heun", "DDIM"])
def test_the_clock_of_steps(web, by, sampler):
    made(web, "a knight <est:knight:ink:clock=step>", sampler_name=sampler)
    steps = [0.0, 0.2, 0.4, 0.6, 0.8]
    calls = web.calls if sampler != "Heun" else web.calls[0::2]
    assert max(by.off_by(call, tau=tau) for call, tau in zip(calls, steps)) < TOLERANCE
    assert max(abs((1 - call.timestep / 999) - tau) for call, tau in zip(calls, steps)) > 0.02


def test_img2img_begins_in_the_middle_of_the_steps(web, by):
    web.make(ImageProcessing(web, "a knight <est:knight:ink:clock=step>", denoising_strength=0.5, steps=8))
    taus = [(8 - len(web.calls) + number) / 8 for number in range(len(web.calls))]
    assert max(by.off_by(call, tau=tau) for call, tau in zip(web.calls, taus)) < TOLERANCE


def test_a_sampler_without_steps_takes_the_timestep(web, by):
    p, _ = made(web, "a knight <est:knight:ink:clock=step>", sampler_name="DPM adaptive")
    assert list(p.comments) == ["DPM adaptive has no list of steps: EST-LoRA takes the timestep for its clock."]
    assert max(by.off_by(call) for call in web.calls) < TOLERANCE


def test_a_flow_model_is_timed_by_its_sigma(start, files):
    web = start("forge")
    web.sd_model.forge_objects.unet.model.predictor = FlowPredictor()
    by = Bystander(web, files)
    made(web, f"a knight {PAIR}")
    assert [call.timestep for call in web.calls] == pytest.approx([1000, 800, 600, 400, 200])
    assert max(by.off_by(call, tau=1 - call.timestep / 1000) for call in web.calls) < TOLERANCE


class TestHires:
    def passes(self, web):
        return [[call for call in web.calls if call.second_pass is second] for second in (False, True)]

    def off_by(self, by, call, hires):
        """How far a call of the second pass is from what `hires` asks for."""
        if hires == "off":
            return by.plain_off_by(call)
        return by.off_by(call, method="est" if hires == "same" else hires)

    @pytest.mark.parametrize("hires", ["same", "subject", "style", "off"])
    def test_what_the_second_pass_does(self, web, by, hires):
        made(web, f"a knight <est:knight:ink:hires={hires}>", enable_hr=True)
        first, second = self.passes(web)
        assert len(first) == 5
        assert len(second) >= 3
        assert max(by.off_by(call) for call in first) < TOLERANCE
        assert max(self.off_by(by, call, hires) for call in second) < TOLERANCE

    @pytest.mark.parametrize("hires", ["same", "subject", "off"])
    def test_what_its_text_is_encoded_with(self, web, by, hires):
        p, _ = made(web, f"a knight <est:knight:ink:hires={hires}>", enable_hr=True)
        strengths = {"same": (1.0, 1.0), "subject": (1.0, 0.0), "off": (0.0, 0.0)}[hires]
        wanted = by.encoded(["a knight "], subject_te=strengths[0], style_te=strengths[1])
        assert close(p.hr_c, wanted)
        assert close(p.c, by.encoded(["a knight "]))

    def test_a_prompt_of_its_own(self, web, by):
        made(web, f"a knight {PAIR}", enable_hr=True, hr_prompt="a knight <est:stone:wood>")
        first, second = self.passes(web)
        assert max(by.off_by(call) for call in first) < TOLERANCE
        assert max(by.off_by(call, "stone", "wood") for call in second) < TOLERANCE

    def test_only_the_second_prompt_has_a_tag(self, web, by):
        made(web, "a knight", enable_hr=True, hr_prompt=f"a knight {PAIR}")
        first, second = self.passes(web)
        assert max(by.plain_off_by(call) for call in first) < TOLERANCE
        assert max(by.off_by(call) for call in second) < TOLERANCE

    @pytest.mark.parametrize("disregards", [False, True])
    def test_a_checkpoint_of_its_own(self, web, by, files, disregards):
        knobs = {"hr_checkpoint": web.checkpoint(9), "disable_extra_networks": disregards}
        p, _ = made(web, enable_hr=True, args=[PANEL], **knobs)
        first, second = self.passes(web)
        assert max(by.off_by(call) for call in first) < TOLERANCE
        assert max(Bystander(web, files).off_by(call) for call in second) < TOLERANCE
        assert not p.comments

    @pytest.mark.parametrize("disregards", [False, True])
    def test_a_checkpoint_of_another_family(self, web, by, files, disregards):
        knobs = {"hr_checkpoint": web.checkpoint(9, family="sdxl"), "disable_extra_networks": disregards}
        p, _ = made(web, enable_hr=True, args=[PANEL], **knobs)
        first, second = self.passes(web)
        (said,) = p.comments
        assert "'knight.safetensors' doesn't fit this model" in said
        assert said.endswith("The second pass was made without EST-LoRA.")
        assert p.extra_generation_params["EST-LoRA subject"] == "knight"
        assert max(by.off_by(call) for call in first) < TOLERANCE
        assert max(Bystander(web, files).plain_off_by(call) for call in second) < TOLERANCE

    def test_several_batches(self, web, by):
        made(web, ["a knight <est:knight:ink:hires=off>"] * 2, enable_hr=True)
        first, second = self.passes(web)
        assert len(first) == 10
        assert max(by.off_by(call) for call in first) < TOLERANCE
        assert max(by.plain_off_by(call) for call in second) < TOLERANCE

    @pytest.mark.parametrize("hires", ["same", "style", "off"])
    def test_what_it_does_where_tags_are_disregarded(self, web, by, hires):
        made(web, args=[{**PANEL, "hires": hires}], enable_hr=True, disable_extra_networks=True)
        first, second = self.passes(web)
        assert max(by.off_by(call) for call in first) < TOLERANCE
        assert max(self.off_by(by, call, hires) for call in second) < TOLERANCE

    def test_the_clock_of_steps_goes_on(self, web, by):
        made(
            web, "a knight <est:knight:ink:clock=step>", enable_hr=True, denoising_strength=0.5, hr_second_pass_steps=2
        )
        _, second = self.passes(web)
        assert max(by.off_by(call, tau=tau) for call, tau in zip(second, (0.5, 0.75))) < TOLERANCE
