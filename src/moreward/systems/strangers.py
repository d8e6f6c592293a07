"""Strangers: reward models of other projects as experts, and a router that learns which of them is right.

N conversations, B pairs, P prompts, E experts, K experts used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from moreward.data.batches import Encoded, Encoder
from moreward.errors import ConfigError, DataError
from moreward.nn.backbone import Backbone, load_tokenizer
from moreward.nn.experts import SeparateExperts, Standardize
from moreward.nn.foreign import ForeignEncoder, ForeignModel, Stranger, fill, unfilled
from moreward.nn.losses import CorrectnessLoss, Objective, Verdict
from moreward.nn.mixture import Routed
from moreward.nn.routers import PromptRouter, TopKRouter
from moreward.systems._base import (
    GatedSystem,
    Presets,
    Stage,
    SystemConfig,
    Tune,
    expert_names,
    learnable,
    prepare_backbone,
)
from moreward.types import Batch, Conversation, Preference, Rendered, Rewards

FOLDER = "strangers"
MADE_BY = "moreward import"


class StrangersConfig(SystemConfig):
    tune: Tune = Field("frozen", description="of the router's backbone; the experts never learn")
    top_k: int = Field(1, ge=1, description="experts used per prompt")
    experts: tuple[Stranger, ...] = Field((), description="written by `moreward import`")


class Recipe(GatedSystem):
    """E models as they are, each with its own tokenizer and chat template, behind a router that reads the prompt. Its
    targets are the experts that rank a pair right; domain labels are not needed. After arXiv 2510.02850, whose router
    reads the answers too and learns from pairs of a right and a wrong model."""

    Config = StrangersConfig
    presets: ClassVar[Presets] = {"paper": {}, "practical": {"train.epochs": 10}}
    tunes = ("frozen", "full")
    made_by = MADE_BY
    config: StrangersConfig
    routed: Routed[SeparateExperts]

    @classmethod
    def reads_with(cls, config: StrangersConfig, encoder: Encoder, folder: Path | None) -> Encoder:
        if not config.experts:
            raise ConfigError(f"system.experts: is empty; the recipe 'strangers' is made by {MADE_BY}")
        names = expert_names([stranger.name for stranger in config.experts])
        places = [
            stranger.folder if folder is None else str(folder / FOLDER / name)
            for name, stranger in zip(names, config.experts, strict=True)
        ]
        own = [ForeignEncoder(s, load_tokenizer(place)) for s, place in zip(config.experts, places, strict=True)]
        return StrangersEncoder(encoder, dict(zip(names, own, strict=True)))

    def __init__(self, config: StrangersConfig, backbone: Backbone, domains: Sequence[str]) -> None:
        super().__init__(config, backbone, domains)
        self.labels = tuple(stranger.name for stranger in config.experts)
        self.expert_names = expert_names(self.labels)
        prepare_backbone(backbone, config, adapters=())
        experts: dict[str, Any] = {
            name: ForeignExpert(e, stranger)
            for e, (name, stranger) in enumerate(zip(self.expert_names, config.experts, strict=True))
        }
        gate = TopKRouter(backbone.hidden_size, len(experts), config.top_k)
        self.routed = Routed(PromptRouter(backbone, gate), SeparateExperts(experts))

    @property
    def expert_labels(self) -> tuple[str, ...]:
        return self.labels

    def expert(self, name: str) -> ForeignExpert:
        expert = self.routed.experts.experts[name]
        assert isinstance(expert, ForeignExpert)
        return expert

    def expert_parameters(self, name: str) -> list[nn.Parameter]:
        return list(self.expert(name).parameters())

    def router_parameters(self) -> list[nn.Parameter]:
        router = self.routed.router
        return [*learnable(router.backbone, self.config), *router.router.parameters()]

    def standardizer(self, name: str) -> Standardize:
        return self.expert(name).standardize

    def raw_size(self, name: str) -> float:
        """A head into which a zero and a small unit were folded has a large bias, which takes its digits."""
        return max(super().raw_size(name), self.expert(name).foreign.bias_size())

    def num_active_parameters(self) -> int:
        sizes = sorted((stranger.num_parameters for stranger in self.config.experts), reverse=True)
        router = sum(p.numel() for p in self.routed.router.parameters())
        return router + sum(sizes[: self.config.top_k])

    def stages(self, pairwise: Objective) -> list[Stage]:
        """Here the experts' weights come in. What each says of a pair is computed once and kept for the router."""
        for name in self.expert_names:
            self.expert(name).fill()
        kept = KeptRewards(self.routed.experts)
        experts = [self._expert_stage(e, name, kept, pairwise) for e, name in enumerate(self.expert_names)]
        return [*experts, self._router_stage(kept)]

    def _expert_stage(self, e: int, name: str, kept: KeptRewards, pairwise: Objective) -> Stage:
        module = OneKept(kept, e, self.standardizer(name))

        def solve(train: Iterable[Batch], val: Iterable[Batch]) -> dict[str, Any]:
            return {
                "accuracy": share_right(module, train),
                "val_accuracy": share_right(module, val),
                "expert": self.labels[e],
            }

        return Stage(
            name=f"expert/{name}",
            module=module,
            learn=(),
            objective=pairwise,
            standardize=self.standardizer(name),
            solve=solve,
        )

    def _router_stage(self, kept: KeptRewards) -> Stage:
        return Stage(
            name="router",
            module=WhoIsRight(self.routed.router, kept),
            learn=tuple(self.router_parameters()),
            objective=CorrectnessLoss(),
        )


class ForeignExpert(nn.Module):
    """One stranger with a zero and a unit on top. It reads its own ids of a batch."""

    def __init__(self, index: int, stranger: Stranger) -> None:
        super().__init__()
        self.index = index
        self.stranger = stranger
        self.foreign: ForeignModel = unfilled(stranger)
        self.standardize = Standardize()

    def fill(self) -> None:
        """Put the weights of its directory in."""
        fill(self.foreign)

    def raw(self, batch: Batch) -> Tensor:
        """`reward_N` as the stranger's own code gives it."""
        own = [row[self.index] for row in batch.own_ids_NE]
        return self.foreign(own)  # type: ignore[no-any-return]

    def forward(self, batch: Batch) -> Rewards:
        return Rewards(reward_N=self.standardize(self.raw(batch)))


class KeptRewards(nn.Module):
    """The experts, which do not change while the router learns: what they say of a text is computed once."""

    def __init__(self, experts: SeparateExperts) -> None:
        super().__init__()
        self.experts = experts
        self.known: dict[tuple[int, Any], float] = {}

    def raw(self, batch: Batch, e: int) -> Tensor:
        keys = [(e, row[e]) for row in batch.own_ids_NE]
        first = {key: n for n, key in enumerate(keys) if key not in self.known}
        if first:
            expert = list(self.experts.experts.values())[e]
            assert isinstance(expert, ForeignExpert)
            said = expert.raw(batch.rows(torch.tensor(list(first.values())))).tolist()
            self.known |= dict(zip(first, said, strict=True))
        return torch.tensor([self.known[key] for key in keys], device=batch.ids_NT.device)


class OneKept(nn.Module):
    """One expert, as a stage sees it."""

    def __init__(self, kept: KeptRewards, e: int, standardize: Standardize) -> None:
        super().__init__()
        self.kept, self.e, self.standardize = kept, e, standardize

    def forward(self, batch: Batch) -> Rewards:
        return Rewards(reward_N=self.standardize(self.kept.raw(batch, self.e)))


class WhoIsRight(nn.Module):
    """The router, and which experts are right, as the router's stage sees them."""

    def __init__(self, router: PromptRouter, kept: KeptRewards) -> None:
        super().__init__()
        self.router, self.kept = router, kept

    def forward(self, batch: Batch) -> Verdict:
        num_pairs = len(batch) // 2
        logits_BE = self.router(batch).logits_NE[batch.prompt_of_N[:num_pairs]]
        rewards = [self.kept.raw(batch, e) for e in range(logits_BE.shape[1])]
        right_BE = torch.stack([r_N[:num_pairs] > r_N[num_pairs:] for r_N in rewards], dim=1)
        return Verdict(logits_BE=logits_BE, right_BE=right_BE)


def share_right(module: nn.Module, batches: Iterable[Batch]) -> float | None:
    """Of pairs; None without any."""
    right: list[bool] = []
    for batch in batches:
        said: Rewards = module(batch)
        right += (said.chosen_B > said.rejected_B).tolist()
    return sum(right) / len(right) if right else None


class StrangersEncoder(Encoder):
    """The router's tokens of the prompt, and each expert's own tokens of the conversation.

    The router reads the end of a prompt that is longer than its limit; only what experts do not see counts as cut.
    """

    def __init__(self, router: Encoder, own: dict[str, ForeignEncoder]) -> None:
        super().__init__(router.tokenizer, router.max_length)
        self.router = router
        self.own = own
        self.max_length = min(one.stranger.max_length for one in own.values())

    def conversation(self, item: Conversation | Rendered) -> Encoded:
        if isinstance(item, Rendered) and not isinstance(item.text, str):
            raise DataError("token ids mean other tokens to each of these experts; give the text")
        prompt_ids = self.router.conversation(item).prompt_ids
        read = [one.read(item) for one in self.own.values()]
        return Encoded(prompt_ids, prompt_ids, max(n for _, n in read), tuple(own for own, _ in read))

    def _given(self, ids: tuple[int, ...], prompt: tuple[int, ...]) -> Encoded:
        raise DataError("token ids mean other tokens to each of these experts; give the text")

    @contextmanager
    def reading_ahead(self, preferences: Sequence[Preference]) -> Iterator[None]:
        with ExitStack() as stack:
            for encoder in (self.router, *(one.encoder for one in self.own.values())):
                stack.enter_context(encoder.reading_ahead(preferences))
            yield

    def too_long(self, encoded: Encoded) -> str:
        limits = {one.stranger.name: one.stranger.max_length for one in self.own.values()}
        full = [
            f"{name} reads {limit}"
            for (name, limit), own in zip(limits.items(), encoded.own_ids_E, strict=True)
            if len(own.ids) >= limit
        ]
        return f"{encoded.num_dropped} tokens too many for an expert ({', '.join(full)})"

    def save(self, folder: Path) -> None:
        super().save(folder)
        for name, one in self.own.items():
            one.encoder.tokenizer.save_pretrained(folder / FOLDER / name)
