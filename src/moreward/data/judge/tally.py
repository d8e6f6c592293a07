"""How well a judge agrees with itself, per task and point, and what of its work can be used."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from moreward.data.judge.verdicts import Verdict

FEWEST_FOR_BIAS = 20
"""Pairs with two clear verdicts before the position's influence is spoken of."""
STRONG_SHARE = 0.15
STRONG_Z = 2.6
"""A bias is strong where the share of first replies is this far from a half and chance is unlikely (two-sided p < .01,
sign test of the pairs judged by position)."""


def accuracy_if_independent(agreement: float) -> float | None:
    """The accuracy of kept labels, p²/(p² + (1−p)²), of a judge that is right with probability p in each order,
    independently, and so agrees with itself with probability p² + (1−p)². None below ½, which no such judge has."""
    if agreement < 0.5:
        return None
    p = (1 + math.sqrt(2 * agreement - 1)) / 2
    return p**2 / agreement


@dataclass(slots=True)
class Tally:
    """The books of one point: `outcomes` of pairs, `verdicts` of questions. `reads_order` is false for rewards, which
    cannot know which reply came first."""

    reads_order: bool = True
    outcomes: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[Verdict] = field(default_factory=Counter)
    num_compared: int = 0
    num_as_given: int = 0

    def take(self, straight: Verdict, swapped: Verdict, given: int) -> int:
        """Enter a pair's verdicts in both orders; the better of the pair, 1 or 2, or 0 where it is discarded."""
        self.verdicts.update((straight, swapped))
        outcome = _outcome(straight, swapped)
        self.outcomes[outcome] += 1
        if outcome != "kept":
            return 0
        better = 1 if straight is Verdict.FIRST else 2
        if given:
            self.num_compared += 1
            self.num_as_given += better == given
        return better

    @property
    def num_pairs(self) -> int:
        return self.outcomes.total()

    @property
    def agreement(self) -> float | None:
        """Of the pairs with two clear verdicts, the share in which both name the same response."""
        kept = self.outcomes["kept"]
        return _share(kept, kept + self.outcomes["first_twice"] + self.outcomes["second_twice"])

    @property
    def first_share(self) -> float | None:
        """Of the clear verdicts, the share that names the reply shown first: a half without a bias."""
        first, second = (self.verdicts[v] for v in (Verdict.FIRST, Verdict.SECOND))
        return _share(first, first + second)

    @property
    def accuracy(self) -> float | None:
        if self.agreement is None or not self.reads_order or self.has_strong_bias:
            return None
        return accuracy_if_independent(self.agreement)

    @property
    def has_strong_bias(self) -> bool:
        first, second, share = self.outcomes["first_twice"], self.outcomes["second_twice"], self.first_share
        num_clear = self.outcomes["kept"] + first + second
        if share is None or num_clear < FEWEST_FOR_BIAS or abs(share - 0.5) < STRONG_SHARE:
            return False
        return abs(first - second) >= STRONG_Z * math.sqrt(first + second)

    def to_json(self) -> dict[str, Any]:
        kept, verdicts = self.outcomes["kept"], {str(verdict): self.verdicts[verdict] for verdict in Verdict}
        outcomes = {name: self.outcomes[name] for name in OUTCOMES}
        return {
            "pairs": self.num_pairs,
            "asked": self.verdicts.total(),
            "outcomes": outcomes,
            "verdicts": verdicts,
            "agreement": self.agreement,
            "first_share": self.first_share,
            "strong_position_bias": self.has_strong_bias,
            "parse_failures": self.verdicts[Verdict.UNPARSED],
            "kept_share": _share(kept, self.num_pairs),
            "discarded_share": _share(self.num_pairs - kept, self.num_pairs),
            "expected_accuracy": self.accuracy,
            "as_given": {"pairs": self.num_compared, "share": _share(self.num_as_given, self.num_compared)},
        }


OUTCOMES: Mapping[str, str] = {
    "kept": "both verdicts name the same response",
    "first_twice": "the reply shown first, in both orders",
    "second_twice": "the reply shown second, in both orders",
    "undecided": "at least one verdict is that neither is better",
    "unparsed": "at least one answer holds no verdict",
    "failed": "at least one question got no answer",
}
"""What becomes of a pair: the last that applies, in this order of the file."""


def _outcome(straight: Verdict, swapped: Verdict) -> str:
    both = {straight, swapped}
    for verdict, outcome in _SPOILT.items():
        if verdict in both:
            return outcome
    if len(both) == 2:
        return "kept"
    return "first_twice" if straight is Verdict.FIRST else "second_twice"


_SPOILT = {Verdict.FAILED: "failed", Verdict.UNPARSED: "unparsed", Verdict.NEITHER: "undecided"}


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a labelling job found. `notes` say what was left out; `warnings` what should worry."""

    judge: str
    tallies: Mapping[str, Mapping[str, Tally]]
    sent: int
    cached: int
    notes: list[str]
    warnings: list[str]

    @property
    def num_kept(self) -> int:
        return sum(t.outcomes["kept"] for points in self.tallies.values() for t in points.values())

    def to_json(self) -> dict[str, Any]:
        tasks = {task: {point: t.to_json() for point, t in points.items()} for task, points in self.tallies.items()}
        beside = {key: value for key, value in asdict(self).items() if key != "tallies"}
        return {"schema": 1, **beside, "labels": self.num_kept, "tasks": tasks}


def warnings_of(tallies: Mapping[str, Mapping[str, Tally]]) -> list[str]:
    """A sentence on each point whose labels should worry."""
    named = {f"{task}/{point}": tally for task, points in tallies.items() for point, tally in points.items()}
    return [sentence for name, tally in named.items() if (sentence := _warning(name, tally))]


def _warning(name: str, tally: Tally) -> str:
    kept, pairs, share = tally.outcomes["kept"], tally.num_pairs, tally.first_share
    if tally.has_strong_bias and share is not None:
        place = "first" if share > 0.5 else "second"
        part = max(share, 1 - share)
        return (
            f"{name}: strong position bias. The judge names the reply shown {place} in {part:.0%} of its clear "
            f"verdicts, so it keeps {kept} of {pairs} pairs, and their accuracy cannot be told from agreement"
        )
    if pairs and not kept:
        most = max((o for o in OUTCOMES if o != "kept"), key=lambda o: tally.outcomes[o])
        return f"{name}: none of {pairs} pairs is kept; most often ({tally.outcomes[most]}): {OUTCOMES[most]}"
    if tally.agreement is not None and tally.agreement < 0.5 and pairs >= FEWEST_FOR_BIAS:
        return f"{name}: the judge agrees with itself in {tally.agreement:.0%} of pairs, less than a coin would"
    return ""
