"""What the judge has said already, on disk: a job that was killed goes on, and one that is repeated costs nothing."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from moreward.errors import RunError

_HEADER = b'{"moreward":"judge-cache","schema":1}\n'


def cache_key(*parts: Any) -> str:
    """32 hex digits of SHA-256 over the parts' JSON."""
    canonical = json.dumps(parts, ensure_ascii=True, sort_keys=True, default=dict)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


class Cache:
    """A context: a file of JSON lines that only grows, held by one process, written to by any of its threads.

    Each line is a key and what was said (an answer's text, or a reward). It counts once it ends; a last line that a
    dying process cut is removed, a damaged one elsewhere passed over, and both are counted in `num_damaged`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_damaged = 0
        self._said: dict[str, str | float] = {}
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None

    def __enter__(self) -> Cache:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a+b")
        try:
            self._hold(file)
            self._read(file)
        except BaseException:
            file.close()
            raise
        self._file = file
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._said

    def __len__(self) -> int:
        return len(self._said)

    def get(self, key: str) -> str | float | None:
        return self._said.get(key)

    def put(self, said: Mapping[str, str | float]) -> None:
        """Add what was said; it is on disk when this returns."""
        assert self._file is not None
        lines = [json.dumps({"key": key, "said": value}, allow_nan=False) + "\n" for key, value in said.items()]
        with self._lock:
            self._file.write("".join(lines).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
            self._said.update(said)

    def _hold(self, file: BinaryIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"{self.path}: another process is labelling with this cache. Wait for it, or give another with --cache"
            ) from error

    def _read(self, file: BinaryIO) -> None:
        file.seek(0)
        data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if not whole and _HEADER.startswith(data):  # new, or cut within its first line
            os.truncate(self.path, 0)
            file.write(_HEADER)
            file.flush()
            return
        if not whole.startswith(_HEADER):
            raise RunError(f"{self.path}: is no cache of a judge; it was left as it is. Give another with --cache")
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))
            self.num_damaged += 1
        for line in whole.removeprefix(_HEADER).split(b"\n")[:-1]:
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            key, said = record["key"], record["said"]
        except (ValueError, KeyError, TypeError):
            self.num_damaged += 1
            return
        if isinstance(key, str) and isinstance(said, str | float):
            self._said[key] = said
        else:
            self.num_damaged += 1
