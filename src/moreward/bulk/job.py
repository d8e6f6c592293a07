"""Rewards for a whole file: JSON lines in, one JSON line per row out, in the same order.

A job may be killed at any moment and started again. Chunks begin at fixed row numbers, a chunk counts once its
lines are on disk and recorded, and anything beyond what is recorded is cut off, so a resumed job ends with the
same bytes as an undisturbed one. A row that cannot be scored gets an error line; no row is lost or doubled.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import zstandard

from moreward.checkpoint import fsync_path, sha256_file, space_errors, write_json
from moreward.errors import ConfigError, DataError, MorewardError, RunError
from moreward.types import Conversation, Message, Reward, Text

ROW_LIMIT = 16 * 2**20
"""Bytes of one row; what is longer is a fault of that row."""

NUM_NAMED = 20
"""How many bad rows the report names; all are counted."""

ZSTD_BLOCK = 2**13  # one byte of zstd can stand for 32 kB of text, so this bounds what is held at once

Progress = Callable[[int, int | None], None]


class SupportsScore(Protocol):
    @property
    def identity(self) -> str:
        """A hash of the model, so that a resumed job never mixes the rewards of two."""

    @property
    def on_long(self) -> str:
        """What happens to conversations beyond the model's limit: another job where it is another."""

    def score(self, items: Sequence[Conversation], *, explain: bool = False) -> list[Reward]:
        """One reward per item, in order. A MorewardError is taken to be about one of the items."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkReport:
    """What a job did. `bad` counts every row with an error line; `bad_rows` names the first 20 of them.

    `resumed_from` is the number of rows that an earlier process had already finished.
    """

    rows: int
    scored: int
    bad: int
    bad_rows: tuple[str, ...]
    resumed_from: int
    seconds: float

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
    max_bad_share: float = 0.01,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> BulkReport:
    """Write to `target` the reward of every row of `source` (JSON lines; `.gz` and `.zst` are unpacked).

    A row is `{"prompt", "response"}` (text or list of turns each) or `{"messages"}` whose last turn is the
    response, with `id`, `domain`, `tools` and `chat_template_kwargs` where it has them. Its line of output is
    `{"id", "row", "reward", "expert", "weights", "num_tokens", "truncated"}`, with `explain` also
    `expert_rewards`; or `{"id", "row", "error": {"code", "message"}}`. `row` is the line number in `source`,
    and the id of rows without one.

    The source is read to count and check its rows before the model works, and again to score them. Progress is
    kept in `<target>.partial` and `<target>.progress.json` until the end; `progress` is told rows done and rows
    in all. One job per target at a time.

    DataError: the source is unreadable or more than `max_bad_share` of its rows are bad (what is done stays, a
    larger share goes on from there). RunError: the target exists, or unfinished work is of another source,
    model or option; `overwrite` discards either. SpaceError: the disk is full.
    """
    started = time.monotonic()
    _check_arguments(source, target, chunk, max_bad_share)
    job = {"model": scorer.identity, "on_long": scorer.on_long, "chunk": chunk, "explain": explain}
    output = _Output(target, job)
    output.refuse_finished(overwrite)
    scan = _scan(source)
    output.job["source"] = sha256_file(source)
    limit = _BadLimit(source.name, scan.rows, max_bad_share)
    limit.check(scan.bad, scan.bad_rows)
    with space_errors(target.parent):
        done = output.start(scan.rows, overwrite)
        resumed_from = done.rows
        if progress:
            progress(done.rows, scan.rows)
        lines = islice(_lines(source), done.rows, None)
        while rows := [_parse(number, line) for number, line in islice(lines, chunk)]:
            output.append(_score_rows(scorer, rows, explain), source.name)
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


# ---------------------------------------------------------------- reading


class _BadRow(Exception):
    """Why one row gets no reward."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class _Row:
    """A line of the source: a conversation, or what is wrong with it."""

    number: int
    id: str | int
    content: Conversation | _BadRow


@dataclass(slots=True)
class _Scan:
    """What one reading of the source tells: how many rows, which are bad, and a digest of row numbers and ids."""

    rows: int
    bad: int
    bad_rows: list[str]
    digest: str


def _scan(source: Path) -> _Scan:
    digest = hashlib.sha256()
    scan = _Scan(rows=0, bad=0, bad_rows=[], digest="")
    for number, line in _lines(source):
        row = _parse(number, line)
        scan.rows += 1
        digest.update(_place(row.number, row.id))
        if isinstance(row.content, _BadRow):
            scan.bad += 1
            if len(scan.bad_rows) < NUM_NAMED:
                scan.bad_rows.append(_named(source.name, number, row.content.code, str(row.content)))
    scan.digest = digest.hexdigest()
    return scan


def _place(number: int, row_id: str | int) -> bytes:
    return f"{json.dumps([number, row_id])}\n".encode()


def _named(source_name: str, number: int, code: str, message: str) -> str:
    return f"{source_name}:{number}: {code}: {message}"


def _lines(source: Path) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and bytes of each line that is not blank; of an over-long one, ROW_LIMIT + 1 bytes."""
    try:
        with _open(source) as stream:
            number = 0
            while line := stream.readline(ROW_LIMIT + 1):
                rest = line
                while rest and not rest.endswith(b"\n"):
                    rest = stream.readline(ROW_LIMIT)
                number += 1
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{source}: cannot be read: {error}. Give a whole .jsonl, .jsonl.gz or .jsonl.zst") from error


def _open(source: Path) -> BinaryIO:
    if source.suffix == ".gz":
        return cast(BinaryIO, gzip.open(source, "rb"))
    if source.suffix == ".zst":
        return cast(BinaryIO, io.BufferedReader(_BlockStream(_zstd_blocks(source)), 2**16))
    return source.open("rb")


def _zstd_blocks(source: Path) -> Iterator[bytes]:
    """The text of every frame. EOFError on a cut file, which zstandard's own reader takes for the end."""
    with source.open("rb") as raw:
        frame = None
        while packed := raw.read(ZSTD_BLOCK):
            while packed:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(packed)
                packed = frame.unused_data
                frame = None if frame.eof else frame
        if frame:
            raise EOFError("the file ends inside a zstd frame")


class _BlockStream(io.RawIOBase):
    """Blocks of bytes as a file, for BufferedReader's bounded `readline`."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _parse(number: int, line: bytes) -> _Row:
    row_id: str | int = str(number)
    try:
        value = _decode(line)
        row_id = _row_id(value, row_id)
        return _Row(number, row_id, _conversation(value, str(row_id)))
    except _BadRow as bad:
        return _Row(number, row_id, bad)


def _decode(line: bytes) -> dict[str, Any]:
    if len(line) > ROW_LIMIT:
        raise _BadRow("too_long", f"longer than {ROW_LIMIT} bytes")
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
        if b"\\ud" in line or b"\\uD" in line:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is in no text of ours
    except UnicodeError as error:
        raise _BadRow("bad_encoding", f"not Unicode text ({error.reason})") from None  # type: ignore[attr-defined]
    except (ValueError, RecursionError) as error:
        raise _BadRow("bad_json", str(error)) from None
    if not isinstance(value, dict):
        raise _BadRow("wrong_type", f"a row must be an object, got {_kind(value)}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise _BadRow("duplicate_key", "a key stands twice in one object")
    return value


def _no_constant(name: str) -> None:
    raise _BadRow("bad_json", f"{name} is not JSON")


def _kind(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "int", float: "float"}
    return names.get(type(value), "null")


def _row_id(value: dict[str, Any], default: str | int) -> str | int:
    row_id = value.get("id")
    if row_id is None:
        return default
    if not isinstance(row_id, str | int) or isinstance(row_id, bool):
        raise _BadRow("wrong_type", f"id: expected string or int, got {_kind(row_id)}")
    return row_id


def _conversation(value: dict[str, Any], row_id: str) -> Conversation:
    prompt, response = _prompt_and_response(value)
    if not isinstance(response, str) and response[-1]["role"] != "assistant":
        raise _BadRow("bad_role", "the last turn, which is the response, must be the assistant's")
    return Conversation(
        prompt=prompt,
        response=response,
        id=row_id,
        domain=_optional(value, "domain", str, ""),
        tools=_tools(value),
        chat_template_kwargs=_optional(value, "chat_template_kwargs", dict, {}),
    )


def _prompt_and_response(value: dict[str, Any]) -> tuple[Text, Text]:
    has_parts = "prompt" in value or "response" in value
    if "messages" in value:
        if has_parts:
            raise _BadRow("wrong_fields", "give messages, or prompt and response, not both")
        turns = _turns(value["messages"], "messages")
        if len(turns) < 2:
            raise _BadRow("empty_conversation", "messages: nothing stands before the response")
        return turns[:-1], turns[-1:]
    missing = [name for name in ("prompt", "response") if name not in value]
    if missing:
        raise _BadRow("missing_field", f"{' and '.join(missing)} missing: give prompt and response, or messages")
    return _text(value["prompt"], "prompt"), _text(value["response"], "response")


def _optional(value: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    given = value.get(name)
    if given is not None and not isinstance(given, kind):
        raise _BadRow("wrong_type", f"{name}: expected {_kind(kind())}, got {_kind(given)}")
    return default if given is None else given


def _tools(value: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools: list[Any] | None = _optional(value, "tools", list, None)
    for place, tool in enumerate(tools or []):
        if not isinstance(tool, dict):
            raise _BadRow("wrong_type", f"tools[{place}]: expected object, got {_kind(tool)}")
    return tools


def _text(value: Any, name: str) -> Text:
    return value if isinstance(value, str) else _turns(value, name)


def _turns(value: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise _BadRow("wrong_type", f"{name}: expected string or messages, got {_kind(value)}")
    if not value:
        raise _BadRow("empty_conversation", f"{name}: an empty list of messages")
    for place, turn in enumerate(value):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise _BadRow("bad_role", f"{name}[{place}]: expected an object with a role")
        if not isinstance(turn.get("content"), str) and not turn.get("tool_calls"):
            raise _BadRow("wrong_type", f"{name}[{place}].content: expected string, got {_kind(turn.get('content'))}")
    return tuple(value)


# ---------------------------------------------------------------- scoring


def _score_rows(scorer: SupportsScore, rows: Sequence[_Row], explain: bool) -> list[dict[str, Any]]:
    """One record per row, in order."""
    items = [row.content for row in rows if isinstance(row.content, Conversation)]
    outcomes = iter(_score(scorer, items, explain))
    return [_record(row, row.content if isinstance(row.content, _BadRow) else next(outcomes), explain) for row in rows]


def _score(scorer: SupportsScore, items: Sequence[Conversation], explain: bool) -> list[Reward | _BadRow]:
    if not items:
        return []
    try:
        rewards = scorer.score(items, explain=explain)
    except MorewardError as error:
        if len(items) == 1:
            return [_BadRow("not_scored", str(error))]
        return [outcome for item in items for outcome in _score(scorer, [item], explain)]
    if len(rewards) != len(items) or any(
        reward.id not in ("", item.id) for reward, item in zip(rewards, items, strict=True)
    ):
        raise RuntimeError("the scorer's rewards are not those of the items it was given, one each and in order")
    return list(rewards)


def _record(row: _Row, outcome: Reward | _BadRow, explain: bool) -> dict[str, Any]:
    head = {"id": row.id, "row": row.number}
    if isinstance(outcome, _BadRow):
        return {**head, "error": {"code": outcome.code, "message": str(outcome)}}
    body = {
        "reward": outcome.reward,
        "expert": outcome.expert,
        "weights": dict(outcome.weights),
        "num_tokens": outcome.num_tokens,
        "truncated": outcome.truncated,
    }
    if explain:
        body["expert_rewards"] = dict(outcome.expert_rewards)
    try:
        json.dumps(body, allow_nan=False)
    except ValueError:
        return {**head, "error": {"code": "non_finite", "message": "the model gave NaN or Inf"}}
    return {**head, **body}


# ---------------------------------------------------------------- writing


@dataclass(slots=True)
class _Done:
    """How much of the output counts: its rows, its bytes and their SHA-256."""

    rows: int = 0
    bad: int = 0
    bad_rows: list[str] = field(default_factory=list)
    bytes: int = 0
    sha256: str = hashlib.sha256().hexdigest()


class _Output:
    """The lines so far and the record beside them of how many count.

    `job` is what the lines depend on. Lines beyond the record come from a process that died before recording
    them; they are cut off and written again.
    """

    def __init__(self, target: Path, job: dict[str, Any]) -> None:
        self.target = target
        self.partial = target.with_name(f"{target.name}.partial")
        self.sidecar = target.with_name(f"{target.name}.progress.json")
        self.job = job
        self.done = _Done()
        self._hash = hashlib.sha256()

    def refuse_finished(self, overwrite: bool) -> None:
        # a record without a partial: the last process may have died between its rename and its clean-up
        may_be_ours = self.sidecar.exists() and not self.partial.exists()
        if self.target.exists() and not overwrite and not may_be_ours:
            raise RunError(f"{self.target}: exists already. Choose another output or pass overwrite")

    def start(self, num_rows: int, overwrite: bool) -> _Done:
        """Go on where an earlier process stopped, or begin."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        if self.sidecar.exists():
            fault = self._take_over(num_rows)
            if not fault:
                return self.done
            if not overwrite:
                raise RunError(
                    f"{self.sidecar}: {fault}. Give what the job was begun with; or pass overwrite, or delete "
                    f"this file and {self.partial.name}, to begin again"
                )
        self.partial.write_bytes(b"")
        self._record()
        return self.done

    def _take_over(self, num_rows: int) -> str:
        """Continue what is recorded; or say what forbids it and change nothing."""
        try:
            recorded = json.loads(self.sidecar.read_text(encoding="utf-8"))
            job, done = recorded["job"], _Done(**recorded["done"])
            differing = [f"{key} was {job[key]!r}, is {now!r}" for key, now in self.job.items() if job[key] != now]
        except (ValueError, KeyError, TypeError):
            return "is not a record of this program"
        if differing:
            return f"the unfinished output is of another job: {', '.join(differing)}"
        is_published = not self.partial.exists() and done.rows == num_rows
        held = self.target if is_published else self.partial
        digest = _hash_start(held, done.bytes) if held.exists() else None
        if digest is None or digest.hexdigest() != done.sha256:
            return f"{held.name} is not what was recorded"
        if not is_published:
            os.truncate(held, done.bytes)
        self.done, self._hash = done, digest
        return ""

    def append(self, records: Sequence[dict[str, Any]], source_name: str) -> None:
        """Write one chunk's lines; they count once the record says so."""
        data = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records).encode()
        with self.partial.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._hash.update(data)
        bad = [record for record in records if "error" in record]
        named = [_named(source_name, record["row"], **record["error"]) for record in bad]
        self.done.rows += len(records)
        self.done.bad += len(bad)
        self.done.bad_rows = [*self.done.bad_rows, *named][:NUM_NAMED]
        self.done.bytes += len(data)
        self.done.sha256 = self._hash.hexdigest()
        self._record()

    def _record(self) -> None:
        write_json(self.sidecar, {"schema": 1, "job": self.job, "done": asdict(self.done)})

    def finish(self, scan: _Scan) -> None:
        """Check that every row of the source has its line, then give the output its name."""
        if self.partial.exists():
            if self._written_digest() != scan.digest:
                raise RunError(
                    f"{self.partial}: its rows are not those of the source, which must have changed meanwhile. "
                    f"Delete it and {self.sidecar.name}, then start again"
                )
            os.replace(self.partial, self.target)
            fsync_path(self.target.parent)
        self.sidecar.unlink()

    def _written_digest(self) -> str:
        digest = hashlib.sha256()
        with self.partial.open("rb") as file:
            for line in file:
                record = json.loads(line)
                digest.update(_place(record["row"], record["id"]))
        return digest.hexdigest()


def _hash_start(path: Path, num_bytes: int) -> hashlib._Hash:
    """SHA-256, ready for more, of the first `num_bytes` of a file (or of all, where it is shorter)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while num_bytes and (block := file.read(min(num_bytes, 2**20))):
            digest.update(block)
            num_bytes -= len(block)
    return digest
