"""A process that saves checkpoint after checkpoint, to be killed: it notes each save that returned."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import torch

from moreward.checkpoint import CheckpointStore


def content(step: int) -> dict[str, dict[str, torch.Tensor]]:
    bits = torch.Generator().manual_seed(step)
    groups = {"model": 3000, "optimizer": 6000, "best": 100}
    return {name: {"w": torch.randn(size, generator=bits)} for name, size in groups.items()}


def store_in(folder: Path) -> CheckpointStore:
    return CheckpointStore(folder, hashes={"config_sha256": "c"})


def work(folder: str, first: str) -> None:
    acknowledged = os.open(f"{folder}.saved", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    store = store_in(Path(folder))
    for step in itertools.count(int(first)):
        store.save(step, content(step), {"step": step})
        os.write(acknowledged, b"%d\n" % step)
