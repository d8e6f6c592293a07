"""What every recipe is: settings, a forward, and its training as data.

N conversations, E experts, K experts used.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from moreward.data.batches import Encoder
from moreward.errors import ConfigError
from moreward.nn.backbone import Backbone
from moreward.nn.experts import OneExpert, RewardHead, Standardize
from moreward.nn.features import FeatureStore
from moreward.nn.lora import LoRABank
from moreward.nn.losses import DomainLoss, Objective
from moreward.nn.mixture import Routed
from moreward.nn.replay import Replay, fit_gate, read_batches
from moreward.nn.routers import PromptRouter, TopKRouter
from moreward.types import Batch, Explanation, Preference, Rewards, Routing

Tune = Literal["full", "lora", "frozen"]
Axis = Literal["domain", "capability", "member", "objective"]
Kind = Literal["extend", "replace", "remove"]
Presets = Mapping[str, Mapping[str, Any]]
Solve = Callable[[Iterable[Batch], Iterable[Batch]], Mapping[str, Any]]
ROUTER = "@router"
"""The router's adapter. The sign keeps it apart from any expert's name."""

PAPER_TRAINING: dict[str, Any] = {
    # arXiv 2407.17546, appendix A. Length, schedule, warm-up, weight decay and dropout are not given there: ours.
    "train.learning_rate": 5.0e-6,
    "train.batch_size": 32,
    "train.epochs": 3,
    "train.warmup": 0.06,
    "train.weight_decay": 0.01,
    "train.schedule": "linear",
    "train.patience": 0,
    "train.dropout": True,
    "data.max_length": 512,
    "pooling": "own",
    "system.head": "linear",
}
PAPER_LORA: dict[str, Any] = {"system.rank": 12, "system.alpha": 768.0, "system.dropout": 0.1, "system.targets": None}


class SystemConfig(BaseModel):
    """The recipe's own settings, under `system:` in a configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tune: Tune = "full"
    head: Literal["auto", "linear", "mlp"] = Field("auto", description="auto: mlp on a frozen backbone, else linear")

    @property
    def head_kind(self) -> str:
        return ("mlp" if self.tune == "frozen" else "linear") if self.head == "auto" else self.head


class LoRAConfig(SystemConfig):
    """Settings of recipes that learn by adapters. `targets` None means every linear layer of the backbone."""

    tune: Tune = "lora"
    rank: int = Field(12, ge=1)
    alpha: float = Field(24.0, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    targets: tuple[str, ...] | None = None
    adapter_layers: int | None = Field(
        None, ge=1, description="adapt only this many layers at the top; gradients stop below them"
    )
    active_tokens: int | None = Field(
        None, ge=1, description="decoders: adapters act on this many tokens at the end; what is before is shared"
    )

    @model_validator(mode="after")
    def _needs_adapters(self) -> Self:
        if self.tune != "lora" and (self.adapter_layers or self.active_tokens):
            raise ValueError("adapter_layers and active_tokens need adapters: tune=lora")
        return self


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of training. Everything outside `learn` is frozen while it runs.

    `select` says which pairs it sees: those with a capability are labels of a part of the reward, so by default none
    of them. A `rated` stage sees the rated conversations instead of pairs, and needs a `solve` or an
    objective over them. `prepare` runs before
    the first step, on the weights that earlier stages left. `standardize` is fitted on the raw rewards of `module` over
    the pairs it saw when the stage ends. `learning_rate` None is the run's.

    `solve`, where there is a closed form, takes the place of the steps: it is given the stage's training and held-out
    batches, sets the tensors of `learn` itself, and returns what the run's card shall say of it. What it sets beyond
    parameters (a matrix that is no parameter) must be a buffer named in `keep`, so that checkpoints hold it.

    A stage of several experts names in `experts` what each of them moves: then an expert's loss is the mean over its
    own pairs of a step and its gradient is clipped by itself, as if it were trained alone on these pairs. `expert_of`
    is the number of the expert that a pair trains, None the number of its domain; `batch.expert_N` has it for the
    module. `standardizers` has the zero and unit of each.
    """

    name: str
    module: nn.Module
    learn: tuple[nn.Parameter, ...]
    objective: Objective
    select: Callable[[Preference], bool] = lambda preference: not preference.capability
    standardize: Standardize | None = None
    prepare: Callable[[], None] | None = None
    solve: Solve | None = None
    keep: tuple[Tensor, ...] = ()
    rated: bool = False
    learning_rate: float | None = None
    experts: tuple[tuple[nn.Parameter, ...], ...] = ()
    expert_of: Callable[[Preference], int] | None = None
    standardizers: tuple[Standardize, ...] = ()


class System(nn.Module):
    """A reward model made of a backbone and whatever the recipe adds. Subclasses are named `Recipe`.

    `presets["paper"]` holds the paper's settings by dotted key; the practical preset is the defaults.
    """

    Config: ClassVar[type[SystemConfig]] = SystemConfig
    paper: ClassVar[str] = ""
    presets: ClassVar[Presets] = {"paper": PAPER_TRAINING, "practical": {}}
    tunes: ClassVar[tuple[Tune, ...]] = ("full", "lora", "frozen")
    uses_capabilities: ClassVar[bool] = False
    """Whether pairs that judge one capability are for this recipe; others never see them."""
    made_by: ClassVar[str] = ""
    """The command that makes runs of this recipe, where it is not `moreward train`."""

    @classmethod
    def reads_with(cls, config: Any, encoder: Encoder, folder: Path | None) -> Encoder:
        """The encoder of a run, given that of its backbone. `folder`: of the finished model, None in training."""
        return encoder

    @classmethod
    def settle(cls, config: SystemConfig, preferences: Sequence[Preference]) -> SystemConfig:
        """The settings with what the training pairs decide filled in, before the system is made of them."""
        return config

    def meet(self, preferences: Sequence[Preference]) -> list[str]:
        """See the training pairs that are left after tokenising, before `stages` is asked. Returns what of them will
        not be used, in sentences."""
        return []

    def __init__(self, config: SystemConfig, backbone: Backbone, domains: Sequence[str]) -> None:
        super().__init__()
        if config.tune not in self.tunes:
            raise ConfigError(f"tune: this recipe takes {', '.join(self.tunes)} (got {config.tune!r})")
        self.config = config
        self.domains = tuple(domains)
        self.expert_names = expert_names(domains)

    @property
    def expert_labels(self) -> tuple[str, ...]:
        """What users call the experts: the domain of each; empty where there is nothing to choose from."""
        return ()

    @property
    def member_labels(self) -> tuple[str, ...]:
        """What users call the members, where all judge every row: the columns of `Rewards.expert_reward_NK`."""
        return ()

    def forward(self, batch: Batch) -> Rewards:
        raise NotImplementedError

    def stages(self, pairwise: Objective) -> list[Stage]:
        """The training of this system, in order. `pairwise` is the configured loss over pairs."""
        raise NotImplementedError

    def explained(self, batch: Batch, output: Rewards) -> list[Explanation]:
        """What each reward of `output` is made of; empty where rewards have no parts."""
        return []

    @classmethod
    def equal_budget(cls, config: Any) -> Mapping[str, Mapping[str, Any]]:
        """Settings under which this very recipe is a single model with as many parameters in all (`total`) or as many
        that one conversation meets (`active`); empty where the plain single models are the measure."""
        return {}

    def adapter_experts(self) -> dict[str, tuple[RewardHead, Standardize]]:
        """Experts that are adapters in the backbone's bank: what makes a PEFT directory of each."""
        return {}

    def backbones(self) -> list[Backbone]:
        return [m for m in self.modules() if isinstance(m, Backbone)]

    def saved_tensors(self) -> dict[str, Tensor]:
        """Everything that the pretrained directory does not hold: what a run must store to be the same again."""
        kept = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        kept = {k: v for k, v in kept.items() if k in self.state_dict()}
        if self.config.tune == "full":
            return kept
        return {k: v for k, v in kept.items() if k not in self._pretrained_names()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Copy stored tensors in. Returns faults: names missing, left over or of another shape."""
        own = self.saved_tensors()
        faults = [f"tensor {k!r} is missing" for k in own if k not in tensors]
        faults += [f"tensor {k!r} is not of this system" for k in tensors if k not in own]
        for name in own.keys() & tensors.keys():
            if own[name].shape != tensors[name].shape:
                faults.append(f"tensor {name!r} has shape {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}")
        if not faults:
            with torch.no_grad():
                for name, value in own.items():
                    value.copy_(tensors[name])
        return faults

    def _pretrained_names(self) -> set[str]:
        return {
            f"{path}.model.{name}"
            for path, module in self.named_modules()
            if isinstance(module, Backbone)
            for name in module.pretrained
        }

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def num_active_parameters(self) -> int:
        """Parameters that one conversation meets, its router's included."""
        return self.num_parameters()


class GrowingSystem(System):
    """Experts that can come, go and be given anew, while the others stay as they are: what `extend`, `replace` and
    `remove` need to know of a recipe."""

    mixes: ClassVar[str] = ""
    """How rewards can move in a change in which an expert does not, after "it comes"."""

    @classmethod
    def grows_by(cls, settings: Mapping[str, Any], label: str) -> Axis:
        """What the expert `label`, which may not be there yet, stands for under these settings."""
        return "domain"

    @classmethod
    def changed(cls, settings: Mapping[str, Any], kind: Kind, label: str) -> dict[str, Any]:
        """A run's settings after a change. ConfigError where it cannot be made."""
        return dict(settings)

    def part_labels(self, axis: Axis) -> tuple[str, ...]:
        """What users call the experts of a kind."""
        return self.expert_labels

    def names_of(self, label: str) -> tuple[str, ...]:
        """The names under which the tensors of an expert are stored."""
        return (self.expert_names[self.expert_labels.index(label)],)

    def own_tensors(self, label: str) -> set[str]:
        """The names of the stored tensors that one expert alone has: they go with it."""
        return {k for k in self.saved_tensors() for name in self.names_of(label) if f".{name}." in k}

    def moved_by(self, label: str) -> set[str]:
        """The experts whose rewards a change of one may move."""
        return {label}

    def anew(self, label: str) -> set[str]:
        """The names of stored tensors that a change of one expert computes anew, whatever shape they had."""
        return set()

    def change_stages(self, kind: Kind, label: str, pairwise: Objective) -> list[Stage]:
        """What a change takes: the expert, unless it goes, and what mixes the experts again. No other may move."""
        raise NotImplementedError

    def each_part(self, batch: Batch) -> dict[str, float]:
        """What every expert says of the one conversation of `batch`, each computed by itself, so that the bits do not
        depend on how many there are."""
        raise NotImplementedError


class GatedSystem(GrowingSystem):
    """An expert per domain behind a router that reads the prompt. Only here oracle and random routers have a meaning.

    Subclasses set `self.routed` and say, by expert name, what each stage may move and what standardises it.
    """

    routed: Routed[Any]
    mixes: ClassVar[str] = "by the router, which sends prompts to other experts or weighs them otherwise"

    @property
    def expert_labels(self) -> tuple[str, ...]:
        return self.domains

    def forward(self, batch: Batch, routing: Routing | None = None) -> Rewards:
        return self.routed(batch, routing)  # type: ignore[no-any-return]

    def route(self, batch: Batch) -> Routing:
        """Where each conversation goes."""
        return self.routed.route(batch)

    def route_prompts(self, batch: Batch) -> Routing:
        """As `route`, one row for each prompt."""
        return self.routed.router(batch)  # type: ignore[no-any-return]

    def judge(self, batch: Batch, experts_NK: Tensor) -> Tensor:
        """Standardised rewards of the named experts."""
        return self.routed.judge(batch, experts_NK)

    def expert_parameters(self, name: str) -> list[nn.Parameter]:
        raise NotImplementedError

    def router_parameters(self) -> list[nn.Parameter]:
        raise NotImplementedError

    def standardizer(self, name: str) -> Standardize:
        raise NotImplementedError

    def own_tensors(self, label: str) -> set[str]:
        """As above; a zero and unit that all share are not among them."""
        name = self.expert_names[self.expert_labels.index(label)]
        units = {id(b) for other in self.expert_names if other != name for b in self.standardizer(other).buffers()}
        mine = {id(p) for p in self.expert_parameters(name)}
        mine |= {id(b) for b in self.standardizer(name).buffers()} - units
        named = [*self.named_parameters(remove_duplicate=False), *self.named_buffers(remove_duplicate=False)]
        return {k for k, v in named if id(v) in mine}

    def change_stages(self, kind: Kind, label: str, pairwise: Objective) -> list[Stage]:
        return [self.router_stage()] if kind == "remove" else self.new_domain_stages(label, pairwise)

    def each_part(self, batch: Batch) -> dict[str, float]:
        alone = [torch.tensor([[e]], device=batch.ids_NT.device) for e in range(len(self.expert_labels))]
        return {name: float(self.judge(batch, e_11)) for name, e_11 in zip(self.expert_labels, alone, strict=True)}

    def raw_size(self, name: str) -> float:
        """How large the numbers are that an expert's raw reward is the sum of: what its rounding follows."""
        return max(1.0, abs(float(self.standardizer(name).mean)))

    def new_domain_stages(self, domain: str, pairwise: Objective) -> list[Stage]:
        """What a domain that comes later takes: its expert, and the router again. No old expert may move."""
        return [*self.expert_stages(domain, pairwise), self.router_stage()]

    def expert_stages(self, domain: str, pairwise: Objective) -> list[Stage]:
        """All that makes the expert of one domain."""
        return [self.expert_stage(domain, pairwise)]

    def expert_stage(self, domain: str, pairwise: Objective) -> Stage:
        index = self.domains.index(domain)
        name = self.expert_names[index]
        return Stage(
            name=f"expert/{name}",
            module=OneExpert(self.routed.experts, index),
            learn=tuple(self.expert_parameters(name)),
            objective=pairwise,
            select=lambda preference: preference.domain == domain and not preference.capability,
            standardize=self.standardizer(name),
        )

    def router_stage(self) -> Stage:
        return Stage(
            name="router", module=self.routed.router, learn=tuple(self.router_parameters()), objective=DomainLoss()
        )

    def replay_stage(self, earlier: Replay) -> Stage:
        """As the router stage, without the old domains' prompts: the router's encoder stays as it is, so that what it
        said of them stays true, and the gate alone is fitted, on `earlier` and on what is at hand."""
        router = self.routed.router
        assert isinstance(router.router, TopKRouter)
        gate = router.router.gate

        def solve(train: Iterable[Batch], held_out: Iterable[Batch]) -> Mapping[str, Any]:
            new = [
                read_batches(router, batches, self.domains, held_out=is_held_out)
                for batches, is_held_out in ((train, False), (held_out, True))
            ]
            return fit_gate(gate, earlier.of(self.domains) + new[0] + new[1])

        learn = tuple(router.router.parameters())
        return Stage(name="gate", module=router, learn=learn, objective=DomainLoss(), solve=solve)


class RoutedSystem(GatedSystem):
    """What RODOS and ARLISS share: experts that have nothing in common but a frozen backbone, a stage for each."""

    def stages(self, pairwise: Objective) -> list[Stage]:
        experts = [stage for domain in self.domains for stage in self.expert_stages(domain, pairwise)]
        return [*experts, self.router_stage()]


def gate_of(system: System) -> PromptRouter | None:
    """The router whose gate is linear in what it reads of a prompt, so that it can be fitted on that alone."""
    if isinstance(system, GatedSystem) and isinstance(system.routed.router.router, TopKRouter):
        return system.routed.router
    return None


def expert_names(domains: Sequence[str]) -> tuple[str, ...]:
    """Domains as names of experts, fit for files and parameters: lower case letters, digits, `-` and `_`.

    A name that an earlier domain has already gets a hash of its domain behind it: domains added later change no name.
    """
    names: list[str] = []
    for domain in domains:
        name = _slug(domain)
        names.append(f"{name}-{_short_hash(domain)}" if name in names else name)
    if len(set(names)) < len(names):
        raise ConfigError(f"domains: {list(domains)} become the expert names {names}, which must differ")
    return tuple(names)


def _slug(domain: str) -> str:
    name = re.sub(r"[^a-z0-9_]+", "-", domain.lower()).strip("-_")[:64]
    if not name:
        return f"d-{_short_hash(domain)}"
    return f"{name}_" if name in dir(nn.ModuleDict()) else name  # torch refuses its own attributes as names


def _short_hash(domain: str) -> str:
    return hashlib.sha256(domain.encode()).hexdigest()[:8]


def own_copy(backbone: Backbone, tune: str) -> Backbone:
    """A backbone to train alone. A frozen one is never changed, so all experts may share it."""
    return backbone if tune == "frozen" else copy.deepcopy(backbone)


def prepare_backbone(backbone: Backbone, config: SystemConfig, adapters: Sequence[str]) -> None:
    """Bring the backbone into the state that `tune` names: with adapters, with kept features, or as it is.

    An adapter's start follows torch's seed and its own name, not the order of creation."""
    if backbone.pooling == "spans" and config.tune != "frozen":
        raise ConfigError(f"pooling: 'spans' is read from a frozen backbone; use tune=frozen (got tune={config.tune})")
    if config.tune == "lora":
        assert isinstance(config, LoRAConfig)
        bank = LoRABank(
            backbone,
            rank=config.rank,
            alpha=config.alpha,
            dropout=config.dropout,
            targets=config.targets,
            top_layers=config.adapter_layers,
            active_tokens=config.active_tokens,
            seed=torch.initial_seed(),
        )
        for name in adapters:
            bank.add(name)
    elif config.tune == "frozen" and backbone.store is None:
        backbone.store = FeatureStore()


def new_head(backbone: Backbone, config: SystemConfig) -> RewardHead:
    """Of the kind that the configuration names."""
    return RewardHead(backbone.hidden_size, config.head_kind, backbone.width)


def learnable(backbone: Backbone, config: SystemConfig, adapter: str | None = None) -> list[nn.Parameter]:
    """The backbone's parameters that `tune` lets learn: all, one adapter's, or none."""
    if config.tune == "full":
        return list(backbone.parameters())
    if config.tune == "lora" and adapter is not None and backbone.bank is not None:
        return list(backbone.bank.adapters[adapter].parameters())
    return []
