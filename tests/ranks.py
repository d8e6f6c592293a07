"""Several runs in one start of as many processes as a launcher made: `ranks.py RUNS.json`, a list of configurations."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from moreward.nn.routers import NoisyTopKRouter
from moreward.train.runner import train


def train_all(runs: Sequence[Mapping[str, Any]]) -> None:
    with gates_without_noise():
        for run in runs:
            train(run)


@contextmanager
def gates_without_noise() -> Iterator[None]:
    """Noise is drawn by each process for itself; without it, gates need another start than all experts alike."""
    forward = NoisyTopKRouter.forward

    def quiet(self: NoisyTopKRouter, hidden_ND: torch.Tensor) -> Any:
        if not self.gate.any():
            with torch.no_grad():
                self.gate.normal_(generator=torch.Generator().manual_seed(0))
        was, torch.randn_like = torch.randn_like, torch.zeros_like
        try:
            return forward(self, hidden_ND)
        finally:
            torch.randn_like = was

    NoisyTopKRouter.forward = quiet  # type: ignore[method-assign]
    try:
        yield
    finally:
        NoisyTopKRouter.forward = forward  # type: ignore[method-assign]


if __name__ == "__main__":
    PartialState.destroy_process_group = lambda *_: None  # the end of one run is not yet the end of the process
    train_all(json.loads(Path(sys.argv[1]).read_text()))
