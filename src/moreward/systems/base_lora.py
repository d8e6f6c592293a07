"""BaseLoRA: one adapter for all domains (arXiv 2407.17546, section 4.3). Does LoRA alone explain ARLISS?

It is also the single model of ARLISS's budget: with rank (E + 1) times ARLISS's, and alpha likewise, it stores as
many adapter parameters at the same scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from moreward.nn.backbone import Backbone
from moreward.nn.experts import AdapterExperts, OneExpert, RewardHead, Standardize
from moreward.nn.losses import Objective
from moreward.systems._base import (
    PAPER_LORA,
    PAPER_TRAINING,
    LoRAConfig,
    Presets,
    Stage,
    System,
    learnable,
    new_head,
    prepare_backbone,
)
from moreward.types import Batch, Rewards

SHARED = "shared"


class Recipe(System):
    """Frozen backbone, one adapter, head."""

    Config = LoRAConfig
    paper = "arXiv:2407.17546"
    presets: ClassVar[Presets] = {"paper": {**PAPER_TRAINING, **PAPER_LORA, "tune": "lora"}, "practical": {}}
    tunes = ("lora", "frozen")
    expert: OneExpert[AdapterExperts]

    def __init__(self, config: LoRAConfig, backbone: Backbone, domains: Sequence[str]) -> None:
        super().__init__(config, backbone, domains)
        prepare_backbone(backbone, config, adapters=[SHARED])
        heads = {SHARED: new_head(backbone, config)}
        self.expert = OneExpert(AdapterExperts(backbone, heads), index=0)

    def forward(self, batch: Batch) -> Rewards:
        return self.expert(batch)  # type: ignore[no-any-return]

    def stages(self, pairwise: Objective) -> list[Stage]:
        experts = self.expert.experts
        learn = (*learnable(experts.backbone, self.config, SHARED), *experts.head(SHARED).parameters())
        return [
            Stage(
                name="reward",
                module=self.expert,
                learn=learn,
                objective=pairwise,
                standardize=experts.standardizer(SHARED),
            )
        ]

    def adapter_experts(self) -> dict[str, tuple[RewardHead, Standardize]]:
        return self.expert.experts.adapter_experts()
