"""Do two domains pull a shared reward in opposite directions?

B pairs, K numbers, M domains, R random divisions.

The direction of a domain is the first step that a probe on it takes from nothing, with the curvature of all pairs:
(S + r)⁻¹ times the mean difference of its pairs, S the second moment of all differences. Two directions agree by the
cosine of the margins that they give to all pairs. (Gradients at the *pooled* solution will not do: weighted by
domain size they sum to nothing there, so of two domains they are opposite whatever the data.)

How small a cosine noise alone makes is found by giving the domains' labels to prompt groups by chance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moreward.evals.accuracy import Floats, Ints
from moreward.evals.compare import SIGNIFICANT_BELOW, holm

RIDGE = 1e-2
"""Of the mean eigenvalue of S."""
NUM_DRAWS = 999


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """Two domains: the cosine of their directions, its middle and 5 % quantile where labels mean nothing, and how
    often it is as small there. `word`: `conflict` where it is smaller than chance makes it and negative, `differ`
    where it is smaller and positive, else `none shown`; after Holm's correction over all pairs of domains."""

    domains: tuple[str, str]
    cosine: float
    null_median: float
    null_low: float
    p_value: float
    p_holm: float
    word: str


def cosines(x_BK: Floats, domain_B: Ints, num_domains: int) -> Floats:
    """(M, M)."""
    return _cosines(x_BK, np.eye(num_domains)[domain_B], *_curvature(x_BK))


def conflicts(
    x_BK: Floats, domain_B: Ints, group_B: Ints, names: tuple[str, ...], *, seed: int, num_draws: int = NUM_DRAWS
) -> list[Conflict]:
    """All pairs of domains, in the order of `names`."""
    x_BK = x_BK.astype(np.float64)
    curvature = _curvature(x_BK)
    seen_MM = _cosines(x_BK, np.eye(len(names))[domain_B], *curvature)
    generator = np.random.default_rng([seed, 2])
    null_RMM = np.stack(
        [
            _cosines(x_BK, np.eye(len(names))[shuffled(domain_B, group_B, generator)], *curvature)
            for _ in range(num_draws)
        ]
    )
    which = [(a, b) for a in range(len(names)) for b in range(a + 1, len(names))]
    p_values = [float((1 + (null_RMM[:, a, b] <= seen_MM[a, b]).sum()) / (1 + num_draws)) for a, b in which]
    found = []
    for (a, b), p_value, p_holm in zip(which, p_values, holm(p_values), strict=True):
        word = "none shown" if p_holm >= SIGNIFICANT_BELOW else "conflict" if seen_MM[a, b] < 0 else "differ"
        found.append(
            Conflict(
                domains=(names[a], names[b]),
                cosine=float(seen_MM[a, b]),
                null_median=float(np.median(null_RMM[:, a, b])),
                null_low=float(np.quantile(null_RMM[:, a, b], 0.05)),
                p_value=p_value,
                p_holm=p_holm,
                word=word,
            )
        )
    return found


def shuffled(domain_B: Ints, group_B: Ints, generator: np.random.Generator) -> Ints:
    """The domains' labels given to other prompt groups by chance. A group that stands in several domains counts as
    one of that of its first pair."""
    _, first_G, place_B = np.unique(group_B, return_index=True, return_inverse=True)
    return domain_B[first_G][generator.permutation(len(first_G))][place_B]


def _curvature(x_BK: Floats) -> tuple[Floats, Floats]:
    """S and (S + r)⁻¹."""
    moment_KK = x_BK.T @ x_BK / len(x_BK)
    ridge = RIDGE * float(np.trace(moment_KK)) / len(moment_KK)
    inverse_KK: Floats = np.linalg.inv(moment_KK + ridge * np.eye(len(moment_KK))).astype(np.float64)
    return moment_KK, inverse_KK


def _cosines(x_BK: Floats, member_BM: Floats, moment_KK: Floats, inverse_KK: Floats) -> Floats:
    mean_MK = member_BM.T @ x_BK / np.maximum(member_BM.sum(0), 1)[:, None]
    direction_MK = mean_MK @ inverse_KK
    product_MM = direction_MK @ moment_KK @ direction_MK.T
    length_M = np.sqrt(np.maximum(np.diag(product_MM), 1e-30))
    cosine_MM: Floats = product_MM / np.outer(length_M, length_M)
    return cosine_MM
