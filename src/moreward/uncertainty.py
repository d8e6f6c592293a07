"""How far one reward is to be trusted, and what a cautious scorer makes of it. Costs are paid only where asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from moreward.errors import ConfigError
from moreward.types import Reward

if TYPE_CHECKING:
    from torch import Tensor

Weigh = Literal["even", "gate"]
Limit = Literal["out_of_domain", "router_entropy", "disagreement"]
LIMITS: tuple[Limit, ...] = get_args(Limit)


def disagreement(rewards: Sequence[float], weights: Sequence[float] | None = None) -> float | None:
    """Population standard deviation of standardised rewards, whatever their order, to the bit; None for fewer than
    two. With `weights` that sum to 1, around the weighted mean: that of the mixture of experts as a distribution."""
    if len(rewards) < 2:
        return None
    if weights is None:
        mean = math.fsum(rewards) / len(rewards)
        return math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / len(rewards))
    mean = math.fsum(w * r for w, r in zip(weights, rewards, strict=True))
    return math.sqrt(math.fsum(w * (r - mean) ** 2 for w, r in zip(weights, rewards, strict=True)))


def router_entropy(logits_NE: Tensor) -> Tensor:
    """Entropy of softmax(logits) over log E: 0 sure, 1 no idea; of all experts, also those that top-k leaves out.
    Raises ValueError for a single expert, where nothing is chosen."""
    num_experts = logits_NE.shape[-1]
    if num_experts < 2:
        raise ValueError("one expert leaves nothing to choose")
    log_p_NE = logits_NE.double().log_softmax(-1)
    entropy_N: Tensor = -(log_p_NE.exp() * log_p_NE).sum(-1) / math.log(num_experts)
    return entropy_N.clamp(0.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caution:
    """What a scorer does with uncertainty. `conservative` is λ of mean - λ · disagreement; `abstain` the largest value
    of each quantity with which a reward is still given; `weigh` counts experts evenly or as the router weighs them
    (softmax over all, also those that top-k leaves out).

    Raises ConfigError for what is not a number, negative, or unknown.
    """

    conservative: float = 0.0
    abstain: Mapping[str, float] | None = None
    weigh: Weigh = "even"

    def __post_init__(self) -> None:
        faults = []
        if not _is_limit(self.conservative):
            faults.append(f"conservative: must be a number, 0 or more (got {self.conservative!r})")
        for name, value in (self.abstain or {}).items():
            if name not in LIMITS:
                faults.append(f"abstain: {name!r} is not known; use {', '.join(LIMITS)}")
            elif not _is_limit(value):
                faults.append(f"abstain: {name} must be a number, 0 or more (got {value!r})")
        if self.weigh not in get_args(Weigh):
            faults.append(f"weigh: {self.weigh!r} is not known; use {', '.join(get_args(Weigh))}")
        if faults:
            raise ConfigError(faults)

    @property
    def is_needed(self) -> bool:
        return self.conservative > 0 or bool(self.abstain)

    @property
    def needs_disagreement(self) -> bool:
        return self.conservative > 0 or "disagreement" in (self.abstain or {})

    @property
    def name(self) -> str:
        """What tells two scorers apart; empty for one without caution."""
        limits = [f"abstain:{k}={float(v):g}" for k, v in sorted((self.abstain or {}).items())]
        parts = [*([f"conservative={self.conservative:g}"] if self.conservative else []), *limits]
        parts += [f"weigh={self.weigh}"] if self.weigh != "even" else []
        return "/".join(parts)

    def applied(self, reward: Reward) -> Reward:
        """The reward after caution; it carries its uncertainty."""
        told = reward.uncertainty
        assert told is not None
        for limit in LIMITS:
            allowed, value = (self.abstain or {}).get(limit), getattr(told, limit)
            if allowed is not None and value > allowed:
                return replace(reward, reward=None, abstained=f"{limit} {value:.3f} is above {allowed:g}")
        if self.conservative:
            assert told.disagreement is not None
            return replace(reward, reward=told.mean - self.conservative * told.disagreement)
        return reward


def _is_limit(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def parse_limits(words: Sequence[str]) -> dict[str, float]:
    """`NAME=VALUE` words of the command line; ConfigError names every one that is not."""
    limits: dict[str, float] = {}
    faults = []
    for word in words:
        name, _, value = word.partition("=")
        try:
            limits[name] = float(value)
        except ValueError:
            faults.append(f"--abstain: {word!r} is not NAME=VALUE, e.g. out_of_domain=0.99")
    if faults:
        raise ConfigError(faults)
    return limits
