"""The books: what becomes of two verdicts, and what the figures say of a judge whose accuracy is known."""

from __future__ import annotations

import itertools
import random

import pytest

from moreward.data.judge.tally import OUTCOMES, Tally, accuracy_if_independent, warnings_of
from moreward.data.judge.verdicts import Verdict

FIRST, SECOND, NEITHER, UNPARSED, FAILED = Verdict


def test_a_label_needs_both_verdicts_to_name_the_same_response() -> None:
    kept = {(FIRST, SECOND): 1, (SECOND, FIRST): 2}
    for both in itertools.product(Verdict, repeat=2):
        tally = Tally()
        assert tally.take(*both, 0) == kept.get(both, 0)
        assert tally.num_pairs == 1
        assert tally.outcomes["kept"] == (both in kept)


@pytest.mark.parametrize(("p", "kept", "accuracy"), [(0.6, 0.52, 0.692), (0.7, 0.58, 0.845), (0.8, 0.68, 0.941)])
def test_the_expected_accuracy_is_that_of_the_independent_judge(p: float, kept: float, accuracy: float) -> None:
    assert accuracy_if_independent(p**2 + (1 - p) ** 2) == pytest.approx(accuracy, abs=5e-4)
    drawn, tally = random.Random(0), Tally()
    for _ in range(20_000):
        straight, swapped = (drawn.random() < p for _ in range(2))  # the first response is the better one
        tally.take(FIRST if straight else SECOND, SECOND if swapped else FIRST, 1)
    told = tally.to_json()
    assert told["kept_share"] == told["agreement"] == pytest.approx(kept, abs=0.01)
    assert told["as_given"]["share"] == pytest.approx(accuracy, abs=0.01)
    assert told["expected_accuracy"] == pytest.approx(accuracy, abs=0.02)
    assert told["first_share"] == pytest.approx(0.5, abs=0.01)
    assert not tally.has_strong_bias


def test_accuracy_is_not_made_up_where_agreement_says_nothing() -> None:
    assert accuracy_if_independent(0.49) is None
    assert accuracy_if_independent(0.5) == 0.5
    assert accuracy_if_independent(1.0) == 1.0
    rewards = Tally(reads_order=False)
    for _ in range(50):
        rewards.take(FIRST, SECOND, 1)
    assert (rewards.agreement, rewards.accuracy) == (1.0, None)
    empty = Tally().to_json()
    assert {empty[k] for k in ("agreement", "first_share", "kept_share", "expected_accuracy")} == {None}


@pytest.mark.parametrize(("verdict", "place"), [(FIRST, "first"), (SECOND, "second")])
def test_a_judge_that_looks_at_the_position_is_found_out(verdict: Verdict, place: str) -> None:
    tally = Tally()
    for _ in range(30):
        assert tally.take(verdict, verdict, 1) == 0
    assert (tally.agreement, tally.accuracy, tally.has_strong_bias) == (0.0, None, True)
    (warning,) = warnings_of({"chat": {"empathy": tally}})
    assert f"chat/empathy: strong position bias. The judge names the reply shown {place} in 100%" in warning
    assert "keeps 0 of 30 pairs" in warning


def test_a_few_pairs_prove_no_bias_and_noise_is_none() -> None:
    few, noise = Tally(), Tally()
    for _ in range(10):
        few.take(FIRST, FIRST, 0)
    for n in range(400):
        noise.take(*[(FIRST, SECOND), (SECOND, FIRST), (FIRST, FIRST), (SECOND, SECOND)][n % 4], 0)
    assert not few.has_strong_bias
    assert not noise.has_strong_bias


def test_a_point_of_which_nothing_is_kept_says_what_happened_most() -> None:
    tally = Tally()
    for both in [(UNPARSED, FIRST), (UNPARSED, UNPARSED), (NEITHER, FIRST), (FAILED, UNPARSED)]:
        tally.take(*both, 0)
    (warning,) = warnings_of({"chat": {"logic": tally}})
    assert warning == f"chat/logic: none of 4 pairs is kept; most often (2): {OUTCOMES['unparsed']}"
    assert sum(tally.to_json()["outcomes"].values()) == 4
