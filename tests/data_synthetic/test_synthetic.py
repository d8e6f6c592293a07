"""The generator's promises: known rewards, domains that disagree, text that carries the signal, and exact bookkeeping.

The models here are plain numpy: they stand for "one linear model" and "one per domain", on levels and on words.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moreward.data import synthetic
from moreward.data.synthetic import CAPABILITIES, DOMAINS, WEIGHTS, generate, generate_splits, true_reward
from moreward.errors import ConfigError
from moreward.types import Preference

Array = NDArray[np.float32]


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Preference]]:
    return generate_splits(1500, 0, 400, seed=7)


def _of(pairs: Iterable[Preference], domain: str) -> list[Preference]:
    return [pair for pair in pairs if pair.domain == domain]


def _bytes(pairs: Sequence[Preference]) -> str:
    return "\n".join(json.dumps(asdict(pair)) for pair in pairs)


def _num_words(text: Any) -> int:
    return len(text.split())


def _level_difference(pair: Preference) -> list[int]:
    chosen, rejected = pair.meta["capabilities_chosen"], pair.meta["capabilities_rejected"]
    return [chosen[name] - rejected[name] for name in CAPABILITIES]


def _bag(text: Any, size: int = 1024) -> Array:
    """Hashed counts of words and of neighbouring words; every number is the same word."""
    words = re.sub(r"\d+", "0", text.lower()).split()
    bag = np.zeros(size, dtype=np.float32)
    for token in [*words, *map(" ".join, pairwise(words))]:
        bag[zlib.crc32(token.encode()) % size] += 1
    return bag


def _logistic(x_BF: Array, *, num_steps: int = 150, decay: float = 1e-3) -> Array:
    """Weights that make x·w positive: logistic loss without intercept, Nesterov's steps of 1 over its curvature."""
    curvature = np.linalg.norm(x_BF, 2) ** 2 / 4 / len(x_BF) + decay
    w = ahead = np.zeros(x_BF.shape[1], dtype=np.float32)
    for step in range(num_steps):
        slope = -x_BF.T @ (1 / (1 + np.exp(x_BF @ ahead))) / len(x_BF) + decay * ahead
        last, w = w, (ahead - slope / curvature).astype(np.float32)
        ahead = w + step / (step + 3) * (w - last)
    return w


def _accuracies(splits: dict[str, list[Preference]], features: Callable[[Preference], Any]) -> tuple[float, float]:
    """Held-out pair accuracy, mean over domains: of one shared linear model, and of one per domain."""
    train = {d: np.array([features(p) for p in _of(splits["train"], d)], dtype=np.float32) for d in DOMAINS}
    test = {d: np.array([features(p) for p in _of(splits["test"], d)], dtype=np.float32) for d in DOMAINS}
    shared_w = _logistic(np.concatenate(list(train.values())))
    shared = [float((test[d] @ shared_w > 0).mean()) for d in DOMAINS]
    apart = [float((test[d] @ _logistic(train[d]) > 0).mean()) for d in DOMAINS]
    return float(np.mean(shared)), float(np.min(apart))


def test_one_linear_rule_over_levels_cannot_fit_the_domains_and_one_per_domain_can(
    splits: dict[str, list[Preference]],
) -> None:
    shared, worst_apart = _accuracies(splits, _level_difference)
    assert shared < 0.75
    assert worst_apart > 0.97


def test_the_words_alone_tell_which_answer_a_domain_prefers_but_not_to_one_shared_model(
    splits: dict[str, list[Preference]],
) -> None:
    shared, worst_apart = _accuracies(splits, lambda pair: _bag(pair.chosen) - _bag(pair.rejected))
    assert worst_apart > 0.85
    assert shared < worst_apart - 0.08


def test_every_level_of_every_capability_can_be_read_from_the_text(splits: dict[str, list[Preference]]) -> None:
    def bags_and_levels(pairs: list[Preference]) -> tuple[Array, Array]:
        levels = [[p.meta["capabilities_chosen"][name] for name in CAPABILITIES] for p in pairs]
        return np.array([_bag(p.chosen) for p in pairs]), np.array(levels, dtype=np.float32)

    x_NF, y_NC = bags_and_levels(splits["train"])
    unseen_NF, truth_NC = bags_and_levels(splits["test"])
    w_FC = np.linalg.solve(x_NF.T @ x_NF + 5 * np.eye(x_NF.shape[1], dtype=np.float32), x_NF.T @ (y_NC - y_NC.mean(0)))
    error_C = ((unseen_NF @ w_FC + y_NC.mean(0) - truth_NC) ** 2).mean(0) / truth_NC.var(0)
    assert (error_C < 0.25).all()


def test_a_router_finds_the_domain_of_clear_prompts_and_must_guess_the_ambiguous_ones(
    splits: dict[str, list[Preference]],
) -> None:
    x_NF = np.array([_bag(p.prompt) for p in splits["train"]])
    y_NE = np.array([[p.domain == d for d in DOMAINS] for p in splits["train"]], dtype=np.float32)
    w_FE = np.linalg.solve(x_NF.T @ x_NF + np.eye(x_NF.shape[1], dtype=np.float32), x_NF.T @ y_NE)
    right: dict[bool, list[bool]] = defaultdict(list)
    for pair in splits["test"]:
        right[pair.meta["ambiguous"]].append(DOMAINS[int((_bag(pair.prompt) @ w_FE).argmax())] == pair.domain)
    assert np.mean(right[False]) > 0.99
    assert np.mean(right[True]) < 0.8
    assert 0.03 < len(right[True]) / len(splits["test"]) < 0.07


def test_longer_wins_in_some_domains_loses_in_others_and_is_a_coin_toss_overall(
    splits: dict[str, list[Preference]],
) -> None:
    longer = {
        domain: np.mean([np.sign(_num_words(p.chosen) - _num_words(p.rejected)) / 2 + 0.5 for p in _of(pairs, domain)])
        for pairs in [splits["train"]]
        for domain in DOMAINS
    }
    assert abs(np.mean(list(longer.values())) - 0.5) < 0.05
    assert min(longer.values()) < 0.4
    assert max(longer.values()) > 0.6


def test_each_capability_is_wanted_by_one_domain_and_unwanted_by_another() -> None:
    for name in CAPABILITIES:
        assert min(WEIGHTS[domain][name] for domain in DOMAINS) < 0 < max(WEIGHTS[domain][name] for domain in DOMAINS)


def test_the_true_reward_is_the_weighted_sum_of_levels() -> None:
    levels = dict(zip(CAPABILITIES, (3, 0, 1, 2, 0, 3), strict=True))
    by_hand = 3 * 1.2 + 0 * 0.6 + 1 * -0.4 + 2 * 0.5 + 0 * -1.1 + 3 * 0.3
    assert true_reward(levels, "support") == pytest.approx(by_hand)
    with pytest.raises(ConfigError, match=r"Unknown domain 'poetry'\. Known: support"):
        true_reward(levels, "poetry")


def test_chosen_has_the_higher_true_reward_exactly_where_the_label_is_not_flipped() -> None:
    for pair in generate(60, seed=3, noise=0.3):
        chosen = true_reward(pair.meta["capabilities_chosen"], pair.domain)
        rejected = true_reward(pair.meta["capabilities_rejected"], pair.domain)
        assert pair.meta["true_margin"] == pytest.approx(chosen - rejected)
        assert (chosen > rejected) != pair.meta["flipped"]
        assert abs(chosen - rejected) >= synthetic.MIN_MARGIN
        assert pair.margin is None


@settings(max_examples=25)
@given(
    sizes=st.tuples(*[st.integers(0, 12)] * 3),
    seed=st.integers(0, 10**6),
    noise=st.floats(0, 1),
    domains=st.lists(st.sampled_from(DOMAINS), unique=True),
)
def test_any_split_has_the_numbers_asked_for_and_shares_no_prompt(
    sizes: tuple[int, int, int], seed: int, noise: float, domains: list[str]
) -> None:
    splits = generate_splits(*sizes, seed=seed, noise=noise, domains=domains)
    assert splits["train"] == generate(sizes[0], seed=seed, noise=noise, domains=domains)
    for (name, pairs), size in zip(splits.items(), sizes, strict=True):
        assert Counter(pair.domain for pair in pairs) == Counter(dict.fromkeys(domains, size))
        flips = Counter(pair.domain for pair in pairs if pair.meta["flipped"])
        assert all(flips[domain] == (round(noise * size) if name == "train" else 0) for domain in domains)
    for field in ("group", "prompt"):
        groups = [{getattr(pair, field) for pair in pairs} for pairs in splits.values()]
        assert sum(map(len, groups)) == len(set().union(*groups))


@pytest.mark.parametrize(
    ("seed", "sha256"),
    [
        (0, "54972effe14b5657ee45e71d266f300477355bb7895f0439dcea9f726a7661ff"),
        (7, "ef39a0ef3e2e17205031556844022a110d38fe30d80cde3d4800f15ebdaadded"),
    ],
)
def test_a_seed_gives_the_same_bytes_as_ever(seed: int, sha256: str) -> None:
    """Results that were published with these pairs can be made again. A change of the phrases is a new data set."""
    splits = generate_splits(150, 50, 50, seed=seed, noise=0.1)
    told = [
        [p.id, p.domain, p.prompt, p.chosen, p.rejected, p.group, dict(p.meta)]
        for pairs in splits.values()
        for p in pairs
    ]
    assert hashlib.sha256(json.dumps(told).encode()).hexdigest() == sha256


def test_no_pair_repeats_contradicts_another_or_compares_a_text_with_itself(
    splits: dict[str, list[Preference]],
) -> None:
    pairs = [*splits["train"], *splits["test"]]
    assert len({pair.id for pair in pairs}) == len(pairs)
    assert all(pair.chosen != pair.rejected for pair in pairs)
    told = {frozenset((pair.prompt, pair.chosen, pair.rejected)) for pair in pairs}
    assert len(told) == len(pairs)
    domain_of: dict[str, set[str]] = defaultdict(set)
    for pair in pairs:
        domain_of[pair.group].add(pair.domain)
    assert all(len(domains) == 1 for domains in domain_of.values())
    assert len(pairs) / 3 < len(domain_of) < len(pairs) * 2 / 3, "some prompts have several pairs, many do not"


def test_splits_share_no_prompt_where_the_grammar_must_have_drawn_some_twice() -> None:
    # 4,200 pairs of the domain with the fewest prompts: a split that forgot the others would repeat about 60
    splits = generate_splits(3000, 0, 1200, seed=1, domains=["medical"])
    assert not {pair.group for pair in splits["train"]} & {pair.group for pair in splits["test"]}


def test_an_ambiguous_prompt_is_asked_in_one_domain_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "AMBIGUOUS_SHARE", 1.0)
    domain_of: dict[str, set[str]] = defaultdict(set)
    for pair in generate(600):
        domain_of[pair.group].add(pair.domain)
    assert all(len(domains) == 1 for domains in domain_of.values())


def test_an_answer_that_a_prompt_already_has_is_not_drawn_again() -> None:
    topic = synthetic._TOPICS["cooking"][0]
    better, worse = synthetic._draw_answers("cooking", topic, set(), random.Random(0))
    for used in ({better.text}, {worse.text}):
        again = synthetic._draw_answers("cooking", topic, set(used), random.Random(0))
        assert not used & {answer.text for answer in again}


def test_flipping_changes_which_answer_is_chosen_and_nothing_else() -> None:
    for clean, noisy in zip(generate(40, seed=5), generate(40, seed=5, noise=0.25), strict=True):
        assert (clean.id, clean.prompt) == (noisy.id, noisy.prompt)
        texts = (noisy.rejected, noisy.chosen) if noisy.meta["flipped"] else (noisy.chosen, noisy.rejected)
        assert texts == (clean.chosen, clean.rejected)


def test_the_same_seed_gives_the_same_bytes_in_another_process_which_never_loads_torch() -> None:
    script = (
        "import json, sys; from dataclasses import asdict; from moreward.data.synthetic import generate\n"
        "print('\\n'.join(json.dumps(asdict(pair)) for pair in generate(15, seed=11, noise=0.2)))\n"
        "assert 'torch' not in sys.modules"
    )
    for hash_seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        made = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
        assert made.stdout.strip() == _bytes(generate(15, seed=11, noise=0.2))


def test_another_seed_gives_other_rows() -> None:
    assert not {pair.id for pair in generate(20, seed=0)} & {pair.id for pair in generate(20, seed=1)}


def test_a_larger_number_adds_rows_and_a_domain_is_the_same_in_any_company() -> None:
    few, many = generate(9, seed=2), generate(21, seed=2)
    assert few == many[: len(few)]
    assert generate(21, seed=2, domains=["cooking"]) == _of(many, "cooking")


def test_texts_are_clean_sentences_of_the_promised_length(splits: dict[str, list[Preference]]) -> None:
    for pair in splits["train"]:
        assert 8 <= _num_words(pair.prompt) <= 30, pair.prompt
        for text in (pair.prompt, pair.chosen, pair.rejected):
            assert isinstance(text, str)
            assert re.fullmatch(r"[A-Z0-9].*[.?!]", text), text
            assert not re.search(r"[\[\]{}|]|  | [.,!?;]|[,;][.?!]|\.\.|[.!?] [a-z]|\b(\w+) \1\b", text), text
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text.replace("an hour", "")), text
        for text in (pair.chosen, pair.rejected):
            assert 10 <= _num_words(text) <= 60, text


def test_prompts_vary_and_have_no_constant_beginning(splits: dict[str, list[Preference]]) -> None:
    for domain in DOMAINS:
        prompts = {pair.prompt for pair in _of(splits["train"], domain)}
        assert len(prompts) > 600
        [(_, most)] = Counter(str(prompt).split()[0] for prompt in prompts).most_common(1)
        assert most / len(prompts) < 1 / 3


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_grammar_holds_far_more_prompts_than_the_most_pairs_need(domain: str) -> None:
    def num_texts(templates: Iterable[str]) -> int:
        brackets = [re.findall(r"\[([^\]]*)\]", template + synthetic._TAIL) for template in templates]
        return sum(math.prod(len(set(bracket.split("|"))) for bracket in found) for found in brackets)

    needed = synthetic.MAX_PAIRS_PER_DOMAIN / 2  # two pairs a prompt on average
    assert num_texts(synthetic._PROMPTS[domain]) * len(synthetic._TOPICS[domain]) > 2 * needed
    shared = sum(num_texts(synthetic._SHARED_PROMPTS[topic.thing]) for topic in synthetic._SHARED_TOPICS[domain])
    assert shared / 2 > 2 * needed * synthetic.AMBIGUOUS_SHARE, "two domains divide these prompts"


def test_all_faults_of_a_call_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        generate_splits(-1, 30_000, 0, noise=1.5, domains=["support", "poetry"])
    told = "\n".join(caught.value.faults)
    assert len(caught.value.faults) == 4
    for part in ("num_train: must be at least 0 (got -1)", "at most 20000", "(got 1.5)", "poetry"):
        assert part in told
    with pytest.raises(ConfigError, match="each at most once"):
        generate(1, domains=["support", "support"])
