"""Files as rows, read strictly.

Every row comes as `RawRow`, or as `BadRow` with a reason when the file is damaged there: `bad_json`,
`duplicate_key`, `bad_encoding`, `row_too_long`, `bad_csv`, `wrong_type`. What makes the rest of a file
unreadable (a cut archive, a cut JSON array) is a `DataError`, never a shorter data set.

The standard readers are not used on whole files because they change data: NaN and the last of two equal keys
pass, `str.splitlines` breaks rows at U+2028, and column readers fill missing keys.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from moreward.errors import DataError

MAX_ROW_BYTES = 16 * 2**20
CHUNK_BYTES = 2**16

_BOM = b"\xef\xbb\xbf"
_SURROGATE = re.compile("[\ud800-\udfff]")
_BLANK = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as read. `line` counts from 1: lines of .jsonl and .csv files, rows elsewhere.

    `offset` is the byte at which the row starts in the (decompressed) file, None in columnar files.
    """

    file: str
    line: int
    row: dict[str, Any]
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class BadRow:
    """One row that could not be read; `offset` is the byte of the fault where it is known."""

    file: str
    line: int
    reason: str
    detail: str
    offset: int | None = None


Item: TypeAlias = RawRow | BadRow


# Bytes


def plain_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def gzip_chunks(path: Path) -> Iterator[bytes]:
    with gzip.open(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def zstd_chunks(path: Path) -> Iterator[bytes]:
    """Frame by frame, because the library's stream reader takes a cut frame for the end of the file."""
    import zstandard

    frame = None
    try:
        for chunk in plain_chunks(path):
            while chunk:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(chunk)
                chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise DataError(f"{path}: damaged zstd data: {error}. Fetch or write the file again.") from error
    if frame is not None:
        raise DataError(f"{path}: zstd data ends in the middle of a frame. Fetch or write the file again.")


# JSON


class _Fault(Exception):
    """A row that must not be used, with the byte of the fault relative to the row's start."""

    def __init__(self, reason: str, detail: str, offset: int = 0) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.offset = reason, detail, offset


class _StrictJSON:
    """JSON to the letter. What the standard decoder lets pass is noted while it reads, then raised."""

    def __init__(self) -> None:
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)
        self._noted: list[tuple[str, str]] = []

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            self._noted.append(("duplicate_key", f"key {twice[:40]!a} is there twice"))
        return value

    def _constant(self, name: str) -> None:
        self._noted.append(("bad_json", f"{name} is not JSON"))

    def value(self, text: str, at: int) -> tuple[Any, int]:
        """The value that starts at `at` and where it ends. Faults within it are kept for `row`."""
        self._noted.clear()
        try:
            return self._decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _Fault("bad_json", error.msg, _num_bytes(text[at : error.pos])) from error
        except (ValueError, RecursionError) as error:
            raise _Fault("bad_json", str(error)) from error

    def row(self, value: Any, text: str) -> dict[str, Any]:
        """The value just read, as a row, if nothing is wrong with it; `text` is what it was read from."""
        if self._noted:
            raise _Fault(*self._noted[0])
        if not isinstance(value, dict):
            raise _Fault("wrong_type", f"expected an object, got {type(value).__name__}")
        if _SURROGATE.search(text) or (re.search(r"\\u[dD]", text) and _has_surrogate(value)):
            raise _Fault("bad_encoding", "half of a surrogate pair, or bytes that are not UTF-8")
        return value


def _has_surrogate(value: Any) -> bool:
    return bool(_SURROGATE.search(json.dumps(value, ensure_ascii=False)))


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))


def _skip_blank(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    assert match is not None
    return match.end()


def lines_of(chunks: Iterable[bytes]) -> Iterator[tuple[int, int, bytes | None]]:
    """(number, byte offset, line) split on LF only; the line is None when it is longer than a row may be."""
    number, offset, kept, skipped = 1, 0, bytearray(), 0
    for chunk in chunks:
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            kept += piece
            yield number, offset, None if skipped + len(kept) > MAX_ROW_BYTES else bytes(kept)
            number, offset = number + 1, offset + skipped + len(kept) + 1
            kept, skipped = bytearray(), 0
        kept += rest
        if skipped + len(kept) > MAX_ROW_BYTES:
            skipped += len(kept)
            kept.clear()
    if kept or skipped:
        yield number, offset, None if skipped + len(kept) > MAX_ROW_BYTES else bytes(kept)


def jsonl_rows(chunks: Iterable[bytes], file: str) -> Iterator[Item]:
    decoder = _StrictJSON()
    for number, offset, line in lines_of(chunks):
        if number == 1 and line is not None and line.startswith(_BOM):
            offset, line = len(_BOM), line[len(_BOM) :]
        if line is not None and not line.strip():
            continue
        try:
            yield RawRow(file, number, _json_line(decoder, line), offset)
        except _Fault as fault:
            yield BadRow(file, number, fault.reason, fault.detail, offset + fault.offset)


def _json_line(decoder: _StrictJSON, line: bytes | None) -> dict[str, Any]:
    if line is None:
        raise _too_long()
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise _Fault("bad_encoding", "bytes that are not UTF-8", error.start) from error
    value, end = decoder.value(text, _skip_blank(text, 0))
    if _skip_blank(text, end) < len(text):
        raise _Fault("bad_json", "more text after the object", _num_bytes(text[:end]))
    return decoder.row(value, text)


def _too_long() -> _Fault:
    return _Fault("row_too_long", f"a row may have {MAX_ROW_BYTES} bytes")


def holds_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).removeprefix(_BOM).lstrip().startswith(b"[")


def holds_lines(path: Path) -> bool:
    """Whether a `.json` file is JSON lines, or empty, rather than one object such as a configuration."""
    lines = (line for _, _, line in lines_of(plain_chunks(path)) if line is None or line.strip())
    starts = [b"{" if line is None else line[:1] for line in itertools.islice(lines, 2)]
    return not starts or starts[1:] == [b"{"]


def json_rows(path: Path) -> Iterator[Item]:
    """A `.json` file: one array of rows, or JSON lines under that name."""
    if not holds_array(path):
        yield from jsonl_rows(plain_chunks(path), str(path))
        return
    text = path.read_bytes().decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    decoder, number, counted = _StrictJSON(), 0, 0
    offset = path.stat().st_size - _num_bytes(text)
    at = _skip_blank(text, text.index("[") + 1)
    while text[at : at + 1] != "]":
        offset, counted, number = offset + _num_bytes(text[counted:at]), at, number + 1
        try:
            value, end = decoder.value(text, at)
        except _Fault as fault:
            raise DataError(f"{path}: {fault.detail} at byte {offset + fault.offset}, in row {number}.") from fault
        yield _array_row(decoder, value, text[at:end], RawRow(str(path), number, {}, offset))
        at = _after_comma(text, end, f"{path}: the array is cut or broken after row {number}, at byte {offset}.")
    if _skip_blank(text, at + 1) < len(text):
        raise DataError(f"{path}: more text after the array.")


def _array_row(decoder: _StrictJSON, value: Any, text: str, place: RawRow) -> Item:
    try:
        if _num_bytes(text) > MAX_ROW_BYTES:
            raise _too_long()
        return replace(place, row=decoder.row(value, text))
    except _Fault as fault:
        return BadRow(place.file, place.line, fault.reason, fault.detail, place.offset)


def _after_comma(text: str, at: int, message: str) -> int:
    """The start of the next item, or the closing bracket."""
    at = _skip_blank(text, at)
    if text[at : at + 1] == "]":
        return at
    following = _skip_blank(text, at + 1)
    if text[at : at + 1] != "," or text[following : following + 1] == "]":
        raise DataError(message)
    return following


# CSV

_CSV_JSON = ("messages", "rejected_messages", "conversations", "context", "completions", "history", "endings")
_CSV_OBJECTS = ("meta", "chat_template_kwargs", "additional_metadata")
_CSV_NUMBERS = ("margin", "labels", "label", "num_correct")


class _CountedLines:
    """Lines of text, and how many bytes have been handed out."""

    def __init__(self, lines: Iterable[str], num_bytes: int) -> None:
        self._lines = iter(lines)
        self.num_bytes = num_bytes

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.num_bytes += _num_bytes(line)
        return line


def csv_rows(path: Path) -> Iterator[Item]:
    """Cells are text. Conversations are JSON inside a cell; an empty cell of such a column is an absent value.

    A broken quote stops the reading: nobody can say how many rows it swallowed.
    """
    csv.field_size_limit(2**31 - 1)
    with path.open("rb") as file:
        num_bom_bytes = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file_lines:
        lines = _CountedLines(file_lines, num_bom_bytes)
        reader = csv.reader(lines, strict=True)
        line, offset = 1, 0
        try:
            header = _csv_header(next(reader, []), path)
            line, offset = reader.line_num + 1, lines.num_bytes
            for cells in reader:
                if cells:
                    yield _csv_row(header, cells, RawRow(str(path), line, {}, offset))
                line, offset = reader.line_num + 1, lines.num_bytes
        except csv.Error as error:
            raise DataError(f"{path}:{line}: broken CSV in the row at byte {offset}: {error}.") from error


def _csv_header(cells: list[str], path: Path) -> list[str]:
    if len(set(cells)) < len(cells):
        raise DataError(f"{path}: two columns have the same name: {', '.join(cells)}.")
    return cells


def _csv_row(header: list[str], cells: list[str], place: RawRow) -> Item:
    try:
        if len(cells) != len(header):
            raise _Fault("bad_csv", f"expected {len(header)} cells, got {len(cells)}")
        if sum(map(_num_bytes, cells)) > MAX_ROW_BYTES:
            raise _too_long()
        if any(_SURROGATE.search(cell) for cell in cells):
            raise _Fault("bad_encoding", "bytes that are not UTF-8")
        row = {name: _csv_value(name, cell) for name, cell in zip(header, cells, strict=True)}
        structured = (*_CSV_JSON, *_CSV_OBJECTS, *_CSV_NUMBERS)
        return replace(place, row={name: v for name, v in row.items() if v != "" or name not in structured})
    except _Fault as fault:
        return BadRow(place.file, place.line, fault.reason, fault.detail, place.offset)


def _csv_value(name: str, cell: str) -> Any:
    """A cell's value: JSON where the column or the look of the cell says so, else its text."""
    if name in _CSV_NUMBERS:
        return _number(cell)
    known = name in _CSV_JSON or name in _CSV_OBJECTS
    if not cell or not (known or cell.lstrip().startswith(("[", "{"))):
        return cell
    decoder = _StrictJSON()
    try:
        value, end = decoder.value(cell, _skip_blank(cell, 0))
        decoder.row({"": value}, cell)
        whole = _skip_blank(cell, end) == len(cell)
    except _Fault:
        if known:
            raise
        return cell
    return value if known or (whole and _is_spoken(value)) else cell


def _number(cell: str) -> Any:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


def _is_spoken(value: Any) -> bool:
    """Whether JSON is a conversation rather than an answer that happens to be JSON."""
    turns = value if isinstance(value, list) else [value]
    return bool(turns) and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns)


# Columns


def parquet_rows(path: Path) -> Iterator[Item]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, path)
            yield from _batch_rows(file.iter_batches(batch_size=1024), str(path))
    except pa.ArrowException as error:
        raise DataError(f"{path}: cannot be read to its end: {error}. Fetch or write the file again.") from error


def saved_kind(folder: Path) -> str:
    """Which `datasets` object a folder holds: "one", "several" splits, or none."""
    if (folder / "dataset_dict.json").is_file():
        return "several"
    return "one" if (folder / "state.json").is_file() else ""


def saved_rows(folder: Path) -> Iterator[Item]:
    """A folder of `Dataset.save_to_disk`, read without the `datasets` package."""
    import pyarrow as pa

    if saved_kind(folder) == "several":
        splits = json.loads((folder / "dataset_dict.json").read_text("utf-8"))["splits"]
        raise DataError(f"{folder}: holds the splits {', '.join(splits)}. Name one of them: {folder / splits[0]}.")
    state = json.loads((folder / "state.json").read_text("utf-8"))
    files = [folder / entry["filename"] for entry in state["_data_files"]]
    try:
        yield from _batch_rows((batch for file in files for batch in _arrow_batches(file)), str(folder))
    except pa.ArrowException as error:
        raise DataError(f"{folder}: cannot be read to its end: {error}. Save the data set again.") from error


def _arrow_batches(path: Path) -> Iterator[Any]:
    """The batches of an Arrow stream, which must end with its end mark: without it a cut file looks whole."""
    import pyarrow as pa

    with path.open("rb") as file:
        file.seek(-min(8, path.stat().st_size), 2)
        if file.read() != b"\xff\xff\xff\xff\0\0\0\0":
            raise DataError(f"{path}: the file is cut: its end mark is missing. Save the data set again.")
    with pa.OSFile(str(path)) as source, pa.ipc.open_stream(source) as stream:
        _check_columns(stream.schema.names, path)
        yield from stream


def _check_columns(names: list[str], path: Path) -> None:
    if len(set(names)) < len(names):
        raise DataError(f"{path}: two columns have the same name: {', '.join(names)}.")


def _batch_rows(batches: Iterable[Any], file: str) -> Iterator[Item]:
    """Null stays None. A batch is taken apart only where a row of it is damaged or too long."""
    line = 0
    for batch in batches:
        try:
            whole = batch.to_pylist() if batch.nbytes <= MAX_ROW_BYTES else None
        except UnicodeDecodeError:
            whole = None
        for i in range(batch.num_rows):
            line += 1
            yield RawRow(file, line, whole[i]) if whole else _single_row(batch.slice(i, 1), file, line)


def _single_row(batch: Any, file: str, line: int) -> Item:
    if batch.nbytes > MAX_ROW_BYTES:
        return BadRow(file, line, "row_too_long", _too_long().detail)
    try:
        return RawRow(file, line, batch.to_pylist()[0])
    except UnicodeDecodeError:
        return BadRow(file, line, "bad_encoding", "bytes that are not UTF-8")
