"""What a report concludes from rewards that are known: the same pairs for all, ties, flags, few groups."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from moreward.config import resolve
from moreward.errors import DataError, RunError
from moreward.proof.controls import Budget, Plan, Planned
from moreward.proof.experiment import Experiment
from moreward.proof.findings import Findings, findings_of
from moreward.proof.trials import Told
from moreward.proof.words import headline, markdown, more_needed, sentence
from moreward.types import Preference, RoutedReward

CONTROLS = {"mix": {"total": "one", "active": "one", "training": "one"}}


def pairs(sizes: dict[str, int], *, per_group: int = 1) -> list[Preference]:
    return [
        Preference(prompt=f"{d}{i}", chosen="a", rejected="b", domain=d, group=f"{d}{i // per_group}")
        for d, size in sizes.items()
        for i in range(size)
    ]


def told(margins: Sequence[float], *, cut: Sequence[int] = ()) -> Told:
    def reward(value: float, i: int) -> RoutedReward:
        return RoutedReward(reward=value, expert="", oracle=None, random=None, num_tokens=9, truncated=i in cut)

    rewards = tuple((reward(m, i), reward(0.0, i)) for i, m in enumerate(margins))
    training = {"seconds": 1.0, "steps": 1, "pairs_seen": 1, "stages": []}
    return Told(rewards=rewards, experts=(), expert_margins={}, explained=(), seconds_per_pair=0.1, training=training)


def found(test: list[Preference], says: dict[str, Sequence[Told]], *, on_long: str = "drop") -> Findings:
    """`says["mix"]` and `says["one"]` hold a `Told` for each seed."""
    config = resolve({"recipe": "baseline", "data": {"train": ["x"], "on_long": on_long}})
    systems = tuple(Planned(label=label, config=config, is_single=label != "mix") for label in says)
    budget = Budget(total=10, active=10, trained=5, training=5)
    plan = Plan(systems=systems, controls=CONTROLS, budgets=dict.fromkeys(says, budget), baseline="one")
    given: dict[str, Any] = {"systems": {k: {} for k in says}, "data": {}, "seeds": len(says["mix"])}
    return findings_of(Experiment.model_validate(given), plan, test, says, num_resamples=200)


def test_a_perfect_system_gets_1_its_opposite_0_and_a_constant_one_nothing_but_ties() -> None:
    test = pairs({"a": 40, "b": 20})
    one = found(test, {"mix": [told([1.0] * 60)], "one": [told([-1.0] * 60)]})
    assert one.systems["mix"].mean.mean == one.systems["mix"].micro == 1.0
    assert one.systems["one"].mean.mean == 0.0
    assert {c.word for c in one.conclusions} == {"helps"}
    assert headline(one, "mix").startswith("mix beats every single model of equal budget in the mean of domains, the")
    other = found(test, {"mix": [told([0.0] * 60)], "one": [told([1.0] * 60)]})
    assert (other.systems["mix"].mean.mean, other.systems["mix"].ties) == (0.0, 60)
    assert {c.word for c in other.conclusions} == {"hurts"}
    assert "It helps in 0 of 2 domains, hurts in 2 (a, b), and cannot be told in 0." in headline(other, "mix")


def test_the_order_of_the_pairs_changes_nothing() -> None:
    draw = random.Random(3)
    test = pairs({"a": 30, "b": 30}, per_group=3)
    margins = {label: [[draw.uniform(-1, 2) for _ in test] for _ in range(2)] for label in ("mix", "one")}
    places = draw.sample(range(len(test)), len(test))
    first = found(test, {k: [told(m) for m in ones] for k, ones in margins.items()})
    again = found(
        [test[i] for i in places], {k: [told([m[i] for i in places]) for m in ones] for k, ones in margins.items()}
    )
    for one, two in zip(first.versus, again.versus, strict=True):
        assert (one.domain, one.verdict) == (two.domain, two.verdict)
        assert one.difference == pytest.approx(two.difference)
        assert one.p_value == pytest.approx(two.p_value)
    assert first.num_groups == again.num_groups == {"a": 10, "b": 10}


def test_domains_at_chance_and_saturated_ones_are_flagged_and_left_out_of_the_second_mean() -> None:
    test = pairs({"coin": 500, "easy": 500, "real": 500})
    half = [1.0, -1.0] * 250
    easy = [-1.0, *[1.0] * 499]
    says = {"mix": [told([*half, *easy, *[1.0, 1.0, -1.0, 1.0] * 125])], "one": [told([*half, *easy, *half])]}
    one = found(test, says)
    assert one.flags == {"coin": ("chance",), "easy": ("saturated",), "real": ()}
    assert one.systems["mix"].mean.mean == pytest.approx((0.5 + 0.998 + 0.75) / 3)
    second = one.systems["mix"].unflagged
    assert second is not None
    assert second.mean == pytest.approx(0.75)
    assert "without flagged" in markdown(one)
    assert "Domains that tell systems apart hardly or not: coin (chance), easy (saturated)" in markdown(one)


def test_three_groups_can_tell_nothing_however_many_pairs_they_hold() -> None:
    test = [*pairs({"few": 300}, per_group=100), *pairs({"many": 60})]
    one = found(test, {"mix": [told([1.0] * 360)], "one": [told([-1.0] * 300 + [1.0] * 60)]})
    few = next(c for c in one.conclusions if c.domain == "few")
    assert (few.word, few.versus.num_groups) == ("cannot be told", 3)
    assert few.versus.p_value == pytest.approx(0.25)
    assert few.versus.power.detectable is None
    # Three tests: 2^(1 - 7) is the first below .05 / 3.
    assert few.versus.power.least_groups == 7
    assert "300 pairs stand in 3 prompt groups, too few to tell any difference: that takes 7 at least" in sentence(few)
    assert "(4 more prompt groups) would tell" in sentence(few)
    assert "Few prompt groups: few 3." in markdown(one)


def test_few_groups_have_a_wider_interval_than_their_bootstrap() -> None:
    test = pairs({"few": 40}, per_group=10)
    margins = [1.0] * 10 + [1.0] * 8 + [-1.0] * 2 + [1.0] * 5 + [-1.0] * 5 + [1.0] * 9 + [-1.0]
    one = found(test, {"mix": [told(margins)], "one": [told([-1.0] * 40)]}).systems["mix"].accuracy["few"]
    assert one.mean == 0.8
    # Four groups right in 1, .8, .5 and .9: Student's, 3.18 standard errors of .11 each way, and cut at 1.
    assert one.interval.low == pytest.approx(0.8 - 3.182 * 0.1109, abs=0.01)
    assert one.interval.high == 1.0


def test_a_pair_that_one_system_had_to_cut_counts_for_none() -> None:
    test = pairs({"a": 20, "b": 20})
    says = {"mix": [told([1.0] * 40)], "one": [told([1.0] * 40, cut=[0, 1, 25])]}
    one = found(test, says)
    assert one.num_pairs == {"a": 18, "b": 19}
    assert one.too_long == {"a": 2, "b": 1}
    assert "Left out, longer than some system can read whole: a 2, b 1." in markdown(one)
    assert found(test, says, on_long="truncate").num_pairs == {"a": 20, "b": 20}
    with pytest.raises(DataError, match=r"domains \['a'\] have no test pair that every system can read whole"):
        found(test, {**says, "one": [told([1.0] * 40, cut=range(20))]})


def test_rewards_of_other_pairs_or_seeds_make_no_report() -> None:
    test = pairs({"a": 10})
    with pytest.raises(RunError, match=r"10 test pairs with 2 seeds, but rewards of {'one': \[10, 9\]}"):
        found(test, {"mix": [told([1.0] * 10)] * 2, "one": [told([1.0] * 10), told([1.0] * 9)]})
    with pytest.raises(RunError, match=r"rewards of {'one': \[10\]}"):
        found(test, {"mix": [told([1.0] * 10)] * 2, "one": [told([1.0] * 10)]})


def test_a_difference_too_small_to_tell_is_not_told_with_millions() -> None:
    test = pairs({"a": 400})
    mix = [1.0, -1.0] * 200
    one = found(test, {"mix": [told(mix)] * 7, "one": [told([-m for m in mix])] * 6 + [told([1.0, *mix[1:]])]})
    versus = next(v for v in one.versus if v.domain == "a")
    assert versus.power.detectable is not None
    tiny = replace(versus, power=replace(versus.power, more_pairs=5_000_000, more_groups=1))
    assert more_needed(tiny).endswith("to tell one as small as was seen would take more than 1,000,000 more pairs.")
