"""Uncertainty of rewards: what it is made of, what a cautious scorer does with it; unasked it costs nothing."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from moreward.cli import app
from moreward.data.batches import side
from moreward.errors import AbstainedError, ConfigError, RunError
from moreward.evals.run import evaluate_run
from moreward.scoring import Scorer, load
from moreward.types import Conversation, Preference, Reward, Uncertainty
from moreward.uncertainty import Caution, disagreement, parse_limits, router_entropy
from trained import card, edit_card, write_pairs

TOLERANCE = 2e-3
Tiny = Callable[[str], Path]
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def scorer(make: Make) -> Scorer:
    return load(make())


@pytest.fixture(scope="module")
def items(pairs: Sequence[Preference]) -> list[Conversation]:
    return [side(p, which) for p in pairs[::4] for which in ("chosen", "rejected")]


@pytest.fixture(scope="module")
def strange(items: list[Conversation]) -> list[Conversation]:
    """The same, and one from a place where no training prompt lies."""
    return [*items, Conversation(prompt="def ( ) + : = 12 3 ! ? [ ] " * 3, response="It is calm.", domain="code")]


@pytest.fixture
def uncalibrated(make: Make, tmp_path: Path) -> Path:
    run = shutil.copytree(make(), tmp_path / "old")
    shutil.rmtree(run / "model" / "calibration")
    return run


# ---- the quantities --------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=5))
def test_disagreement_is_the_population_deviation_in_any_order_to_the_bit(rewards: list[float]) -> None:
    found = disagreement(rewards)
    assert found == pytest.approx(float(torch.tensor(rewards, dtype=torch.float64).std(correction=0)), abs=1e-9)
    assert {disagreement(list(p)) for p in itertools.permutations(rewards)} == {found}
    even = [1 / len(rewards)] * len(rewards)
    assert disagreement(rewards, even) == pytest.approx(found, abs=1e-9)
    alone = [1.0] + [0.0] * (len(rewards) - 1)
    assert disagreement(rewards, alone) == 0.0


def test_one_voice_cannot_disagree() -> None:
    assert disagreement([]) is None
    assert disagreement([3.0]) is None


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=6))
def test_router_entropy_lies_between_sure_and_clueless(logits: list[float]) -> None:
    found = float(router_entropy(torch.tensor([logits]))[0])
    shares = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()
    slow = -sum(p * math.log(p) for p in shares if p) / math.log(len(logits))
    assert found == pytest.approx(slow, abs=1e-6)
    assert 0.0 <= found <= 1.0


def test_router_entropy_at_its_ends() -> None:
    assert router_entropy(torch.zeros(1, 5)).tolist() == pytest.approx([1.0])
    assert router_entropy(torch.tensor([[900.0, 0.0, 0.0]])).tolist() == pytest.approx([0.0])
    with pytest.raises(ValueError, match="nothing to choose"):
        router_entropy(torch.zeros(1, 1))


# ---- a scorer that is asked ------------------------------------------------------------------------------------


def test_every_reward_carries_what_speaks_against_it(scorer: Scorer, items: list[Conversation]) -> None:
    plain, told = scorer.score(items, explain=True), scorer.score(items, explain=True, uncertainty=True)
    logits_NE = scorer.system.route(batch_of(scorer, items)).logits_NE  # type: ignore[operator]
    entropy = router_entropy(logits_NE).tolist()
    for n, (before, after) in enumerate(zip(plain, told, strict=True)):
        assert replace(after, uncertainty=None) == before
        doubt = after.uncertainty
        assert doubt is not None
        assert doubt.mean == before.reward
        assert doubt.disagreement == disagreement([*before.expert_rewards.values()])
        assert doubt.router_entropy == pytest.approx(entropy[n], abs=1e-4)
        assert doubt.temperature == scorer.calibration().temperature(after.expert)
        assert doubt.nearest in scorer.domains
        assert 0 <= doubt.out_of_domain <= 1  # type: ignore[operator]
    bare = scorer.score(items, uncertainty=True)
    assert [r.uncertainty for r in bare] == [r.uncertainty for r in told]
    assert all(not r.expert_rewards for r in bare)


def batch_of(scorer: Scorer, items: Sequence[Conversation]) -> Any:
    return next(batch for _, batch in scorer._batches(items, scorer._encode(items, "drop")))


def test_unasked_it_costs_nothing(scorer: Scorer, items: list[Conversation]) -> None:
    calls: list[str] = []
    backbone = scorer.system.backbones()[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "_doubts", lambda *given: calls.append("doubts"))
        patch.setattr(scorer, "find_calibration", lambda: calls.append("read"))
        rewards = scorer.score(items)
    assert calls == []
    assert backbone.store is None
    assert all(r.uncertainty is None for r in rewards)


def test_what_a_text_is_told_does_not_depend_on_order_or_company(make: Make, items: list[Conversation]) -> None:
    scorer = load(make(), deterministic=True)
    told = scorer.score(items, uncertainty=True)
    assert told == scorer.score(items, uncertainty=True)
    assert told == scorer.score(items[::-1], uncertainty=True)[::-1]
    assert told[3] == scorer.score([items[3]], uncertainty=True)[0]


def test_the_gate_may_weigh_the_disagreement(make: Make, items: list[Conversation]) -> None:
    scorer = load(make(), weigh="gate")
    gate_NE = scorer.system.route(batch_of(scorer, items)).logits_NE.double().softmax(-1).tolist()  # type: ignore[operator]
    for gate, reward in zip(gate_NE, scorer.score(items, explain=True, uncertainty=True), strict=True):
        weighed = disagreement([*reward.expert_rewards.values()], gate)
        assert reward.uncertainty is not None
        assert reward.uncertainty.disagreement == pytest.approx(weighed, abs=1e-4)


def test_one_model_has_no_disagreement_and_refuses_to_be_conservative(make: Make, items: list[Conversation]) -> None:
    run = make("baseline")
    for reward in load(run).score(items, uncertainty=True):
        assert reward.uncertainty is not None
        assert (reward.uncertainty.disagreement, reward.uncertainty.router_entropy) == (None, None)
        assert reward.uncertainty.out_of_domain is not None
    for faulty in ({"conservative": 0.5}, {"abstain": {"disagreement": 1.0}}):
        with pytest.raises(ConfigError, match=r"this run \(baseline\) has one voice"):
            load(run, **faulty)
    with pytest.raises(ConfigError, match="router_entropy needs a router"):
        load(run, abstain={"router_entropy": 0.5})
    with pytest.raises(ConfigError, match="needs a router over experts"):
        load(run, weigh="gate")


# ---- caution ---------------------------------------------------------------------------------------------------


def test_conservative_takes_deviations_off_and_zero_is_plain_to_the_bit(
    make: Make, scorer: Scorer, items: list[Conversation]
) -> None:
    assert load(make(), conservative=0.0).score(items) == scorer.score(items)
    cautious = load(make(), conservative=0.7)
    for reward in cautious.score(items, uncertainty=True):
        doubt = reward.uncertainty
        assert doubt is not None
        assert reward.reward == doubt.mean - 0.7 * doubt.disagreement  # type: ignore[operator]
    assert [r.uncertainty for r in cautious.score(items)] == [None] * len(items)
    assert cautious.check_golden() <= scorer.check_golden() + TOLERANCE  # golden rewards are the plain ones
    assert cautious.identity != scorer.identity


def test_a_scorer_abstains_with_a_reason_and_never_with_a_number(make: Make, strange: list[Conversation]) -> None:
    scorer = load(make(), abstain={"out_of_domain": 0.9, "disagreement": 1e6})
    rewards = scorer.score(strange, uncertainty=True)
    for reward in rewards:
        doubt = reward.uncertainty
        assert doubt is not None
        assert (reward.reward is None) == (doubt.out_of_domain > 0.9) == bool(reward.abstained)  # type: ignore[operator]
    assert {r.reward is None for r in rewards} == {True, False}
    silent = next(r for r in rewards if r.reward is None)
    assert silent.abstained.startswith("out_of_domain ")
    assert silent.abstained.endswith(" is above 0.9")
    with pytest.raises(AbstainedError, match="no reward: out_of_domain"):
        _ = silent.number


def test_ranking_puts_what_has_no_reward_last_and_best_of_none_is_an_error(scorer: Scorer) -> None:
    rewards = [1.0, None, 3.0, None]
    made = [Reward(reward=r, abstained="" if r else "why", uncertainty=Uncertainty(mean=0.5)) for r in rewards]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "score", lambda items, **more: made)
        found = scorer.compare("p", ["a", "b", "c", "d"])
        assert (found.order, scorer.best_of_n("p", ["a"] * 4)) == ([2, 0, 1, 3], 2)
        assert found.probabilities[1] == [0.5] * 4
        made[:] = made[1::2]
        with pytest.raises(AbstainedError, match="no best response: why"):
            scorer.best_of_n("p", ["b", "d"])


def test_every_fault_of_caution_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        Caution(conservative=-1, abstain={"mood": 1.0, "disagreement": float("nan")}, weigh="loud")  # type: ignore[arg-type]
    assert [f.split(":")[0] for f in raised.value.faults] == ["conservative", "abstain", "abstain", "weigh"]
    with pytest.raises(ConfigError) as raised:
        parse_limits(["disagreement", "router_entropy=half"])
    assert len(raised.value.faults) == 2
    assert parse_limits(["out_of_domain=0.9"]) == {"out_of_domain": 0.9}


# ---- probabilities ---------------------------------------------------------------------------------------------


def test_probabilities_are_sigmoids_of_tempered_margins(scorer: Scorer, pairs: Sequence[Preference]) -> None:
    rewards = scorer.score([side(p, w) for p in pairs for w in ("chosen", "rejected")])
    found = scorer.probabilities(pairs)
    for a, b, probability in zip(rewards[::2], rewards[1::2], found, strict=True):
        temperature = scorer.calibration().temperature(a.expert)
        assert probability == pytest.approx(1 / (1 + math.exp((b.number - a.number) / temperature)), abs=1e-9)
    swapped = scorer.probabilities([(p.prompt, p.rejected, p.chosen) for p in pairs])
    assert [p + q for p, q in zip(found, swapped, strict=True)] == pytest.approx([1.0] * len(found), abs=1e-3)
    compared = scorer.compare(pairs[0].prompt, [pairs[0].chosen, pairs[0].rejected], uncertainty=True)
    assert compared.probabilities[0][1] == pytest.approx(found[0], abs=1e-3)


def test_the_card_and_the_evaluation_tell_both_measures_before_and_after(
    make: Make, scorer: Scorer, pairs: Sequence[Preference]
) -> None:
    told = card(make())["calibration"]
    assert told == scorer.calibration().report
    assert told["quality"]["all"].keys() == {"before", "after"}
    assert told["quality"]["all"]["after"].keys() == {"pairs", "ece", "brier"}
    result = evaluate_run(scorer, pairs)
    assert result.calibration is not None
    assert result.calibration.keys() == {"all", "long", "short"}
    assert result.calibration["all"]["before"]["brier"] == pytest.approx(result.evaluation.micro.brier)


# ---- runs without, and the command -----------------------------------------------------------------------------


def test_an_older_run_loads_and_says_how_to_get_it(uncalibrated: Path, items: list[Conversation], pairs: Any) -> None:
    scorer = load(uncalibrated, conservative=0.5)  # needs nothing fitted
    assert len(scorer.score(items)) == len(items)
    assert evaluate_run(scorer, pairs).calibration is None
    for ask in (lambda: scorer.score(items, uncertainty=True), lambda: scorer.probabilities(pairs)):
        with pytest.raises(RunError, match=r"not available.*moreward calibrate RUN --data PAIRS"):
            ask()
    with pytest.raises(RunError, match="not available"):
        load(uncalibrated, abstain={"out_of_domain": 0.9})


def run_cli(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_fits_for_a_finished_run_without_touching_the_model(
    uncalibrated: Path, pairs: Sequence[Preference], items: list[Conversation], tmp_path: Path
) -> None:
    data = write_pairs(tmp_path / "own.jsonl", pairs)
    before = load(uncalibrated).identity
    said = run_cli("calibrate", uncalibrated, "--data", data)
    assert said.exit_code == 0, said.output
    assert "40 pairs, 0 not used" in said.output
    assert "calibration error" in said.output
    scorer = load(uncalibrated)
    assert scorer.identity == before
    assert scorer.calibration().report["pairs"] == 40
    assert scorer.score(items, uncertainty=True)[0].uncertainty is not None
    edit_card(uncalibrated, lambda card: {**card, "note": "another model"})
    with pytest.raises(RunError, match="fit"):
        load(uncalibrated).calibration()


def test_a_file_of_rewards_says_null_and_why_and_abstentions_are_counted_by_domain(
    make: Make, strange: list[Conversation], tmp_path: Path
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": i.prompt, "response": i.response, "domain": i.domain} for i in strange]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = run_cli("score", make(), source, "-o", out, "--uncertainty", "--abstain", "out_of_domain=0.9")
    assert said.exit_code == 0, said.output
    written = [json.loads(line) for line in out.read_text().splitlines()]
    silent = [(row, line) for row, line in zip(rows, written, strict=True) if line["reward"] is None]
    assert silent
    assert all(("abstained" in line) == (line["reward"] is None) for line in written)
    assert all(line["uncertainty"]["out_of_domain"] > 0.9 for _, line in silent)
    by_domain = [f"{d} {n}" for d in ("code", "long", "short") if (n := sum(r["domain"] == d for r, _ in silent))]
    assert f"no reward was given in {len(silent)} of these rows: {', '.join(by_domain)}" in said.output
    assert "NaN" not in out.read_text()
