"""What is kept from one picture to the next: no file is read twice, and no checkpoint is kept for it."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from est_lora import report
from est_lora.config import FusionConfig
from est_lora.gate import FusionPlan
from est_lora.hosts.webui import plans as plans_module
from est_lora.hosts.webui.job import host_of
from est_lora.hosts.webui.plans import Plans
from est_lora.hosts.webui.preview import Preview
from est_lora.lora import UNetLayout
from est_lora.lora.relative import DoraUpdate
from tests.files import ATTENTION_LAYERS, random_lora, write
from tests.hosts.webui import fakes
from tests.hosts.webui.host import Processing
from tests.hosts.webui.loras import PAIR

NAMED = {"subject": "knight", "style": "ink"}


@pytest.fixture
def folder(web, tmp_path):
    """The files of the host, where they may be changed."""
    shutil.copytree(web.folder, tmp_path / "loras")
    sys.modules["networks"] = web.networks = fakes.networks_module(tmp_path / "loras", web._load_networks)
    return tmp_path / "loras"


@pytest.fixture
def loaded(note_loads):
    """The files that were read."""
    return note_loads(name)


@pytest.fixture
def planned(monkeypatch):
    """The pairs that were planned."""
    planned = []
    of = FusionPlan.of
    monkeypatch.setattr(
        FusionPlan, "of", lambda one, other, *rest: planned.append((one, other)) or of(one, other, *rest)
    )
    return planned


@pytest.fixture
def changes(monkeypatch):
    """One entry for each time that an update was computed from a weight."""
    changes = []
    change = DoraUpdate.change
    monkeypatch.setattr(DoraUpdate, "change", lambda self, weight: changes.append(self) or change(self, weight))
    return changes


def name(path):
    return os.path.basename(path).removesuffix(".safetensors")


def made(web, prompt=f"a knight {PAIR}"):
    p = Processing(web, prompt)
    (picture,) = web.make(p)
    assert not p.comments
    return picture.latent


def decompose(path):
    """Makes every layer of a file DoRA's, whose update depends on the weight."""
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    torch.manual_seed(0)
    for key in [key for key in tensors if key.endswith("lora_up.weight")]:
        up = tensors[key]
        magnitude = 0.5 + torch.rand(len(up), *[1] * (up.dim() - 1))
        tensors[key.replace("lora_up.weight", "dora_scale")] = magnitude
    save_file(tensors, path)


def fitted(web, plans, folder, **knobs):
    """The plan of the pair for the checkpoint that is loaded."""
    paths = (str(folder / f"{name}.safetensors") for name in NAMED.values())
    return plans.of(*paths, FusionConfig.of({**NAMED, **knobs}), 0.4, host_of(Processing(web)))


class TestFiles:
    def test_the_second_picture_reads_and_plans_nothing(self, web, loaded, planned):
        first = made(web)
        assert made(web).equal(first)
        assert loaded == ["knight", "ink"]
        assert len(planned) == 1

    def test_the_panel_and_the_pictures_read_them_once(self, web, loaded):
        shown = Preview(web.script.plans)
        for lean in (0.0, 0.5):
            shown.plan({**NAMED, "lean": lean})
        made(web)
        assert loaded == ["knight", "ink"]
        assert web.script.panel._preview._plans is web.script.plans

    def test_of_a_model_of_another_layout_they_are_read_for_it(self, web, loaded, monkeypatch):
        plans, host = Plans(), host_of(Processing(web))
        paths = (str(web.folder / "knight.safetensors"), str(web.folder / "ink.safetensors"))
        plans.of(*paths, FusionConfig(**NAMED))
        monkeypatch.setattr(host, "layout", UNetLayout((2, 1)), raising=False)
        plans.of(*paths, FusionConfig(**NAMED), None, host)
        assert loaded == ["knight", "ink"] * 2

    def test_two_pairs_are_kept_and_no_more(self, web, loaded):
        shown = Preview(web.script.plans)
        for pair in (("knight", "ink"), ("stone", "wood"), ("knight", "wood")):
            shown.plan(dict(zip(NAMED, pair)))
        assert len(loaded) == 4
        for subject in ("twin", "knight", "stone"):
            shown.plan({"subject": subject, "style": "wood"})
        assert loaded[4:] == ["twin"]
        shown.plan({"subject": "ink", "style": "wood"})
        assert loaded[5:] == ["ink"]

    def test_one_that_has_changed_is_read_anew(self, web, folder, loaded):
        first = made(web)
        write(folder / "knight.safetensors", random_lora(9, ATTENTION_LAYERS))
        assert not made(web).equal(first)
        assert loaded == ["knight", "ink", "knight"]

    def test_also_one_of_the_same_size(self, web, folder, loaded):
        path = folder / "knight.safetensors"
        made(web)
        stat = path.stat()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        made(web)
        assert loaded == ["knight", "ink", "knight"]

    def test_one_that_has_gone_is_said(self, web, folder):
        made(web)
        (folder / "knight.safetensors").unlink()
        p = Processing(web, f"a knight {PAIR}")
        web.make(p)
        assert "knight" in " ".join(p.comments)


class TestPlans:
    def test_each_request_has_its_own(self, web, planned):
        for prompt in ("<est:knight:ink:beta=0.2>", "<est:knight:ink:beta=0.3>", "<est:ink:knight:beta=0.2>"):
            made(web, prompt)
        assert len(planned) == 3
        made(web, "<est:knight:ink:beta=0.3>")
        assert len(planned) == 3

    def test_few_are_kept(self, web, planned):
        for beta in (0.1, 0.2, 0.3, 0.4, 0.5, 0.1):
            made(web, f"<est:knight:ink:beta={beta}>")
        assert len(planned) == 6

    def test_another_checkpoint_is_looked_at(self, web, planned):
        made(web)
        web.select(web.checkpoint(seed=7))
        made(web)
        assert len(planned) == 2
        before, after = (subject.updates for subject, _ in planned)
        assert before == after  # of a file that was read once


class TestUpdatesThatReadWeights:
    @pytest.fixture(autouse=True)
    def dora(self, folder):
        for each in NAMED.values():
            decompose(folder / f"{each}.safetensors")

    def test_energies_are_computed_once(self, web, folder, changes):
        plans = Plans()
        fitted(web, plans, folder)
        assert changes
        changes.clear()
        again = fitted(web, plans, folder, beta=0.1, lean=0.5)
        assert not changes
        assert report.to_json(again) == report.to_json(fitted(web, Plans(), folder, beta=0.1, lean=0.5))

    def test_also_what_needs_the_dense_update(self, web, folder, changes):
        plans = Plans()
        fitted(web, plans, folder, balance="l1")
        fitted(web, plans, folder, method="k-lora")
        changes.clear()
        for knobs in ({"balance": "l1"}, {"method": "k-lora"}):
            again = fitted(web, plans, folder, beta=0.1, **knobs)
            assert not changes
            assert report.to_json(again) == report.to_json(fitted(web, Plans(), folder, beta=0.1, **knobs))
            changes.clear()

    def test_another_checkpoint_in_the_same_modules_has_its_own(self, web, folder):
        plans = Plans()
        first = report.to_json(fitted(web, plans, folder))
        own = web.sd_model.sd_checkpoint_info
        web.load_into_same_modules(web.checkpoint(seed=7))
        second = report.to_json(fitted(web, plans, folder))
        assert second["layers"] != first["layers"]
        assert second == report.to_json(fitted(web, Plans(), folder))
        web.reload()
        assert web.sd_model.sd_checkpoint_info is own
        assert report.to_json(fitted(web, plans, folder)) == first

    def test_what_the_panel_plans_knows_no_weights(self, web, folder):
        plans = Plans()
        fitted(web, plans, folder)
        paths = (str(folder / f"{each}.safetensors") for each in NAMED.values())
        plan = plans.of(*paths, FusionConfig(**NAMED), 0.4)
        assert all(layer.needs_model for layer in plan.layers)

    def test_the_second_picture_is_the_first(self, web, loaded):
        first = made(web)
        assert made(web).equal(first)
        assert loaded == ["knight", "ink"]

    def test_the_checkpoint_goes_when_the_host_drops_it(self, web):
        made(web)
        gone = [weakref.ref(model) for model in (web.unet, *web.encoders.values())]
        web.calls.clear()
        web.select(web.checkpoint(seed=7))
        web.modules["modules.shared"].sd_model = web.sd_model
        gc.collect()
        assert [each() for each in gone] == [None] * len(gone)
        made(web)


def test_the_checkpoint_goes_also_when_a_plan_was_kept(web):
    made(web)
    assert web.script.plans._plans._values
    gone = weakref.ref(web.unet)
    web.calls.clear()
    web.select(web.checkpoint(seed=7))
    web.modules["modules.shared"].sd_model = web.sd_model
    gc.collect()
    assert gone() is None


def test_what_comes_to_lie_where_a_checkpoint_was_is_another(monkeypatch):
    monkeypatch.setattr(plans_module, "id", lambda thing: 7, raising=False)
    info, unet, other = object(), torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    key = plans_module._Checkpoint(SimpleNamespace(unet=unet, checkpoint=info))
    assert {key: 1}.get(plans_module._Checkpoint(SimpleNamespace(unet=unet, checkpoint=info))) == 1
    assert key != plans_module._Checkpoint(SimpleNamespace(unet=unet, checkpoint=object()))
    assert key != plans_module._Checkpoint(SimpleNamespace(unet=other, checkpoint=info))
    del unet
    gc.collect()
    assert {key: 1}.get(plans_module._Checkpoint(SimpleNamespace(unet=other, checkpoint=info))) is None
