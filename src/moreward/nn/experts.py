"""Experts: what turns a conversation into one standardised reward.

Every bank of experts is called as `experts(batch, expert_N)`: row n is judged by expert `expert_N[n]`.
N conversations, D hidden, E experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from moreward.errors import ConfigError
from moreward.nn.backbone import Backbone
from moreward.nn.linear import speed_up
from moreward.nn.sparse import mix
from moreward.types import Batch, Rewards

Experts = TypeVar("Experts", bound=nn.Module)


def rows_by_number(number_N: Tensor) -> list[tuple[int, Tensor]]:
    """Each number that occurs, ascending, with its rows, ascending. A GPU is waited for once, not for each number."""
    counts = Counter(number_N.tolist())
    numbers = sorted(counts)
    rows = number_N.argsort(stable=True).split([counts[number] for number in numbers])
    return list(zip(numbers, rows, strict=True))


class RewardHead(nn.Module):
    """`linear`: Linear(D, 1), the layer of a `*ForSequenceClassification`; `mlp`: one hidden layer more, for frozen
    vectors that a linear map reads badly, as wide as they are or `width`. Always float32: bf16 rewards have too few
    digits to be subtracted."""

    def __init__(self, size: int, kind: str = "linear", width: int | None = None) -> None:
        super().__init__()
        width = size if kind == "linear" or width is None else width
        last = nn.Linear(width, 1)
        nn.init.normal_(last.weight, std=0.02)
        nn.init.zeros_(last.bias)
        hidden = [nn.Linear(size, width), nn.GELU(), nn.Dropout(0.1)] if kind == "mlp" else []
        self.layers = nn.Sequential(*hidden, last)

    @property
    def last(self) -> nn.Linear:
        return cast(nn.Linear, self.layers[-1])

    def state(self, hidden_ND: Tensor) -> Tensor:
        """What the last layer reads: the vector itself, or the hidden layer of an `mlp`."""
        with torch.autocast(hidden_ND.device.type, enabled=False):
            return self.layers[:-1](hidden_ND.float())  # type: ignore[no-any-return]

    def forward(self, hidden_ND: Tensor) -> Tensor:
        with torch.autocast(hidden_ND.device.type, enabled=False):
            return self.layers(hidden_ND.float()).squeeze(-1)  # type: ignore[no-any-return]


class Standardize(nn.Module):
    """Gives an expert a zero and a unit: z = (r - mean) / std over a reference set.

    Bradley-Terry fixes reward differences only, so two experts trained apart agree on neither.
    """

    mean: Tensor
    std: Tensor
    num: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("std", torch.ones((), dtype=torch.float64))
        self.register_buffer("num", torch.zeros((), dtype=torch.long))

    def reset(self) -> None:
        """Back to raw rewards."""
        self.mean.zero_()
        self.std.fill_(1.0)

    def fit(self, reward_N: Tensor) -> None:
        """Take mean and standard deviation (population) of raw rewards; a constant expert keeps unit 1."""
        reward_N = reward_N.double()
        std = reward_N.std(correction=0)
        self.mean.copy_(reward_N.mean())
        self.std.copy_(std if std > 1e-6 else torch.ones_like(std))
        self.num.fill_(len(reward_N))

    def forward(self, reward_N: Tensor) -> Tensor:
        return (reward_N - self.mean.to(reward_N.dtype)) / self.std.to(reward_N.dtype)


class SoloExpert(nn.Module):
    """A whole reward model: backbone, head, zero and unit."""

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.standardize = Standardize()

    def forward(self, batch: Batch) -> Rewards:
        hidden_ND = self.backbone(batch.ids_NT, batch.mask_NT)
        return Rewards(reward_N=self.standardize(self.head(hidden_ND)))


class Standardized(nn.Module):
    """Any reward model, with a zero and a unit of its own on top."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.standardize = Standardize()

    def forward(self, batch: Batch) -> Rewards:
        return Rewards(reward_N=self.standardize(self.model(batch).reward_N))


class SeparateExperts(nn.Module):
    """One whole reward model per expert (RODOS). Rows are sent to theirs in groups."""

    def __init__(self, experts: Mapping[str, SoloExpert | Standardized]) -> None:
        super().__init__()
        self.experts = nn.ModuleDict(dict(experts))

    def forward(self, batch: Batch, expert_N: Tensor) -> Tensor:
        reward_N = batch.ids_NT.new_zeros(len(expert_N), dtype=torch.float32)
        experts = list(self.experts.values())
        for e, index in rows_by_number(expert_N):
            reward_N = reward_N.index_put((index,), experts[e](batch.rows(index)).reward_N.to(reward_N.dtype))
        return reward_N

    def every_expert(self, batch: Batch) -> Tensor:
        """`reward_NE`: each row by all experts."""
        return torch.stack([expert(batch).reward_N for expert in self.experts.values()], dim=1)

    def expert(self, name: str) -> SoloExpert:
        return cast(SoloExpert, self.experts[name])

    def standardizer(self, name: str) -> Standardize:
        return cast(Standardize, self.experts[name].standardize)


class HeadedExperts(nn.Module):
    """A head, zero and unit for each expert, over vectors that subclasses read in `read`."""

    def __init__(self, heads: Mapping[str, RewardHead]) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(dict(heads))
        self.standardize = nn.ModuleDict({name: Standardize() for name in heads})

    def read(self, batch: Batch, expert_N: Tensor) -> Tensor:
        """`hidden_ND`: row n as expert `expert_N[n]` reads it."""
        raise NotImplementedError

    def forward(self, batch: Batch, expert_N: Tensor) -> Tensor:
        return self.judge(self.read(batch, expert_N), expert_N)

    def judge(self, hidden_ND: Tensor, expert_N: Tensor) -> Tensor:
        """Standardised `reward_N` of vectors that the experts have read."""
        reward_N: Tensor = hidden_ND.new_zeros(len(expert_N))
        names = list(self.heads)
        for e, index in rows_by_number(expert_N):
            z = self.standardize[names[e]](self.heads[names[e]](hidden_ND[index]))
            reward_N = reward_N.index_put((index,), z.to(reward_N.dtype))
        return reward_N

    def head(self, name: str) -> RewardHead:
        return cast(RewardHead, self.heads[name])

    def standardizer(self, name: str) -> Standardize:
        return cast(Standardize, self.standardize[name])


class AdapterExperts(HeadedExperts):
    """One adapter and one head per expert on a shared backbone (ARLISS). One forward, an adapter per row.

    Adapter e of the backbone's bank belongs to head e. A frozen backbone has no bank: then an expert is its head.
    """

    def __init__(self, backbone: Backbone, heads: Mapping[str, RewardHead]) -> None:
        super().__init__(heads)
        self.backbone = backbone

    def every_expert(self, batch: Batch) -> Tensor:
        """`reward_NE`: each row by all experts, in one pass in which it meets every adapter; without adapters its one
        vector meets every head."""
        num_rows, num_experts = len(batch), len(self.heads)
        if self.backbone.bank is None:
            hidden_ND = self.backbone(batch.ids_NT, batch.mask_NT)
            return torch.stack([self.standardizer(e)(self.head(e)(hidden_ND)) for e in self.heads], dim=1)
        row_M = torch.arange(num_rows, device=batch.ids_NT.device).repeat_interleave(num_experts)
        expert_M = torch.arange(num_experts, device=batch.ids_NT.device).repeat(num_rows)
        return self(batch.rows(row_M), expert_M).view(num_rows, num_experts)  # type: ignore[no-any-return]

    def read(self, batch: Batch, expert_N: Tensor) -> Tensor:
        adapter_N = None if self.backbone.bank is None else expert_N
        return self.backbone(batch.ids_NT, batch.mask_NT, adapter_N)  # type: ignore[no-any-return]

    def adapter_experts(self) -> dict[str, tuple[RewardHead, Standardize]]:
        """Head, zero and unit by the name of the adapter they belong to: what can stand alone as a PEFT adapter. One
        that acts on the last tokens only cannot, for PEFT's act on every token."""
        if self.backbone.bank is None or self.backbone.bank.active_tokens is not None:
            return {}
        return {name: (self.head(name), self.standardizer(name)) for name in self.heads}


class OwnBackbones(HeadedExperts):
    """A whole model per task, and adapters on it for the task's points. Experts are the tasks, then the points."""

    task_E: Tensor
    adapter_E: Tensor

    def __init__(
        self, backbones: Mapping[str, Backbone], heads: Mapping[str, RewardHead], places: Sequence[tuple[int, int]]
    ) -> None:
        """`places` has the task of each expert and its adapter there, -1 for none."""
        super().__init__(heads)
        self.backbones = nn.ModuleDict(dict(backbones))
        self.register_buffer("task_E", torch.tensor([t for t, _ in places]), persistent=False)
        self.register_buffer("adapter_E", torch.tensor([a for _, a in places]), persistent=False)

    def backbone(self, task: int) -> Backbone:
        return cast(Backbone, list(self.backbones.values())[task])

    def read(self, batch: Batch, expert_N: Tensor) -> Tensor:
        hidden_ND = torch.zeros(len(batch), self.backbone(0).hidden_size, device=expert_N.device)
        for task, index in rows_by_number(self.task_E[expert_N]):
            backbone = self.backbone(task)
            adapter_N = None if backbone.bank is None else self.adapter_E[expert_N[index]]
            said = backbone(batch.ids_NT[index], batch.mask_NT[index], adapter_N)
            hidden_ND = hidden_ND.index_put((index,), said.to(hidden_ND.dtype))
        return hidden_ND


class OneExpert(nn.Module, Generic[Experts]):
    """Expert `index` of a bank as a module of its own: what one stage trains."""

    experts: Experts

    def __init__(self, experts: Experts, index: int) -> None:
        super().__init__()
        self.experts = experts
        self.index = index

    def forward(self, batch: Batch) -> Rewards:
        expert_N = batch.ids_NT.new_full((len(batch),), self.index)
        return Rewards(reward_N=self.experts(batch, expert_N))


class OwnExperts(nn.Module, Generic[Experts]):
    """Each conversation by its own expert, `batch.expert_N`: what a stage trains that holds several experts."""

    experts: Experts

    def __init__(self, experts: Experts, *, first: int = 0) -> None:
        """`first` is the number in the bank of the first expert that is meant."""
        super().__init__()
        self.experts = experts
        self.first = first

    def forward(self, batch: Batch) -> Rewards:
        assert batch.expert_N is not None
        return Rewards(reward_N=self.experts(batch, batch.expert_N + self.first))


class FeedForwardExperts(nn.Module):
    """E feed-forward networks Linear(D, width) → activation → Linear(width, D), used sparsely.

    Each expert has parameters of its own rather than a slice of a stack, and so a gradient of its own. An expert that
    no row used gets none: an optimizer leaves it as it is, weight decay included.
    """

    def __init__(self, num_experts: int, size: int, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(size, width), nn.GELU(), nn.Linear(width, size)) for _ in range(num_experts)
        )
        speed_up(self)

    def forward(self, hidden_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Σ_k weights_NK[:, k] · expert(hidden). Rows that do not use an expert do not pass through it."""
        return mix(self.experts, hidden_ND, experts_NK, weights_NK)


def standardised_heads(model: nn.Module) -> list[tuple[RewardHead, Standardize]]:
    """Every head with its zero and unit. ConfigError where one of the zeros and units belongs to no single head."""
    found: list[tuple[RewardHead, Standardize]] = []
    for module in model.modules():
        if isinstance(module, SoloExpert) and isinstance(module.head, RewardHead):
            found.append((module.head, module.standardize))
        elif isinstance(module, AdapterExperts):
            found += [(module.head(name), module.standardizer(name)) for name in module.heads]
    if {s for _, s in found} != {m for m in model.modules() if isinstance(m, Standardize)}:
        raise ConfigError("this recipe's reward is not that of single heads, into which zero and unit could be folded")
    return found


@torch.no_grad()
def fold(head: RewardHead, standardize: Standardize) -> None:
    """Write zero and unit into the head's last layer, w/s and (b - μ)/s: the rewards stay, the head is in standard
    units itself."""
    last, mean, std = head.last, standardize.mean, standardize.std
    last.weight.copy_(last.weight.double() / std)
    last.bias.copy_((last.bias.double() - mean) / std)
    standardize.reset()
