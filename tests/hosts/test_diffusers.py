"""`fuse` on real pipelines: what is drawn, when, and that nothing is left behind."""

from __future__ import annotations

import hashlib

import diffusers
import numpy as np
import pytest
import torch

from est_lora import clock
from est_lora.errors import EstLoraError
from est_lora.hosts.diffusers import fuse
from tests.files import write
from tests.models import projections
from tests.pipelines import SIZE, fitting_lora, stable_diffusion, stable_diffusion_xl

SCHEDULERS = {
    "Euler": ("EulerDiscreteScheduler", {}),
    "DDIM": ("DDIMScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "KDPM2": ("KDPM2DiscreteScheduler", {}),
    "PNDM": ("PNDMScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "LCM": ("LCMScheduler", {}),
}


@pytest.fixture(scope="module")
def sd():
    return stable_diffusion()


@pytest.fixture(scope="module")
def xl():
    return stable_diffusion_xl()


@pytest.fixture(params=["sd", "xl"])
def pipe(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def files(pipe, tmp_path):
    return pair_for(pipe, tmp_path)


def pair_for(pipe, folder, only=".attn"):
    loras = fitting_lora(pipe.unet, 1, only=only), fitting_lora(pipe.unet, 2, rank=6, alpha=None, only=only)
    return [write(folder / f"{role}.safetensors", lora) for role, lora in zip(("subject", "style"), loras)]


def picture(pipe, steps=4, seed=0, **more):
    generator = torch.Generator().manual_seed(seed)
    size = {} if "image" in more else {"height": SIZE, "width": SIZE}
    return pipe("a red star", num_inference_steps=steps, generator=generator, output_type="np", **size, **more).images[
        0
    ]


def scheduled(pipe, name):
    kind, options = SCHEDULERS[name]
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config, **options)
    return pipe


def state_hash(pipe):
    digest = hashlib.sha256()
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hooks(pipe):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules())


class Recorded:
    """The timestep of every UNet call, and the progress that the session was told for it."""

    def __init__(self, pipe, session):
        self.calls = []
        self._handle = pipe.unet.register_forward_pre_hook(
            lambda module, args, kwargs: self.calls.append((float(args[1]), session.tau)), with_kwargs=True
        )

    def __enter__(self):
        return self.calls

    def __exit__(self, *_):
        self._handle.remove()


@pytest.mark.parametrize("method", ["subject", "style", "sum"])
def test_one_file_alone_and_both_equal_diffusers_own_loading(pipe, files, method):
    plain = picture(pipe)
    with fuse(pipe, *files, method=method):
        ours = picture(pipe)
    names = {"subject": ["subject"], "style": ["style"], "sum": ["subject", "style"]}[method]
    try:
        for name, path in zip(("subject", "style"), files):
            if name in names:
                pipe.load_lora_weights(path, adapter_name=name)
        pipe.set_adapters(names)
        theirs = picture(pipe)
    finally:
        pipe.unload_lora_weights()
    assert np.abs(theirs - plain).max() > 0.02, "the LoRAs of this test do nothing"
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_est_equals_weights_merged_by_hand_at_every_call(pipe, files):
    """The reference picture swaps whole weights before each UNet call, by the plan's own `tau` and dense updates."""
    with fuse(pipe, *files) as session:
        ours = picture(pipe, steps=6)
        plan = session.plan
    modules = projections(pipe.unet)
    originals = {name: module.weight.detach().clone() for name, module in modules.items()}

    def merge(module, args, kwargs):
        tau = clock.from_timestep(float(args[1]))
        for layer in plan.layers:
            update = {"subject": layer.subject, "style": layer.style}[layer.acts(tau)]
            name = layer.layer.name
            modules[name].weight.data = (originals[name].double() + update.dense()).float()

    handle = pipe.unet.register_forward_pre_hook(merge, with_kwargs=True)
    try:
        theirs = picture(pipe, steps=6)
    finally:
        handle.remove()
        for name, weight in originals.items():
            modules[name].weight.data = weight
    assert {layer.acts(t) for layer in plan.layers for t in (0.0, 1.0)} == {"subject", "style"}
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_progress_is_that_of_the_timestep_the_unet_got(sd, tmp_path, scheduler):
    files = pair_for(sd, tmp_path)
    scheduled(sd, scheduler)
    with fuse(sd, *files) as session, Recorded(sd, session) as calls:
        picture(sd, steps=5)
    assert len(calls) >= 5
    for t, tau in calls:
        assert tau == pytest.approx(min(max(1 - t / 999, 0), 1), abs=1e-12)
    assert calls[0][1] < 0.25
    assert calls[-1][1] > 0.7


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_step_clock_counts_steps_with_any_scheduler(sd, tmp_path, scheduler):
    files = pair_for(sd, tmp_path)
    scheduled(sd, scheduler)
    steps = 5
    with fuse(sd, *files, clock="step") as session, Recorded(sd, session) as calls:
        picture(sd, steps=steps)
    taus = sorted({tau for _, tau in calls})
    whole = [tau * steps for tau in taus]
    assert taus[0] == 0.0
    assert taus[-1] <= 1.0
    if scheduler in {"KDPM2", "PNDM"}:  # these call the model between steps, or once more at the end
        assert len(taus) > steps
    else:
        assert whole == pytest.approx(list(range(steps)), abs=1e-9)


@pytest.mark.parametrize("scheduler", ["Euler", "DDIM", "DPM++ 2M", "Heun"])
@pytest.mark.parametrize("steps", [10, 28, 50])
def test_a_seed_gives_one_picture_whether_it_comes_first_or_tenth(sd, tmp_path, scheduler, steps):
    files = pair_for(sd, tmp_path)
    scheduled(sd, scheduler)
    with fuse(sd, *files):
        first = picture(sd, steps, seed=9)
    with fuse(sd, *files):
        for seed in range(9):
            picture(sd, 1 + seed % 3, seed=seed)
        tenth = picture(sd, steps, seed=9)
    assert np.array_equal(first, tenth)


@pytest.mark.parametrize("build", [stable_diffusion, stable_diffusion_xl])
@pytest.mark.parametrize("ticks", ["timestep", "step"])
def test_img2img_at_half_strength_starts_late(tmp_path, build, ticks):
    pipe = build(image_to_image=True)
    files = pair_for(pipe, tmp_path)
    start = [np.random.default_rng(0).random((SIZE, SIZE, 3), dtype=np.float32)]
    with fuse(pipe, *files, clock=ticks) as session, Recorded(pipe, session) as calls:
        first = picture(pipe, 10, image=start, strength=0.5)
        second = picture(pipe, 10, image=start, strength=0.5)
    assert len(calls) == 10
    taus = [tau for _, tau in calls[:5]]
    assert taus[0] == pytest.approx(0.5, abs=0.11)  # schedulers space 10 steps differently
    assert taus == sorted(taus)
    assert np.array_equal(first, second)


def test_a_batch_is_its_pictures_one_by_one(sd, tmp_path):
    files = pair_for(sd, tmp_path)
    scheduled(sd, "DDIM")
    with fuse(sd, *files):
        alone = [picture(sd, seed=seed) for seed in (3, 4)]
        together = sd(
            ["a red star"] * 2,
            num_inference_steps=4,
            generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
            output_type="np",
            height=SIZE,
            width=SIZE,
        ).images
    np.testing.assert_allclose(together, alone, atol=1e-4)


def stopping(error, at_call):
    count = [0]

    def stop(module, args):
        count[0] += 1
        if count[0] == at_call:
            raise error

    return stop


@pytest.mark.parametrize("error", [RuntimeError("in sampling"), KeyboardInterrupt()])
def test_nothing_is_left_after_an_exception_or_ctrl_c_in_sampling(pipe, files, error):
    before, plain = (state_hash(pipe), hooks(pipe)), picture(pipe)
    handle = pipe.unet.register_forward_pre_hook(stopping(error, at_call=3))
    try:
        with pytest.raises(type(error)), fuse(pipe, *files):
            picture(pipe)
    finally:
        handle.remove()
    assert (state_hash(pipe), hooks(pipe)) == before
    assert np.array_equal(picture(pipe), plain)


def test_nothing_is_left_after_a_normal_end(pipe, files):
    before, plain = (state_hash(pipe), hooks(pipe)), picture(pipe)
    with fuse(pipe, *files):
        assert not np.array_equal(picture(pipe), plain)
    assert (state_hash(pipe), hooks(pipe)) == before
    assert np.array_equal(picture(pipe), plain)


def test_a_users_own_adapter_goes_on_beside_the_fusion_and_after_it(sd, tmp_path):
    files = pair_for(sd, tmp_path)
    third = write(tmp_path / "third.safetensors", fitting_lora(sd.unet, 3))
    try:
        sd.load_lora_weights(third, adapter_name="third")
        with_third = picture(sd)
        with fuse(sd, *files, method="sum"):
            ours = picture(sd)
        assert np.array_equal(picture(sd), with_third)
        for name, path in zip(("subject", "style"), files):
            sd.load_lora_weights(path, adapter_name=name)
        sd.set_adapters(["third", "subject", "style"])
        theirs = picture(sd)
    finally:
        sd.unload_lora_weights()
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_convolutions_and_feed_forwards_of_a_file_take_part(sd, tmp_path):
    files = pair_for(sd, tmp_path, only="")
    with fuse(sd, *files, method="subject") as session:
        ours = picture(sd)
        assert len(session.plan.layers) == len(projections(sd.unet))
    try:
        sd.load_lora_weights(files[0], adapter_name="subject")
        theirs = picture(sd)
    finally:
        sd.unload_lora_weights()
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


@pytest.mark.parametrize("wrap", [lambda unet: unet, lambda unet: torch.compile(unet, backend="eager")])
def test_original_names_follow_the_models_own_layout(tmp_path, wrap):
    """With one residual block a level, `input_blocks.3.1` is another layer than in SD1.5."""
    pipe = stable_diffusion()
    from tests.models import SD15, narrow

    pipe.unet = narrow(SD15, layers_per_block=1)
    files = []
    for seed in (1, 2):
        lora = fitting_lora(pipe.unet, seed, only="down_blocks.1.attentions.0.transformer_blocks.0.attn")
        tensors = {}
        for name, factors in lora.items():
            leaf = name.partition("transformer_blocks.0.")[2].replace(".", "_")
            stem = f"lora_unet_input_blocks_3_1_transformer_blocks_0_{leaf}"
            tensors |= {f"{stem}.lora_down.weight": factors.down, f"{stem}.lora_up.weight": factors.up}
        files.append(tmp_path / f"{seed}.safetensors")
        from safetensors.torch import save_file

        save_file(tensors, files[-1])
    pipe.unet = wrap(pipe.unet)
    with fuse(pipe, *files) as session:
        assert len(session.plan.layers) == 8
        assert session.missing == ()


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"betta": 1}, "no knob 'betta': did you mean beta"),
        ({"beta": 3}, "beta can't be '3'"),
        ({"beta": float("nan")}, "beta can't be 'nan'"),
        ({"alpha": 0}, "alpha can't be '0'"),
        ({"method": "average"}, "method can't be 'average': it is one of est, k-lora"),
        ({"subject": "missing.safetensors"}, "no file 'missing.safetensors'"),
        ({"style": None}, "no style was given"),
        ({"style": 7}, "style can't be '7'"),
    ],
)
def test_a_mistake_raises_one_sentence_before_anything_is_attached(sd, tmp_path, knobs, sentence):
    subject, style = pair_for(sd, tmp_path)
    with pytest.raises(EstLoraError, match=sentence), fuse(sd, **{"subject": subject, "style": style, **knobs}):
        pytest.fail("the block was entered")
    assert hooks(sd) == 0


def test_files_for_another_model_are_refused_and_nothing_is_attached(sd, xl, tmp_path):
    files = pair_for(xl, tmp_path)
    with pytest.raises(EstLoraError, match="doesn't fit this model"), fuse(sd, *files):
        pass
    assert hooks(sd) == 0


def test_a_pipeline_without_a_unet_is_refused(tmp_path, sd):
    with pytest.raises(EstLoraError, match="has no UNet"), fuse(object(), *pair_for(sd, tmp_path)):
        pass


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.EDMEulerScheduler(),
        diffusers.IPNDMScheduler(),
        diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_scheduler_whose_progress_is_unknown_is_named(sd, tmp_path, scheduler):
    known, name = sd.scheduler, type(scheduler).__name__
    try:
        sd.scheduler = scheduler
        with pytest.raises(EstLoraError, match=name), fuse(sd, *pair_for(sd, tmp_path)):
            pytest.fail("the block was entered")
        sd.scheduler = known
        with pytest.raises(EstLoraError, match=name), fuse(sd, *pair_for(sd, tmp_path)):
            sd.scheduler = scheduler
            picture(sd)
    finally:
        sd.scheduler = known
    assert hooks(sd) == 0


def test_projections_that_were_fused_away_are_named(tmp_path):
    pipe = stable_diffusion()
    files = pair_for(pipe, tmp_path)
    with fuse(pipe, *files):
        wanted = picture(pipe)
    pipe.fuse_qkv_projections()
    with pytest.raises(EstLoraError, match=r"attn1 are fused into one.*unfuse_qkv_projections"), fuse(pipe, *files):
        pytest.fail("the block was entered")
    assert hooks(pipe) == 0
    pipe.unfuse_qkv_projections()
    with fuse(pipe, *files):
        np.testing.assert_allclose(picture(pipe), wanted, atol=1e-4)


def test_a_unet_wrapped_by_peft_is_fused_like_any_other(tmp_path):
    peft = pytest.importorskip("peft")
    pipe = stable_diffusion()
    files = pair_for(pipe, tmp_path)
    with fuse(pipe, *files) as session:
        layers = len(session.plan.layers)
    pipe.unet = peft.get_peft_model(pipe.unet, peft.LoraConfig(r=2, target_modules=["to_q"]))
    with fuse(pipe, *files) as session:
        assert (len(session.plan.layers), session.missing) == (layers, ())


def test_of_two_nested_fusions_the_inner_one_counts(sd, tmp_path, caplog):
    files = pair_for(sd, tmp_path)
    scheduled(sd, "DDIM")
    with fuse(sd, *files, method="style"):
        alone = picture(sd)
    with fuse(sd, *files, method="subject"), fuse(sd, *files, method="style"):
        nested = picture(sd)
    assert np.array_equal(nested, alone)
    assert "earlier fusion" in caplog.text
    assert hooks(sd) == 0


@pytest.mark.parametrize(
    ("kind", "options", "t", "tau"),
    [
        ("DDIMScheduler", {}, 999, 0.0),
        ("DDIMScheduler", {"num_train_timesteps": 501}, 250, 0.5),
        ("DPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}, 0, 1.0),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}, 250, 0.75),
        ("FlowMatchEulerDiscreteScheduler", {}, 250, 0.75),
    ],
)
def test_progress_of_discrete_and_of_flow_models(sd, tmp_path, kind, options, t, tau):
    scheduler, sd.scheduler = sd.scheduler, getattr(diffusers, kind)(**options)
    try:
        with fuse(sd, *pair_for(sd, tmp_path)) as session, torch.no_grad():
            sd.unet(torch.zeros(1, 4, 8, 8), torch.tensor(t), encoder_hidden_states=torch.zeros(1, 3, 32))
            assert session.tau == pytest.approx(tau, abs=1e-12)
    finally:
        sd.scheduler = scheduler


@pytest.mark.parametrize(("in_place", "steps"), [(False, 1), (True, 2)])  # it compiles anew for each step
def test_a_model_that_was_compiled_and_run_before_is_fused_all_the_same(tmp_path, in_place, steps):
    pipe = stable_diffusion()
    files = pair_for(pipe, tmp_path)
    plain = picture(pipe, steps)
    with fuse(pipe, *files):
        wanted = picture(pipe, steps)
    if in_place:
        pipe.unet.compile(backend="eager")
    else:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    try:
        assert np.abs(picture(pipe, steps) - plain).max() < 1e-4
        with fuse(pipe, *files):
            np.testing.assert_allclose(picture(pipe, steps), wanted, atol=1e-4)
        np.testing.assert_allclose(picture(pipe, steps), plain, atol=1e-4)
    finally:
        torch.compiler.reset()
