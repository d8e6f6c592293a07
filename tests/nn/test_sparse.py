"""Sparse experts as one step of autograd against one expert after another, gradients included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moreward.nn import linear, sparse
from moreward.nn.experts import FeedForwardExperts
from moreward.nn.linear import FEW, MANY
from moreward.nn.sparse import mix, mix_plain


@pytest.fixture(autouse=True)
def _own_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_choices", {})


def choose(size: int, width: int, kinds: set[str]) -> None:
    """Let oneDNN compute these kinds of products, whatever is faster here."""
    sizes = ((size, width), (width, size))
    linear._choices.update({(k, rows, *s): k in kinds for k in linear._MAPS for rows in (FEW, MANY) for s in sizes})


def routed(num_rows: int, size: int, num_experts: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    kept = torch.randn(num_rows, num_experts).topk(top_k)
    weights_NK = kept.values.softmax(-1).requires_grad_()
    return torch.randn(num_rows, size, requires_grad=True), kept.indices, weights_NK


def results(function, experts: nn.ModuleList, hidden_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor):
    """The mixture and every gradient, by name; None where there is none."""
    tensors = {"hidden": hidden_ND, "weights": weights_NK, **dict(experts.named_parameters())}
    mixed_ND = function(experts, hidden_ND, experts_NK, weights_NK)
    dmixed_ND = torch.randn(mixed_ND.shape, generator=torch.Generator().manual_seed(1), dtype=mixed_ND.dtype)
    grads = torch.autograd.grad(mixed_ND, list(tensors.values()), dmixed_ND, allow_unused=True)
    return {"mixed": mixed_ND.detach(), **dict(zip(tensors, grads, strict=True))}


def assert_alike(found, wanted) -> None:
    for name, expected in wanted.items():
        assert (found[name] is None) == (expected is None), name
        if expected is not None:
            assert found[name].shape == expected.shape, name
            assert (found[name] - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-7, name


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_rows=st.integers(1, 40), num_experts=st.integers(1, 6), seed=st.integers(0, 99))
def test_output_and_every_gradient_equal_one_expert_after_another(data, num_rows, num_experts, seed):
    size, width = data.draw(st.integers(1, 33)), data.draw(st.integers(1, 65))
    top_k = data.draw(st.integers(1, num_experts))
    torch.manual_seed(seed)
    experts = FeedForwardExperts(num_experts, size, width).experts
    choose(size, width, data.draw(st.sets(st.sampled_from(list(linear._MAPS)))))
    inputs = routed(num_rows, size, num_experts, top_k)
    assert_alike(results(mix, experts, *inputs), results(mix_plain, experts, *inputs))
    with torch.no_grad():
        assert_alike({"mixed": mix(experts, *inputs)}, {"mixed": mix_plain(experts, *inputs)})


def test_gradients_are_those_of_differences():
    torch.manual_seed(0)
    experts = FeedForwardExperts(3, 4, 5).double().experts
    hidden_ND, experts_NK, weights_NK = routed(6, 4, 3, 2)
    tensors = [hidden_ND.detach().double(), weights_NK.detach().double(), *experts.parameters()]
    tensors = [t.detach().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda h, w, *p: sparse._Mix.apply(experts_NK, h, w, *p), tensors)


def test_an_expert_without_rows_has_no_gradient_and_the_optimizer_leaves_it_alone():
    torch.manual_seed(0)
    for function in (mix, mix_plain):
        experts = FeedForwardExperts(3, 4, 6).experts
        before = [p.clone() for p in experts[1].parameters()]
        optimizer = torch.optim.AdamW(experts.parameters(), lr=0.1, weight_decay=0.1)
        function(experts, torch.randn(4, 4), torch.tensor([[0], [2], [2], [0]]), torch.ones(4, 1)).sum().backward()
        optimizer.step()
        assert all(p.grad is None for p in experts[1].parameters())
        assert all(torch.equal(*pair) for pair in zip(before, experts[1].parameters(), strict=True))
        assert all(p.grad is not None for e in (0, 2) for p in experts[e].parameters())


def test_gradients_of_several_batches_add_up():
    torch.manual_seed(0)
    experts = FeedForwardExperts(3, 4, 6).experts
    batches = [routed(5, 4, 3, 2) for _ in range(2)]
    for batch in batches:
        mix(experts, *batch).square().sum().backward()
    found = [p.grad.clone() for p in experts.parameters()]
    experts.zero_grad()
    sum(mix_plain(experts, *batch).square().sum() for batch in batches).backward()
    torch.testing.assert_close(found, [p.grad for p in experts.parameters()])


def test_frozen_experts_pass_the_gradient_on_to_their_rows():
    torch.manual_seed(0)
    experts = FeedForwardExperts(3, 4, 6).requires_grad_(False).experts
    hidden_ND, experts_NK, weights_NK = routed(5, 4, 3, 2)
    losses = [f(experts, hidden_ND, experts_NK, weights_NK).square().sum() for f in (mix, mix_plain)]
    grads = [torch.autograd.grad(loss, (hidden_ND, weights_NK)) for loss in losses]
    torch.testing.assert_close(*grads)


def test_the_same_batch_gives_the_same_bits_twice():
    torch.manual_seed(0)
    experts = FeedForwardExperts(5, 24, 48).experts
    inputs = routed(200, 24, 5, 3)
    once, again = results(mix, experts, *inputs), results(mix, experts, *inputs)
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("case", ["autocast", "bfloat16", "mixed types", "empty"])
def test_what_the_fast_path_does_not_do_goes_the_plain_way(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the fast path was taken")

    monkeypatch.setattr(sparse, "_forward", refuse)
    experts = FeedForwardExperts(3, 4, 6)
    hidden_ND, experts_NK, weights_NK = routed(5, 4, 3, 2)
    with pytest.raises(AssertionError, match="fast path"):
        experts(hidden_ND, experts_NK, weights_NK)
    if case == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            experts(hidden_ND, experts_NK, weights_NK).sum().backward()
    elif case == "bfloat16":
        experts.bfloat16()(hidden_ND.bfloat16(), experts_NK, weights_NK.bfloat16()).sum().backward()
    elif case == "mixed types":
        experts.double()(hidden_ND.double(), experts_NK, weights_NK).sum().backward()
    else:
        assert experts(hidden_ND[:0], experts_NK[:0], weights_NK[:0]).shape == (0, 4)


def test_a_second_gradient_is_refused():
    experts = FeedForwardExperts(2, 4, 6)
    hidden_ND, experts_NK, weights_NK = routed(3, 4, 2, 1)
    mixed_ND = experts(hidden_ND, experts_NK, weights_NK)
    (dhidden_ND,) = torch.autograd.grad(mixed_ND.square().sum(), hidden_ND, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dhidden_ND.sum().backward()
