"""Verdicts to rows that train, and to the books of what became of every pair."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moreward.data.judge.cache import Cache
from moreward.data.judge.judges import Judge
from moreward.data.judge.pairs import Pair
from moreward.data.judge.tally import Tally
from moreward.data.points import Points
from moreward.types import Text

Rows = list[dict[str, Any]]


def labels_of(
    judge: Judge, pairs: Sequence[Pair], points: Points, cache: Cache
) -> tuple[Rows, dict[str, dict[str, Tally]]]:
    """The row of every label kept, in the order of the pairs and of the points; and the tally of each task's points."""
    tasks = dict.fromkeys(pair.domain for pair in pairs)
    tallies = {task: {point: Tally(judge.reads_order) for point in points[task]} for task in tasks}
    rows = []
    for pair in pairs:
        for point, meaning in points[pair.domain].items():
            verdicts = judge.verdicts(pair, point, meaning, cache)
            if better := tallies[pair.domain][point].take(*verdicts, pair.given):
                meta = {"judge": judge.name, "prompt": judge.version(pair.domain, point)}
                rows.append(_row(pair, point, better, {key: value for key, value in meta.items() if value}))
    return rows, tallies


def _row(pair: Pair, point: str, better: int, judge: Mapping[str, str]) -> dict[str, Any]:
    """A row of the shape `explicit`, or `implicit` where there is no prompt; columns that say nothing are left out."""
    chosen, rejected = (pair.first, pair.second) if better == 1 else (pair.second, pair.first)
    texts = _alike(pair.prompt, chosen, rejected)
    row: dict[str, Any] = {
        **dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)),
        "domain": pair.domain,
        "capability": point,
        "id": f"{pair.id}/{point}",
        "group": pair.group,
        "tools": pair.tools,
        "chat_template_kwargs": pair.chat_template_kwargs,
        "meta": {**judge, "source": pair.source, "row": pair.id},
    }
    return {name: value for name, value in row.items() if value}


def _alike(*texts: Text) -> tuple[str | list[dict[str, Any]], ...]:
    """Prompt and responses all as text or all as turns: a file that mixes them is not read again."""
    if all(isinstance(text, str) for text in texts):
        return tuple(map(str, texts))
    roles = ("user", "assistant", "assistant")
    return tuple(
        [{"role": role, "content": text}] if isinstance(text, str) else [dict(turn) for turn in text]
        for role, text in zip(roles, texts, strict=True)
    )


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines that are there as a whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, default=dict, allow_nan=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
