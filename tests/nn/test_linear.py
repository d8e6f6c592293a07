"""The fast product against F.linear, gradients included."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moreward.nn import linear
from moreward.nn.linear import FastLinear, speed_up, use_onednn

needs_onednn = pytest.mark.skipif(not use_onednn(), reason="this processor keeps F.linear")


def fast(num_in: int, num_out: int, *, bias: bool) -> FastLinear:
    layer = nn.Linear(num_in, num_out, bias=bias)
    layer.__class__ = FastLinear
    return layer  # type: ignore[return-value]


@needs_onednn
@settings(max_examples=40)
@given(
    lead=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    num_in=st.integers(1, 70),
    num_out=st.integers(1, 70),
    bias=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 9),
)
def test_output_and_every_gradient_equal_the_plain_product(lead, num_in, num_out, bias, strided, seed):
    torch.manual_seed(seed)
    layer = fast(num_in, num_out, bias=bias)
    x = torch.randn(*lead, num_in)
    x = torch.randn(num_in, *lead).movedim(0, -1) if strided else x
    x_fast, x_slow = x.clone().requires_grad_(), x.clone().requires_grad_()
    slow = copy.deepcopy(layer)
    out, wanted = layer(x_fast), F.linear(x_slow, slow.weight, slow.bias)
    dy = torch.randn_like(wanted)
    out.backward(dy)
    wanted.backward(dy)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x_fast.grad, x_slow.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad, slow.weight.grad, rtol=1e-5, atol=2e-5)
    if bias:
        torch.testing.assert_close(layer.bias.grad, slow.bias.grad, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_bf16_autocast_and_empty_batches_take_the_plain_path():
    layer = fast(8, 4, bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(3, 8)).dtype == torch.bfloat16
    assert layer(torch.randn(0, 8)).shape == (0, 4)


@needs_onednn
def test_speeding_up_keeps_names_tensors_and_subclasses():
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(3, 4))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    speed_up(model)
    assert type(model[0]) is FastLinear
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_plain_is_taken_when_asked_and_when_the_operator_disagrees(monkeypatch):
    monkeypatch.setenv("MOREWARD_LINEAR", "plain")
    assert not linear.use_onednn.__wrapped__()
    monkeypatch.delenv("MOREWARD_LINEAR")
    monkeypatch.setattr(linear, "_vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(linear, "_product", lambda x, w, b: F.linear(x, w) * 1.01)
    assert not linear.use_onednn.__wrapped__()


def test_a_processor_of_intel_keeps_the_plain_product(monkeypatch):
    monkeypatch.setattr(linear, "_vendor", lambda: "GenuineIntel")
    assert not linear.use_onednn.__wrapped__()
