"""What an experiment shows, as numbers: accuracies, differences from equal-budget single models, a conclusion each.

S seeds, B pairs, L systems, D domains. Every interval is over prompt groups with the seeds averaged within a pair; the
spread over seeds stands beside it and is never mixed into it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from moreward.data.split import linked_groups
from moreward.errors import DataError, RunError
from moreward.evals.accuracy import (
    CHANCE,
    CONFIDENCE,
    SATURATED,
    SATURATED_FROM,
    Evaluation,
    Floats,
    Interval,
    evaluate,
    numbered,
)
from moreward.evals.compare import Verdict, holm
from moreward.evals.diversity import error_correlation
from moreward.evals.routing import RoutingReport, routing_report
from moreward.evals.statistics import (
    NUM_RESAMPLES,
    Power,
    Rows,
    bootstrap_means,
    clustered_error,
    difference_interval,
    domain_means,
    paired_p,
    percentile_interval,
    power,
    seed_mean,
    share_interval,
    spread,
)
from moreward.proof.controls import Budget, Plan
from moreward.proof.experiment import KINDS, Experiment
from moreward.proof.trials import Told, Trials
from moreward.types import Preference

Word = Literal["helps", "hurts", "cannot be told"]
NUM_BINS = 10


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """An accuracy: mean over seeds, interval over prompt groups, each seed's own, their standard deviation."""

    mean: float
    interval: Interval
    seeds: tuple[float, ...]
    spread: float | None


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Of a reliability curve: how sure the system was on average, and how often it was right."""

    confidence: float
    accuracy: float
    num_pairs: int


@dataclass(frozen=True, kw_only=True)
class SystemFinding:
    """One system, its measures averaged over seeds.

    `oracle`, `random` and `router` are by domain, None where the system has no expert per domain; `confusion` is a
    share of prompts by domain and expert. `length` is the rank correlation of the margin with the difference in
    length. `expert_errors[a][b]` is the correlation of two experts' errors, None where one of them never varies.
    """

    label: str
    recipe: str
    is_single: bool
    members: int
    budget: Budget
    accuracy: Mapping[str, Estimate]
    mean: Estimate
    unflagged: Estimate | None
    micro: float
    oracle: Mapping[str, float | None]
    random: Mapping[str, float | None]
    router: Mapping[str, float | None]
    router_accuracy: float | None
    split_share: float | None
    confusion: Mapping[str, Mapping[str, float]]
    ties: float
    ece: float
    brier: float
    reliability: tuple[Bin, ...]
    length: float
    expert_errors: Mapping[str, Mapping[str, float | None]]
    training_seconds: float
    pairs_seen: float
    steps: float
    seconds_per_pair: float
    stages: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Versus:
    """A mixture against a single model in a domain, or in the mean of domains (None). `kinds` says in which budgets
    the single model is its equal; empty for the baseline that is not. `error` is the standard error over groups."""

    mixture: str
    single: str
    kinds: tuple[str, ...]
    domain: str | None
    difference: float
    interval: Interval
    error: float
    seeds: tuple[float, ...]
    spread: float | None
    p_value: float
    p_holm: float
    verdict: Verdict
    power: Power
    num_pairs: int
    num_groups: int


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """`helps`: better than every equal-budget single model; `hurts`: worse than one. `versus` is what decides it."""

    mixture: str
    domain: str | None
    word: Word
    versus: Versus


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Everything a report says."""

    name: str
    baseline: str
    seeds: tuple[int, ...]
    domains: tuple[str, ...]
    num_pairs: Mapping[str, int]
    num_groups: Mapping[str, int]
    too_long: Mapping[str, int]
    longer_rule: Mapping[str, float]
    flags: Mapping[str, tuple[str, ...]]
    systems: Mapping[str, SystemFinding]
    controls: Mapping[str, Mapping[str, str]]
    versus: tuple[Versus, ...]
    conclusions: tuple[Conclusion, ...]
    num_tests: int
    configuration: Mapping[str, Any] = field(default_factory=dict)

    @property
    def unflagged(self) -> list[str]:
        return [domain for domain in self.domains if not self.flags[domain]]

    @property
    def mixtures(self) -> list[str]:
        return list(self.controls)

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return plain


def find(trials: Trials, *, num_resamples: int = NUM_RESAMPLES) -> Findings:
    """Reward all test pairs with every system and draw the conclusions. Raises what `findings_of` does."""
    chosen = trials.plan
    check_controls(chosen.controls, [p.label for p in chosen.systems if not p.is_single])
    told = {p.label: [trials.told(p, seed) for seed in trials.experiment.seeds] for p in chosen.systems}
    return findings_of(trials.experiment, chosen, trials.test, told, num_resamples=num_resamples)


def findings_of(
    experiment: Experiment,
    chosen: Plan,
    test: Sequence[Preference],
    told: Mapping[str, Sequence[Told]],
    *,
    num_resamples: int = NUM_RESAMPLES,
) -> Findings:
    """The conclusions from what every system said of the same pairs, a `Told` for each seed.

    Raises DataError where a domain has no pair that all systems can read whole, RunError where a mixture has no
    single model of equal budget beside it or the pairs are not the same: such a report would show nothing.
    """
    check_controls(chosen.controls, [p.label for p in chosen.systems if not p.is_single])
    _check_same_pairs(test, told, len(experiment.seeds))
    drops = any(p.config.data.on_long == "drop" for p in chosen.systems)
    kept, too_long = _readable(test, told, drops=drops)
    preferences = [test[i] for i in kept]
    table = _Table(preferences, told, kept, num_resamples)
    flags = table.flags()
    unflagged = [d for d, name in enumerate(table.domains) if not flags[name]]
    systems = {
        p.label: table.system(p.label, p.config.recipe, p.is_single, p.members, chosen.budgets[p.label], unflagged)
        for p in chosen.systems
    }
    versus = _decided(
        [
            one
            for mixture in chosen.controls
            for one in table.against(mixture, chosen.opponents(mixture), chosen.controls)
        ]
    )
    return Findings(
        name=experiment.name,
        baseline=chosen.baseline or next(iter(chosen.controls.values()))["total"],
        seeds=experiment.seeds,
        domains=tuple(table.domains),
        num_pairs=dict(Counter(p.domain for p in preferences)),
        num_groups=table.num_groups,
        too_long=too_long,
        longer_rule={d: m.longer_rule for d, m in table.evaluations[chosen.systems[0].label][0].domains.items()},
        flags=flags,
        systems=systems,
        controls={mixture: dict(told) for mixture, told in chosen.controls.items()},
        versus=tuple(versus),
        conclusions=tuple(_conclusions(versus, list(chosen.controls), table.domains)),
        num_tests=len(versus),
        configuration=experiment.model_dump(mode="json", exclude={"printed"}),
    )


def check_controls(controls: Mapping[str, Mapping[str, str]], mixtures: Sequence[str]) -> None:
    """RunError unless every mixture has a single model for every kind of budget."""
    missing = [f"{m} (equal {kind})" for m in mixtures for kind in KINDS if not controls.get(m, {}).get(kind)]
    if missing:
        raise RunError(f"No report: no single model of equal budget beside {', '.join(missing)}.")


def _check_same_pairs(test: Sequence[Preference], told: Mapping[str, Sequence[Told]], num_seeds: int) -> None:
    numbers = {label: [len(one.rewards) for one in ones] for label, ones in told.items()}
    if wrong := {label: found for label, found in numbers.items() if found != [len(test)] * num_seeds}:
        raise RunError(
            f"No report: {len(test)} test pairs with {num_seeds} seeds, but rewards of {wrong}. Every system must see "
            "the same pairs with every seed."
        )


def _readable(
    test: Sequence[Preference], told: Mapping[str, Sequence[Told]], *, drops: bool
) -> tuple[list[int], dict[str, int]]:
    """The pairs that count: with `drops`, those that no system had to cut. The others are counted by domain."""
    cut = {i for ones in told.values() for i, pair in enumerate(ones[0].rewards) if any(r.truncated for r in pair)}
    kept = [i for i in range(len(test)) if not (drops and i in cut)]
    lost = Counter(test[i].domain for i in cut) if drops else Counter()
    if empty := sorted(set(lost) - {test[i].domain for i in kept}):
        raise DataError(
            f"domains {empty} have no test pair that every system can read whole. Raise settings.data.max_length, or "
            "say settings.data.on_long: truncate."
        )
    return kept, dict(lost)


class _Table:
    """All systems' rewards of the pairs that count, with what is computed from them once."""

    def __init__(
        self,
        preferences: Sequence[Preference],
        told: Mapping[str, Sequence[Told]],
        kept: Sequence[int],
        num_resamples: int,
    ) -> None:
        self.preferences, self.told, self.kept = preferences, told, kept
        self.domains, domain_B = numbered([p.domain for p in preferences])
        self.rows = Rows(domain_B=domain_B, group_B=numbered(linked_groups(preferences))[1])
        self.num_groups = {n: len({*self.rows.group_B[domain_B == d].tolist()}) for d, n in enumerate(self.domains)}
        self.evaluations: dict[str, list[Evaluation]] = {}
        self.routings: dict[str, list[RoutingReport]] = {}
        self.margin: dict[str, Floats] = {}
        for label, ones in told.items():
            self._read(label, ones)
        self.correct = {label: (margin_SB > 0).astype(np.float64) for label, margin_SB in self.margin.items()}
        self.labels = list(told)
        value_LB = np.stack([seed_mean(self.correct[label]) for label in self.labels])
        self.value = dict(zip(self.labels, value_LB, strict=True))
        self.mean_LD = domain_means(value_LB, self.rows)
        self.error_LD = [clustered_error(value_B, self.rows)[0] for value_B in value_LB]
        self.drawn_RLD = bootstrap_means(value_LB, self.rows, num_resamples=num_resamples)

    def _read(self, label: str, ones: Sequence[Told]) -> None:
        self.evaluations[label], self.routings[label], margins = [], [], []
        for one in ones:
            chosen, rejected = ([one.rewards[i][s] for i in self.kept] for s in (0, 1))
            self.evaluations[label].append(evaluate(self.preferences, chosen, rejected, experts=one.experts))
            self.routings[label].append(routing_report(self.preferences, chosen, rejected, experts=one.experts))
            margins.append([c.reward - r.reward for c, r in zip(chosen, rejected, strict=True)])
        self.margin[label] = np.array(margins)

    def flags(self) -> dict[str, tuple[str, ...]]:
        """chance: the interval of every system contains .5; saturated: every system is right in 99 % or more."""
        found = {}
        for d, name in enumerate(self.domains):
            intervals = [self._interval(s, d) for s in range(len(self.labels))]
            raised = {
                CHANCE: all(0.5 in interval for interval in intervals),
                SATURATED: bool((self.mean_LD[:, d] >= SATURATED_FROM).all()),
            }
            found[name] = tuple(flag for flag, is_raised in raised.items() if is_raised)
        return found

    def _interval(self, s: int, d: int) -> Interval:
        return share_interval(
            self.drawn_RLD[:, s, d],
            float(self.mean_LD[s, d]),
            self.error_LD[s][d],
            self.num_groups[self.domains[d]],
        )

    # ---- one system ----------------------------------------------------------------------------------------------

    def system(
        self, label: str, recipe: str, is_single: bool, members: int, budget: Budget, unflagged: Sequence[int]
    ) -> SystemFinding:
        s, ones = self.labels.index(label), self.told[label]
        evaluations, routings = self.evaluations[label], self.routings[label]
        seeds_SD = domain_means(self.correct[label], self.rows)
        every = range(len(self.domains))
        return SystemFinding(
            label=label,
            recipe=recipe,
            is_single=is_single,
            members=members,
            budget=budget,
            accuracy={name: self._estimate(s, [d], seeds_SD) for d, name in enumerate(self.domains)},
            mean=self._estimate(s, every, seeds_SD),
            unflagged=self._estimate(s, unflagged, seeds_SD) if unflagged else None,
            micro=float(self.value[label].mean()),
            oracle={d: _mean_or_none([e.domains[d].oracle for e in evaluations]) for d in self.domains},
            random={d: _mean_or_none([e.domains[d].random for e in evaluations]) for d in self.domains},
            router={d: _mean_or_none([r.domain_accuracy.get(d) for r in routings]) for d in self.domains},
            router_accuracy=_mean_or_none([r.accuracy for r in routings]),
            split_share=_mean_or_none([r.split_share for r in routings]),
            confusion=_mean_confusion(routings),
            ties=float(np.mean([e.micro.num_ties for e in evaluations])),
            ece=float(np.mean([e.macro.ece for e in evaluations])),
            brier=float(np.mean([e.macro.brier for e in evaluations])),
            reliability=reliability(self.margin[label].ravel()),
            length=self._length_correlation(label),
            expert_errors=_error_correlation(ones[0].expert_margins),
            training_seconds=float(np.mean([one.training["seconds"] for one in ones])),
            pairs_seen=float(np.mean([one.training["pairs_seen"] for one in ones])),
            steps=float(np.mean([one.training["steps"] for one in ones])),
            seconds_per_pair=float(np.median([one.seconds_per_pair for one in ones])),
            stages=tuple(ones[0].training["stages"]),
        )

    def _estimate(self, s: int, domains: Sequence[int], seeds_SD: Floats) -> Estimate:
        chosen = list(domains)
        seeds = tuple(map(float, seeds_SD[:, chosen].mean(1)))
        drawn_R = self.drawn_RLD[:, s, chosen].mean(1)
        mean = float(self.mean_LD[s, chosen].mean())
        interval = self._interval(s, chosen[0]) if len(chosen) == 1 else percentile_interval(drawn_R)
        return Estimate(mean=mean, interval=interval, seeds=seeds, spread=spread(seeds))

    def _length_correlation(self, label: str) -> float:
        from scipy.stats import rankdata

        length_B = np.array([_length(p.chosen) - _length(p.rejected) for p in self.preferences], dtype=float)
        margin_B = self.margin[label].mean(0)
        # Each pair also the other way round: which side was preferred must not show in the correlation.
        ranks = [rankdata(np.concatenate([x, -x])) for x in (length_B, margin_B)]
        return _correlation(*ranks) or 0.0

    # ---- a mixture against single models -------------------------------------------------------------------------

    def against(self, mixture: str, singles: Sequence[str], controls: Mapping[str, Mapping[str, str]]) -> list[Versus]:
        return [
            one for single in singles if single and single != mixture for one in self._pair(mixture, single, controls)
        ]

    def _pair(self, mixture: str, single: str, controls: Mapping[str, Mapping[str, str]]) -> list[Versus]:
        gain_B = self.value[mixture] - self.value[single]
        p_D, p_mean = paired_p(gain_B, self.rows)
        error_D, error_mean = clustered_error(gain_B, self.rows)
        m, s = self.labels.index(mixture), self.labels.index(single)
        drawn_RD = self.drawn_RLD[:, m] - self.drawn_RLD[:, s]
        seeds_SD = domain_means(self.correct[mixture], self.rows) - domain_means(self.correct[single], self.rows)
        gain_D = self.mean_LD[m] - self.mean_LD[s]
        kinds = tuple(kind for kind in KINDS if controls[mixture][kind] == single)
        pairs = Counter(p.domain for p in self.preferences)
        found = []
        for d, name in [*enumerate(self.domains), (None, None)]:
            seeds = seeds_SD.mean(1) if d is None else seeds_SD[:, d]
            difference = float(gain_D.mean() if d is None else gain_D[d])
            error = error_mean if d is None else error_D[d]
            drawn_R = drawn_RD.mean(1) if d is None else drawn_RD[:, d]
            num_pairs = len(gain_B) if name is None else pairs[name]
            num_groups = self.rows.num_groups if name is None else self.num_groups[name]
            found.append(
                Versus(
                    mixture=mixture,
                    single=single,
                    kinds=kinds,
                    domain=name,
                    difference=difference,
                    interval=difference_interval(drawn_R, difference, error, num_groups),
                    error=error,
                    seeds=tuple(map(float, seeds)),
                    spread=spread(list(map(float, seeds))),
                    p_value=p_mean if d is None else p_D[d],
                    p_holm=1.0,
                    verdict="no difference shown",
                    power=power(difference, error, num_pairs=num_pairs, num_groups=num_groups),
                    num_pairs=num_pairs,
                    num_groups=num_groups,
                )
            )
        return found


def _decided(tests: Sequence[Versus]) -> list[Versus]:
    """Holm's correction over all of them, verdicts, and the power that one of so many tests has."""
    alpha = (1 - CONFIDENCE) / max(1, len(tests))
    found = []
    for one, p_holm in zip(tests, holm([one.p_value for one in tests]), strict=True):
        verdict: Verdict = "no difference shown"
        if p_holm < 1 - CONFIDENCE:
            verdict = "better" if one.difference > 0 else "worse"
        told = power(one.difference, one.error, num_pairs=one.num_pairs, num_groups=one.num_groups, alpha=alpha)
        found.append(replace(one, p_holm=p_holm, verdict=verdict, power=told))
    return found


def _conclusions(versus: Sequence[Versus], mixtures: Sequence[str], domains: Sequence[str]) -> list[Conclusion]:
    return [
        conclude(mixture, domain, [v for v in versus if (v.mixture, v.domain) == (mixture, domain) and v.kinds])
        for mixture in mixtures
        for domain in (*domains, None)
    ]


def conclude(mixture: str, domain: str | None, tests: Sequence[Versus]) -> Conclusion:
    """From the tests against all equal-budget single models: it helps only where it beats each of them."""
    worse = [one for one in tests if one.verdict == "worse"]
    open_ = [one for one in tests if one.verdict != "better"]
    word: Word = "hurts" if worse else "cannot be told" if open_ else "helps"
    versus = min(worse or open_ or tests, key=lambda one: one.difference)
    return Conclusion(mixture=mixture, domain=domain, word=word, versus=versus)


# ---- parts -----------------------------------------------------------------------------------------------------------


def reliability(margin: Floats) -> tuple[Bin, ...]:
    """Confidence σ(|margin|) in the response with the higher reward, in ten bins of [.5, 1], against how often it was
    the preferred one; a tie is right half the time. Empty bins are left out."""
    confidence = 1 / (1 + np.exp(-np.minimum(np.abs(margin), 700)))
    right = (np.sign(margin) + 1) / 2
    place = np.minimum((confidence - 0.5) * 2 * NUM_BINS, NUM_BINS - 1).astype(int)
    return tuple(
        Bin(
            confidence=float(confidence[place == b].mean()),
            accuracy=float(right[place == b].mean()),
            num_pairs=int((place == b).sum()),
        )
        for b in range(NUM_BINS)
        if (place == b).any()
    )


def _error_correlation(margins: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float | None]]:
    if not margins:
        return {}
    rows_KK = error_correlation(np.array(list(margins.values())).T)
    return {
        a: {b: None if np.isnan(r) else float(r) for b, r in zip(margins, row_K, strict=True)}
        for a, row_K in zip(margins, rows_KK, strict=True)
    }


def _correlation(a: Floats, b: Floats) -> float | None:
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 0 else None


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def _mean_confusion(routings: Sequence[RoutingReport]) -> dict[str, dict[str, float]]:
    """Shares of each domain's prompts by expert, averaged over seeds."""
    return {
        domain: {e: float(np.mean([r.confusion[domain][e] / r.num_prompts[domain] for r in routings])) for e in row}
        for domain, row in routings[0].confusion.items()
    }


def _length(text: Any) -> int:
    return len(text) if isinstance(text, str) else sum(len(m.get("content") or "") for m in text)
