"""A new domain: its expert is trained, the router refitted, and no old expert moves by a bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moreward.data.batches import conversation_batch, side
from moreward.errors import ConfigError, DataError, RunError
from moreward.evals.run import evaluate_run
from moreward.growth.change import carry_over, extend
from moreward.nn.backbone import Backbone
from moreward.runs import read_model
from moreward.scoring import Scorer, load
from moreward.types import Conversation, Preference
from trained import card, digests, trained, weights, write_pairs

Tiny = Callable[[str], Path]
KINDS = [("arliss", "bert"), ("rodos", "bert"), ("arliss", "deberta-v2"), ("arliss", "gpt2"), ("rodos", "qwen2")]
TEXTS = [
    Conversation(prompt="In the long style, tell me about a train ride.", response="It is calm."),
    Conversation(prompt="What is the capital of France?", response="The capital of France is Paris."),
    Conversation(prompt="x", response="A longer answer that takes its time and explains every step with care."),
    Conversation(prompt="In a question, tell me about the sea.", response="Is it calm?"),
]


@pytest.fixture(scope="module")
def asking(pairs: Sequence[Preference]) -> list[Preference]:
    """A third domain: questions are better than statements."""
    return [
        replace(
            p,
            prompt=p.prompt.replace("In the short style", "In a question"),
            chosen=p.chosen.replace("It is", "Is it").replace(".", "?"),
            rejected=p.chosen,
            domain="asking",
            id=f"asking-{i}",
        )
        for i, p in enumerate(pairs[:16])
    ]


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_backbone: Tiny,
    pairs: Sequence[Preference],
    asking: list[Preference],
) -> Callable[..., Any]:
    """The run of a recipe and a kind, and its extension, each made once."""
    folder = tmp_path_factory.mktemp("extended")
    data = write_pairs(folder / "asking.jsonl", asking)
    known: dict[tuple[str, str], Any] = {}

    def get(recipe: str, kind: str) -> Any:
        if (recipe, kind) not in known:
            words = () if kind == "bert" else ("data.max_length=128",)  # their tokens are shorter
            run = trained(tmp_path_factory.mktemp("runs"), tiny_backbone, pairs, recipe, kind, *words)
            before = digests(run)
            extension = extend(run, "asking", [str(data)], out=folder / f"{recipe}-{kind}")
            known[recipe, kind] = (run, before, extension)
        return known[recipe, kind]

    return get


@torch.no_grad()
def alone(scorer: Scorer, item: Conversation, expert: str) -> float:
    batch = conversation_batch([scorer.encoder.conversation(item)], [-1], scorer.encoder.pad_id)
    return float(scorer.system.judge(batch, torch.tensor([[scorer.experts.index(expert)]])))


@pytest.mark.parametrize(("recipe", "kind"), KINDS)
def test_no_old_expert_moves_by_a_bit_and_the_new_one_is_there(
    recipe: str, kind: str, made: Callable[..., Any]
) -> None:
    run, before, extension = made(recipe, kind)
    assert digests(run) == before, "the old run is untouched"
    assert (extension.parent, extension.domain) == (run, "asking")
    assert (extension.golden_difference, extension.num_golden) == (0.0, 2 * len(card(run)["golden"]))
    old, new = load(run), load(extension.run)
    assert old.experts == ("long", "short")
    assert new.experts == ("long", "short", "asking")
    golden = [Conversation(prompt=g["prompt"], response=g["response"]) for g in card(run)["golden"]]
    for item in [*golden, *TEXTS]:
        for expert in old.experts:
            assert alone(new, item, expert) == alone(old, item, expert), (expert, item)
    gate = next(k for k in weights(run) if k.endswith("router.gate.weight"))
    assert (len(weights(run)[gate]), len(weights(extension.run)[gate])) == (2, 3)


@pytest.mark.parametrize(("recipe", "kind"), KINDS)
def test_an_extended_run_can_be_evaluated_and_scored(
    recipe: str, kind: str, made: Callable[..., Any], asking: list[Preference], pairs: Sequence[Preference]
) -> None:
    _, _, extension = made(recipe, kind)
    scorer = load(extension.run)
    result = evaluate_run(scorer, [*pairs[:20], *pairs[20:], *asking])
    assert set(result.evaluation.domains) == {"long", "short", "asking"}
    assert result.evaluation.domains["asking"].oracle is not None
    reward = scorer.score([side(asking[0], "chosen")], explain=True)[0]
    assert set(reward.expert_rewards) == {"long", "short", "asking"}


def test_every_tensor_of_an_old_expert_is_the_same_and_every_new_one_was_trained(made: Callable[..., Any]) -> None:
    run, _, extension = made("arliss", "bert")
    old, new = weights(run), weights(extension.run)
    for expert in ("long", "short"):
        mine = [k for k in old if f".{expert}." in k]
        assert mine
        assert all(torch.equal(old[k], new[k]) for k in mine)
    fresh = {k for k in new if ".asking." in k}
    assert fresh == set(new) - set(old)
    assert any(".B." in k and bool(new[k].any()) for k in fresh), "its adapter has left zero"
    assert not torch.equal(*(t["routed.router.router.gate.weight"][:2] for t in (old, new))), "the router is refitted"
    assert digests(run / "model" / "experts" / "long").keys() == digests(extension.run / "model/experts/asking").keys()


def test_the_card_of_an_extension_tells_where_it_comes_from(made: Callable[..., Any], asking: list[Preference]) -> None:
    run, _, extension = made("arliss", "bert")
    told = card(extension.run)
    assert told["parent"] == {"run": str(run), "model": load(run).identity}
    assert [a["domain"] for a in told["changes"]] == ["asking"]
    assert [s["stage"] for s in told["stages"]] == ["expert/asking", "router"]
    assert told["domains"] == ["long", "short", "asking"]
    counts = told["data"]["train_pairs"]
    assert counts["asking"] + len(extension.new_val) == len(asking)
    assert {d: counts[d] for d in ("long", "short")} == card(run)["data"]["train_pairs"]
    assert {p.domain for p in extension.new_val} == {"asking"}
    trained_prompts = {p.prompt for p in asking} - {p.prompt for p in extension.new_val}
    assert trained_prompts, "held-out prompts are not trained on"


def test_the_held_out_pairs_of_the_old_domains_are_those_of_the_old_run(
    made: Callable[..., Any], pairs: Sequence[Preference]
) -> None:
    run, _, extension = made("arliss", "bert")
    told = card(run)["data"]["val_pairs"]
    assert {d: sum(p.domain == d for p in extension.old_val) for d in told} == told
    assert {p.id for p in extension.old_val} <= {p.id for p in pairs}


def test_an_extension_can_be_extended(
    made: Callable[..., Any], pairs: Sequence[Preference], asking: list[Preference], tmp_path: Path
) -> None:
    _, _, first = made("arliss", "bert")
    loud = [replace(p, prompt=f"Loud! {p.prompt}", domain="loud", id=f"loud-{p.id}") for p in asking]
    data = write_pairs(tmp_path / "loud.jsonl", loud)
    second = extend(first.run, "loud", [str(data)], out=tmp_path / "second")
    assert load(second.run).experts == ("long", "short", "asking", "loud")
    assert second.golden_difference == 0.0
    assert set(card(second.run)["data"]["train_pairs"]) == {"long", "short", "asking", "loud"}, (
        "the router sees them all"
    )


# ---------------------------------------------------------------- refused


def refused(run: Path, out: Path, domain: str = "asking", data: Sequence[Path] = (), **options: Any) -> str:
    """What `extend` says when it refuses; nothing is written."""
    with pytest.raises((ConfigError, RunError, DataError)) as caught:
        extend(run, domain, [str(d) for d in data], out=out, **options)
    assert not (out / "model").exists()
    return str(caught.value)


@pytest.fixture
def new_data(asking: list[Preference], tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "asking.jsonl", asking)


@pytest.mark.parametrize("recipe", ["more", "baseline"])
def test_a_recipe_without_an_expert_per_domain_cannot_be_extended(
    recipe: str, tiny_backbone: Tiny, pairs: Sequence[Preference], new_data: Path, tmp_path: Path
) -> None:
    run = trained(tmp_path / "runs", tiny_backbone, pairs, recipe)
    said = refused(run, tmp_path / "out", data=[new_data])
    assert said == f"recipe {recipe!r} has no expert per domain, so it cannot be extended: train it again"
    assert not (tmp_path / "out").exists()


def test_a_domain_that_exists_is_refused(made: Callable[..., Any], new_data: Path, tmp_path: Path) -> None:
    run, _, _ = made("arliss", "bert")
    said = refused(run, tmp_path / "out", "short", [new_data])
    assert said == "domain 'short' exists. The run has: long, short."


def test_data_of_other_domains_is_refused(made: Callable[..., Any], asking: list[Preference], tmp_path: Path) -> None:
    run, _, _ = made("arliss", "bert")
    mixed = [*asking[:8], *(replace(p, domain="other") for p in asking[8:])]
    data = write_pairs(tmp_path / "mixed.jsonl", mixed)
    said = refused(run, tmp_path / "out", data=[data])
    assert said.startswith("--data holds rows of domain other; give the pairs of 'asking' alone")


def test_rows_without_a_domain_are_of_the_new_one(
    made: Callable[..., Any], asking: list[Preference], tmp_path: Path
) -> None:
    run, _, _ = made("arliss", "bert")
    data = write_pairs(tmp_path / "train.jsonl", [replace(p, domain="") for p in asking])
    extension = extend(run, "asking", [str(data)], out=tmp_path / "out", changes={"max_steps": 1})
    assert {p.domain for p in extension.new_val} == {"asking"}
    assert card(extension.run)["config"]["train"]["max_steps"] == 1


def test_old_data_that_is_gone_must_be_named(
    tiny_backbone: Tiny, pairs: Sequence[Preference], new_data: Path, tmp_path: Path
) -> None:
    run = trained(tmp_path / "gone", tiny_backbone, pairs, "arliss", "bert", "train.max_steps=1", "train.replay=0")
    moved = (tmp_path / "gone" / "pairs.jsonl").rename(tmp_path / "moved.jsonl")
    said = refused(run, tmp_path / "out", data=[new_data])
    assert "pairs.jsonl" in said
    extension = extend(run, "asking", [str(new_data)], out=tmp_path / "out", old_data=[str(moved)])
    assert extension.golden_difference == 0.0


def test_old_data_that_is_not_what_it_was_is_refused(
    tiny_backbone: Tiny, pairs: Sequence[Preference], new_data: Path, tmp_path: Path
) -> None:
    run = trained(tmp_path / "changed", tiny_backbone, pairs, "arliss", "bert", "train.max_steps=2", "train.replay=0")
    write_pairs(tmp_path / "changed" / "pairs.jsonl", pairs[:38])
    said = refused(run, tmp_path / "out", data=[new_data])
    assert "old" in said
    assert "--old-data" in said


def test_a_damaged_run_is_refused_and_not_extended(made: Callable[..., Any], new_data: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made("arliss", "bert")[0], tmp_path / "run"))
    file = run / "model" / "moreward.json"
    file.write_bytes(file.read_bytes()[:-20])
    assert "moreward.json" in refused(run, tmp_path / "out", data=[new_data])


def test_growing_keeps_old_rows_and_refuses_other_shapes(made: Callable[..., Any]) -> None:
    grown, gate = torch.zeros(3, 2), torch.ones(2, 2)
    carry_over({"gate": grown, "scale": torch.zeros(())}, {"gate": gate, "scale": torch.ones(())}, [0, 1])
    assert grown.tolist() == [[1, 1], [1, 1], [0, 0]]
    with pytest.raises(RunError, match=r"tensor 'gate' has shape \(2, 3\), not \(3, 2\)"):
        carry_over({"gate": grown}, {"gate": torch.ones(2, 3)}, [0, 1])
    system, _, told = read_model(made("arliss", "bert")[0])
    assert Backbone.load(told["backbone"]["name"]).pooling == system.backbones()[0].pooling


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("bert", ("system.adapter_layers=1", "system.router_reads=trunk", "system.train_together=true")),
        ("llama", ("system.active_tokens=6", "data.max_length=128")),
    ],
)
def test_shared_trunks_and_activated_experts_can_be_extended(
    kind: str, words: tuple[str, ...], tiny_backbone: Tiny, pairs: Sequence[Preference], new_data: Path, tmp_path: Path
) -> None:
    run = trained(tmp_path, tiny_backbone, pairs, "arliss", kind, *words)
    before = load(run)
    assert (run / "model" / "experts").exists() == ("active" not in words[0])
    item = Conversation(prompt="In the short style, tell me about maps.", response="It is calm.")
    old = [alone(before, item, expert) for expert in before.experts]
    extension = extend(run, "asking", [str(new_data)], out=tmp_path / "extended")
    assert extension.golden_difference == 0
    after = load(extension.run)
    assert set(after.experts) == {*before.experts, "asking"}
    assert [alone(after, item, expert) for expert in before.experts] == old
