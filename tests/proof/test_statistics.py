"""What a report's numbers rest on, against scipy, brute force and worlds whose truth is known."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moreward.evals.statistics import (
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


def rows_of(domains: list[int], groups: list[int]) -> Rows:
    return Rows(domain_B=np.unique(domains, return_inverse=True)[1], group_B=np.unique(groups, return_inverse=True)[1])


some_rows = st.lists(
    st.tuples(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0]), st.integers(0, 1), st.integers(0, 5)),
    min_size=2,
    max_size=12,
)


@given(some_rows)
@settings(max_examples=40, deadline=None)
def test_p_values_are_those_of_trying_all_signs_of_whole_groups(given_rows: list[tuple[float, int, int]]) -> None:
    gain_B, domains, groups = (list(column) for column in zip(*given_rows, strict=True))
    rows = rows_of(domains, groups)
    by_domain, overall = paired_p(np.array(gain_B), rows)

    def brute(weight_B: np.ndarray) -> float:
        part_G = np.bincount(rows.group_B, np.array(gain_B) * weight_B, minlength=rows.num_groups)
        outcomes = [abs(float(np.dot(part_G, signs))) for signs in product((-1, 1), repeat=rows.num_groups)]
        return float(np.mean(np.array(outcomes) >= abs(part_G.sum()) - 1e-12))

    size_D = np.bincount(rows.domain_B)
    assert overall == pytest.approx(brute(1 / size_D[rows.domain_B]))
    for d in range(rows.num_domains):
        assert by_domain[d] == pytest.approx(brute((rows.domain_B == d) * 1.0))


def test_the_bootstrap_draws_the_same_groups_for_every_system_and_keeps_domains() -> None:
    generator = np.random.default_rng(1)
    rows = rows_of([0] * 60 + [1] * 40, list(generator.integers(0, 15, 60)) + list(20 + generator.integers(0, 10, 40)))
    value_LB = generator.random((1, 100)).repeat(2, axis=0)
    drawn_RLD = bootstrap_means(value_LB, rows, num_resamples=300)
    assert drawn_RLD.shape == (300, 2, 2)
    assert np.array_equal(drawn_RLD[:, 0], drawn_RLD[:, 1])
    assert np.isfinite(drawn_RLD).all()
    again = bootstrap_means(value_LB, rows, num_resamples=300)
    assert np.array_equal(drawn_RLD, again)
    np.testing.assert_allclose(drawn_RLD.mean(0), domain_means(value_LB, rows), atol=0.02)


def test_with_groups_of_one_the_bootstrap_interval_is_scipys() -> None:
    value_B = np.random.default_rng(0).random(80)
    rows = rows_of([0] * 80, list(range(80)))
    mine = percentile_interval(bootstrap_means(value_B[None], rows, num_resamples=8000)[:, 0, 0])
    theirs = stats.bootstrap(
        (value_B,), np.mean, n_resamples=8000, method="percentile", rng=np.random.default_rng(3)
    ).confidence_interval
    assert mine.low == pytest.approx(theirs.low, abs=0.006)
    assert mine.high == pytest.approx(theirs.high, abs=0.006)


def test_equal_pairs_in_a_group_make_no_interval_narrower() -> None:
    generator = np.random.default_rng(2)
    value_G = generator.random(12)
    alone = rows_of([0] * 12, list(range(12)))
    ten = rows_of([0] * 120, [g for g in range(12) for _ in range(10)])
    once = percentile_interval(bootstrap_means(value_G[None], alone)[:, 0, 0])
    tenfold = percentile_interval(bootstrap_means(value_G.repeat(10)[None], ten)[:, 0, 0])
    assert (once.low, once.high) == pytest.approx((tenfold.low, tenfold.high))


def test_an_accuracy_of_100_per_cent_is_not_beyond_doubt() -> None:
    interval = share_interval(np.ones(50), 1.0, 0.01, 10)
    assert interval.low < 0.8
    assert interval.high == 1.0


def test_the_standard_error_of_single_pairs_is_the_textbooks() -> None:
    gain_B = np.random.default_rng(5).choice([-1.0, 0.0, 1.0], 400)
    by_domain, overall = clustered_error(gain_B, rows_of([0] * 400, list(range(400))))
    textbook = stats.sem(gain_B)
    assert by_domain[0] == pytest.approx(textbook, rel=0.01)
    assert overall == pytest.approx(textbook, rel=0.01)


def test_power_is_what_a_simulation_finds() -> None:
    error, alpha = 0.02, 0.01
    told = power(0.03, error, num_pairs=1000, num_groups=500, alpha=alpha)
    draws = np.random.default_rng(0).normal(told.detectable, error, 200_000)
    found = np.mean(np.abs(draws) > stats.norm.ppf(1 - alpha / 2) * error)
    assert found == pytest.approx(0.8, abs=0.005)
    # With so many more the error shrinks until the difference that was seen is the one that can be detected.
    assert told.more_pairs is not None
    smaller = error * (1000 / (1000 + told.more_pairs)) ** 0.5
    assert power(0.03, smaller, num_pairs=1, num_groups=500, alpha=alpha).detectable == pytest.approx(0.03, rel=1e-3)
    assert power(0.0, error, num_pairs=10, num_groups=5).more_pairs is None
    assert power(1.0, error, num_pairs=10, num_groups=6).more_pairs == 0


@pytest.mark.parametrize("alpha", [0.05, 0.0125, 0.0012])
def test_fewer_groups_than_the_test_needs_tell_nothing(alpha: float) -> None:
    def smallest_p(num_groups: int) -> float:
        return paired_p(np.ones(num_groups), rows_of([0] * num_groups, list(range(num_groups))))[1]

    least = power(1.0, 0.01, num_pairs=99, num_groups=3, alpha=alpha).least_groups
    assert smallest_p(least) < alpha <= smallest_p(least - 1)
    told = power(1.0, 0.01, num_pairs=100 * (least - 1), num_groups=least - 1, alpha=alpha)
    assert told.detectable is None
    assert (told.more_groups, told.more_pairs) == (1, 100)


def test_few_groups_have_students_interval_and_one_group_says_nothing() -> None:
    draws = np.array([0.1, 0.2, 0.3])
    few = difference_interval(draws, 0.2, 0.05, 4)
    assert (few.low, few.high) == pytest.approx(stats.t.interval(0.95, 3, loc=0.2, scale=0.05))
    assert difference_interval(draws, 0.2, 0.05, 40) == percentile_interval(draws)
    one = difference_interval(draws, 0.2, 0.05, 1)
    assert (one.low, one.high) == (-1, 1)


def test_seeds_are_averaged_within_a_pair_and_their_spread_is_the_samples() -> None:
    correct_SB = np.array([[1, 0, 1], [1, 1, 0]], dtype=float)
    assert seed_mean(correct_SB).tolist() == [1.0, 0.5, 0.5]
    assert spread([0.1, 0.3]) == pytest.approx(np.std([0.1, 0.3], ddof=1))
    assert spread([0.1]) is None
