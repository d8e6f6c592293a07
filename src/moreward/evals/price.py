"""What a smaller or denser run gives up and wins beside the one that it was made of.

B pairs. Accuracy is compared on the same pairs; speed is measured side by side in one process, one run after the
other in each round, so that whatever else the machine does falls on all of them.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moreward.data.batches import side
from moreward.data.split import linked_groups
from moreward.errors import ConfigError, DataError
from moreward.evals.accuracy import Evaluation
from moreward.evals.compare import Comparison, Difference, compare
from moreward.evals.run import evaluate_run, within_limit
from moreward.nn.backbone import resolve_backbone
from moreward.runs import model_folder
from moreward.scoring import Scorer
from moreward.types import Conversation, Preference

ROUNDS = 5
TIMED = 128
"""Conversations of one timed pass."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """`bytes_model` is the run's own folder, `bytes_backbone` the pretrained weights that it needs beside it, 0 where
    it holds them itself or where they are on the hub."""

    parameters_stored: int
    parameters_active: int
    bytes_model: int
    bytes_backbone: int

    @property
    def bytes(self) -> int:
        return self.bytes_model + self.bytes_backbone


@dataclass(frozen=True, kw_only=True)
class Speed:
    """`per_second` conversations in the best round; `ratio` to the run measured against, the median over rounds, with
    the least and the greatest of them."""

    per_second: float
    ratio: float
    ratio_least: float
    ratio_most: float


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Runs beside `against`, which stands in every mapping too. `left_out` pairs do not fit into some run's limit.
    `clock` says which seconds `Speed` counts."""

    against: str
    evaluations: Mapping[str, Evaluation]
    comparison: Comparison
    sizes: Mapping[str, Size]
    speeds: Mapping[str, Speed]
    clock: str
    num_timed: int
    rounds: int
    left_out: int

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(
            json.dumps(
                {
                    "against": self.against,
                    "evaluations": {name: one.to_json() for name, one in self.evaluations.items()},
                    "comparison": self.comparison.to_json(),
                    "sizes": {name: {**asdict(one), "bytes": one.bytes} for name, one in self.sizes.items()},
                    "speeds": {name: asdict(one) for name, one in self.speeds.items()},
                    "clock": self.clock,
                    "timed_conversations": self.num_timed,
                    "rounds": self.rounds,
                    "pairs_left_out": self.left_out,
                    "words": self.words(),
                },
                allow_nan=False,
            )
        )
        return plain

    def words(self) -> list[str]:
        """What each run lost and won, in sentences."""
        return [sentence for name in self.sizes if name != self.against for sentence in self._of(name)]

    def _of(self, name: str) -> list[str]:
        whole, mine = self.comparison.macro[name], self.comparison.domains[name]
        told = [f"{name}: {_verdict(whole)} {self.against} in the mean of domains, {_shown(whole)}."]
        for kind, verb in (("worse", "Lost"), ("better", "Gained")):
            if parts := [f"{domain} {_shown(one)}" for domain, one in mine.items() if one.verdict == kind]:
                told.append(f"    {verb}: {'; '.join(parts)}.")
        if open_ := [
            f"{domain} up to {-100 * one.interval.low:.1f}"
            for domain, one in mine.items()
            if one.verdict == "no difference shown" and one.interval.low < 0
        ]:
            told.append(f"    Nothing shown, but these losses in points would fit the pairs too: {', '.join(open_)}.")
        size, base, speed = self.sizes[name], self.sizes[self.against], self.speeds[name]
        told.append(
            f"    It has {size.parameters_stored / base.parameters_stored:.2f} of the parameters "
            f"({size.parameters_active / base.parameters_active:.2f} of the active ones), takes "
            f"{size.bytes / base.bytes:.2f} of the disk and is {speed.ratio:.2f} times as fast "
            f"({speed.ratio_least:.2f} to {speed.ratio_most:.2f} over {self.rounds} rounds)."
        )
        return told


def _verdict(one: Difference) -> str:
    return {"better": "better than", "worse": "worse than", "no difference shown": "no difference shown from"}[
        one.verdict
    ]


def _shown(one: Difference) -> str:
    low, high = 100 * one.interval.low, 100 * one.interval.high
    return f"{100 * one.difference:+.1f} points [{low:+.1f}, {high:+.1f}]"


def price(
    scorers: Mapping[str, Scorer],
    preferences: Sequence[Preference],
    *,
    against: str,
    rounds: int = ROUNDS,
    clock: Callable[[], float] | None = None,
) -> Prices:
    """Measure all of `scorers` on the pairs that fit into each of them. `clock` gives seconds; by default those of the
    processor on CPU, which other programs do not lengthen, and of the wall on a GPU.

    Raises ConfigError for fewer than two runs or no round, DataError where no pair fits.
    """
    faults = [] if len(scorers) > 1 else [f"price: at least one run beside --against (got {', '.join(scorers)})"]
    faults += [] if rounds > 0 else [f"--rounds: at least 1 (got {rounds})"]
    if faults:
        raise ConfigError(faults)
    kept = list(preferences)
    for scorer in scorers.values():
        kept = within_limit(scorer, kept)[0] if kept else []
    if not kept:
        raise DataError("--data: no pair fits into the limit of every run. Allow truncation (--truncate).")
    results = {name: evaluate_run(scorer, kept) for name, scorer in scorers.items()}
    correct = {name: one.correct for name, one in results.items()}
    groups, domains = linked_groups(kept), [p.domain for p in kept]
    on_gpu = any(scorer.device.type == "cuda" for scorer in scorers.values())
    items = timed_items(kept)
    return Prices(
        against=against,
        evaluations={name: one.evaluation for name, one in results.items()},
        comparison=compare(correct, groups, domains, baseline=against),
        sizes={name: size_of(scorer) for name, scorer in scorers.items()},
        speeds=speeds(scorers, items, against, rounds, clock or (time.perf_counter if on_gpu else time.process_time)),
        clock="of the wall" if on_gpu else "of the processor",
        num_timed=len(items),
        rounds=rounds,
        left_out=len(preferences) - len(kept),
    )


def timed_items(preferences: Sequence[Preference]) -> list[Conversation]:
    """Both responses of pairs from beginning to end of the data."""
    num = min(len(preferences), TIMED // 2)
    chosen = [preferences[i * len(preferences) // num] for i in range(num)]
    return [side(p, which) for p in chosen for which in ("chosen", "rejected")]


def speeds(
    scorers: Mapping[str, Scorer],
    items: Sequence[Conversation],
    against: str,
    rounds: int,
    clock: Callable[[], float],
) -> dict[str, Speed]:
    """Every run once in each round, first in each in turn; one round before is not counted."""
    names = list(scorers)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-1, rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            started = clock()
            scorers[name].score(items)  # rewards are read as numbers, so a GPU has ended too
            if number >= 0:
                seconds[name].append(clock() - started)
    found = {}
    for name in names:
        ratios = [theirs / mine for theirs, mine in zip(seconds[against], seconds[name], strict=True)]
        found[name] = Speed(
            per_second=len(items) / min(seconds[name]),
            ratio=statistics.median(ratios),
            ratio_least=min(ratios),
            ratio_most=max(ratios),
        )
    return found


def size_of(scorer: Scorer) -> Size:
    """By the system in memory and the files of the run."""
    folder = model_folder(scorer.folder) if scorer.folder is not None else None
    backbone = Path(resolve_backbone(scorer.system.backbones()[0].name or ""))
    holds_it = scorer.system.config.tune == "full"
    return Size(
        parameters_stored=scorer.system.num_parameters(),
        parameters_active=scorer.system.num_active_parameters(),
        bytes_model=_bytes(folder, "*") if folder is not None else 0,
        bytes_backbone=0 if holds_it or not backbone.name else _bytes(backbone, "*.safetensors"),
    )


def _bytes(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())
