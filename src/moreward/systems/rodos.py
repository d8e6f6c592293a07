"""RODOS: one whole reward model per domain and a router model (arXiv 2407.17546, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import nn

from moreward.nn.backbone import Backbone
from moreward.nn.experts import SeparateExperts, SoloExpert, Standardize
from moreward.nn.mixture import Routed
from moreward.nn.routers import PromptRouter, TopKRouter
from moreward.systems._base import (
    PAPER_TRAINING,
    Presets,
    RoutedSystem,
    SystemConfig,
    learnable,
    new_head,
    own_copy,
    prepare_backbone,
)


class RodosConfig(SystemConfig):
    top_k: int = Field(1, ge=1, description="experts used per prompt; the paper uses the best one")


class Recipe(RoutedSystem):
    """E + 1 models of one shape. A new domain costs one of them and a router; the others never change."""

    Config = RodosConfig
    paper = "arXiv:2407.17546"
    presets: ClassVar[Presets] = {"paper": {**PAPER_TRAINING, "tune": "full", "system.top_k": 1}, "practical": {}}
    tunes = ("full", "frozen")
    config: RodosConfig
    routed: Routed[SeparateExperts]

    def __init__(self, config: RodosConfig, backbone: Backbone, domains: Sequence[str]) -> None:
        super().__init__(config, backbone, domains)
        prepare_backbone(backbone, config, adapters=())
        size = backbone.hidden_size
        experts = SeparateExperts(
            {
                name: SoloExpert(own_copy(backbone, config.tune), new_head(backbone, config))
                for name in self.expert_names
            }
        )
        self.routed = Routed(PromptRouter(backbone, TopKRouter(size, len(domains), config.top_k)), experts)

    def expert_parameters(self, name: str) -> list[nn.Parameter]:
        expert = self.routed.experts.expert(name)
        return [*learnable(expert.backbone, self.config), *expert.head.parameters()]

    def router_parameters(self) -> list[nn.Parameter]:
        router = self.routed.router
        return [*learnable(router.backbone, self.config), *router.router.parameters()]

    def standardizer(self, name: str) -> Standardize:
        return self.routed.experts.expert(name).standardize

    def num_active_parameters(self) -> int:
        experts = list(self.routed.experts.experts.values())
        idle = {p for e in experts[self.config.top_k :] for p in e.parameters()}
        used = {p for e in experts[: self.config.top_k] for p in e.parameters()} | set(self.routed.router.parameters())
        return self.num_parameters() - sum(p.numel() for p in idle - used)
