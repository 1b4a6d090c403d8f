"""The merge engine: what is in a weight while a session has it, which weights it leaves alone, and what a host may do."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from est_lora.config import FusionConfig
from est_lora.fusion import FusionSession, merge, original_weight, remove_fusion
from est_lora.fusion.branch import BranchLayer
from est_lora.gate import FusionPlan
from est_lora.lora import LoraFile
from tests.files import ATTENTION_LAYERS, CONV, FEED_FORWARD, WIDTH, write
from tests.fusion.test_session import EVERYTHING, PROJ_IN, hooks, layer, pair, plan_of, some_input, state_hash, tree

NAME = ATTENTION_LAYERS[0]
BACK_AND_FORTH = (0.0, 1.0, 0.4, 0.2, 0.9, 0.0)


def merging(tmp_path, model, *, names=EVERYTHING, session_with=None, **knobs):
    """A session of a pair of files, whose weights are exchanged at its first progress."""
    plan = plan_of(tmp_path, *pair(names=names), **{"engine": "merge", **knobs})
    return FusionSession(model, plan, **(session_with or {}))


def branches(model) -> int:
    return sum(isinstance(hook, BranchLayer) for m in model.modules() for hook in m._forward_hooks.values())


def test_a_merged_layer_has_nothing_to_do_in_a_call(tmp_path):
    model = tree(EVERYTHING)
    with merging(tmp_path, model) as fusing:
        fusing.at(0.3)
        assert fusing.merged == len(EVERYTHING)
        assert not fusing.ran
        for name in EVERYTHING:
            layer(model, name)(some_input(layer(model, name)))
        assert fusing.ran
        assert hooks(model) == 0


def test_by_default_plain_weights_are_merged(tmp_path):
    model = tree(EVERYTHING)
    with merging(tmp_path, model, engine="auto") as fusing:
        fusing.at(0.3)
        assert fusing.merged == len(EVERYTHING)


def test_nothing_drifts_however_often_a_layer_switches(tmp_path):
    model = tree(EVERYTHING, torch.bfloat16)
    with merging(tmp_path, model) as fusing:
        fusing.at(0.0)
        first = state_hash(model)
        seen = set()
        for _ in range(20):
            for tau in BACK_AND_FORTH:
                fusing.at(tau)
                seen.add(state_hash(model))
        assert len(seen) > 2
        assert state_hash(model) == first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [NAME, CONV])
def test_a_switch_takes_no_fresh_memory(tmp_path, dtype, name):
    model = tree([name], dtype)
    weight = layer(model, name).weight
    own = weight.data_ptr()
    with merging(tmp_path, model, names=(name,), layers="all", beta=0.5) as fusing:
        fusing.at(0.0)
        first, place = weight.detach().clone(), weight.data_ptr()
        fusing.at(1.0)
        assert not torch.equal(weight, first)
        assert weight.data_ptr() == place != own
        fusing.at(0.0)
        assert torch.equal(weight, first)
    assert weight.data_ptr() == own


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_sum_is_made_in_float32_and_rounded_once(tmp_path, dtype):
    model = tree([NAME], dtype)
    before = layer(model, NAME).weight.detach().clone()
    subject, style = pair(names=(NAME,))
    plan = plan_of(tmp_path, subject, style, engine="merge", method="sum", subject_weight=0.7, style_weight=-0.4)
    exact = before.double() + 0.7 * subject[NAME].dense - 0.4 * style[NAME].dense
    with FusionSession(model, plan) as fusing:
        fusing.at(0.5)
        got = layer(model, NAME).weight.detach()
    assert got.dtype == dtype
    # A half of the space between two values, but where float32 found another one of two that are nearly as near.
    assert ((got.double() - exact).abs() <= 0.5001 * torch.finfo(dtype).eps * exact.abs() + 1e-6).all()


def test_autocast_does_not_round_the_sum(tmp_path):
    model = tree([NAME])
    with merging(tmp_path, model, names=(NAME,)) as fusing:
        fusing.at(0.5)
        plainly = layer(model, NAME).weight.detach().clone()
    with torch.autocast("cpu", dtype=torch.bfloat16), merging(tmp_path, model, names=(NAME,)) as fusing:
        fusing.at(0.5)
        assert torch.equal(layer(model, NAME).weight, plainly)


def test_the_original_is_the_very_tensor_and_is_never_written_to(tmp_path):
    model = tree(EVERYTHING)
    kept = {name: (weight, weight.data_ptr(), weight._version) for name, weight in model.named_parameters()}
    with merging(tmp_path, model) as fusing:
        for tau in BACK_AND_FORTH:
            fusing.at(tau)
    for name, weight in model.named_parameters():
        assert (weight, weight.data_ptr(), weight._version) == kept[name], name


@pytest.mark.parametrize("inference", [False, True])
def test_weights_of_any_mode_come_back(tmp_path, inference):
    """A host may load its model under inference mode, and draw under it."""
    with torch.inference_mode(inference):
        model = tree(EVERYTHING)
    before = state_hash(model)
    for _ in range(2):
        with torch.inference_mode(not inference), torch.no_grad(), merging(tmp_path, model) as fusing:
            for tau in BACK_AND_FORTH:
                fusing.at(tau)
                layer(model, NAME)(some_input(layer(model, NAME)))
            assert fusing.merged == len(EVERYTHING)
            assert state_hash(model) != before
        assert state_hash(model) == before


def test_strides_are_kept(tmp_path):
    model = tree([CONV]).to(memory_format=torch.channels_last)
    strides = layer(model, CONV).weight.stride()
    with merging(tmp_path, model, names=(CONV,), method="subject") as fusing:
        fusing.at(0.5)
        assert layer(model, CONV).weight.stride() == strides != torch.empty(WIDTH, WIDTH, 3, 3).stride()


def test_an_update_that_depends_on_the_weight_is_made_of_the_original(tmp_path):
    """DoRA rescales the weight it finds: the second time, that mustn't be one with something merged into it."""
    model = tree(ATTENTION_LAYERS)
    files = []
    for stem, lora in zip("ab", pair(names=ATTENTION_LAYERS)):
        path = write(tmp_path / f"{stem}.safetensors", lora)
        magnitudes = {
            f"lora_unet_{name.replace('.', '_')}.dora_scale": torch.ones(WIDTH, 1) for name in ATTENTION_LAYERS
        }
        save_file(load_file(path) | magnitudes, path)
        files.append(LoraFile.load(path).on("unet", lambda name: original_weight(layer(model, name))))
    plan = FusionPlan.of(*files, FusionConfig(engine="merge"))
    assert {update.kind for update in plan.subject.updates.values()} == {"dora"}
    with FusionSession(model, plan) as fusing:
        fusing.at(0.0)
        first = state_hash(model)
        fusing.at(1.0)
        assert state_hash(model) != first
        fusing.at(0.0)
        assert state_hash(model) == first


def test_what_is_read_as_the_original_has_nothing_merged_into_it(tmp_path):
    model = tree([NAME])
    module = layer(model, NAME)
    before = module.weight.detach().clone()
    read, _ = original_weight(module)
    with merging(tmp_path, model, names=(NAME,)) as fusing:
        fusing.at(0.5)
        assert not torch.equal(module.weight, before)
        assert torch.equal(read(), before)


def shared(model):
    name = ATTENTION_LAYERS[1]
    layer(model, name).weight = layer(model, NAME).weight
    return {NAME, name}


def quantised(model):
    layer(model, NAME).weight = nn.Parameter(layer(model, NAME).weight.detach().to(torch.float8_e5m2), False)
    return {NAME}


def somebody_elses_kind(model):
    class Packed(nn.Parameter):
        pass

    layer(model, NAME).weight = Packed(layer(model, NAME).weight.detach())
    return {NAME}


def adapted(model):
    layer(model, NAME).base_layer = nn.Linear(WIDTH, WIDTH)
    return {NAME}


def brought_by_accelerate(model):
    layer(model, NAME)._hf_hook = object()
    return {NAME}


def streamed_by_diffusers(model):
    model._diffusers_hook = object()
    return set(EVERYTHING)


@pytest.mark.parametrize(
    "manage", [shared, quantised, somebody_elses_kind, adapted, brought_by_accelerate, streamed_by_diffusers]
)
def test_weights_that_somebody_else_manages_are_left_alone(tmp_path, caplog, manage):
    model = tree(EVERYTHING)
    left_alone = manage(model)
    weights = {name: layer(model, name).weight.data_ptr() for name in left_alone}
    with merging(tmp_path, model) as fusing:
        fusing.at(0.3)
        assert fusing.merged == len(EVERYTHING) - len(left_alone)
        assert branches(model) == len(left_alone)
        assert {name: layer(model, name).weight.data_ptr() for name in left_alone} == weights
    assert f"{len(left_alone)} of {len(EVERYTHING)} layers keep the branch engine" in caplog.text


def test_weights_that_are_elsewhere_are_left_alone(tmp_path):
    model = tree(EVERYTHING)
    with merging(tmp_path, model) as fusing:
        fusing.at(0.3, torch.device("meta"))
        assert fusing.merged == 0
        assert branches(model) == len(EVERYTHING)


def test_what_the_host_keeps_is_left_alone(tmp_path):
    model = tree(EVERYTHING)
    asked = []

    def may_merge(module):
        asked.append(module)
        return module is not layer(model, NAME)

    with merging(tmp_path, model, session_with={"may_merge": may_merge}) as fusing:
        assert asked == []  # weights settle when the model is about to be called
        for tau in BACK_AND_FORTH:
            fusing.at(tau)
        assert len(asked) == len(EVERYTHING)
        assert (fusing.merged, branches(model)) == (len(EVERYTHING) - 1, 1)


def test_a_change_of_bias_keeps_the_branch(tmp_path):
    plan = plan_of(tmp_path, *pair(names=(NAME, FEED_FORWARD)), engine="merge")
    with_bias = dataclasses.replace(plan.layers[0].subject, bias=torch.ones(WIDTH))
    plan = dataclasses.replace(plan, layers=(dataclasses.replace(plan.layers[0], subject=with_bias), plan.layers[1]))
    model = tree((NAME, FEED_FORWARD))
    with FusionSession(model, plan) as fusing:
        fusing.at(0.0)
        assert (fusing.merged, branches(model)) == (1, 1)


@pytest.mark.parametrize(
    ("engine", "originals", "merged"), [("auto", "never", 0), ("merge", "never", 4), ("auto", "cpu", 4)]
)
def test_where_originals_are_kept(tmp_path, engine, originals, merged):
    model = tree(ATTENTION_LAYERS[:4])
    fusing = merging(tmp_path, model, names=ATTENTION_LAYERS[:4], engine=engine, session_with={"originals": originals})
    with fusing:
        fusing.at(0.0)
        assert fusing.merged == merged


def test_without_room_for_both_the_branch_is_kept(tmp_path, monkeypatch):
    psutil = pytest.importorskip("psutil")
    model = tree(EVERYTHING)
    needed = sum(layer(model, name).weight.nbytes for name in EVERYTHING)
    memory = psutil.virtual_memory()
    for available, merged in ((2 * needed + 99, len(EVERYTHING)), (2 * needed - 99, 0)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=available: memory._replace(available=free))
        with merging(tmp_path, model, engine="auto") as fusing:
            fusing.at(0.3)
            assert fusing.merged == merged


@pytest.mark.parametrize("first", [0, 7])
def test_a_device_that_runs_full_goes_on_with_branches(tmp_path, monkeypatch, caplog, first):
    """At the first weight, or in the middle of the picture."""
    model, before = tree(EVERYTHING), state_hash(tree(EVERYTHING))
    x = some_input(layer(model, NAME))
    made, original = [], merge._sum

    def full(*args):
        made.append(args)
        if len(made) > first:
            raise (
                torch.OutOfMemoryError("out of memory")
                if hasattr(torch, "OutOfMemoryError")
                else RuntimeError("out of")
            )
        return original(*args)

    with merging(tmp_path, tree(EVERYTHING), engine="branch") as fusing:
        fusing.at(0.3)
        wanted = layer(fusing.model, NAME)(x)
    monkeypatch.setattr(merge, "_sum", full)
    with merging(tmp_path, model) as fusing:
        fusing.at(0.3)
        assert (fusing.merged, branches(model)) == (0, len(EVERYTHING))
        assert state_hash(model) == before
        torch.testing.assert_close(layer(model, NAME)(x), wanted)
    assert "no room" in caplog.text


def test_giving_up_the_weights_in_the_middle_of_a_picture(tmp_path):
    model = tree(EVERYTHING)
    before, x = state_hash(model), some_input(layer(model, NAME))
    with merging(tmp_path, model) as fusing, torch.no_grad():
        fusing.at(0.3)
        merged = layer(model, NAME)(x)
        fusing.unmerge()
        assert state_hash(model) == before
        torch.testing.assert_close(layer(model, NAME)(x), merged, rtol=1e-4, atol=1e-5)
        fusing.at(1.0)
        assert branches(model) == len(EVERYTHING)
    assert (state_hash(model), hooks(model)) == (before, 0)


def test_a_weight_that_the_host_exchanges_before_the_first_call_is_the_original(tmp_path):
    """Forge and its kin put their own LoRAs in when the model is loaded, after the session has been attached."""
    model = tree([NAME])
    module = layer(model, NAME)
    mine, theirs = pair(names=(NAME,))
    with FusionSession(model, plan_of(tmp_path, mine, theirs, engine="merge", method="subject")) as fusing:
        with torch.no_grad():
            module.weight = nn.Parameter(module.weight * 2, requires_grad=False)
        patched = module.weight.detach().clone()
        fusing.at(0.0)
        torch.testing.assert_close(module.weight.detach(), patched + mine[NAME].dense.float())
    assert torch.equal(module.weight, patched)


def test_what_a_host_writes_into_a_weight_stays(tmp_path):
    """As when another checkpoint is loaded into the same modules."""
    model = tree([NAME, PROJ_IN])
    other = {name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()}
    with merging(tmp_path, model, names=(NAME, PROJ_IN)) as fusing:
        fusing.at(0.0)
        model.load_state_dict(other)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other[name]), name


def test_a_model_that_is_moved_has_its_weights_where_it_is(tmp_path):
    model = tree([NAME])
    with merging(tmp_path, model, names=(NAME,)) as fusing:
        fusing.at(0.0)
        model.to(torch.bfloat16)
    assert torch.equal(layer(model, NAME).weight, tree([NAME], torch.bfloat16).get_submodule(NAME).weight)


def test_what_an_abandoned_session_has_merged_can_be_taken_out(tmp_path):
    model = tree(EVERYTHING)
    before = state_hash(model)
    fusing = merging(tmp_path, model)
    fusing.attach()
    fusing.at(0.3)
    assert remove_fusion(model) == len(EVERYTHING)
    assert state_hash(model) == before
    assert not fusing.attached
    fusing.detach()
    assert state_hash(model) == before


def test_a_later_session_finds_the_original_weights(tmp_path, caplog):
    model = tree(EVERYTHING)
    before = state_hash(model)
    first, second = merging(tmp_path, model), merging(tmp_path, model)
    first.attach()
    first.at(0.0)
    second.attach()
    assert "earlier fusion" in caplog.text
    assert state_hash(model) == before
    second.at(0.0)
    changed = state_hash(model)
    first.detach()
    assert state_hash(model) == changed
    second.detach()
    assert state_hash(model) == before


def test_an_interrupt_while_weights_are_exchanged_leaves_nothing(tmp_path, monkeypatch):
    model = tree(EVERYTHING)
    before, original, made = state_hash(model), merge._sum, []

    def interrupted(*args):
        made.append(args)
        if len(made) == 9:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(merge, "_sum", interrupted)
    with pytest.raises(KeyboardInterrupt), merging(tmp_path, model) as fusing:
        fusing.at(0.3)
    assert (state_hash(model), hooks(model)) == (before, 0)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_not_compiled_again(tmp_path, in_place):
    model = tree([NAME])
    inner, made = layer(model, NAME), []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    compiled = nn.Sequential(inner)
    if in_place:
        compiled.compile(backend=backend)
    else:
        compiled[0] = torch.compile(inner, backend=backend)
    x = some_input(inner)
    fusing = FusionSession(
        compiled, plan_of(tmp_path, *pair(names=(NAME,)), engine="merge", beta=0.5), modules={NAME: inner}
    )
    try:
        with torch.no_grad():
            seen = [compiled(x)]
            count = len(made)
            with fusing:
                for tau in (0.0, 1.0):
                    fusing.at(tau)
                    seen.append(compiled(x))
            seen.append(compiled(x))
        assert len(made) == count
        assert torch.equal(seen[0], seen[3])
        assert not any(torch.allclose(one, other, atol=1e-2) for one, other in zip(seen, seen[1:]))
    finally:
        torch.compiler.reset()
