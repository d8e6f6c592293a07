"""Linear Bradley–Terry probes on differences of frozen vectors, and what they say of pairs that they never saw.

B pairs, D numbers of a backbone's vector, K of a probe's input, M domains, F folds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moreward.domains.material import Pairs
from moreward.evals.accuracy import Floats, Ints

NUM_DIRECTIONS = 256
NUM_FOLDS = 5
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)
"""Of ½ penalty |w|² beside the mean loss of a pair; inputs have a mean square length of 1."""
INNER_SHARE = 0.25
_MAX_STEPS = 200


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What probes read of B pairs, float32: `linear_BK`, and `wide_BK`, which has M times as many columns.

    The K directions are those in which the two responses of pairs differ most. They do not depend on which of the two
    was chosen, so all pairs may take part in finding them.
    """

    linear_BK: Floats
    wide_BK: Floats


def inputs(pairs: Pairs, *, seed: int, num_directions: int = NUM_DIRECTIONS) -> Inputs:
    """Differences along their main directions; beside them, in `wide_BK`, differences of random cosines.

    The cosines (Rahimi and Recht 2007) are of a response's whole vector, so a probe on them is no longer linear, and a
    probe on `wide_BK` has as many parameters as M linear ones.
    """
    difference_BD = pairs.chosen_BD - pairs.rejected_BD
    value_D, vector_DD = np.linalg.eigh(difference_BD.T @ difference_BD)
    num_kept = min(num_directions, int((value_D > value_D[-1] * 1e-9).sum()))
    linear_BK = _of_unit_length(difference_BD @ vector_DD[:, ::-1][:, :num_kept])
    num_cosines = num_kept * (pairs.num_domains - 1)
    cosine_BK = _of_unit_length(_cosine_differences(pairs, num_cosines, seed))
    wide_BK = np.concatenate([linear_BK, cosine_BK], 1) / np.sqrt(2)
    single: Any = np.float32
    return Inputs(linear_BK=linear_BK.astype(single), wide_BK=wide_BK.astype(single))


def _cosine_differences(pairs: Pairs, num_cosines: int, seed: int) -> Floats:
    """As wide as the typical distance of two responses to different prompts."""
    generator = np.random.default_rng([seed, 1])
    one_N, other_N = generator.integers(len(pairs), size=(2, 1000))
    width = float(np.median(np.linalg.norm(pairs.chosen_BD[one_N] - pairs.chosen_BD[other_N], axis=1))) or 1.0
    slope_DK = generator.normal(size=(pairs.chosen_BD.shape[1], num_cosines)) / width
    phase_K = generator.uniform(0, 2 * np.pi, size=num_cosines)
    difference_BK: Floats = np.cos(pairs.chosen_BD @ slope_DK + phase_K) - np.cos(
        pairs.rejected_BD @ slope_DK + phase_K
    )
    return difference_BK


def _of_unit_length(x_BK: Floats) -> Floats:
    scaled: Floats = x_BK / (np.sqrt(np.square(x_BK).sum(1).mean()) or 1.0)
    return scaled


def fit(x_BK: Floats, penalty: float, start_K: Floats | None = None, *, share_B: Floats | None = None) -> Floats:
    """`weight_K` of least mean log(1 + exp(-xw)) + ½ penalty |w|²: the Bradley–Terry loss, to its minimum.

    `share_B` is what each pair counts (1 by default); the mean stays over all B.
    """
    count_B = np.ones(len(x_BK)) if share_B is None else share_B
    from scipy.optimize import minimize

    def loss_and_slope(weight_K: Floats) -> tuple[float, Floats]:
        margin_B = (x_BK @ weight_K.astype(x_BK.dtype)).astype(np.float64)
        loss = float((count_B * np.logaddexp(0, -margin_B)).mean()) + penalty / 2 * float(weight_K @ weight_K)
        wrong_B = count_B * np.exp(-np.logaddexp(0, margin_B)) / len(x_BK)
        return loss, penalty * weight_K - (wrong_B.astype(x_BK.dtype) @ x_BK).astype(np.float64)

    start = np.zeros(x_BK.shape[1]) if start_K is None else start_K
    options = {"maxiter": _MAX_STEPS, "ftol": 1e-7, "gtol": 1e-5}
    found = minimize(loss_and_slope, start, jac=True, method="L-BFGS-B", options=options)
    weight_K: Floats = found.x
    return weight_K


def fit_probe(x_BK: Floats, group_B: Ints, *, seed: int) -> Floats:
    """As `fit`, with the penalty that is best on a quarter of these pairs, held out by group for this choice."""
    inner_B = folds(group_B, np.zeros(len(group_B), dtype=np.int64), round(1 / INNER_SHARE), seed=seed + 1) == 0
    learn_BK, watch_BK = x_BK[~inner_B], x_BK[inner_B]
    if not len(learn_BK) or not len(watch_BK):
        return fit(x_BK, PENALTIES[1])
    weight_K: Floats | None = None
    losses = []
    for penalty in PENALTIES:
        weight_K = fit(learn_BK, penalty, weight_K)
        losses.append(float(np.logaddexp(0, -(watch_BK @ weight_K)).mean()))
    return fit(x_BK, PENALTIES[int(np.argmin(losses))], weight_K)


def folds(group_B: Ints, domain_B: Ints, num_folds: int, *, seed: int) -> Ints:
    """A fold for each pair: whole groups, the largest first, each where its domains have fewest pairs yet."""
    _, place_B = np.unique(group_B, return_inverse=True)
    size_GM = np.zeros((int(place_B.max()) + 1, int(domain_B.max()) + 1), dtype=np.int64)
    np.add.at(size_GM, (place_B, domain_B), 1)
    order = np.random.default_rng([seed, 0]).permutation(len(size_GM))
    order = order[np.argsort(-size_GM.sum(1)[order], kind="stable")]
    filled_FM = np.zeros((num_folds, size_GM.shape[1]), dtype=np.int64)
    fold_G = np.zeros(len(size_GM), dtype=np.int64)
    for g in order:
        fold_G[g] = int(np.argmin(filled_FM[:, size_GM[g] > 0].sum(1)))
        filled_FM[fold_G[g]] += size_GM[g]
    return fold_G[place_B]


def right(margin_B: Floats) -> Floats:
    """1 where the chosen response has the larger reward, ½ for a tie."""
    value_B: Floats = (np.sign(margin_B) + 1) / 2
    return value_B


def held_out(x_BK: Floats, group_B: Ints, fold_B: Ints, *, seed: int, member_B: Ints | None = None) -> Floats:
    """Whether each of B pairs is right under the probe that was trained without its fold; (B,).

    The probe learns from the pairs where `member_B` is true (all by default) and is asked of all of them.
    """
    value_B = np.zeros(len(x_BK))
    for here_B, learn_B in _parts(fold_B, member_B):
        weight_K = fit_probe(x_BK[learn_B], group_B[learn_B], seed=seed)
        value_B[here_B] = right(x_BK[here_B] @ weight_K)
    return value_B


def _parts(fold_B: Ints, member_B: Ints | None) -> Iterator[tuple[Ints, Ints]]:
    for f in range(int(fold_B.max()) + 1):
        here_B = fold_B == f
        yield here_B, ~here_B if member_B is None else ~here_B & member_B


def own_probes(x_BK: Floats, domain_B: Ints, group_B: Ints, fold_B: Ints, *, seed: int) -> Floats:
    """Every domain's probe asked of every pair, (M, B): row a is the probe that learned domain a."""
    return np.stack(
        [held_out(x_BK, group_B, fold_B, seed=seed, member_B=domain_B == a) for a in range(int(domain_B.max()) + 1)]
    )


def own_value(probe_MB: Floats, domain_B: Ints) -> Floats:
    """Of each pair, what its own domain's probe says."""
    value_B: Floats = probe_MB[domain_B, np.arange(len(domain_B))]
    return value_B


def pair_probes(
    x_BK: Floats, domain_B: Ints, group_B: Ints, fold_B: Ints, *, seed: int, which: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], Floats]:
    """For each two domains, the probe that learned both, asked of every pair."""
    return {
        (a, b): held_out(x_BK, group_B, fold_B, seed=seed, member_B=(domain_B == a) | (domain_B == b)) for a, b in which
    }
