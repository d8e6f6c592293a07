"""The fusion of several experts, and what each of them gave."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moreward.nn.fusion import Fusion


def fusion_of(num_blocks: int, size: int, seed: int) -> Fusion:
    torch.manual_seed(seed)
    fusion = Fusion(num_blocks, size, 7)
    fusion(torch.randn(20, num_blocks, size) + 0.5)
    return fusion.eval()


def along_the_line(fusion: Fusion, blocks_KD: torch.Tensor, steps: int = 20_000) -> torch.Tensor:
    """Integrated gradients by the midpoint rule."""
    share = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    way_KD = blocks_KD.double() - fusion.mean_KD
    points = (fusion.mean_KD + share.view(-1, 1, 1) * way_KD).requires_grad_()
    exact = copy.deepcopy(fusion).double()
    hidden = exact.activation(exact.first(points.flatten(1)))
    (gradient,) = torch.autograd.grad(exact.last(hidden).sum(), points)
    return (gradient.mean(0) * way_KD).sum(-1)


@pytest.mark.parametrize(("num_blocks", "size"), [(3, 4), (4, 1), (1, 5)])
def test_parts_are_the_integrated_gradients_of_a_brute_force_sum(num_blocks: int, size: int) -> None:
    fusion = fusion_of(num_blocks, size, seed=3)
    blocks = torch.randn(5, num_blocks, size) * 2
    slow = torch.stack([along_the_line(fusion, one) for one in blocks])
    torch.testing.assert_close(fusion.parts(blocks), slow, rtol=1e-3, atol=1e-4)


@given(seed=st.integers(0, 1000), num_blocks=st.integers(1, 5), size=st.integers(1, 6), scale=st.floats(0.01, 100))
def test_parts_sum_to_the_reward_less_that_of_the_mean_blocks(seed, num_blocks, size, scale) -> None:
    fusion = fusion_of(num_blocks, size, seed)
    blocks = torch.randn(6, num_blocks, size) * scale
    mean = fusion.mean_KD.float().unsqueeze(0)
    expected = fusion(blocks) - fusion(mean)
    torch.testing.assert_close(fusion.parts(blocks).sum(1).float(), expected, rtol=1e-4, atol=1e-4 * scale)


def test_a_block_that_does_not_differ_from_the_mean_gives_nothing() -> None:
    fusion = fusion_of(3, 4, seed=0)
    blocks = torch.randn(2, 3, 4)
    blocks[:, 1] = fusion.mean_KD[1].float()
    parts = fusion.parts(blocks)
    assert float(parts[:, 1].abs().max()) < 1e-6
    assert float(fusion.parts(fusion.mean_KD.unsqueeze(0)).abs().max()) == 0.0


def test_the_mean_block_is_that_of_all_rows_seen_in_training_and_of_no_others() -> None:
    fusion, rows = Fusion(2, 3, 4), torch.randn(30, 2, 3)
    for chunk in rows.split(7):
        fusion(chunk)
    fusion.eval()(torch.randn(5, 2, 3))
    torch.testing.assert_close(fusion.mean_KD, rows.double().mean(0))


def test_over_rewards_it_starts_as_their_mean_and_over_states_it_has_the_size_of_the_formula() -> None:
    rewards = torch.randn(8, 4, 1) * 3
    torch.testing.assert_close(Fusion(4, 1, 4, starts_as_mean=True)(rewards), rewards.mean((1, 2)))
    with torch.device("meta"):
        assert sum(p.numel() for p in Fusion(6, 2048, 2048).parameters()) == 25_169_922
