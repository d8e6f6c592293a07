"""Quantile heads: a distribution of the reward instead of a point, read as cautiously as wanted (arXiv 2409.10164).

N conversations, B pairs, P prompts, D hidden, K objectives (the domains), Q quantiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from moreward.nn.backbone import Backbone
from moreward.nn.experts import Standardize
from moreward.nn.losses import Objective
from moreward.systems._base import Presets, Stage, System, SystemConfig, learnable, prepare_backbone
from moreward.types import Batch, Rewards, Routing

Readout = Literal["mean", "lower", "cvar"]


class QuantileConfig(SystemConfig):
    num_quantiles: int = Field(19, ge=2, description="at the levels i / (Q + 1)")
    regression: float = Field(0.5, ge=0, description="weight of the quantile regression beside the pairwise loss")
    readout: Literal["mean", "lower", "cvar"] = Field(
        "mean", description="mean, the quantile at level, or the mean below"
    )
    level: float = Field(0.1, gt=0, lt=1, description="of lower and cvar")
    temperature: float = Field(1.0, gt=0, description="of the gate's softmax; the paper's code has 10")


class Recipe(System):
    """Q rising quantiles for each objective, mixed by a gate that reads the prompt; training and `mean` read their
    gated mean. A pair regresses its own domain's quantiles to +m for the chosen and -m for the rejected response, m
    half its margin, or ½ (pinball loss). Pairs instead of ratings, rising quantiles by cumulative softplus, LayerNorm
    in place of BatchNorm and the cautious readouts are ours."""

    Config = QuantileConfig
    paper = "arXiv:2409.10164"
    presets: ClassVar[Presets] = {
        "paper": {"tune": "frozen", "system.num_quantiles": 19, "system.temperature": 10.0},
        "practical": {},
    }
    tunes = ("full", "frozen")
    config: QuantileConfig
    level_Q: Tensor

    def __init__(self, config: QuantileConfig, backbone: Backbone, domains: Sequence[str]) -> None:
        super().__init__(config, backbone, domains)
        prepare_backbone(backbone, config, adapters=())
        size, num = backbone.hidden_size, config.num_quantiles
        self.backbone = backbone
        self.body = _block(size) if config.head_kind == "mlp" else nn.Identity()
        self.quantiles = nn.Linear(size, len(domains) * num)
        self.gate = nn.Sequential(_block(size), _block(size), _block(size), nn.Linear(size, len(domains)))
        self.register_buffer("level_Q", torch.arange(1, num + 1) / (num + 1), persistent=False)
        self.standardize = Standardize()

    @property
    def expert_labels(self) -> tuple[str, ...]:
        return self.domains

    def forward(self, batch: Batch) -> Rewards:
        quantile_NKQ = self.each_objective(batch)
        gate_NK = self.gated(batch)
        readout: Readout = "mean" if self.training else self.config.readout
        reward_NK = self._read(quantile_NKQ, readout)
        weights_NK, order_NK = gate_NK.sort(dim=1, descending=True)
        routing = Routing(experts_NK=order_NK, weights_NK=weights_NK, logits_NE=gate_NK.log())
        return Rewards(
            reward_N=self.standardize((gate_NK * reward_NK).sum(1)),
            routing=routing,
            expert_reward_NK=self.standardize(reward_NK.gather(1, order_NK)),
            aux_loss=self.config.regression * self._regression(quantile_NKQ, batch) if batch.is_pairs else None,
        )

    def distribution(self, batch: Batch) -> Tensor:
        """`quantile_NQ`: the gated quantiles, in the unit of the reward. Mixed quantiles are the quantiles of the mixed
        reward only where the objectives move together."""
        return self.standardize(torch.einsum("nk,nkq->nq", self.gated(batch), self.each_objective(batch)))  # type: ignore[no-any-return]

    def each_objective(self, batch: Batch) -> Tensor:
        """`quantile_NKQ` before standardisation, rising along Q."""
        hidden_ND = self.backbone(batch.ids_NT, batch.mask_NT)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            raw_NKQ = self.quantiles(self.body(hidden_ND.float())).unflatten(1, (len(self.domains), -1))
            steps_NKQ = torch.cat([raw_NKQ[..., :1], F.softplus(raw_NKQ[..., 1:])], dim=-1)
            return steps_NKQ.cumsum(-1)

    def gated(self, batch: Batch) -> Tensor:
        """`gate_NK`: each conversation's weights, read from its prompt."""
        prompt_PD = self.backbone(batch.prompt_ids_PT, batch.prompt_mask_PT)
        with torch.autocast(prompt_PD.device.type, enabled=False):
            gate_PK = (self.gate(prompt_PD.float()) / self.config.temperature).softmax(-1)
        return gate_PK[batch.prompt_of_N]  # type: ignore[no-any-return]

    def _read(self, quantile_NKQ: Tensor, readout: Readout) -> Tensor:
        """One number of Q, for each objective."""
        if readout == "mean":
            return quantile_NKQ.mean(-1)
        num_below = max(1, int((self.level_Q <= self.config.level + 1e-6).sum()))
        below_NKQ = quantile_NKQ[..., :num_below]
        return below_NKQ[..., -1] if readout == "lower" else below_NKQ.mean(-1)

    def _regression(self, quantile_NKQ: Tensor, batch: Batch) -> Tensor:
        """Mean pinball loss u (τ - [u < 0]), u = target - quantile, of the rows whose domain has an objective."""
        half_B = torch.full((len(batch) // 2,), 0.5, device=quantile_NKQ.device)
        if batch.margin_B is not None:
            half_B = torch.where(batch.margin_B > 0, batch.margin_B / 2, half_B)
        known_N = batch.domain_N >= 0
        own_NQ = quantile_NKQ[torch.arange(len(batch), device=known_N.device), batch.domain_N.clamp(min=0)]
        error_NQ = torch.cat([half_B, -half_B])[:, None] - own_NQ
        loss_N = (error_NQ * (self.level_Q - (error_NQ < 0).to(error_NQ.dtype))).mean(1)
        return (loss_N * known_N).sum() / known_N.sum().clamp(min=1)

    def stages(self, pairwise: Objective) -> list[Stage]:
        own = [*self.body.parameters(), *self.quantiles.parameters(), *self.gate.parameters()]
        learn = (*learnable(self.backbone, self.config), *own)
        return [Stage(name="reward", module=self, learn=learn, objective=pairwise, standardize=self.standardize)]


def _block(size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, size, bias=False), nn.ReLU(), nn.LayerNorm(size))
