"""Rows that judge one capability say nothing of the whole response: only recipes with an expert for them learn from
them, nobody is measured by them, and none of them is lost without a word."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moreward.cli import app
from moreward.errors import DataError
from moreward.growth.change import extend
from moreward.train.runner import train
from moreward.train.track import Silent
from moreward.types import Preference
from trained import card, given, weights, write_pairs

Tiny = Callable[[str], Path]
Make = Callable[..., Path]


class Heard(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def parts(pairs: Sequence[Preference]) -> list[Preference]:
    """The opposite of the first eight pairs, in one capability."""
    return [replace(p.swapped(), capability="warmth", id=f"{p.id}/warmth") for p in pairs[:8]]


def test_training_is_bit_for_bit_that_without_them_and_says_how_many_there_were(
    make: Make, tiny_backbone: Tiny, pairs: Sequence[Preference], parts: list[Preference], tmp_path: Path
) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", [*pairs, *parts])
    heard = Heard()
    run = train(given("base_lora", tiny_backbone("bert"), data, tmp_path / "run"), reporter=heard)
    plain = weights(make("base_lora"))
    assert {k: v.tolist() for k, v in weights(run).items()} == {k: v.tolist() for k, v in plain.items()}
    assert [said for said in heard.said if "capability" in said] == [
        "8 rows judge one capability, not the whole response: put aside"
    ]
    told = card(run)["data"]
    assert told["not_used"]["short"]["capability"] == 8
    assert (told["train"]["rows"], told["train"]["pairs"], told["train"]["contradictions"]) == (48, 40, 0)
    assert told["data_sha256"] == card(make("base_lora"))["data"]["data_sha256"]
    rows = [json.loads(line) for line in (run / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["line"] for row in rows if row["reason"] == "capability"] == list(range(41, 49))


def test_nothing_but_capabilities_is_refused(tiny_backbone: Tiny, parts: list[Preference], tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", parts)
    with pytest.raises(DataError, match="All 8 rows judge one capability"):
        train(given("base_lora", tiny_backbone("bert"), data, tmp_path / "run"))


def test_an_evaluation_leaves_them_out_and_says_so(
    make: Make, pairs: Sequence[Preference], parts: list[Preference], tmp_path: Path
) -> None:
    run = make("base_lora")
    both, whole = write_pairs(tmp_path / "both.jsonl", [*pairs, *parts]), write_pairs(tmp_path / "whole.jsonl", pairs)
    with_parts, without = (
        CliRunner().invoke(app, ["eval", str(run), "--data", str(d), "--json"]) for d in (both, whole)
    )
    assert with_parts.stderr.count("not used") == with_parts.stderr.count("8 rows not used (capability 8)") == 1
    first, second = (json.loads(r.stdout)["evaluation"] for r in (with_parts, without))
    assert first["domains"] == second["domains"]


def test_a_new_domain_is_learned_without_them(
    make: Make, pairs: Sequence[Preference], parts: list[Preference], tmp_path: Path
) -> None:
    new = [replace(p, domain="new", prompt=f"Newly: {p.prompt}", id=f"new-{p.id}") for p in (*pairs[:20], *parts)]
    old = write_pairs(tmp_path / "old.jsonl", pairs)
    extended = extend(
        make("arliss"), domain="new", data=[str(write_pairs(tmp_path / "new.jsonl", new))], old_data=[str(old)],
        out=tmp_path / "more",
    )  # fmt: skip
    assert card(extended.run)["data"]["not_used"]["new"]["capability"] == 8
