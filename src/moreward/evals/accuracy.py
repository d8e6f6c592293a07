"""How often a system prefers the response that was preferred: per domain, with intervals, beside simple rules.

B pairs, D domains, G prompt groups. Pairs of one prompt are not independent, so every interval is clustered by
`linked_groups`, as splits are. Equal rewards count as wrong, and are counted apart as ties.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moreward.calibration import brier_score, calibration_error
from moreward.data.split import linked_groups
from moreward.errors import DataError, NonFiniteError
from moreward.types import Preference, RoutedReward, Text

Correct: TypeAlias = NDArray[np.bool_]
"""One system on B pairs: True where the chosen response got strictly more."""

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]

CHANCE = "chance"
SATURATED = "saturated"
SATURATED_FROM = 0.99
CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A 95 % confidence interval."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What the evaluation took: parameters on disk, parameters one conversation meets, seconds for `num_pairs`."""

    parameters_stored: int
    parameters_active: int
    seconds: float
    num_pairs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """What is known of one domain, or of several in the mean.

    `longer_rule` is the accuracy of preferring the response with more characters (equal lengths count half).
    `brier` and `ece` judge sigmoid(margin) as the probability that the chosen response is the better one: a
    constant .5 has .25 and 0. `oracle` and `random` are the accuracies under those routers, None where a pair has
    none. `num_truncated` counts pairs with a truncated response. `margin_spread` is the population standard
    deviation.
    """

    num_pairs: int
    num_groups: int
    accuracy: float
    interval: Interval
    num_ties: int
    margin: float
    margin_spread: float
    brier: float
    ece: float
    longer_rule: float
    oracle: float | None
    random: float | None
    num_truncated: int
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One system on one set of preferences.

    `macro` weighs every domain the same, `micro` every pair. `unflagged` is `macro` over the domains that are
    neither at chance nor saturated; None where no domain is left.
    """

    domains: Mapping[str, Measures]
    macro: Measures
    micro: Measures
    unflagged: Measures | None
    experts: tuple[str, ...] = ()
    cost: Cost | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers; a domain's numbers stand under `["domains"][name]` only."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return plain


def evaluate(
    preferences: Sequence[Preference],
    chosen: Sequence[RoutedReward],
    rejected: Sequence[RoutedReward],
    *,
    experts: Sequence[str] = (),
    cost: Cost | None = None,
) -> Evaluation:
    """Measure a system by the rewards it gave to the two responses of every preference.

    `chosen[i]` and `rejected[i]` belong to `preferences[i]`. `experts` are the system's expert names, empty where
    they have none. Raises DataError without preferences, NonFiniteError at a reward that is no number.
    """
    check_aligned(preferences, chosen, rejected)
    names, domain_B = numbered([preference.domain for preference in preferences])
    rows = _read(preferences, chosen, rejected, domain_B)
    measured = {d: _measure(rows.where(domain_B == d)) for d in range(len(names))}
    unflagged = {d: measures for d, measures in measured.items() if not measures.flags}
    return Evaluation(
        domains=dict(zip(names, measured.values(), strict=True)),
        macro=_macro(rows, measured),
        micro=_measure(rows),
        unflagged=_macro(rows, unflagged) if unflagged else None,
        experts=tuple(experts),
        cost=cost,
    )


def metrics(evaluation: Evaluation) -> dict[str, float]:
    """Flat names for trackers: `eval/<domain>/accuracy`; `eval/accuracy` is the macro average.

    No two domains share a name: what stands between `eval/` and the last `/` is the domain, whole.
    """
    found = {
        f"eval/{domain}/{name}": value
        for domain, measures in evaluation.domains.items()
        for name, value in _flat(measures).items()
    }
    found |= {f"eval/{name}": value for name, value in _flat(evaluation.macro).items()}
    found["eval/accuracy_over_pairs"] = evaluation.micro.accuracy
    if evaluation.unflagged is not None:
        found["eval/accuracy_without_flagged"] = evaluation.unflagged.accuracy
    return found


def correct_pairs(chosen: Sequence[RoutedReward], rejected: Sequence[RoutedReward]) -> Correct:
    """Where the system is right, for `compare`."""
    return np.array([c.reward > j.reward for c, j in zip(chosen, rejected, strict=True)], dtype=np.bool_)


def check_aligned(
    preferences: Sequence[Preference], chosen: Sequence[RoutedReward], rejected: Sequence[RoutedReward]
) -> None:
    """Raise DataError when there is nothing to judge, ValueError when the three do not belong together."""
    if not preferences:
        raise DataError("Nothing to evaluate: 0 preferences. Give a file or split with at least one.")
    if not len(preferences) == len(chosen) == len(rejected):
        raise ValueError(
            f"{len(preferences)} preferences, {len(chosen)} chosen and {len(rejected)} rejected rewards: "
            "give one chosen and one rejected reward per preference, in the same order."
        )


# ---- one row per pair ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Columns over B pairs. `oracle_B` and `random_B` are 1 right, 0 wrong, NaN not available."""

    domain_B: Ints
    group_B: Ints
    margin_B: Floats
    longer_B: Floats
    oracle_B: Floats
    random_B: Floats
    truncated_B: NDArray[np.bool_]

    def where(self, keep_B: NDArray[np.bool_]) -> _Rows:
        return _Rows(**{name: getattr(self, name)[keep_B] for name in self.__slots__})


def _read(
    preferences: Sequence[Preference],
    chosen: Sequence[RoutedReward],
    rejected: Sequence[RoutedReward],
    domain_B: Ints,
) -> _Rows:
    pairs = list(zip(chosen, rejected, strict=True))
    for preference, pair in zip(preferences, pairs, strict=True):
        _check_finite(preference, *pair)
    longer = np.array([_num_characters(p.chosen) - _num_characters(p.rejected) for p in preferences])
    return _Rows(
        domain_B=domain_B,
        group_B=numbered(linked_groups(preferences))[1],
        margin_B=np.array([c.reward - j.reward for c, j in pairs]),
        longer_B=(np.sign(longer) + 1) / 2,
        oracle_B=np.array([_is_right(c.oracle, j.oracle) for c, j in pairs]),
        random_B=np.array([_is_right(c.random, j.random) for c, j in pairs]),
        truncated_B=np.array([c.truncated or j.truncated for c, j in pairs]),
    )


def _check_finite(preference: Preference, chosen: RoutedReward, rejected: RoutedReward) -> None:
    given = [value for r in (chosen, rejected) for value in (r.reward, r.oracle, r.random) if value is not None]
    if not np.isfinite(given).all():
        raise NonFiniteError(
            f"{preference.name}: a reward is not a finite number (chosen {chosen}, rejected {rejected}). "
            "The weights or the precision are at fault: score this row alone, in float32."
        )


def _num_characters(text: Text) -> int:
    if isinstance(text, str):
        return len(text)
    return sum(len(message.get("content") or "") for message in text)  # a tool call may come without content


def _is_right(chosen: float | None, rejected: float | None) -> float:
    return float("nan") if chosen is None or rejected is None else float(chosen > rejected)


# ---- measures --------------------------------------------------------------------------------------------------


def _measure(rows: _Rows) -> Measures:
    correct_B = rows.margin_B > 0
    accuracy = float(correct_B.mean())
    interval = accuracy_interval(correct_B, rows.group_B)
    return Measures(
        num_pairs=len(correct_B),
        num_groups=len(np.unique(rows.group_B)),
        accuracy=accuracy,
        interval=interval,
        num_ties=int((rows.margin_B == 0).sum()),
        margin=float(rows.margin_B.mean()),
        margin_spread=float(rows.margin_B.std()),
        brier=brier_score(rows.margin_B),
        ece=calibration_error(rows.margin_B),
        longer_rule=float(rows.longer_B.mean()),
        oracle=_mean_or_none(rows.oracle_B),
        random=_mean_or_none(rows.random_B),
        num_truncated=int(rows.truncated_B.sum()),
        flags=_flags(accuracy, interval),
    )


def _macro(rows: _Rows, domains: Mapping[int, Measures]) -> Measures:
    """Counts are summed over the domains, everything else is their plain mean."""
    rows = rows.where(np.isin(rows.domain_B, list(domains)))
    correlation_DD = domain_correlation((rows.margin_B > 0).astype(float), rows.domain_B, rows.group_B)
    accuracy_D = [m.accuracy for m in domains.values()]
    interval = mean_interval(accuracy_D, [m.interval for m in domains.values()], correlation_DD)
    return Measures(
        num_pairs=len(rows.margin_B),
        num_groups=len(np.unique(rows.group_B)),
        accuracy=float(np.mean(accuracy_D)),
        interval=interval,
        num_ties=sum(m.num_ties for m in domains.values()),
        margin=float(np.mean([m.margin for m in domains.values()])),
        margin_spread=float(np.mean([m.margin_spread for m in domains.values()])),
        brier=float(np.mean([m.brier for m in domains.values()])),
        ece=float(np.mean([m.ece for m in domains.values()])),
        longer_rule=float(np.mean([m.longer_rule for m in domains.values()])),
        oracle=_mean_or_none(np.array([m.oracle for m in domains.values()], dtype=float)),
        random=_mean_or_none(np.array([m.random for m in domains.values()], dtype=float)),
        num_truncated=sum(m.num_truncated for m in domains.values()),
        flags=_flags(float(np.mean(accuracy_D)), interval),
    )


def _flags(accuracy: float, interval: Interval) -> tuple[str, ...]:
    found = {CHANCE: 0.5 in interval, SATURATED: accuracy >= SATURATED_FROM}
    return tuple(flag for flag, is_raised in found.items() if is_raised)


def _flat(measures: Measures) -> dict[str, float]:
    plain = asdict(measures) | {"interval_low": measures.interval.low, "interval_high": measures.interval.high}
    return {name: float(value) for name, value in plain.items() if isinstance(value, int | float)}


def _mean_or_none(values: Floats) -> float | None:
    """None as soon as one is missing: a mean over fewer pairs or domains would not compare with the others."""
    return None if np.isnan(values).any() else float(values.mean())


# ---- intervals -------------------------------------------------------------------------------------------------


def wilson_interval(share: float, num_rows: float) -> Interval:
    """Wilson's score interval (1927) of a share seen in `num_rows` independent rows; need not be a whole number."""
    z2 = _Z**2 / num_rows
    centre = (share + z2 / 2) / (1 + z2)
    half = np.sqrt(share * (1 - share) * z2 + z2**2 / 4) / (1 + z2)
    # At 0 and 1 rounding would leave the share itself just outside.
    return Interval(low=float(np.clip(centre - half, 0, share)), high=float(np.clip(centre + half, share, 1)))


def accuracy_interval(correct_B: Correct, group_B: Ints) -> Interval:
    """Wilson's interval at the effective number of rows; plain Wilson where every group has one row."""
    return wilson_interval(float(correct_B.mean()), effective_rows(correct_B, group_B))


def effective_rows(correct_B: Correct, group_B: Ints) -> float:
    """How many independent rows would tell as much as these grouped ones.

    The rows divided by their design effect (clustered over plain variance, at least 1), with the correction for few
    groups of Korn and Graubard (1998). Near 0 and 1 the design effect would be guessed from a handful of errors and
    come out too small, so half a typical group that is all right and half one that is all wrong take part in it.
    """
    from scipy.special import stdtrit

    _, index_B, count_G = np.unique(group_B, return_inverse=True, return_counts=True)
    num_rows, num_groups = len(group_B), len(count_G)
    if num_groups == 1:
        return 1.0
    size_G, right_G = count_G.astype(np.float64), np.bincount(index_B, correct_B)
    typical = float(np.sqrt(np.square(size_G).mean()))
    share = (right_G.sum() + typical / 2) / (num_rows + typical)
    added = (share**2 + (1 - share) ** 2) / 2
    clustered = np.square(right_G - share * size_G).sum() + typical**2 * added
    plain = right_G.sum() * (1 - share) ** 2 + (size_G - right_G).sum() * share**2 + typical * added
    few = (num_groups + 1) / num_groups * (num_rows + typical - 1) / (num_rows + typical)
    t_rows, t_groups = stdtrit([num_rows - 1, num_groups - 1], 0.5 + CONFIDENCE / 2)
    return float(num_rows / max(1.0, clustered / plain * few) * (t_rows / t_groups) ** 2)


def mean_interval(estimate_D: Sequence[float], interval_D: Sequence[Interval], correlation_DD: Floats) -> Interval:
    """Interval of the plain mean of D estimates from their own intervals.

    Each side is the root of the summed squared distances to that side ("recovered variances", Zou and Donner 2008),
    so an estimate of 0 or 1 still adds the doubt of its own interval. For D = 1 it is that interval.
    """
    mean = float(np.mean(estimate_D))
    below_D = np.array([e - i.low for e, i in zip(estimate_D, interval_D, strict=True)]) / len(estimate_D)
    above_D = np.array([i.high - e for e, i in zip(estimate_D, interval_D, strict=True)]) / len(estimate_D)
    low, high = (max(0.0, float(side_D @ correlation_DD @ side_D)) ** 0.5 for side_D in (below_D, above_D))
    return Interval(low=mean - low, high=mean + high)


def domain_correlation(value_B: Floats, domain_B: Ints, group_B: Ints) -> Floats:
    """How the domain means of `value_B` move together because groups span domains; (D, D), domains in their order.

    The identity where no group has rows in two domains.
    """
    _, row_B = np.unique(domain_B, return_inverse=True)
    mean_D = np.bincount(row_B, value_B) / np.bincount(row_B)
    residual_DG = np.zeros((len(mean_D), int(group_B.max()) + 1))
    np.add.at(residual_DG, (row_B, group_B), value_B - mean_D[row_B])
    length_D = np.linalg.norm(residual_DG, axis=1)
    residual_DG /= np.where(length_D > 0, length_D, 1.0)[:, None]
    correlation_DD: Floats = residual_DG @ residual_DG.T
    np.fill_diagonal(correlation_DD, 1.0)
    return correlation_DD


def numbered(labels: Sequence[str]) -> tuple[list[str], Ints]:
    """The distinct labels, sorted, and each row's place among them."""
    names = sorted(set(labels))
    place = {name: i for i, name in enumerate(names)}
    return names, np.array([place[label] for label in labels], dtype=np.int64)
