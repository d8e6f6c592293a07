"""What was measured on this machine, kept on disk: a run must repeat bit for bit where it was made.

A measurement belongs to the processor, the version of torch and the number of threads.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from moreward.nn.features import cache_folder

log = logging.getLogger(__name__)

Key = tuple[Any, ...]


def measurements_file(kind: str) -> Path:
    """Where the measurements of one kind are kept."""
    machine = f"{_processor()}/{torch.__version__}/{torch.get_num_threads()}"
    return cache_folder() / kind / f"{hashlib.sha256(machine.encode()).hexdigest()[:16]}.json"


def measure(kind: str, keys: list[Key], of: Callable[[Key], Any]) -> dict[Key, Any]:
    """The measurement of every key, read back or, where there is none yet, taken by `of` and kept."""
    path = measurements_file(kind)
    known = _read(path)
    new = {key: of(key) for key in keys if key not in known}
    if new:
        known = _keep(path, new)
    return {key: known[key] for key in keys}


def seconds(work: Callable[[], object], flop: float) -> float:
    """The best of a few rounds of up to ten calls of a piece of work of so many operations."""
    calls = max(1, min(10, int(5e7 / flop)))
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        for _ in range(calls):
            work()
        best = min(best, time.perf_counter() - start)
    return best / calls


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return "/".join(told.get(key, "") for key in ("vendor_id", "cpu family", "model", "flags"))


def _read(path: Path) -> dict[Key, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {tuple(key): value for *key, value in stored}
    except (OSError, ValueError, TypeError):  # not there, or damaged: measured again
        return {}


def _keep(path: Path, new: Mapping[Key, Any]) -> dict[Key, Any]:
    """Add measurements to the file; what another process has put there meanwhile stands, for both."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            known = {**new, **_read(path)}
            temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            told = json.dumps([[*key, value] for key, value in sorted(known.items())])
            temporary.write_text(told, encoding="utf-8")
            temporary.replace(path)
    except OSError as error:
        log.warning("%s cannot be written (%s): another run may compute in another way", path, error.strerror)
        return {**new, **_read(path)}
    return known
