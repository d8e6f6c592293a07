"""Jury: several adapters learn the same pairs, and the reward is their mean, less their disagreement.

A recipe in one file. Put it into `src/moreward/systems/`, or into a package of your own that declares

    [project.entry-points."moreward.systems"]
    jury = "my_package.jury:Recipe"

and train it with `moreward train recipe=jury system.num_jurors=5 ...`.

N conversations, J jurors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from moreward.nn.backbone import Backbone
from moreward.nn.experts import AdapterExperts, OneExpert, RewardHead, Standardize
from moreward.nn.losses import Objective
from moreward.systems._base import LoRAConfig, Presets, Stage, System, learnable, prepare_backbone
from moreward.types import Batch, Rewards


class JuryConfig(LoRAConfig):
    num_jurors: int = Field(3, ge=1)
    caution: float = Field(0.0, ge=0, description="subtract this many times the jurors' standard deviation")


class Recipe(System):
    """J adapters with a head each on one backbone; no router, and no domain labels."""

    Config = JuryConfig
    presets: ClassVar[Presets] = {"paper": {}, "practical": {}}
    tunes = ("lora",)
    config: JuryConfig

    def __init__(self, config: JuryConfig, backbone: Backbone, domains: Sequence[str]) -> None:
        super().__init__(config, backbone, domains)
        self.names = tuple(f"juror-{j}" for j in range(config.num_jurors))
        prepare_backbone(backbone, config, adapters=self.names)
        self.jurors = AdapterExperts(backbone, {name: RewardHead(backbone.hidden_size) for name in self.names})

    def forward(self, batch: Batch) -> Rewards:
        num_rows, num_jurors = len(batch), len(self.names)
        row_M = torch.arange(num_rows, device=batch.ids_NT.device).repeat_interleave(num_jurors)
        juror_M = torch.arange(num_jurors, device=batch.ids_NT.device).repeat(num_rows)
        reward_NJ = self.jurors(batch.rows(row_M), juror_M).view(num_rows, num_jurors)
        spread_N = reward_NJ.std(1, correction=0)
        return Rewards(reward_N=reward_NJ.mean(1) - self.config.caution * spread_N)

    def stages(self, pairwise: Objective) -> list[Stage]:
        return [self._stage(j, name, pairwise) for j, name in enumerate(self.names)]

    def _stage(self, j: int, name: str, pairwise: Objective) -> Stage:
        """A juror sees every pair, in an order of its own: the stage's name is part of the seed."""
        adapter = learnable(self.jurors.backbone, self.config, name)
        return Stage(
            name=f"juror/{j}",
            module=OneExpert(self.jurors, j),
            learn=(*adapter, *self.jurors.head(name).parameters()),
            objective=pairwise,
            standardize=self.jurors.standardizer(name),
        )

    def adapter_experts(self) -> dict[str, tuple[RewardHead, Standardize]]:
        return self.jurors.adapter_experts()
