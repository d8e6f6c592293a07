"""Several experts' rewards to one. N conversations, K experts used."""

from __future__ import annotations

from torch import Tensor


def weighted_sum(reward_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """Σ_k weight · reward, over *standardised* rewards: raw ones of experts trained apart have no common unit."""
    return (reward_NK * weights_NK.to(reward_NK.dtype)).sum(-1)
