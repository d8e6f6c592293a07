"""Take one attribute (verbosity, length) out of others: how much of it to subtract from each.

N responses of a reference set, K objectives.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STEPS = 30
"""Bisections: the amount is exact to limit / 2^30."""


@dataclass(frozen=True)
class Debiased:
    """`amount` of the attribute to subtract, and the rank correlation with it before and after. `reached` is false
    where even the limit leaves more than the threshold."""

    amount: float
    before: float
    after: float
    reached: bool


def spearman(x_N: np.ndarray, y_N: np.ndarray) -> float:
    """Rank correlation, ties at their mean rank; 0 where one of the two is constant."""
    from scipy.stats import rankdata

    ranks = [rankdata(v) - (len(v) + 1) / 2 for v in (x_N, y_N)]
    size = float(np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float(ranks[0] @ ranks[1]) / size if size else 0.0


def amount_to_subtract(reward_N: np.ndarray, attribute_N: np.ndarray, *, threshold: float, limit: float) -> Debiased:
    """The least λ in 0..limit with spearman(reward - λ · attribute, attribute) ≤ threshold (arXiv 2406.12845, 2.2).

    One-sided like the authors' release: a negative correlation is left as it is. The correlation never rises with λ,
    since each pair of responses whose order changes comes to stand against the attribute; so bisection finds the least.
    """

    def correlation(amount: float) -> float:
        return spearman(reward_N - amount * attribute_N, attribute_N)

    before = correlation(0.0)
    if before <= threshold:
        return Debiased(0.0, before, before, reached=True)
    at_limit = correlation(limit)
    if at_limit > threshold:
        return Debiased(limit, before, at_limit, reached=False)
    low, high = 0.0, limit
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if correlation(middle) <= threshold else (middle, high)
    return Debiased(high, before, correlation(high), reached=True)
