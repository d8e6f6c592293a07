"""Routers: scores for the experts, and which of them are used. One class per rule.

N rows, P prompts, D hidden, E experts, K experts used. The `gate` is the linear layer inside a router.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moreward.errors import ConfigError
from moreward.nn.backbone import Backbone
from moreward.nn.balance import importance_and_load
from moreward.types import Batch, Routing


def choose(logits_NE: Tensor, top_k: int) -> Routing:
    """The `top_k` largest logits, best first, weighted by a softmax over those kept."""
    kept_NK, experts_NK = logits_NE.topk(top_k, dim=-1)
    return Routing(experts_NK=experts_NK, weights_NK=kept_NK.softmax(-1), logits_NE=logits_NE)


def check_top_k(top_k: int, num_experts: int) -> None:
    if not 1 <= top_k <= num_experts:
        raise ConfigError(f"system.top_k: must be from 1 to the number of experts, {num_experts} (got {top_k})")


class TopKRouter(nn.Module):
    """Linear gate, the k best experts."""

    def __init__(self, size: int, num_experts: int, top_k: int = 1) -> None:
        super().__init__()
        check_top_k(top_k, num_experts)
        self.top_k = top_k
        self.gate = nn.Linear(size, num_experts)
        nn.init.normal_(self.gate.weight, std=0.02)
        nn.init.zeros_(self.gate.bias)

    def forward(self, hidden_ND: Tensor) -> Routing:
        with torch.autocast(hidden_ND.device.type, enabled=False):
            return choose(self.gate(hidden_ND.float()), self.top_k)


class NoisyTopKRouter(nn.Module):
    """Noisy top-k gating (Shazeer et al., arXiv 1701.06538, eq. 3-5).

    q = h W_g + ε ⊙ (softplus(h W_n) + 0.01) with ε ~ N(0, 1) in training only; the k largest are kept and
    softmaxed. Both matrices start at zero, so that all experts start equal. `aux_loss` is CV²(importance) +
    CV²(load), without a weight.
    """

    min_noise = 0.01

    def __init__(self, size: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        check_top_k(top_k, num_experts)
        self.top_k = top_k
        self.gate = nn.Parameter(torch.zeros(size, num_experts))
        self.noise = nn.Parameter(torch.zeros(size, num_experts))

    def forward(self, hidden_ND: Tensor) -> Routing:
        clean_NE = hidden_ND @ self.gate
        sd_NE = F.softplus(hidden_ND @ self.noise) + self.min_noise
        noisy_NE = clean_NE + torch.randn_like(clean_NE) * sd_NE if self.training else clean_NE
        routing = choose(noisy_NE, self.top_k)
        gates_NE = torch.zeros_like(noisy_NE).scatter(-1, routing.experts_NK, routing.weights_NK)
        load_E = self.load(clean_NE, noisy_NE, sd_NE).sum(0)
        return Routing(
            experts_NK=routing.experts_NK,
            weights_NK=routing.weights_NK,
            logits_NE=noisy_NE,
            aux_loss=importance_and_load(gates_NE, load_E),
        )

    def load(self, clean_NE: Tensor, noisy_NE: Tensor, sd_NE: Tensor) -> Tensor:
        """P(expert e stays among the k largest under fresh noise) = Φ((clean_e - threshold_e) / sd_e), where
        threshold_e is the k-th largest of the *other* noisy logits; with k = E nothing can drop out."""
        num_experts = noisy_NE.shape[-1]
        if self.top_k == num_experts:
            return torch.ones_like(clean_NE)
        top = noisy_NE.topk(self.top_k + 1, dim=-1).values
        kth_N1, next_N1 = top[:, self.top_k - 1 : self.top_k], top[:, self.top_k :]
        # Without an expert that is in, the k-th of the others is the old (k+1)-th; without one that is out, the k-th.
        threshold_NE = torch.where(noisy_NE >= kth_N1, next_N1, kth_N1)
        kept_NE: Tensor = torch.special.ndtr((clean_NE - threshold_NE) / sd_NE)
        return kept_NE


class PromptRouter(nn.Module):
    """Reads the prompt alone, so that every response to it goes to the same experts.

    `adapter` is the router's index in the backbone's bank, None where the router has the backbone to itself or reads
    no further than the trunk, the layers below all adapters (`reads_trunk`).
    """

    def __init__(
        self, backbone: Backbone, router: nn.Module, adapter: int | None = None, *, reads_trunk: bool = False
    ) -> None:
        super().__init__()
        self.reads_trunk = reads_trunk
        self.backbone = backbone
        self.router = router
        self.adapter = adapter

    def forward(self, batch: Batch) -> Routing:
        """One row per prompt of the batch."""
        return self.router(self.read(batch))  # type: ignore[no-any-return]

    def read(self, batch: Batch) -> Tensor:
        """`hidden_PD`: what the gate reads of each prompt of the batch."""
        if self.reads_trunk:
            return self.backbone.read_trunk(batch.prompt_ids_PT, batch.prompt_mask_PT)
        adapter_P = None
        if self.adapter is not None:
            adapter_P = batch.prompt_ids_PT.new_full((len(batch.prompt_ids_PT),), self.adapter)
        return self.backbone(batch.prompt_ids_PT, batch.prompt_mask_PT, adapter_P)  # type: ignore[no-any-return]
