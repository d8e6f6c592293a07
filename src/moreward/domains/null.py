"""How often the rule is wrong: it is asked of labels that mean nothing, and of a conflict that was made.

- `shuffled`: the domains' labels are given to other prompt groups by chance. Every `split` is wrong.
- `halves`: one domain is divided in two by chance. Every `split` is wrong.
- `opposed`: as `halves`, and in one half chosen and rejected change places. `split` is right, `merge` wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from moreward.domains.advice import LEAVE, LEVEL, MERGE, OPEN, SPLIT, decide, renumbered
from moreward.domains.conflict import shuffled
from moreward.domains.material import Pairs
from moreward.domains.probes import NUM_FOLDS, folds, held_out, inputs, own_probes, own_value
from moreward.evals.accuracy import Interval, wilson_interval
from moreward.evals.statistics import Rows

WORDS = (SPLIT, MERGE, LEAVE, OPEN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """`num_draws` divisions into domains: how often each word was said of a domain, and in how many divisions `split`
    was said of at least one (with Wilson's 95 % interval)."""

    num_draws: int
    num_domains: int
    words: Mapping[str, int]
    num_with_split: int
    interval: Interval

    @property
    def share(self) -> float:
        return self.num_with_split / self.num_draws


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorRates:
    """By the name of the simulation; `halves` and `opposed` over all domains together."""

    level: float
    rates: Mapping[str, Rate]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def simulate(
    pairs: Pairs, *, num_draws: int, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> ErrorRates:
    """`num_draws` divisions of each kind (of halves, taken from the domains in turn).

    Merges are not considered among shuffled labels, as every one of them would be right.
    """
    num_done = 0

    def tick() -> None:
        nonlocal num_done
        num_done += 1
        if progress is not None:
            progress(num_done, 3 * num_draws)

    generator = np.random.default_rng([seed, 3])
    said: dict[str, list[tuple[str, ...]]] = {"shuffled": [], "halves": [], "opposed": []}
    x = inputs(pairs, seed=seed)
    fold_B = folds(pairs.group_B, pairs.domain_B, NUM_FOLDS, seed=seed)
    pooled_B = held_out(x.linear_BK, pairs.group_B, fold_B, seed=seed)
    control_B = held_out(x.wide_BK, pairs.group_B, fold_B, seed=seed)
    for _ in range(num_draws):
        label_B = shuffled(pairs.domain_B, pairs.group_B, generator)
        rows = Rows(domain_B=renumbered(label_B), group_B=pairs.group_B)
        probe_MB = own_probes(x.linear_BK, rows.domain_B, pairs.group_B, fold_B, seed=seed)
        verdicts = decide(own_value(probe_MB, rows.domain_B), pooled_B, control_B, rows, {}, seed=seed)
        said["shuffled"].append(verdicts.words)
        tick()
    for kind in ("halves", "opposed"):
        for i in range(num_draws):
            said[kind].append(_halves(pairs, i % pairs.num_domains, generator, is_opposed=kind == "opposed", seed=seed))
            tick()
    return ErrorRates(level=LEVEL, rates={kind: _rate(words) for kind, words in said.items()})


def _halves(pairs: Pairs, m: int, generator: np.random.Generator, *, is_opposed: bool, seed: int) -> tuple[str, ...]:
    """What the rule says of two random halves of domain m."""
    of_M = pairs.domain_B == m
    group_B = renumbered(pairs.group_B[of_M])
    half_B = generator.permutation(int(group_B.max()) + 1)[group_B] % 2
    chosen_BD, rejected_BD = pairs.chosen_BD[of_M], pairs.rejected_BD[of_M]
    if is_opposed:
        swapped_B1 = (half_B == 1)[:, None]
        chosen_BD, rejected_BD = (
            np.where(swapped_B1, rejected_BD, chosen_BD),
            np.where(swapped_B1, chosen_BD, rejected_BD),
        )
    two = replace(
        pairs,
        names=("a", "b"),
        domain_B=half_B,
        group_B=group_B,
        chosen_BD=chosen_BD,
        rejected_BD=rejected_BD,
        prompt_BD=pairs.prompt_BD[of_M],
    )
    x = inputs(two, seed=seed)
    fold_B = folds(group_B, half_B, NUM_FOLDS, seed=seed)
    own_B = own_value(own_probes(x.linear_BK, half_B, group_B, fold_B, seed=seed), half_B)
    pooled_B = held_out(x.linear_BK, group_B, fold_B, seed=seed)
    control_B = held_out(x.wide_BK, group_B, fold_B, seed=seed)
    rows = Rows(domain_B=half_B, group_B=group_B)
    return decide(own_B, pooled_B, control_B, rows, {(0, 1): pooled_B}, seed=seed).words


def _rate(said: list[tuple[str, ...]]) -> Rate:
    counts = Counter(word for words in said for word in words)
    num_with_split = sum(SPLIT in words for words in said)
    return Rate(
        num_draws=len(said),
        num_domains=max(map(len, said)),
        words={word: counts[word] for word in WORDS},
        num_with_split=num_with_split,
        interval=wilson_interval(num_with_split / len(said), len(said)),
    )
