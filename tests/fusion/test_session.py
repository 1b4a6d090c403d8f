"""The session on small torch models: both engines against weights merged by hand, and a model left as it was."""

from __future__ import annotations

import copy
import gc
import hashlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from est_lora.config import FusionConfig
from est_lora.errors import EstLoraError
from est_lora.fusion import FusionSession
from est_lora.gate import FusionPlan
from est_lora.lora import LoraFile
from tests.files import ATTENTION_LAYERS, CONTEXT, CONV, FEED_FORWARD, WIDTH, Lora, random_lora, write

PROJ_IN = "mid_block.attentions.0.proj_in"
EVERYTHING = (*ATTENTION_LAYERS, FEED_FORWARD, CONV, PROJ_IN)
TAUS = (0.0, 0.21, 0.5, 0.83, 1.0)


def tree(names, dtype=torch.float32) -> nn.Module:
    """Modules that sit in a tree by their dotted names, as in a UNet."""
    torch.manual_seed(0)
    root = nn.Module()
    for name in names:
        *path, leaf = name.split(".")
        parent = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        inputs = CONTEXT if name.endswith(("attn2.to_k", "attn2.to_v")) else WIDTH
        if "conv" in name:
            layer = nn.Conv2d(inputs, WIDTH, 3, stride=2, padding=1)
        elif name == PROJ_IN:
            layer = nn.Conv2d(inputs, WIDTH, 1)
        else:
            layer = nn.Linear(inputs, WIDTH * (8 if "ff.net.0" in name else 1))
        parent.add_module(leaf, layer)
    return root.to(dtype)


def layer(model, name):
    return model.get_submodule(name)


def some_input(module, dtype=torch.float32):
    torch.manual_seed(7)
    if isinstance(module, nn.Conv2d):
        return torch.randn(2, module.in_channels, 9, 9).to(dtype)
    return torch.randn(2, 5, module.in_features).to(dtype)


def state_hash(model):
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def pair(seed=0, names=EVERYTHING) -> tuple[Lora, Lora]:
    # At 0.1 an update is about as large as the layer's own output, so a wrong choice can't hide in the tolerance.
    return random_lora(seed, names, rank=4, alpha=2.0, size=0.1), random_lora(seed + 1, names, rank=6, size=0.1)


def plan_of(tmp_path, subject, style, **knobs):
    files = (write(tmp_path / f"{n}.safetensors", lora) for n, lora in zip("ab", (subject, style)))
    return FusionPlan.of(*(LoraFile.load(file) for file in files), FusionConfig(**knobs))


def expected_output(module, x, updates):
    """What the layer, as it was made, would return with `updates` merged into its weight, in float64."""
    merged = nn.utils.skip_init(type(module), **_shape(module)).double()
    weight = module.weight.double()
    for update, strength in updates:
        weight = weight + strength * update.reshape(weight.shape)
    merged.load_state_dict({"weight": weight, "bias": module.bias.double()})
    return merged(x.double())


def _shape(module):
    if isinstance(module, nn.Linear):
        return {"in_features": module.in_features, "out_features": module.out_features}
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding")
    return {name: getattr(module, name) for name in names}


@pytest.mark.parametrize("engine", ["branch", "merge"])
@pytest.mark.parametrize("method", ["est", "k-lora", "sum", "subject", "style"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_it_equals_weights_merged_by_hand(tmp_path, method, dtype, tolerance, engine):
    if dtype == torch.float16 and torch.__version__ < "2.3":
        pytest.skip("this torch has no half precision on the CPU")
    subject, style = pair()
    plan = plan_of(tmp_path, subject, style, method=method, engine=engine, subject_weight=0.8, style_weight=-1.3)
    model = tree(EVERYTHING, dtype)
    untouched = copy.deepcopy(model)
    acted = set()
    with FusionSession(model, plan) as session, torch.no_grad():
        for tau in TAUS:
            session.at(tau)
            for decided in plan.layers:
                name, acts = decided.layer.name, decided.acts(tau)
                acted.add(acts)
                module = layer(model, name)
                updates = []
                if acts in ("subject", "both"):
                    updates.append((subject[name].dense, 0.8))
                if acts in ("style", "both"):
                    updates.append((style[name].dense, -1.3))
                x = some_input(module, dtype)
                wanted = expected_output(layer(untouched, name), x, updates)
                got = module(x)
                assert got.dtype == dtype
                error = (got.double() - wanted).norm() / wanted.norm()
                assert error < tolerance, (name, tau, acts)
    assert (
        acted
        == {
            "est": {"subject", "style", "both"},
            "k-lora": {"subject", "style", "both"},
            "sum": {"both"},
            "subject": {"subject"},
            "style": {"style"},
        }[method]
    )


def test_nothing_acts_before_the_first_progress_is_told(tmp_path):
    model = tree(EVERYTHING)
    module = layer(model, ATTENTION_LAYERS[0])
    x = some_input(module)
    plain = module(x)
    with FusionSession(model, plan_of(tmp_path, *pair())) as session:
        assert torch.equal(module(x), plain)
        session.at(0.0)
        assert not torch.equal(module(x), plain)
    assert torch.equal(module(x), plain)


def test_the_base_weights_type_does_not_matter(tmp_path):
    """A weight that can't be multiplied (fp8 storage) leaves the update alone: only the input's type counts."""

    class Stored(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)

        def forward(self, x):
            return nn.functional.linear(x, self.weight.to(x.dtype))

    name = ATTENTION_LAYERS[0]
    model = tree([name])
    parent = model.get_submodule(name.rpartition(".")[0])
    parent.to_q = Stored(parent.to_q)
    subject, style = pair(names=(name,))
    with FusionSession(model, plan_of(tmp_path, subject, style, method="subject")) as session:
        session.at(0.5)
        x = some_input(parent.to_q)
        wanted = nn.functional.linear(x, parent.to_q.weight.float() + subject[name].dense.float())
        torch.testing.assert_close(parent.to_q(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gguf", "nf4"])
def test_a_linear_layer_that_does_not_say_its_sizes(tmp_path, kind):
    """As Forge's own of quantised checkpoints, whose stored weight has another shape than the matrix."""

    class Packed(nn.Parameter):
        @property
        def shape(self):
            return torch.Size([WIDTH, WIDTH]) if kind == "gguf" else super().shape

    class Linear(nn.Module):
        def __init__(self, matrix):
            super().__init__()
            self.matrix = matrix
            self.weight = Packed(torch.zeros(WIDTH * WIDTH // 2, 1, dtype=torch.uint8), requires_grad=False)
            self.weight.quant_state = SimpleNamespace(shape=matrix.shape) if kind == "nf4" else None

        def forward(self, x):
            return nn.functional.linear(x, self.matrix)

    name = ATTENTION_LAYERS[0]
    model = tree([name])
    parent = model.get_submodule(name.rpartition(".")[0])
    x, matrix = some_input(parent.to_q), parent.to_q.weight.detach()
    parent.to_q = Linear(matrix)
    subject, style = pair(names=(name,))
    with FusionSession(model, plan_of(tmp_path, subject, style, method="subject")) as session:
        session.at(0.5)
        wanted = nn.functional.linear(x, matrix + subject[name].dense.float())
        torch.testing.assert_close(parent.to_q(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_as_before_and_after(tmp_path, in_place):
    name = ATTENTION_LAYERS[0]
    model = tree([name])
    inner = model.get_submodule(name)
    x, plain = some_input(inner), inner(some_input(inner))
    compiled = nn.Sequential(inner)
    if in_place:
        compiled.compile(backend="eager")
    else:
        compiled[0] = torch.compile(inner, backend="eager")
    session = FusionSession(compiled, plan_of(tmp_path, *pair(names=(name,)), method="subject"), modules={name: inner})
    try:
        for _ in range(2):
            assert torch.equal(compiled(x), plain)
            with session:
                session.at(0.5)
                assert not torch.allclose(compiled(x), plain, atol=1e-2)
            assert torch.equal(compiled(x), plain)
    finally:
        torch.compiler.reset()


def test_changing_the_inputs_type_loses_no_precision(tmp_path):
    name = ATTENTION_LAYERS[0]
    model = tree([name])
    subject, style = pair(names=(name,))
    module = layer(model, name)
    x = some_input(module)
    plan = plan_of(tmp_path, subject, style, method="subject", engine="branch")
    with FusionSession(model, plan) as session, torch.no_grad():
        session.at(0.5)
        before = module(x)
        model.bfloat16()
        module(x.bfloat16())
        torch.manual_seed(0)
        model.float().load_state_dict(tree([name]).state_dict())
        assert torch.equal(module(x), before)


def test_tiling_patched_onto_a_convolution_is_followed(tmp_path):
    model = tree([CONV])
    subject, style = pair(names=(CONV,))
    module = layer(model, CONV)
    module.padding_mode = "circular"
    module._reversed_padding_repeated_twice = [1, 1, 1, 1]
    x = some_input(module)
    with FusionSession(model, plan_of(tmp_path, subject, style, method="subject")) as session, torch.no_grad():
        session.at(0.5)
        got = module(x)
    with torch.no_grad():
        module.weight += subject[CONV].dense.float()
        torch.testing.assert_close(got, module(x), rtol=1e-4, atol=1e-4)


def broken_by(error):
    def end(session):
        with session:
            session.at(0.3)
            raise error

    return end


def normal_end(session):
    with session:
        session.at(0.3)
        session.at(0.9)


def second_attach(session):
    session.attach()
    session.at(0.2)
    session.attach()
    session.at(0.7)
    session.detach()


def dead_session(session):
    session.attach()
    session.at(0.2)


ENDS = {
    "normal end": normal_end,
    "exception": broken_by(RuntimeError("in sampling")),
    "interrupt": broken_by(KeyboardInterrupt()),
    "second attach": second_attach,
    "dead session": dead_session,
}


@pytest.mark.parametrize("engine", ["branch", "merge"])
@pytest.mark.parametrize("end", ENDS)
def test_the_model_is_byte_for_byte_as_before(tmp_path, end, engine):
    model = tree(EVERYTHING)
    model.user_hook = layer(model, ATTENTION_LAYERS[0]).register_forward_hook(lambda *_: None)
    before = state_hash(model), hooks(model), sorted(name for name, _ in model.named_modules())
    session = FusionSession(model, plan_of(tmp_path, *pair(), engine=engine))
    try:
        ENDS[end](session)
    except (RuntimeError, KeyboardInterrupt):
        pass
    del session
    gc.collect()
    assert (state_hash(model), hooks(model), sorted(name for name, _ in model.named_modules())) == before


def test_a_later_session_takes_the_place_of_an_earlier_one(tmp_path, caplog):
    model = tree(EVERYTHING)
    plan = plan_of(tmp_path, *pair(), engine="branch")
    first, second = FusionSession(model, plan), FusionSession(model, plan)
    first.attach()
    count = hooks(model)
    second.attach()
    assert hooks(model) == count
    assert "earlier fusion" in caplog.text
    assert second.attached
    assert not first.attached
    with pytest.raises(EstLoraError, match="attach"):
        first.at(0.5)
    first.detach()
    assert hooks(model) == count
    second.detach()
    assert hooks(model) == 0


def test_an_interrupt_while_attaching_leaves_nothing(tmp_path, monkeypatch):
    model = tree(EVERYTHING)
    calls = []
    original = nn.Module.register_forward_hook

    def interrupted(module, *args, **kwargs):
        calls.append(module)
        original(module, *args, **kwargs)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return original(module, *args, **kwargs)

    session = FusionSession(model, plan_of(tmp_path, *pair(), engine="branch"))
    monkeypatch.setattr(nn.Module, "register_forward_hook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.attach()
    assert hooks(model) == 0
    assert not session.attached


@pytest.mark.parametrize("role", ["subject", "style"])
def test_a_wrong_shape_is_found_when_attaching(tmp_path, role):
    name = ATTENTION_LAYERS[0]
    model = tree(ATTENTION_LAYERS)
    model.get_submodule(name.rpartition(".")[0]).to_q = nn.Linear(32, 64)
    plan = plan_of(tmp_path, *pair(names=ATTENTION_LAYERS), method=role)
    session = FusionSession(model, plan)
    with pytest.raises(EstLoraError, match=f"{role} doesn't fit.*{name} is 24 x 24, the layer is 64 x 32"):
        session.attach()
    assert hooks(model) == 0


def test_a_model_without_any_of_the_layers_is_refused(tmp_path):
    session = FusionSession(tree(["conv_in"]), plan_of(tmp_path, *pair()))
    with pytest.raises(EstLoraError, match="None of the 27 layers"):
        session.attach()


def test_layers_that_the_model_lacks_are_named(tmp_path):
    with FusionSession(tree(ATTENTION_LAYERS), plan_of(tmp_path, *pair())) as session:
        assert set(session.missing) == {FEED_FORWARD, CONV, PROJ_IN}
        assert any("left out: 3" in remark for remark in session.remarks)


def test_factors_are_no_part_of_the_model(tmp_path):
    model = tree(EVERYTHING)
    names = set(model.state_dict())
    with FusionSession(model, plan_of(tmp_path, *pair())) as session:
        session.at(0.4)
        assert set(model.state_dict()) == names
        assert len(list(model.parameters())) == 2 * len(EVERYTHING)
