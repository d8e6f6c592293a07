"""Single models with the budget of a mixture: as many parameters in all, as many active, as many pairs in training.

Where adapters learn it is one adapter of a higher rank at the same scale, elsewhere as many single models as there is
room for, from seeds of their own, whose standardised rewards are averaged; for training it is more epochs. A recipe
may name better twins of its own (`System.equal_budget`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from moreward.config import RunConfig, merge, resolve
from moreward.errors import BackboneError, ConfigError
from moreward.nn.backbone import Backbone, pools_by_mean, quiet, resolve_backbone
from moreward.nn.losses import PairwiseLoss
from moreward.proof.experiment import KINDS, SINGLE_RECIPES, Experiment
from moreward.registry import find_recipe
from moreward.systems._base import Stage, System
from moreward.train.runner import Pairs, complete

SHARE_ENOUGH = 0.9
"""A single model named as equal must have at least this share of the mixture's budget."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """`training` counts pairs seen, over all stages."""

    total: int
    active: int
    trained: int
    training: int

    def of(self, kind: str) -> int:
        return int(getattr(self, kind))


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A system of the experiment. `members` > 1: that many runs of other seeds, rewards averaged."""

    label: str
    config: RunConfig
    is_single: bool
    members: int = 1

    def same_as(self, other: Planned) -> bool:
        return self.config == other.config and self.members == other.members


def plan(experiment: Experiment, configs: Mapping[str, RunConfig], pairs_of: Callable[[RunConfig], Pairs]) -> Plan:
    """The named systems and, for each mixture, its equal-budget single models; `pairs_of` reads the training pairs of a
    configuration. Raises ConfigError where one that the file names has less than nine tenths of the budget it should
    match."""
    planned = [
        Planned(label=label, config=config, is_single=experiment.is_single(label)) for label, config in configs.items()
    ]
    sizes = _Sizes(pairs_of)
    controls: dict[str, dict[str, str]] = {}
    faults: list[str] = []
    for mixture in experiment.mixtures:
        told = "auto" if experiment.controls == "auto" else experiment.controls[mixture]
        if told == "auto":
            controls[mixture] = {}
            for kind, twin in derive(configs[mixture], mixture, sizes).items():
                controls[mixture][kind] = _settled(twin, planned)
        else:
            controls[mixture] = {str(kind): label for kind, label in told.items()}
            faults += _too_small(mixture, controls[mixture], planned, sizes)
    if faults:
        raise ConfigError(faults)
    budgets = {one.label: sizes.of(one) for one in planned}
    baseline = experiment.baseline or next((p.label for p in planned if p.is_single), "")
    return Plan(systems=tuple(planned), controls=controls, budgets=budgets, baseline=baseline)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is trained and what is compared with what: `controls[mixture][kind]` is the label of a single model."""

    systems: tuple[Planned, ...]
    controls: Mapping[str, Mapping[str, str]]
    budgets: Mapping[str, Budget]
    baseline: str

    def opponents(self, mixture: str) -> list[str]:
        """The single models of a mixture, each once, and the baseline."""
        return list(dict.fromkeys([*(self.controls[mixture][kind] for kind in KINDS), self.baseline]))


def _settled(twin: Planned, planned: list[Planned]) -> str:
    """The label under which this single model is planned; it is added where none is the same."""
    for one in planned:
        if one.same_as(twin):
            return one.label
    taken = {one.label for one in planned}
    # Experiments on several backbones have the same single model once for each.
    on_backbone = f"{twin.label}, {Path(twin.config.backbone).name}"
    names = (twin.label, on_backbone, *(f"{twin.label} ({i})" for i in range(2, 100)))
    label = next(name for name in names if name not in taken)
    planned.append(replace(twin, label=label))
    return label


def _too_small(mixture: str, told: Mapping[str, str], planned: Sequence[Planned], sizes: _Sizes) -> list[str]:
    by_label = {one.label: one for one in planned}
    wanted = sizes.of(by_label[mixture])
    found = []
    for kind, label in told.items():
        has = sizes.of(by_label[label]).of(kind)
        if has < SHARE_ENOUGH * wanted.of(kind):
            unit = "pairs seen" if kind == "training" else "parameters"
            found.append(
                f"controls.{mixture}.{kind}: {label!r} has {has:,} {unit}, the mixture {wanted.of(kind):,}; name one "
                "that has at least nine tenths of it, or say auto"
            )
    return found


# ---- the twins -------------------------------------------------------------------------------------------------------


def derive(config: RunConfig, mixture: str, sizes: _Sizes) -> dict[str, Planned]:
    """A single model for each kind of budget; the plain single model itself where that is as large."""
    single = single_of(config)
    plain = Planned(label=_name_of(single), config=single, is_single=True)
    wanted, has = sizes.of_config(config), sizes.of_config(single)
    recipe = find_recipe(config.recipe)
    own = recipe.equal_budget(recipe.Config.model_validate(config.system))
    found: dict[str, Planned] = {}
    for kind in ("total", "active"):
        if kind in own:
            twin = _with_system(config, own[kind])
            found[kind] = Planned(label=f"dense {mixture} ({kind})", config=twin, is_single=True)
        elif single.tune == "lora":
            found[kind] = _wider(plain, wanted.of(kind), kind, sizes)
        else:
            frozen = has.total - has.trained
            members = max(1, round((wanted.of(kind) - frozen) / has.trained))
            found[kind] = replace(plain, members=members, label=_members_name(plain.label, members))
    found["training"] = _longer(plain, wanted.training / has.training)
    return found


def single_of(config: RunConfig) -> RunConfig:
    """The single model of the same kind: same backbone, pairs and training; one head, and one adapter if any."""
    recipe = SINGLE_RECIPES[config.tune == "lora"]
    known = find_recipe(recipe).Config.model_fields
    given = config.model_dump(mode="json")
    given["data"]["ratings"] = []  # it learns from pairs only
    return resolve({**given, "recipe": recipe, "system": {k: v for k, v in config.system.items() if k in known}})


def _name_of(single: RunConfig) -> str:
    return f"single, rank {single.system['rank']}" if single.tune == "lora" else f"single, {single.tune}"


def _members_name(label: str, members: int) -> str:
    return label if members == 1 else f"{label}, {members} averaged"


def _wider(plain: Planned, wanted: int, kind: str, sizes: _Sizes) -> Planned:
    """One adapter of the rank that comes nearest; its parameters grow by the same number with every rank."""
    rank, alpha = int(plain.config.system["rank"]), float(plain.config.system["alpha"])

    def at(new: int) -> RunConfig:
        return _with_system(plain.config, {"rank": new, "alpha": alpha * new / rank})

    first, second = (sizes.of_config(at(new)).of(kind) for new in (1, 2))
    new = max(1, 1 + round((wanted - first) / (second - first)))
    config = plain.config if new == rank else at(new)
    return replace(plain, config=config, label=_name_of(config))


def _longer(plain: Planned, ratio: float) -> Planned:
    train = plain.config.train
    epochs = max(1, round(train.epochs * ratio))
    if epochs == train.epochs:
        return plain
    steps = None if train.max_steps is None else max(1, round(train.max_steps * ratio))
    longer = train.model_copy(update={"epochs": epochs, "max_steps": steps})
    config = plain.config.model_copy(update={"train": longer})
    return replace(plain, config=config, label=f"{plain.label}, {epochs} epochs")


def _with_system(config: RunConfig, changed: Mapping[str, Any]) -> RunConfig:
    return resolve(merge(config.model_dump(mode="json"), {"system": dict(changed)}))


# ---- sizes -----------------------------------------------------------------------------------------------------------


class _Sizes:
    """Budgets of configurations, counted on systems without weights."""

    def __init__(self, pairs_of: Callable[[RunConfig], Pairs]) -> None:
        self.pairs_of = pairs_of
        self.known: dict[str, Budget] = {}

    def of(self, planned: Planned) -> Budget:
        """Of an ensemble, what does not learn counts once: its members share it."""
        one, more = self.of_config(planned.config), planned.members - 1
        return Budget(
            total=one.total + more * one.trained,
            active=one.active + more * one.trained,
            trained=one.trained * planned.members,
            training=one.training * planned.members,
        )

    def of_config(self, config: RunConfig) -> Budget:
        key = config.model_dump_json()
        if key not in self.known:
            self.known[key] = self._count(config)
        return self.known[key]

    def _count(self, config: RunConfig) -> Budget:
        pairs = self.pairs_of(config)
        system = hollow(complete(config, pairs), sorted({p.domain for p in pairs.train}))
        system.meet(pairs.train)
        stages = system.stages(PairwiseLoss())
        learn = {id(p): p.numel() for stage in stages for p in stage.learn}
        return Budget(
            total=system.num_parameters(),
            active=system.num_active_parameters(),
            trained=sum(learn.values()),
            training=sum(_pairs_seen(config, stage, pairs) for stage in stages),
        )


def _pairs_seen(config: RunConfig, stage: Stage, pairs: Pairs) -> int:
    """A closed form sees its pairs once; two rated conversations are as much as a pair."""
    if stage.rated:
        return len(pairs.ratings.train) // 2
    num_pairs = sum(1 for p in pairs.train if stage.select(p))
    if stage.solve is not None:
        return num_pairs
    seen, most = num_pairs * config.train.epochs, config.train.max_steps
    return seen if most is None else min(seen, most * config.train.batch_size)


def hollow(config: RunConfig, domains: Sequence[str]) -> System:
    """The system of a configuration on the meta device: shapes without weights."""
    shape, pooling = _shape(config.backbone, config.pooling)
    backbone = Backbone.from_config(shape, pooling=pooling)
    recipe = find_recipe(config.recipe)
    with torch.device("meta"):
        system: System = recipe(recipe.Config.model_validate(config.system), backbone, domains)
    return system


@cache
def _shape(name: str, pooling: str) -> tuple[Any, str]:
    from transformers import AutoConfig

    folder = resolve_backbone(name)
    try:
        with quiet():
            shape = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise BackboneError(f"{name!r}: no directory with a config.json, and not to be had from the hub") from error
    return shape, "mean" if pooling == "auto" and pools_by_mean(folder) else pooling
