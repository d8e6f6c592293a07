"""Shared expert: one expert for every conversation, and a small own one per domain that is added to it.

N conversations, B pairs (N = 2B, chosen first), E domains, K own experts used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from moreward.nn.backbone import Backbone
from moreward.nn.experts import AdapterExperts, OneExpert, OwnExperts, RewardHead, Standardize
from moreward.nn.losses import Objective
from moreward.nn.mixture import Routed
from moreward.nn.routers import PromptRouter, TopKRouter
from moreward.systems._base import (
    ROUTER,
    GatedSystem,
    LoRAConfig,
    Presets,
    Stage,
    learnable,
    new_head,
    prepare_backbone,
)
from moreward.types import Batch, Rewards, Routing

SHARED = "@shared"
"""The shared expert's adapter. The sign keeps it apart from any domain's name."""
SHARES = torch.linspace(0, 1, 21)
SWEEPS = 4
RIDGES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0)
DEFAULT_RIDGE = 1e-1
"""Where no pair of the domain is held out to choose by."""


class SharedExpertConfig(LoRAConfig):
    top_k: int | None = Field(None, ge=1, description="own experts added per prompt; unset: all, each by its weight")
    own_head: Literal["linear", "mlp"] = Field("linear", description="of the own experts; the shared one has `head`")
    shrink: bool = Field(True, description="let held-out pairs say how much of each own expert is added")

    @property
    def solves(self) -> bool:
        """Whether own experts are fitted in closed form: linear ones on vectors that do not change."""
        return self.tune == "frozen" and self.own_head == "linear"


class SharedAndOwn(nn.Module):
    """Expert e is the shared expert plus `share_E[e]` of own expert e: both in one pass, each row twice. The rewards
    are raw."""

    def __init__(self, parts: AdapterExperts, num_own: int) -> None:
        super().__init__()
        self.parts = parts
        self.num_own = num_own
        self.share_E = nn.Parameter(torch.ones(num_own))

    def forward(self, batch: Batch, expert_N: Tensor) -> Tensor:
        """Row n under expert `expert_N[n]`; -1 is the shared expert alone."""
        num_rows = len(expert_N)
        twice_M = torch.arange(num_rows, device=expert_N.device).repeat(2)
        part_M = torch.cat([torch.full_like(expert_N, self.num_own), expert_N])
        shared_N, own_N = self.parts(batch.rows(twice_M), part_M).split(num_rows)
        share_N = self.share_E[expert_N.clamp(min=0)] * (expert_N >= 0)
        return shared_N + share_N * own_N  # type: ignore[no-any-return]


class Recipe(GatedSystem):
    """reward = r_shared + Σ_d g_d(x) · s_d · r_own_d: the gate g reads the prompt x, the shares s_d lie in [0, 1].

    A shared expert beside routed ones is DeepSeekMoE's (arXiv 2401.06066, section 3.1.2), there feed-forward networks
    in a layer; dense soft gates over LoRA experts are LoRAMoE's (arXiv 2312.09979). Here the experts are reward models
    and an own expert learns what the shared one gets wrong. Stages: the shared expert on all pairs; all own experts
    in one pass over mixed batches, each on its domain's; the router; the shares, on held-out pairs. On a frozen
    backbone linear own experts are solved for instead, one after the other.
    """

    Config = SharedExpertConfig
    presets: ClassVar[Presets] = {"paper": {}, "practical": {}}
    tunes = ("lora", "frozen")
    mixes: ClassVar[str] = (
        "by the gate, which on every prompt adds what all own experts say, each by its weight: those that stay have "
        "other weights, and what comes or goes counts on old domains too"
    )
    config: SharedExpertConfig
    routed: Routed[SharedAndOwn]

    def __init__(self, config: SharedExpertConfig, backbone: Backbone, domains: Sequence[str]) -> None:
        super().__init__(config, backbone, domains)
        # Adapter e and part e are the same number: the own experts, the shared one; the router has no part.
        prepare_backbone(backbone, config, adapters=[*self.expert_names, SHARED, ROUTER])
        num_own = len(domains)
        own = {n: RewardHead(backbone.hidden_size, config.own_head, backbone.width) for n in self.expert_names}
        for head in own.values():
            nn.init.zeros_(head.last.weight)  # adding an expert that has learned nothing changes no reward
        parts = AdapterExperts(backbone, {**own, SHARED: new_head(backbone, config)})
        gate = TopKRouter(backbone.hidden_size, num_own, config.top_k or num_own)
        router = PromptRouter(backbone, gate, num_own + 1 if backbone.bank is not None else None)
        self.routed = Routed(router, SharedAndOwn(parts, num_own))
        self.standardize = Standardize()

    def forward(self, batch: Batch, routing: Routing | None = None) -> Rewards:
        """The weights sum to 1, so the sum and each expert have the same zero and unit."""
        output: Rewards = self.routed(batch, routing)
        assert output.expert_reward_NK is not None
        reward_N, expert_reward_NK = self.standardize(output.reward_N), self.standardize(output.expert_reward_NK)
        return replace(output, reward_N=reward_N, expert_reward_NK=expert_reward_NK)

    def judge(self, batch: Batch, experts_NK: Tensor) -> Tensor:
        return self.standardize(self.routed.judge(batch, experts_NK))  # type: ignore[no-any-return]

    def standardizer(self, name: str) -> Standardize:
        """One for all: what own experts learn is in the unit of the shared one."""
        return self.standardize

    def expert_parameters(self, name: str) -> list[nn.Parameter]:
        parts = self.routed.experts.parts
        return [*learnable(parts.backbone, self.config, name), *parts.head(name).parameters()]

    def router_parameters(self) -> list[nn.Parameter]:
        router = self.routed.router
        return [*learnable(router.backbone, self.config, ROUTER), *router.router.parameters()]

    def stages(self, pairwise: Objective) -> list[Stage]:
        solved = [self.expert_stage(domain, pairwise) for domain in self.domains]
        return [
            self._shared_stage(pairwise),
            *(solved if self.config.solves else [self._own_stage(pairwise)]),
            self.router_stage(),
            replace(self._shares_stage(self.domains, pairwise), standardize=self.standardize),
        ]

    def new_domain_stages(self, domain: str, pairwise: Objective) -> list[Stage]:
        return [*super().new_domain_stages(domain, pairwise), self._shares_stage([domain], pairwise)]

    def expert_stage(self, domain: str, pairwise: Objective) -> Stage:
        """One own expert on what the shared one leaves over. The zero and unit of the whole stay as they are."""
        stage = replace(super().expert_stage(domain, pairwise), standardize=None)
        solve = partial(solve_own, self.routed.experts, self.domains.index(domain))
        return replace(stage, solve=solve) if self.config.solves else stage

    def _shared_stage(self, pairwise: Objective) -> Stage:
        parts = self.routed.experts.parts
        return Stage(
            name="shared",
            module=OneExpert(parts, len(self.domains)),
            learn=tuple(self.expert_parameters(SHARED)),
            objective=pairwise,
        )

    def _own_stage(self, pairwise: Objective) -> Stage:
        experts = tuple(tuple(self.expert_parameters(name)) for name in self.expert_names)
        return Stage(
            name="own",
            module=OwnExperts(self.routed.experts),
            learn=tuple(parameter for expert in experts for parameter in expert),
            objective=pairwise,
            experts=experts,
        )

    def _shares_stage(self, domains: Sequence[str], pairwise: Objective) -> Stage:
        def solve(_: Iterable[Batch], held_out: Iterable[Batch]) -> Mapping[str, Any]:
            if self.config.shrink:
                choose_shares(self, [self.domains.index(domain) for domain in domains], held_out)
            shares = self.routed.experts.share_E.tolist()
            return {"shares": dict(zip(self.domains, shares, strict=True))}

        return Stage(name="shares", module=self, learn=(self.routed.experts.share_E,), objective=pairwise, solve=solve)

    def num_active_parameters(self) -> int:
        top_k = self.config.top_k or len(self.domains)
        idle = [p for name in self.expert_names[top_k:] for p in self.expert_parameters(name)]
        return self.num_parameters() - sum(p.numel() for p in idle)


@dataclass(frozen=True)
class Residuals:
    """What an own expert is fitted on: B pairs as differences of inputs, beside what the shared expert says already."""

    x_BD: Tensor
    given_B: Tensor
    weight_B: Tensor

    def loss(self, weight_D: Tensor) -> Tensor:
        loss_B = -F.logsigmoid(self.given_B + self.x_BD @ weight_D)
        return (loss_B * self.weight_B).mean()


def solve_own(
    experts: SharedAndOwn, index: int, train: Iterable[Batch], held_out: Iterable[Batch]
) -> Mapping[str, Any]:
    """Logistic regression on what the shared expert leaves over, with the ridge that loses least on held-out pairs."""
    learned = residuals(experts.parts, experts.num_own, train)
    judged = residuals(experts.parts, experts.num_own, held_out)
    assert learned is not None
    ridges = RIDGES if judged is not None else (DEFAULT_RIDGE,)
    fitted = {ridge: fit_ridge(learned, ridge) for ridge in ridges}
    best = min(fitted, key=lambda ridge: float(judged.loss(fitted[ridge])) if judged is not None else 0.0)
    head = experts.parts.head(list(experts.parts.heads)[index])
    head.last.weight.copy_(fitted[best][None])
    return {"ridge": best, "pairs": len(learned.x_BD)}


def residuals(parts: AdapterExperts, shared: int, batches: Iterable[Batch]) -> Residuals | None:
    """Of pairs; None where there are none."""
    rows = [_residuals(parts, shared, batch) for batch in batches]
    return Residuals(*(torch.cat(column) for column in zip(*rows, strict=True))) if rows else None


def _residuals(parts: AdapterExperts, shared: int, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    num_pairs = len(batch) // 2
    shared_N = batch.domain_N.new_full((len(batch),), shared)
    x_ND, reward_N = parts.read(batch, shared_N), parts(batch, shared_N)
    given_B = reward_N[:num_pairs] - reward_N[num_pairs:]
    given_B = given_B if batch.margin_B is None else given_B - batch.margin_B
    weight_B = torch.ones_like(given_B) if batch.weight_B is None else batch.weight_B
    return x_ND[:num_pairs] - x_ND[num_pairs:], given_B, weight_B


@torch.enable_grad()
def fit_ridge(pairs: Residuals, ridge: float) -> Tensor:
    """`weight_D` of the least mean loss + ridge · |weight|²; the objective is convex."""
    weight_D = pairs.x_BD.new_zeros(pairs.x_BD.shape[1], requires_grad=True)
    # Any gradient is worth a step: where the shared expert is nearly right they are small.
    optimizer = torch.optim.LBFGS(
        [weight_D], max_iter=60, tolerance_grad=0.0, tolerance_change=1e-24, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = pairs.loss(weight_D) + ridge * weight_D.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight_D.detach()


@dataclass(frozen=True)
class Differences:
    """What each expert adds to the reward difference of held-out pairs, the own ones already times their gate."""

    shared_B: Tensor
    own_BE: Tensor
    domain_B: Tensor

    def loss(self, share_E: Tensor) -> float:
        """Mean over the domains of each one's mean -log σ(Δ)."""
        loss_B = -F.logsigmoid(self.shared_B + self.own_BE @ share_E)
        return float(torch.stack([loss_B[self.domain_B == d].mean() for d in sorted({*self.domain_B.tolist()})]).mean())


def choose_shares(system: Recipe, chosen: Sequence[int], held_out: Iterable[Batch]) -> None:
    """Set the shares of the experts `chosen` by held-out pairs, as the router mixes them; without any, leave them."""
    measured = [parts_of(system, batch) for batch in held_out]
    if measured:
        columns = zip(*((m.shared_B, m.own_BE, m.domain_B) for m in measured), strict=True)
        parts = Differences(*(torch.cat(column) for column in columns))
        share_E = system.routed.experts.share_E
        share_E.copy_(best_shares(parts, share_E, chosen))


def best_shares(parts: Differences, start_E: Tensor, chosen: Sequence[int]) -> Tensor:
    """`share_E` of the least loss: one share after the other, in a few sweeps. An expert without a held-out pair of
    its domain keeps the share it has."""
    share_E = start_E.detach().clone()
    seen = [e for e in chosen if bool((parts.domain_B == e).any())]
    for e in seen * SWEEPS:
        tried = [torch.cat([share_E[:e], share[None], share_E[e + 1 :]]) for share in SHARES.to(share_E)]
        share_E = min(tried, key=parts.loss)
    return share_E


def parts_of(system: Recipe, batch: Batch) -> Differences:
    """Of a batch of pairs."""
    experts, num_rows, num_own = system.routed.experts, len(batch), len(system.domains)
    routing = system.route(batch)
    gate_NE = torch.zeros_like(routing.logits_NE).scatter(1, routing.experts_NK, routing.weights_NK)
    row_M = torch.arange(num_rows, device=gate_NE.device).repeat_interleave(num_own + 1)
    part_M = torch.arange(num_own + 1, device=gate_NE.device).repeat(num_rows)
    part_NP = experts.parts(batch.rows(row_M), part_M).view(num_rows, num_own + 1)
    own_NE = part_NP[:, :num_own] * gate_NE
    half = num_rows // 2
    return Differences(
        shared_B=part_NP[:half, num_own] - part_NP[half:, num_own],
        own_BE=own_NE[:half] - own_NE[half:],
        domain_B=batch.domain_N[:half],
    )
