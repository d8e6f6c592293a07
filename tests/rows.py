"""Rows, files of rows, and scorers that need no model, for the tests of bulk scoring."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moreward.bulk import BulkReport, score_file
from moreward.errors import MorewardError
from moreward.types import Conversation, Reward


class BatchScorer:
    """Rewards depend on place and number in the chunk, as those of a real model do in their last bits."""

    identity = "batch-scorer-1"
    on_long = "drop"

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def score(self, items: Sequence[Conversation], *, explain: bool = False) -> list[Reward]:
        time.sleep(self.seconds)
        return [self.one(item, place, len(items)) for place, item in enumerate(items)]

    def one(self, item: Conversation, place: int, size: int) -> Reward:
        digest = hashlib.sha256(repr((item.prompt, item.response, place, size)).encode()).digest()
        return Reward(reward=int.from_bytes(digest[:6], "big") / 1e12, expert="code", id=item.id)


class TextScorer:
    """A reward of the text alone. Some responses make it fail or give no number."""

    def __init__(self, identity: str = "text-scorer-1", on_long: str = "drop") -> None:
        self.identity = identity
        self.on_long = on_long
        self.calls: list[list[str]] = []

    def score(self, items: Sequence[Conversation], *, explain: bool = False) -> list[Reward]:
        self.calls.append([item.id for item in items])
        if any("poison" in str(item.response) for item in items):
            raise MorewardError("this response cannot be encoded")
        return [self.one(item, explain) for item in items]

    def one(self, item: Conversation, explain: bool) -> Reward:
        reward = float("nan") if item.response == "nan" else float(len(str((item.prompt, item.response))))
        experts = {"code": reward, "help": -1.5} if explain else {}
        return Reward(
            reward=reward, expert="code", weights={"code": 1.0}, expert_rewards=experts, num_tokens=7, id=item.id
        )


def write_rows(path: Path, rows: Sequence[Mapping[str, Any] | str]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def row(number: int, **more: object) -> dict[str, object]:
    return {"id": f"r{number}", "prompt": f"prompt {number}", "response": "word " * (number % 7 + 1), **more}


def score(source: Path, scorer: Any = None, **options: Any) -> tuple[BulkReport, list[dict[str, Any]]]:
    target = source.with_name("out.jsonl")
    report = score_file(scorer or TextScorer(), source, target, **{"max_bad_share": 1.0, **options})
    assert sorted(os.listdir(source.parent)) == sorted({source.name, target.name}), "nothing is left behind"
    return report, read_rows(target)
