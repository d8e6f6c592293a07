"""Baseline: one reward model for all domains (arXiv 2407.17546, section 4.3). What everything else must beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moreward.nn.backbone import Backbone
from moreward.nn.experts import SoloExpert
from moreward.nn.losses import Objective
from moreward.systems._base import Stage, System, SystemConfig, learnable, new_head, prepare_backbone
from moreward.types import Batch, Rewards


class Recipe(System):
    """Backbone, head. Trained once on the shuffled union of the domains."""

    paper = "arXiv:2407.17546"
    tunes = ("full", "frozen")
    config: Any

    def __init__(self, config: SystemConfig, backbone: Backbone, domains: Sequence[str]) -> None:
        super().__init__(config, backbone, domains)
        prepare_backbone(backbone, config, adapters=())
        self.expert = SoloExpert(backbone, new_head(backbone, config))

    def forward(self, batch: Batch) -> Rewards:
        return self.expert(batch)  # type: ignore[no-any-return]

    def stages(self, pairwise: Objective) -> list[Stage]:
        learn = (*learnable(self.expert.backbone, self.config), *self.expert.head.parameters())
        return [Stage(name="reward", module=self, learn=learn, objective=pairwise, standardize=self.expert.standardize)]
