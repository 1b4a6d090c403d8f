"""The branch engine: layers that are called with one tensor share their first product, and nothing is read back."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from est_lora.fusion import FusionSession, branch
from tests.files import CONTEXT, WIDTH
from tests.fusion.test_session import layer, pair, plan_of, tree

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
SELF = tuple(f"{BLOCK}.attn1.to_{leaf}" for leaf in "qkv")
CROSS = tuple(f"{BLOCK}.attn2.to_{leaf}" for leaf in "kv")


@pytest.fixture
def products(monkeypatch):
    """How wide the products are that hooks make of an input."""
    made, original = [], branch.functional.linear

    def linear(x, weight, bias=None):
        if bias is None:  # a layer's own has one here
            made.append(len(weight))
        return original(x, weight, bias)

    monkeypatch.setattr(branch.functional, "linear", linear)
    return made


def fusing(tmp_path, model, names, **knobs):
    return FusionSession(model, plan_of(tmp_path, *pair(names=names), **{"engine": "branch", **knobs}))


def merged(tmp_path, names, inputs, tau):
    """What the layers return with the updates in their weights."""
    model = tree(names)
    with fusing(tmp_path, model, names, engine="merge") as session, torch.no_grad():
        session.at(tau)
        return [layer(model, name)(x) for name, x in zip(names, inputs)]


@pytest.mark.parametrize(("names", "inputs"), [(SELF, WIDTH), (CROSS, CONTEXT)])
def test_one_product_is_made_for_all_that_share_an_input(tmp_path, products, names, inputs):
    model, x = tree(names), torch.randn(2, 5, inputs)
    with fusing(tmp_path, model, names) as session, torch.no_grad():
        for tau in (0.0, 0.3, 0.6, 1.0):
            session.at(tau)
            wanted = merged(tmp_path, names, [x] * len(names), tau)
            products.clear()
            returned = [layer(model, name)(x) for name in names]
            assert len(products) == 1
            for got, expected in zip(returned, wanted):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_called_with_another_tensor_makes_its_own(tmp_path, products):
    """As hypernetworks do: k and v get another context than q."""
    model, x, y = tree(SELF), torch.randn(2, 5, WIDTH), torch.randn(2, 5, WIDTH)
    wanted = merged(tmp_path, SELF, (x, y, y), 0.5)
    with fusing(tmp_path, model, SELF) as session, torch.no_grad():
        session.at(0.5)
        for _ in range(3):
            products.clear()
            for name, given, expected in zip(SELF, (x, y, y), wanted):
                torch.testing.assert_close(layer(model, name)(given), expected, rtol=1e-4, atol=1e-5)
        assert len(products) == 3
        assert max(products) <= 6  # a product for all was made the first time, for nothing: now everybody makes his own


def test_inputs_are_not_kept(tmp_path):
    model, x = tree(SELF), torch.randn(2, 5, WIDTH)
    with fusing(tmp_path, model, SELF) as session, torch.no_grad():
        session.at(0.5)
        for name in SELF:
            layer(model, name)(x)
        gone = weakref.ref(x)
        del x
        gc.collect()
        assert gone() is None


@pytest.mark.parametrize("method", ["est", "sum"])
def test_what_several_terms_add_is_added_for_each(tmp_path, products, method):
    """Only where one term acts in each layer is there one product to share."""
    model, x = tree(SELF), torch.randn(2, 5, WIDTH)
    with fusing(tmp_path, model, SELF, method=method) as session, torch.no_grad():
        session.at(0.0)
        products.clear()
        for name in SELF:
            layer(model, name)(x)
        assert len(products) == (1 if method == "est" else 6)


class Reads(TorchDispatchMode):
    """Counts what makes a program wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("engine", ["branch", "merge"])
def test_no_layer_waits_for_the_device(tmp_path, engine):
    model, x = tree(SELF), torch.randn(2, 5, WIDTH)
    with fusing(tmp_path, model, SELF, engine=engine) as session, torch.no_grad(), Reads() as reads:
        for tau in (0.0, 0.5, 1.0):
            session.at(tau)
            for name in SELF:
                layer(model, name)(x)
        assert reads.count == 0
        float(x[0, 0, 0])
        assert reads.count == 1
