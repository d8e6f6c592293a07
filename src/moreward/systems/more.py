"""MoRE: a sparse expert layer inside one reward model (arXiv 2407.17546, section 3.1).

backbone → LayerNorm → noisy top-k gate over feed-forward experts → weighted sum → LayerNorm → regression layer.
N conversations, P prompts, D hidden, K experts used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from moreward.nn.backbone import Backbone
from moreward.nn.experts import FeedForwardExperts, RewardHead, Standardize
from moreward.nn.losses import Objective
from moreward.nn.routers import NoisyTopKRouter
from moreward.systems._base import PAPER_TRAINING, Presets, Stage, System, SystemConfig, learnable, prepare_backbone
from moreward.types import Batch, Rewards


class MoREConfig(SystemConfig):
    """Five experts of width 4D fit the paper's printed sizes; it does not give top_k, activation or balance loss."""

    num_experts: int = Field(5, ge=1)
    top_k: int = Field(2, ge=1)
    balance: float = Field(0.01, ge=0, description="weight of the balance loss CV²(importance) + CV²(load)")
    gate_on: Literal["conversation", "prompt"] = "conversation"
    width: int = Field(4, ge=1, description="inner width of an expert, in hidden sizes of the backbone")


class Recipe(System):
    """One model, trained once on all data without domain labels. With `gate_on: prompt` chosen and rejected always
    use the same experts."""

    Config = MoREConfig
    paper = "arXiv:2407.17546"
    presets: ClassVar[Presets] = {
        "paper": {
            **PAPER_TRAINING,
            "tune": "full",
            "pooling": "first",
            "system.num_experts": 5,
            "system.top_k": 2,
            "system.balance": 0.01,
            "system.gate_on": "conversation",
        },
        "practical": {},
    }
    tunes = ("full", "frozen")
    config: MoREConfig

    def __init__(self, config: MoREConfig, backbone: Backbone, domains: Sequence[str]) -> None:
        super().__init__(config, backbone, domains)
        prepare_backbone(backbone, config, adapters=())
        size = backbone.hidden_size
        self.backbone = backbone
        self.norm_in = nn.LayerNorm(size)
        self.router = NoisyTopKRouter(size, config.num_experts, config.top_k)
        self.experts = FeedForwardExperts(config.num_experts, size, config.width * size)
        self.norm_out = nn.LayerNorm(size)
        self.head = RewardHead(size, "linear")
        self.standardize = Standardize()

    @classmethod
    def equal_budget(cls, config: MoREConfig) -> Mapping[str, Mapping[str, Any]]:
        """One dense network as wide as all the experts together, or as those used."""
        one = {"num_experts": 1, "top_k": 1}
        return {
            "total": {**one, "width": config.num_experts * config.width},
            "active": {**one, "width": config.top_k * config.width},
        }

    @property
    def expert_labels(self) -> tuple[str, ...]:
        return tuple(f"ffn{i}" for i in range(self.config.num_experts))

    def forward(self, batch: Batch) -> Rewards:
        hidden_ND = self.norm_in(self.backbone(batch.ids_NT, batch.mask_NT))
        with torch.autocast(hidden_ND.device.type, enabled=False):
            if self.config.gate_on == "prompt":
                prompt_PD = self.norm_in(self.backbone(batch.prompt_ids_PT, batch.prompt_mask_PT))
                routing = self.router(prompt_PD.float()).rows(batch.prompt_of_N)
            else:
                routing = self.router(hidden_ND.float())
            mixed_ND = self.experts(hidden_ND.float(), routing.experts_NK, routing.weights_NK)
            reward_N = self.standardize(self.head(self.norm_out(mixed_ND)))
        return Rewards(reward_N=reward_N, routing=routing, aux_loss=self.config.balance * routing.aux_loss)

    def stages(self, pairwise: Objective) -> list[Stage]:
        backbone_parameters = set(self.backbone.parameters())
        own = [p for p in self.parameters() if p not in backbone_parameters]
        return [
            Stage(
                name="reward",
                module=self,
                learn=(*learnable(self.backbone, self.config), *own),
                objective=pairwise,
                standardize=self.standardize,
            )
        ]

    def num_active_parameters(self) -> int:
        one_expert = sum(p.numel() for p in self.experts.experts[0].parameters())
        return self.num_parameters() - (self.config.num_experts - self.config.top_k) * one_expert
