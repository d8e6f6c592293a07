"""Routers against slow transcriptions of their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from moreward.errors import ConfigError
from moreward.nn.balance import importance_and_load, squared_variation
from moreward.nn.combine import weighted_sum
from moreward.nn.losses import DomainLoss
from moreward.nn.routers import NoisyTopKRouter, PromptRouter, TopKRouter, choose
from moreward.types import Batch, Routing

SIZE, NUM_EXPERTS = 6, 5


def filled(top_k: int, *, seed: int = 0, size: float = 0.7) -> NoisyTopKRouter:
    router = NoisyTopKRouter(SIZE, NUM_EXPERTS, top_k)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        router.gate.copy_(torch.randn(SIZE, NUM_EXPERTS, generator=generator) * size)
        router.noise.copy_(torch.randn(SIZE, NUM_EXPERTS, generator=generator) * size)
    return router


def hidden(num_rows: int, seed: int = 1) -> Tensor:
    return torch.randn(num_rows, SIZE, generator=torch.Generator().manual_seed(seed))


def slow_gates(logits_NE: Tensor, top_k: int) -> list[list[float]]:
    """Keep the k largest, softmax over those, zero elsewhere."""
    gates = []
    for logits in logits_NE.tolist():
        kept = sorted(range(len(logits)), key=lambda e: -logits[e])[:top_k]
        total = sum(math.exp(logits[e]) for e in kept)
        gates.append([math.exp(logits[e]) / total if e in kept else 0.0 for e in range(len(logits))])
    return gates


def dense(routing: Routing) -> Tensor:
    return torch.zeros_like(routing.logits_NE).scatter(-1, routing.experts_NK, routing.weights_NK)


@given(num_rows=st.integers(1, 6), top_k=st.integers(1, NUM_EXPERTS), seed=st.integers(0, 50))
def test_the_k_largest_are_kept_best_first_with_a_softmax_over_them(num_rows: int, top_k: int, seed: int) -> None:
    logits_NE = torch.randn(num_rows, NUM_EXPERTS, generator=torch.Generator().manual_seed(seed)) * 3
    routing = choose(logits_NE, top_k)
    torch.testing.assert_close(dense(routing), torch.tensor(slow_gates(logits_NE, top_k)))
    torch.testing.assert_close(routing.weights_NK.sum(1), torch.ones(num_rows))
    assert (routing.weights_NK.diff(dim=1) <= 0).all()
    assert (routing.weights_NK > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("top_k", range(1, NUM_EXPERTS + 1))
def test_noisy_gates_in_training_follow_the_formula(top_k: int) -> None:
    router, hidden_ND = filled(top_k).train(), hidden(7)
    torch.manual_seed(3)
    routing = router(hidden_ND)
    torch.manual_seed(3)
    noise_NE = torch.randn(7, NUM_EXPERTS)
    logits = [
        [
            sum(float(h) * float(router.gate[d, e]) for d, h in enumerate(row))
            + float(noise_NE[n, e])
            * (math.log1p(math.exp(sum(float(h) * float(router.noise[d, e]) for d, h in enumerate(row)))) + 0.01)
            for e in range(NUM_EXPERTS)
        ]
        for n, row in enumerate(hidden_ND)
    ]
    torch.testing.assert_close(routing.logits_NE, torch.tensor(logits), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dense(routing), torch.tensor(slow_gates(torch.tensor(logits), top_k)))


@torch.no_grad()
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_load_is_the_chance_to_stay_among_the_k_largest(top_k: int) -> None:
    """By drawing one expert's noise anew, many times, with the others' noise kept."""
    router, hidden_ND = filled(top_k), hidden(4)
    generator = torch.Generator().manual_seed(2)
    clean_NE = hidden_ND @ router.gate
    sd_NE = nn.functional.softplus(hidden_ND @ router.noise) + 0.01
    noisy_NE = clean_NE + sd_NE * torch.randn(4, NUM_EXPERTS, generator=generator)
    load_NE = router.load(clean_NE, noisy_NE, sd_NE)
    num_draws = 20_000
    for n in range(4):
        for e in range(NUM_EXPERTS):
            drawn = noisy_NE[n].repeat(num_draws, 1)
            drawn[:, e] = clean_NE[n, e] + sd_NE[n, e] * torch.randn(num_draws, generator=generator)
            share = (drawn.topk(top_k, dim=1).indices == e).any(1).double().mean()
            assert float(load_NE[n, e]) == pytest.approx(float(share), abs=0.015)


def test_with_all_experts_used_nothing_can_drop_out() -> None:
    router = filled(NUM_EXPERTS).train()
    routing = router(hidden(6))
    ones_NE = torch.ones(6, NUM_EXPERTS)
    assert torch.equal(router.load(ones_NE, ones_NE, ones_NE), ones_NE)
    assert float(squared_variation(router.load(ones_NE, ones_NE, ones_NE).sum(0))) == 0.0
    torch.testing.assert_close(dense(routing).sum(1), torch.ones(6))
    routing.aux_loss.backward()  # type: ignore[union-attr]
    assert torch.isfinite(router.gate.grad).all()  # type: ignore[arg-type]


def test_all_experts_start_equal() -> None:
    router = NoisyTopKRouter(SIZE, NUM_EXPERTS, 2)
    assert not router.gate.any()
    assert not router.noise.any()
    weights_NK = router.eval()(hidden(3)).weights_NK
    torch.testing.assert_close(weights_NK, torch.full((3, 2), 0.5))


def test_noise_is_there_in_training_only() -> None:
    router, hidden_ND = filled(2), hidden(8)
    router.eval()
    torch.testing.assert_close(router(hidden_ND).logits_NE, hidden_ND @ router.gate)
    assert torch.equal(router(hidden_ND).logits_NE, router(hidden_ND).logits_NE)
    router.train()
    assert not torch.equal(router(hidden_ND).logits_NE, router(hidden_ND).logits_NE)


@pytest.mark.parametrize("router", [filled(2), TopKRouter(SIZE, NUM_EXPERTS, 2)], ids=["noisy", "plain"])
def test_a_rows_gate_does_not_depend_on_its_batch_mates(router: nn.Module) -> None:
    hidden_ND = hidden(9)
    router.eval()
    alone = torch.cat([router(row.unsqueeze(0)).logits_NE for row in hidden_ND])
    torch.testing.assert_close(router(hidden_ND).logits_NE, alone)


def test_the_balance_loss_is_the_squared_variation_of_importance_and_of_load() -> None:
    assert float(squared_variation(torch.full((4,), 2.5))) == 0.0
    values = [1.0, 2.0, 6.0]
    variance = sum((v - 3.0) ** 2 for v in values) / 3
    assert float(squared_variation(torch.tensor(values))) == pytest.approx(variance / 9.0)
    gates_NE = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 5.0]])
    found = importance_and_load(gates_NE, torch.tensor([2.0, 2.0, 2.0]))
    assert float(found) == pytest.approx(variance / 9.0)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_balance_loss_teaches_a_lopsided_router_to_use_all_experts(top_k: int) -> None:
    """The rows are all positive, so that the gate's columns decide how much an expert is liked."""
    router, hidden_ND = NoisyTopKRouter(SIZE, NUM_EXPERTS, top_k), hidden(64).abs()
    with torch.no_grad():
        router.gate[:, 0] = 0.5
    torch.manual_seed(0)
    shares = []
    optimizer = torch.optim.SGD(router.parameters(), lr=0.05)
    for _ in range(60):
        routing = router(hidden_ND)
        shares.append(dense(routing).sum(0).detach() / 64)
        routing.aux_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    first, last = torch.stack(shares[:5]).mean(0), torch.stack(shares[-5:]).mean(0)
    assert first[0] > 0.4
    assert (last - 1 / NUM_EXPERTS).abs().max() < 0.5 * (first - 1 / NUM_EXPERTS).abs().max()


def test_the_largest_logit_wins_and_a_perfect_router_has_no_loss() -> None:
    """A softmax before the cross-entropy could not get below 0.9048 for five domains."""
    domain_N = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4])
    prompt_of_N = torch.tensor([0, 1, 2, 3, 4] * 2)
    batch = batch_of_prompts(torch.ones(5, 2, dtype=torch.long), prompt_of_N, domain_N)
    logits_PE = torch.eye(5) * 20
    outcome = DomainLoss()(choose(logits_PE, 1), batch)
    assert float(outcome.loss_B.mean()) < 1e-3
    assert outcome.right_B.all()
    wrong = DomainLoss()(choose(-logits_PE, 1), batch)
    assert not wrong.right_B.any()
    assert float(wrong.loss_B.mean()) > 10


def test_pairs_without_a_domain_weigh_nothing_in_the_routers_loss() -> None:
    batch = batch_of_prompts(
        torch.ones(2, 2, dtype=torch.long), torch.tensor([0, 1, 0, 1]), torch.tensor([-1, 1, -1, 1])
    )
    logits_PE = torch.zeros(2, 3, requires_grad=True)
    outcome = DomainLoss()(choose(logits_PE, 1), batch)
    outcome.loss_B.sum().backward()
    assert outcome.loss_B.tolist() == pytest.approx([0.0, math.log(3)])
    assert logits_PE.grad is not None
    assert not logits_PE.grad[0].any()
    assert not outcome.right_B[0]


def batch_of_prompts(prompt_ids_PT: Tensor, prompt_of_N: Tensor, domain_N: Tensor) -> Batch:
    num = len(prompt_of_N)
    return Batch(
        ids_NT=torch.ones(num, 3, dtype=torch.long),
        mask_NT=torch.ones(num, 3, dtype=torch.long),
        prompt_ids_PT=prompt_ids_PT,
        prompt_mask_PT=torch.ones_like(prompt_ids_PT),
        prompt_of_N=prompt_of_N,
        domain_N=domain_N,
        is_pairs=True,
    )


class _Echo(nn.Module):
    """A backbone whose vector is the tokens themselves, and that says which adapters it was asked for."""

    def forward(self, ids_NT: Tensor, mask_NT: Tensor, adapter_N: Tensor | None) -> Tensor:
        self.adapter_N = adapter_N
        return (ids_NT * mask_NT).float()


def test_a_prompt_router_gives_one_row_a_prompt_under_its_own_adapter() -> None:
    batch = batch_of_prompts(torch.tensor([[5, 1], [2, 9], [3, 3]]), torch.tensor([0, 1, 2, 0]), torch.zeros(4))
    echo = _Echo()
    gate = TopKRouter(2, 2)
    with torch.no_grad():
        gate.gate.weight.copy_(torch.eye(2))
    routing = PromptRouter(echo, gate, adapter=7)(batch)  # type: ignore[arg-type]
    assert routing.experts_NK[:2].tolist() == [[0], [1]]
    assert routing.logits_NE.tolist() == [[5, 1], [2, 9], [3, 3]]
    assert echo.adapter_N.tolist() == [7, 7, 7]  # type: ignore[union-attr]
    PromptRouter(echo, gate)(batch)  # type: ignore[arg-type]
    assert echo.adapter_N is None


@pytest.mark.parametrize("router", [TopKRouter, NoisyTopKRouter])
@pytest.mark.parametrize("top_k", [0, 4])
def test_more_experts_than_there_are_cannot_be_used(router: type[nn.Module], top_k: int) -> None:
    with pytest.raises(ConfigError, match=rf"top_k: must be from 1 to the number of experts, 3 \(got {top_k}\)"):
        router(4, 3, top_k)


def test_several_rewards_are_added_by_weight() -> None:
    reward_NK, weights_NK = torch.tensor([[1.0, -2.0], [3.0, 5.0]]), torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    assert weighted_sum(reward_NK, weights_NK).tolist() == [-1.25, 3.0]
