"""Paired comparisons against brute force, textbook tests and worlds where nothing differs."""

from __future__ import annotations

import json
from itertools import product
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moreward.evals.accuracy import Correct
from moreward.evals.compare import Comparison, compare, difference_interval, holm


def compared(
    system: Correct | list[bool], base: Correct | list[bool], groups: list[str], domains: list[str] | None = None
) -> Comparison:
    systems = {"new": np.array(system, dtype=bool), "base": np.array(base, dtype=bool)}
    return compare(systems, groups, domains or ["d"] * len(groups), baseline="base")


pair_rows = st.lists(
    st.tuples(st.booleans(), st.booleans(), st.sampled_from("abcdefg"), st.sampled_from("xy")), min_size=1, max_size=14
)


@given(pair_rows)
@settings(max_examples=60, deadline=None)
def test_the_p_values_equal_trying_every_combination_of_signs(rows: list[tuple[bool, bool, str, str]]) -> None:
    comparison = compared(*(list(column) for column in zip(*rows, strict=True)))
    names = sorted({row[3] for row in rows})
    size = {d: sum(row[3] == d for row in rows) for d in names}
    groups = sorted({row[2] for row in rows})

    def part(group: str, domain: str) -> float:
        return sum(a - b for a, b, g, d in rows if (g, d) == (group, domain)) / size[domain]

    def by_hand(parts: list[float]) -> float:
        seen = abs(sum(parts)) - 1e-12
        sums = [
            abs(sum(s * p for s, p in zip(signs, parts, strict=True))) for signs in product((1, -1), repeat=len(parts))
        ]
        return float(np.mean([total >= seen for total in sums]))

    for d in names:
        assert comparison.domains["new"][d].p_value == pytest.approx(by_hand([part(g, d) for g in groups]))
        assert comparison.domains["new"][d].difference == pytest.approx(sum(part(g, d) for g in groups))
    mean_parts = [sum(part(g, d) for d in names) / len(names) for g in groups]
    assert comparison.macro["new"].p_value == pytest.approx(by_hand(mean_parts))
    assert comparison.macro["new"].difference == pytest.approx(sum(mean_parts))
    assert -1 <= comparison.macro["new"].interval.low <= comparison.macro["new"].difference


def test_with_one_row_per_group_the_test_is_exact_mcnemar() -> None:
    from scipy.stats import binomtest

    system, base = [True] * 30 + [False] * 14 + [True] * 500, [False] * 30 + [True] * 14 + [True] * 500
    found = compared(system, base, [str(i) for i in range(544)]).domains["new"]["d"]
    assert (found.num_won, found.num_lost) == (30, 14)
    assert found.p_value == pytest.approx(binomtest(30, 44).pvalue, rel=1e-9)


def test_drawn_signs_agree_with_listed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    groups = [str(i) for i in generator.integers(0, 40, 300)]
    system, base = generator.random(300) < 0.75, generator.random(300) < 0.68
    listed = compared(system, base, groups).macro["new"].p_value
    monkeypatch.setattr("moreward.evals.compare._MAX_EXACT_OUTCOMES", 0)
    drawn, again = (compared(system, base, groups).macro["new"].p_value for _ in range(2))
    assert drawn == pytest.approx(listed, abs=0.015)
    assert drawn == again
    assert drawn != listed
    sure = compared([True] * 60, [False] * 60, [str(i) for i in range(60)])
    assert sure.macro["new"].p_value == pytest.approx(1 / 10_000)


def test_alike_systems_are_rarely_told_apart_even_with_strong_clusters() -> None:
    generator, num_worlds, found, verdicts = np.random.default_rng(4), 300, [], []
    for _ in range(num_worlds):
        group = np.repeat(np.arange(60), generator.integers(1, 9, 60))
        domain = [f"{g % 2}" for g in group]
        # Both systems have good and bad prompts of their own, so rows of one prompt are won or lost together.
        system, base = (generator.random(len(group)) < generator.beta(1.4, 0.6, 60)[group] for _ in range(2))
        comparison = compared(system, base, [str(g) for g in group], domain)
        tests = [*comparison.domains["new"].values(), comparison.macro["new"]]
        found.append([test.p_value < 0.05 for test in tests])
        verdicts.append(any(test.verdict != "no difference shown" for test in tests))
    assert np.all(np.mean(found, axis=0) < 0.085)
    assert np.mean(found) > 0.02
    assert np.mean(verdicts) < 0.085


def test_the_interval_covers_the_true_difference() -> None:
    generator, hits = np.random.default_rng(5), []
    for _ in range(400):
        group = np.repeat(np.arange(80), generator.integers(1, 6, 80))
        ease = generator.beta(2.0, 1.0, 80)[group]
        base = generator.random(len(group)) < ease
        system = np.where(generator.random(len(group)) < 0.3, generator.random(len(group)) < 0.9, base)
        truth = 0.3 * (0.9 - 2 / 3)
        hits.append(truth in compared(system, base, [str(g) for g in group]).domains["new"]["d"].interval)
    assert 0.92 < np.mean(hits) <= 0.99


def test_a_clear_gain_is_better_and_its_mirror_worse() -> None:
    groups = [str(i) for i in range(200)]
    up = [True] * 150 + [False] * 50
    down = [True] * 90 + [False] * 110
    better, worse = compared(up, down, groups), compared(down, up, groups)
    assert better.domains["new"]["d"].verdict == better.macro["new"].verdict == "better"
    assert worse.domains["new"]["d"].verdict == worse.macro["new"].verdict == "worse"
    assert better.macro["new"].difference == -worse.macro["new"].difference == pytest.approx(0.3)
    assert better.macro["new"].p_value == worse.macro["new"].p_value
    assert better.macro["new"].interval.low == pytest.approx(-worse.macro["new"].interval.high)


def test_one_prompt_cannot_prove_anything_however_many_pairs_it_has() -> None:
    found = compared([True] * 500, [False] * 500, ["one prompt"] * 500).macro["new"]
    assert (found.p_value, found.verdict) == (1.0, "no difference shown")
    assert 0.0 in found.interval


def test_systems_that_never_differ_are_not_equal_beyond_doubt() -> None:
    few = compared([True] * 10, [True] * 10, [str(i) for i in range(10)]).macro["new"]
    many = compared([True] * 1000, [True] * 1000, [str(i) for i in range(1000)]).macro["new"]
    assert (few.difference, few.p_value, few.verdict) == (0.0, 1.0, "no difference shown")
    assert few.interval.high > 0.1 > 0.01 > many.interval.high > 0


def test_the_interval_without_clusters_is_the_t_interval_with_one_more_row_won_or_lost() -> None:
    from scipy.stats import t

    gain = np.array([1, 0, 0, -1, 1, 0, 1, 0, 0, 0, 1, 0], dtype=float)
    squares = gain.var(ddof=1) * 12 + 1
    expected = gain.mean() + t.ppf([0.025, 0.975], 11) * np.sqrt(squares) / 12
    interval = difference_interval(gain, np.ones(12))
    assert (interval.low, interval.high) == pytest.approx(tuple(expected))


@given(pair_rows, st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_the_order_of_the_rows_changes_nothing(rows: list[tuple[bool, bool, str, str]], random: Random) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)
    before, after = (compared(*(list(column) for column in zip(*some, strict=True))) for some in (rows, shuffled))
    assert before.accuracy == after.accuracy
    for one, other in zip(before.domains["new"].values(), after.domains["new"].values(), strict=True):
        assert one.p_holm == pytest.approx(other.p_holm)
        assert one.interval.low == pytest.approx(other.interval.low, abs=1e-12)
    assert before.macro["new"].p_value == pytest.approx(after.macro["new"].p_value)
    assert before.macro["new"].verdict == after.macro["new"].verdict


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_stepping_down_rejects(p_values: list[float]) -> None:
    rejected: set[int] = set()
    for step, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[index] * (len(p_values) - step) > 0.05:
            break
        rejected.add(index)
    assert {i for i, p in enumerate(holm(p_values)) if p <= 0.05} == rejected


def test_more_systems_make_each_verdict_stricter_and_each_p_value_no_different() -> None:
    generator = np.random.default_rng(6)
    base, groups = generator.random(200) < 0.6, [str(i) for i in range(200)]
    systems = {f"s{k}": generator.random(200) < 0.65 for k in range(5)} | {"base": base}
    together = compare(systems, groups, ["d"] * 200, baseline="base")
    for name in together.macro:
        alone = compare({name: systems[name], "base": base}, groups, ["d"] * 200, baseline="base")
        assert alone.macro[name].p_value == together.macro[name].p_value
        assert alone.macro[name].p_holm <= together.macro[name].p_holm
    assert set(together.macro) == set(together.domains) == {f"s{k}" for k in range(5)}
    assert together.accuracy["base"]["d"] == base.mean()
    assert json.loads(json.dumps(together.to_json(), allow_nan=False)) == together.to_json()


def test_arguments_that_do_not_belong_together_are_refused() -> None:
    right = np.ones(3, dtype=bool)
    with pytest.raises(ValueError, match="'single' is not among"):
        compare({"a": right}, ["g"] * 3, ["d"] * 3, baseline="single")
    with pytest.raises(ValueError, match="'groups': 2"):
        compare({"a": right, "b": right}, ["g"] * 2, ["d"] * 3, baseline="a")
    with pytest.raises(ValueError, match="at least one"):
        compare({"a": right[:0], "b": right[:0]}, [], [], baseline="a")
