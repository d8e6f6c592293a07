"""What travels between the layers.

Shapes: N conversations, B pairs (N = 2B, chosen rows first), P distinct prompts, T tokens, D hidden,
E experts, K experts used. This file imports torch for type checking only, so the data layer and
`--help` stay light.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from moreward.errors import AbstainedError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Message: TypeAlias = Mapping[str, Any]
"""One turn: `{"role": ..., "content": str}`, plus `tool_calls` and the like where the source has them."""

Text: TypeAlias = "str | tuple[Message, ...]"
"""Plain text (gets no chat template) or conversation turns (rendered with the tokenizer's template)."""

NO_DOMAIN = "default"
"""The domain of rows that name none."""


def text_key(*texts: Text) -> str:
    """A short stable hash of texts: 16 hex digits of SHA-256 over their canonical JSON."""
    canonical = json.dumps(texts, ensure_ascii=True, sort_keys=True, default=dict)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenIds:
    """A pair that came as tokens: both whole conversations, and the prompt where it is known."""

    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    prompt: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """One judgement: to `prompt`, `chosen` was preferred over `rejected`.

    `group` ties rows that must not stand on two sides of a split (the same prompt, document, debate);
    empty means "the prompt itself". `source` is `file:line`. `margin` is how much better, if known; `weight` what the
    pair's loss is multiplied by. `capability`, if any, is the one point in which chosen is better: such a pair says
    nothing of the whole. A pair that came as `token_ids` has no texts; it is for training only.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    domain: str = NO_DOMAIN
    capability: str = ""
    id: str = ""
    margin: float | None = None
    weight: float = 1.0
    group: str = ""
    source: str = ""
    tools: Sequence[Mapping[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    token_ids: TokenIds | None = None

    def swapped(self) -> Preference:
        """The opposite judgement."""
        ids = self.token_ids
        if ids is not None:
            ids = TokenIds(chosen=ids.rejected, rejected=ids.chosen, prompt=ids.prompt)
        return replace(self, chosen=self.rejected, rejected=self.chosen, token_ids=ids)

    @property
    def name(self) -> str:
        """How messages name this row: its id, else where it stands."""
        return self.id or self.source or text_key(self.prompt, self.chosen, self.rejected)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """One prompt with one response: what a reward is given to."""

    prompt: Text
    response: Text
    id: str = ""
    domain: str = ""
    tools: Sequence[Mapping[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A conversation that is the model's input already, as text or as token ids: no template is applied, and special
    tokens written in the text are special.

    `prompt` is what the text begins with, for routers to read; where it is unknown, or is not how the text begins,
    they read all of it. `special_tokens`: the tokenizer puts its own around the text.
    """

    text: str | tuple[int, ...]
    prompt: str = ""
    special_tokens: bool = False
    id: str = ""
    domain: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rated:
    """A conversation with absolute ratings in [0, 1] by objective; objectives that nobody rated are not in it.

    `group` and `source` as in `Preference`.
    """

    conversation: Conversation
    ratings: Mapping[str, float]
    group: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class OwnIds:
    """A conversation as an expert with a tokenizer of its own reads it. `second` is where the second text of a joined
    pair begins, for models that have an embedding for each; the length where there is one text."""

    ids: tuple[int, ...]
    second: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Tokenised conversations. Where `is_pairs`, rows 0..B-1 are chosen and rows B..2B-1 rejected.

    A router reads `prompt_ids_PT` only: it cannot see a response. `prompt_of_N[n]` is the prompt row of
    conversation n, so all the responses to one prompt are routed together. `domain_N` is -1 where unknown.
    `weight_B` is None where every pair weighs 1. `ratings_NK` (NaN where missing) are there for rated conversations,
    `expert_N`, the expert that each conversation trains, in a stage that holds several. `own_ids_NE` are there where
    experts have tokenizers of their own.
    """

    ids_NT: Tensor
    mask_NT: Tensor
    prompt_ids_PT: Tensor
    prompt_mask_PT: Tensor
    prompt_of_N: Tensor
    domain_N: Tensor
    margin_B: Tensor | None = None
    weight_B: Tensor | None = None
    is_pairs: bool = False
    names: tuple[str, ...] = ()
    truncated_N: Tensor | None = None
    ratings_NK: Tensor | None = None
    expert_N: Tensor | None = None
    own_ids_NE: tuple[tuple[OwnIds, ...], ...] = ()

    def __len__(self) -> int:
        return int(self.ids_NT.shape[0])

    def to(self, device: torch.device | str) -> Batch:
        moved = {f.name: v.to(device) for f in fields(self) if hasattr(v := getattr(self, f.name), "to")}
        return replace(self, **moved)

    @property
    def domain_P(self) -> Tensor:
        """The domain of each prompt: that of any conversation with it."""
        domain_P = self.domain_N.new_full((self.prompt_ids_PT.shape[0],), -1)
        domain_P[self.prompt_of_N] = self.domain_N
        return domain_P

    def rows(self, index: Tensor) -> Batch:
        """The conversations at `index` (repeats allowed); prompts stay as they are."""
        return replace(
            self,
            ids_NT=self.ids_NT[index],
            mask_NT=self.mask_NT[index],
            prompt_of_N=self.prompt_of_N[index],
            domain_N=self.domain_N[index],
            margin_B=None,
            weight_B=None,
            is_pairs=False,
            names=(),
            truncated_N=None,
            ratings_NK=None,
            expert_N=None,
            own_ids_NE=tuple(self.own_ids_NE[n] for n in index.tolist()) if self.own_ids_NE else (),
        )


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Which experts each row goes to: `experts_NK` with `weights_NK` that sum to 1, best first.

    A router over prompts returns one row per prompt; `rows(batch.prompt_of_N)` spreads them.
    """

    experts_NK: Tensor
    weights_NK: Tensor
    logits_NE: Tensor
    aux_loss: Tensor | None = None

    def rows(self, index: Tensor) -> Routing:
        return Routing(
            experts_NK=self.experts_NK[index],
            weights_NK=self.weights_NK[index],
            logits_NE=self.logits_NE[index],
            aux_loss=self.aux_loss,
        )


def concatenated(routings: Sequence[Routing]) -> Routing:
    """The rows of several routings, one after the other."""
    import torch

    return Routing(
        experts_NK=torch.cat([r.experts_NK for r in routings]),
        weights_NK=torch.cat([r.weights_NK for r in routings]),
        logits_NE=torch.cat([r.logits_NE for r in routings]),
    )


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """What a system says of a batch. `expert_reward_NK` are the standardised rewards of `routing.experts_NK`."""

    reward_N: Tensor
    routing: Routing | None = None
    expert_reward_NK: Tensor | None = None
    aux_loss: Tensor | None = None

    @property
    def chosen_B(self) -> Tensor:
        return self.reward_N[: len(self.reward_N) // 2]

    @property
    def rejected_B(self) -> Tensor:
        return self.reward_N[len(self.reward_N) // 2 :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncertainty:
    """What speaks against trusting one reward.

    `mean` is the reward without caution. `disagreement` is the population standard deviation of what the experts or
    members say, in their unit; None where fewer than two say anything. `router_entropy` is 0 for a router that is sure
    and 1 for one that has no idea; None without a router. `distance` is how far the prompt lies from the nearest
    training domain (Mahalanobis, over √D; about 1 is usual), `nearest` that domain, and `out_of_domain` the share of
    held-out prompts that lie nearer to theirs. `temperature` is what differences of this reward are divided by to
    become probabilities. The last four are None (`nearest` empty) where the run has no calibration.
    """

    mean: float
    disagreement: float | None = None
    router_entropy: float | None = None
    distance: float | None = None
    nearest: str = ""
    out_of_domain: float | None = None
    temperature: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What one reward is made of: `parts` sum to it; `part_rewards` is what each part says by itself."""

    parts: Mapping[str, float] = field(default_factory=dict)
    part_rewards: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """The reward of one conversation, as users see it. Higher is better.

    `expert` is the one that spoke loudest and `weights` the gate's weight of each expert used; both are empty
    for a system without named experts. Only when explained: `expert_rewards` (every expert, standardised), and where
    the reward has parts (capabilities, objectives) `parts`, what each adds, which sum to `reward`, and `part_rewards`,
    what each says by itself. `reward` is None only where the scorer was told to abstain; then `abstained` says why.
    `router_entropy` (0 sure, 1 no idea) where a router chose. `uncertainty` only when asked for.
    """

    reward: float | None
    expert: str = ""
    weights: Mapping[str, float] = field(default_factory=dict)
    expert_rewards: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)
    part_rewards: Mapping[str, float] = field(default_factory=dict)
    uncertainty: Uncertainty | None = None
    abstained: str = ""
    router_entropy: float | None = None
    num_tokens: int = 0
    truncated: bool = False
    id: str = ""

    @property
    def number(self) -> float:
        """The reward, for those who cannot do without. Raises AbstainedError where there is none."""
        if self.reward is None:
            raise AbstainedError(f"{self.id or 'a conversation'}: no reward: {self.abstained}")
        return self.reward


@dataclass(frozen=True)
class Comparison:
    """Several responses to one prompt: rewards as given, indices best first, P(row beats column).

    Where the scorer abstained, a response has no reward and stands last."""

    rewards: list[Reward]
    order: list[int]
    probabilities: list[list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedReward:
    """One conversation's reward under the system's own router, an oracle router (the expert of the row's
    domain) and a uniformly random one. The last two are None where the system has no expert per domain, and
    `oracle` also where the row's domain has no expert. `expert_rewards` are an ensemble's members', standardised."""

    reward: float
    expert: str = ""
    oracle: float | None = None
    random: float | None = None
    expert_rewards: Mapping[str, float] = field(default_factory=dict)
    num_tokens: int = 0
    truncated: bool = False
