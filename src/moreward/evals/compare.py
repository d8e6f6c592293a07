"""Is one system better than another on the same pairs? Differences with intervals, tests and plain words.

B pairs, D domains, G prompt groups. Rows of one group stand and fall together: intervals are clustered by group, and
the test flips whole groups.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from moreward.evals.accuracy import (
    CONFIDENCE,
    Correct,
    Floats,
    Interval,
    Ints,
    domain_correlation,
    mean_interval,
    numbered,
)

Verdict: TypeAlias = Literal["better", "worse", "no difference shown"]

SIGNIFICANT_BELOW = 1 - CONFIDENCE
_MAX_EXACT_OUTCOMES = 1_000_000
_DRAWN_AT_ONCE = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Accuracy of a system minus that of the baseline.

    `num_won` pairs only the system gets right, `num_lost` only the baseline. `interval` and `p_value` are of this
    one comparison; `p_holm` and the verdict stand up to all the comparisons made at once, so an interval that
    excludes 0 does not always carry a verdict.
    """

    difference: float
    interval: Interval
    p_value: float
    p_holm: float
    verdict: Verdict
    num_pairs: int
    num_groups: int
    num_won: int
    num_lost: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Every system against one baseline. `accuracy[system][domain]` holds the baseline too."""

    baseline: str
    accuracy: Mapping[str, Mapping[str, float]]
    domains: Mapping[str, Mapping[str, Difference]]
    macro: Mapping[str, Difference]

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return plain


def compare(
    systems: Mapping[str, Correct],
    groups: Sequence[str],
    domains: Sequence[str],
    *,
    baseline: str,
    num_resamples: int = 9_999,
    seed: int = 0,
) -> Comparison:
    """Paired differences in accuracy between each system and `systems[baseline]`, per domain and in the mean.

    `systems[name][i]`, `groups[i]` (of `linked_groups`) and `domains[i]` belong to pair i. The test is a sign flip over
    groups, exact where that can be listed and otherwise drawn `num_resamples` times from `seed`. Holm's correction
    runs over all systems, domains and means together. Raises ValueError where the arguments do not belong together.
    """
    _check(systems, groups, domains, baseline)
    names, domain_B = numbered(domains)
    _, group_B = numbered(groups)
    found: dict[tuple[str, str | None], Difference] = {}
    for system in sorted(set(systems) - {baseline}):
        gain_B = systems[system].astype(np.int64) - systems[baseline].astype(np.int64)
        flips = SignFlips(num_resamples=num_resamples, seed=seed)
        by_domain = [_difference(gain_B[domain_B == d], group_B[domain_B == d], flips) for d in range(len(names))]
        found |= {(system, name): one for name, one in zip(names, by_domain, strict=True)}
        found[system, None] = _mean_difference(by_domain, gain_B, domain_B, group_B, flips)
    found = _decide(found)
    return Comparison(
        baseline=baseline,
        accuracy={s: {n: float(c[domain_B == d].mean()) for d, n in enumerate(names)} for s, c in systems.items()},
        domains={s: {n: found[s, n] for n in names} for s in systems if s != baseline},
        macro={s: found[s, None] for s in systems if s != baseline},
    )


def _check(systems: Mapping[str, Correct], groups: Sequence[str], domains: Sequence[str], baseline: str) -> None:
    if baseline not in systems:
        raise ValueError(f"The baseline {baseline!r} is not among the systems {sorted(systems)}: add it.")
    lengths = {f"system {name!r}": len(correct) for name, correct in systems.items()}
    lengths |= {"groups": len(groups), "domains": len(domains)}
    if len(set(lengths.values())) > 1 or not groups:
        raise ValueError(f"Rows must be the same, and at least one (got {lengths}): compare on the same pairs.")


def _difference(gain_B: Ints, group_B: Ints, flips: SignFlips) -> Difference:
    sum_G, size_G = group_sums(gain_B, group_B)
    return Difference(
        difference=float(gain_B.mean()),
        interval=difference_interval(sum_G, size_G),
        p_value=flips.p_value(sum_G),
        p_holm=1.0,
        verdict="no difference shown",
        num_pairs=len(gain_B),
        num_groups=len(size_G),
        num_won=int((gain_B > 0).sum()),
        num_lost=int((gain_B < 0).sum()),
    )


def group_sums(gain_B: Ints, group_B: Ints) -> tuple[Floats, Floats]:
    """Sum and number of rows of each group that is there."""
    size_G = np.bincount(group_B).astype(np.float64)
    sum_G = np.bincount(group_B, gain_B).astype(np.float64)
    return sum_G[size_G > 0], size_G[size_G > 0]


def _mean_difference(
    by_domain: Sequence[Difference], gain_B: Ints, domain_B: Ints, group_B: Ints, flips: SignFlips
) -> Difference:
    """The plain mean over domains; a group with rows in several domains flips in all of them at once."""
    sum_DG = np.zeros((len(by_domain), int(group_B.max()) + 1))
    np.add.at(sum_DG, (domain_B, group_B), gain_B)
    part_G = (sum_DG / (np.bincount(domain_B)[:, None] * len(by_domain))).sum(0)
    difference_D = [one.difference for one in by_domain]
    correlation_DD = domain_correlation(gain_B.astype(float), domain_B, group_B)
    interval = mean_interval(difference_D, [one.interval for one in by_domain], correlation_DD)
    return Difference(
        difference=float(np.mean(difference_D)),
        interval=interval,
        p_value=flips.p_value(part_G),
        p_holm=1.0,
        verdict="no difference shown",
        num_pairs=len(gain_B),
        num_groups=len(np.unique(group_B)),
        num_won=sum(one.num_won for one in by_domain),
        num_lost=sum(one.num_lost for one in by_domain),
    )


def difference_interval(sum_G: Floats, size_G: Floats) -> Interval:
    """Cluster-robust t interval of a mean difference, from each group's sum and number of rows.

    One more won-or-lost row (as large as a typical group) is added to the variance, as Agresti and Min (2005) do for
    single rows: without it, systems that never differ in ten pairs would be equal beyond doubt.
    """
    from scipy.special import stdtrit

    num_rows, num_groups = size_G.sum(), len(size_G)
    if num_groups == 1:
        return Interval(low=-1.0, high=1.0)
    mean = sum_G.sum() / num_rows
    squares = np.square(sum_G - mean * size_G).sum() * num_groups / (num_groups - 1)
    half = stdtrit(num_groups - 1, 0.5 + CONFIDENCE / 2) * np.sqrt(squares + np.square(size_G).mean()) / num_rows
    return Interval(low=float(max(-1.0, mean - half)), high=float(min(1.0, mean + half)))


@dataclass(frozen=True, slots=True, kw_only=True)
class SignFlips:
    """If two systems are alike, each group's difference could as well have had the other sign.

    The mean over domains is tested against the same: where large gains and losses cancel, that test is cautious.
    Groups of equal size of difference are alike, so only how many of them are positive matters: a binomial number.
    """

    num_resamples: int
    seed: int

    def p_value(self, value_G: Floats) -> float:
        """Two-sided: how often random signs give a sum as far from 0 as the one seen."""
        # Sizes that differ by rounding only are one size: means over seeds are sums of fractions.
        scale = float(np.abs(value_G).max(initial=0.0)) or 1.0
        size_K, count_K = np.unique(np.round(np.abs(value_G[value_G != 0]) / scale, 12) * scale, return_counts=True)
        # The same sum may round differently; a sum of 0 may round to anything this small.
        reached = abs(value_G.sum()) - 1e-9 * np.abs(value_G).sum()
        if np.prod(count_K + 1.0) <= _MAX_EXACT_OUTCOMES:
            return _exact_p(size_K, count_K, reached)
        generator = np.random.default_rng(self.seed)
        num_reached = 0
        for start in range(0, self.num_resamples, _DRAWN_AT_ONCE):
            num_drawn = min(_DRAWN_AT_ONCE, self.num_resamples - start)
            positive_RK = generator.binomial(count_K, 0.5, size=(num_drawn, len(count_K)))
            num_reached += int((np.abs((2 * positive_RK - count_K) @ size_K) >= reached).sum())
        return float((num_reached + 1) / (self.num_resamples + 1))


def _exact_p(size_K: Floats, count_K: Ints, reached: float) -> float:
    from scipy.special import gammaln

    total, probability = np.zeros(1), np.ones(1)
    for size, count in zip(size_K, count_K, strict=True):
        positive = np.arange(count + 1)
        log_choose = gammaln(count + 1) - gammaln(positive + 1) - gammaln(count - positive + 1)
        total = np.add.outer(total, size * (2 * positive - count)).ravel()
        probability = np.multiply.outer(probability, np.exp(log_choose - count * np.log(2))).ravel()
    return float(min(1.0, probability[np.abs(total) >= reached].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down adjusted p values, in the order given."""
    order = np.argsort(p_values, kind="stable")
    scaled = np.array(p_values)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return [float(p) for p in adjusted]


def _decide(found: Mapping[tuple[str, str | None], Difference]) -> dict[tuple[str, str | None], Difference]:
    adjusted = holm([one.p_value for one in found.values()])
    return {
        key: replace(one, p_holm=p, verdict=_verdict(one.difference, p))
        for (key, one), p in zip(found.items(), adjusted, strict=True)
    }


def _verdict(difference: float, p_holm: float) -> Verdict:
    if p_holm >= SIGNIFICANT_BELOW:
        return "no difference shown"
    return "better" if difference > 0 else "worse"
