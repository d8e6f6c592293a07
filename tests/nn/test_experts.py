"""Banks of experts against one expert at a time, and what gives an expert its zero and unit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moreward.nn.backbone import Backbone
from moreward.nn.experts import (
    AdapterExperts,
    FeedForwardExperts,
    OneExpert,
    RewardHead,
    SeparateExperts,
    SoloExpert,
    Standardize,
)
from moreward.nn.lora import LoRABank
from moreward.nn.mixture import Routed
from moreward.nn.sparse import mix_plain
from moreward.types import Batch, Rewards, Routing

NAMES = ("a", "b", "c")
Bank = tuple[nn.Module, list[SoloExpert]]


def batch_of(num_rows: int, seed: int = 0) -> Batch:
    """Every conversation has a prompt of its own."""
    ids_NT = torch.randint(6, 90, (num_rows, 9), generator=torch.Generator().manual_seed(seed))
    mask_NT = torch.ones_like(ids_NT)
    return Batch(
        ids_NT=ids_NT,
        mask_NT=mask_NT,
        prompt_ids_PT=ids_NT[:, :4],
        prompt_mask_PT=mask_NT[:, :4],
        prompt_of_N=torch.arange(num_rows),
        domain_N=torch.zeros(num_rows, dtype=torch.long),
    )


@torch.no_grad()
def differing_heads(heads: Sequence[tuple[RewardHead, Standardize]]) -> None:
    for e, (head, standardize) in enumerate(heads):
        generator = torch.Generator().manual_seed(e)
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        standardize.fit(torch.tensor([1.0 + e, -2.0, 4.0 * e]))


@pytest.fixture(scope="module")
def adapters(tiny_backbone: Callable[[str], Path]) -> AdapterExperts:
    backbone = Backbone.load(str(tiny_backbone("bert")), pooling="mean")
    bank = LoRABank(backbone, rank=2, alpha=4.0)
    for name in NAMES:
        for B in bank.add(name).B.values():
            nn.init.normal_(B, std=0.2)
    experts = AdapterExperts(backbone, {name: RewardHead(32) for name in NAMES})
    differing_heads(list(experts.adapter_experts().values()))
    return experts.eval()


@pytest.fixture(scope="module")
def separate(tiny_backbone: Callable[[str], Path]) -> SeparateExperts:
    backbone = Backbone.load(str(tiny_backbone("bert")), pooling="mean")
    experts = {name: SoloExpert(copy.deepcopy(backbone), RewardHead(32, "mlp")) for name in NAMES}
    differing_heads([(e.head, e.standardize) for e in experts.values()])  # type: ignore[misc]
    return SeparateExperts(experts).eval()


@pytest.mark.parametrize("bank", ["adapters", "separate"])
def test_rows_of_several_experts_equal_each_expert_alone_gradients_included(
    bank: str, request: pytest.FixtureRequest
) -> None:
    experts = request.getfixturevalue(bank)
    batch, expert_N = batch_of(7), torch.tensor([2, 0, 0, 1, 2, 2, 0])
    weight_N = torch.arange(1.0, 8.0)
    together_N = experts(batch, expert_N)
    (together_N * weight_N).sum().backward()
    found = {k: p.grad.clone() for k, p in experts.named_parameters() if p.grad is not None}
    experts.zero_grad(set_to_none=True)
    alone_N = torch.cat(
        [OneExpert(experts, int(e))(batch.rows(torch.tensor([n]))).reward_N for n, e in enumerate(expert_N)]
    )
    (alone_N * weight_N).sum().backward()
    torch.testing.assert_close(together_N, alone_N, rtol=1e-5, atol=1e-5)
    assert len({round(r, 3) for r in alone_N.tolist()}) == 7
    for name, parameter in experts.named_parameters():
        if parameter.grad is not None:
            scale = max(1.0, float(parameter.grad.abs().max()))
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5 * scale, msg=name)
    experts.zero_grad(set_to_none=True)


@torch.no_grad()
def test_an_expert_switched_away_from_and_back_gives_the_same_bits(adapters: AdapterExperts) -> None:
    batch = batch_of(3)
    first, other, again = (adapters(batch, torch.full((3,), e)) for e in (0, 1, 0))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@settings(max_examples=15)
@given(num_rows=st.integers(1, 5), top_k=st.integers(1, 3), seed=st.integers(0, 20))
def test_feed_forward_experts_add_up_by_weight_negative_outputs_included(num_rows: int, top_k: int, seed: int) -> None:
    torch.manual_seed(seed)
    experts = FeedForwardExperts(3, 4, 6)
    hidden_ND = torch.randn(num_rows, 4)
    kept = torch.randn(num_rows, 3).topk(top_k)
    weights_NK = kept.values.softmax(-1)
    wanted = [
        sum(weights_NK[n, k] * experts.experts[int(kept.indices[n, k])](hidden_ND[n]) for k in range(top_k))
        for n in range(num_rows)
    ]
    torch.testing.assert_close(experts(hidden_ND, kept.indices, weights_NK), torch.stack(wanted))  # type: ignore[arg-type]


@torch.no_grad()
def test_identical_experts_give_the_experts_output_and_linear_ones_a_weighted_sum() -> None:
    experts = FeedForwardExperts(3, 4, 6)
    experts_NK, weights_NK = torch.tensor([[0, 2], [1, 0]]), torch.tensor([[0.7, 0.3], [0.9, 0.1]])
    hidden_ND = torch.randn(2, 4)
    for expert in experts.experts:
        expert.load_state_dict(experts.experts[0].state_dict())
    torch.testing.assert_close(experts(hidden_ND, experts_NK, weights_NK), experts.experts[0](hidden_ND))
    linear = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    found = mix_plain(linear, hidden_ND, experts_NK, weights_NK)
    for n in range(2):
        wanted = sum(w * linear[int(e)](hidden_ND[n]) for w, e in zip(weights_NK[n], experts_NK[n], strict=True))
        torch.testing.assert_close(found[n], wanted)
    assert (found < 0).any()


def test_rows_that_do_not_use_an_expert_do_not_pass_through_it() -> None:
    experts = FeedForwardExperts(3, 4, 6)
    with torch.no_grad():
        for parameter in experts.experts[1].parameters():
            parameter.fill_(torch.nan)
    hidden_ND = torch.randn(5, 4, requires_grad=True)
    mixed_ND = experts(hidden_ND, torch.tensor([[1], [0], [1], [2], [0]]), torch.ones(5, 1))
    mixed_ND.sum().backward()
    without = [False, True, False, True, True]
    assert hidden_ND.grad is not None
    for found_ND in (mixed_ND, hidden_ND.grad):
        assert found_ND.isfinite().all(-1).tolist() == without
    for e in (0, 2):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in experts.experts[e].parameters())


@given(
    rewards=st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=20),
    scale=st.floats(0.1, 100),
    shift=st.floats(-100, 100),
)
def test_a_zero_and_a_unit_undo_any_other_scale(rewards: list[float], scale: float, shift: float) -> None:
    reward_N = torch.tensor(rewards, dtype=torch.float64)
    if float(reward_N.std(correction=0)) < 1e-2:
        return
    one, other = Standardize(), Standardize()
    one.fit(reward_N)
    other.fit(scale * reward_N + shift)
    torch.testing.assert_close(one(reward_N), other(scale * reward_N + shift), rtol=1e-6, atol=1e-6)
    assert float(one(reward_N).mean()) == pytest.approx(0, abs=1e-6)
    assert float(one(reward_N).square().mean()) == pytest.approx(1, rel=1e-6)
    assert int(one.num) == len(rewards)


def test_an_expert_that_says_the_same_of_everything_keeps_its_unit() -> None:
    standardize = Standardize()
    standardize.fit(torch.full((5,), 3.0))
    assert standardize(torch.tensor([3.0, 4.0])).tolist() == [0.0, 1.0]
    standardize.reset()
    assert standardize(torch.tensor([3.0])).tolist() == [3.0]


def test_heads_stay_in_float32_under_autocast() -> None:
    head = RewardHead(8)
    hidden_ND = torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head.layers(hidden_ND).dtype == torch.bfloat16, "else there is nothing to keep out"
        reward_N = head(hidden_ND)
    assert reward_N.dtype == torch.float32
    assert torch.equal(reward_N, head(hidden_ND))


class _Fixed(nn.Module):
    """Routes every prompt to the same experts with the same weights."""

    def __init__(self, experts: list[int], weights: list[float]) -> None:
        super().__init__()
        self.experts, self.weights = torch.tensor(experts), torch.tensor(weights)

    def forward(self, batch: Batch) -> Routing:
        num = len(batch.prompt_ids_PT)
        return Routing(
            experts_NK=self.experts.expand(num, -1),
            weights_NK=self.weights.expand(num, -1),
            logits_NE=torch.zeros(num, 3),
        )


@torch.no_grad()
def test_a_mixture_weighs_the_standardised_rewards_of_the_experts_used(adapters: AdapterExperts) -> None:
    batch = batch_of(4)
    output: Rewards = Routed(_Fixed([2, 0], [0.75, 0.25]), adapters)(batch)
    alone: list[Tensor] = [adapters(batch, torch.full((4,), e)) for e in (2, 0)]
    torch.testing.assert_close(output.reward_N, 0.75 * alone[0] + 0.25 * alone[1])
    torch.testing.assert_close(output.expert_reward_NK, torch.stack(alone, dim=1))
