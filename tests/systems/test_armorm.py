"""ArmoRM: what it learns from ratings, that debiasing counts everywhere, and that its explanation is its reward."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge

from moreward.config import deviations, resolve
from moreward.data.batches import conversation_batch, encode_pairs, pair_batch, side
from moreward.data.ratings import divided, load_ratings
from moreward.data.synthetic import generate
from moreward.errors import ConfigError, DataError
from moreward.nn.backbone import Backbone
from moreward.nn.features import FeatureStore
from moreward.nn.gates import ObjectiveGate
from moreward.nn.losses import PairwiseLoss
from moreward.scoring import Scorer, load
from moreward.systems.armorm import OBJECTIVES, Recipe, response_length
from moreward.train.runner import read_pairs, train
from moreward.types import Batch, Preference
from trained import card, given, weights, write_pairs

Tiny = Callable[[str], Path]
NAMES = ("brevity", "warmth", "imagery")
NUM_MISSING = 7


@pytest.fixture(scope="module")
def some() -> list[Preference]:
    return generate(12, domains=("support", "stories"))


@pytest.fixture(scope="module")
def files(some: list[Preference], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("rated")
    rows = []
    for pair in some:
        for which in ("chosen", "rejected"):
            levels = {name: pair.meta[f"capabilities_{which}"][name] for name in NAMES}
            levels["warmth"] = levels["warmth"] if len(rows) >= NUM_MISSING else None
            rows.append({"prompt": pair.prompt, "response": getattr(pair, which), "ratings": levels, "scale": [0, 3]})
    ratings = folder / "ratings.jsonl"
    ratings.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return write_pairs(folder / "pairs.jsonl", some), ratings


@pytest.fixture(scope="module")
def configured(files: tuple[Path, Path], tiny_backbone: Tiny) -> Any:
    def made(out: Path, *words: str, kind: str = "llama") -> dict[str, Any]:
        own = (f"data.ratings={files[1]}", "system.gate_width=16", "data.max_length=128", "data.on_long=truncate")
        return given("armorm", tiny_backbone(kind), files[0], out, *own, *words)

    return made


@pytest.fixture(scope="module", params=["null", "brevity", "length"], ids=["plain", "attribute", "length"])
def run(request: pytest.FixtureRequest, configured: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(
        configured(tmp_path_factory.mktemp("run") / "run", f"system.debias={request.param}", "system.debias_limit=9")
    )


def scorer_of(run: Path) -> tuple[Scorer, Recipe]:
    scorer = load(run)
    assert isinstance(scorer.system, Recipe)
    return scorer, scorer.system


def batch_of(scorer: Scorer, preferences: Sequence[Preference]) -> Batch:
    encoded = encode_pairs(scorer.encoder, preferences, scorer.domains, on_long="truncate")
    return pair_batch(encoded.pairs, scorer.encoder.pad_id)


# ---------------------------------------------------------------- stage 1


def test_each_probe_is_scikit_learns_ridge_on_the_rows_that_are_rated(
    run: Path, files: tuple[Path, Path], some: list[Preference]
) -> None:
    scorer, system = scorer_of(run)
    sides = divided(load_ratings(files[1]), read_pairs(resolve(card(run)["config"])).val)
    told = next(s["solved"] for s in card(run)["stages"] if s["stage"] == "objectives")
    assert tuple(told) == NAMES == scorer.experts
    for name in NAMES:
        rows = [r for r in sides.train if name in r.ratings]
        encoded = [scorer.encoder.conversation(r.conversation) for r in rows]
        batch = conversation_batch(encoded, [-1] * len(rows), scorer.encoder.pad_id)
        with torch.no_grad():
            hidden_ND = system.probes.backbone(batch.ids_NT, batch.mask_NT).double()
        theirs = Ridge(alpha=told[name]["alpha"], fit_intercept=False, solver="svd")
        theirs.fit(hidden_ND.numpy(), np.array([r.ratings[name] for r in rows]))
        torch.testing.assert_close(
            system.probes.probe(name).weight.detach()[0], torch.from_numpy(theirs.coef_), rtol=0, atol=1e-4
        )  # features of one batch and of another differ in the last float32 digit
        assert told[name]["train"] == len(rows)
    report = card(run)["data"]["ratings"]["objectives"]
    assert report["warmth"]["missing"] == NUM_MISSING
    assert report["brevity"]["missing"] == 0
    assert told["brevity"]["val_mse"] > 0


def test_an_objective_that_nobody_rated_is_refused_with_those_that_are(configured: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"system\.objectives: wit: not rated in data\.ratings \(it has brevity"):
        train(configured(tmp_path / "run", "system.objectives=[brevity, wit]"))
    with pytest.raises(ConfigError, match="learns from pairs only"):
        train({**configured(tmp_path / "run"), "recipe": "more", "system": {}})


def test_an_objective_without_a_rating_to_fit_is_an_error(run: Path) -> None:
    _, system = scorer_of(run)
    batch = Batch(
        ids_NT=torch.ones(2, 3).long(), mask_NT=torch.ones(2, 3).long(), prompt_ids_PT=torch.ones(1, 2).long(),
        prompt_mask_PT=torch.ones(1, 2).long(), prompt_of_N=torch.zeros(2).long(), domain_N=torch.zeros(2).long(),
        ratings_NK=torch.tensor([[0.5, torch.nan, 0.1]] * 2),
    )  # fmt: skip
    with torch.no_grad(), pytest.raises(DataError, match="rated for 'warmth'"):
        system.solve_objectives(system.objectives, [batch], [])


# ---------------------------------------------------------------- debiasing


def test_the_reference_set_keeps_no_correlation_above_the_threshold(run: Path) -> None:
    scorer, system = scorer_of(run)
    if not system.config.debias:
        assert torch.equal(system.debias_AK, torch.eye(3, dtype=torch.float64))
        return
    batch = batch_of(scorer, read_pairs(resolve(card(run)["config"])).train)
    stored = next(s["solved"] for s in card(run)["stages"] if s["stage"] == "debias")
    assert all(one["after"] <= 0.03 for one in stored["objectives"].values())
    # Solved again, so that both look at the same bits: at the least amount that will do, rounding may turn two ranks.
    system.probes.backbone.store = FeatureStore()
    with torch.no_grad():
        solved = system.solve_debias([batch], [])
    explained = system.explain(batch)
    attribute_N = explained.attributes[:, system.attributes.index(system.config.debias)]
    debiased_NK = explained.attributes @ system.debias_AK
    assert solved["responses"] == len(batch)
    for k, name in enumerate(NAMES):
        if name == system.config.debias:
            assert float(debiased_NK[:, k].abs().max()) == 0.0
        else:
            after = float(spearmanr(debiased_NK[:, k], attribute_N).statistic)
            assert after <= 0.03
            assert after == pytest.approx(solved["objectives"][name]["after"], abs=1e-9)
    if system.config.debias == "length":
        torch.testing.assert_close(attribute_N, (response_length(batch) - system.length_mean) / system.length_std)


def test_debiasing_is_in_the_checkpoint_in_the_loss_and_in_the_reward(run: Path, some: list[Preference]) -> None:
    scorer, system = scorer_of(run)
    assert torch.equal(weights(run)["debias_AK"], system.debias_AK)
    batch, loss = batch_of(scorer, some), PairwiseLoss()
    before, rewards = loss(system(batch), batch).loss_B.mean(), scorer.score([side(some[0], "chosen")])
    system.debias_AK[0] -= 0.5
    assert loss(system(batch), batch).loss_B.mean() != before
    assert scorer.score([side(some[0], "chosen")]) != rewards


def test_what_cannot_be_debiased_within_the_limit_is_warned_of(
    configured: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(configured(tmp_path / "run", "system.debias=brevity", "system.debias_limit=1e-12"))
    solved = next(s["solved"] for s in card(run)["stages"] if s["stage"] == "debias")
    missed = [name for name, one in solved["objectives"].items() if not one["reached"]]
    assert missed
    assert f"debias: {', '.join(missed)} still follow brevity" in caplog.text


# ---------------------------------------------------------------- explanation


def test_the_parts_of_a_reward_sum_to_it(run: Path, some: list[Preference]) -> None:
    scorer, system = scorer_of(run)
    items = [side(p, which) for p in some[:4] for which in ("chosen", "rejected")]
    explained = system.explain(scorer.batch(items))
    assert explained.rewards.shape == explained.gating_output.shape == (8, 3)
    assert explained.score.shape == (8,)
    total_N = (explained.attributes * explained.coefficients).sum(1)
    torch.testing.assert_close(total_N, explained.score, rtol=0, atol=1e-12)
    torch.testing.assert_close(explained.gating_output.sum(1), system.gate.scale.detach().double().expand(8))
    rewards = scorer.score(items, explain=True)
    for n, reward in enumerate(rewards):
        assert sum(reward.parts.values()) == pytest.approx(reward.reward, abs=1e-6)
        assert tuple(reward.parts) == system.attributes
        assert [reward.expert_rewards[name] for name in NAMES] == pytest.approx(explained.rewards[n].tolist(), abs=1e-4)
        assert reward.reward == pytest.approx(float(explained.score[n]), abs=1e-4)
        assert sum(reward.weights.values()) == pytest.approx(1.0)
    assert not scorer.score(items)[0].parts


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_both_responses_to_a_prompt_get_the_same_weights(
    kind: str, configured: Any, some: list[Preference], tmp_path: Path
) -> None:
    scorer, system = scorer_of(train(configured(tmp_path / "run", kind=kind)))
    pair = some[3]
    gating_NK = system.explain(scorer.batch([side(pair, "chosen"), side(pair, "rejected")])).gating_output
    assert torch.equal(gating_NK[0], gating_NK[1])
    apart = [system.explain(scorer.batch([side(pair, which)])).gating_output[0] for which in ("chosen", "rejected")]
    torch.testing.assert_close(apart[0], apart[1], rtol=1e-5, atol=1e-6)
    other = system.explain(scorer.batch([side(some[-1], "chosen")])).gating_output[0]
    assert not torch.equal(other, gating_NK[0])


def test_a_reward_is_the_same_under_left_and_right_padding_with_eos(run: Path) -> None:
    scorer, system = scorer_of(run)
    assert scorer.encoder.pad_id == scorer.encoder.tokenizer.eos_token_id
    items = [("Tea?", "Yes."), ("Tell me about tea.", "It is calm, and there is more."), ("Tea?", "No, thank you.")]
    batch = scorer.batch(items)
    order_NT = batch.mask_NT.argsort(dim=1, stable=True)
    left = replace(batch, ids_NT=batch.ids_NT.gather(1, order_NT), mask_NT=batch.mask_NT.gather(1, order_NT))
    assert not torch.equal(left.ids_NT, batch.ids_NT)
    alone = torch.cat([system(scorer.batch([item])).reward_N for item in items])
    for other in (system(left).reward_N, alone):
        torch.testing.assert_close(other, system(batch).reward_N, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- settings


def test_every_shard_of_kept_features_is_a_file_and_none_is_lost(tiny_backbone: Tiny, tmp_path: Path) -> None:
    backbone = Backbone.load(str(tiny_backbone("llama")))
    store, texts = FeatureStore(tmp_path), [[20 + i, 30, 40] for i in range(12)]
    for start in range(0, 12, 4):
        store.compute(backbone, texts[start : start + 4])
        store.save()
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert len(FeatureStore(tmp_path)) == 12


def test_the_paper_preset_is_the_papers_and_has_its_sizes() -> None:
    config = resolve({"recipe": "armorm", "preset": "paper"})
    assert deviations(config) == []
    assert (config.train.learning_rate, config.train.batch_size, config.train.max_steps) == (1e-3, 1024, 2000)
    assert len(OBJECTIVES) == 19
    assert OBJECTIVES[4] == config.system["debias"] == "helpsteer-verbosity"
    gate = ObjectiveGate(4096, 19, width=1024, num_layers=3, temperature=10.0, dropout=0.2)
    assert sum(p.numel() for p in gate.parameters()) == 6_314_004
    assert 4096 * len(OBJECTIVES) == 77_824


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"objectives": ["a", "a"]}, "each once"),
        ({"objectives": ["length"]}, "none is called length"),
        ({"objectives": ["a"], "debias": "b"}, "neither length nor one of the objectives"),
        ({"temperature": 0}, "greater than 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve({"recipe": "armorm", "system": settings})


def test_objectives_are_parts_of_one_reward_and_do_not_disagree(run: Path, some: list[Preference]) -> None:
    """Helpful and short at once is no quarrel: disagreement is for experts that judge the same thing."""
    reward = scorer_of(run)[0].score([side(some[0], "chosen")], uncertainty=True)[0]
    assert reward.uncertainty is not None
    assert reward.uncertainty.disagreement is None
    assert reward.uncertainty.router_entropy is not None
