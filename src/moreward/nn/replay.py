"""What a router reads of prompts, kept with a run: a gate can be fitted again when the prompts are gone.

P prompts, D hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moreward.nn.routers import PromptRouter
from moreward.types import Batch

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
DEFAULT_RIDGE = 1e-2
"""Where no prompt is held out to choose by."""


@dataclass(frozen=True)
class Replay:
    """Vectors that the gate reads, of some prompts of each domain. `domain_P` are numbers in `domains`; those that are
    `held_out_P` were not learned from."""

    hidden_PD: Tensor
    domain_P: Tensor
    held_out_P: Tensor
    domains: tuple[str, ...]

    def of(self, domains: Sequence[str]) -> Replay:
        """The prompts of these domains, numbered as they stand there."""
        number_of = {domain: n for n, domain in enumerate(domains)}
        number_E = torch.tensor([number_of.get(domain, -1) for domain in self.domains], dtype=torch.long)
        domain_P = number_E[self.domain_P]
        kept_P = domain_P >= 0
        return Replay(self.hidden_PD[kept_P], domain_P[kept_P], self.held_out_P[kept_P], tuple(domains))

    def __add__(self, other: Replay) -> Replay:
        """Both; their domains must be the same."""
        assert self.domains == other.domains
        return Replay(
            hidden_PD=torch.cat([self.hidden_PD, other.hidden_PD]),
            domain_P=torch.cat([self.domain_P, other.domain_P]),
            held_out_P=torch.cat([self.held_out_P, other.held_out_P]),
            domains=self.domains,
        )

    def num_prompts(self) -> dict[str, int]:
        """Of each domain that has some."""
        counts = torch.bincount(self.domain_P, minlength=len(self.domains)).tolist()
        return {domain: num for domain, num in zip(self.domains, counts, strict=True) if num}


@torch.no_grad()
def read_batches(router: PromptRouter, batches: Iterable[Batch], domains: Sequence[str], *, held_out: bool) -> Replay:
    """What the gate reads of the prompts of `batches`; those of no domain are left out."""
    router.eval()
    hidden, numbers = [torch.zeros(0, router.backbone.hidden_size)], [torch.zeros(0, dtype=torch.long)]
    for batch in batches:
        domain_P = batch.domain_N.new_full((len(batch.prompt_ids_PT),), -1)
        domain_P[batch.prompt_of_N] = batch.domain_N
        hidden.append(router.read(batch)[domain_P >= 0].float().cpu())
        numbers.append(domain_P[domain_P >= 0].cpu())
    domain_P = torch.cat(numbers)
    return Replay(torch.cat(hidden), domain_P, torch.full((len(domain_P),), held_out), tuple(domains))


def fit_gate(gate: nn.Linear, replay: Replay) -> Mapping[str, Any]:
    """Set a gate to the multinomial logistic regression of domains on vectors, all domains weighing the same; the
    ridge is the one that loses least on held-out prompts. Returns what the run's card shall say."""
    told_P = ~replay.held_out_P
    std_D, mean_D = torch.std_mean(replay.hidden_PD[told_P].double(), dim=0, correction=0)
    std_D = torch.where(std_D > 1e-6, std_D, 1.0)
    x_PD = (replay.hidden_PD.double() - mean_D) / std_D
    x_PD = torch.cat([x_PD, torch.ones(len(x_PD), 1, dtype=x_PD.dtype)], dim=1)
    learned, judged = ((x_PD[rows_P], replay.domain_P[rows_P]) for rows_P in (told_P, replay.held_out_P))
    ridges = RIDGES if len(judged[1]) else (DEFAULT_RIDGE,)
    fitted = {ridge: _logistic(*learned, len(replay.domains), ridge) for ridge in ridges}
    best = min(fitted, key=lambda ridge: float(_loss(fitted[ridge], *judged)) if len(judged[1]) else 0.0)
    weight_ED, bias_E = fitted[best][:, :-1] / std_D, fitted[best][:, -1]
    with torch.no_grad():
        gate.weight.copy_(weight_ED)
        gate.bias.copy_(bias_E - weight_ED @ mean_D)
    right_P = (judged[0] @ fitted[best].T).argmax(1) == judged[1]
    accuracy = {
        domain: float(right_P[judged[1] == d].double().mean())
        for d, domain in enumerate(replay.domains)
        if bool((judged[1] == d).any())
    }
    return {"ridge": best, "prompts": replay.num_prompts(), "held_out_router_accuracy": accuracy}


def _loss(weight_ED: Tensor, x_PD: Tensor, domain_P: Tensor) -> Tensor:
    """Cross-entropy, the mean over domains of each one's mean."""
    loss_P = F.cross_entropy(x_PD @ weight_ED.T, domain_P, reduction="none")
    size_E = torch.bincount(domain_P)
    return (loss_P / size_E[domain_P]).sum() / (size_E > 0).sum()


@torch.enable_grad()
def _logistic(x_PD: Tensor, domain_P: Tensor, num_domains: int, ridge: float) -> Tensor:
    """`weight_ED` of the least loss + ridge · |weight|² (the last column, the bias, is free); convex."""
    weight_ED = x_PD.new_zeros(num_domains, x_PD.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_ED], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _loss(weight_ED, x_PD, domain_P) + ridge * weight_ED[:, :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight_ED.detach()
