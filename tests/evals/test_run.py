"""Evaluating a run: every pair once, under three routers, the same numbers as the rewards themselves give."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from moreward.data.batches import side
from moreward.errors import DataError
from moreward.evals.run import evaluate_run, within_limit
from moreward.scoring import Scorer, load
from moreward.types import Preference
from trained import trained

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Tiny, pairs: Sequence[Preference]) -> Scorer:
    return load(trained(tmp_path_factory.mktemp("arliss"), tiny_backbone, pairs))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Tiny, pairs: Sequence[Preference]) -> Scorer:
    return load(trained(tmp_path_factory.mktemp("baseline"), tiny_backbone, pairs, "baseline"))


def share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def test_accuracy_is_the_share_of_pairs_whose_chosen_reward_is_higher(
    scorer: Scorer, pairs: Sequence[Preference]
) -> None:
    result = evaluate_run(scorer, pairs)
    rewards = [scorer.compare(p.prompt, [p.chosen, p.rejected], explain=True).rewards for p in pairs]
    right = [chosen.reward > rejected.reward for chosen, rejected in rewards]
    oracle = [c.expert_rewards[p.domain] > r.expert_rewards[p.domain] for p, (c, r) in zip(pairs, rewards, strict=True)]
    assert list(result.preferences) == list(pairs)
    assert [float(c) for c in result.correct] == right
    for domain in ("long", "short"):
        measured = result.evaluation.domains[domain]
        rows = [i for i, p in enumerate(pairs) if p.domain == domain]
        assert measured.accuracy == pytest.approx(share([right[i] for i in rows]))
        assert measured.oracle == pytest.approx(share([oracle[i] for i in rows]))
    routed = [chosen.expert == p.domain for p, (chosen, _) in zip(pairs, rewards, strict=True)]
    assert result.routing.accuracy == pytest.approx(share(routed))


def test_the_result_does_not_depend_on_the_order_of_the_pairs(scorer: Scorer, pairs: Sequence[Preference]) -> None:
    mixed = random.Random(2).sample(list(pairs), len(pairs))
    one, other = evaluate_run(scorer, pairs, seed=4), evaluate_run(scorer, mixed, seed=4)
    for domain in ("long", "short"):
        first, second = one.evaluation.domains[domain], other.evaluation.domains[domain]
        assert (first.accuracy, first.oracle, first.random) == (
            second.accuracy,
            second.oracle,
            second.random,
        )


def test_a_single_model_has_neither_oracle_nor_routing(single: Scorer, pairs: Sequence[Preference]) -> None:
    result = evaluate_run(single, pairs)
    assert result.evaluation.domains["long"].oracle is None
    assert result.evaluation.domains["long"].random is None
    assert result.routing.accuracy is None


def test_the_cost_counts_what_is_stored_and_what_is_met(
    scorer: Scorer, single: Scorer, pairs: Sequence[Preference]
) -> None:
    for one in (scorer, single):
        cost = evaluate_run(one, pairs[:4]).evaluation.cost
        assert cost is not None
        assert cost.num_pairs == 4
        assert cost.seconds > 0
        assert cost.parameters_stored == sum(p.numel() for p in one.system.parameters())
        assert (cost.parameters_active < cost.parameters_stored) == (one is scorer)


def test_pairs_beyond_the_limit_are_left_out_and_counted(scorer: Scorer, pairs: Sequence[Preference]) -> None:
    long = [replace(p, chosen=p.chosen + " and so on" * 60) for p in pairs[:3]]
    result = evaluate_run(scorer, [*long, *pairs[3:]])
    assert result.too_long == {"short": 3}
    assert result.preferences == list(pairs[3:])
    assert len(result.correct) == 37


def test_where_cutting_is_allowed_no_pair_is_left_out(
    scorer: Scorer, pairs: Sequence[Preference], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer, "on_long", "truncate")
    long = [replace(p, chosen=p.chosen + " and so on" * 60) for p in pairs[:3]]
    assert within_limit(scorer, long) == (long, {})
    assert len(evaluate_run(scorer, [*long, *pairs[3:]]).correct) == 40


def test_a_domain_that_the_limit_empties_is_an_error(scorer: Scorer, pairs: Sequence[Preference]) -> None:
    long = [replace(p, chosen=p.chosen + " and so on" * 60) for p in pairs if p.domain == "long"]
    short = [p for p in pairs if p.domain == "short"]
    with pytest.raises(DataError, match=r"domains \['long'\] have no pair within 96 tokens.*--truncate"):
        evaluate_run(scorer, [*long, *short])


def test_a_domain_without_an_expert_is_still_measured(scorer: Scorer, pairs: Sequence[Preference]) -> None:
    other = [replace(p, domain="poetry") for p in pairs[:6]]
    result = evaluate_run(scorer, [*other, *pairs[6:]])
    right = [scorer.compare(p.prompt, [p.chosen, p.rejected]).order == [0, 1] for p in other]
    assert result.evaluation.domains["poetry"].accuracy == pytest.approx(share(right))
    assert result.evaluation.domains["poetry"].oracle is None
    assert result.evaluation.domains["long"].oracle is not None


def test_items_are_named_by_their_rows(pairs: Sequence[Preference]) -> None:
    assert side(pairs[0], "chosen").id == pairs[0].id
    assert side(replace(pairs[0], id="", source="a.jsonl:3"), "rejected").id == "a.jsonl:3"
