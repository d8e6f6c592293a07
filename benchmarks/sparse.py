"""Contestants of the sparse expert layer: forward and backward of E feed-forward experts, the best two per token.

T tokens, D hidden, E experts, F width, K experts used.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

from benchmarks.peers import Run
from moreward.nn.experts import FeedForwardExperts

SIZE, TOP_K = 384, 2


@use_experts_implementation(has_gate=False, has_bias=True)
class StackedExperts(nn.Module):
    """Experts as transformers keeps them: one stack of weights. `forward` is its eager loop; the decorator turns to
    `grouped_mm` where the configuration says so."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        self.num_experts = config.num_experts
        self.act_fn = nn.GELU()
        self.up_proj = nn.Parameter(torch.empty(config.num_experts, config.width, SIZE))
        self.up_proj_bias = nn.Parameter(torch.zeros(config.num_experts, config.width))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, SIZE, config.width))
        self.down_proj_bias = nn.Parameter(torch.zeros(config.num_experts, SIZE))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        mixed = torch.zeros_like(hidden_states)
        mask = F.one_hot(top_k_index, num_classes=self.num_experts).permute(2, 1, 0)
        for e in mask.sum((1, 2)).nonzero().flatten().tolist():
            place, token = torch.where(mask[e])
            up = self.act_fn(F.linear(hidden_states[token], self.up_proj[e], self.up_proj_bias[e]))
            down = F.linear(up, self.down_proj[e], self.down_proj_bias[e])
            mixed = mixed.index_add(0, token, down * top_k_weights[token, place, None])
        return mixed


def _inputs(tokens: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(tokens, SIZE, generator=generator, requires_grad=True)
    kept_TK, experts_TK = torch.randn(tokens, num_experts, generator=generator).topk(TOP_K)
    return hidden_TD, experts_TK, kept_TK.softmax(-1)


def _weights(num_experts: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    up_EFD = torch.randn(num_experts, width, SIZE, generator=generator) / SIZE**0.5
    return up_EFD, torch.randn(num_experts, SIZE, width, generator=generator) / width**0.5


def hf(*, tokens: int, num_experts: int, width: int, implementation: str) -> Run:
    config = SimpleNamespace(num_experts=num_experts, width=width, _experts_implementation=implementation)
    layer = StackedExperts(config)
    with torch.no_grad():
        layer.up_proj.copy_(_weights(num_experts, width)[0])
        layer.down_proj.copy_(_weights(num_experts, width)[1])
    return _run(layer, tokens, num_experts)


def ours(*, tokens: int, num_experts: int, width: int) -> Run:
    layer = FeedForwardExperts(num_experts, SIZE, width)
    up_EFD, down_EDF = _weights(num_experts, width)
    with torch.no_grad():
        for e, expert in enumerate(layer.experts):
            expert[0].weight.copy_(up_EFD[e])
            expert[2].weight.copy_(down_EDF[e])
            expert[0].bias.zero_()
            expert[2].bias.zero_()
    return _run(layer, tokens, num_experts)


def _run(layer: nn.Module, tokens: int, num_experts: int) -> Run:
    """Outputs: some of the result and some of the gradient of the input, on one scale."""
    hidden_TD, experts_TK, weights_TK = _inputs(tokens, num_experts)

    def run() -> Tensor:
        layer.zero_grad(set_to_none=True)
        hidden_TD.grad = None
        mixed_TD = layer(hidden_TD, experts_TK, weights_TK)
        mixed_TD.square().mean().backward()
        assert hidden_TD.grad is not None
        parts = [mixed_TD.detach().flatten()[:256], hidden_TD.grad.flatten()[:256]]
        return torch.cat([part / part.abs().max() for part in parts])

    return run
