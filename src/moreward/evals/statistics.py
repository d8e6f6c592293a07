"""Several seeds of several systems on the same pairs: bootstrap intervals, paired tests, and how many pairs would tell.

L systems, S seeds, B pairs, D domains, G prompt groups, R resamples. Seeds of one system see the same pairs, so they
are no new pairs: a pair's value is the mean over seeds, taken first, and whole groups are resampled and flipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from moreward.data.split import linked_groups
from moreward.evals.accuracy import CONFIDENCE, Correct, Floats, Interval, Ints, numbered, wilson_interval
from moreward.evals.compare import SignFlips, group_sums
from moreward.types import Preference

POWER = 0.8
FEW_GROUPS = 10
"""Below so many groups a bootstrap is too sure (Cameron, Gelbach and Miller 2008)."""
NUM_RESAMPLES = 2_000
NUM_FLIPS = 19_999
_RESAMPLED_AT_ONCE = 100


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Where B pairs stand: `domain_B` and `group_B` are numbers from 0, without gaps."""

    domain_B: Ints
    group_B: Ints

    @property
    def num_domains(self) -> int:
        return int(self.domain_B.max()) + 1

    @property
    def num_groups(self) -> int:
        return int(self.group_B.max()) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """A difference in accuracy on the same pairs, with its 95 % interval."""

    difference: float
    interval: Interval


def seed_mean(correct_SB: Floats) -> Floats:
    """A pair's value over the seeds: the share of them that were right; (B,)."""
    mean_B: Floats = np.asarray(correct_SB, dtype=np.float64).mean(0)
    return mean_B


def domain_means(value_LB: Floats, rows: Rows) -> Floats:
    """(L, D)."""
    size_D = np.bincount(rows.domain_B)
    mean_LD: Floats = np.stack([np.bincount(rows.domain_B, value_B) for value_B in value_LB]) / size_D
    return mean_LD


def bootstrap_means(value_LB: Floats, rows: Rows, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Floats:
    """Domain means of all systems in resampled worlds, (R, L, D): the same groups are drawn for every system.

    Groups are drawn with replacement among those that stand in the same domains, so no domain ever runs empty.
    (Field and Welsh 2007, "Bootstrapping clustered data": the cluster bootstrap.)
    """
    num_systems, num_domains = len(value_LB), rows.num_domains
    cell_B = rows.domain_B * rows.num_groups + rows.group_B
    cells = num_domains * rows.num_groups
    size_DG = np.bincount(cell_B, minlength=cells).reshape(num_domains, rows.num_groups).astype(np.float64)
    sum_LDG = np.stack([np.bincount(cell_B, value_B, minlength=cells) for value_B in value_LB])
    sum_MG = np.concatenate([sum_LDG.reshape(num_systems * num_domains, rows.num_groups), size_DG])
    strata = _strata(size_DG > 0)
    generator = np.random.default_rng(seed)
    found = []
    for start in range(0, num_resamples, _RESAMPLED_AT_ONCE):
        num_drawn = min(_RESAMPLED_AT_ONCE, num_resamples - start)
        count_RG = np.zeros((num_drawn, rows.num_groups))
        for members in strata:
            share = np.full(len(members), 1 / len(members))
            count_RG[:, members] = generator.multinomial(len(members), share, size=num_drawn)
        drawn_RM = count_RG @ sum_MG.T
        sum_RLD = drawn_RM[:, :-num_domains].reshape(num_drawn, num_systems, num_domains)
        found.append(sum_RLD / drawn_RM[:, None, -num_domains:])
    return np.concatenate(found)


def _strata(stands_DG: np.ndarray) -> list[Ints]:
    """The groups by the set of domains that they have pairs in."""
    _, kind_G = np.unique(stands_DG, axis=1, return_inverse=True)
    kind_G = kind_G.reshape(-1)
    return [np.flatnonzero(kind_G == kind) for kind in range(int(kind_G.max()) + 1)]


def percentile_interval(drawn_R: Floats) -> Interval:
    """The middle 95 % of resampled values."""
    low, high = np.quantile(drawn_R, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(low=float(low), high=float(high))


def share_interval(drawn_R: Floats, share: float, error: float, num_groups: int) -> Interval:
    """Of an accuracy. Where no resample differs (all right, all wrong) the bootstrap would say that there is no
    doubt; then Wilson's interval of as many rows as there are groups is taken. Few groups: Student's."""
    if np.ptp(drawn_R) < 1e-12:
        return wilson_interval(share, num_groups)
    few = num_groups < FEW_GROUPS
    return student_interval(share, error, num_groups, low=0) if few else percentile_interval(drawn_R)


def difference_interval(drawn_R: Floats, difference: float, error: float, num_groups: int) -> Interval:
    """Of a mean gain. Where no resample differs, or there are few groups, Student's."""
    if num_groups < FEW_GROUPS or np.ptp(drawn_R) < 1e-12:
        return student_interval(difference, error, num_groups, low=-1)
    return percentile_interval(drawn_R)


def gains_by_domain(
    before_B: Correct, after_B: Correct, preferences: Sequence[Preference], *, seed: int = 0
) -> dict[str, Gain]:
    """How much more accurate one system is than another on the same pairs, per domain; groups are those of splits.

    The cluster bootstrap of the paired difference; where it knows no doubt, or groups are few, Student's interval.
    """
    names, domain_B = numbered([p.domain for p in preferences])
    rows = Rows(domain_B=domain_B, group_B=numbered(linked_groups(preferences))[1])
    gain_B = after_B.astype(np.float64) - before_B.astype(np.float64)
    drawn_RD = bootstrap_means(gain_B[None], rows, seed=seed)[:, 0]
    mean_D, (error_D, _) = domain_means(gain_B[None], rows)[0], clustered_error(gain_B, rows)
    groups_D = [len(np.unique(rows.group_B[domain_B == d])) for d in range(len(names))]
    return {
        name: Gain(
            difference=float(mean_D[d]),
            interval=difference_interval(drawn_RD[:, d], float(mean_D[d]), error_D[d], groups_D[d]),
        )
        for d, name in enumerate(names)
    }


def student_interval(mean: float, error: float, num_groups: int, *, low: float, high: float = 1) -> Interval:
    """By Student's t with a degree of freedom less than there are groups; one group can say nothing."""
    from scipy.special import stdtrit

    if num_groups == 1:
        return Interval(low=low, high=high)
    half = float(stdtrit(num_groups - 1, (1 + CONFIDENCE) / 2)) * error
    return Interval(low=max(low, mean - half), high=min(high, mean + half))


def paired_p(gain_B: Floats, rows: Rows, *, num_flips: int = NUM_FLIPS, seed: int = 0) -> tuple[list[float], float]:
    """Two-sided p values of the mean gain in each domain and in the mean of domains, by flipping whole groups.

    `gain_B` is a pair's value under one system minus that under another. Exact where the outcomes can be listed.
    """
    flips = SignFlips(num_resamples=num_flips, seed=seed)
    by_domain = []
    for d in range(rows.num_domains):
        here = rows.domain_B == d
        by_domain.append(flips.p_value(group_sums(gain_B[here], rows.group_B[here])[0]))
    weight_B = 1 / (np.bincount(rows.domain_B)[rows.domain_B] * rows.num_domains)
    part_G: Floats = np.bincount(rows.group_B, gain_B * weight_B).astype(np.float64)
    return by_domain, flips.p_value(part_G)


@dataclass(frozen=True, slots=True, kw_only=True)
class Power:
    """What these pairs can tell, and how many would tell the difference seen, if it is the true one.

    `detectable` is the smallest difference that as many groups as these would tell with a power of 80 %; None where
    they are fewer than `least_groups`, with which the test can tell nothing whatever the difference. `more_pairs` and
    `more_groups` are what is missing; 0 where there are enough, None where the difference is 0 and no number is.
    """

    detectable: float | None
    least_groups: int
    more_pairs: int | None
    more_groups: int | None


def power(difference: float, error: float, *, num_pairs: int, num_groups: int, alpha: float = 1 - CONFIDENCE) -> Power:
    """From the standard error of a difference over groups, which falls with the root of their number.

    A two-sided test at level `alpha` finds a true difference with a power of 80 % where it is z(1 - α/2) + z(.8)
    standard errors large. The tests of a report are many: give the level that one of them has to pass. Flipping G
    groups gives no p below 2^(1 - G).
    """
    z = NormalDist().inv_cdf(1 - alpha / 2) + NormalDist().inv_cdf(POWER)
    least_groups = int(np.floor(1 - np.log2(alpha))) + 1
    told = Power(
        detectable=z * error if num_groups >= least_groups else None,
        least_groups=least_groups,
        more_pairs=None,
        more_groups=None,
    )
    if difference == 0:
        return told
    share = max(0.0, (z * error / difference) ** 2 - 1)
    short = max(0, least_groups - num_groups)
    return replace(
        told,
        more_pairs=max(int(np.ceil(share * num_pairs)), -(-short * num_pairs // num_groups)),
        more_groups=max(int(np.ceil(share * num_groups)), short),
    )


def clustered_error(gain_B: Floats, rows: Rows) -> tuple[list[float], float]:
    """Standard error of the mean gain in each domain and in the mean of domains, from the variance between groups.

    One more pair won or lost is added, so systems that never differ are not equal beyond doubt.
    """
    errors, variance, num_domains = [], 0.0, rows.num_domains
    mean_D = np.bincount(rows.domain_B, gain_B) / np.bincount(rows.domain_B)
    residual_G = np.zeros(rows.num_groups)
    for d in range(num_domains):
        here = rows.domain_B == d
        sum_G, size_G = group_sums(gain_B[here], rows.group_B[here])
        num_groups = len(size_G)
        few = num_groups / max(1, num_groups - 1)
        added = 1 / size_G.sum() ** 2
        own = np.square(sum_G - mean_D[d] * size_G).sum() * few / size_G.sum() ** 2
        errors.append(float(np.sqrt(own + added)))
        residual_B = (gain_B[here] - mean_D[d]) / (size_G.sum() * num_domains) * np.sqrt(few)
        np.add.at(residual_G, rows.group_B[here], residual_B)
        variance += added / num_domains**2
    return errors, float(np.sqrt(np.square(residual_G).sum() + variance))


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation over seeds; None where there is one seed, which has none."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
