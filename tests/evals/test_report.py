"""The report says what the numbers say, in 100 columns, and does not flatter."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moreward.data.split import linked_groups
from moreward.evals.accuracy import Cost, Evaluation, correct_pairs, evaluate
from moreward.evals.compare import Comparison, compare
from moreward.evals.routing import RoutingReport, routing_report
from moreward.report import (
    evaluation_table,
    markdown_evaluation,
    markdown_systems,
    render_evaluation,
    render_systems,
    verdict,
)
from moreward.types import Preference, RoutedReward

NO_ROUTER = RoutingReport()


class World:
    """200 prompts a domain; each system is right in as many of them as its accuracy says, the best known first."""

    def __init__(self, domains: dict[str, tuple[float, float]], experts: tuple[str, ...] = ()) -> None:
        self.preferences = [
            Preference(prompt=f"{domain} {i}", chosen="long" if i % 4 else "s", rejected="mid", domain=domain)
            for domain in domains
            for i in range(200)
        ]
        self.experts = experts
        self.rejected = [RoutedReward(reward=0.5, expert=e, oracle=0.5, random=0.5) for e in self._routed()]
        self.mixture = self._rewards([accuracy for accuracy, _ in domains.values()])
        self.single = self._rewards([accuracy for _, accuracy in domains.values()])

    def _routed(self) -> list[str]:
        return [p.domain if p.domain in self.experts else "".join(self.experts[:1]) for p in self.preferences]

    def _rewards(self, accuracies: list[float]) -> list[RoutedReward]:
        values = [float(i < round(200 * accuracy)) for accuracy in accuracies for i in range(200)]
        return [
            RoutedReward(reward=value, expert=e, oracle=value, random=0.4)
            for value, e in zip(values, self._routed(), strict=True)
        ]

    def evaluation(self, rewards: list[RoutedReward], cost: Cost | None = None) -> Evaluation:
        return evaluate(self.preferences, rewards, self.rejected, experts=self.experts, cost=cost)

    @property
    def routing(self) -> RoutingReport:
        return routing_report(self.preferences, self.mixture, self.rejected, experts=self.experts)

    @property
    def comparison(self) -> Comparison:
        return compare(
            {"arliss": correct_pairs(self.mixture, self.rejected), "one": correct_pairs(self.single, self.rejected)},
            linked_groups(self.preferences),
            [p.domain for p in self.preferences],
            baseline="one",
        )

    def rendered(self) -> str:
        return render_evaluation(self.evaluation(self.mixture), self.routing, self.comparison)


def flat(text: str) -> str:
    return " ".join(text.split())


# ---- the verdict -----------------------------------------------------------------------------------------------


def test_a_gain_is_told_with_its_domains() -> None:
    text = flat(World({"chat": (0.8, 0.6), "code": (0.75, 0.6), "math": (0.7, 0.7)}).rendered())
    assert "arliss is better than one in 2 of 3 domains (chat, code)" in text
    assert "worse in 0, no difference shown in 1." in text
    assert "On the mean of domains it is better: +11.7 points" in text
    assert "Overall it helps." in text


def test_no_gain_is_told_as_such() -> None:
    text = flat(World({"chat": (0.71, 0.7), "code": (0.7, 0.7)}).rendered())
    assert "better than one in 0 of 2 domains, worse in 0" in text
    assert "On the mean of domains no difference shown: +0.5 points" in text
    assert "do not show that it helps" in text
    assert "Overall it helps" not in text


def test_a_loss_is_told_as_such() -> None:
    text = flat(World({"chat": (0.6, 0.8), "code": (0.7, 0.7)}).rendered())
    assert "worse in 1 (chat)" in text
    assert "is the better choice" in text


def test_gains_that_cancel_are_not_called_a_gain() -> None:
    text = flat(World({"chat": (0.8, 0.6), "code": (0.6, 0.8)}).rendered())
    assert "in 1 of 2 domains (chat), worse in 1 (code)" in text
    assert "It helps in some domains and hurts in others" in text


def test_without_an_equal_budget_single_model_there_is_no_verdict() -> None:
    world = World({"chat": (1.0, 0.5)})
    for text in (
        render_evaluation(world.evaluation(world.mixture), NO_ROUTER),
        markdown_evaluation(world.evaluation(world.mixture), NO_ROUTER),
        render_systems({"a": world.evaluation(world.mixture)}),
    ):
        assert "No verdict: no single model of the same budget was given" in flat(text)
        assert "helps." in flat(text)
        assert "single model |" not in text
    assert verdict(None).startswith("No verdict")


# ---- the table -------------------------------------------------------------------------------------------------


def test_the_numbers_of_a_row_stand_under_their_titles() -> None:
    world = World({"chat": (0.8, 0.6), "code": (0.5, 0.5), "dahoas": (1.0, 1.0)}, experts=("chat", "code"))
    table = evaluation_table(world.evaluation(world.mixture), world.routing, world.comparison)
    rows = {row[0]: dict(zip([column.title for column in table.columns], row, strict=True)) for row in table.rows}
    assert list(rows) == ["chat", "code", "dahoas", "mean of domains", "without flagged", "mean of pairs"]
    assert rows["chat"] == {
        "domain": "chat",
        "pairs": "200",
        "accuracy, 95%": "80.0 73.9-85.0",
        "single\nmodel": "60.0",
        "gain": "+20.0",
        "longer\nrule": "75.0",
        "router\nright": "100.0",
        "oracle\nrouter": "80.0",
        "random\nrouter": "0.0",
        "notes": "better",
    }
    assert (rows["code"]["notes"], rows["dahoas"]["notes"]) == ("chance", "saturated")
    assert (rows["dahoas"]["router\nright"], rows["mean of domains"]["router\nright"]) == ("-", "-")
    assert (rows["mean of domains"]["single\nmodel"], rows["mean of domains"]["gain"]) == ("70.0", "+6.7")
    assert (rows["without flagged"]["single\nmodel"], rows["without flagged"]["gain"]) == ("60.0", "+20.0")
    assert rows["mean of pairs"]["pairs"] == "600"


def test_columns_with_nothing_to_say_are_left_out() -> None:
    world = World({"chat": (0.8, 0.6)})
    evaluation = evaluate(world.preferences, [RoutedReward(reward=1.0)] * 200, [RoutedReward(reward=0.0)] * 200)
    titles = [column.title for column in evaluation_table(evaluation, NO_ROUTER).columns]
    assert titles == ["domain", "pairs", "accuracy, 95%", "longer\nrule", "notes"]


names = st.text(min_size=1, max_size=60)


@given(st.lists(names, min_size=1, max_size=6, unique=True), st.lists(names, min_size=1, max_size=6, unique=True))
@settings(max_examples=40, deadline=None)
def test_any_names_fit_in_100_columns_and_in_one_markdown_row(domains: list[str], systems: list[str]) -> None:
    from rich.cells import cell_len

    rows = [Preference(prompt=d, chosen="c", rejected="j", domain=d) for d in domains]
    reward = [RoutedReward(reward=1.0, expert=domains[0], oracle=1.0, random=1.0) for _ in rows]
    low = [RoutedReward(reward=0.0, expert=domains[0], oracle=0.0, random=0.0) for _ in rows]
    evaluation = evaluate(rows, reward, low)
    correct = np.ones(len(rows), dtype=bool)
    comparison = compare({"": correct, **dict.fromkeys(systems, correct)}, domains, domains, baseline="")
    routing = routing_report(rows, reward, low, experts=[domains[0], "another"])
    one = render_evaluation(evaluation, routing, comparison, name=systems[0])
    several = render_systems(dict.fromkeys(systems, evaluation), comparison)
    tables = [line for line in (one + several).split("\n") if not line.isascii() or line.startswith(" ")]
    assert max(cell_len(line) for line in tables if "─" in line) <= 100
    markdown = markdown_evaluation(evaluation, routing, comparison, name=systems[0])
    table = [line for line in markdown.split("\n") if line.startswith("|")]
    assert len(table) == 2 + evaluation_table(evaluation, routing, comparison, name=systems[0]).num_domains + 2
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1


def test_a_wide_evaluation_fits_in_100_columns() -> None:
    domains = {"a_domain_with_a_very_long_name_indeed": (0.995, 0.6), "dahoas": (1.0, 0.5), "chat": (0.8, 0.7)}
    world = World(domains, experts=tuple(domains))
    cost = Cost(parameters_stored=196_484_362, parameters_active=185_000_000, seconds=31.25, num_pairs=2_500)
    text = render_evaluation(world.evaluation(world.mixture, cost), world.routing, world.comparison)
    assert max(map(len, text.split("\n"))) <= 100
    assert "100.0 98.1-100.0" in text
    assert "Cost: 196.5 M parameters stored, 185.0 M active; 12.5 ms a pair (2,500 pairs in 31.2 s)." in flat(text)


# ---- below the table -------------------------------------------------------------------------------------------


def test_ties_truncation_and_flags_are_counted_below() -> None:
    preferences = [Preference(prompt=str(i), chosen="c", rejected="j", domain="xy"[i % 2]) for i in range(8)]
    chosen = [RoutedReward(reward=float(i % 4 > 0), truncated=i == 3) for i in range(8)]
    evaluation = evaluate(preferences, chosen, [RoutedReward(reward=0.0)] * 8)
    text = flat(render_evaluation(evaluation, NO_ROUTER))
    assert "Ties: equal rewards in 2 of 8 pairs, counted as wrong (x 2)." in text
    assert "Truncated: a response cut short in 1 of 8 pairs (y 1)." in text
    assert "Cost: not measured." in text
    assert "Every domain is flagged." in text
    assert "Length alone does as well" in text


def test_the_router_is_described_by_domain_with_the_most_used_experts_first() -> None:
    used = ["a"] * 6 + ["b"] * 2 + ["c", "d", "e", "f"]
    preferences = [Preference(prompt=str(i), chosen="c", rejected="j", domain="a") for i in range(12)]
    rewards = [RoutedReward(reward=0.0, expert=e) for e in used]
    routing = routing_report(preferences, rewards, rewards, experts=list("abcdef"))
    text = render_evaluation(evaluate(preferences, rewards, rewards), routing)
    assert "50.0% of 12 prompts went to the expert of their domain" in flat(text)
    assert "    a: to a 50.0%, b 16.7%, c 8.3%, d 8.3%, 2 others 16.7%" in text


def test_domains_without_an_expert_are_named() -> None:
    world = World({"chat": (0.8, 0.6), "law": (0.7, 0.7)}, experts=("chat",))
    assert "No expert of their own: law." in world.rendered()
    assert "No expert of their own" not in World({"chat": (0.8, 0.6)}, experts=("chat",)).rendered()


# ---- several systems -------------------------------------------------------------------------------------------


def test_systems_side_by_side_mark_what_is_better_and_worse() -> None:
    world = World({"chat": (0.8, 0.6), "code": (0.5, 0.75), "math": (0.7, 0.7)})
    systems = {"one": world.evaluation(world.single), "arliss": world.evaluation(world.mixture)}
    lines = markdown_systems(systems, world.comparison).split("\n")
    assert lines[0] == "| domain | one | arliss | notes |"
    assert lines[2] == "| chat | 60.0 53.1-66.5 | 80.0▲ 73.9-85.0 |  |"
    assert lines[3] == "| code | 75.0 68.6-80.5 | 50.0▼ 43.1-56.9 |  |"
    assert lines[4] == "| math | 70.0 63.3-75.9 | 70.0 63.3-75.9 |  |"
    assert "▲ better, ▼ worse than one" in render_systems(systems, world.comparison)


def test_a_flag_of_every_system_is_laid_to_the_domain() -> None:
    world = World({"hellaswag": (0.5, 0.5), "chat": (0.5, 0.8)})
    systems = {"one": world.evaluation(world.single), "arliss": world.evaluation(world.mixture)}
    lines = markdown_systems(systems).split("\n")
    assert lines[2].startswith("| chat |")
    assert lines[2].endswith("|  |")
    assert lines[3].startswith("| hellaswag |")
    assert lines[3].endswith("| chance |")


def test_every_system_is_shown_when_there_are_many() -> None:
    world = World({"chat": (0.8, 0.6)})
    systems = {f"system{k}": world.evaluation(world.mixture) for k in range(9)}
    titles = [line for line in markdown_systems(systems).split("\n") if line.startswith("| domain")]
    assert [sum(name in line for line in titles) for name in systems] == [1] * 9


# ---- faults ----------------------------------------------------------------------------------------------------


def test_a_comparison_of_other_rows_is_refused() -> None:
    world, other = World({"chat": (0.8, 0.6)}), World({"chat": (0.7, 0.6)})
    with pytest.raises(ValueError, match="make both from the same rewards"):
        render_evaluation(world.evaluation(world.mixture), NO_ROUTER, other.comparison)


def test_a_name_is_needed_among_several_systems() -> None:
    world = World({"chat": (0.8, 0.6)})
    correct = correct_pairs(world.mixture, world.rejected)
    groups = [p.prompt for p in world.preferences]
    three = compare({"a": correct, "b": correct, "c": correct}, groups, ["chat"] * 200, baseline="c")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'a', 'b'"):
        render_evaluation(world.evaluation(world.mixture), NO_ROUTER, three)
    assert "b is better" in render_evaluation(world.evaluation(world.mixture), NO_ROUTER, three, name="b")


def test_systems_of_other_domains_are_not_put_side_by_side() -> None:
    chat, code = World({"chat": (0.8, 0.6)}), World({"code": (0.8, 0.6)})
    with pytest.raises(ValueError, match="evaluate alike"):
        render_systems({"a": chat.evaluation(chat.mixture), "b": code.evaluation(code.mixture)})
