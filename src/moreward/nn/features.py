"""What a frozen backbone says of a text, computed once and kept, in memory and on disk.

A vector depends on its own text alone, to the bit, so it does not matter which texts are computed together or in which
run. A packed backbone computes each text in a stream of its own; any other in one of a few fixed shapes (32 rows,
lengths in steps of 32, empty places filled).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from moreward.nn.backbone import Backbone

log = logging.getLogger(__name__)

ROWS = 32
STEP = 32
Progress = Callable[[int, int], None]


def cache_folder() -> Path:
    """Where features are kept: `$MOREWARD_CACHE`, else `~/.cache/moreward`."""
    return Path(os.environ.get("MOREWARD_CACHE", Path.home() / ".cache" / "moreward"))


class FeatureScale(nn.Module):
    """Gives each number of a vector zero mean and unit variance over a training set: a head reads little of a number
    that is small. Until it is fitted it changes nothing."""

    shift_D: Tensor
    scale_D: Tensor
    num: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("shift_D", torch.zeros(size))
        self.register_buffer("scale_D", torch.ones(size))
        self.register_buffer("num", torch.zeros((), dtype=torch.long))

    def forward(self, hidden_ND: Tensor) -> Tensor:
        return (hidden_ND - self.shift_D) * self.scale_D

    def fit(self, hidden_ND: Tensor) -> None:
        """Mean and deviation of N vectors; a number that is the same in all keeps its unit."""
        std_D, mean_D = torch.std_mean(hidden_ND.double(), dim=0, correction=0)
        self.shift_D.copy_(mean_D)
        self.scale_D.copy_(1 / torch.where(std_D > 1e-6, std_D, 1.0))
        self.num.fill_(len(hidden_ND))


class FeatureStore:
    """Hidden vectors by token ids. `folder` None keeps them in memory only."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._vectors: dict[bytes, Tensor] = {}
        self._unsaved: list[bytes] = []
        if folder is not None:
            self._read(folder)

    def __len__(self) -> int:
        return len(self._vectors)

    def hidden(self, backbone: Backbone, ids_NT: Tensor, mask_NT: Tensor) -> Tensor:
        """`hidden_ND` of the rows, computing those that are not known yet."""
        texts = [ids[mask.bool()].tolist() for ids, mask in zip(ids_NT.cpu(), mask_NT.cpu(), strict=True)]
        self.compute(backbone, texts)
        return self.vectors(texts).to(ids_NT.device)

    def vectors(self, texts: Iterable[list[int]]) -> Tensor:
        """`hidden_ND` of texts that were computed before."""
        return torch.stack([self._vectors[text_digest(text)] for text in texts])

    def compute(self, backbone: Backbone, texts: Iterable[list[int]], progress: Progress | None = None) -> int:
        """Make sure of the vectors of these token id lists; returns how many were computed."""
        missing = {key: text for text in texts if (key := text_digest(text)) not in self._vectors}
        step, rows = (1, 1) if backbone.family is not None else (STEP, ROWS)
        by_length: dict[int, list[bytes]] = {}
        for key, text in missing.items():
            by_length.setdefault(-(-len(text) // step) * step, []).append(key)
        num_done = 0
        for length in sorted(by_length):
            keys = by_length[length]
            for start in range(0, len(keys), rows):
                chunk = keys[start : start + rows]
                self._compute_chunk(backbone, chunk, [missing[k] for k in chunk], rows, length)
                num_done += len(chunk)
                if progress is not None:
                    progress(num_done, len(missing))
                if len(self._unsaved) >= 4096:
                    self.save()
        return num_done

    @torch.no_grad()
    def _compute_chunk(
        self, backbone: Backbone, keys: list[bytes], texts: list[list[int]], rows: int, length: int
    ) -> None:
        device = next(backbone.parameters()).device
        ids_NT = torch.zeros((rows, length), dtype=torch.long)
        mask_NT = torch.zeros_like(ids_NT)
        mask_NT[:, 0] = 1  # an empty place still needs one token to attend to
        for row, text in enumerate(texts):
            ids_NT[row, : len(text)] = torch.tensor(text)
            mask_NT[row, : len(text)] = 1
        was_training = backbone.training
        hidden_ND = backbone.eval().encode(ids_NT.to(device), mask_NT.to(device)).cpu()
        backbone.train(was_training)
        for key, hidden_D in zip(keys, hidden_ND, strict=False):
            self._vectors[key] = hidden_D.clone()
        self._unsaved += keys

    def save(self) -> None:
        """Write what is new as one more file; a file appears whole or not at all."""
        if self.folder is None or not self._unsaved:
            return
        keys, self._unsaved = self._unsaved, []
        hidden_ND = torch.stack([self._vectors[k] for k in keys])
        told = {"keys": json.dumps([k.hex() for k in keys]), "digest": digest(hidden_ND)}
        name = hashlib.blake2b(b"".join(keys), digest_size=12).hexdigest()
        if not keep_file(self.folder / f"{name}.safetensors", {"hidden_ND": hidden_ND}, told):
            self.folder = None

    def _read(self, folder: Path) -> None:
        from safetensors import SafetensorError

        for path in sorted(folder.glob("*.safetensors")):
            try:
                self._vectors.update(_read_file(path))
            except (SafetensorError, ValueError):
                path.unlink()  # a damaged cache file costs only the time to compute it again


def keep_file(path: Path, tensors: dict[str, Tensor], told: dict[str, str]) -> bool:
    """Write a file of a cache, which appears whole or not at all. False, and a word in the log, where it cannot be
    written: a cache that is not there costs time, not results."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata=told)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        log.warning("%s stays in memory only: it cannot be written: %s", path, error)
        if temporary.exists():
            temporary.unlink()
        return False
    return True


def _read_file(path: Path) -> dict[bytes, Tensor]:
    """Vectors by key. Raises SafetensorError or ValueError for a file that is not as it was written."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        told = file.metadata() or {}
        hidden_ND = file.get_tensor("hidden_ND")
    if told.get("digest") != digest(hidden_ND):
        raise ValueError(f"{path}: the vectors are not those that were written")
    return dict(zip((bytes.fromhex(k) for k in json.loads(told["keys"])), hidden_ND, strict=True))


def digest(hidden_ND: Tensor) -> str:
    """What tells whether numbers are those that were written."""
    return hashlib.blake2b(hidden_ND.numpy().tobytes(), digest_size=16).hexdigest()


def text_digest(text: list[int]) -> bytes:
    """What stands for a text's tokens."""
    return hashlib.blake2b(torch.tensor(text, dtype=torch.int32).numpy().tobytes(), digest_size=16).digest()
