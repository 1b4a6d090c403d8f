"""What all tests of measuring share."""

from __future__ import annotations

import shutil

import pytest

from tests.extractors import write_dino
from tests.files import write


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, a pair that fits it, and the weights of an extractor."""
    from tests.pipelines import fitting_lora, stable_diffusion

    folder = tmp_path_factory.mktemp("made")
    pipe = stable_diffusion()
    pipe.save_pretrained(folder / "model")
    for seed, role in enumerate(("subject", "style")):
        write(folder / f"{role}.safetensors", fitting_lora(pipe.unet, seed, size=1.0))
    write_dino(folder / "weights")
    return folder


@pytest.fixture
def work(made, tmp_path, monkeypatch):
    """A copy of them to work in, and a place to remember."""
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "work"


@pytest.fixture
def calls(monkeypatch):
    """The calls of any UNet so far."""
    import diffusers

    made, forward = [], diffusers.UNet2DConditionModel.forward

    def counted(self, *args, **kwargs):
        made.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", counted)
    return made
