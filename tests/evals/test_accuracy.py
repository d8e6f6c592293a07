"""Accuracy per domain against slow loops, hand-counted cases and simulated worlds with a known truth."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moreward.errors import DataError, NonFiniteError
from moreward.evals.accuracy import (
    Cost,
    Evaluation,
    accuracy_interval,
    calibration_error,
    correct_pairs,
    domain_correlation,
    effective_rows,
    evaluate,
    mean_interval,
    metrics,
    wilson_interval,
)
from moreward.types import Preference, RoutedReward

Row = tuple[str, str, float, float]  # domain, prompt, reward of the chosen, reward of the rejected


def evaluated(rows: list[Row]) -> Evaluation:
    preferences = [Preference(prompt=prompt, chosen="yes", rejected="no", domain=domain) for domain, prompt, *_ in rows]
    chosen = [RoutedReward(reward=c) for *_, c, _ in rows]
    rejected = [RoutedReward(reward=j) for *_, j in rows]
    return evaluate(preferences, chosen, rejected)


def with_accuracy(domain: str, num_right: int, num_rows: int) -> list[Row]:
    return [(domain, f"{domain} {i}", float(i < num_right), 0.5) for i in range(num_rows)]


some_rows = st.lists(
    st.tuples(
        st.sampled_from(["chat", "code", "math"]),
        st.sampled_from("abcdefgh"),
        st.integers(-2, 2).map(float),
        st.integers(-2, 2).map(float),
    ),
    min_size=1,
    max_size=40,
)


# ---- accuracy --------------------------------------------------------------------------------------------------


@given(some_rows)
@settings(max_examples=60, deadline=None)
def test_accuracy_and_ties_equal_a_slow_count(rows: list[Row]) -> None:
    evaluation = evaluated(rows)
    shares = []
    for domain in {row[0] for row in rows}:
        own = [row for row in rows if row[0] == domain]
        measures = evaluation.domains[domain]
        shares.append(sum(c > j for *_, c, j in own) / len(own))
        assert measures.accuracy == pytest.approx(shares[-1])
        assert measures.num_ties == sum(c == j for *_, c, j in own)
        assert measures.num_pairs == len(own)
        assert measures.num_groups == len({prompt for _, prompt, *_ in own})
        assert measures.accuracy in measures.interval
    assert evaluation.macro.accuracy == pytest.approx(sum(shares) / len(shares))
    assert evaluation.macro.accuracy in evaluation.macro.interval
    assert evaluation.micro.accuracy == pytest.approx(sum(c > j for *_, c, j in rows) / len(rows))


@given(some_rows, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_order_of_the_rows_changes_nothing(rows: list[Row], random: Random) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)
    before, after = metrics(evaluated(rows)), metrics(evaluated(shuffled))
    assert list(before) == list(after)
    assert list(before.values()) == pytest.approx(list(after.values()), abs=1e-9)


def test_a_perfect_scorer_gets_one_and_its_opposite_zero() -> None:
    generator = np.random.default_rng(0)
    rank = [generator.permutation(4)[:2] for _ in range(50)]  # rank 1 is best, so the reward is -rank
    rows = [("d", str(i), -float(min(pair)), -float(max(pair))) for i, pair in enumerate(rank)]
    turned = [(domain, prompt, -c, -j) for domain, prompt, c, j in rows]
    assert evaluated(rows).domains["d"].accuracy == evaluated(rows).macro.accuracy == 1.0
    assert evaluated(turned).domains["d"].accuracy == evaluated(turned).macro.accuracy == 0.0


def test_a_tie_is_wrong_for_a_scorer_and_for_its_opposite() -> None:
    rows = [("d", "a", 1.0, 1.0), ("d", "b", 2.0, 1.0)]
    turned = [(domain, prompt, -c, -j) for domain, prompt, c, j in rows]
    assert evaluated(rows).micro.accuracy == 0.5
    assert evaluated(turned).micro.accuracy == 0.0
    assert evaluated(rows).micro.num_ties == evaluated(turned).micro.num_ties == 1


def test_a_constant_scorer_is_wrong_everywhere_and_all_tied() -> None:
    evaluation = evaluated([("d", str(i), 0.0, 0.0) for i in range(7)])
    assert (evaluation.micro.accuracy, evaluation.micro.num_ties) == (0.0, 7)


def test_four_candidates_counted_by_hand() -> None:
    # True order a > b > c > d; the system says b > a > c = d. Of six pairs: ab wrong, cd tied, four right.
    reward = {"a": 2.0, "b": 3.0, "c": 1.0, "d": 1.0}
    rows = [("d", "one prompt", reward[x], reward[y]) for x, y in ("ab", "ac", "ad", "bc", "bd", "cd")]
    measures = evaluated(rows).domains["d"]
    assert (measures.num_pairs, measures.num_groups, measures.num_ties) == (6, 1, 1)
    assert measures.accuracy == pytest.approx(4 / 6)
    assert measures.margin == pytest.approx((-1 + 1 + 1 + 2 + 2 + 0) / 6)


def test_correct_pairs_agree_with_the_evaluation() -> None:
    chosen, rejected = [RoutedReward(reward=r) for r in (1.0, 2.0, 3.0)], [RoutedReward(reward=2.0)] * 3
    assert correct_pairs(chosen, rejected).tolist() == [False, False, True]


# ---- intervals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "rows"), [(81, 263), (15, 148), (0, 20), (1, 29), (29, 29), (0, 1), (1, 1)])
def test_with_one_row_per_group_the_interval_is_plain_wilson(right: int, rows: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(right, rows).proportion_ci(method="wilson")
    interval = evaluated(with_accuracy("d", right, rows)).domains["d"].interval
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("right", [0, 3, 14, 20])
def test_copies_of_rows_make_the_interval_no_narrower(right: int) -> None:
    rows = with_accuracy("d", right, 20)
    once, copied = evaluated(rows).micro.interval, evaluated(rows * 5).micro.interval
    assert copied.low <= once.low + 1e-12
    assert copied.high >= once.high - 1e-12
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high), abs=0.03)


@pytest.mark.parametrize(("right", "design_effect"), [([2, 1, 0], (3 / 2) * (4 / 3) * (7 / 8)), ([1, 1, 1], 1.0)])
def test_effective_rows_by_hand(right: list[int], design_effect: float) -> None:
    # Three groups of two rows, half of all right. Squares of the groups 2 (or 0) + 1, of the rows 1.5 + .5; then
    # groups / (groups - 1) over rows / (rows - 1), with one group of two rows added; Student's t at 5 and 2.
    correct = np.array([i < number for number in right for i in range(2)])
    found = effective_rows(correct, np.arange(3).repeat(2))
    assert found == pytest.approx(6 / design_effect * (2.570582 / 4.302653) ** 2, rel=1e-6)


def test_one_group_tells_no_more_than_one_row() -> None:
    assert evaluated([("d", "a", 1.0, 0.0)] * 50).micro.interval == evaluated([("d", "a", 1.0, 0.0)]).micro.interval


def draw_clustered(generator: np.random.Generator, accuracy: float) -> tuple[np.ndarray, np.ndarray]:
    """40 prompts of 1 to 8 pairs; prompts differ in difficulty (correlation .4 within a prompt)."""
    difficulty = generator.beta(accuracy * 1.5, (1 - accuracy) * 1.5, 40)
    group = np.repeat(np.arange(40), generator.integers(1, 9, 40))
    return generator.random(len(group)) < difficulty[group], group


@pytest.mark.parametrize("accuracy", [0.5, 0.8, 0.95])
def test_clustered_intervals_cover_the_truth_where_plain_ones_do_not(accuracy: float) -> None:
    generator = np.random.default_rng(1)
    draws = [draw_clustered(generator, accuracy) for _ in range(400)]
    clustered = np.mean([accuracy in accuracy_interval(correct, group) for correct, group in draws])
    plain = np.mean([accuracy in wilson_interval(float(correct.mean()), len(correct)) for correct, _ in draws])
    assert 0.91 < clustered < 0.99
    assert plain < 0.87


def test_intervals_from_few_prompts_are_wide_enough() -> None:
    generator, hits = np.random.default_rng(8), []
    for _ in range(600):
        group = np.arange(5).repeat(60)
        hits.append(0.5 in accuracy_interval(generator.random(300) < generator.beta(2, 2, 5)[group], group))
    assert np.mean(hits) > 0.93


@pytest.mark.parametrize("is_shared", [False, True])
def test_the_interval_of_the_mean_covers_it_also_when_domains_share_prompts(is_shared: bool) -> None:
    from scipy.special import betaincinv

    generator, truth, hits = np.random.default_rng(2), np.array([0.6, 0.8, 0.97]), []
    for _ in range(300):
        ease_DG = generator.random((3, 40))
        ease_DG = ease_DG[:1].repeat(3, 0) if is_shared else ease_DG
        correct_D = [
            generator.random(120) < betaincinv(2 * p, 2 * (1 - p), ease_DG[d]).repeat(3) for d, p in enumerate(truth)
        ]
        group_D = [np.arange(40).repeat(3) + (0 if is_shared else 40 * d) for d in range(3)]
        correlation = domain_correlation(
            np.concatenate(correct_D) * 1.0, np.arange(3).repeat(120), np.concatenate(group_D)
        )
        intervals = [accuracy_interval(c, g) for c, g in zip(correct_D, group_D, strict=True)]
        hits.append(truth.mean() in mean_interval([float(c.mean()) for c in correct_D], intervals, correlation))
        assert is_shared or np.array_equal(correlation, np.eye(3))
    assert 0.91 < np.mean(hits) < 0.99


def test_sharing_all_prompts_widens_the_interval_of_the_mean() -> None:
    apart = evaluated([(d, d + str(i), float(i % 4 > 0), 0.5) for d in "xy" for i in range(80)]).macro
    shared = evaluated([(d, str(i), float(i % 4 > 0), 0.5) for d in "xy" for i in range(80)]).macro
    assert (apart.num_groups, shared.num_groups) == (160, 80)
    assert shared.interval.high - shared.interval.low > 1.3 * (apart.interval.high - apart.interval.low)


def test_groups_that_share_a_prompt_are_one_cluster() -> None:
    pairs = [
        Preference(prompt=f"prompt {i // 2}", chosen="good", rejected="bad", group=f"annotator {i % 2}")
        for i in range(8)
    ]
    apart = [dataclasses.replace(p, prompt=f"prompt {i}") for i, p in enumerate(pairs)]
    chosen, rejected = [RoutedReward(reward=float(i % 3)) for i in range(8)], [RoutedReward(reward=0.5)] * 8
    linked, by_annotator = (evaluate(rows, chosen, rejected).micro for rows in (pairs, apart))
    assert (linked.num_groups, by_annotator.num_groups) == (1, 2), "two annotators of one prompt hang together"
    whole = evaluate([dataclasses.replace(p, group="all") for p in pairs], chosen, rejected).micro
    assert linked == whole


def test_with_a_single_domain_the_means_are_that_domain() -> None:
    evaluation = evaluated(with_accuracy("d", 30, 40))
    interval = evaluation.domains["d"].interval
    assert dataclasses.replace(evaluation.macro, interval=interval) == evaluation.domains["d"]
    assert dataclasses.astuple(evaluation.macro.interval) == pytest.approx(dataclasses.astuple(interval))
    assert evaluation.micro == evaluation.domains["d"]


# ---- flags -----------------------------------------------------------------------------------------------------


def test_flags_fire_at_half_and_near_one_and_leave_the_headline_mean() -> None:
    rows = with_accuracy("hellaswag", 250, 500) + with_accuracy("dahoas", 499, 500) + with_accuracy("chat", 350, 500)
    evaluation = evaluated(rows)
    assert evaluation.domains["hellaswag"].flags == ("chance",)
    assert evaluation.domains["dahoas"].flags == ("saturated",)
    assert evaluation.domains["chat"].flags == ()
    assert evaluation.macro.accuracy == pytest.approx((0.5 + 0.998 + 0.7) / 3)
    assert evaluation.unflagged == evaluation.domains["chat"]


def test_without_an_unflagged_domain_there_is_no_headline_mean() -> None:
    evaluation = evaluated(with_accuracy("x", 50, 100) + with_accuracy("y", 100, 100))
    assert evaluation.unflagged is None
    assert "eval/accuracy_without_flagged" not in metrics(evaluation)


# ---- what else is measured -------------------------------------------------------------------------------------


def test_longer_rule_counts_characters_and_halves_for_ties() -> None:
    texts = [("aaaa", "bb"), ("a", "bb"), ("aa", "bb")]
    talk = ({"role": "assistant", "content": "four"}, {"role": "assistant", "content": "four"})
    preferences = [Preference(prompt="p", chosen=c, rejected=j) for c, j in [*texts, (talk, "seven..")]]
    rewards = [RoutedReward(reward=0.0)] * 4
    assert evaluate(preferences, rewards, rewards).micro.longer_rule == (1 + 0 + 0.5 + 1) / 4


def test_oracle_and_random_are_none_as_soon_as_one_pair_or_domain_lacks_them() -> None:
    preferences = [Preference(prompt=str(i), chosen="c", rejected="j", domain=d) for i, d in enumerate("xxyy")]
    chosen = [RoutedReward(reward=0.0, oracle=o, random=r) for o, r in [(1, 1), (-1, -1), (1, -1), (None, 1)]]
    rejected = [RoutedReward(reward=0.0, oracle=0.0, random=0.0)] * 4
    evaluation = evaluate(preferences, chosen, rejected)
    assert [evaluation.domains[d].oracle for d in "xy"] == [0.5, None]
    assert [evaluation.domains[d].random for d in "xy"] == [0.5, 0.5]
    assert (evaluation.macro.oracle, evaluation.micro.oracle) == (None, None)
    assert (evaluation.macro.random, evaluation.micro.random) == (0.5, 0.5)
    assert "eval/y/oracle" not in metrics(evaluation)


def test_a_pair_is_truncated_once_even_if_both_responses_are() -> None:
    preferences = [Preference(prompt=str(i), chosen="c", rejected="j") for i in range(4)]
    cut, whole = RoutedReward(reward=0.0, truncated=True), RoutedReward(reward=1.0)
    assert evaluate(preferences, [cut, cut, whole, whole], [cut, whole, cut, whole]).micro.num_truncated == 3


def test_brier_is_a_quarter_for_ties_and_finite_for_huge_margins() -> None:
    assert evaluated([("d", "a", 1.0, 1.0)]).micro.brier == pytest.approx(0.25)
    assert evaluated([("d", "a", 1e6, -1e6)]).micro.brier == pytest.approx(0.0)
    assert evaluated([("d", "a", -1e6, 1e6)]).micro.brier == pytest.approx(1.0)


def test_calibration_error_by_hand() -> None:
    # Confidence .9 falls in one bin: three of four right, so the bin is off by .15; a tie is exactly right.
    margin = np.log(9.0)
    assert calibration_error(np.array([margin, margin, margin, -margin])) == pytest.approx(0.15)
    assert calibration_error(np.array([0.0, 0.0])) == pytest.approx(0.0)
    # Two bins, one too sure (.9, half right) and one not sure enough (.6, all right), do not cancel.
    low = np.log(1.5)
    assert calibration_error(np.array([margin, -margin, low, low])) == pytest.approx(0.4)


def test_calibration_error_is_small_for_true_margins_and_large_for_inflated_ones() -> None:
    generator = np.random.default_rng(3)
    size = np.abs(generator.normal(0, 1.5, 40_000))
    margin = np.where(generator.random(40_000) < 1 / (1 + np.exp(-size)), size, -size)
    assert calibration_error(margin) < 0.02
    assert calibration_error(4 * margin) > 0.1


# ---- what leaves -----------------------------------------------------------------------------------------------


def test_two_data_sets_do_not_overwrite_each_other() -> None:
    # Names made to collide: with each other's paths, and with the names of the means.
    names = ["hh", "hh/test", "accuracy", "macro", ""]
    rows = [row for k, name in enumerate(names) for row in with_accuracy(name, 2 * k + 1, 11)]
    evaluation = evaluated(rows)
    found, plain = metrics(evaluation), evaluation.to_json()
    for k, name in enumerate(names):
        assert found[f"eval/{name}/accuracy"] == pytest.approx((2 * k + 1) / 11)
        assert plain["domains"][name]["accuracy"] == pytest.approx((2 * k + 1) / 11)
    assert found["eval/accuracy"] == plain["macro"]["accuracy"] == pytest.approx(5 / 11)


def test_json_is_plain_and_holds_the_cost() -> None:
    preferences = [Preference(prompt="p", chosen="c", rejected="j", domain="x")]
    rewards = [RoutedReward(reward=1.0)]
    cost = Cost(parameters_stored=10, parameters_active=5, seconds=2.5, num_pairs=1)
    plain = evaluate(preferences, rewards, rewards, experts=("x", "y"), cost=cost).to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["cost"] == {"parameters_stored": 10, "parameters_active": 5, "seconds": 2.5, "num_pairs": 1}
    assert plain["experts"] == ["x", "y"]


# ---- faults ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_is_named(bad: float) -> None:
    preferences = [Preference(prompt="p", chosen="c", rejected="j", id=f"row-{i}") for i in range(2)]
    good = RoutedReward(reward=0.0)
    with pytest.raises(NonFiniteError, match="row-1"):
        evaluate(preferences, [good, good], [good, RoutedReward(reward=bad)])
    with pytest.raises(NonFiniteError, match="row-0"):
        evaluate(preferences, [RoutedReward(reward=0.0, oracle=bad), good], [good, good])


def test_nothing_to_evaluate_and_unequal_lengths_are_refused() -> None:
    preference, reward = Preference(prompt="p", chosen="c", rejected="j"), RoutedReward(reward=0.0)
    with pytest.raises(DataError, match="0 preferences"):
        evaluate([], [], [])
    with pytest.raises(ValueError, match="1 preferences, 2 chosen and 1 rejected"):
        evaluate([preference], [reward, reward], [reward])


def test_importing_the_evaluation_layer_loads_nothing_heavy() -> None:
    code = (
        "import sys, moreward.report, moreward.evals.compare, moreward.evals.routing;"
        "print(sorted({'torch', 'scipy', 'rich', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
