"""The regression table: paired differences, and words that are true of each recipe."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moreward.data.split import linked_groups
from moreward.evals.accuracy import evaluate
from moreward.evals.routing import routing_report
from moreward.evals.statistics import gains_by_domain
from moreward.registry import find_recipe
from moreward.report import render_change
from moreward.types import Preference, RoutedReward

BITS = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 1)), min_size=24, max_size=60)


def pairs_of(domains: list[int]) -> list[Preference]:
    """Two pairs to a prompt; `domains` by number."""
    return [
        Preference(prompt=f"{d} asks {i // 2}", chosen=f"yes {i}", rejected=f"no {i}", domain=f"d{d}", id=str(i))
        for i, d in enumerate(domains)
    ]


@given(BITS)
def test_the_paired_difference_is_that_of_the_accuracies_and_lies_in_its_interval(
    rows: list[tuple[bool, bool, int]],
) -> None:
    before_B, after_B = (np.array([row[k] for row in rows]) for k in (0, 1))
    pairs = pairs_of([row[2] for row in rows])
    gains = gains_by_domain(before_B, after_B, pairs)
    swapped = gains_by_domain(after_B, before_B, pairs)
    for name, gain in gains.items():
        here = np.array([p.domain == name for p in pairs])
        assert gain.difference == pytest.approx(after_B[here].mean() - before_B[here].mean())
        assert gain.interval.low <= gain.difference + 1e-9
        assert gain.difference <= gain.interval.high + 1e-9
        assert swapped[name].difference == pytest.approx(-gain.difference)


def test_pairing_makes_the_interval_narrower_than_two_apart() -> None:
    """The same pairs are wrong before and after but for one: only that one is in doubt."""
    pairs = pairs_of([0] * 80)
    before_B = np.arange(80) % 2 == 0
    after_B = before_B.copy()
    after_B[1] = True
    gain = gains_by_domain(before_B, after_B, pairs)["d0"]
    assert gain.difference == pytest.approx(1 / 80)
    assert gain.interval.high - gain.interval.low < 0.1, "two intervals of half of 80 would be four times as wide"
    assert len(set(linked_groups(pairs))) == 40


def side_of(right: np.ndarray, pairs: list[Preference]) -> Any:
    experts = ("d0", "d1")
    told = [
        [
            RoutedReward(reward=float(sign * (1 if ok else -1)), expert=p.domain)
            for ok, p in zip(right, pairs, strict=True)
        ]
        for sign in (1, -1)
    ]
    return SimpleNamespace(
        evaluation=evaluate(pairs, *told, experts=experts), routing=routing_report(pairs, *told, experts=experts)
    )


@pytest.mark.parametrize("recipe", ["arliss", "shared_expert"])
def test_what_moved_old_domains_is_told_as_it_is_for_the_recipe(recipe: str) -> None:
    pairs = pairs_of([0] * 40 + [1] * 40)
    before_B = np.ones(80, dtype=bool)
    after_B = np.arange(80) >= 20
    sides = side_of(before_B, pairs), side_of(after_B, pairs)
    gains = gains_by_domain(before_B, after_B, pairs)
    mixes = find_recipe(recipe).mixes  # type: ignore[attr-defined]
    said = " ".join(render_change(*sides, gains, "d1", word="new", mixes=mixes).split())
    assert "Old domains that lost accuracy (d0): beyond the interval (d0)." in said
    assert ("by the router" in said, "by the gate" in said) == (recipe == "arliss", recipe == "shared_expert")
    nothing = gains_by_domain(before_B, before_B, pairs)
    said = " ".join(render_change(sides[0], sides[0], nothing, "d1", word="new", mixes=mixes).split())
    assert "No old domain lost accuracy on these pairs." in said


def test_where_no_old_domain_is_in_the_table_nothing_is_claimed_of_them() -> None:
    pairs = pairs_of([1] * 20)
    right_B = np.ones(20, dtype=bool)
    side = side_of(right_B, pairs)
    gains = gains_by_domain(right_B, right_B, pairs)
    said = render_change(side, side, gains, "d1", word="new", mixes="")
    assert "Of the old domains nothing is known here." in said
    assert "lost" not in said
