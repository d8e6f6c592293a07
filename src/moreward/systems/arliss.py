"""ARLISS: router and experts are adapters on one backbone (arXiv 2407.17546, section 3.3).

The paper switches adapters; here a batch meets a different adapter in each row, in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import nn

from moreward.nn.backbone import Backbone
from moreward.nn.experts import AdapterExperts, OwnExperts, RewardHead, Standardize
from moreward.nn.losses import Objective
from moreward.nn.mixture import Routed
from moreward.nn.routers import PromptRouter, TopKRouter
from moreward.systems._base import (
    PAPER_LORA,
    PAPER_TRAINING,
    ROUTER,
    LoRAConfig,
    Presets,
    RoutedSystem,
    Stage,
    learnable,
    new_head,
    prepare_backbone,
)


class ArlissConfig(LoRAConfig):
    top_k: int = Field(1, ge=1, description="experts used per prompt; the paper uses the best one")
    train_together: bool = Field(False, description="all experts in one pass over mixed batches, not one by one")
    router_reads: Literal["backbone", "trunk"] = Field(
        "backbone", description="trunk: the router stops below the adapters (needs adapter_layers) and has none"
    )

    @model_validator(mode="after")
    def _needs_a_trunk(self) -> Self:
        if self.router_reads == "trunk" and not (self.tune == "lora" and self.adapter_layers):
            raise ValueError("router_reads=trunk needs tune=lora and adapter_layers, the layers that have adapters")
        return self


class Recipe(RoutedSystem):
    """E reward adapters, each with its own head, and one router adapter with a gate. The backbone stays frozen."""

    Config = ArlissConfig
    paper = "arXiv:2407.17546"
    presets: ClassVar[Presets] = {
        "paper": {**PAPER_TRAINING, **PAPER_LORA, "tune": "lora", "system.top_k": 1},
        "practical": {},
    }
    tunes = ("lora", "frozen")
    config: ArlissConfig
    routed: Routed[AdapterExperts]

    def __init__(self, config: ArlissConfig, backbone: Backbone, domains: Sequence[str]) -> None:
        super().__init__(config, backbone, domains)
        # The router's adapter comes last, so that adapter e and expert e are the same number.
        reads_trunk = config.router_reads == "trunk"
        prepare_backbone(backbone, config, adapters=[*self.expert_names, *([] if reads_trunk else [ROUTER])])
        size = backbone.hidden_size
        heads = {name: new_head(backbone, config) for name in self.expert_names}
        adapter = len(domains) if backbone.bank is not None and not reads_trunk else None
        gate = TopKRouter(size, len(domains), config.top_k)
        router = PromptRouter(backbone, gate, adapter, reads_trunk=reads_trunk)
        self.routed = Routed(router, AdapterExperts(backbone, heads))

    def stages(self, pairwise: Objective) -> list[Stage]:
        if not self.config.train_together:
            return super().stages(pairwise)
        experts = tuple(tuple(self.expert_parameters(name)) for name in self.expert_names)
        together = Stage(
            name="experts",
            module=OwnExperts(self.routed.experts),
            learn=tuple(parameter for expert in experts for parameter in expert),
            objective=pairwise,
            experts=experts,
            standardizers=tuple(self.standardizer(name) for name in self.expert_names),
        )
        return [together, self.router_stage()]

    def expert_parameters(self, name: str) -> list[nn.Parameter]:
        experts = self.routed.experts
        return [*learnable(experts.backbone, self.config, name), *experts.head(name).parameters()]

    def router_parameters(self) -> list[nn.Parameter]:
        router = self.routed.router
        adapter = [] if router.reads_trunk else learnable(router.backbone, self.config, ROUTER)
        return [*adapter, *router.router.parameters()]

    def standardizer(self, name: str) -> Standardize:
        return self.routed.experts.standardizer(name)

    def adapter_experts(self) -> dict[str, tuple[RewardHead, Standardize]]:
        return self.routed.experts.adapter_experts()

    def num_active_parameters(self) -> int:
        idle = [p for name in self.expert_names[self.config.top_k :] for p in self.expert_parameters(name)]
        return self.num_parameters() - sum(p.numel() for p in idle)
