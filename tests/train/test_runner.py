"""A run from files to a model: the same bits each time, also when it was killed; nothing lost without being counted."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given as sampled
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn

import moreward
from moreward.checkpoint import verify_folder
from moreward.config import resolve
from moreward.data.batches import side, tokenizer_sha256
from moreward.errors import BackboneError, ConfigError, DataError, NonFiniteError, RunError
from moreward.nn.backbone import Backbone
from moreward.nn.experts import RewardHead
from moreward.scoring import load
from moreward.train.loop import has_bf16
from moreward.train.runner import Pairs, make_encoder, read_pairs, train, train_on
from moreward.train.track import Silent
from moreward.types import Preference
from trained import card, digests, given, metrics, trained, weights, write_pairs

SOURCE = Path(moreward.__file__).resolve().parents[1]
Tiny = Callable[[str], Path]
DOMAINS = ("long", "short")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, pairs: Sequence[Preference]) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", pairs)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Tiny, pairs: Sequence[Preference]) -> Path:
    return trained(tmp_path_factory.mktemp("arliss"), tiny_backbone, pairs)


# ---------------------------------------------------------------- the same again


@pytest.mark.parametrize("recipe", ["arliss", "rodos", "more"])
def test_two_runs_of_one_seed_give_the_same_bytes(recipe: str, tiny_backbone: Tiny, data: Path, tmp_path: Path) -> None:
    words = ("train.max_steps=3",)
    one, two, other = (
        train(given(recipe, tiny_backbone("bert"), data, tmp_path / name, *words, f"seed={seed}"))
        for name, seed in (("one", 7), ("two", 7), ("other", 8))
    )
    models = [(r / "model" / "model.safetensors").read_bytes() for r in (one, two, other)]
    assert models[0] == models[1]
    assert models[0] != models[2]
    assert (one / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()
    experts = [digests(r / "model" / "experts") for r in (one, two)]
    assert experts[0] == experts[1]
    assert bool(experts[0]) == (recipe == "arliss")


def test_nothing_that_only_concerns_the_machine_changes_the_result(
    run: Path, tiny_backbone: Tiny, data: Path, tmp_path: Path
) -> None:
    words = ("train.device=cpu", "train.processes=1", "train.checkpoint_every=2", "train.keep_checkpoints=true")
    again = train(given("arliss", tiny_backbone("bert"), data, tmp_path / "run", *words))
    assert (again / "model" / "model.safetensors").read_bytes() == (run / "model" / "model.safetensors").read_bytes()
    assert sorted(p.name for p in (again / "checkpoints").iterdir()) == [
        "00-expert-long",
        "01-expert-short",
        "02-router",
    ]
    assert not (run / "checkpoints").exists()


def test_the_model_is_the_best_of_each_stage_and_not_the_last(
    tiny_backbone: Tiny, data: Path, pairs: Sequence[Preference], tmp_path: Path
) -> None:
    # So fast that the accuracy goes up and down between evaluations.
    words = ("train.learning_rate=0.3", "train.epochs=6", "train.patience=0", "seed=3")
    config = resolve(given("arliss", tiny_backbone("bert"), data, tmp_path / "run", *words))
    run = train(config)
    scorer, held_out = load(run), read_pairs(config).val
    told = card(run)["stages"]
    assert any(s["evals"][-1]["eval/mean"] < s["best_value"] for s in told), "the last is worse than the best"
    for stage in told[:2]:
        domain = stage["stage"].removeprefix("expert/")
        rows = [p for p in held_out if p.domain == domain]
        items = [side(p, which) for p in rows for which in ("chosen", "rejected")]
        spoken = [r.expert_rewards[domain] for r in scorer.score(items, explain=True)]
        right = [c > r for c, r in zip(spoken[::2], spoken[1::2], strict=True)]
        assert sum(right) / len(right) == pytest.approx(stage["best_value"])
        assert stage["best_value"] == max(e["eval/mean"] for e in stage["evals"])
    rewards = scorer.score([side(p, "chosen") for p in held_out])
    routed = {d: [r.expert == d for p, r in zip(held_out, rewards, strict=True) if p.domain == d] for d in DOMAINS}
    assert sum(sum(ok) / len(ok) for ok in routed.values()) / 2 == pytest.approx(told[2]["best_value"])


# ---------------------------------------------------------------- what is written


def test_metrics_hold_the_accuracy_of_every_domain(run: Path) -> None:
    told = metrics(run)
    names = {(r["stage"], key) for r in told for key in r if key.startswith("eval/")}
    for domain in ("long", "short"):
        assert (f"expert/{domain}", f"eval/{domain}/accuracy") in names
        assert ("router", f"eval/{domain}/router_accuracy") in names
    assert ("expert/long", "eval/short/accuracy") not in names, "an expert is watched on its own domain"
    places = [(r["stage"], r["step"], "eval/loss" in r) for r in told]
    assert len(places) == len(set(places))


@pytest.mark.parametrize("recipe", ["baseline", "more"])
def test_a_system_without_experts_is_watched_on_each_domain_too(
    recipe: str, tiny_backbone: Tiny, data: Path, tmp_path: Path
) -> None:
    run = train(given(recipe, tiny_backbone("bert"), data, tmp_path / "run", "train.max_steps=2"))
    last = [r for r in metrics(run) if "eval/loss" in r][-1]
    accuracies = [last[f"eval/{d}/accuracy"] for d in ("long", "short")]
    assert last["eval/mean"] == pytest.approx(sum(accuracies) / 2)


def test_the_card_accounts_for_every_row(tiny_backbone: Tiny, pairs: Sequence[Preference], tmp_path: Path) -> None:
    bad = [
        {"prompt": "p", "chosen": "", "rejected": "b", "domain": "long"},
        {"prompt": "p", "chosen": "same", "rejected": "same", "domain": "short"},
        {"prompt": "p", "chosen": 3, "rejected": "b", "domain": "short"},
    ]
    data = write_pairs(tmp_path / "pairs.jsonl", [*pairs, pairs[3]])
    with data.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in bad))
    too_long = replace(pairs[0], chosen="a long answer " * 60, id="too-long", prompt="Another prompt.")
    with data.open("a") as file:
        file.write(write_pairs(tmp_path / "more.jsonl", [too_long]).read_text())
    run = train(
        given("arliss", tiny_backbone("bert"), data, tmp_path / "run", "data.max_bad_share=0.2", "train.max_steps=1")
    )
    told = card(run)["data"]
    assert told["train"] | {"contradictions": 0} == {
        "rows": 45, "pairs": 41, "ties": 0, "duplicates": 1, "contradictions": 0, "skipped_files": []
    }  # fmt: skip
    not_used = Counter({d: sum(reasons.values()) for d, reasons in told["not_used"].items()})
    used = sum(told["train_pairs"].values()) + sum(told["val_pairs"].values())
    assert used + not_used.total() == told["train"]["rows"] == told["rows_read"]
    assert (told["rows_used"], told["pairs_used"], told["pairs_made"]) == (used, used, used + 1)
    assert told["pairs_not_used"] == {"short": {"too_long": 1}}
    assert told["not_used"] == {
        "long": {"empty_chosen": 1},
        "short": {"duplicate": 1, "identical": 1, "wrong_type": 1, "too_long": 1},
    }
    lines = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert Counter((row["domain"], row["reason"]) for row in lines) == Counter(
        (d, reason) for d, reasons in told["not_used"].items() for reason in reasons
    )
    assert {row["line"] for row in lines} == {41, 42, 43, 44, 45}
    assert all(set(row) == {"file", "line", "domain", "reason", "field", "detail"} for row in lines)


def test_the_card_says_what_differs_from_the_paper(run: Path) -> None:
    told = {d["key"]: (d["paper"], d["used"]) for d in card(run)["deviations_from_paper"]}
    assert told["system.alpha"] == (768.0, 24.0)
    assert told["train.learning_rate"] == (5e-6, 0.02)
    assert told["data.max_length"] == (512, 96)
    assert "system.rank" not in told, "12 in the paper and here"


def test_the_card_names_backbone_data_and_parameters(run: Path, tiny_backbone: Tiny) -> None:
    told, tensors = card(run), weights(run)
    assert told["backbone"]["name"] == str(tiny_backbone("bert"))
    assert all(len(told["data"][k]) == 64 for k in ("config_sha256", "data_sha256", "backbone_sha256"))
    assert told["data"]["backbone_sha256"] == told["backbone"]["sha256"]
    assert told["domains"] == told["experts"] == ["long", "short"]
    assert told["parameters"]["active"] < told["parameters"]["stored"]
    for stage in told["stages"][:2]:
        name = stage["stage"].removeprefix("expert/")
        mine = [v.numel() for k, v in tensors.items() if f".{name}." in k and "standardize" not in k]
        assert stage["parameters_trained"] == sum(mine)
        assert stage["pairs"] == told["data"]["train_pairs"][name]
    assert verify_folder(run / "model") == []


def test_golden_rewards_are_of_all_domains_and_both_sides(run: Path, pairs: Sequence[Preference]) -> None:
    golden = card(run)["golden"]
    answers = {(p.prompt, r): p.domain for p in pairs for r in (p.chosen, p.rejected)}
    domains = Counter(answers[g["prompt"], g["response"]] for g in golden)
    assert set(domains) == {"long", "short"}
    assert all(set(g["experts"]) == {"long", "short"} for g in golden)
    assert load(run).check_golden() == 0.0


# ---------------------------------------------------------------- settings that reach the loss


def first_loss(run: Path) -> float:
    return float(metrics(run)[0]["train/loss"])


@pytest.mark.parametrize("word", ["train.label_smoothing=0.3", "train.centering=50", "train.learning_rate=0.01"])
def test_a_setting_of_the_loss_changes_what_is_learnt(
    word: str, run: Path, tiny_backbone: Tiny, data: Path, tmp_path: Path
) -> None:
    other = train(given("arliss", tiny_backbone("bert"), data, tmp_path / "run", word))
    assert (first_loss(other) != first_loss(run)) == ("learning_rate" not in word)
    assert not torch.equal(*(weights(r)["routed.experts.heads.long.layers.0.weight"] for r in (run, other)))


def test_margins_are_used_unless_told_not_to(
    run: Path, tiny_backbone: Tiny, pairs: Sequence[Preference], tmp_path: Path
) -> None:
    data = write_pairs(tmp_path / "margins.jsonl", [replace(p, margin=3.0) for p in pairs])
    used = train(given("arliss", tiny_backbone("bert"), data, tmp_path / "used"))
    unused = train(given("arliss", tiny_backbone("bert"), data, tmp_path / "unused", "train.use_margin=false"))
    assert first_loss(used) == pytest.approx(math.log1p(math.exp(3.0)), abs=0.1)
    assert first_loss(run) == pytest.approx(math.log(2), abs=0.05)
    assert (unused / "model" / "model.safetensors").read_bytes() == (run / "model" / "model.safetensors").read_bytes()


def test_contradictions_weigh_as_told_and_the_weight_is_part_of_a_runs_hashes(
    tiny_backbone: Tiny, pairs: Sequence[Preference], tmp_path: Path
) -> None:
    turned = [replace(p, chosen=p.rejected, rejected=p.chosen, id=f"turned {p.id}") for p in pairs]
    data = write_pairs(tmp_path / "turned.jsonl", [*pairs, *turned])
    whole, half = (
        train(given("arliss", tiny_backbone("bert"), data, tmp_path / f"{w}", f"data.contradiction_weight={w}"))
        for w in (1, 0.5)
    )
    assert card(whole)["data"]["train"]["contradictions"] == 40
    assert all(card(whole)["data"][k] != card(half)["data"][k] for k in ("config_sha256", "data_sha256"))
    assert first_loss(whole) == pytest.approx(math.log(2), abs=0.05)
    assert first_loss(half) == pytest.approx(first_loss(whole) / 2)


def test_training_in_bf16_learns_and_stores_float32(tiny_backbone: Tiny, data: Path, tmp_path: Path) -> None:
    if not has_bf16(torch.device("cpu")):
        pytest.skip("no bf16 here")
    run = train(given("arliss", tiny_backbone("bert"), data, tmp_path / "run", "train.dtype=bf16"))
    assert all(v.dtype in (torch.float32, torch.float64, torch.int64) for v in weights(run).values())
    assert card(run)["stages"][0]["steps"] == 2
    load(run).check_golden()


def test_bf16_is_refused_where_it_is_not(
    tiny_backbone: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moreward.train.loop.has_bf16", lambda device: False)
    with pytest.raises(ConfigError, match=r"train\.dtype: bf16 is not there on cpu; use fp32"):
        train(given("arliss", tiny_backbone("bert"), data, tmp_path / "run", "train.dtype=bf16"))


# ---------------------------------------------------------------- data


@settings(max_examples=15)
@sampled(st.integers(0, 1000), st.sampled_from([0.1, 0.2, 0.3, 0.5]))
def test_training_and_held_out_pairs_share_no_prompt_and_have_the_named_sizes(
    data: Path, seed: int, share: float
) -> None:
    pairs = read_pairs(resolve({"recipe": "arliss", "seed": seed, "data": {"train": str(data), "val_fraction": share}}))
    assert not {p.prompt for p in pairs.train} & {p.prompt for p in pairs.val}
    assert len(pairs.train) + len(pairs.val) == 40
    for domain in ("long", "short"):
        assert abs(sum(p.domain == domain for p in pairs.val) - 20 * share) <= 2, "whole prompts, two pairs each"


def test_held_out_files_are_taken_as_they_are(tiny_backbone: Tiny, pairs: Sequence[Preference], tmp_path: Path) -> None:
    train_file = write_pairs(tmp_path / "train.jsonl", [*pairs[:16], *pairs[20:36]])
    val_file = write_pairs(tmp_path / "val.jsonl", [*pairs[16:20], *pairs[36:]])
    out = tmp_path / "run"
    run = train(given("arliss", tiny_backbone("bert"), train_file, out, f"data.val={val_file}", "train.max_steps=1"))
    told = card(run)["data"]
    assert (told["train_pairs"], told["val_pairs"]) == ({"long": 16, "short": 16}, {"long": 4, "short": 4})
    assert (told["train"]["rows"], told["val"]["rows"]) == (32, 8)


def test_a_held_out_prompt_that_is_trained_on_is_refused(
    tiny_backbone: Tiny, data: Path, pairs: Sequence[Preference], tmp_path: Path
) -> None:
    val = write_pairs(tmp_path / "val.jsonl", [replace(pairs[0], chosen="Another answer.")])
    with pytest.raises(DataError, match=r"two sides of a split.*\n  .*val\.jsonl:1 has the prompt"):
        train(given("arliss", tiny_backbone("bert"), data, tmp_path / "run", f"data.val={val}"))


def test_a_held_out_domain_that_is_not_trained_is_refused(
    tiny_backbone: Tiny, data: Path, pairs: Sequence[Preference], tmp_path: Path
) -> None:
    val = write_pairs(tmp_path / "val.jsonl", [replace(pairs[0], prompt="New.", domain="cod")])
    with pytest.raises(DataError, match=r"Unknown domain cod\. Known: long, short\."):
        train(given("arliss", tiny_backbone("bert"), data, tmp_path / "run", f"data.val={val}"))


def test_token_ids_train_only_with_the_tokenizer_that_is_declared(
    tiny_backbone: Tiny, data: Path, pairs: Sequence[Preference], tmp_path: Path
) -> None:
    bert = tiny_backbone("bert")
    encoder = make_encoder(resolve(given("arliss", bert, data, tmp_path / "unused")), Backbone.load(str(bert)))
    rows = []
    for p in pairs:
        chosen, rejected = encoder.pair(p)
        ids = {"chosen_ids": chosen.ids, "rejected_ids": rejected.ids, "prompt_ids": chosen.prompt_ids}
        rows.append({**ids, "domain": p.domain, "group": p.prompt})
    ids = tmp_path / "ids.jsonl"
    ids.write_text("".join(json.dumps(row) + "\n" for row in rows))
    declared = f"data.tokenizer_sha256={tokenizer_sha256(encoder.tokenizer)}"
    words = ("data.val_fraction=0.25", "train.max_steps=2")
    made = train(given("arliss", bert, ids, tmp_path / "ids", declared, *words))
    assert sum(card(made)["data"]["train_pairs"].values()) == 32
    assert first_loss(made) == pytest.approx(math.log(2), abs=0.05)
    assert card(made)["golden"] == []
    load(made).score([("A prompt.", "An answer.")])
    with pytest.raises(DataError, match=r"data\.tokenizer_sha256 declares the tokenizer"):
        train(given("arliss", bert, ids, tmp_path / "undeclared", *words))
    with pytest.raises(BackboneError, match=r"data\.tokenizer_sha256: .* is declared, but the tokenizer of backbone"):
        train(given("arliss", tiny_backbone("roberta"), ids, tmp_path / "other", declared, *words))


class Told(Silent):
    """A reporter that remembers what it was told to say."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_a_domain_of_which_nothing_can_be_held_out_is_told_and_stands_in_the_card(
    tiny_backbone: Tiny, pairs: Sequence[Preference], tmp_path: Path
) -> None:
    data, told = tmp_path / "x.jsonl", Told()
    rows = [{k: getattr(p, k) for k in ("prompt", "chosen", "rejected", "domain")} for p in pairs]
    rows = [row | {"group": "one annotator"} if row["domain"] == "long" else row for row in rows]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = train(given("arliss", tiny_backbone("bert"), data, tmp_path / "run", "train.max_steps=1"), reporter=told)
    (sentence,) = card(run)["data"]["not_held_out"]
    assert sentence in told.said
    assert sentence.startswith("domain long: none of its 20 pairs is held out")
    assert "20 of them hang together" in sentence


def test_a_metric_of_no_domain_is_refused(tiny_backbone: Tiny, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.metric: .*'shrot'.*'short'.*mean"):
        train(given("arliss", tiny_backbone("bert"), data, tmp_path / "run", "train.metric=shrot"))


@pytest.fixture
def with_long_rows(pairs: Sequence[Preference], tmp_path: Path) -> Path:
    stretched = [replace(p, prompt=p.prompt + " Please explain every step." * 12) for p in pairs[:4]]
    return write_pairs(tmp_path / "long.jsonl", [*stretched, *pairs[4:]])


def test_pairs_beyond_the_limit_are_left_out_and_counted(
    tiny_backbone: Tiny, with_long_rows: Path, tmp_path: Path
) -> None:
    run = train(given("arliss", tiny_backbone("bert"), with_long_rows, tmp_path / "run", "train.max_steps=1"))
    told = card(run)["data"]
    assert told["not_used"] == {"short": {"too_long": 4}}
    assert sum(told["train_pairs"].values()) + sum(told["val_pairs"].values()) == 36
    assert told["truncated"] == {"train": {}, "val": {}}


def test_pairs_beyond_the_limit_are_cut_and_counted_where_allowed(
    tiny_backbone: Tiny, with_long_rows: Path, tmp_path: Path
) -> None:
    words = ("train.max_steps=1", "data.on_long=truncate")
    run = train(given("arliss", tiny_backbone("bert"), with_long_rows, tmp_path / "run", *words))
    told = card(run)["data"]
    assert told["not_used"] == {}
    assert sum(sum(told[k].values()) for k in ("train_pairs", "val_pairs")) == 40
    assert Counter(told["truncated"]["train"]) + Counter(told["truncated"]["val"]) == {"short": 4}


def test_a_domain_that_the_limit_empties_is_an_error(tiny_backbone: Tiny, data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no pair of domain long, short fits the limit of 12 tokens.*on_long=truncate"):
        train(given("arliss", tiny_backbone("bert"), data, tmp_path / "run", "data.max_length=12"))


def test_a_limit_beyond_the_positions_of_the_backbone_is_refused(
    tiny_backbone: Tiny, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(BackboneError, match=r"data\.max_length: 129 tokens, but backbone '.*' has 128 positions"):
        train(given("arliss", tiny_backbone("bert"), data, tmp_path / "run", "data.max_length=129"))


# ---------------------------------------------------------------- numbers that are none


def test_a_row_without_a_finite_loss_stops_the_run_and_is_named(
    run: Path, tiny_backbone: Tiny, data: Path, pairs: Sequence[Preference], tmp_path: Path
) -> None:
    words = ("train.checkpoint_every=1", "train.batch_size=3", "train.epochs=4")
    config = resolve(given("arliss", tiny_backbone("bert"), data, tmp_path / "run", *words))
    sound = read_pairs(config)
    poisoned = next(p for p in sound.train if p.domain == "short")
    rows = [replace(p, margin=math.inf) if p is poisoned else p for p in sound.train]
    with pytest.raises(NonFiniteError, match=rf"expert/short, step \d: .*Rows: {poisoned.id}$"):
        train_on(config, Pairs(rows, sound.val))
    folders = sorted((tmp_path / "run" / "checkpoints").glob("*/step-*"))
    assert folders[-1].parent.name == "01-expert-short" or "step" not in str(folders[-1])
    assert all(verify_folder(f) == [] for f in folders)
    assert not (tmp_path / "run" / "model").exists()


def test_a_head_that_breaks_at_a_step_leaves_the_weights_of_the_step_before(
    tiny_backbone: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("train.checkpoint_every=1", "train.batch_size=1", "train.epochs=4")
    config = resolve(given("base_lora", tiny_backbone("bert"), data, tmp_path / "run", *words))
    before: list[torch.Tensor] = []
    forward = RewardHead.forward

    def breaking(self: RewardHead, hidden_ND: torch.Tensor) -> torch.Tensor:
        if self.training:
            before.append(self.layers[-1].weight.detach().clone())
        return forward(self, hidden_ND) * (math.nan if len(before) == 8 else 1.0)

    monkeypatch.setattr(RewardHead, "forward", breaking)
    with pytest.raises(NonFiniteError, match="step 7: "):
        train(config)
    newest = sorted((tmp_path / "run" / "checkpoints").glob("*/step-*"))[-1]
    assert newest.name == "step-00000007"
    assert verify_folder(newest) == []
    from safetensors.torch import load_file

    heads = {k: v for k, v in load_file(newest / "model.safetensors").items() if v.shape == before[7].shape}
    assert any(torch.equal(v, before[7]) for v in heads.values())
    assert not any(torch.equal(v, before[6]) for v in heads.values())


# ---------------------------------------------------------------- the run folder


class Stop(BaseException):
    """Ends training where it stands."""


def stopped(config: Any, num_forwards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until so many calls of a head, then leave the folder as it is."""
    forward, calls = RewardHead.forward, iter(range(num_forwards))

    def limited(self: nn.Module, hidden_ND: torch.Tensor) -> torch.Tensor:
        if next(calls, None) is None:
            raise Stop
        return forward(self, hidden_ND)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(RewardHead, "forward", limited)
        with pytest.raises(Stop):
            train(config)


def test_an_unfinished_run_of_another_configuration_is_refused(
    tiny_backbone: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = given("arliss", tiny_backbone("bert"), data, tmp_path / "run", "train.checkpoint_every=1")
    stopped(words, 4, monkeypatch)
    before = digests(tmp_path / "run")
    other = given("arliss", tiny_backbone("bert"), data, tmp_path / "run", "train.epochs=3", "system.rank=5")
    with pytest.raises(
        RunError, match=r"another configuration \(system\.rank: 12 then, 5 now; train\.epochs: 1 then, 3 now\)"
    ):
        train(other)
    assert digests(tmp_path / "run") == before
    train(words)


def test_an_unfinished_run_of_other_data_is_refused(
    tiny_backbone: Tiny, pairs: Sequence[Preference], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", pairs)
    words = given("arliss", tiny_backbone("bert"), data, tmp_path / "run", "train.checkpoint_every=1")
    stopped(words, 4, monkeypatch)
    write_pairs(data, [replace(pairs[0], chosen="It is otherwise."), *pairs[1:]])
    with pytest.raises(RunError, match=r"no checkpoint is good:\n.*data_sha256"):
        train(words)


def test_a_finished_run_is_not_trained_again(run: Path, tiny_backbone: Tiny, tmp_path: Path) -> None:
    before = digests(run)
    config = resolve(card(run)["config"])
    with pytest.raises(RunError, match=r"holds a finished run\. Choose another out"):
        train(config)
    assert digests(run) == before


def test_a_run_that_never_took_a_step_does_not_bind_its_folder(
    tiny_backbone: Tiny, data: Path, run: Path, tmp_path: Path
) -> None:
    with pytest.raises(BackboneError):
        train(given("arliss", tiny_backbone("bert"), data, tmp_path / "run", "data.max_length=512"))
    train(given("arliss", tiny_backbone("bert"), data, tmp_path / "run", "train.max_steps=1"))


def test_what_a_killed_save_left_is_removed(tiny_backbone: Tiny, data: Path, tmp_path: Path) -> None:
    left = tmp_path / "run" / ".model-999999999"
    (left / "backbone").mkdir(parents=True)
    train(given("arliss", tiny_backbone("bert"), data, tmp_path / "run", "train.max_steps=1"))
    assert sorted(os.listdir(tmp_path / "run")) == [
        ".lock",
        "config.yaml",
        "metrics.jsonl",
        "model",
        "quarantine.jsonl",
    ]


@pytest.mark.parametrize("missing", ["out", "data.train"])
def test_what_every_run_needs_is_asked_for(missing: str, tiny_backbone: Tiny, data: Path, tmp_path: Path) -> None:
    words = given("arliss", tiny_backbone("bert"), data, tmp_path / "run")
    if missing == "out":
        del words["out"]
    else:
        del words["data"]["train"]
    with pytest.raises(ConfigError, match=rf"^{missing}: is required"):
        train(words)
