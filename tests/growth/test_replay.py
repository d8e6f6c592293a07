"""Changes without the old data: the gate alone is refitted, on what the run keeps of its prompts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moreward.cli import app
from moreward.errors import MorewardError, RunError
from moreward.growth.change import extend, plan, remove_expert, replace_expert
from moreward.runs import read_replay
from moreward.scoring import load
from moreward.train.runner import train
from moreward.types import Preference
from trained import card, given, weights, write_pairs

Tiny = Callable[[str], Path]
KINDS = [
    ("arliss", ()),
    ("arliss", ("tune=frozen",)),
    ("arliss", ("system.adapter_layers=1", "system.router_reads=trunk")),
    ("rodos", ()),
    ("shared_expert", ("tune=frozen",)),
    ("shared_expert", ()),
]


@pytest.fixture(scope="module")
def asking(pairs: Sequence[Preference]) -> list[Preference]:
    return [
        replace(
            p, prompt=f"Question? {p.prompt}", chosen=p.chosen.replace(".", "?"), rejected=p.chosen, domain="asking"
        )
        for p in pairs[:16]
    ]


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Tiny, pairs: Sequence[Preference], asking: list[Preference]
) -> Callable[..., Any]:
    """A run, its extension with the old data, then the old data is deleted, and its extension without."""
    known: dict[tuple[str, tuple[str, ...]], Any] = {}

    def get(recipe: str, words: tuple[str, ...] = ()) -> Any:
        if (recipe, words) not in known:
            folder = tmp_path_factory.mktemp("replayed")
            data = write_pairs(folder / "old.jsonl", pairs)
            new = write_pairs(folder / "asking.jsonl", asking)
            run = train(given(recipe, tiny_backbone("bert"), data, folder / "run", *words))
            with_data = extend(run, "asking", [str(new)], out=folder / "with")
            data.unlink()
            without = extend(run, "asking", [str(new)], out=folder / "without")
            known[recipe, words] = (run, with_data, without, new)
        return known[recipe, words]

    return get


def routed_right(run: Path, pairs: Sequence[Preference]) -> float:
    told = load(run).score([(p.prompt, p.chosen) for p in pairs])
    return sum(max(r.weights, key=r.weights.__getitem__) == p.domain for r, p in zip(told, pairs, strict=True)) / len(
        pairs
    )


@pytest.mark.parametrize(("recipe", "words"), KINDS)
def test_without_the_old_data_no_expert_moves_and_the_gate_knows_the_old_domains(
    recipe: str, words: tuple[str, ...], made: Callable[..., Any], pairs: Sequence[Preference]
) -> None:
    run, with_data, without, _ = made(recipe, words)
    assert with_data.replayed is None
    assert without.replayed is not None
    assert without.golden_difference == 0.0
    assert without.num_golden == 2 * len(card(run)["golden"])
    old, new = weights(run), weights(without.run)
    moved = {k for k in old if not torch.equal(old[k], new[k])}
    gate = {k for k in old if ".router.gate." in k}
    assert moved <= gate | ({k for k in old if k.endswith("share_E")}), "the router's encoder stays as it is"
    assert routed_right(without.run, pairs) >= routed_right(with_data.run, pairs) - 0.05
    assert load(without.run).experts == ("long", "short", "asking")


def test_what_is_kept_is_sealed_bounded_and_of_every_domain(made: Callable[..., Any]) -> None:
    run, _, without, _ = made("arliss")
    replay = read_replay(run)
    assert replay is not None
    counts = card(run)["data"]
    held_out = int(replay.held_out_P.sum())
    assert replay.num_prompts().keys() == {"long", "short"}
    assert 0 < held_out <= sum(counts["val_pairs"].values())
    assert len(replay.hidden_PD) - held_out <= sum(counts["train_pairs"].values())
    later = read_replay(without.run)
    assert later is not None
    old = later.of(replay.domains)
    assert torch.equal(old.hidden_PD, replay.hidden_PD), "what was kept is handed on"
    copy = Path(shutil.copytree(run, without.run.parent / "copy"))
    file = copy / "model" / "replay.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    with pytest.raises(RunError, match=r"replay\.safetensors"):
        load(copy)


def test_the_next_changes_need_no_old_data_either(made: Callable[..., Any], pairs: Sequence[Preference]) -> None:
    _, _, without, new = made("arliss")
    folder = without.run.parent
    less = remove_expert(without.run, "short", out=folder / "less")
    assert less.golden_difference == 0.0
    assert load(less.run).experts == ("long", "asking")
    assert read_replay(less.run).num_prompts().keys() == {"long", "asking"}  # type: ignore[union-attr]
    assert routed_right(less.run, [p for p in pairs if p.domain == "long"]) > 0.9
    other = replace_expert(without.run, "asking", [str(new)], out=folder / "other")
    assert other.golden_difference == 0.0
    told = card(other.run)["data"]["replayed"]
    assert told["prompts"].keys() == {"long", "short"}
    assert "without the old domains' data" in told["why"]
    assert {g["prompt"] for g in card(without.run)["golden"]} <= {g["prompt"] for g in card(other.run)["golden"]}


def test_the_command_says_that_the_old_data_was_not_used(made: Callable[..., Any], tmp_path: Path) -> None:
    run, _, _, new = made("arliss")
    words = ["extend", str(run), "--domain", "asking", "--data", str(new), "--out", str(tmp_path / "out")]
    assert [s.stage for s in plan("extend", run, "asking", [str(new)], out=tmp_path / "out")][-1] == "gate"
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "the old domains' pairs are not used" in said
    assert "old.jsonl" in said
    assert "gate refitted without the old data; right on held-out prompts: long " in said
    assert "bit-identical" in said


def test_old_data_that_is_not_what_it_was_is_not_used(
    tiny_backbone: Tiny, pairs: Sequence[Preference], asking: list[Preference], tmp_path: Path
) -> None:
    data = write_pairs(tmp_path / "old.jsonl", pairs)
    new = write_pairs(tmp_path / "asking.jsonl", asking)
    run = train(given("arliss", tiny_backbone("bert"), data, tmp_path / "run", "train.max_steps=1"))
    write_pairs(data, pairs[:38])
    made = extend(run, "asking", [str(new)], out=tmp_path / "out")
    assert made.replayed is not None
    assert "has changed since" in card(made.run)["data"]["replayed"]["why"]
    assert made.old_val == []
    assert card(made.run)["data"]["train_pairs"].keys() == {"asking"}


def test_where_nothing_is_kept_the_old_data_is_asked_for(
    tiny_backbone: Tiny, pairs: Sequence[Preference], asking: list[Preference], tmp_path: Path
) -> None:
    data = write_pairs(tmp_path / "old.jsonl", pairs)
    new = write_pairs(tmp_path / "asking.jsonl", asking)
    words = ("train.replay=0", "train.max_steps=1")
    run = train(given("arliss", tiny_backbone("bert"), data, tmp_path / "run", *words))
    assert read_replay(run) is None
    data.unlink()
    with pytest.raises(MorewardError, match=r"old\.jsonl"):
        extend(run, "asking", [str(new)], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
