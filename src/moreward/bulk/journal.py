"""The output of a job and the record beside it of how much of it counts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moreward.bulk.rows import NUM_NAMED, Scan, named_row, place
from moreward.checkpoint import fsync_path, write_json
from moreward.errors import RunError


@dataclass(slots=True)
class Done:
    """How much of the output counts: its rows, its bytes and their SHA-256."""

    rows: int = 0
    bad: int = 0
    bad_rows: list[str] = field(default_factory=list)
    bytes: int = 0
    sha256: str = hashlib.sha256().hexdigest()
    abstained: dict[str, int] = field(default_factory=dict)


class Output:
    """The lines so far and the record beside them of how many count.

    `job` is what the lines depend on. Lines beyond the record come from a process that died before recording
    them; they are cut off and written again.
    """

    def __init__(self, target: Path, job: dict[str, Any]) -> None:
        self.target = target
        self.partial = target.with_name(f"{target.name}.partial")
        self.sidecar = target.with_name(f"{target.name}.progress.json")
        self.job = job
        self.done = Done()
        self._hash = hashlib.sha256()

    def refuse_finished(self, overwrite: bool) -> None:
        # a record without a partial: the last process may have died between its rename and its clean-up
        may_be_ours = self.sidecar.exists() and not self.partial.exists()
        if self.target.exists() and not overwrite and not may_be_ours:
            raise RunError(f"{self.target}: exists already. Choose another output or pass overwrite")

    def start(self, num_rows: int, overwrite: bool) -> Done:
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
            job, done = recorded["job"], Done(**recorded["done"])
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

    def append(
        self, records: Sequence[dict[str, Any]], source_name: str, abstained: Mapping[str, int] | None = None
    ) -> None:
        """Write one chunk's lines; they count once the record says so. `abstained` counts those without a reward."""
        data = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records).encode()
        with self.partial.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._hash.update(data)
        bad = [record for record in records if "error" in record]
        named = [named_row(source_name, record["row"], **record["error"]) for record in bad]
        self.done.rows += len(records)
        self.done.bad += len(bad)
        self.done.bad_rows = [*self.done.bad_rows, *named][:NUM_NAMED]
        for domain, count in (abstained or {}).items():
            self.done.abstained[domain] = self.done.abstained.get(domain, 0) + count
        self.done.bytes += len(data)
        self.done.sha256 = self._hash.hexdigest()
        self._record()

    def _record(self) -> None:
        write_json(self.sidecar, {"schema": 1, "job": self.job, "done": asdict(self.done)})

    def finish(self, scan: Scan) -> None:
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
                digest.update(place(record["row"], record["id"]))
        return digest.hexdigest()


def _hash_start(path: Path, num_bytes: int) -> hashlib._Hash:
    """SHA-256, ready for more, of the first `num_bytes` of a file (or of all, where it is shorter)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while num_bytes and (block := file.read(min(num_bytes, 2**20))):
            digest.update(block)
            num_bytes -= len(block)
    return digest
