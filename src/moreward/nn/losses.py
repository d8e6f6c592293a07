"""What a stage minimises, and what it counts as right.

B pairs (the units that losses are averaged over), N conversations (N = 2B, chosen first), P prompts, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moreward.errors import NonFiniteError
from moreward.types import Batch, Rewards, Routing


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One value per pair: its loss, whether it was right, whether it was tied, its domain.

    A loss is already multiplied by the pair's weight. The mean is taken over all pairs, so that a pair of weight w
    moves a step w times as much as it otherwise would, whatever stands beside it, and a pair of weight 0 not at all.
    `extra` is added to the mean loss: a balance loss, already weighted.
    """

    loss_B: Tensor
    right_B: Tensor
    tie_B: Tensor
    domain_B: Tensor
    extra: Tensor | None = None


class Objective(Protocol):
    @property
    def name(self) -> str:
        """What the share of right pairs is called in the metrics."""

    def __call__(self, output: Any, batch: Batch) -> Outcome: ...


@dataclass(frozen=True, kw_only=True)
class PairwiseLoss:
    """Bradley-Terry: -log σ(r_chosen - r_rejected - margin), computed by logsigmoid so that it cannot overflow.

    `label_smoothing` ε mixes in the flipped pair with weight ε. `centering` adds centering · (r_c + r_j)² (Eisenstein
    et al., arXiv 2312.09244), which fixes the zero that differences leave free. A pair of equal rewards is a tie:
    wrong, and counted.
    """

    label_smoothing: float = 0.0
    centering: float = 0.0
    name: str = "accuracy"

    def __call__(self, output: Rewards, batch: Batch) -> Outcome:
        delta_B = output.chosen_B - output.rejected_B
        raw_B = delta_B if batch.margin_B is None else delta_B - batch.margin_B.to(delta_B.dtype)
        eps = self.label_smoothing
        loss_B = -(1 - eps) * F.logsigmoid(raw_B) - (eps * F.logsigmoid(-raw_B) if eps else 0.0)
        if self.centering:
            loss_B = loss_B + self.centering * (output.chosen_B + output.rejected_B).square()
        return Outcome(
            loss_B=_weighted(loss_B, batch),
            right_B=delta_B > 0,
            tie_B=delta_B == 0,
            domain_B=batch.domain_N[: len(delta_B)],
            extra=output.aux_loss,
        )


@dataclass(frozen=True, kw_only=True)
class DomainLoss:
    """Cross-entropy of a router's logits against the domain of each pair's prompt; pairs without one weigh nothing."""

    name: str = "router_accuracy"

    def __call__(self, output: Routing, batch: Batch) -> Outcome:
        num_pairs = len(batch) // 2
        domain_B = batch.domain_N[:num_pairs]
        logits_BE = output.logits_NE[batch.prompt_of_N[:num_pairs]]
        known_B = domain_B >= 0
        loss_B = F.cross_entropy(logits_BE, domain_B.clamp(min=0), reduction="none") * known_B
        right_B = (logits_BE.argmax(-1) == domain_B) & known_B
        return Outcome(
            loss_B=_weighted(loss_B, batch), right_B=right_B, tie_B=torch.zeros_like(right_B), domain_B=domain_B
        )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Where a router would send each pair's prompt, `logits_BE`, and which experts rank the pair right, `right_BE`."""

    logits_BE: Tensor
    right_BE: Tensor


@dataclass(frozen=True, kw_only=True)
class CorrectnessLoss:
    """Minus the log-probability that the router sends a pair to an expert that is right about it:
    logsumexp of all logits less that of the right experts'.

    Needs no domain labels. Pairs about which all experts are right, or none, say nothing of where to go: loss 0. The
    share of right pairs is that of pairs whose likeliest expert is right: the accuracy of top-1 routing.
    """

    name: str = "routed_accuracy"

    def __call__(self, output: Verdict, batch: Batch) -> Outcome:
        right_BE, logits_BE = output.right_BE, output.logits_BE
        tells_B = right_BE.any(1) & ~right_BE.all(1)
        # Where nothing is told all count as right, so that the difference is 0 and finite.
        counted_BE = right_BE | ~tells_B[:, None]
        loss_B = logits_BE.logsumexp(1) - logits_BE.masked_fill(~counted_BE, -torch.inf).logsumexp(1)
        chosen_B = right_BE.gather(1, logits_BE.argmax(1, keepdim=True))[:, 0]
        return Outcome(
            loss_B=_weighted(loss_B, batch),
            right_B=chosen_B,
            tie_B=torch.zeros_like(chosen_B),
            domain_B=batch.domain_N[: len(loss_B)],
        )


@dataclass(frozen=True, kw_only=True)
class RewardLoss:
    """Squared error against given rewards, `batch.ratings_NK[:, 0]`: a value per conversation, not per pair. One
    that is off by less than `within` is right."""

    within: float = 0.5
    name: str = "near"

    def __call__(self, output: Rewards, batch: Batch) -> Outcome:
        assert batch.ratings_NK is not None
        error_N = output.reward_N - batch.ratings_NK[:, 0].to(output.reward_N.dtype)
        return Outcome(
            loss_B=error_N.square(),
            right_B=error_N.detach().abs() < self.within,
            tie_B=torch.zeros_like(error_N, dtype=torch.bool),
            domain_B=batch.domain_N,
            extra=output.aux_loss,
        )


def _weighted(loss_B: Tensor, batch: Batch) -> Tensor:
    return loss_B if batch.weight_B is None else loss_B * batch.weight_B


def refuse_non_finite(outcome: Outcome, batch: Batch, where: str) -> None:
    """Raise NonFiniteError naming the rows whose loss is NaN or Inf, before anything learns from them."""
    total = outcome.loss_B.sum() if outcome.extra is None else outcome.loss_B.sum() + outcome.extra
    if bool(torch.isfinite(total)):
        return
    bad = (~torch.isfinite(outcome.loss_B)).nonzero().flatten().tolist()
    rows = [batch.names[i] for i in bad if i < len(batch.names)] or list(batch.names)
    raise NonFiniteError(
        f"{where}: the loss is not finite; weights are as before this step. Rows: {', '.join(rows[:10])}"
        + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")
    )
