"""Router accuracy and confusion on cases counted by hand."""

from __future__ import annotations

import json
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moreward.evals.routing import RoutingReport, routing_report
from moreward.types import Preference, RoutedReward

Row = tuple[str, str, str, str]  # domain, prompt, expert of the chosen, expert of the rejected


def reported(rows: list[Row], experts: list[str]) -> RoutingReport:
    preferences = [Preference(prompt=p, chosen="c", rejected="j", domain=d) for d, p, *_ in rows]
    chosen = [RoutedReward(reward=0.0, expert=c) for *_, c, _ in rows]
    rejected = [RoutedReward(reward=0.0, expert=j) for *_, j in rows]
    return routing_report(preferences, chosen, rejected, experts=experts)


def test_a_prompt_with_many_pairs_counts_once() -> None:
    rows = [("chat", "a", "chat", "chat")] * 9 + [("chat", "b", "code", "code"), ("code", "c", "code", "code")]
    report = reported(rows, ["chat", "code"])
    assert report.confusion == {"chat": {"chat": 1, "code": 1}, "code": {"chat": 0, "code": 1}}
    assert report.domain_accuracy == {"chat": 0.5, "code": 1.0}
    assert report.accuracy == pytest.approx(2 / 3)
    assert report.num_prompts == {"chat": 2, "code": 1}
    assert report.share == pytest.approx({"chat": 1 / 3, "code": 2 / 3})
    assert report.split_share == 0.0


def test_a_prompt_whose_responses_part_is_divided_among_their_experts() -> None:
    rows = [("chat", "a", "chat", "code"), ("chat", "a", "code", "code")]
    report = reported(rows, ["chat", "code"])
    assert report.confusion["chat"] == {"chat": 0.25, "code": 0.75}
    assert report.accuracy == 0.25
    assert report.split_share == 0.5


def test_domains_without_an_expert_are_named_and_left_out_of_the_accuracy() -> None:
    rows = [("chat", "a", "chat", "chat"), ("law", "b", "chat", "chat"), ("art", "c", "chat", "chat")]
    report = reported(rows, ["chat", "code"])
    assert report.domains_without_expert == ("art", "law")
    assert report.domain_accuracy == {"art": None, "chat": 1.0, "law": None}
    assert report.accuracy == 1.0
    assert report.share == {"chat": 1.0, "code": 0.0}


def test_where_no_domain_has_an_expert_shares_are_known_but_no_accuracy() -> None:
    report = reported([("chat", "a", "e0", "e1")], ["e0", "e1"])
    assert report.accuracy is None
    assert report.share == {"e0": 0.5, "e1": 0.5}


def test_a_system_without_named_experts_has_an_empty_report() -> None:
    assert reported([("chat", "a", "", "")], []) == RoutingReport()


def test_the_same_prompt_in_two_domains_is_two_prompts() -> None:
    report = reported([("chat", "a", "chat", "chat"), ("code", "a", "chat", "chat")], ["chat", "code"])
    assert report.num_prompts == {"chat": 1, "code": 1}
    assert report.accuracy == 0.5


def test_an_expert_that_was_not_listed_is_refused() -> None:
    with pytest.raises(ValueError, match="math"):
        reported([("chat", "a", "math", "math")], ["chat"])


experts = st.sampled_from(["x", "y", "z"])


@given(st.lists(st.tuples(experts, st.sampled_from("abc"), experts, experts), min_size=1), st.randoms())
@settings(max_examples=50, deadline=None)
def test_rows_of_the_confusion_sum_to_prompts_in_any_order(rows: list[Row], random: Random) -> None:
    report = reported(rows, ["x", "y", "z"])
    for domain, row in report.confusion.items():
        assert sum(row.values()) == pytest.approx(len({p for d, p, *_ in rows if d == domain}))
    assert sum(report.share.values()) == pytest.approx(1.0)
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert json.dumps(reported(shuffled, ["x", "y", "z"]).to_json()) == json.dumps(report.to_json())
