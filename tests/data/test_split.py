"""No group on two sides, nothing lost, shares met."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moreward.data.load import assert_no_leak
from moreward.data.split import linked_groups, not_held_out, split_by_group
from moreward.errors import ConfigError, DataError
from moreward.types import Preference

FRACTIONS = {"train": 0.7, "val": 0.1, "test": 0.2}


def rows(keys):
    """One preference per (domain, group) key; group "" stands for the prompt itself."""
    return [
        Preference(prompt=f"prompt {i % 5}", chosen=f"c{i}", rejected="r", domain=domain, group=group, id=str(i))
        for i, (domain, group) in enumerate(keys)
    ]


KEYS = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["", "g1", "g2", "g3"])), max_size=40)


@given(keys=KEYS, seed=st.integers(0, 5))
@settings(deadline=None)
def test_no_group_stands_on_two_sides_and_nothing_is_lost(keys, seed):
    preferences = rows(keys)
    sides = split_by_group(preferences, FRACTIONS, seed)
    assert sorted((p for side in sides.values() for p in side), key=lambda p: int(p.id)) == preferences
    label_of = {p.id: label for p, label in zip(preferences, linked_groups(preferences), strict=True)}
    groups = [{label_of[p.id] for p in side} for side in sides.values()]
    assert sum(map(len, groups)) == len(set().union(*groups))


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=40), seed=st.integers(0, 5))
@settings(deadline=None)
def test_each_domain_meets_its_shares_within_the_size_of_a_group(sizes, seed):
    keys = [("ab"[g % 2], f"g{g}") for g, size in enumerate(sizes) for _ in range(size)]
    own_prompts = [replace(p, prompt=f"{p.domain} {p.group}") for p in rows(keys)]
    sides = split_by_group(own_prompts, FRACTIONS, seed)
    for domain, total in Counter(domain for domain, _ in keys).items():
        for side, share in FRACTIONS.items():
            found = sum(p.domain == domain for p in sides[side])
            assert found < share * total + max(sizes)


def test_the_split_depends_on_the_seed_but_not_on_the_order_of_rows():
    preferences = rows([("a", f"g{i}") for i in range(50)])

    def names(ps, seed):
        return {side: {p.id for p in found} for side, found in split_by_group(ps, FRACTIONS, seed).items()}

    assert names(preferences, 1) == names(preferences[::-1], 1)
    assert names(preferences, 1) != names(preferences, 2)


@pytest.mark.parametrize("fractions", [{"train": 0.5}, {"train": 1.0, "test": 0.0}, {}, {"a": 1.5, "b": -0.5}])
def test_fractions_must_be_positive_and_sum_to_one(fractions):
    with pytest.raises(ConfigError, match="split: "):
        split_by_group(rows([("a", "")]), fractions, 0)


def test_rows_of_one_prompt_stay_together_whatever_their_groups():
    annotators = [
        Preference(prompt=f"prompt {i // 4}", chosen=f"c{i}", rejected="r", group=f"annotator {i}") for i in range(80)
    ]
    sides = split_by_group(annotators, {"train": 0.9, "val": 0.1}, seed=0)
    assert len(sides["val"]) >= 4
    assert not {p.prompt for p in sides["train"]} & {p.prompt for p in sides["val"]}


def test_a_single_user_turn_is_the_prompt_that_its_text_is():
    both = []
    for i in range(40):
        turn = ({"role": "user", "content": f"prompt {i}"},)
        both += [Preference(prompt=p, chosen=f"c{i}", rejected="r") for p in (f"prompt {i}", turn)]
    labels = linked_groups(both)
    assert labels[::2] == labels[1::2]
    assert len(set(labels)) == 40
    sides = split_by_group(both, {"train": 0.9, "val": 0.1}, seed=0)
    with pytest.raises(DataError, match="stand on two sides"):
        assert_no_leak(both[::2], both[1:2])
    assert_no_leak(sides["train"], sides["val"])


@given(links=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=20))
def test_linked_groups_are_the_connected_components(links):
    labels = linked_groups([Preference(prompt=f"p{p}", chosen="c", rejected="r", group=f"g{g}") for p, g in links])
    for i, (prompt, group) in enumerate(links):
        reached, grown = {("p", prompt), ("g", group)}, True
        while grown:
            near = {n for p, g in links for n in (("p", p), ("g", g)) if {("p", p), ("g", g)} & reached}
            grown = not near <= reached
            reached |= near
        assert [labels[j] == labels[i] for j in range(len(links))] == [("p", p) in reached for p, _ in links]


def chained(num, domain="chained"):
    """Each annotator judged two prompts, each prompt was judged by two annotators: one linked group."""
    return [
        Preference(prompt=f"p{i // 2}", chosen=f"c{i}", rejected="r", group=f"annotator {(i + 1) // 2}", domain=domain)
        for i in range(num)
    ]


def test_a_domain_that_hangs_together_as_a_whole_is_named_with_its_size_where_none_of_it_is_held_out():
    preferences = [*rows([("a", f"g{i}") for i in range(40)]), *chained(30)]
    apart = [replace(p, prompt=p.id) if p.id else p for p in preferences]
    sides = split_by_group(apart, {"train": 0.9, "val": 0.1}, seed=0)
    (sentence,) = not_held_out(apart, sides["val"])
    assert "domain chained: none of its 30 pairs is held out" in sentence
    assert "30 of them hang together" in sentence
    assert "data.val" in sentence


def test_nothing_is_said_where_every_domain_is_held_out():
    preferences = [replace(p, prompt=p.id) for p in rows([("a", f"g{i}") for i in range(40)])]
    assert not_held_out(preferences, split_by_group(preferences, {"train": 0.9, "val": 0.1}, seed=0)["val"]) == []


def test_blank_prompts_join_nothing():
    blank = [Preference(prompt=" ", chosen=f"c{i}", rejected="r") for i in range(10)]
    assert len(set(linked_groups(blank))) == 10


def test_a_long_chain_of_shared_groups_and_prompts_is_one_linked_group_in_any_order():
    chain = [
        Preference(prompt=f"p{i + d}", chosen="c", rejected="r", group=f"g{i}") for i in range(5_000) for d in (0, 1)
    ]
    assert len(set(linked_groups(chain))) == 1
    assert set(linked_groups(chain)) == set(linked_groups(chain[::-1]))
