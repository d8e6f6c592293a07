"""The fast product against F.linear, gradients included, and how it is chosen."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moreward.nn import linear
from moreward.nn.linear import CHOICES, FEW, MANY, FastLinear, product, settle, speed_up
from moreward.nn.measured import measurements_file

KINDS = ("forward", "dx", "dW")


@pytest.fixture(autouse=True)
def _own_choices(monkeypatch, tmp_path):
    monkeypatch.setattr(linear, "_choices", {})
    monkeypatch.setenv("MOREWARD_CACHE", str(tmp_path))


def choose(num_in, num_out, kinds):
    """Let oneDNN compute these kinds of products of a layer, whatever is faster here."""
    linear._choices = {(kind, rows, num_in, num_out): kind in kinds for kind in KINDS for rows in (FEW, MANY)}


@settings(max_examples=40)
@given(
    lead=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    num_in=st.integers(1, 70),
    num_out=st.integers(1, 70),
    kinds=st.sets(st.sampled_from(KINDS), min_size=1),
    bias=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 9),
)
def test_output_and_every_gradient_equal_the_plain_product(lead, num_in, num_out, kinds, bias, strided, seed):
    torch.manual_seed(seed)
    choose(num_in, num_out, kinds)
    layer = nn.Linear(num_in, num_out, bias=bias)
    slow = copy.deepcopy(layer)
    layer.__class__ = FastLinear
    x = torch.randn(*lead, num_in)
    x = torch.randn(num_in, *lead).movedim(0, -1) if strided else x
    x_fast, x_slow = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, wanted = layer(x_fast), F.linear(x_slow, slow.weight, slow.bias)
    dy = torch.randn_like(wanted)
    out.backward(dy)
    wanted.backward(dy)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x_fast.grad, x_slow.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad, slow.weight.grad, rtol=1e-5, atol=2e-5)
    if bias:
        torch.testing.assert_close(layer.bias.grad, slow.bias.grad, rtol=1e-5, atol=1e-5)


def test_bf16_autocast_and_empty_batches_take_the_plain_path():
    choose(8, 4, KINDS)
    weight = torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product(torch.randn(3, 8), weight, None).dtype == torch.bfloat16
    assert product(torch.randn(0, 8), weight, None).shape == (0, 4)
    assert product(torch.randn(3, 8).bfloat16(), weight.bfloat16(), None).dtype == torch.bfloat16


def test_speeding_up_keeps_names_tensors_and_subclasses():
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(3, 4))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    speed_up(model)
    assert type(model[0]) is FastLinear
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_plain_is_taken_when_asked(monkeypatch):
    monkeypatch.setenv("MOREWARD_LINEAR", "plain")
    model = nn.Sequential(nn.Linear(4, 4))
    speed_up(model)
    assert type(model[0]) is nn.Linear
    assert not measurements_file(CHOICES).exists()


def test_an_operator_that_disagrees_or_is_missing_is_not_taken(monkeypatch):
    monkeypatch.setattr(linear, "seconds", lambda work, flop: 1.0)
    monkeypatch.setattr(linear, "WORTH", 0.5)  # every product that is right wins
    assert linear._onednn_wins("forward", MANY, 8, 8)
    monkeypatch.setattr(linear, "onednn", lambda x, w, b: F.linear(x, w) * 1.01)
    assert not linear._onednn_wins("forward", MANY, 8, 8)

    def missing(x, w, b):
        raise AttributeError("no such operator")

    monkeypatch.setattr(linear, "onednn", missing)
    assert not linear._onednn_wins("dW", FEW, 8, 8)


def test_the_choice_is_measured_once_and_read_back_by_every_later_process(monkeypatch):
    measured = []
    monkeypatch.setattr(linear, "_onednn_wins", lambda *shape: measured.append(shape) or shape[0] == "dx")
    settle({(8, 4)})
    assert len(measured) == 2 * len(KINDS)
    first = dict(linear._choices)
    linear._choices = {}
    monkeypatch.setattr(linear, "_onednn_wins", lambda *shape: pytest.fail("measured again"))
    settle({(8, 4)})
    assert linear._choices == first
    assert first["dx", FEW, 8, 4]
    assert not first["forward", MANY, 8, 4]


def test_what_another_process_has_chosen_meanwhile_stands(monkeypatch):
    def other_process_is_first(*shape):
        measurements_file(CHOICES).parent.mkdir(parents=True, exist_ok=True)
        measurements_file(CHOICES).write_text(json.dumps([[k, r, 8, 4, True] for k in KINDS for r in (FEW, MANY)]))
        return False

    monkeypatch.setattr(linear, "_onednn_wins", other_process_is_first)
    settle({(8, 4)})
    assert all(linear._choices.values())


def test_a_damaged_file_of_choices_is_measured_again(monkeypatch):
    measurements_file(CHOICES).parent.mkdir(parents=True)
    measurements_file(CHOICES).write_text("[[")
    monkeypatch.setattr(linear, "_onednn_wins", lambda *shape: True)
    settle({(8, 4)})
    assert all(linear._choices.values())
