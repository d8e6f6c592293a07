"""Adapters from elsewhere in the place of a run's experts: what fits is taken, what does not is refused, and then the
old expert stays.

Nothing is trained. The router and every other expert stay as they are, to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moreward.adapters import Base, read_adapters
from moreward.config import resolve
from moreward.data.batches import tokenizer_sha256
from moreward.errors import ConfigError, RunError
from moreward.export.parts import NOTE
from moreward.nn.experts import RewardHead
from moreward.runs import load_backbone
from moreward.scoring import Scorer, load
from moreward.systems._base import GatedSystem, LoRAConfig, prepare_backbone
from moreward.train.parents import read_parent, write_child

KEPT = ("data", "stages", "changes", "adopted")
"""What the new card has of the old one: how the experts that stay came about."""


@dataclass(frozen=True)
class Adopted:
    """`experts` are those that have a new adapter, by domain; `refused` has all faults of each directory that has
    none."""

    run: Path
    experts: tuple[str, ...]
    refused: Mapping[str, tuple[str, ...]]


def adopt(run: str | Path, folder: str | Path, *, out: str | Path, backbone: str | None = None) -> Adopted:
    """Give experts of `run` the PEFT adapters in `folder`, a directory for each and named like it, in a new run `out`.

    ConfigError where the run's experts are no adapters; RunError with all faults, and nothing written, where no adapter
    fits. A directory that tells golden rewards, as ours do, must give them again.
    """
    parent = read_parent(run)
    before = load(run, device="cpu", backbone=backbone)
    system, settings = before.system, before.system.config
    if not (isinstance(system, GatedSystem) and isinstance(settings, LoRAConfig) and system.adapter_experts()):
        raise ConfigError(
            f"{run}: its experts are no adapters (recipe {parent.config.recipe}, tune={settings.tune}), so none can "
            "take an expert's place. Runs of arliss with tune=lora can adopt."
        )
    folder = Path(folder)
    beside = load_backbone(parent.folder, parent.card, backbone)
    prepare_backbone(beside, settings, adapters=())
    told = parent.card["backbone"]
    found = read_adapters(folder, beside, Base(beside.name, told["sha256"], tokenizer_sha256(before.encoder.tokenizer)))
    assert beside.bank is not None
    refused = dict(found.refused)
    taken: dict[str, str] = {}
    for name, head in found.heads.items():
        if faults := _place_faults(system, name, head, folder / name):
            refused[name] = tuple(faults)
            continue
        old = _state(system, name)
        _put(system, name, beside.bank.adapters[name].state_dict(), head.state_dict(), None)
        if faults := _golden_faults(before, name, folder / name):
            refused[name] = tuple(faults)
            _put(system, name, *old)
        else:
            taken[name] = system.domains[system.expert_names.index(name)]
    if not taken:
        faults = [fault for name in sorted(refused) for fault in refused[name]]
        raise RunError("\n".join([f"{folder}: no adapter that this run can take; nothing was written", *faults]))
    config = resolve(
        {**parent.card["config"], "out": str(out), "backbone": backbone or parent.card["config"]["backbone"]}
    )
    kept = {key: parent.card[key] for key in KEPT if key in parent.card}
    record = [*kept.get("adopted", []), {"from": str(folder), "experts": sorted(taken.values())}]
    write_child(config, system, before.encoder, [parent], {**kept, "adopted": record})
    return Adopted(Path(out), tuple(taken.values()), refused)


def _place_faults(system: GatedSystem, name: str, head: RewardHead, folder: Path) -> list[str]:
    if name not in system.expert_names:
        return [f"{folder}: no expert of this run has the name {name!r}. It has: {', '.join(system.expert_names)}"]
    own, _ = system.adapter_experts()[name]
    if own.state_dict().keys() != head.state_dict().keys():
        return [f"{folder}: the head has {len(head.layers)} layers, this run's have {len(own.layers)}"]
    return []


State = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor] | None]


def _state(system: GatedSystem, name: str) -> State:
    bank = system.backbones()[0].bank
    assert bank is not None
    parts = (bank.adapters[name], *system.adapter_experts()[name])
    adapter, head, unit = ({k: v.clone() for k, v in part.state_dict().items()} for part in parts)
    return adapter, head, unit


def _put(
    system: GatedSystem,
    name: str,
    adapter: Mapping[str, Tensor],
    head: Mapping[str, Tensor],
    unit: Mapping[str, Tensor] | None,
) -> None:
    """`unit` None: zero and unit are in the head already."""
    backbone = system.backbones()[0]
    assert backbone.bank is not None
    own, standardize = system.adapter_experts()[name]
    backbone.bank.adapters[name].load_state_dict(dict(adapter))
    own.load_state_dict(dict(head))
    if unit is None:
        standardize.reset()
    else:
        standardize.load_state_dict(dict(unit))


@torch.no_grad()
def _golden_faults(scorer: Scorer, name: str, folder: Path) -> list[str]:
    """The golden rewards that an export of ours tells, against what the expert gives now."""
    if not (folder / NOTE).is_file():
        return []
    try:
        told = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        wanted: list[tuple[list[int], float]] = [(one["ids"], float(one["reward"])) for one in told["golden"]]
        allowed = float(told["tolerance"])
    except (KeyError, TypeError, ValueError) as error:
        return [f"{folder / NOTE}: does not tell golden rewards ({error!r}); export the run again"]
    system: Any = scorer.system
    head, standardize = system.adapter_experts()[name]
    backbone = system.backbones()[0]
    number = torch.tensor([system.expert_names.index(name)])
    faults = []
    for i, (ids, reward) in enumerate(wanted):
        ids_1T = torch.tensor([ids])
        now = float(standardize(head(backbone(ids_1T, torch.ones_like(ids_1T), number))))
        if not abs(now - reward) <= allowed:
            faults.append(f"{folder / NOTE}: golden text {i} gets {now:.6g} here, not {reward:.6g}")
    return faults
