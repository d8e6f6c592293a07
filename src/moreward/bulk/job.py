"""Rewards for a whole file: JSON lines in, one JSON line per row out, in the same order.

A job may be killed at any moment and started again. Chunks begin at fixed row numbers, a chunk counts once its
lines are on disk and recorded, and anything beyond what is recorded is cut off, so a resumed job ends with the
same bytes as an undisturbed one. A row that cannot be scored gets an error line; no row is lost or doubled.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from moreward.bulk.journal import Output
from moreward.bulk.rows import BadRow, Row, parse, read_lines, scan_rows
from moreward.checkpoint import sha256_file, space_errors
from moreward.errors import ConfigError, DataError, MorewardError
from moreward.types import NO_DOMAIN, Conversation, Reward

Progress = Callable[[int, int | None], None]


class SupportsScore(Protocol):
    @property
    def identity(self) -> str:
        """A hash of the model, so that a resumed job never mixes the rewards of two."""

    @property
    def on_long(self) -> str:
        """What happens to conversations beyond the model's limit: another job where it is another."""

    def score(self, items: Sequence[Conversation], *, explain: bool = False, uncertainty: bool = False) -> list[Reward]:
        """One reward per item, in order. A MorewardError is taken to be about one of the items."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkReport:
    """What a job did. `bad` counts every row with an error line; `bad_rows` names the first 20 of them.

    `resumed_from` is the number of rows that an earlier process had already finished. `abstained` counts, by the rows'
    own domain (NO_DOMAIN for those without), the rows that were scored and got no reward, as the scorer was told.
    """

    rows: int
    scored: int
    bad: int
    bad_rows: tuple[str, ...]
    resumed_from: int
    seconds: float
    abstained: Mapping[str, int] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """What a command should exit with: 0, or that of DataError when any row was bad."""
        return DataError.exit_code if self.bad else 0


def score_file(
    scorer: SupportsScore,
    source: Path,
    target: Path,
    *,
    chunk: int = 256,
    explain: bool = False,
    uncertainty: bool = False,
    max_bad_share: float = 0.01,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> BulkReport:
    """Write to `target` the reward of every row of `source` (JSON lines; `.gz` and `.zst` are unpacked).

    A row is `{"prompt", "response"}` (text or list of turns each) or `{"messages"}` whose last turn is the
    response, with `id`, `domain`, `tools` and `chat_template_kwargs` where it has them. Its line of output is
    `{"id", "row", "reward", "expert", "weights", "num_tokens", "truncated"}`, with `explain` also
    `expert_rewards` and, where rewards are sums of parts, `parts` and what each of them says, `part_rewards`; with
    `uncertainty` also that; where the scorer abstains `reward` is null and `abstained` the reason; or it is `{"id",
    "row", "error": {"code", "message"}}`. `row` is the line number in `source`, and the id of rows without one.

    The source is read to count and check its rows before the model works, and again to score them. Progress is
    kept in `<target>.partial` and `<target>.progress.json` until the end; `progress` is told rows done and rows
    in all. One job per target at a time.

    DataError: the source is unreadable or more than `max_bad_share` of its rows are bad (what is done stays, a
    larger share goes on from there). RunError: the target exists, or unfinished work is of another source,
    model or option; `overwrite` discards either. SpaceError: the disk is full.
    """
    started = time.monotonic()
    _check_arguments(source, target, chunk, max_bad_share)
    # Not a key of its own: the records of older versions lack it.
    model = f"{scorer.identity}/uncertainty" if uncertainty else scorer.identity
    job = {"model": model, "on_long": scorer.on_long, "chunk": chunk, "explain": explain}
    output = Output(target, job)
    output.refuse_finished(overwrite)
    scan = scan_rows(source)
    output.job["source"] = sha256_file(source)
    limit = _BadLimit(source.name, scan.rows, max_bad_share)
    limit.check(scan.bad, scan.bad_rows)
    with space_errors(target.parent):
        done = output.start(scan.rows, overwrite)
        resumed_from = done.rows
        if progress:
            progress(done.rows, scan.rows)
        lines = islice(read_lines(source), done.rows, None)
        while rows := [parse(number, line) for number, line in islice(lines, chunk)]:
            records = _score_rows(scorer, rows, explain, uncertainty)
            output.append(records, source.name, _abstained(rows, records))
            limit.check(done.bad, done.bad_rows)
            if progress:
                progress(done.rows, scan.rows)
        output.finish(scan)
    return BulkReport(
        rows=done.rows,
        scored=done.rows - done.bad,
        bad=done.bad,
        bad_rows=tuple(done.bad_rows),
        resumed_from=resumed_from,
        seconds=time.monotonic() - started,
        abstained=dict(sorted(done.abstained.items())),
    )


def _check_arguments(source: Path, target: Path, chunk: int, max_bad_share: float) -> None:
    faults = []
    if chunk < 1:
        faults.append(f"chunk: must be at least 1 (got {chunk})")
    if not 0 <= max_bad_share <= 1:
        faults.append(f"max_bad_share: must be between 0 and 1 (got {max_bad_share})")
    if target.suffix in (".gz", ".zst"):
        faults.append(f"{target}: the output is plain JSON lines. Choose a name without {target.suffix}")
    if target.is_dir():
        faults.append(f"{target}: is a folder. Name a file")
    if target.resolve() == source.resolve():
        faults.append(f"{target}: is the input as well. Choose another output")
    if faults:
        raise ConfigError(faults)


@dataclass(frozen=True)
class _BadLimit:
    name: str
    rows: int
    share: float

    def check(self, bad: int, bad_rows: Sequence[str]) -> None:
        if bad and bad / self.rows > self.share:
            first = "\n  ".join(bad_rows)
            raise DataError(
                f"{self.name}: {bad} of {self.rows} rows cannot be scored, more than max_bad_share={self.share} "
                f"allows. Correct them or allow a larger share. The first:\n  {first}"
            )


def _score_rows(
    scorer: SupportsScore, rows: Sequence[Row], explain: bool, uncertainty: bool = False
) -> list[dict[str, Any]]:
    """One record per row, in order."""
    items = [row.content for row in rows if isinstance(row.content, Conversation)]
    asked = {"explain": explain, **({"uncertainty": True} if uncertainty else {})}
    outcomes = iter(_score(scorer, items, asked))
    return [_record(row, row.content if isinstance(row.content, BadRow) else next(outcomes), explain) for row in rows]


def _abstained(rows: Sequence[Row], records: Sequence[dict[str, Any]]) -> Counter[str]:
    """How many rows of each domain were given no reward."""
    return Counter(
        (isinstance(row.content, Conversation) and row.content.domain) or NO_DOMAIN
        for row, record in zip(rows, records, strict=True)
        if "abstained" in record
    )


def _score(scorer: SupportsScore, items: Sequence[Conversation], asked: Mapping[str, bool]) -> list[Reward | BadRow]:
    if not items:
        return []
    try:
        rewards = scorer.score(items, **asked)
    except MorewardError as error:
        if len(items) == 1:
            return [BadRow("not_scored", str(error))]
        return [outcome for item in items for outcome in _score(scorer, [item], asked)]
    if len(rewards) != len(items) or any(
        reward.id not in ("", item.id) for reward, item in zip(rewards, items, strict=True)
    ):
        raise RuntimeError("the scorer's rewards are not those of the items it was given, one each and in order")
    return list(rewards)


def _record(row: Row, outcome: Reward | BadRow, explain: bool) -> dict[str, Any]:
    head = {"id": row.id, "row": row.number}
    if isinstance(outcome, BadRow):
        return {**head, "error": {"code": outcome.code, "message": str(outcome)}}
    body: dict[str, Any] = {
        "reward": outcome.reward,
        **({"abstained": outcome.abstained} if outcome.reward is None else {}),
        "expert": outcome.expert,
        "weights": dict(outcome.weights),
        "num_tokens": outcome.num_tokens,
        "truncated": outcome.truncated,
    }
    if explain:
        body["expert_rewards"] = dict(outcome.expert_rewards)
        if outcome.parts:
            body["parts"] = dict(outcome.parts)
        if outcome.part_rewards:
            body["part_rewards"] = dict(outcome.part_rewards)
    if outcome.uncertainty is not None:
        body["uncertainty"] = asdict(outcome.uncertainty)
    try:
        json.dumps(body, allow_nan=False)
    except ValueError:
        return {**head, "error": {"code": "non_finite", "message": "the model gave NaN or Inf"}}
    return {**head, **body}
