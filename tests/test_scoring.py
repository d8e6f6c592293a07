"""Rewards: in order, the same in any company, explained by the experts that gave them; faults are named."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moreward
from moreward import scoring
from moreward.data.batches import Encoder, conversation_batch, side
from moreward.errors import ConfigError, DataError, NonFiniteError, RunError
from moreward.nn.experts import RewardHead, Standardize
from moreward.nn.features import FeatureStore
from moreward.scoring import Scorer, judge_once, load, pick_device
from moreward.types import Conversation, Preference
from trained import edit_card, trained

SOURCE = Path(moreward.__file__).resolve().parents[1]
# The unit of a hardly trained expert is about a thousandth of its raw reward, which makes rounding that much larger.
TOLERANCE = 2e-3
Tiny = Callable[[str], Path]
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def scorer(make: Make) -> Scorer:
    return load(make())


@pytest.fixture(scope="module")
def soft(make: Make) -> Scorer:
    """Two experts mixed for every prompt."""
    return load(make("arliss", "bert", "system.top_k=2"))


@pytest.fixture(scope="module")
def items(pairs: Sequence[Preference]) -> list[Conversation]:
    return [replace(side(p, which), id=f"{p.id}/{which}") for p in pairs for which in ("chosen", "rejected")]


@pytest.fixture(scope="module")
def alone(scorer: Scorer, items: list[Conversation]) -> list[float]:
    """The reward of each item when nothing else is scored: the slow, obvious way."""
    return [scorer.score([item])[0].reward for item in items]


# ---------------------------------------------------------------- score


@settings(max_examples=25)
@given(data=st.data())
def test_rewards_keep_order_and_ids_in_any_company(
    data: st.DataObject, scorer: Scorer, items: list[Conversation], alone: list[float]
) -> None:
    rows = data.draw(st.lists(st.integers(0, len(items) - 1), max_size=30))
    tokens = data.draw(st.sampled_from([1, 100, 1000, scoring.TOKENS_PER_FORWARD["cpu"]]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "TOKENS_PER_FORWARD", {"cpu": tokens})
        rewards = scorer.score([items[r] for r in rows])
    assert [r.id for r in rewards] == [items[row].id for row in rows]
    assert [r.reward for r in rewards] == pytest.approx([alone[row] for row in rows], abs=TOLERANCE)


def test_a_batch_holds_no_more_tokens_than_allowed(
    scorer: Scorer, items: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "TOKENS_PER_FORWARD", {"cpu": 200})
    encoded = scorer._encode(items, "drop")
    batches = list(scorer._batches(items, encoded))
    assert sorted(row for rows, _ in batches for row in rows) == list(range(len(items)))
    assert all(int(batch.mask_NT.sum()) <= 200 or len(batch) == 1 for _, batch in batches)
    assert len(batches) <= 2 * sum(len(e.ids) for e in encoded) / 200


def test_nothing_in_gives_nothing_out(scorer: Scorer) -> None:
    assert scorer.score([]) == []
    assert scorer.score_routes([]) == []


def test_every_way_to_write_an_item_is_the_same_item(scorer: Scorer) -> None:
    turns = [{"role": "user", "content": "In the short style, tell me about the sea."}]
    ways: list[Any] = [
        Conversation(prompt=turns[0]["content"], response="It is calm."),
        (turns[0]["content"], "It is calm."),
        {"prompt": turns[0]["content"], "response": "It is calm."},
        {"prompt": turns, "response": [{"role": "assistant", "content": "It is calm."}]},
        (tuple(turns), "It is calm."),
    ]
    assert len({scorer.score([way])[0].reward for way in ways}) == 1
    [named] = scorer.score([{"prompt": "p", "response": "r", "id": 7}])
    assert (named.id, named.truncated) == ("7", False)
    assert named.num_tokens == len(scorer.encoder.conversation(Conversation(prompt="p", response="r")).ids)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"prompt": "p"}, r"items\[1\]: 'response' is missing; needed are prompt and response"),
        ({"response": "p"}, r"items\[1\]: 'prompt' is missing"),
        (("p",), r"items\[1\]: "),
        (("p", "r", "s"), r"items\[1\]: "),
        ({"prompt": "p", "response": 3}, r"items\[1\]: expected text or a list of messages, got int"),
        ({"prompt": "p", "response": None}, r"items\[1\]: expected text .* got NoneType"),
        ({"prompt": ["p"], "response": "r"}, r"items\[1\]: expected text .* got list"),
        (7, r"items\[1\]: "),
        (None, r"items\[1\]: "),
        ("prompt", r"items\[1\]: "),
        ({"prompt": "p", "response": "r", "tool": []}, r"items\[1\]: unknown key 'tool'\. Known: prompt, response"),
        ({"prompt": "p", "response": "r", "tools": ["add"]}, r"items\[1\]: tools: expected a list of mappings"),
        ({"prompt": "p", "response": "r", "chat_template_kwargs": 3}, r"items\[1\]: chat_template_kwargs: .* got int"),
        ({"prompt": [{"content": "p"}], "response": "r"}, r"items\[1\]: message 0: role must be a string"),
        (([{"role": "user", "content": ["p"]}], "r"), r"items\[1\]: message 0: content must be a string or None"),
        ({"prompt": "p", "response": "\ud800"}, r"items\[1\]: .*surrogates not allowed"),
        (Conversation(prompt=({"role": "user", "content": "\udfff"},), response="r"), r"items\[1\]: .*surrogates"),
    ],
)
def test_a_bad_item_is_named_by_its_index(item: Any, message: str, scorer: Scorer) -> None:
    with pytest.raises(DataError, match=message):
        scorer.score([("p", "r"), item])


def test_a_mappings_tools_and_template_arguments_reach_the_template(make: Make) -> None:
    scorer = load(make("arliss", "bert"))
    tokenizer = scorer.encoder.tokenizer
    tokenizer.chat_template = "{{ style }}{{ tools|length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    scorer.encoder = Encoder(tokenizer, scorer.encoder.max_length)
    turns = [{"role": "user", "content": "p"}]
    item = {"prompt": turns, "response": "r", "tools": [{"type": "function"}] * 2, "meta": {"from": "here"}}
    item["chat_template_kwargs"] = {"style": "short"}
    told: list[str] = []
    render = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda *given, **more: told.append(render(*given, **more)) or told[-1]
    scorer.score([item])
    assert told[0] == "short2pr"
    with pytest.raises(DataError, match=r"items\[1\]: chat template: .* not set tokenize"):
        scorer.score([item, {**item, "chat_template_kwargs": {"tokenize": True}}])


LONG = Conversation(prompt="Please tell me all. " * 40, response="It is calm.", id="row-9")


def test_what_is_too_long_is_refused_with_its_index_and_sizes(scorer: Scorer) -> None:
    with pytest.raises(DataError, match=r"items\[2\] \(row-9\): \d{3} tokens, the limit is 96\. .*--truncate"):
        scorer.score([("p", "r"), ("p", "r"), LONG])


def test_what_is_too_long_is_cut_and_flagged_where_allowed(scorer: Scorer) -> None:
    short, cut = scorer.score([("p", "r"), LONG], on_long="truncate")
    assert (short.truncated, cut.truncated, cut.num_tokens) == (False, True, 96)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "on_long", "truncate")
        assert scorer.score([LONG])[0].truncated
    with pytest.raises(DataError, match="the limit is 96"):
        scorer.score([LONG])


def test_special_tokens_in_a_text_are_only_text(scorer: Scorer) -> None:
    specials = scorer.encoder.tokenizer.all_special_ids
    encoded = scorer.encoder.conversation(Conversation(prompt="a [SEP] b", response="c [SEP] [PAD] [CLS] d"))
    assert Counter(i for i in encoded.ids if i in specials and i != scorer.encoder.tokenizer.unk_token_id) == {
        scorer.encoder.tokenizer.cls_token_id: 1,
        scorer.encoder.tokenizer.sep_token_id: 2,
    }


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_refused(bad: float, make: Make, items: list[Conversation]) -> None:
    broken = load(make())
    spoke = broken.score(items[:1])[0].expert
    with torch.no_grad():
        broken.system.get_parameter(f"routed.experts.heads.{spoke}.layers.0.bias").fill_(bad)
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        broken.score(items[:1])
    with pytest.raises(NonFiniteError):
        broken.score_routes(items)


# ---------------------------------------------------------------- rank, compare, best of n


@settings(max_examples=15)
@given(st.lists(st.text(alphabet="abc de.", min_size=1, max_size=20), min_size=1, max_size=6))
def test_rank_compare_and_best_of_n_say_what_the_rewards_say(scorer: Scorer, responses: list[str]) -> None:
    prompt = "Tell me about the sea."
    found = scorer.compare(prompt, responses)
    values = [r.reward for r in found.rewards]
    assert values == pytest.approx([r.reward for r in scorer.score([(prompt, r) for r in responses])], abs=TOLERANCE)
    assert scorer.rank(prompt, responses) == found.order == sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert scorer.best_of_n(prompt, responses) == values.index(max(values))
    for i, row in enumerate(found.probabilities):
        for j, probability in enumerate(row):
            assert probability == pytest.approx(1 / (1 + math.exp(values[j] - values[i])), abs=1e-9)
    assert len({r.expert for r in found.rewards}) == 1, "the router sees the prompt only"


def test_equal_responses_keep_their_order(scorer: Scorer) -> None:
    found = scorer.compare("p", ["same", "same", "same"])
    assert found.order == [0, 1, 2]
    assert found.probabilities == [[0.5] * 3] * 3


def test_compare_needs_a_response(scorer: Scorer) -> None:
    with pytest.raises(DataError, match=r"at least one response is needed \(got 0\)"):
        scorer.compare("p", [])


# ---------------------------------------------------------------- explained


def _batch(scorer: Scorer, items: Sequence[Conversation], domain: int = -1) -> Any:
    encoded = [scorer.encoder.conversation(item) for item in items]
    return conversation_batch(encoded, [domain] * len(items), scorer.encoder.pad_id)


@torch.no_grad()
def forced(scorer: Scorer, item: Conversation, expert: str) -> float:
    """The standardised reward that one expert gives, asked alone."""
    number = torch.tensor([[scorer.experts.index(expert)]])
    return float(scorer.system.judge(_batch(scorer, [item]), number))


def test_explaining_gives_every_experts_reward_and_the_chosen_ones_is_the_reward(
    scorer: Scorer, items: list[Conversation]
) -> None:
    for item, reward in zip(items, scorer.score(items, explain=True), strict=True):
        assert dict(reward.expert_rewards) == pytest.approx(
            {e: forced(scorer, item, e) for e in ("long", "short")}, abs=TOLERANCE
        )
        assert reward.reward == pytest.approx(reward.expert_rewards[reward.expert], abs=TOLERANCE)
        assert reward.weights == {reward.expert: 1.0}


def test_a_named_expert_judges_without_the_router(
    scorer: Scorer, soft: Scorer, items: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    for one in (scorer, soft):
        few = items[:4]
        wanted = {name: [forced(one, item, name) for item in few] for name in one.experts}
        monkeypatch.setattr(one.system, "route_prompts", lambda *_: pytest.fail("the router was asked"))
        for name in one.experts:
            told = one.score(few, expert=name)
            assert [r.number for r in told] == pytest.approx(wanted[name], abs=TOLERANCE)
            assert {(r.expert, tuple(r.weights.items()), r.router_entropy) for r in told} == {
                (name, ((name, 1.0),), None)
            }


def test_a_mixed_reward_is_the_weighted_sum_of_its_experts(soft: Scorer, items: list[Conversation]) -> None:
    for reward in soft.score(items, explain=True):
        assert set(reward.weights) == set(reward.expert_rewards) == {"long", "short"}
        assert sum(reward.weights.values()) == pytest.approx(1)
        assert reward.expert == max(reward.weights, key=reward.weights.__getitem__)
        mixed = sum(w * reward.expert_rewards[e] for e, w in reward.weights.items())
        assert reward.reward == pytest.approx(mixed, abs=TOLERANCE)


def test_without_explaining_no_expert_is_asked_in_vain(scorer: Scorer, items: list[Conversation]) -> None:
    seen: list[int] = []
    hook = scorer.system.routed.experts.register_forward_pre_hook(  # type: ignore[union-attr,operator]
        lambda module, inputs: seen.append(len(inputs[1]))
    )
    rewards = scorer.score(items)
    hook.remove()
    assert sum(seen) == len(items)
    assert all(not r.expert_rewards for r in rewards)


@pytest.mark.parametrize("recipe", ["baseline", "base_lora"])
def test_a_system_without_experts_gives_bare_rewards(recipe: str, make: Make, items: list[Conversation]) -> None:
    scorer = load(make(recipe))
    assert scorer.experts == ()
    rewards = scorer.score(items[:4], explain=True)
    assert all((r.expert, dict(r.weights), dict(r.expert_rewards)) == ("", {}, {}) for r in rewards)
    routes = scorer.score_routes(items[:4])
    assert [r.reward for r in routes] == pytest.approx([r.reward for r in rewards], abs=TOLERANCE)
    assert all((r.oracle, r.random, r.expert) == (None, None, "") for r in routes)


# ---------------------------------------------------------------- routes


@pytest.mark.parametrize("which", ["scorer", "soft"])
def test_routes_agree_with_forcing_the_experts(
    which: str, items: list[Conversation], request: pytest.FixtureRequest
) -> None:
    scorer: Scorer = request.getfixturevalue(which)
    plain = scorer.score(items, explain=True)
    routes = scorer.score_routes(items, seed=5)
    for item, reward, route in zip(items, plain, routes, strict=True):
        assert (route.expert, route.num_tokens) == (reward.expert, reward.num_tokens)
        assert route.reward == pytest.approx(reward.reward, abs=TOLERANCE)
        assert route.oracle == pytest.approx(reward.expert_rewards[item.domain], abs=TOLERANCE)
        assert any(route.random == pytest.approx(r, abs=TOLERANCE) for r in reward.expert_rewards.values())


def random_experts(scorer: Scorer, items: Sequence[Conversation], seed: int) -> list[int]:
    encoded = scorer._encode(items, "drop")
    drawn = [-1] * len(items)
    for rows, batch in scorer._batches(items, encoded):
        for row, expert in zip(rows, scorer._random_experts(batch, seed).tolist(), strict=True):
            drawn[row] = expert
    return drawn


def test_the_random_router_depends_on_prompt_and_seed_only(scorer: Scorer, items: list[Conversation]) -> None:
    whole = random_experts(scorer, items, seed=1)
    assert whole == [random_experts(scorer, [item], seed=1)[0] for item in items]
    assert whole == random_experts(scorer, items[::-1], seed=1)[::-1]
    assert len({(i.prompt, e) for i, e in zip(items, whole, strict=True)}) == len({i.prompt for i in items})
    assert whole != random_experts(scorer, items, seed=2)
    many = [replace(items[0], prompt="".join(letters)) for letters in itertools.permutations("aeinort", 4)][:300]
    share = sum(random_experts(scorer, many, seed=0)) / 300
    assert 0.4 < share < 0.6


def test_a_domain_without_an_expert_has_no_oracle(scorer: Scorer, items: list[Conversation]) -> None:
    known, unknown = scorer.score_routes([items[0], replace(items[0], domain="poetry")])
    assert known.oracle is not None
    assert unknown.oracle is None
    assert unknown.random == pytest.approx(known.random, abs=TOLERANCE)


def test_a_pair_of_row_and_expert_is_computed_once(scorer: Scorer, items: list[Conversation]) -> None:
    batch = _batch(scorer, items[:6])
    wanted_NJ = torch.tensor([[0, 0, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1], [0, 1, 0], [1, 0, 0]])
    asked: list[Any] = []
    experts = scorer.system.routed.experts  # type: ignore[union-attr]
    hook = experts.register_forward_pre_hook(lambda module, inputs: asked.append(inputs[1]))  # type: ignore[operator,union-attr]
    with torch.no_grad():
        reward_NJ: Tensor = judge_once(scorer.system, batch, wanted_NJ, 2)
    hook.remove()
    assert sum(len(a) for a in asked) == 10, "distinct pairs of row and expert"
    for n, item in enumerate(items[:6]):
        for j in range(3):
            single = forced(scorer, item, scorer.experts[int(wanted_NJ[n, j])])
            assert float(reward_NJ[n, j]) == pytest.approx(single, abs=TOLERANCE)


# ---------------------------------------------------------------- golden rewards


def test_a_golden_reward_that_is_not_recomputed_stops_the_load(make: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(make(), run)

    def shifted(card: dict[str, Any]) -> dict[str, Any]:
        card["golden"][2]["reward"] += 0.5
        return card

    edit_card(run, shifted)
    with pytest.raises(RunError, match=r"golden rewards differ by 0\.5: this model does not compute"):
        load(run)
    assert load(run, check=False).score([("p", "r")])


def test_a_model_whose_tokenizer_was_exchanged_is_refused(make: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(make(), run)
    file = run / "model" / "backbone" / "tokenizer.json"
    told = json.loads(file.read_text())
    vocabulary = told["model"]["vocab"]
    vocabulary["##e"], vocabulary["##t"] = vocabulary["##t"], vocabulary["##e"]
    file.write_text(json.dumps(told))
    edit_card(run, lambda card: card)
    with pytest.raises(RunError, match="golden rewards differ by"):
        load(run)


@pytest.mark.parametrize("std", [5e-4, 3.0])
@pytest.mark.parametrize("recipe", ["arliss", "baseline"])
def test_golden_rewards_may_differ_by_rounding_whatever_their_unit(recipe: str, std: float, make: Make) -> None:
    """An expert that hardly learnt has a tiny unit, which blows up rounding; a wrong model is still told."""
    scorer = load(make(recipe))
    for one in scorer.system.modules():
        if isinstance(one, Standardize):
            one.std.fill_(std)
    items = [Conversation(prompt=g["prompt"], response=g["response"]) for g in scorer.card["golden"]]
    scorer.card = {**scorer.card, "golden": scorer.golden(items)}
    assert scorer.check_golden() == 0.0
    heads = [m for m in scorer.system.modules() if isinstance(m, RewardHead)]

    def move_raw_rewards(by: float) -> None:
        with torch.no_grad():
            for head in heads:
                head.last.bias += by

    move_raw_rewards(4e-6)
    difference = scorer.check_golden()
    assert difference > 0
    assert (difference > scoring.GOLDEN_TOLERANCE) == (std < 1)
    move_raw_rewards(1e-3)
    with pytest.raises(RunError, match="golden rewards differ by"):
        scorer.check_golden()


def test_golden_rewards_hold_for_rows_with_tools(
    tiny_backbone: Tiny, pairs: Sequence[Preference], tmp_path: Path
) -> None:
    backbone = tmp_path / "backbone"
    shutil.copytree(tiny_backbone("qwen2"), backbone)
    template = backbone / "chat_template.jinja"
    template.write_text("{% if tools %}tools: {{ tools | tojson }}\n{% endif %}" + template.read_text())
    tools = [{"type": "function", "function": {"name": "search", "parameters": {}}}]
    rows = [
        replace(
            p,
            prompt=({"role": "user", "content": p.prompt},),
            chosen=({"role": "assistant", "content": p.chosen},),
            rejected=({"role": "assistant", "content": p.rejected},),
            tools=tools,
        )
        for p in pairs
    ]
    words = ("data.max_length=128", "data.on_long=truncate", "train.max_steps=1")
    run = trained(tmp_path, lambda kind: backbone, rows, "arliss", "qwen2 with tools", *words)
    assert load(run).check_golden() == 0.0


def test_features_that_are_kept_change_no_reward(make: Make, items: list[Conversation], tmp_path: Path) -> None:
    scorer = load(make("arliss", "bert", "tune=frozen"))
    before = [r.reward for r in scorer.score(items)]
    store = FeatureStore(tmp_path)
    scorer.keep_features(store)
    assert [r.reward for r in scorer.score(items)] == pytest.approx(before, abs=TOLERANCE)
    assert len(store) > 0
    adapters = load(make())
    adapters.keep_features(other := FeatureStore())
    adapters.score(items)
    assert len(other) == 0


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="device: 'foo' is not there; use auto, cpu"):
        pick_device("foo")
    with pytest.raises(ConfigError, match=r"train\.device: 'cpu:1' is not there"):
        pick_device("cpu:1", key="train.device")
    assert pick_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="'cuda:0' is not there; use auto, cpu; PyTorch sees no CUDA device"):
            pick_device("cuda:0")


def test_a_device_by_number_is_one_of_those_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="'cuda:2' is not there; use auto, cpu or cuda, cuda:0 to cuda:1"):
        pick_device("cuda:2")
