"""The rule that says whether a domain deserves its own expert, and what it rests on.

The rule was fixed before it met any data, in these words:

1. **split** where the domain's own probe is more often right on held-out pairs than the pooled probe *and* than the
   pooled control, which has as many parameters as all own probes together. Two-sided sign flips of whole prompt groups;
   the larger of the two p values, with Holm's correction over domains, is below .05.
2. **merge with X** where a probe of both domains is not worse than either's own by 2 points or more: one-sided test in
   both, the larger p value, with Holm's correction over all pairs of domains, below .05.
3. **leave** it with the others where the pooled probe is not worse than its own by 2 points or more; the same test,
   with Holm's correction over domains.
4. **cannot tell** otherwise.

B pairs, M domains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moreward.data.split import linked_groups
from moreward.domains.conflict import Conflict, conflicts
from moreward.domains.material import Pairs
from moreward.domains.probes import NUM_FOLDS, folds, held_out, inputs, own_probes, own_value, pair_probes
from moreward.errors import DataError
from moreward.evals.accuracy import CONFIDENCE, Floats, Interval, Ints
from moreward.evals.compare import holm
from moreward.evals.statistics import (
    Rows,
    bootstrap_means,
    clustered_error,
    difference_interval,
    domain_means,
    paired_p,
    share_interval,
)
from moreward.types import NO_DOMAIN, Preference

MARGIN = 0.02
LEVEL = 1 - CONFIDENCE
MIN_GROUPS = 2 * NUM_FOLDS
SPLIT, MERGE, LEAVE, OPEN = "split", "merge", "leave", "cannot tell"
RULE = (
    "split: on held-out pairs its own probe beats the pooled probe and a pooled probe of as many parameters as all own "
    "ones; the larger p, after Holm over domains, is below .05.",
    "merge with X: one probe for both is not worse than either's own by 2 points or more (one-sided, both domains, "
    "after Holm over all pairs of domains).",
    "leave with the others: the pooled probe is not worse than its own by 2 points or more (one-sided, after Holm over "
    "domains).",
    "cannot tell: none of these is shown. The rule was fixed before it met any data.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A held-out accuracy with its 95 % interval over prompt groups."""

    value: float
    interval: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """What the own probe wins over another: difference, 95 % interval of this one comparison, p by sign flips."""

    value: float
    interval: Interval
    p_value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """`word` is `split`, `merge`, `leave` or `cannot tell`; `partners` are the domains that could share its expert,
    best first, whatever the word. `p_split`, `p_leave` are Holm-adjusted; so are the p values of `partners`."""

    domain: str
    word: str
    partners: Mapping[str, float]
    num_pairs: int
    num_groups: int
    own: Share
    pooled: Share
    control: Share
    over_pooled: Gain
    over_control: Gain
    p_split: float
    p_leave: float


@dataclass(frozen=True, kw_only=True)
class Findings:
    """`transfer[a][b]`: how often a probe that learned `a` is right on held-out pairs of `b`."""

    advice: tuple[Advice, ...]
    transfer: Mapping[str, Mapping[str, Share]]
    conflicts: tuple[Conflict, ...]
    num_inputs: int
    num_parameters: Mapping[str, int]
    seed: int

    def to_json(self) -> dict[str, Any]:
        told = asdict(self)
        told["rule"] = {"margin": MARGIN, "level": LEVEL, "folds": NUM_FOLDS, "words": list(RULE)}
        return told


def check_labels(preferences: Sequence[Preference]) -> None:
    """As `check`, before any vector is computed."""
    groups: dict[str, set[str]] = {}
    for preference, group in zip(preferences, linked_groups(preferences), strict=True):
        groups.setdefault(preference.domain, set()).add(group)
    num_pairs = Counter(p.domain for p in preferences)
    _refuse({name: (num_pairs[name], len(found)) for name, found in sorted(groups.items())})


def check(pairs: Pairs) -> None:
    """DataError with all that makes these pairs unfit, one fault a line."""
    here = [pairs.domain_B == m for m in range(pairs.num_domains)]
    sizes = [(int(of_B.sum()), len(np.unique(pairs.group_B[of_B]))) for of_B in here]
    _refuse(dict(zip(pairs.names, sizes, strict=True)))


def _refuse(size_of: Mapping[str, tuple[int, int]]) -> None:
    """By domain the number of pairs and of prompt groups."""
    faults = []
    if [*size_of] == [NO_DOMAIN]:
        faults.append(
            "No row names a domain. Name the column that does (--domain-key), give a file for each domain, or find "
            "domains with --discover."
        )
    elif len(size_of) == 1:
        faults.append(f"All pairs are of domain {next(iter(size_of))}; at least two are compared. Or use --discover.")
    for name, (num_pairs, num_groups) in size_of.items():
        if num_groups < MIN_GROUPS:
            faults.append(
                f"Domain {name}: {num_pairs:,} pairs of {num_groups} prompt groups; at least {MIN_GROUPS} groups are "
                "needed. Give more, or leave the domain out."
            )
    if faults:
        raise DataError("\n".join(faults))


def advise(pairs: Pairs, *, seed: int = 0) -> Findings:
    """Probes of all kinds, the matrices and the rule. DataError where `check` finds a fault."""
    check(pairs)
    x = inputs(pairs, seed=seed)
    rows = Rows(domain_B=pairs.domain_B, group_B=pairs.group_B)
    fold_B = folds(pairs.group_B, pairs.domain_B, NUM_FOLDS, seed=seed)
    probe_MB = own_probes(x.linear_BK, pairs.domain_B, pairs.group_B, fold_B, seed=seed)
    own_B = own_value(probe_MB, pairs.domain_B)
    pooled_B = held_out(x.linear_BK, pairs.group_B, fold_B, seed=seed)
    control_B = held_out(x.wide_BK, pairs.group_B, fold_B, seed=seed)
    which = [(a, b) for a in range(rows.num_domains) for b in range(a + 1, rows.num_domains)]
    if rows.num_domains == 2:
        both = {(0, 1): pooled_B}
    else:
        both = pair_probes(x.linear_BK, pairs.domain_B, pairs.group_B, fold_B, seed=seed, which=which)
    verdicts = decide(own_B, pooled_B, control_B, rows, both, seed=seed)
    shares = _shares(np.stack([own_B, pooled_B, control_B, *probe_MB]), rows, seed)
    gains = [_gains(own_B - other_B, rows, seed) for other_B in (pooled_B, control_B)]
    advice = tuple(
        Advice(
            domain=name,
            word=verdicts.words[m],
            partners={pairs.names[other]: p for other, p in verdicts.partners[m].items()},
            num_pairs=int((rows.domain_B == m).sum()),
            num_groups=len(np.unique(rows.group_B[rows.domain_B == m])),
            own=shares[0][m],
            pooled=shares[1][m],
            control=shares[2][m],
            over_pooled=gains[0][m],
            over_control=gains[1][m],
            p_split=verdicts.p_split[m],
            p_leave=verdicts.p_leave[m],
        )
        for m, name in enumerate(pairs.names)
    )
    transfer = {
        name: {other: shares[3 + a][b] for b, other in enumerate(pairs.names)} for a, name in enumerate(pairs.names)
    }
    num_inputs = x.linear_BK.shape[1]
    return Findings(
        advice=advice,
        transfer=transfer,
        conflicts=tuple(conflicts(x.linear_BK, pairs.domain_B, pairs.group_B, pairs.names, seed=seed)),
        num_inputs=num_inputs,
        num_parameters={"own": num_inputs * rows.num_domains, "pooled": num_inputs, "control": x.wide_BK.shape[1]},
        seed=seed,
    )


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """The rule's answer for each domain, and the adjusted p values behind it. `partners` by place, best first."""

    words: tuple[str, ...]
    partners: tuple[Mapping[int, float], ...]
    p_split: tuple[float, ...]
    p_leave: tuple[float, ...]


def decide(
    own_B: Floats,
    pooled_B: Floats,
    control_B: Floats,
    rows: Rows,
    both: Mapping[tuple[int, int], Floats],
    *,
    seed: int = 0,
) -> Verdicts:
    """The rule. `own_B`, `pooled_B`, `control_B`: how right each probe is on each held-out pair; `both[a, b]` that of
    the probe of two domains. Two domains that are not in `both` are not considered for a merge."""
    p_split = holm(
        [
            max(p)
            for p in zip(*(_better_p(own_B - other_B, rows, seed) for other_B in (pooled_B, control_B)), strict=True)
        ]
    )
    p_leave = holm(_not_worse_p(own_B - pooled_B, rows))
    not_worse = {which: _not_worse_p(own_B - value_B, rows) for which, value_B in both.items()}
    adjusted = holm([max(p_M[a], p_M[b]) for (a, b), p_M in not_worse.items()]) if not_worse else []
    partners: list[dict[int, float]] = [{} for _ in range(rows.num_domains)]
    for (a, b), p in sorted(zip(not_worse, adjusted, strict=True), key=lambda one: one[1]):
        if p < LEVEL:
            partners[a][b] = partners[b][a] = p
    words = []
    for m in range(rows.num_domains):
        if p_split[m] < LEVEL:
            words.append(SPLIT)
        elif partners[m]:
            words.append(MERGE)
        else:
            words.append(LEAVE if p_leave[m] < LEVEL else OPEN)
    return Verdicts(words=tuple(words), partners=tuple(partners), p_split=tuple(p_split), p_leave=tuple(p_leave))


def _better_p(gain_B: Floats, rows: Rows, seed: int) -> list[float]:
    """Two-sided p of the gain in each domain; 1 where it is not a gain."""
    p_M, _ = paired_p(gain_B, rows, seed=seed)
    return [p if gain > 0 else 1.0 for p, gain in zip(p_M, domain_means(gain_B[None], rows)[0], strict=True)]


def _not_worse_p(loss_B: Floats, rows: Rows) -> list[float]:
    """One-sided p that the mean loss in each domain is `MARGIN` or more, by Student's t over prompt groups."""
    from scipy.special import stdtr

    errors, _ = clustered_error(loss_B, rows)
    loss_M = domain_means(loss_B[None], rows)[0]
    return [
        float(stdtr(max(1, _num_groups(rows, m) - 1), (loss - MARGIN) / error))
        for m, (loss, error) in enumerate(zip(loss_M, errors, strict=True))
    ]


def _num_groups(rows: Rows, m: int) -> int:
    return len(np.unique(rows.group_B[rows.domain_B == m]))


def _shares(value_LB: Floats, rows: Rows, seed: int) -> list[list[Share]]:
    mean_LM = domain_means(value_LB, rows)
    drawn_RLM = bootstrap_means(value_LB, rows, seed=seed)
    found = []
    for s, value_B in enumerate(value_LB):
        errors, _ = clustered_error(value_B, rows)
        found.append(
            [
                Share(
                    value=float(mean_LM[s, m]),
                    interval=share_interval(drawn_RLM[:, s, m], float(mean_LM[s, m]), error, _num_groups(rows, m)),
                )
                for m, error in enumerate(errors)
            ]
        )
    return found


def _gains(gain_B: Floats, rows: Rows, seed: int) -> list[Gain]:
    drawn_RM = bootstrap_means(gain_B[None], rows, seed=seed)[:, 0]
    errors, _ = clustered_error(gain_B, rows)
    p_M, _ = paired_p(gain_B, rows, seed=seed)
    mean_M = domain_means(gain_B[None], rows)[0]
    return [
        Gain(
            value=float(mean_M[m]),
            interval=difference_interval(drawn_RM[:, m], float(mean_M[m]), errors[m], _num_groups(rows, m)),
            p_value=p_M[m],
        )
        for m in range(rows.num_domains)
    ]


def renumbered(label_B: Ints) -> Ints:
    """Numbers from 0 without gaps."""
    _, place_B = np.unique(label_B, return_inverse=True)
    numbers: Ints = place_B.reshape(-1).astype(np.int64)
    return numbers
