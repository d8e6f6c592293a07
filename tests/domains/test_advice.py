"""The rule, the matrices and the error rates on pairs whose preferences are known."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from domains.planted import axis, planted
from moreward.domains.advice import MIN_GROUPS, SPLIT, Findings, advise, check_labels, decide
from moreward.domains.conflict import conflicts, shuffled
from moreward.domains.material import draw
from moreward.domains.null import simulate
from moreward.domains.probes import NUM_FOLDS, fit, fit_probe, folds, inputs
from moreward.domains.words import render
from moreward.errors import DataError
from moreward.evals.statistics import Rows
from moreward.types import NO_DOMAIN, Preference


@pytest.fixture(scope="module")
def three() -> Findings:
    """a and b want the same, c the opposite."""
    return advise(planted([axis(0), axis(0), -axis(0)], 800))


def test_the_opposite_domain_is_split_and_its_evidence_says_why(three: Findings) -> None:
    c = three.advice[2]
    assert c.word == SPLIT
    assert c.over_pooled.interval.low > 0
    assert c.over_control.interval.low > 0
    assert c.partners == {}


def test_domains_of_the_same_function_find_each_other(three: Findings) -> None:
    a, b, _ = three.advice
    assert list(a.partners) == ["b"]
    assert list(b.partners) == ["a"]


def test_transfer_is_high_between_equals_and_below_a_coin_between_opposites(three: Findings) -> None:
    assert three.transfer["a"]["b"].interval.low > 0.7
    assert three.transfer["a"]["c"].interval.high < 0.3
    assert three.transfer["c"]["a"].interval.high < 0.3
    own = {one.domain: one.own for one in three.advice}
    assert {name: three.transfer[name][name] for name in own} == own


def test_conflict_has_the_right_sign(three: Findings) -> None:
    found = {c.domains: c for c in three.conflicts}
    assert found["a", "b"].word == "none shown"
    assert found["a", "b"].cosine > 0.9
    for other in (("a", "c"), ("b", "c")):
        assert found[other].word == "conflict"
        assert found[other].cosine < -0.9
        assert found[other].p_holm < 0.05 < found["a", "b"].p_holm


def test_the_control_has_as_many_parameters_as_all_own_probes(three: Findings) -> None:
    assert three.num_parameters["control"] == three.num_parameters["own"] == 3 * three.num_parameters["pooled"]


def test_the_findings_are_told_whole(three: Findings) -> None:
    told = json.loads(json.dumps(three.to_json(), allow_nan=False))
    assert [one["word"] for one in told["advice"]] == [one.word for one in three.advice]
    said = " ".join(render(three).split())
    assert "c: split." in said
    assert "The rule was fixed before it met any data" in said


def test_no_cell_of_the_tables_is_cut_off() -> None:
    pairs = replace(planted([axis(0), -axis(0), axis(1)], 60), names=("argument", "hellaswag", "a longer name"))
    findings = advise(pairs)
    said = render(findings)
    for name in pairs.names:
        assert len([line for line in said.splitlines() if line.lstrip().startswith(name)]) >= 4
    assert "…" not in said


def test_two_domains_of_one_function_are_merged_and_orthogonal_ones_differ() -> None:
    same = advise(planted([axis(0), axis(0)], 1200))
    assert [(one.word, *one.partners) for one in same.advice] == [("merge", "b"), ("merge", "a")]
    crossed = advise(planted([axis(0), axis(1)], 600))
    assert [one.word for one in crossed.advice] == [SPLIT, SPLIT]
    assert crossed.conflicts[0].word == "differ" or abs(crossed.conflicts[0].cosine) < 0.2


def test_where_nothing_can_be_learned_no_split_is_advised() -> None:
    nothing = advise(planted([0 * axis(0)] * 2, 150))
    assert {one.word for one in nothing.advice} <= {"leave", "cannot tell"}
    assert nothing.conflicts[0].word == "none shown"


def test_a_gain_over_the_pooled_probe_alone_is_no_split() -> None:
    rows = Rows(domain_B=np.repeat([0, 1], 200), group_B=np.arange(400))
    good_B, bad_B = np.ones(400), np.tile([0.0, 1.0], 200)
    assert decide(good_B, bad_B, good_B, rows, {}).words == ("cannot tell",) * 2
    assert decide(good_B, good_B, bad_B, rows, {}).words == ("leave",) * 2
    assert decide(good_B, bad_B, bad_B, rows, {}).words == (SPLIT,) * 2


def test_the_same_gain_in_few_large_groups_is_not_believed() -> None:
    good_B, bad_B = np.ones(80), np.tile([0.0, 1.0], 40)
    domain_B = np.repeat([0, 1], 40)
    few = Rows(domain_B=domain_B, group_B=np.arange(80) // 20)
    assert decide(good_B, bad_B, bad_B, few, {}).words == ("cannot tell",) * 2
    many = Rows(domain_B=domain_B, group_B=np.arange(80))
    assert decide(good_B, bad_B, bad_B, many, {}).words == (SPLIT,) * 2


def test_a_probe_is_the_minimum_of_its_loss() -> None:
    x_BK = inputs(planted([axis(0), axis(1)], 100), seed=0).linear_BK.astype(np.float64)
    weight_K = fit(x_BK, 0.01)
    slope_K = 0.01 * weight_K - x_BK.T @ (1 / (1 + np.exp(x_BK @ weight_K))) / len(x_BK)
    assert np.abs(slope_K).max() < 1e-3
    assert np.array_equal(fit_probe(x_BK, np.arange(200), seed=1), fit_probe(x_BK, np.arange(200), seed=1))


def test_directions_do_not_know_which_response_was_chosen() -> None:
    pairs = planted([axis(0), axis(1)], 100)
    swapped = replace(pairs, chosen_BD=pairs.rejected_BD, rejected_BD=pairs.chosen_BD)
    one, other = (np.abs(inputs(p, seed=0).linear_BK) for p in (pairs, swapped))
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_folds_keep_groups_whole_and_every_domain_in_each() -> None:
    generator = np.random.default_rng(0)
    group_B = generator.integers(60, size=500)
    domain_B = group_B % 3
    fold_B = folds(group_B, domain_B, NUM_FOLDS, seed=0)
    assert all(len(set(fold_B[group_B == g])) == 1 for g in range(60))
    counts = np.array([np.bincount(fold_B[domain_B == m], minlength=NUM_FOLDS) for m in range(3)])
    assert counts.min() > 0
    assert (counts.max(1) - counts.min(1)).max() <= 15


def test_shuffled_labels_stay_with_their_groups() -> None:
    group_B = np.repeat(np.arange(30), 4)
    domain_B = group_B % 3
    new_B = shuffled(domain_B, group_B, np.random.default_rng(0))
    assert all(len(set(new_B[group_B == g])) == 1 for g in range(30))
    assert np.array_equal(np.bincount(new_B), np.bincount(domain_B))
    assert not np.array_equal(new_B, domain_B)


def test_conflicts_of_random_labels_are_seldom_found() -> None:
    pairs = planted([axis(0), axis(1)], 100)
    x_BK = inputs(pairs, seed=0).linear_BK
    generator = np.random.default_rng(5)
    labels = [shuffled(pairs.domain_B, pairs.group_B, generator) for _ in range(40)]
    found = [conflicts(x_BK, m_B, pairs.group_B, pairs.names, seed=i, num_draws=99)[0] for i, m_B in enumerate(labels)]
    assert sum(c.word != "none shown" for c in found) <= 6


def test_the_error_rates_count_every_division() -> None:
    done: list[int] = []
    rates = simulate(planted([axis(0), axis(1)], 200), num_draws=4, progress=lambda n, _: done.append(n)).rates
    assert done == list(range(1, 13))
    assert {kind: sum(rate.words.values()) for kind, rate in rates.items()} == dict.fromkeys(rates, 8)
    assert rates["shuffled"].num_with_split == rates["halves"].num_with_split == 0
    assert rates["opposed"].num_with_split == 4
    assert rates["opposed"].interval.low < rates["opposed"].share


def row(domain: str, number: int) -> Preference:
    return Preference(prompt=f"{domain} {number}", chosen="yes", rejected="no", domain=domain)


def test_drawn_pairs_come_from_all_groups_and_fewer_are_among_more() -> None:
    rows = [replace(row("code", i), group=f"g{i // 50}") for i in range(200)] + [row("chat", i) for i in range(8)]
    few, more = draw(rows, 12, seed=0), draw(rows, 40, seed=0)
    assert [Counter(p.group for p in some if p.domain == "code") for some in (few, more)] == [
        dict.fromkeys(("g0", "g1", "g2", "g3"), n) for n in (3, 10)
    ]
    assert sum(p.domain == "chat" for p in few) == 8
    assert [p for p in more if p in few] == few
    assert draw(rows, None, seed=0) == rows


def test_all_faults_are_told_at_once() -> None:
    few = [row(domain, i) for domain in ("code", "chat") for i in range(MIN_GROUPS - 1)]
    with pytest.raises(DataError) as caught:
        check_labels(few)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["Domain chat", "Domain code"]
    with pytest.raises(DataError, match=r"All pairs are of domain code(.|\n)*Domain code: 9 pairs"):
        check_labels(few[: MIN_GROUPS - 1])
    with pytest.raises(DataError, match=r"--domain-key.*--discover"):
        check_labels([row(NO_DOMAIN, i) for i in range(40)])
