"""The experts that a run's exports are made of, and how a folder of exports comes into being."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moreward.checkpoint import fsync_path, space_errors
from moreward.errors import ConfigError
from moreward.nn.backbone import Backbone
from moreward.nn.experts import AdapterExperts, RewardHead, SoloExpert, Standardize, standardised_heads
from moreward.systems._base import GatedSystem, System


@dataclass(frozen=True)
class Part:
    """A whole reward model: `name` is its folder, `expert` what the scorer calls it (empty for the only one), `adapter`
    its adapter in the backbone's bank."""

    name: str
    expert: str
    backbone: Backbone
    adapter: str | None
    head: RewardHead
    standardize: Standardize


def parts_of(system: System) -> list[Part]:
    """Every expert that is a reward model by itself; the only one of a single model is named `model`.

    ConfigError where the reward is not that of single heads, as in recipes whose experts are parts of one model.
    """
    heads = {id(head) for head, _ in standardised_heads(system)}
    names = system.expert_names if isinstance(system, GatedSystem) else ("model",)
    labels = system.expert_labels or ("",)
    found: list[tuple[Backbone, str | None, RewardHead, Standardize]] = []
    for module in system.modules():
        if isinstance(module, SoloExpert) and isinstance(module.head, RewardHead):
            found.append((module.backbone, None, module.head, module.standardize))
        elif isinstance(module, AdapterExperts):
            has_bank = module.backbone.bank is not None
            found += [
                (module.backbone, name if has_bank else None, module.head(name), module.standardizer(name))
                for name in module.heads
            ]
    if not (len(found) == len(names) == len(labels) == len(heads)):
        raise ConfigError(
            f"export: this run has {len(names)} experts that can be named and {len(found)} that are reward models by "
            "themselves. Runs of baseline, base_lora, rodos and arliss can be exported."
        )
    return [Part(name, label, *one) for name, label, one in zip(names, labels, found, strict=True)]


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write beside `out`, which takes that name once the block has ended without an error. ConfigError
    where `out` exists."""
    if out.exists():
        raise ConfigError(f"--out: {out} exists already. Give a new folder, or remove it first.")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with space_errors(out.parent):
            temporary.mkdir()
            yield temporary
            temporary.rename(out)
            fsync_path(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
