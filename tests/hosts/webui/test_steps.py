"""Where steps are told to begin is where they then do."""

from __future__ import annotations

import pytest

from est_lora.hosts.webui.steps import Sampling
from tests.hosts.webui.host import ImageProcessing, Processing
from tests.hosts.webui.loras import PAIR

# Forge's timesteps are whole numbers.
TOLERANCE = 1e-3


def done(web, clock="timestep", kind=Processing, **knobs):
    """Every `tau` at which a picture's model was called."""
    p = kind(web, f"a knight {PAIR[:-1]}:clock={clock}>", **knobs)
    web.make(p)
    return sorted(set(p.est_lora.done[1]))


@pytest.mark.parametrize("clock", ["timestep", "step"])
@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        ("Euler", "Automatic"),
        ("Euler", None),
        ("Euler", "Karras"),
        ("Heun", "Automatic"),
        ("DPM2", "Automatic"),
        ("DPM2", "Karras"),
        ("DDIM", "Automatic"),
    ],
)
def test_a_picture(web, sampler, scheduler, clock):
    told = Sampling(sampler, scheduler, 5).taus(clock)
    assert told == pytest.approx(done(web, clock, sampler_name=sampler, scheduler=scheduler), abs=TOLERANCE)
    assert len(told) == 5
    assert told[0] == 0 if clock == "step" else told[0] < 0.25


@pytest.mark.parametrize("clock", ["timestep", "step"])
@pytest.mark.parametrize("sampler", ["Euler", "DPM2", "DDIM"])
@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_img2img_begins_on_the_way(web, sampler, clock, strength):
    told = Sampling(sampler, "Automatic", 10, strength).taus(clock)
    knobs = {"sampler_name": sampler, "steps": 10, "denoising_strength": strength}
    assert told == pytest.approx(done(web, clock, ImageProcessing, **knobs), abs=TOLERANCE)
    assert told


def test_img2img_that_does_all_the_steps_it_is_asked_for(web, monkeypatch):
    monkeypatch.setattr(
        web.modules["modules.sd_samplers_common"], "setup_img2img_steps", lambda p, steps=None: (10, p.steps - 1)
    )
    assert len(Sampling("Euler", "Automatic", 5, 0.5).taus("timestep")) == 5


@pytest.mark.parametrize("sampler", ["DPM adaptive", "nobody's", None])
@pytest.mark.parametrize("clock", ["timestep", "step"])
def test_a_sampler_without_a_list_has_no_steps(web, sampler, clock):
    assert Sampling(sampler, "Automatic", 5).taus(clock) == []


def test_samplers_where_reforge_has_them(web, monkeypatch):
    """k-diffusion's under another name, and some in a module of the host's own."""
    module = web.modules["modules.sd_samplers_kdiffusion"]
    before = Sampling("Euler", "Automatic", 5).taus("timestep")
    monkeypatch.setattr(module, "sampling", module.k_diffusion.sampling, raising=False)
    monkeypatch.delattr(module, "k_diffusion")
    assert Sampling("Euler", "Automatic", 5).taus("timestep") == before
    assert Sampling("DPM adaptive", "Automatic", 5).taus("timestep") == []
    monkeypatch.delattr(module.sampling, "euler")
    assert Sampling("Euler", "Automatic", 5).taus("timestep") == before


@pytest.mark.parametrize("steps", [0, -1])
@pytest.mark.parametrize("clock", ["timestep", "step"])
def test_no_steps_are_none(web, steps, clock):
    assert Sampling("DDIM", "Automatic", steps).taus(clock) == []
    assert Sampling("Euler", "Automatic", steps).taus(clock) == []


def test_no_checkpoint_is_loaded_for_it(web, monkeypatch):
    web.sd_model = None
    asked = []
    monkeypatch.setattr(
        web.modules["modules.sd_samplers_kdiffusion"].KDiffusionSampler,
        "get_sigmas",
        lambda self, p, steps: asked.append(p),
    )
    assert Sampling("Euler", "Align Your Steps", 5).taus("timestep") == []
    assert not asked


def test_a_host_that_has_its_samplers_elsewhere(web, monkeypatch):
    monkeypatch.delattr(web.modules["modules.sd_samplers_kdiffusion"], "KDiffusionSampler")
    assert Sampling("Euler", "Automatic", 5).taus("timestep") == []
    assert len(Sampling("DDIM", "Automatic", 5).taus("timestep")) == 5
