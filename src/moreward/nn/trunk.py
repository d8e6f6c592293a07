"""What the shared lower layers say of a text, computed once and kept on disk, for later epochs, experts and seeds.

A text's states are computed in a stream of their own, so they are the same bits whether they were kept or not.
T tokens of a text, D hidden.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moreward.nn.features import digest, keep_file, text_digest
from moreward.nn.packing import Tokens

log = logging.getLogger(__name__)

MAX_BYTES = 8 << 30
FILE_BYTES = 64 << 20


class _Place(NamedTuple):
    states_TD: Tensor
    start: int
    stop: int


class TrunkStore:
    """States `x_TD` by text. At most `max_bytes` are kept; what does not fit is computed whenever it is needed."""

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_computed = 0
        self._places: dict[bytes, _Place] = {}
        self._new: list[tuple[bytes, Tensor]] = []
        self._new_bytes = 0
        for path in sorted(folder.glob("*.safetensors")):
            self._read(path)

    def get(self, tokens: Tokens, compute: Callable[[], Tensor]) -> Tensor:
        """The states of a text, `compute()` where they are not kept."""
        key = text_digest(list(tokens))
        place = self._places.get(key)
        if place is not None:
            return place.states_TD[place.start : place.stop]
        states_TD = compute().detach()
        self.num_computed += 1
        if self.num_bytes + states_TD.nbytes <= self.max_bytes:
            self._keep(key, states_TD)
        elif self.num_bytes < self.max_bytes:
            log.warning("%s holds its %d bytes; further texts are computed in every epoch", self.folder, self.max_bytes)
            self.max_bytes = self.num_bytes
        return states_TD

    def _keep(self, key: bytes, states_TD: Tensor) -> None:
        self.num_bytes += states_TD.nbytes
        self._places[key] = _Place(states_TD, 0, len(states_TD))
        self._new.append((key, states_TD))
        self._new_bytes += states_TD.nbytes
        if self._new_bytes >= FILE_BYTES:
            self.save()

    def save(self) -> None:
        """Write what is new as one more file, which appears whole or not at all, and read it back from there: then
        the memory is the system's to take."""
        if not self._new:
            return
        new, self._new, self._new_bytes = self._new, [], 0
        states_TD = torch.cat([states for _, states in new])
        told = {"texts": json.dumps([[key.hex(), len(states)] for key, states in new]), "digest": digest(states_TD)}
        path = self.folder / f"{told['digest']}.safetensors"
        if keep_file(path, {"states_TD": states_TD}, told):
            self.num_bytes -= states_TD.nbytes
            self._read(path)
        else:
            self.max_bytes = self.num_bytes  # memory is not the place for all of them

    def _read(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                told = file.metadata() or {}
                states_TD = file.get_tensor("states_TD")
            if told.get("digest") != digest(states_TD):
                raise ValueError(f"{path}: not what was written")
            texts = json.loads(told["texts"])
        except (SafetensorError, OSError, ValueError, KeyError):
            path.unlink(missing_ok=True)  # a damaged file costs only the time to compute it again
            return
        start = 0
        for key, length in texts:
            self._places[bytes.fromhex(key)] = _Place(states_TD, start, start + length)
            start += length
        self.num_bytes += states_TD.nbytes
