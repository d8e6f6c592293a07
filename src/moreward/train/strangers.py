"""Directories of other projects' reward models made into a run: examined, measured, routed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moreward.config import merge, resolve
from moreward.errors import ConfigError
from moreward.nn.foreign import Stranger, examine_all
from moreward.runs import read_card, read_model
from moreward.systems._base import GatedSystem
from moreward.train.runner import train
from moreward.train.track import Reporter

RECIPE = "strangers"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True)
class ImportedExpert:
    """What was measured of one expert: its zero and unit, and the share of pairs that it ranks right; `val_accuracy` is
    that of held-out pairs, None where there are none."""

    name: str
    stranger: Stranger
    mean: float
    std: float
    accuracy: float
    val_accuracy: float | None


@dataclass(frozen=True)
class Imported:
    """`routed` is the share of the `num_held_out` pairs that the expert chosen by the router ranks right."""

    run: Path
    experts: tuple[ImportedExpert, ...]
    num_held_out: int
    routed: float | None

    @property
    def best(self) -> ImportedExpert:
        """The single expert that ranks most held-out pairs right."""
        return max(self.experts, key=lambda expert: expert.val_accuracy or 0.0)


def look_at(folders: Mapping[str, str | Path], *, max_length: int | None = None) -> list[Stranger]:
    """What each directory is, under its expert's name; nothing is written. ConfigError with every fault of all."""
    if not folders:
        raise ConfigError("at least one NAME=DIR is needed: an expert's name and the directory of its model")
    faults = [
        f"{name!r}: an expert's name is of a-z, 0-9, '.', '_' and '-'" for name in folders if not NAME.fullmatch(name)
    ]
    if faults:
        raise ConfigError(faults)
    return examine_all(folders, max_length=max_length)


def import_models(
    folders: Mapping[str, str | Path],
    pairs: str | Sequence[str],
    *,
    out: str | Path,
    router: str = "minilm",
    max_length: int | None = None,
    top_k: int = 1,
    settings: Mapping[str, Any] | None = None,
    reporter: Reporter | None = None,
) -> Imported:
    """Make a run whose experts are models as they stand in directories. On `pairs` each gets its zero and unit, and the
    router, a gate on the backbone `router`, learns from which of them are right; a share of the pairs is held out.

    `max_length` is the longest conversation in each expert's own tokens, by default all that it can read. `settings`
    are those of `moreward train`. Raises ConfigError with every fault of every directory before anything is written,
    and what `train` raises.
    """
    strangers = look_at(folders, max_length=max_length)
    given = {
        "recipe": RECIPE,
        "backbone": router,
        "out": str(out),
        "data": {"train": pairs},
        "system": {"top_k": top_k, "experts": [stranger.model_dump(mode="json") for stranger in strangers]},
    }
    run = train(resolve(merge(given, settings or {})), reporter=reporter)
    return _measured(run, strangers)


def _measured(run: Path, strangers: Sequence[Stranger]) -> Imported:
    card = read_card(run / "model")
    system, _, _ = read_model(run)
    assert isinstance(system, GatedSystem)
    *reports, router = card["stages"]
    experts = tuple(
        ImportedExpert(
            stranger.name,
            stranger,
            float(system.standardizer(name).mean),
            float(system.standardizer(name).std),
            report["solved"]["accuracy"],
            report["solved"]["val_accuracy"],
        )
        for name, stranger, report in zip(system.expert_names, strangers, reports, strict=True)
    )
    best = [one for one in router["evals"] if one["step"] == router["best_step"]]
    return Imported(run, experts, router["val_pairs"], best[0]["eval/micro"] if best else None)
