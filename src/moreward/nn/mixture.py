"""Routed: a router, a bank of experts, and the way there and back. N conversations, E experts, K used."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from moreward.nn.combine import weighted_sum
from moreward.nn.routers import PromptRouter
from moreward.types import Batch, Rewards, Routing

Experts = TypeVar("Experts", bound=nn.Module)


class Routed(nn.Module, Generic[Experts]):
    """Send each conversation to the experts of its prompt and bring one reward back."""

    router: PromptRouter
    experts: Experts

    def __init__(self, router: PromptRouter, experts: Experts) -> None:
        super().__init__()
        self.router = router
        self.experts = experts

    def forward(self, batch: Batch, routing: Routing | None = None) -> Rewards:
        """`routing` of each conversation, where it is known already."""
        routing = routing or self.route(batch)
        reward_NK = self.judge(batch, routing.experts_NK)
        return Rewards(
            reward_N=weighted_sum(reward_NK, routing.weights_NK), routing=routing, expert_reward_NK=reward_NK
        )

    def route(self, batch: Batch) -> Routing:
        """Each prompt's experts, for each of its conversations."""
        routing: Routing = self.router(batch)
        return routing.rows(batch.prompt_of_N)

    def judge(self, batch: Batch, experts_NK: Tensor) -> Tensor:
        """Standardised `reward_NK` of the experts named for each row, all in one call of the bank."""
        num_rows, k = experts_NK.shape
        row_M = torch.arange(num_rows, device=experts_NK.device).repeat_interleave(k)
        return self.experts(batch.rows(row_M), experts_NK.flatten()).view(num_rows, k)  # type: ignore[no-any-return]
