"""Rewards for a file with a real model: those of the scorer, and the same bytes whatever interrupts the job."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from killing import Forks
from moreward.bulk import score_file
from moreward.data.batches import side
from moreward.scoring import Scorer, load
from moreward.types import Conversation, Preference

TOLERANCE = 2e-3  # as in test_scoring.py
Tiny = Callable[[str], Path]
Make = Callable[..., Path]
LONG = Conversation(prompt="Please tell me all. " * 40, response="It is calm.", id="row-9")
SCORE = """
from pathlib import Path
from moreward.bulk import score_file
from moreward.scoring import load

scorer, source = load(arguments[0]), Path(arguments[1])

def work(target):
    score_file(scorer, source, Path(target), chunk=16, explain=True)
"""


@pytest.fixture(scope="module")
def scorer(make: Make) -> Scorer:
    return load(make())


@pytest.fixture(scope="module")
def items(pairs: Sequence[Preference]) -> list[Conversation]:
    return [replace(side(p, which), id=f"{p.id}/{which}") for p in pairs for which in ("chosen", "rejected")]


def write_rows(path: Path, items: Sequence[Conversation], times: int) -> Path:
    rows = [{"id": f"{n}/{i.id}", "prompt": i.prompt, "response": i.response} for n in range(times) for i in items]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def scorers(make: Make, items: list[Conversation], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """`score_file` with the real model, loaded once."""
    source = write_rows(tmp_path_factory.mktemp("rows") / "in.jsonl", items, 2)
    with Forks(SCORE, make(), source) as scorers:
        yield scorers


def test_scoring_a_file_that_is_killed_again_and_again_gives_the_same_bytes(scorers: Forks, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert scorers.run(whole) == 0
    started = time.monotonic()
    assert scorers.run(tmp_path / "again.jsonl") == 0
    seconds = time.monotonic() - started
    drawn = random.Random(3)
    codes = [scorers.run(killed, kill_after=drawn.uniform(0.2, 0.6) * seconds) for _ in range(3)]
    codes += [scorers.run(killed, crash_at=n) for n in (3, 7, 10)]
    assert -9 in codes[:3]
    assert scorers.run(killed) == 0 or killed.exists()
    assert killed.read_bytes() == whole.read_bytes() == (tmp_path / "again.jsonl").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["again.jsonl", "killed.jsonl", "whole.jsonl"]


def test_a_file_gets_the_rewards_of_the_scorer(scorer: Scorer, items: list[Conversation], tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", items, 1)
    with source.open("a") as file:
        file.write(json.dumps({"id": "too-long", "prompt": LONG.prompt, "response": LONG.response}) + "\n")
    report = score_file(scorer, source, tmp_path / "out.jsonl", chunk=7, max_bad_share=0.1)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert (report.rows, report.scored, report.bad) == (81, 80, 1)
    assert [line["id"] for line in lines] == [*(f"0/{i.id}" for i in items), "too-long"]
    wanted = [r.reward for r in scorer.score(items)]
    assert [line["reward"] for line in lines[:-1]] == pytest.approx(wanted, abs=TOLERANCE)
    assert "the limit is 96" in lines[-1]["error"]["message"]
