"""How rewards are computed: chunks, one route a prompt, deterministic rewards, bf16 and its price, shared prefixes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moreward import scoring
from moreward.data.batches import Encoded, side
from moreward.errors import ConfigError
from moreward.evals.dtype import dtype_check
from moreward.report import render_dtype
from moreward.scoring import Scorer, load
from moreward.types import Conversation, Preference
from trained import trained

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory, tiny_backbone, pairs) -> Make:
    """A small run; the longest texts of the other tokenizers have 112 tokens."""

    def get(recipe: str, kind: str) -> Path:
        return trained(tmp_path_factory.mktemp("runs"), tiny_backbone, pairs, recipe, kind, "data.max_length=128")

    return get


@pytest.fixture(scope="module")
def items(pairs: Sequence[Preference]) -> list[Conversation]:
    return [replace(side(p, which), id=f"{p.id}/{which}") for p in pairs for which in ("chosen", "rejected")]


def encoded(*sizes: tuple[int, int]) -> list[Encoded]:
    """Texts by the number of their prompt (0..8) and of their tokens."""
    return [Encoded(tuple(range(length)), (prompt,) * 10) for prompt, length in sizes]


def test_packed_chunks_keep_the_order_of_arrival_and_count_a_shared_prompt_once():
    rows = encoded((0, 40), (0, 40), (0, 40), (1, 90), (2, 5), (2, 200))
    assert scoring._in_order(rows, 100, prompts_once=True) == [[0, 1, 2], [3, 4], [5]]
    assert scoring._in_order(rows, 100, prompts_once=False) == [[0, 1], [2], [3, 4], [5]]
    assert scoring._in_order([], 100, prompts_once=True) == []
    cut = [replace(row, num_dropped=3) for row in rows[:3]]  # what was cut off their beginnings is not shared
    assert scoring._in_order(cut, 100, prompts_once=True) == [[0, 1], [2]]


def test_padded_chunks_hold_rows_of_similar_length_within_the_budget():
    rows = encoded((0, 50), (0, 10), (0, 45), (0, 12))
    assert scoring._by_length(rows, 100) == [[1, 3], [2, 0]]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_prompt_is_routed_once_for_all_its_responses(make: Make, kind: str, monkeypatch):
    scorer = load(make("arliss", kind))
    monkeypatch.setattr(scoring, "TOKENS_PER_FORWARD", {"cpu": 20})  # several chunks
    seen: list[tuple[int, ...]] = []
    route = scorer.system.route_prompts

    def watched(batch):
        seen.extend(tuple(ids.tolist()) for ids in batch.prompt_ids_PT)
        return route(batch)

    monkeypatch.setattr(scorer.system, "route_prompts", watched)
    rewards = scorer.score([(f"Question {q}", f"Answer {a} of many") for a in range(6) for q in range(2)])
    assert len(seen) == len(set(seen)) == 2
    monkeypatch.undo()
    alone = [load(make("arliss", kind)).score([(f"Question {q}", "Answer 3 of many")])[0] for q in range(2)]
    assert [r.expert for r in rewards[6:8]] == [r.expert for r in alone]


@pytest.mark.parametrize(
    ("kind", "recipe"), [("bert", "arliss"), ("deberta-v2", "arliss"), ("llama", "rodos"), ("roberta", "more")]
)
def test_deterministic_rewards_do_not_depend_on_batch_mates_to_the_last_bit(make, items, kind, recipe):
    scorer = load(make(recipe, kind), deterministic=True)
    alone = {item.id: scorer.score([item])[0].reward for item in items[:24]}
    rng = random.Random(0)
    for _ in range(6):
        company = rng.sample(items[:24], rng.randint(2, 24))
        assert [r.reward for r in scorer.score(company)] == [alone[item.id] for item in company]


@pytest.mark.parametrize("kind", ["bert", "deberta-v2"])
def test_deterministic_rewards_are_the_ordinary_ones_but_for_rounding(make, items, kind):
    free, fixed = load(make("arliss", kind)), load(make("arliss", kind), deterministic=True)
    a, b = (torch.tensor([r.reward for r in s.score(items)]) for s in (free, fixed))
    assert float((a - b).abs().max()) < 2e-3
    assert free.identity != fixed.identity  # a job begun with one is not ended with the other


def test_best_of_n_on_a_decoder_reads_the_prompt_once(make, monkeypatch):
    scorer = load(make("arliss", "llama"))
    (backbone,) = scorer.system.backbones()
    sizes: list[int] = []
    layer = backbone.family.layer

    def watched(i, x_TD, *rest):
        sizes.append(len(x_TD))
        return layer(i, x_TD, *rest)

    monkeypatch.setattr(backbone.family, "layer", watched)
    prompt, responses = "Tell me about the sea and old maps, in a few calm words.", [f"Answer {n}" for n in range(8)]
    encoded = [scorer.encoder.conversation(Conversation(prompt=prompt, response=r)) for r in responses]
    scorer.best_of_n(prompt, responses)
    num_prompt = len(encoded[0].prompt_ids)
    assert max(sizes) <= num_prompt + sum(len(e.ids) - num_prompt + 1 for e in encoded)


def test_bf16_is_a_choice_and_its_price_is_shown(make, pairs):
    run = make("arliss", "bert")
    fp32, bf16 = load(run), load(run, dtype="bf16")
    assert {p.dtype for b in bf16.system.backbones() for p in b.parameters()} == {torch.bfloat16}
    prices = dtype_check(fp32, bf16, pairs)
    assert [p.domain for p in prices] == ["long", "short", "all"]
    margins = [
        torch.tensor([a.reward - b.reward for a, b in zip(r[::2], r[1::2], strict=True)], dtype=torch.float64)
        for r in (s.score([side(p, which) for p in pairs for which in ("chosen", "rejected")]) for s in (fp32, bf16))
    ]
    everything = prices[-1]
    assert everything.num_pairs == len(pairs)
    assert everything.flipped == float(((margins[0] > 0) != (margins[1] > 0)).double().mean())
    wanted = float((margins[1] - margins[0]).square().mean().sqrt() / margins[0].std(correction=0))
    assert everything.margin_error == pytest.approx(wanted)
    assert "margin error" in render_dtype(prices)
    same = dtype_check(fp32, fp32, pairs)[-1]
    assert (same.flipped, same.rerouted, same.margin_error) == (0, 0, 0)


def test_an_unknown_dtype_is_refused(make):
    with pytest.raises(ConfigError, match="fp32 or bf16"):
        Scorer.load(make("arliss", "bert"), dtype="int8")


def test_equal_texts_of_an_evaluation_are_computed_once(make, items, monkeypatch):
    """A pair that truncation made equal must be a tie, in whatever chunks its two sides come."""
    scorer = load(make("arliss", "bert"))
    monkeypatch.setattr(scoring, "TOKENS_PER_FORWARD", {"cpu": 60})
    twice = [items[0], *items[1:6], items[0], *items[6:9], replace(items[0], domain="another")]
    found = scorer.score_routes(twice)
    assert found[0] == found[6]
    assert found[10].oracle is None
    assert len(found) == len(twice)
