"""Checkpoints that outlive kill -9, a full disk and damaged files.

Only safetensors and JSON, never a pickle. A folder counts once its `manifest.json`, written last, names every
file with size and SHA-256 and all of them still agree; whatever else is found is skipped with the reason said.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from moreward.errors import ConfigError, RunError, SpaceError

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
STATE = "state.json"
SCHEMA = 1
PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".distcp", ".metadata")
SPACE_FACTOR = 1.2

logger = logging.getLogger(__name__)


def sha256_file(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write strict JSON (no NaN, no Inf) so that a reader finds the old file or the new one, never a part.

    One writer per path. ValueError or TypeError for what JSON cannot hold; then the old file stays.
    """
    path = Path(path)
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    temporary = _temporary(path)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def fsync_path(path: Path) -> None:
    """Ask the disk to hold a file's bytes, or a folder's names, before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def space_errors(folder: Path) -> Iterator[None]:
    """Turn "the disk is full" into SpaceError, also where safetensors tells it as text only."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = (errno.ENOSPC, errno.EDQUOT)
        is_full = error.errno in full if isinstance(error, OSError) else _names_errno(error, full)
        if not is_full:
            raise
        have = _megabytes(shutil.disk_usage(folder).free)
        raise SpaceError(
            f"no space: {folder} filled up while writing (have {have}). "
            "What was complete before is kept: free space and start again to resume."
        ) from error


def _names_errno(error: Exception, numbers: tuple[int, ...]) -> bool:
    return any(f"(os error {number})" in str(error) for number in numbers)


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


def write_manifest(folder: str | os.PathLike[str], **extra: Any) -> None:
    """Seal a folder: put every file in it on disk and list it with size and SHA-256, subfolders included.

    `extra` (step, hashes of the configuration, ...) becomes further keys of the manifest.
    """
    folder = Path(folder)
    _temporary(folder / MANIFEST).unlink(missing_ok=True)
    for path in folder.rglob("*"):
        fsync_path(path)
    files = {
        name: {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size}
        for name in _file_names(folder)
        if name != MANIFEST
    }
    created = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(folder / MANIFEST, {**extra, "schema": SCHEMA, "created": created, "files": files, "complete": True})


def _file_names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def verify_folder(folder: str | os.PathLike[str], *, expected: Mapping[str, object] = {}) -> list[str]:
    """What is wrong with a sealed folder, one fault an entry; empty when it is as it was written.

    `expected` are keys of the manifest with the values they must have (`config_sha256`, `step`, ...).
    Files that may hold a pickle are a fault whether listed or not; they are never opened but to be hashed.
    """
    folder = Path(folder)
    try:
        manifest = _read_manifest(folder)
    except FileNotFoundError:
        return [f"{MANIFEST}: missing"]
    except (OSError, ValueError) as error:
        return [f"{MANIFEST}: unreadable ({error})"]
    present = _file_names(folder)
    faults = [
        f"{MANIFEST}: {key} is {manifest.get(key)!r}, expected {value!r}"
        for key, value in {**expected, "schema": SCHEMA, "complete": True}.items()
        if manifest.get(key) != value
    ]
    faults += [
        f"{name}: refused, files of this kind can run code when loaded. Convert it to safetensors"
        for name in present
        if name.endswith(PICKLE_ENDINGS)
    ]
    for name, entry in manifest["files"].items():
        # only names found by walking the folder are opened, so no manifest can point outside it
        fault = _file_fault(folder / name, entry) if name in present else "missing"
        faults += [f"{name}: {fault}"] if fault else []
    return faults


def _read_manifest(folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise ValueError("not a manifest")
    return dict(manifest)


def _file_fault(path: Path, entry: Mapping[str, Any]) -> str:
    try:
        num_bytes = path.stat().st_size
        if num_bytes != entry.get("bytes"):
            return f"has {num_bytes} bytes, the manifest says {entry.get('bytes')}"
        return "" if sha256_file(path) == entry.get("sha256") else "content changed (SHA-256 differs)"
    except OSError as error:
        return f"unreadable ({error.strerror})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint. `state` is what was saved, as JSON gives it back (tuples are lists, keys strings)."""

    step: int
    path: Path
    state: Mapping[str, Any]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors saved under `name`, on the CPU, bit for bit. RunError where there are none."""
        from safetensors.torch import load_file

        file = self.path / f"{name}.safetensors"
        if not file.exists():
            known = ", ".join(sorted(path.stem for path in self.path.glob("*.safetensors")))
            raise RunError(f"{self.path.name}: has no tensors named {name!r}. It has: {known}")
        return load_file(file)


class CheckpointStore:
    """The checkpoints of one run, `step-00000010/` each, newest last.

    `hashes` (of configuration, base model, tokenizer, ...) are written into every manifest and must match on
    resume. At least two verified checkpoints are kept. With several ranks only rank 0 calls `save`.
    `skipped` tells which checkpoints the last `newest` passed over, and why.
    """

    def __init__(self, folder: Path, *, hashes: Mapping[str, str], keep: int = 2) -> None:
        if keep < 2:
            raise ConfigError(f"keep: must be at least 2 (got {keep}): one checkpoint alone has no fallback")
        self.folder = folder
        self.hashes = dict(hashes)
        self.keep = keep
        self.skipped: list[str] = []

    def save(self, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any]) -> Path:
        """Write `<name>.safetensors` for each of `tensors` and `state.json`, or leave no trace.

        A good checkpoint of the same step is replaced. SpaceError before writing when less than 1.2 times the
        last checkpoint is free, and when the disk fills up all the same.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_space(tensors)
        temporary = self.folder / f"tmp-{step}-{os.getpid()}"
        target = self.folder / f"step-{step:08d}"
        try:
            with space_errors(self.folder):
                self._write(temporary, step, tensors, state)
                self._publish(temporary, target, step)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._prune()
        return target

    def _check_space(self, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        sizes = [tensor.nbytes for group in tensors.values() for tensor in group.values()]
        last = [path for _, path in self._candidates()[:1]]
        last_bytes = sum(path.stat().st_size for folder in last for path in folder.rglob("*") if path.is_file())
        need = SPACE_FACTOR * max(sum(sizes), last_bytes)
        have = shutil.disk_usage(self.folder).free
        if have < need:
            raise SpaceError(
                f"no space: need {_megabytes(need)} have {_megabytes(have)} in {self.folder}. "
                "The older checkpoints are kept: free space and start again to resume."
            )

    def _write(
        self,
        folder: Path,
        step: int,
        tensors: Mapping[str, Mapping[str, torch.Tensor]],
        state: Mapping[str, Any],
    ) -> None:
        from safetensors.torch import save_file

        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_json(folder / STATE, state)
        for name, group in tensors.items():
            save_file(_storable(group), folder / f"{name}.safetensors")
        write_manifest(folder, step=step, **self.hashes)

    def _publish(self, temporary: Path, target: Path, step: int) -> None:
        aside = target.with_name(f"{target.name}.old")
        if target.exists() and self._faults(step, target):
            shutil.rmtree(target)
        elif target.exists():
            # a folder cannot be swapped in one call; under this name the old one still counts if we die here
            shutil.rmtree(aside, ignore_errors=True)
            target.rename(aside)
        temporary.rename(target)
        fsync_path(self.folder)
        shutil.rmtree(aside, ignore_errors=True)

    def _prune(self) -> None:
        num_good = 0
        for step, path in self._candidates():
            if num_good >= self.keep:
                shutil.rmtree(path)
            elif not self._faults(step, path):
                num_good += 1

    def _candidates(self) -> list[tuple[int, Path]]:
        """Step and folder, newest first; one set aside during a replacement comes after its successor."""
        found = [
            (int(match[1]), match[2] is None, path)
            for path in self.folder.glob("step-*")
            if (match := re.fullmatch(r"step-(\d{8,})(\.old)?", path.name))
        ]
        return [(step, path) for step, _, path in sorted(found, reverse=True)]

    def _faults(self, step: int, path: Path) -> list[str]:
        return verify_folder(path, expected={**self.hashes, "step": step})

    def newest(self) -> Checkpoint | None:
        """The newest good checkpoint; None only where there is none at all, good or bad.

        RunError when some exist but none is good: starting afresh then would throw work away unasked.
        """
        self.skipped = []
        for step, path in self._candidates():
            faults = self._faults(step, path)
            if not faults:
                state = json.loads((path / STATE).read_text(encoding="utf-8"))
                return Checkpoint(step=step, path=path, state=state)
            self.skipped.append(f"{path.name}: {'; '.join(faults)}")
            logger.warning("checkpoint skipped: %s", self.skipped[-1])
        if self.skipped:
            reasons = "\n  ".join(self.skipped)
            raise RunError(
                f"{self.folder}: no checkpoint is good:\n  {reasons}\n"
                "Restore one, or move them away (or choose another run folder) to start from the beginning."
            )
        return None

    def clean(self) -> list[str]:
        """Remove what saves cut short by a crash left behind; call it at the start of a run. Their names."""
        removed = []
        for path in sorted(self.folder.glob("tmp-*")):
            match = re.fullmatch(r"tmp-\d+-(\d+)", path.name)
            if match and not _is_another_process(int(match[1])):
                shutil.rmtree(path)
                removed.append(path.name)
        return removed


def _is_another_process(pid: int) -> bool:
    # our own number means an earlier process had it: in a container that starts again this is the rule
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _storable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each tensor on the CPU, contiguous and alone in its storage, as safetensors wants them."""
    storable: dict[str, torch.Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        address = plain.untyped_storage().data_ptr()
        storable[name] = plain.clone() if address in taken else plain
        taken.add(address)
    return storable
