"""Several experts' rewards to one. N conversations, K experts used."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

How = Literal["mean", "median", "worst", "uncertainty", "deviation"]


def weighted_sum(reward_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """Σ_k weight · reward, over *standardised* rewards: raw ones of experts trained apart have no common unit."""
    return (reward_NK * weights_NK.to(reward_NK.dtype)).sum(-1)


def aggregate(reward_NK: Tensor, how: How, caution: float) -> Tensor:
    """One reward of K members', which must be standardised (arXiv 2310.02743, section 3; median and deviation are
    ours). `caution` is λ, for `uncertainty` and `deviation`; 0 gives the mean."""
    if how == "median":
        return median(reward_NK)
    if how == "worst":
        return reward_NK.amin(-1)
    mean_N = reward_NK.mean(-1)
    if how == "mean" or caution == 0:
        return mean_N
    spread_N = variance(reward_NK) if how == "uncertainty" else variance(reward_NK).sqrt()
    return mean_N - caution * spread_N


def median(reward_NK: Tensor) -> Tensor:
    """The middle member, or the mean of the two in the middle; torch's own takes the lower of them."""
    sorted_NK, num = reward_NK.sort(-1).values, reward_NK.shape[-1]
    return (sorted_NK[..., (num - 1) // 2] + sorted_NK[..., num // 2]) / 2


def variance(reward_NK: Tensor) -> Tensor:
    """Population variance over the members: (1/K) Σ (r - mean)². The only definition here."""
    return reward_NK.var(-1, correction=0)
