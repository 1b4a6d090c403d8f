"""The merge engine in a WebUI: the same pictures as the branch, and the moments at which a host writes into weights."""

from __future__ import annotations

import random
import sys
from types import SimpleNamespace

import pytest
import torch

from est_lora.fusion.branch import BranchLayer
from est_lora.fusion.merge import merged_into
from tests.hosts.webui.host import ImageProcessing, Processing
from tests.hosts.webui.looks import close, our_layers, state_hash
from tests.hosts.webui.loras import INK, KNIGHT, NAMES, PAIR
from tests.hosts.webui.test_restore import Before

SAMPLERS = ("Euler", "Heun", "DPM2", "DPM adaptive", "DDIM")
THIRD = f"<lora:{KNIGHT}:0.7>"
LAYERS = len(NAMES)
PAIRS = ((KNIGHT, INK), ("stone", "wood"), (INK, "wood"))


def tag(engine, **knobs):
    return PAIR[:-1] + "".join(f":{key}={value}" for key, value in {"engine": engine, **knobs}.items()) + ">"


class Watch:
    """Counts, at each call of the UNet, the layers that have their updates in the weight, and those with a hook."""

    def __init__(self, web):
        self.merged, self.hooked = [], []

        def look(module, args, output):
            self.merged.append(sum(merged_into(each) is not None for each in module.modules()))
            hooks = [hook for each in module.modules() for hook in each._forward_hooks.values()]
            self.hooked.append(sum(isinstance(hook, BranchLayer) for hook in hooks))

        web.unet.register_forward_hook(look)


def drawn(web, prompt, kind=Processing, **knobs):
    return web.make(kind(web, prompt, **knobs))[0].latent


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", [Processing, ImageProcessing])
def test_both_engines_draw_the_same_with_every_sampler(web, sampler, kind):
    watch = Watch(web)
    merged = drawn(web, f"a knight {tag('merge')}", kind, sampler_name=sampler)
    assert (min(watch.merged), max(watch.hooked)) == (LAYERS, 0)
    calls = len(watch.merged)
    branched = drawn(web, f"a knight {tag('branch')}", kind, sampler_name=sampler)
    assert (max(watch.merged[calls:]), min(watch.hooked[calls:])) == (0, LAYERS)
    assert close(merged, branched)
    assert not close(merged, drawn(web, "a knight", kind, sampler_name=sampler))


@pytest.mark.parametrize("more", ["layers=all", "other=off", "method=sum", "pattern=s*", "clock=step"])
def test_both_engines_draw_the_same_whatever_is_asked(web_xl, more):
    key, value = more.split("=")
    merged = drawn(web_xl, f"a knight {tag('merge', **{key: value})}", enable_hr=True)
    branched = drawn(web_xl, f"a knight {tag('branch', **{key: value})}", enable_hr=True)
    assert close(merged, branched)


def test_a_hundred_pictures_in_a_row(web):
    before, choose = Before(web), random.Random(0)
    for _ in range(100):
        names = choose.choice(PAIRS)
        knobs = {"method": choose.choice(["est", "sum", "style"]), "layers": choose.choice(["attention", "all"])}
        knobs["beta"] = round(choose.uniform(0, 1), 2)
        asked = "".join(f":{key}={value}" for key, value in knobs.items())
        web.make(Processing(web, f"a knight <est:{':'.join(names)}{asked}>", enable_hr=choose.random() < 0.3))
        assert before.is_now()


def test_an_exception_at_every_seventh_call(web):
    before = Before(web)
    for engine in ("merge", "branch"):
        with pytest.raises(RuntimeError, match="out of memory"):
            web.make(Processing(web, f"a knight {tag(engine)}", steps=12, fails_at=7))
        assert before.is_now()


def test_with_a_third_lora_that_the_host_has_never_merged(web):
    """It merges at the first call of each layer, and keeps what it finds there for the checkpoint's own weight."""
    plain = state_hash(web)
    third = drawn(web, f"a knight {tag('branch')} {THIRD}")
    web.make(Processing(web, "a knight"))
    assert state_hash(web) == plain
    for module in web.unet.modules():  # as if it had been started anew
        for name in ("network_weights_backup", "network_bias_backup", "network_current_names"):
            vars(module).pop(name, None)
    watch = Watch(web)
    assert close(drawn(web, f"a knight {tag('merge')} {THIRD}"), third)
    assert all(watch.merged)
    drawn(web, "a knight")
    assert state_hash(web) == plain


def test_the_hosts_own_moment_is_too_late(start, monkeypatch):
    """Why the host is asked to merge first: this is what happens where it isn't."""
    from est_lora.hosts.webui.a1111 import A1111Host

    web = start("a1111")
    plain = state_hash(web)
    right = drawn(web, f"a knight {tag('branch')} {THIRD}")
    drawn(web, "a knight")
    monkeypatch.setattr(A1111Host, "settle", lambda self, module: True)
    for module in web.unet.modules():
        for name in ("network_weights_backup", "network_bias_backup", "network_current_names"):
            vars(module).pop(name, None)
    assert not close(drawn(web, f"a knight {tag('merge')} {THIRD}"), right)
    drawn(web, "a knight")
    assert state_hash(web) != plain


def test_a_strength_that_changes_in_the_middle(start):
    """As extensions that schedule the user's LoRAs do it; A1111 merges anew at the next call of each layer."""
    web = start("a1111")
    plain = state_hash(web)

    def weaken(p, **_):
        steps = []

        def count(module, args):
            steps.append(args)
            if len(steps) == 2:
                for network in web.networks.loaded_networks:
                    network.unet_multiplier /= 2

        handle = web.unet.register_forward_pre_hook(count)
        p.web.others[0].post_sample = lambda p: handle.remove()

    web.others.append(SimpleNamespace(process_before_every_sampling=weaken))
    watch = Watch(web)
    merged = drawn(web, f"a knight {tag('merge')} {THIRD}")
    assert watch.merged[0] > 0 == watch.merged[-1]
    assert watch.hooked[0] == 0 < watch.hooked[-1]
    branched = drawn(web, f"a knight {tag('branch')} {THIRD}")
    assert close(merged, branched)
    web.others.clear()
    drawn(web, "a knight")
    assert state_hash(web) == plain


@pytest.mark.parametrize("prompt", ["a knight", f"a knight {THIRD}"])
def test_where_the_host_adds_its_loras_in_each_call_the_branch_is_kept(web, prompt):
    if web.is_forge:
        for module in web.unet.modules():
            if hasattr(module, "in_features"):
                module.forge_online_loras = {"weight": [object()]}
    else:
        sys.modules["modules.shared"].opts.lora_functional = True
    watch = Watch(web)
    drawn(web, f"{prompt} {tag('auto', layers='attention', other='off')}")
    assert not any(watch.merged)
    assert all(watch.hooked)


def test_with_a_refiner_the_branch_is_kept(web):
    """Another checkpoint may be loaded into the same modules, in the middle of the picture."""
    watch = Watch(web)
    p = Processing(web, f"a knight {tag('merge')}")
    p.refiner_checkpoint_info = object()
    web.make(p)
    assert not any(watch.merged)
    assert all(watch.hooked)


def test_a_setting_leaves_the_weights_alone(web):
    sys.modules["modules.shared"].opts.data["est_lora_originals"] = "nowhere: don't merge"
    watch = Watch(web)
    drawn(web, f"a knight {PAIR}")
    assert not any(watch.merged)


def test_weights_are_back_as_soon_as_the_sampler_is_done(web):
    """Before the picture is decoded, and before a second pass with another checkpoint is prepared."""
    looked, plain = [], state_hash(web)
    original = web.reload

    def reload():
        looked.append((state_hash(web) == plain, our_layers(web.unet)))
        original()

    web.reload = reload
    web.make(Processing(web, f"a knight {tag('merge')}", enable_hr=True))
    assert looked[0] == (True, 0)


def test_a_sampler_of_another_extension_gives_them_back_too(web, monkeypatch):
    """It may have no `launch_sampling`; then what follows the sampling does it."""
    from tests.hosts.webui import samplers

    watch = Watch(web)
    before = Before(web)
    monkeypatch.delattr(samplers.Sampler, "launch_sampling")
    monkeypatch.setattr(
        samplers.SigmaSampler,
        "run",
        lambda self, p, x, cond, uncond: self.func(
            samplers.Denoiser(p, cond, uncond, self._timestep), x, sigmas=self.get_sigmas(p, p.steps)
        ),
    )
    web.make(Processing(web, f"a knight {tag('merge')}"))
    assert all(watch.merged)
    assert before.is_now()


def test_the_precision_of_what_the_host_computes_in_does_not_matter(start):
    web = start("forge")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged = drawn(web, f"a knight {tag('merge')}")
        branched = drawn(web, f"a knight {tag('branch')}")
    assert float((merged - branched).norm() / branched.norm()) < 5e-2
