"""Evaluate a trained run on preference pairs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moreward.calibration import EVERYONE, before_and_after, tempered
from moreward.data.batches import side
from moreward.errors import DataError
from moreward.evals.accuracy import Correct, Cost, Evaluation, correct_pairs, evaluate
from moreward.evals.diversity import Diversity, diversity_report
from moreward.evals.routing import RoutingReport, routing_report
from moreward.scoring import Scorer
from moreward.types import Preference, RoutedReward


@dataclass(frozen=True, kw_only=True)
class Result:
    """One system's evaluation; `correct[i]` belongs to `preferences[i]`. `too_long` counts pairs left out.
    `diversity` is None where there are no members, or experts were not asked. `calibration` is ECE and Brier score
    without and with the run's temperatures, None for a run that has none."""

    preferences: list[Preference]
    evaluation: Evaluation
    routing: RoutingReport
    correct: Correct
    too_long: Mapping[str, int]
    diversity: Diversity | None = None
    calibration: Mapping[str, Any] | None = None


def evaluate_run(
    scorer: Scorer, preferences: Sequence[Preference], *, seed: int = 0, every_expert: bool = False
) -> Result:
    """Score both sides of every pair under the router, an oracle and a random router, and measure.

    Pairs beyond the model's limit are left out and counted per domain, unless the run truncates. `every_expert` asks
    all experts of every pair, for the diversity report, which costs as many passes more; an ensemble's members are
    asked anyway.
    """
    kept, too_long = within_limit(scorer, preferences)
    started = time.monotonic()
    items = [side(p, which) for p in kept for which in ("chosen", "rejected")]
    routed = scorer.score_routes(items, seed=seed)
    seconds = time.monotonic() - started
    chosen, rejected = routed[::2], routed[1::2]
    cost = Cost(
        parameters_stored=scorer.system.num_parameters(),
        parameters_active=scorer.system.num_active_parameters(),
        seconds=seconds,
        num_pairs=len(kept),
    )
    ask = every_expert and not scorer.system.member_labels
    told = [r.expert_rewards for r in (scorer.score(items, explain=True) if ask else routed)]
    return Result(
        preferences=kept,
        evaluation=evaluate(kept, chosen, rejected, experts=scorer.experts, cost=cost),
        routing=routing_report(kept, chosen, rejected, experts=scorer.experts),
        correct=correct_pairs(chosen, rejected),
        too_long=too_long,
        diversity=diversity_report(kept, told[::2], told[1::2]),
        calibration=_calibration(scorer, kept, chosen, rejected),
    )


def _calibration(
    scorer: Scorer, preferences: Sequence[Preference], chosen: Sequence[RoutedReward], rejected: Sequence[RoutedReward]
) -> dict[str, Any] | None:
    """By domain and for `all`: ECE and Brier score of σ(margin), before, and of σ(margin / temperature), after."""
    found = scorer.find_calibration()
    if found is None:
        return None
    pairs = list(zip(chosen, rejected, strict=True))
    margin_B = np.array([c.reward - r.reward for c, r in pairs], dtype=np.float64)
    expert_B = [c.expert if c.expert == r.expert else EVERYONE for c, r in pairs]
    tempered_B = tempered(margin_B, expert_B, found.temperatures)
    return before_and_after(margin_B, tempered_B, [p.domain for p in preferences])


def within_limit(scorer: Scorer, preferences: Sequence[Preference]) -> tuple[list[Preference], dict[str, int]]:
    """The pairs that fit, and how many of each domain do not. DataError when a domain is left with none."""
    if scorer.on_long == "truncate":
        return list(preferences), {}
    fits = [not any(e.truncated for e in scorer.encoder.pair(p)) for p in preferences]
    kept = [p for p, ok in zip(preferences, fits, strict=True) if ok]
    too_long = Counter(p.domain for p, ok in zip(preferences, fits, strict=True) if not ok)
    empty = set(too_long) - {p.domain for p in kept}
    if empty:
        raise DataError(
            f"domains {sorted(empty)} have no pair within {scorer.encoder.max_length} tokens. Allow truncation "
            "(--truncate)."
        )
    return kept, dict(too_long)
