"""The ensemble: its aggregates, standardised members that differ, and finished runs as members."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moreward.config import resolve
from moreward.data.batches import conversation_batch, side
from moreward.errors import ConfigError, RunError
from moreward.evals.run import evaluate_run
from moreward.nn.backbone import Backbone
from moreward.nn.combine import aggregate, variance
from moreward.nn.experts import Standardize, fold
from moreward.registry import find_recipe
from moreward.scoring import load
from moreward.systems._base import System
from moreward.train.ensemble import ensemble
from moreward.train.runner import train
from moreward.types import Batch, Conversation, Preference
from trained import card, weights, write_pairs
from trained import given as configuration

Tiny = Callable[[str], Path]
Make = Callable[..., Path]
HOWS = ("mean", "median", "worst", "uncertainty", "deviation")


def untrained(tiny_backbone: Tiny, tune: str, **system: Any) -> System:
    config = resolve({"recipe": "ensemble", "tune": tune, "system": system})
    torch.manual_seed(0)
    recipe = find_recipe("ensemble")
    return recipe(recipe.Config.model_validate(config.system), Backbone.load(str(tiny_backbone("bert"))), ("a",))


def sides(preferences: Sequence[Preference]) -> list[Conversation]:
    return [side(p, which) for p in preferences for which in ("chosen", "rejected")]


# ---- aggregates


@given(st.lists(st.lists(st.floats(-10, 10), min_size=3, max_size=3), min_size=1, max_size=5), st.floats(0, 2))
def test_each_aggregate_is_what_its_name_says(rows: list[list[float]], caution: float) -> None:
    reward_NK = torch.tensor(rows, dtype=torch.float64)
    found = {how: aggregate(reward_NK, how, caution).tolist() for how in HOWS}
    for n, row in enumerate(rows):
        mean = sum(row) / 3
        spread = sum((r - mean) ** 2 for r in row) / 3
        wanted = (mean, median(row), min(row), mean - caution * spread, mean - caution * spread**0.5)
        assert [found[how][n] for how in HOWS] == pytest.approx(wanted, abs=1e-6)


def test_a_median_of_two_is_their_mean_and_the_variance_is_that_of_the_population() -> None:
    reward_NK = torch.tensor([[1.0, 3.0]])
    assert aggregate(reward_NK, "median", 0.5).item() == 2.0
    assert variance(reward_NK).item() == 1.0  # the sample's would be 2
    assert aggregate(reward_NK, "uncertainty", 0.5).item() == 1.5


@pytest.mark.parametrize("how", ["uncertainty", "deviation"])
def test_a_caution_of_zero_is_zero(how: Any) -> None:
    reward_NK = torch.randn(7, 4)
    assert torch.equal(aggregate(reward_NK, how, 0.0), reward_NK.mean(1))


def test_a_caution_of_zero_survives_the_configuration_and_a_saved_run(make: Make, pairs: Sequence[Preference]) -> None:
    run = make("ensemble", "bert", "tune=frozen", "system.num_members=3", "system.how=uncertainty", "system.caution=0")
    assert card(run)["config"]["system"]["caution"] == 0
    for reward in load(run).score(sides(pairs[:4]), explain=True):
        assert reward.reward == pytest.approx(sum(reward.expert_rewards.values()) / 3, abs=1e-5)


# ---- members


@pytest.mark.parametrize("tune", ["full", "lora", "frozen"])
def test_members_start_and_learn_apart(tune: str, make: Make) -> None:
    run = make("ensemble", "bert", f"tune={tune}", "system.num_members=3")
    stages = card(run)["stages"]
    assert [stage["stage"] for stage in stages] == ["member-0", "member-1", "member-2"]
    assert len({stage["pairs"] for stage in stages}) == 1, "each sees all the pairs"
    heads = {k: v for k, v in weights(run).items() if "head" in k and v.dim() > 1}
    assert len({v.numpy().tobytes() for v in heads.values()}) == len(heads)


def test_adding_a_member_changes_no_other(make: Make) -> None:
    two, three = (weights(make("ensemble", "bert", "tune=frozen", f"system.num_members={n}")) for n in (2, 3))
    assert all(torch.equal(two[k], three[k]) for k in two)


@pytest.mark.parametrize("tune", ["full", "lora", "frozen"])
def test_every_member_judges_every_row_as_it_would_alone(
    tune: str, make: Make, pairs: Sequence[Preference], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = load(make("ensemble", "bert", f"tune={tune}", "system.num_members=3"))
    encoded = [scorer.encoder.conversation(item) for item in sides(pairs[:3])]
    batch = conversation_batch(encoded, [-1] * 6, scorer.encoder.pad_id)
    system: Any = scorer.system
    calls: list[int] = []
    encode = Backbone.encode
    monkeypatch.setattr(Backbone, "encode", lambda self, ids, *rest: calls.append(len(ids)) or encode(self, ids, *rest))
    with torch.no_grad():
        together = system(batch).expert_reward_NK
        assert calls == {"full": [6, 6, 6], "lora": [18], "frozen": [6]}[tune]
        alone = torch.stack([system.members(batch, torch.full((6,), k)) for k in range(3)], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", HOWS)
def test_a_member_in_other_units_changes_nothing(how: str, make: Make, pairs: Sequence[Preference]) -> None:
    """Replace member 1 by a · r + b, standardised on the same reference."""
    scorer = load(make("ensemble", "bert", "tune=frozen", "system.num_members=3"))
    system: Any = scorer.system
    system.config = system.config.model_copy(update={"how": how})
    before = [r.reward for r in scorer.score(sides(pairs[:6]))]
    last, standardize = system.members.head("member-1").last, system.standardizer("member-1")
    with torch.no_grad():
        last.weight.mul_(8.0)
        last.bias.mul_(8.0).sub_(20.0)
        raw = [r.reward for r in scorer.score(sides(pairs[:6]))]
        standardize.mean.mul_(8.0).sub_(20.0)
        standardize.std.mul_(8.0)
    assert [r.reward for r in scorer.score(sides(pairs[:6]))] == pytest.approx(before, abs=0.05)
    assert how == "median" or raw != pytest.approx(before, abs=1.0), "statistics that are stored but not applied"


def test_a_zero_and_unit_folded_into_a_head_change_no_reward(make: Make, pairs: Sequence[Preference]) -> None:
    scorer = load(make("ensemble", "bert", "tune=frozen", "system.num_members=3"))
    system: Any = scorer.system
    before = [r.reward for r in scorer.score(sides(pairs[:6]))]
    for name in system.names:
        fold(system.members.head(name), system.standardizer(name))
    assert all(float(m.std) == 1.0 for m in system.modules() if isinstance(m, Standardize))
    assert [r.reward for r in scorer.score(sides(pairs[:6]))] == pytest.approx(before, abs=0.05)


def test_raw_members_are_refused_unless_told_otherwise(tiny_backbone: Tiny) -> None:
    ids, zeros = torch.tensor([[1, 2, 3]]), torch.zeros(1, dtype=torch.long)
    batch = Batch(
        ids_NT=ids,
        mask_NT=torch.ones_like(ids),
        prompt_ids_PT=ids,
        prompt_mask_PT=torch.ones_like(ids),
        prompt_of_N=zeros,
        domain_N=zeros,
    )
    with pytest.raises(ConfigError, match="zero and unit"):
        untrained(tiny_backbone, "frozen").eval()(batch)
    assert untrained(tiny_backbone, "frozen", raw=True).eval()(batch).reward_N.shape == (1,)


def test_with_a_member_for_each_model_it_has_the_parameters_of_rodos(tiny_backbone: Tiny) -> None:
    """The equal-budget control of RODOS over two domains: three whole models, averaged."""
    members = untrained(tiny_backbone, "full", num_members=3)
    rodos = find_recipe("rodos")
    backbone = Backbone.load(str(tiny_backbone("bert")))
    mixture = rodos(rodos.Config(tune="full"), backbone, ("a", "b"))
    router_head, reward_head = 2 * (backbone.hidden_size + 1), backbone.hidden_size + 1
    assert members.num_parameters() == mixture.num_parameters() - router_head + reward_head
    assert members.num_active_parameters() == members.num_parameters()


def test_explained_rewards_name_the_members_and_no_expert(make: Make, pairs: Sequence[Preference]) -> None:
    run = make("ensemble", "bert", "tune=lora", "system.num_members=3")
    plain, told = (load(run).score(sides(pairs[:2]), explain=explain)[0] for explain in (False, True))
    assert (plain.expert, plain.weights, plain.expert_rewards) == ("", {}, {})
    assert list(told.expert_rewards) == ["member-0", "member-1", "member-2"]
    assert told.reward == pytest.approx(sum(told.expert_rewards.values()) / 3, abs=1e-4)


# ---- finished runs as members


@pytest.mark.parametrize("how", ["mean", "worst"])
def test_an_ensemble_of_any_runs_on_one_backbone_is_the_aggregate_of_their_standardised_rewards(
    how: str, make: Make, pairs: Sequence[Preference], tmp_path: Path
) -> None:
    runs = [
        make("base_lora", "bert"),
        make("arliss", "bert"),
        make("baseline", "bert", "tune=frozen", "data.domain_map={long: all, short: all}"),
    ]
    made = ensemble(runs, pairs[:20], out=tmp_path / "e", how=how)
    assert (made.num_responses, made.too_long) == (40, 0)
    items = sides(pairs)
    columns = []
    for run in runs:
        reward_N = torch.tensor([r.reward for r in load(run).score(items)], dtype=torch.float64)
        reference_N = torch.tensor([r.reward for r in load(run).score(sides(pairs[:20]))], dtype=torch.float64)
        assert made.units[str(run)] == pytest.approx(
            (reference_N.mean().item(), reference_N.std(correction=0).item()), rel=1e-3, abs=1e-3
        )
        columns.append((reward_N - reference_N.mean()) / reference_N.std(correction=0))
    wanted = aggregate(torch.stack(columns, 1), how, 0.5)  # type: ignore[arg-type]
    assert [r.reward for r in load(made.run).score(items)] == pytest.approx(wanted.tolist(), abs=5e-3)
    told = card(made.run)
    assert [p["run"] for p in told["parents"]] == [str(run) for run in runs]
    assert told["domains"] == ["all", "long", "short"]
    assert told["golden"]


def test_whole_models_are_members_too_and_are_evaluated(
    make: Make, pairs: Sequence[Preference], tmp_path: Path
) -> None:
    runs = [make("baseline", "bert", "tune=full", f"seed={seed}") for seed in (0, 1)]
    made = ensemble([*runs, make("base_lora", "bert")], pairs[:20], out=tmp_path / "e", how="uncertainty", caution=0.1)
    scorer = load(made.run)
    assert scorer.check_golden() < 1e-3
    result = evaluate_run(scorer, pairs)
    assert result.diversity is not None
    assert result.diversity.experts == ("member-0", "member-1", "member-2")
    parts = [p.num_parameters() for p in (load(run).system for run in (*runs, make("base_lora", "bert")))]
    assert scorer.system.num_parameters() == sum(parts)


def test_members_on_one_frozen_backbone_hold_it_once(make: Make, pairs: Sequence[Preference], tmp_path: Path) -> None:
    runs = [make("base_lora", "bert"), make("base_lora", "bert", "seed=1")]
    made = ensemble(runs, pairs[:8], out=tmp_path / "e")
    system: System = load(made.run).system
    one = load(runs[0]).system
    shared = sum(p.numel() for p in one.backbones()[0].model.parameters())
    assert system.num_parameters() == 2 * one.num_parameters() - shared


def test_runs_that_cannot_be_members_are_refused_with_every_difference(
    make: Make, pairs: Sequence[Preference], tmp_path: Path
) -> None:
    runs = [make("base_lora", "bert"), make("base_lora", "qwen2", "data.max_length=128")]
    with pytest.raises(ConfigError) as refused:
        ensemble(runs, pairs[:8], out=tmp_path / "e")
    told = "\n".join(refused.value.faults)
    assert all(word in told for word in ("tokenizer", "data.max_length", "backbone", "pooling", str(runs[1])))
    assert not (tmp_path / "e").exists()
    with pytest.raises(ConfigError, match="at least two"):
        ensemble(runs[:1], pairs[:8], out=tmp_path / "e")
    with pytest.raises(ConfigError, match=r"system\.how"):
        ensemble([runs[0], runs[0]], pairs[:8], out=tmp_path / "e", how="max")
    with pytest.raises(RunError, match="finished run"):
        ensemble([runs[0], runs[0]], pairs[:8], out=runs[1])


def test_an_ensemble_of_runs_is_not_trained(tiny_backbone: Tiny, pairs: Sequence[Preference], tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", pairs)
    told = configuration("ensemble", tiny_backbone("bert"), data, tmp_path / "run", "tune=lora")
    member = {"recipe": "base_lora", "domains": ["a"], "system": {}}
    told["system"] = {"num_members": 2, "runs": [member, member]}
    with pytest.raises(ConfigError, match="moreward ensemble"):
        train(told)
    told["system"] = {"num_members": 3, "runs": [member, member]}
    with pytest.raises(ConfigError, match="the number of runs, 2"):
        train(told)
