"""Which files, folders and data sets a pattern stands for, and the reader of each."""

from __future__ import annotations

import difflib
import glob
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moreward.data.rows import (
    Item,
    RawRow,
    csv_rows,
    gzip_chunks,
    holds_array,
    holds_lines,
    json_rows,
    jsonl_rows,
    parquet_rows,
    plain_chunks,
    saved_kind,
    saved_rows,
    zstd_chunks,
)
from moreward.errors import DataError, MissingExtraError

HUB_PREFIX = "hf:"
REGISTRY_NAME = "dataset_info.json"

_OTHER_SUFFIXES = (".md", ".rst", ".py", ".yaml", ".yml", ".toml")
_PROSE = ("README", "LICENSE", "LICENCE", "NOTICE", "CHANGELOG")
_NOTES = (REGISTRY_NAME, "dataset_infos.json", "dataset_dict.json", "state.json")


# Which files


@dataclass(frozen=True, slots=True)
class Found:
    """What patterns stand for: sources to read, and the files among them that may be data but cannot be read."""

    sources: list[Path]
    skipped: list[Path]


def expand(patterns: str | Path | Sequence[str | Path]) -> list[Path]:
    """The sources of `find_sources`."""
    return find_sources(patterns).sources


def find_sources(patterns: str | Path | Sequence[str | Path]) -> Found:
    """The files, saved data sets and `hf:owner/name[:split]` that patterns stand for, each once, in order.

    A pattern is a path, a folder (all data files under it) or a glob. Folders and globs skip files of an unknown
    kind and `.json` files that hold a single object. A folder written by `datasets.save_to_disk`, or one with a
    LLaMA-Factory registry, is one source.

    Raises:
        DataError: a pattern without a match, or a file of an unknown kind.
    """
    several = [patterns] if isinstance(patterns, str | Path) else patterns
    found = [_matches(str(pattern)) for pattern in several]
    sources = dict.fromkeys(path for one in found for path in one.sources)
    skipped = dict.fromkeys(path for one in found for path in one.skipped if path not in sources)
    return Found(list(sources), list(skipped))


def _matches(pattern: str) -> Found:
    if pattern.startswith(HUB_PREFIX):
        return Found([Path(pattern)], [])
    path = Path(pattern).expanduser()
    if path.is_file():
        if _reader(path) is None:
            raise DataError(f"{pattern}: unknown kind of file. Known: {', '.join(READERS)}.")
        return Found([path], [])
    hits = [path] if path.is_dir() else sorted(Path(hit) for hit in glob.glob(str(path), recursive=True))
    files = [file for hit in hits for file in (_in_folder(hit) if hit.is_dir() else [hit])]
    sources = [file for file in files if _is_source(file)]
    skipped = [file for file in files if _may_be_data(file) and not _is_source(file)]
    if not sources:
        unread = f" Not readable: {', '.join(file.name for file in skipped[:5])}." if skipped else _near(path)
        raise DataError(f"{pattern}: no data file matches.{unread}")
    return Found(sources, skipped)


def _in_folder(folder: Path) -> list[Path]:
    """Every file under a folder but hidden ones; a saved data set or a registry stands for its whole folder."""
    if saved_kind(folder):
        return [folder]
    if (folder / REGISTRY_NAME).is_file():
        return [folder / REGISTRY_NAME]
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            found += _in_folder(path)
        else:
            found.append(path)
    return found


def _is_source(path: Path) -> bool:
    if path.suffix == ".json" and path.name != REGISTRY_NAME:
        return holds_array(path) or holds_lines(path)
    return _reader(path) is not None


def _may_be_data(path: Path) -> bool:
    return path.suffix not in _OTHER_SUFFIXES and path.stem.upper() not in _PROSE and path.name not in _NOTES


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return f" There is no folder {path.parent}."
    names = sorted(entry.name for entry in path.parent.iterdir())
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4)
    return f" Near it: {', '.join(near)}." if near else f" {path.parent} holds {', '.join(names[:5]) or 'nothing'}."


# Reading


def read_rows(path: Path | str) -> Iterator[Item]:
    """The rows of one result of `expand`, in order; .jsonl, .csv and columnar files are streamed.

    Raises:
        DataError: the file ends early or cannot be read.
        MissingExtraError: `hf:` without the `datasets` extra.
    """
    path = Path(path)
    if str(path).startswith(HUB_PREFIX):
        return _hub_rows(str(path))
    reader = _reader(path)
    if reader is None:
        raise DataError(f"{path}: unknown kind of file. Known: {', '.join(READERS)}.")
    return _reporting(path, reader)


def _reporting(path: Path, reader: Callable[[Path], Iterator[Item]]) -> Iterator[Item]:
    """Everything that says "damaged" under one error with the file's name."""
    try:
        yield from reader(path)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read to its end: {error}. Fetch or write the file again.") from error


def _reader(path: Path) -> Callable[[Path], Iterator[Item]] | None:
    if path.is_dir():
        return saved_rows if saved_kind(path) else None
    if path.name == REGISTRY_NAME:
        return _registry_rows
    return next((reader for suffix, reader in READERS.items() if path.name.endswith(suffix)), None)


# LLaMA-Factory registries and the Hugging Face hub

_REGISTRY_COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input"},
    "sharegpt": {"messages": "conversations"},
}
_REGISTRY_SPEAKERS = {
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}


def files_of(source: Path) -> list[Path]:
    """The files that a source's rows come from: itself, but for a registry."""
    if source.name != REGISTRY_NAME:
        return [source]
    return [file for entry in _registry_entries(source) for file in expand(source.parent / entry["file_name"])]


def _registry_rows(path: Path) -> Iterator[Item]:
    for entry in _registry_entries(path):
        for file in expand(path.parent / entry["file_name"]):
            for item in read_rows(file):
                yield replace(item, row=_registry_row(item.row, entry)) if isinstance(item, RawRow) else item


def _registry_entries(path: Path) -> list[Mapping[str, Any]]:
    """The entries of a LLaMA-Factory `dataset_info.json` that hold preferences (`"ranking": true`)."""
    try:
        entries = json.loads(path.read_text("utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{path}: is not JSON: {error}.") from error
    if not isinstance(entries, dict):
        raise DataError(f"{path}: expected an object of data sets by name, got {type(entries).__name__}.")
    ranking = {name: e for name, e in entries.items() if isinstance(e, dict) and e.get("ranking") is True}
    if not ranking:
        raise DataError(f'{path}: no entry has "ranking": true. Entries: {", ".join(entries) or "none"}.')
    for name, entry in ranking.items():
        if "file_name" not in entry:
            raise DataError(f"{path}: entry {name!r} names no file_name. Give hub data sets as hf:owner/name.")
        if entry.get("formatting", "alpaca") not in _REGISTRY_COLUMNS:
            raise DataError(
                f"{path}: entry {name!r}: formatting must be alpaca or sharegpt, got {entry['formatting']!r}."
            )
    return list(ranking.values())


def _registry_row(row: dict[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its columns and speakers spelled as the entry's format spells them by default."""
    formatting = entry.get("formatting", "alpaca")
    usual = _REGISTRY_COLUMNS[formatting]
    theirs_of = {usual.get(key, key): name for key, name in entry.get("columns", {}).items()}
    renamed = {name: value for name, value in row.items() if name not in theirs_of.values()}
    renamed |= {ours: row[theirs] for ours, theirs in theirs_of.items() if theirs in row}
    return retagged(renamed, entry.get("tags", {})) if formatting == "sharegpt" else renamed


def retagged(row: dict[str, Any], tags: Mapping[str, str]) -> dict[str, Any]:
    """A sharegpt row with its turns' keys and roles spelled as usual, from the spelling that `tags` declares."""
    if "conversations" not in row:
        return row
    names = {"conversations", "chosen", "rejected"} & row.keys()
    return {name: _retagged_turns(value, tags) if name in names else value for name, value in row.items()}


def _retagged_turns(value: Any, tags: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_retagged_turns(turn, tags) for turn in value]
    role, content = tags.get("role_tag", "from"), tags.get("content_tag", "value")
    if not isinstance(value, dict) or role not in value:
        return value
    speakers = {tags.get(tag, default): default for tag, default in _REGISTRY_SPEAKERS.items()}
    return {"from": speakers.get(value[role], value[role]), "value": value.get(content)}


def _hub_rows(name: str) -> Iterator[Item]:
    """`hf:owner/name[:split]`; the split is `train` unless given."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(f"Reading {name}", "datasets") from error
    repo, _, split = name.removeprefix(HUB_PREFIX).partition(":")
    try:
        rows = datasets.load_dataset(repo, split=split or "train")
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: cannot be loaded: {error}") from error
    for line, row in enumerate(rows, start=1):
        yield RawRow(name, line, dict(row))


READERS: Mapping[str, Callable[[Path], Iterator[Item]]] = {
    ".jsonl": lambda path: jsonl_rows(plain_chunks(path), str(path)),
    ".jsonl.gz": lambda path: jsonl_rows(gzip_chunks(path), str(path)),
    ".jsonl.zst": lambda path: jsonl_rows(zstd_chunks(path), str(path)),
    ".ndjson": lambda path: jsonl_rows(plain_chunks(path), str(path)),
    ".ndjson.gz": lambda path: jsonl_rows(gzip_chunks(path), str(path)),
    ".ndjson.zst": lambda path: jsonl_rows(zstd_chunks(path), str(path)),
    ".json": json_rows,
    ".csv": csv_rows,
    ".parquet": parquet_rows,
}
