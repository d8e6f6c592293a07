"""Ensemble: several models that learnt the same pairs, as one cautious reward (arXiv 2310.02743).

With as many members as RODOS has models it is the single model of RODOS's total parameters. N conversations,
K members.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from moreward.errors import ConfigError
from moreward.nn.backbone import Backbone
from moreward.nn.combine import How, aggregate
from moreward.nn.experts import (
    AdapterExperts,
    OneExpert,
    RewardHead,
    SeparateExperts,
    SoloExpert,
    Standardize,
    Standardized,
)
from moreward.nn.losses import Objective
from moreward.registry import find_recipe
from moreward.systems._base import (
    Axis,
    GrowingSystem,
    Kind,
    LoRAConfig,
    Presets,
    Stage,
    learnable,
    new_head,
    own_copy,
    prepare_backbone,
)
from moreward.types import Batch, Rewards, Routing


class Member(BaseModel):
    """What a finished run needs to be built again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str
    domains: tuple[str, ...]
    system: dict[str, Any]


class EnsembleConfig(LoRAConfig):
    num_members: int = Field(5, ge=2, description="models that differ by their start and the order of the pairs")
    how: How = Field("mean", description="mean, median, worst, uncertainty: mean - λ variance, deviation: mean - λ sd")
    caution: float = Field(0.5, ge=0, description="λ of uncertainty and deviation")
    names: tuple[str, ...] = Field((), description="what the members are called; by default member-0, member-1, …")
    raw: bool = Field(False, description="mix raw rewards, which have no common unit: the loudest member decides")
    runs: tuple[Member, ...] = Field((), description="finished runs as members: written by `moreward ensemble`")

    @model_validator(mode="after")
    def _one_member_for_each_run(self) -> Self:
        if self.runs and len(self.runs) != self.num_members:
            raise ValueError(f"num_members must be the number of runs, {len(self.runs)}")
        return self

    @model_validator(mode="after")
    def _one_name_for_each_member(self) -> Self:
        bad = [name for name in self.names if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name)]
        if self.names and (bad or len({*self.names}) != self.num_members or len(self.names) != self.num_members):
            raise ValueError(
                f"names: num_members different ones, {self.num_members}, of small letters, digits, - and _ "
                f"(got {', '.join(self.names)})"
            )
        return self

    @property
    def member_names(self) -> tuple[str, ...]:
        return self.names or tuple(f"member-{k}" for k in range(self.num_members))


class Recipe(GrowingSystem):
    """K whole models, K adapters with a head each on one backbone, or K heads on a frozen one. Every row is judged by
    all, each in its own unit; `how` makes one reward of theirs. Median, deviation and standardisation are ours."""

    Config = EnsembleConfig
    paper = "arXiv:2310.02743"
    presets: ClassVar[Presets] = {
        "paper": {
            "tune": "full",
            "train.learning_rate": 1e-5,
            "train.epochs": 5,
            "train.batch_size": 32,
            "system.num_members": 5,
            "system.how": "uncertainty",
            "system.caution": 0.5,
        },
        "practical": {},
    }
    config: EnsembleConfig
    mixes: ClassVar[str] = "by the rule that makes one reward of all members, which are others now"

    def __init__(self, config: EnsembleConfig, backbone: Backbone, domains: Sequence[str]) -> None:
        super().__init__(config, backbone, domains)
        self.names = config.member_names
        self.members = self._members(backbone)

    def _members(self, backbone: Backbone) -> AdapterExperts | SeparateExperts:
        config = self.config
        if config.runs:
            return SeparateExperts({n: _built(run, backbone) for n, run in zip(self.names, config.runs, strict=True)})
        prepare_backbone(backbone, config, adapters=self.names)
        heads = {name: new_head(backbone, config) for name in self.names}
        if config.tune != "full":
            return AdapterExperts(backbone, heads)
        return SeparateExperts({name: SoloExpert(own_copy(backbone, "full"), head) for name, head in heads.items()})

    @property
    def member_labels(self) -> tuple[str, ...]:
        return self.names

    # ---- changes: members know nothing of each other, so only a new one is trained

    @classmethod
    def grows_by(cls, settings: Mapping[str, Any], label: str) -> Axis:
        return "member"

    @classmethod
    def changed(cls, settings: Mapping[str, Any], kind: Kind, label: str) -> dict[str, Any]:
        config = EnsembleConfig.model_validate(settings)
        if config.runs:
            raise ConfigError("an ensemble of finished runs is made again from others of them: moreward ensemble")
        names = [name for name in config.member_names if kind == "replace" or name != label]
        names += [label] if kind == "extend" else []
        return {**settings, "names": names, "num_members": len(names)}

    def part_labels(self, axis: Axis) -> tuple[str, ...]:
        return self.names

    def names_of(self, label: str) -> tuple[str, ...]:
        return (label,)

    def change_stages(self, kind: Kind, label: str, pairwise: Objective) -> list[Stage]:
        return [] if kind == "remove" else [self._stage(self.names.index(label), label, pairwise)]

    def each_part(self, batch: Batch) -> dict[str, float]:
        alone = [torch.tensor([k], device=batch.ids_NT.device) for k in range(len(self.names))]
        return {name: float(self.members(batch, k_1)) for name, k_1 in zip(self.names, alone, strict=True)}

    def forward(self, batch: Batch) -> Rewards:
        """Raises ConfigError where a member has no zero and unit yet, unless `raw`."""
        self._refuse_raw()
        reward_NK = self.members.every_expert(batch)
        reward_N = aggregate(reward_NK, self.config.how, self.config.caution)
        return Rewards(reward_N=reward_N, routing=_to_everyone(reward_NK), expert_reward_NK=reward_NK)

    def standardizer(self, name: str) -> Standardize:
        return self.members.standardizer(name)

    def _refuse_raw(self) -> None:
        if self.config.raw:
            return
        num_K = torch.stack([self.standardizer(name).num for name in self.names])
        if bool((num_K == 0).any()):
            raise ConfigError(
                "ensemble: members have no zero and unit yet, and raw rewards of models trained apart cannot be mixed. "
                "Fit them on one reference set, or say system.raw=true."
            )

    def stages(self, pairwise: Objective) -> list[Stage]:
        """A stage for each member; its name makes the order of its pairs. Raises ConfigError for finished runs."""
        if self.config.runs:
            raise ConfigError("system.runs: finished runs are not trained; make an ensemble of them: moreward ensemble")
        return [self._stage(k, name, pairwise) for k, name in enumerate(self.names)]

    def _stage(self, k: int, name: str, pairwise: Objective) -> Stage:
        return Stage(
            name=name,
            module=OneExpert(self.members, k),
            learn=tuple(self.member_parameters(name)),
            objective=pairwise,
            standardize=None if self.config.raw else self.standardizer(name),
        )

    def member_parameters(self, name: str) -> list[nn.Parameter]:
        members = self.members
        if isinstance(members, AdapterExperts):
            return [*learnable(members.backbone, self.config, name), *members.head(name).parameters()]
        return list(members.expert(name).parameters())

    def adapter_experts(self) -> dict[str, tuple[RewardHead, Standardize]]:
        return self.members.adapter_experts() if isinstance(self.members, AdapterExperts) else {}


def _built(run: Member, backbone: Backbone) -> Standardized:
    recipe = find_recipe(run.recipe)
    settings = recipe.Config.model_validate(run.system)
    # What is not trained is one in memory for all members; each needs modules of its own, for its adapters' hooks.
    shared = {} if settings.tune == "full" else {id(p): p for p in backbone.parameters()}
    return Standardized(recipe(settings, copy.deepcopy(backbone, shared), run.domains))


def _to_everyone(reward_NK: Tensor) -> Routing:
    num_rows, num_members = reward_NK.shape
    members_K = torch.arange(num_members, device=reward_NK.device)
    weights_NK = torch.full_like(reward_NK, 1 / num_members)
    return Routing(
        experts_NK=members_K.expand(num_rows, -1), weights_NK=weights_NK, logits_NE=torch.zeros_like(reward_NK)
    )
