"""Rows of a file of JSON lines: each a conversation, or what is wrong with it."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from moreward.errors import DataError
from moreward.types import Conversation, Message, Text

ROW_LIMIT = 16 * 2**20
"""Bytes of one row; what is longer is a fault of that row."""

NUM_NAMED = 20
"""How many bad rows the report names; all are counted."""

ZSTD_BLOCK = 2**13  # one byte of zstd can stand for 32 kB of text, so this bounds what is held at once


class BadRow(Exception):
    """Why one row gets no reward."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the source: a conversation, or what is wrong with it."""

    number: int
    id: str | int
    content: Conversation | BadRow


@dataclass(slots=True)
class Scan:
    """What one reading of the source tells: how many rows, which are bad, and a digest of row numbers and ids."""

    rows: int
    bad: int
    bad_rows: list[str]
    digest: str


def scan_rows(source: Path) -> Scan:
    digest = hashlib.sha256()
    scan = Scan(rows=0, bad=0, bad_rows=[], digest="")
    for number, line in read_lines(source):
        row = parse(number, line)
        scan.rows += 1
        digest.update(place(row.number, row.id))
        if isinstance(row.content, BadRow):
            scan.bad += 1
            if len(scan.bad_rows) < NUM_NAMED:
                scan.bad_rows.append(named_row(source.name, number, row.content.code, str(row.content)))
    scan.digest = digest.hexdigest()
    return scan


def place(number: int, row_id: str | int) -> bytes:
    return f"{json.dumps([number, row_id])}\n".encode()


def named_row(source_name: str, number: int, code: str, message: str) -> str:
    return f"{source_name}:{number}: {code}: {message}"


def read_lines(source: Path) -> Iterator[tuple[int, bytes]]:
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


def parse(number: int, line: bytes) -> Row:
    row_id: str | int = str(number)
    try:
        value = _decode(line)
        row_id = _row_id(value, row_id)
        return Row(number, row_id, _conversation(value, str(row_id)))
    except BadRow as bad:
        return Row(number, row_id, bad)


def _decode(line: bytes) -> dict[str, Any]:
    if len(line) > ROW_LIMIT:
        raise BadRow("too_long", f"longer than {ROW_LIMIT} bytes")
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
        if b"\\ud" in line or b"\\uD" in line:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is in no text of ours
    except UnicodeError as error:
        raise BadRow("bad_encoding", f"not Unicode text ({error.reason})") from None  # type: ignore[attr-defined]
    except (ValueError, RecursionError) as error:
        raise BadRow("bad_json", str(error)) from None
    if not isinstance(value, dict):
        raise BadRow("wrong_type", f"a row must be an object, got {_kind(value)}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise BadRow("duplicate_key", "a key stands twice in one object")
    return value


def _no_constant(name: str) -> None:
    raise BadRow("bad_json", f"{name} is not JSON")


def _kind(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "int", float: "float"}
    return names.get(type(value), "null")


def _row_id(value: dict[str, Any], default: str | int) -> str | int:
    row_id = value.get("id")
    if row_id is None:
        return default
    if not isinstance(row_id, str | int) or isinstance(row_id, bool):
        raise BadRow("wrong_type", f"id: expected string or int, got {_kind(row_id)}")
    return row_id


def _conversation(value: dict[str, Any], row_id: str) -> Conversation:
    prompt, response = _prompt_and_response(value)
    if not isinstance(response, str) and response[-1]["role"] != "assistant":
        raise BadRow("bad_role", "the last turn, which is the response, must be the assistant's")
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
            raise BadRow("wrong_fields", "give messages, or prompt and response, not both")
        turns = _turns(value["messages"], "messages")
        if len(turns) < 2:
            raise BadRow("empty_conversation", "messages: nothing stands before the response")
        return turns[:-1], turns[-1:]
    missing = [name for name in ("prompt", "response") if name not in value]
    if missing:
        raise BadRow("missing_field", f"{' and '.join(missing)} missing: give prompt and response, or messages")
    return _text(value["prompt"], "prompt"), _text(value["response"], "response")


def _optional(value: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    given = value.get(name)
    if given is not None and not isinstance(given, kind):
        raise BadRow("wrong_type", f"{name}: expected {_kind(kind())}, got {_kind(given)}")
    return default if given is None else given


def _tools(value: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools: list[Any] | None = _optional(value, "tools", list, None)
    for place, tool in enumerate(tools or []):
        if not isinstance(tool, dict):
            raise BadRow("wrong_type", f"tools[{place}]: expected object, got {_kind(tool)}")
    return tools


def _text(value: Any, name: str) -> Text:
    return value if isinstance(value, str) else _turns(value, name)


def _turns(value: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise BadRow("wrong_type", f"{name}: expected string or messages, got {_kind(value)}")
    if not value:
        raise BadRow("empty_conversation", f"{name}: an empty list of messages")
    for place, turn in enumerate(value):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise BadRow("bad_role", f"{name}[{place}]: expected an object with a role")
        if not isinstance(turn.get("content"), str) and not turn.get("tool_calls"):
            raise BadRow("wrong_type", f"{name}[{place}].content: expected string, got {_kind(turn.get('content'))}")
    return tuple(value)
