"""However a picture ends, the model and the host are as they were."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch

from est_lora.fusion import FusionSession
from est_lora.hosts.webui import job
from tests.hosts.webui.host import Processing
from tests.hosts.webui.looks import PANEL, TOLERANCE, Bystander, close, hooks, our_layers, state_hash
from tests.hosts.webui.loras import PAIR

TAGGED = f"a knight {PAIR}"


@pytest.fixture
def by(web, files):
    return Bystander(web, files)


class Before:
    """The host before a picture."""

    def __init__(self, web):
        self._web = web
        self._state, self._hooks = state_hash(web), hooks(web)
        self._loaded = list(web.networks.loaded_networks)

    def is_now(self):
        web = self._web
        return (
            state_hash(web) == self._state
            and hooks(web) == self._hooks
            and web.networks.loaded_networks == self._loaded
            and not any(module._forward_pre_hooks_with_kwargs for module in web.unet.modules())
        )


@pytest.fixture
def before(web):
    return Before(web)


def backed_up(model):
    return [m for m in model.modules() if getattr(m, "network_weights_backup", None) is not None]


@pytest.mark.parametrize("hires", [False, True])
def test_after_a_picture(web, before, hires):
    p = Processing(web, TAGGED, enable_hr=hires)
    web.make(p)
    assert before.is_now()
    assert "sample" not in vars(p)


def test_after_a_picture_of_sdxl(web_xl):
    before = Before(web_xl)
    web_xl.make(Processing(web_xl, TAGGED))
    assert before.is_now()


def test_while_a_picture_is_made(web, before):
    seen = []
    web.others.append(SimpleNamespace(process_before_every_sampling=lambda p, **_: seen.append(our_layers(web.unet))))
    web.others.append(SimpleNamespace(post_sample=lambda p: seen.append(our_layers(web.unet))))
    web.make(Processing(web, [TAGGED, "a knight", TAGGED]))
    assert seen == [0] * 6
    assert all(call.unet is web.unet for call in web.calls)
    assert before.is_now()


def test_the_unets_weights_are_neither_changed_nor_copied(web):
    web.make(Processing(web, TAGGED))
    assert backed_up(web.unet) == []


def test_the_users_own_lora_stays(web):
    own = Processing(web, "a knight <lora:stone:0.5>")
    (plain,) = web.make(own)
    before = Before(web)
    web.make(Processing(web, f"a knight <lora:stone:0.5>{PAIR}"))
    assert [network.name for network in web.networks.loaded_networks] == ["stone"]
    (again,) = web.make(Processing(web, "a knight <lora:stone:0.5>"))
    assert again.latent.equal(plain.latent)
    assert state_hash(web) == before._state
    assert hooks(web) == 0


def test_sampling_fails(web, by, before):
    p = Processing(web, TAGGED, fails_at=2)
    with pytest.raises(RuntimeError, match="out of memory"):
        web.make(p)
    assert len(web.calls) == 2
    assert before.is_now()
    assert "sample" not in vars(p)
    web.make(Processing(web, "a knight"))
    assert max(by.plain_off_by(call) for call in web.calls[2:]) < TOLERANCE


def test_the_second_pass_fails(web, before):
    class Failing(Processing):
        def calculate_hr_conds(self):
            super().calculate_hr_conds()
            if self.is_hr_pass:
                raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        web.make(Failing(web, TAGGED, enable_hr=True))
    assert before.is_now()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_the_middle_of_a_call(web, before, error):
    def interrupt(*_):
        raise error

    handle = web.unet.get_submodule("middle_block.1.transformer_blocks.0.attn1.to_q").register_forward_hook(interrupt)
    with pytest.raises(error):
        web.make(Processing(web, TAGGED))
    handle.remove()
    assert before.is_now()


class TestEncodingFails:
    def fail(self, web, monkeypatch):
        with monkeypatch.context() as patch:

            def encode(prompts):
                raise RuntimeError("out of memory")

            patch.setattr(web, "encode", encode)
            p = Processing(web, TAGGED)
            with pytest.raises(RuntimeError, match="out of memory"):
                web.make(p)
        return p  # as a debugger or a traceback may keep it

    def test_the_next_picture_is_plain(self, web, by, before, monkeypatch):
        kept = self.fail(web, monkeypatch)
        p = Processing(web, "a knight")
        web.make(p)
        assert close(p.c, by.plainly_encoded(["a knight"]))
        assert close(p.uc, by.plainly_encoded([""]))
        assert max(by.plain_off_by(call) for call in web.calls) < TOLERANCE
        assert before.is_now()
        del kept

    def test_the_next_fusion_is_its_own(self, web, by, before, monkeypatch):
        kept = self.fail(web, monkeypatch)
        p = Processing(web, "a knight <est:stone:wood>")
        web.make(p)
        assert close(p.c, by.plainly_encoded(["a knight "]))
        assert max(by.off_by(call, "stone", "wood") for call in web.calls) < TOLERANCE
        assert before.is_now()
        del kept

    def test_the_next_picture_disregards_tags(self, web, by, before, monkeypatch):
        kept = self.fail(web, monkeypatch)
        p = Processing(web, "a knight", disable_extra_networks=True)
        web.make(p)
        assert close(p.c, by.plainly_encoded(["a knight"]))
        assert max(by.plain_off_by(call) for call in web.calls) < TOLERANCE
        assert backed_up(web.unet) == []
        assert before.is_now()
        del kept

    def test_the_same_job_is_made_again(self, web, by, before, monkeypatch):
        p = self.fail(web, monkeypatch)
        web.make(p)
        assert close(p.c, by.encoded(["a knight "]))
        assert max(by.off_by(call) for call in web.calls) < TOLERANCE
        assert before.is_now()
        assert "sample" not in vars(p)


def test_a_fusion_that_is_garbage_leaves_nothing(start, monkeypatch):
    web = start("forge")
    before = Before(web)
    TestEncodingFails().fail(web, monkeypatch)
    gc.collect()
    assert before.is_now()


class TestRefiner:
    def job(self, web, kind, prompt=TAGGED, family=None, **knobs):
        p = Processing(web, prompt, **knobs)
        p.other = web.checkpoint(7, family)
        p.refiner_checkpoint_info = p.other.sd_checkpoint_info

        def switch():
            if kind == "object":
                web.sd_model = p.other
            else:
                web.load_into_same_modules(p.other)

        p.refiner = switch
        return p

    @pytest.mark.parametrize("kind", ["object", "modules"])
    def test_draws_its_part_alone(self, web, by, kind):
        old = web.sd_model
        p = self.job(web, kind)
        web.make(p)
        first, refined = web.calls[:3], web.calls[3:]
        assert len(refined) == 2
        assert max(by.off_by(call) for call in first) < TOLERANCE
        later = Bystander(web, by._loras)
        assert max(later.plain_off_by(call) for call in refined) < TOLERANCE
        assert close(refined[0].kwargs["context"][:1], later.plainly_encoded(["a knight "]))
        assert list(p.comments) == ["The refiner drew its part without EST-LoRA: a plan is made for one checkpoint."]
        assert p.extra_generation_params["EST-LoRA subject"] == "knight"
        for model in (web.unet, web.unet_of(old), *web.encoders.values()):
            assert our_layers(model) == 0
            assert not model._forward_pre_hooks
        assert "sample" not in vars(p)

    @pytest.mark.parametrize("kind", ["object", "modules"])
    def test_every_batch_begins_with_the_fusion(self, web, by, before, kind):
        web.make(self.job(web, kind, [TAGGED, "a knight", TAGGED]))
        for batch in (0, 10):
            assert max(by.off_by(call) for call in web.calls[batch : batch + 3]) < TOLERANCE
        assert max(by.plain_off_by(call) for call in web.calls[5:8]) < TOLERANCE
        web.reload()
        assert before.is_now()

    @pytest.mark.parametrize("hires", ["same", "off"])
    @pytest.mark.parametrize("refined", [False, True])
    @pytest.mark.parametrize("kind", ["object", "modules"])
    def test_in_one_of_two_passes(self, web, by, before, kind, refined, hires):
        prompt = f"a knight <est:knight:ink:hires={hires}>"
        p = self.job(web, kind, prompt, enable_hr=True, refines_pass=(refined,), refiner_at=2)
        web.make(p)
        first = [call for call in web.calls if not call.second_pass]
        second = [call for call in web.calls if call.second_pass]
        (second if refined else first)[2:] = []
        assert max(by.off_by(call) for call in first) < TOLERANCE
        if hires == "same":
            assert max(by.off_by(call) for call in second) < TOLERANCE
        else:
            assert max(by.plain_off_by(call) for call in second) < TOLERANCE
        assert p.extra_generation_params["EST-LoRA subject"] == "knight"
        web.reload()
        assert before.is_now()
        assert "sample" not in vars(p)

    @pytest.mark.parametrize("kind", ["object", "modules"])
    def test_leaves_weights_alone(self, web, before, kind):
        web.make(self.job(web, kind))
        assert backed_up(web.unet) == []
        web.reload()
        assert before.is_now()

    def test_what_it_encoded_is_not_taken_for_a_fusion(self, web, files):
        p = self.job(web, "object")
        web.make(p)
        web.select(p.other)
        by, again = Bystander(web, files), Processing(web, TAGGED)
        web.make(again)
        assert close(again.c, by.encoded(["a knight "]))

    @pytest.mark.parametrize("flavour", ["a1111", "forge"])
    def test_of_another_family_changes_nothing_of_what_was_made(self, start, files, flavour):
        web = start(flavour)
        by, p = Bystander(web, files), self.job(web, "object", family="sdxl")
        web.make(p)
        assert max(by.off_by(call) for call in web.calls[:3]) < TOLERANCE
        assert p.extra_generation_params["EST-LoRA subject"] == "knight"
        assert "EST-LoRA off" not in p.extra_generation_params
        assert list(p.comments) == ["The refiner drew its part without EST-LoRA: a plan is made for one checkpoint."]
        assert "sample" not in vars(p)

    @pytest.mark.parametrize("hires", [False, True])
    def test_in_a_plain_picture(self, web, before, hires):
        p = self.job(web, "object", "a knight", enable_hr=hires)
        web.make(p)
        web.reload()
        assert before.is_now()
        assert not p.comments


class TestNested:
    """ADetailer and the like start a job within a job."""

    def nest(self, web, callback, prompt):
        inner = []

        def start(p, *_, **__):
            if not inner:
                inner.append(Processing(web, prompt))
                web.make(inner[0])

        web.others.append(SimpleNamespace(**{callback: start}))
        return inner

    @pytest.mark.parametrize("callback", ["postprocess_image", "postprocess_batch", "post_sample"])
    def test_after_sampling(self, web, by, before, callback):
        inner = self.nest(web, callback, TAGGED)
        outer = Processing(web, [TAGGED, TAGGED])
        web.make(outer)
        assert len(web.calls) == 15
        assert max(by.off_by(call) for call in web.calls) < TOLERANCE
        assert outer.extra_generation_params["EST-LoRA subject"] == "knight"
        assert inner[0].extra_generation_params["EST-LoRA subject"] == "knight"
        assert before.is_now()

    def test_with_another_pair(self, web, by, before):
        self.nest(web, "postprocess_image", "a face <est:stone:wood>")
        web.make(Processing(web, [TAGGED, TAGGED]))
        assert max(by.off_by(call) for call in web.calls[:5]) < TOLERANCE
        assert max(by.off_by(call, "stone", "wood") for call in web.calls[5:10]) < TOLERANCE
        assert max(by.off_by(call) for call in web.calls[10:]) < TOLERANCE
        assert before.is_now()

    def test_a_plain_one(self, web, by, before):
        self.nest(web, "postprocess_image", "a face")
        web.make(Processing(web, [TAGGED, TAGGED]))
        assert max(by.plain_off_by(call) for call in web.calls[5:10]) < TOLERANCE
        assert max(by.off_by(call) for call in web.calls[10:]) < TOLERANCE
        assert before.is_now()


def test_a_job_is_made_again(web, by, before):
    p = Processing(web, TAGGED)
    first, again = web.make(p), web.make(p)
    assert first[0].latent.equal(again[0].latent)
    assert max(by.off_by(call) for call in web.calls) < TOLERANCE
    p.prompt = "a knight"
    web.make(p)
    assert max(by.plain_off_by(call) for call in web.calls[10:]) < TOLERANCE
    assert not any("EST" in key for key in p.extra_generation_params)
    assert before.is_now()


class TestLeftBehind:
    """Hooks of an earlier picture that nobody took off."""

    def leave(self, web, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(job.Job, "release", lambda self: None)
            patch.setattr(FusionSession, "detach", lambda self: None)
            p = Processing(web, TAGGED, fails_at=2)
            with pytest.raises(RuntimeError):
                web.make(p)
        assert our_layers(web.unet)
        web.calls.clear()
        return p

    @pytest.mark.parametrize("prompt", ["a knight", "a knight <est:stone:wood>", "a knight <est:none:wood>"])
    def test_are_gone_before_the_next(self, web, by, before, monkeypatch, prompt):
        kept = self.leave(web, monkeypatch)
        p = Processing(web, prompt)
        web.make(p)
        if "stone" in prompt:
            assert max(by.off_by(call, "stone", "wood") for call in web.calls) < TOLERANCE
        else:
            assert max(by.plain_off_by(call) for call in web.calls) < TOLERANCE
        assert close(p.c, by.plainly_encoded([p.prompts[0]]))
        assert before.is_now()
        del kept

    def test_are_gone_before_a_second_pass_with_the_checkpoint_that_has_them(self, web, monkeypatch):
        first, other = web.sd_model, web.checkpoint(9)
        web.select(other)
        kept = self.leave(web, monkeypatch)
        web.select(first)
        web.make(Processing(web, "a knight", enable_hr=True, hr_checkpoint=other, disable_extra_networks=True))
        assert our_layers(web.unet_of(other)) == 0
        del kept


def test_reload_of_the_extension_leaves_the_model_alone(web, by, before):
    web.make(Processing(web, TAGGED))
    web.callbacks.call("on_script_unloaded")
    web.callbacks.callbacks.clear()
    web.load_entry()
    web.calls.clear()
    web.make(Processing(web, TAGGED))
    assert max(by.off_by(call) for call in web.calls) < TOLERANCE
    assert before.is_now()


class TestGuard:
    """What makes sure that the end of `p.sample` is the end of a fusion."""

    class Job:
        released = 0

        def release(self):
            self.released += 1

    def p(self, result="latent"):
        class P:
            def sample(self, *args, **kwargs):
                if isinstance(result, Exception):
                    raise result
                return result, args, kwargs

        return P()

    def test_it_passes_everything_through_once(self):
        p, ours = self.p(), self.Job()
        job.guard(p, ours)
        assert p.sample(1, prompts=2) == ("latent", (1,), {"prompts": 2})
        assert ours.released == 1
        assert not vars(p)
        p.sample()
        assert ours.released == 1

    def test_it_lets_errors_through(self):
        p, ours = self.p(ValueError("x")), self.Job()
        job.guard(p, ours)
        with pytest.raises(ValueError, match="^x$"):
            p.sample()
        assert ours.released == 1
        assert not vars(p)

    def test_it_comes_off_unused(self):
        p, ours = self.p(), self.Job()
        job.guard(p, ours)
        job.unguard(p)
        assert not vars(p)
        job.unguard(p)
        assert ours.released == 0

    def test_what_another_extension_put_there_before_stays(self):
        p, ours = self.p(), self.Job()
        p.sample = theirs = lambda *args, **kwargs: "theirs"
        job.guard(p, ours)
        assert p.sample() == "theirs"
        assert p.sample is theirs
        assert ours.released == 1
        job.guard(p, ours)
        job.unguard(p)
        assert p.sample is theirs

    def test_what_another_extension_puts_over_it_stays(self):
        p, ours = self.p(), self.Job()
        job.guard(p, ours)
        guarded = p.sample
        p.sample = theirs = lambda *args, **kwargs: ("theirs", guarded(*args, **kwargs))
        job.unguard(p)
        assert p.sample is theirs
        assert p.sample() == ("theirs", ("latent", (), {}))
        assert p.sample is theirs
        assert ours.released == 1

    def test_another_extension_that_puts_back_what_it_found(self):
        """It took the guarded one for the host's, and puts it back after sampling."""
        p, ours = self.p(), self.Job()
        job.guard(p, ours)
        found = p.sample

        def theirs(*args, **kwargs):
            p.sample = found
            return found(*args, **kwargs)

        p.sample = theirs
        p.sample()
        assert ours.released == 1
        assert p.sample()[0] == "latent"
        assert not vars(p)


def test_another_extension_that_wraps_sampling(web, by, before):
    def wrap(p, **_):
        inside = p.sample

        def sample(*args, **kwargs):
            web.calls.append("theirs")
            return inside(*args, **kwargs)

        p.sample = sample

    web.others.append(SimpleNamespace(process=wrap))
    p = Processing(web, [TAGGED, "a knight"])
    web.make(p)
    assert web.calls[0] == web.calls[6] == "theirs"
    assert max(by.off_by(call) for call in web.calls[1:6]) < TOLERANCE
    assert max(by.plain_off_by(call) for call in web.calls[7:]) < TOLERANCE
    assert p.sample.__name__ == "sample"
    assert before.is_now()


def test_another_extension_that_wraps_sampling_later(web, by, before):
    def wrap(p, **_):
        inside = p.sample
        p.sample = lambda *args, **kwargs: inside(*args, **kwargs)

    web.others.append(SimpleNamespace(process_batch=wrap))
    web.make(Processing(web, [TAGGED, "a knight", TAGGED]))
    assert max(by.off_by(call) for call in web.calls[:5]) < TOLERANCE
    assert max(by.plain_off_by(call) for call in web.calls[5:10]) < TOLERANCE
    assert max(by.off_by(call) for call in web.calls[10:]) < TOLERANCE
    assert before.is_now()


def test_other_hooks_on_the_model_stay(web):
    calls = []
    module = web.unet.get_submodule("middle_block.1.transformer_blocks.0.attn1.to_q")
    module.register_forward_hook(lambda *_: calls.append(1))
    web.unet.register_forward_pre_hook(lambda *_: calls.append(2))
    web.make(Processing(web, TAGGED, args=[PANEL]))
    assert len(calls) == 10
    assert hooks(web) == 2


def test_half_precision_weights_come_back_exactly(start):
    web = start("a1111")
    for encoder in web.encoders.values():
        encoder.to(torch.bfloat16)
    kept = [tensor.clone() for encoder in web.encoders.values() for tensor in encoder.state_dict().values()]
    p = Processing(web, TAGGED)
    web.make(p)
    assert not close(p.c, web.encode(["a knight "]))
    now = [tensor for encoder in web.encoders.values() for tensor in encoder.state_dict().values()]
    assert all(map(torch.equal, now, kept))
