"""A stage whose module is a bag of token vectors with a head: real tensors and gradients, a millisecond a step."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moreward.checkpoint import CheckpointStore
from moreward.config import TrainConfig
from moreward.data.batches import EncodedPair
from moreward.nn.experts import Standardize
from moreward.nn.losses import PairwiseLoss
from moreward.systems._base import Stage
from moreward.train.loop import Fit, Surroundings, make_accelerator
from moreward.train.track import MetricsFile, Silent
from moreward.types import Batch, Rewards

DOMAINS = ("long", "short")


class Bag(nn.Module):
    """The mean of token vectors, dropout, a linear map. `seen` tells of each forward: in training or not, which rows,
    how many places dropout cleared."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.tokens, self.head = nn.Embedding(320, 8), nn.Linear(8, 1, bias=False)
        self.scale, self.idle = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
        self.dropout = nn.Dropout(dropout)
        self.standardize = Standardize()
        self.seen: list[tuple[bool, tuple[str, ...], int]] = []
        self.before: Callable[[], None] = lambda: None

    def forward(self, batch: Batch) -> Rewards:
        self.before()
        mask_NT1 = batch.mask_NT.unsqueeze(-1)
        mean_ND = (self.tokens(batch.ids_NT) * mask_NT1).sum(1) / mask_NT1.sum(1)
        dropped_ND = self.dropout(mean_ND * self.scale)
        self.seen.append((self.training, batch.names, int((dropped_ND == 0).sum())))
        return Rewards(reward_N=self.standardize(self.head(dropped_ND).squeeze(-1) + 0 * self.idle.sum()))

    def num_steps(self) -> int:
        return sum(training for training, _, _ in self.seen)


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in module.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


@dataclass
class Fitting:
    """A stage ready to run in a folder; a second one on the same folder goes on with the first."""

    fit: Fit
    bag: Bag
    folder: Path

    def run(self) -> dict[str, Any]:
        return self.fit.run()

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


def fitting(
    folder: Path,
    train: Sequence[EncodedPair],
    val: Sequence[EncodedPair] = (),
    *,
    dropout: float = 0.0,
    objective: Any = None,
    seed: int = 0,
    **settings: Any,
) -> Fitting:
    config = TrainConfig(**{"learning_rate": 0.02, "batch_size": 8, "device": "cpu", **settings})
    folder.mkdir(exist_ok=True)
    bag = Bag(dropout)
    stage = Stage(
        name="expert/a",
        module=bag,
        learn=tuple(bag.parameters()),
        objective=objective or PairwiseLoss(label_smoothing=config.label_smoothing, centering=config.centering),
        standardize=bag.standardize,
    )
    around = Surroundings(
        accelerator=make_accelerator(config, str(folder)),
        config=config,
        seed=seed,
        pad_id=0,
        domains=DOMAINS,
        metrics=MetricsFile(folder / "metrics.jsonl"),
        reporter=Silent(),
    )
    names = {**dict(bag.named_parameters()), **dict(bag.named_buffers())}
    store = CheckpointStore(folder / "checkpoints", hashes={"config_sha256": "c"})
    return Fitting(Fit(stage, names, train, val, around, store), bag, folder)
