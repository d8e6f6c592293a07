"""Losses against their formulas, and at the edges where formulas overflow."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moreward.errors import NonFiniteError
from moreward.nn.losses import DomainLoss, Outcome, PairwiseLoss, refuse_non_finite
from moreward.types import Batch, Rewards, Routing

REWARD = st.floats(-5, 5, width=32)


def outcome_of(loss: PairwiseLoss, chosen: list[float], rejected: list[float], **more: Any) -> tuple[Outcome, Tensor]:
    reward_N = torch.tensor([*chosen, *rejected], requires_grad=True)
    num = len(chosen)
    ids_NT = torch.ones(2 * num, 1, dtype=torch.long)
    batch = Batch(
        ids_NT=ids_NT,
        mask_NT=ids_NT,
        prompt_ids_PT=ids_NT[:1],
        prompt_mask_PT=ids_NT[:1],
        prompt_of_N=torch.zeros(2 * num, dtype=torch.long),
        domain_N=torch.arange(2 * num) % num,
        is_pairs=True,
        **more,
    )
    return loss(Rewards(reward_N=reward_N, aux_loss=torch.tensor(0.5)), batch), reward_N


@pytest.mark.parametrize("delta", [-200.0, 200.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_are_finite_however_far_apart_the_rewards_are(delta: float, smoothing: float) -> None:
    outcome, reward_N = outcome_of(PairwiseLoss(label_smoothing=smoothing), [delta], [0.0])
    outcome.loss_B.sum().backward()
    assert torch.isfinite(outcome.loss_B).all()
    assert reward_N.grad is not None
    expected = -(1 - smoothing) if delta < 0 else smoothing
    assert float(reward_N.grad[0]) == pytest.approx(expected, abs=1e-6)
    if not smoothing:
        assert float(outcome.loss_B.detach()) == pytest.approx(max(-delta, 0.0), abs=1e-6)


@given(
    pairs=st.lists(st.tuples(REWARD, REWARD, st.floats(0, 2, width=32)), min_size=1, max_size=5),
    smoothing=st.sampled_from([0.0, 0.1, 0.4]),
    centering=st.sampled_from([0.0, 0.01, 1.0]),
    with_margin=st.booleans(),
)
def test_the_pairwise_loss_is_its_formula(
    pairs: list[tuple[float, float, float]], smoothing: float, centering: float, with_margin: bool
) -> None:
    chosen, rejected, margins = (list(column) for column in zip(*pairs, strict=True))
    more = {"margin_B": torch.tensor(margins)} if with_margin else {}
    outcome, _ = outcome_of(PairwiseLoss(label_smoothing=smoothing, centering=centering), chosen, rejected, **more)
    for i, (c, j, margin) in enumerate(pairs):
        delta = c - j - (margin if with_margin else 0.0)
        p = 1 / (1 + math.exp(-delta))
        wanted = -(1 - smoothing) * math.log(p) - smoothing * math.log(1 - p) + centering * (c + j) ** 2
        assert float(outcome.loss_B[i].detach()) == pytest.approx(wanted, rel=1e-4, abs=1e-4)
        assert bool(outcome.right_B[i]) == (c > j), (
            "a margin asks for more in training, it does not change who is right"
        )
    assert outcome.domain_B.tolist() == list(range(len(pairs)))
    assert float(outcome.extra) == 0.5  # type: ignore[arg-type]


@given(
    pairs=st.lists(st.tuples(REWARD, REWARD, st.sampled_from([0.0, 0.25, 1.0])), min_size=1, max_size=5),
    centering=st.sampled_from([0.0, 0.5]),
)
def test_a_weight_multiplies_a_pairs_loss_and_gradient_and_no_other(
    pairs: list[tuple[float, float, float]], centering: float
) -> None:
    chosen, rejected, weights = (list(column) for column in zip(*pairs, strict=True))
    loss = PairwiseLoss(centering=centering)
    plain, plain_N = outcome_of(loss, chosen, rejected)
    ours, ours_N = outcome_of(loss, chosen, rejected, weight_B=torch.tensor(weights))
    plain.loss_B.sum().backward()
    ours.loss_B.sum().backward()
    assert plain_N.grad is not None
    assert ours_N.grad is not None
    weight_N = torch.tensor(weights * 2)
    torch.testing.assert_close(ours.loss_B, plain.loss_B * torch.tensor(weights))
    torch.testing.assert_close(ours_N.grad, plain_N.grad * weight_N)
    assert ours.right_B.tolist() == plain.right_B.tolist(), "a weight changes no measure"
    assert ours.tie_B.tolist() == plain.tie_B.tolist()


def test_a_weight_counts_for_the_router_too() -> None:
    batch = outcome_batch(("a", "b"))
    logits_NE = torch.tensor([[1.0, 0.0]], requires_grad=True)
    none_NK = torch.zeros(1, 0)
    batch = replace(
        batch,
        prompt_of_N=torch.zeros(4, dtype=torch.long),
        domain_N=torch.tensor([0, 1, 0, 1]),
        weight_B=torch.tensor([1.0, 0.25]),
    )
    outcome = DomainLoss()(Routing(experts_NK=none_NK, weights_NK=none_NK, logits_NE=logits_NE), batch)
    right = 1 / (1 + math.exp(-1.0))
    expected = [-math.log(right), -0.25 * math.log(1 - right)]
    assert outcome.loss_B.tolist() == pytest.approx(expected, rel=1e-5)
    outcome.loss_B.sum().backward()
    assert logits_NE.grad is not None
    assert logits_NE.grad[0].tolist() == pytest.approx([right - 1 + 0.25 * right, 1 - right - 0.25 * right], rel=1e-5)


def test_equal_rewards_are_wrong_and_counted_as_ties() -> None:
    outcome, _ = outcome_of(PairwiseLoss(), [1.0, 2.0, 0.0], [1.0, 1.0, 3.0])
    assert outcome.right_B.tolist() == [False, True, False]
    assert outcome.tie_B.tolist() == [True, False, False]
    assert float(outcome.loss_B[0].detach()) == pytest.approx(math.log(2))


def test_centering_pulls_the_sum_of_a_pair_to_zero_and_leaves_the_difference() -> None:
    outcome, reward_N = outcome_of(PairwiseLoss(centering=0.5), [3.0], [3.0])
    plain, plain_N = outcome_of(PairwiseLoss(), [3.0], [3.0])
    outcome.loss_B.sum().backward()
    plain.loss_B.sum().backward()
    assert reward_N.grad is not None
    assert plain_N.grad is not None
    assert (reward_N.grad - plain_N.grad).tolist() == pytest.approx([6.0, 6.0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_refused_naming_the_row(value: float) -> None:
    names = ("row-a", "row-b", "row-c")
    outcome, _ = outcome_of(PairwiseLoss(), [0.0, -value, 1.0], [1.0, 0.0, 0.0], names=names)
    batch = outcome_batch(names)
    with pytest.raises(NonFiniteError, match=r"expert/x, step 3: .*Rows: row-b$"):
        refuse_non_finite(outcome, batch, "expert/x, step 3")


def test_a_balance_loss_that_is_no_number_is_refused_with_all_the_rows() -> None:
    names = tuple(f"row-{i}" for i in range(12))
    finite = torch.zeros(12)
    outcome = Outcome(
        loss_B=finite, right_B=finite > 0, tie_B=finite > 0, domain_B=finite.long(), extra=torch.tensor(math.nan)
    )
    with pytest.raises(NonFiniteError, match=r"Rows: row-0, .*row-9 and 2 more$"):
        refuse_non_finite(outcome, outcome_batch(names), "reward, step 0")


def test_a_finite_loss_passes() -> None:
    outcome, _ = outcome_of(PairwiseLoss(), [1.0], [0.0])
    refuse_non_finite(outcome, outcome_batch(("row-a",)), "reward, step 0")


def outcome_batch(names: tuple[str, ...]) -> Batch:
    ids_NT = torch.ones(2 * len(names), 1, dtype=torch.long)
    index_N = torch.zeros(2 * len(names), dtype=torch.long)
    return Batch(
        ids_NT=ids_NT,
        mask_NT=ids_NT,
        prompt_ids_PT=ids_NT[:1],
        prompt_mask_PT=ids_NT[:1],
        prompt_of_N=index_N,
        domain_N=index_N,
        is_pairs=True,
        names=names,
    )
