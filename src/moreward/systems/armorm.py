"""ArmoRM: absolute ratings by linear probes on a frozen backbone, weighed by a gate that reads the prompt
(arXiv 2406.12845).

N conversations, P prompts, D hidden, K objectives, A attributes: the objectives, and the length where that is debiased.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moreward.errors import ConfigError, DataError
from moreward.nn.backbone import Backbone
from moreward.nn.debias import amount_to_subtract, spearman
from moreward.nn.experts import OneExpert, Standardize
from moreward.nn.gates import ObjectiveGate, read_with_prompts
from moreward.nn.losses import Objective
from moreward.nn.ridge import fit_ridge
from moreward.systems._base import (
    Axis,
    GrowingSystem,
    Kind,
    Presets,
    Stage,
    SystemConfig,
    Tune,
    expert_names,
    prepare_backbone,
)
from moreward.types import Batch, Explanation, Rewards, Routing

log = logging.getLogger(__name__)

LENGTH = "length"

OBJECTIVES: tuple[str, ...] = (
    *(f"helpsteer-{name}" for name in ("helpfulness", "correctness", "coherence", "complexity", "verbosity")),
    "ultrafeedback-overall_score",
    *(f"ultrafeedback-{name}" for name in ("instruction_following", "truthfulness", "honesty", "helpfulness")),
    "beavertails-is_safe",
    "prometheus-score",
    "argilla-overall_quality",
    "argilla-judge_lm",
    *(f"code-{name}" for name in ("complexity", "style", "explanation", "instruction-following", "readability")),
)
"""The nineteen of the paper, in its order."""


class ArmoRMConfig(SystemConfig):
    tune: Tune = "frozen"
    objectives: tuple[str, ...] = Field(
        (), description="ratings to learn, in order; empty: all that data.ratings has, else one per domain from pairs"
    )
    intercept: bool = Field(False, description="probes with an intercept; the paper has none")
    gate_width: int = Field(1024, ge=1)
    gate_layers: int = Field(3, ge=1)
    gate_dropout: float = Field(0.2, ge=0, lt=1)
    temperature: float = Field(10.0, gt=0, description="divides the gate's logits")
    debias: str | None = Field(None, description="an objective, or `length`, that the others shall not follow")
    debias_threshold: float = Field(0.03, ge=0, lt=1, description="rank correlation that may stay, one-sided")
    debias_limit: float = Field(1.0, gt=0, description="the most of the attribute that is subtracted")
    debias_own: float = Field(1.0, description="what is subtracted from the attribute itself; 1 removes it")

    @model_validator(mode="after")
    def _names_are_clear(self) -> Self:
        if len(set(self.objectives)) < len(self.objectives) or LENGTH in self.objectives:
            raise ValueError(f"objectives: each once, and none is called {LENGTH}, which is always there to debias")
        if self.objectives and self.debias not in (None, LENGTH, *self.objectives):
            raise ValueError(f"debias: {self.debias!r} is neither {LENGTH} nor one of the objectives")
        return self


@dataclass(frozen=True, kw_only=True)
class Explained:
    """A batch as users of ArmoRM know it, in float64.

    `rewards` (N, K) are the objectives' rewards as the probes give them, `gating_output` (N, K) what the gate weighs
    the debiased ones with, `score` (N,) the reward. `attributes` (N, A) are `rewards` and, where it is debiased, the
    length; `coefficients` (N, A) = gating_output · Tᵀ, and Σ attributes · coefficients = score.
    """

    rewards: Tensor
    gating_output: Tensor
    score: Tensor
    attributes: Tensor
    coefficients: Tensor


class Probes(nn.Module):
    """K linear maps of a frozen backbone's vectors, in float64, each with a zero and a unit of its own."""

    def __init__(self, backbone: Backbone, names: Sequence[str], *, intercept: bool) -> None:
        super().__init__()
        self.backbone = backbone
        size = backbone.hidden_size
        self.probes = nn.ModuleDict({n: nn.Linear(size, 1, bias=intercept, dtype=torch.float64) for n in names})
        self.standardize = nn.ModuleDict({name: Standardize() for name in names})
        for parameter in self.probes.parameters():
            nn.init.zeros_(parameter)

    def probe(self, name: str) -> nn.Linear:
        return cast(nn.Linear, self.probes[name])

    def standardizer(self, name: str) -> Standardize:
        return cast(Standardize, self.standardize[name])

    def read(self, hidden_ND: Tensor) -> Tensor:
        """`reward_NK` in float64."""
        with torch.autocast(hidden_ND.device.type, enabled=False):
            hidden_ND = hidden_ND.double()
            rewards = [self.standardize[name](probe(hidden_ND)) for name, probe in self.probes.items()]
        return torch.cat(rewards, dim=1)

    def forward(self, batch: Batch, expert_N: Tensor) -> Tensor:
        """Row n by probe `expert_N[n]`, as every bank of experts."""
        reward_NK = self.read(self.backbone(batch.ids_NT, batch.mask_NT))
        return reward_NK.gather(1, expert_N[:, None])[:, 0].float()


class Recipe(GrowingSystem):
    """Stage 1: a probe for each objective, by ridge regression on ratings; stage 2: the gate, on pairs.

    Without ratings there is a probe for each domain, fitted to its pairs (ours): then the gate weighs domains.
    """

    Config = ArmoRMConfig
    paper = "arXiv:2406.12845"
    presets: ClassVar[Presets] = {
        "paper": {
            # Length, batch, steps and dropout are those of the authors' scripts; clipping is ours.
            "tune": "frozen",
            "pooling": "last",
            "data.max_length": 8192,
            "data.val_fraction": 0.2,
            "train.learning_rate": 1e-3,
            "train.weight_decay": 0.0,
            "train.batch_size": 1024,
            "train.epochs": 1000,
            "train.max_steps": 2000,
            "train.schedule": "cosine",
            "train.warmup": 0.0,
            "train.patience": 0,
            "system.objectives": list(OBJECTIVES),
            "system.intercept": False,
            "system.gate_width": 1024,
            "system.gate_layers": 3,
            "system.gate_dropout": 0.2,
            "system.temperature": 10.0,
            "system.debias": "helpsteer-verbosity",
            "system.debias_threshold": 0.03,
            "system.debias_limit": 1.0,
            "system.debias_own": 1.0,
        },
        "practical": {},
    }
    tunes = ("frozen",)
    config: ArmoRMConfig
    debias_AK: Tensor
    length_mean: Tensor
    length_std: Tensor

    def __init__(self, config: ArmoRMConfig, backbone: Backbone, domains: Sequence[str]) -> None:
        super().__init__(config, backbone, domains)
        self.objectives = config.objectives or self.domains
        if config.debias not in (None, LENGTH, *self.objectives):
            raise ConfigError(
                f"system.debias: {config.debias!r} is neither {LENGTH} nor an objective: {', '.join(self.objectives)}"
            )
        prepare_backbone(backbone, config, adapters=())
        self.names = expert_names(self.objectives)
        self.probes = Probes(backbone, self.names, intercept=config.intercept and bool(config.objectives))
        self.gate = ObjectiveGate(
            backbone.hidden_size,
            len(self.names),
            width=config.gate_width,
            num_layers=config.gate_layers,
            temperature=config.temperature,
            dropout=config.gate_dropout,
        )
        self.attributes = (*self.objectives, *([LENGTH] if config.debias == LENGTH else []))
        self.register_buffer("debias_AK", torch.eye(len(self.attributes), len(self.names), dtype=torch.float64))
        self.register_buffer("length_mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("length_std", torch.ones((), dtype=torch.float64))

    @property
    def expert_labels(self) -> tuple[str, ...]:
        return self.objectives

    # ---- changes: an objective's probe, then the gate again

    mixes: ClassVar[str] = "by the gate, which weighs the objectives anew"

    @classmethod
    def grows_by(cls, settings: Mapping[str, Any], label: str) -> Axis:
        return "objective" if settings.get("objectives") else "domain"

    @classmethod
    def changed(cls, settings: Mapping[str, Any], kind: Kind, label: str) -> dict[str, Any]:
        if cls.grows_by(settings, label) == "domain":
            return dict(settings)
        if kind == "replace":
            raise ConfigError(f"objective {label!r}: ratings of both kinds would be mixed; remove it, then add it")
        left = [name for name in settings["objectives"] if name != label]
        return {**settings, "objectives": [*left, label] if kind == "extend" else left}

    def names_of(self, label: str) -> tuple[str, ...]:
        return (self.names[self.objectives.index(label)],)

    def anew(self, label: str) -> set[str]:
        return {"debias_AK", "length_mean", "length_std"} if self.config.debias else {"debias_AK"}

    def change_stages(self, kind: Kind, label: str, pairwise: Objective) -> list[Stage]:
        mixed = [*([self._debias_stage(pairwise)] if self.config.debias else []), self._gate_stage(pairwise)]
        if kind == "remove":
            return mixed
        if self.config.objectives:
            return [self._ratings_stage(pairwise, (label,)), *mixed]
        return [self._domain_stage(self.objectives.index(label), label, pairwise), *mixed]

    def each_part(self, batch: Batch) -> dict[str, float]:
        reward_1K = self.probes.read(self.probes.backbone(batch.ids_NT, batch.mask_NT))
        return dict(zip(self.objectives, reward_1K[0].tolist(), strict=True))

    def forward(self, batch: Batch) -> Rewards:
        hidden_ND, prompt_PD = read_with_prompts(self.probes.backbone, batch)
        attribute_NA = self._attributes(hidden_ND, batch)
        logits_PK, weights_PK = self.gate(prompt_PD)
        gate_NK = self.gate.scale.double() * weights_PK.double()[batch.prompt_of_N]
        reward_N = ((attribute_NA @ self.debias_AK) * gate_NK).sum(1)
        weights_NK, experts_NK = weights_PK[batch.prompt_of_N].sort(dim=1, descending=True, stable=True)
        return Rewards(
            reward_N=reward_N.float(),
            routing=Routing(experts_NK=experts_NK, weights_NK=weights_NK, logits_NE=logits_PK[batch.prompt_of_N]),
            expert_reward_NK=attribute_NA.gather(1, experts_NK),
        )

    def _attributes(self, hidden_ND: Tensor, batch: Batch) -> Tensor:
        reward_NK = self.probes.read(hidden_ND)
        if self.config.debias != LENGTH:
            return reward_NK
        length_N = (response_length(batch) - self.length_mean) / self.length_std
        return torch.cat([reward_NK, length_N[:, None]], dim=1)

    @torch.no_grad()
    def explain(self, batch: Batch) -> Explained:
        """What the reward of each conversation is made of."""
        hidden_ND, prompt_PD = read_with_prompts(self.probes.backbone, batch)
        attribute_NA = self._attributes(hidden_ND, batch)
        gate_NK = (self.gate.scale.double() * self.gate(prompt_PD)[1].double())[batch.prompt_of_N]
        return Explained(
            rewards=attribute_NA[:, : len(self.objectives)],
            gating_output=gate_NK,
            score=((attribute_NA @ self.debias_AK) * gate_NK).sum(1),
            attributes=attribute_NA,
            coefficients=gate_NK @ self.debias_AK.T,
        )

    def explained(self, batch: Batch, output: Rewards) -> list[Explanation]:
        told = self.explain(batch)
        part_NA = told.attributes * told.coefficients
        return [Explanation(parts=dict(zip(self.attributes, part_A, strict=True))) for part_A in part_NA.tolist()]

    # ---- training

    def stages(self, pairwise: Objective) -> list[Stage]:
        if self.config.objectives:
            stages = [self._ratings_stage(pairwise, self.objectives)]
        else:
            stages = [self._domain_stage(k, domain, pairwise) for k, domain in enumerate(self.domains)]
        if self.config.debias:
            stages.append(self._debias_stage(pairwise))
        return [*stages, self._gate_stage(pairwise)]

    def _gate_stage(self, pairwise: Objective) -> Stage:
        return Stage(name="gate", module=self, learn=tuple(self.gate.parameters()), objective=pairwise)

    def _ratings_stage(self, pairwise: Objective, objectives: Sequence[str]) -> Stage:
        probes = [self.probes.probe(self.names[self.objectives.index(one)]) for one in objectives]
        return Stage(
            name="objectives",
            module=self,
            learn=tuple(parameter for probe in probes for parameter in probe.parameters()),
            objective=pairwise,
            rated=True,
            solve=partial(self.solve_objectives, objectives),
        )

    def _domain_stage(self, index: int, domain: str, pairwise: Objective) -> Stage:
        name = self.names[index]
        return Stage(
            name=f"objective/{name}",
            module=OneExpert(self.probes, index),
            learn=tuple(self.probes.probe(name).parameters()),
            objective=pairwise,
            select=lambda preference: preference.domain == domain and not preference.capability,
            standardize=self.probes.standardizer(name),
        )

    def _debias_stage(self, pairwise: Objective) -> Stage:
        return Stage(
            name="debias",
            module=self,
            learn=(),
            objective=pairwise,
            solve=self.solve_debias,
            keep=(self.debias_AK, self.length_mean, self.length_std),
        )

    def solve_objectives(
        self, objectives: Sequence[str], train: Iterable[Batch], val: Iterable[Batch]
    ) -> Mapping[str, Any]:
        """Ridge regression per objective; alpha by the squared error on the held-out conversations."""
        (x_ND, y_NK), (val_x_ND, val_y_NK) = self._rated(train), self._rated(val)
        told: dict[str, Any] = {}
        for objective in objectives:
            k = self.objectives.index(objective)
            if bool(y_NK[:, k].isnan().all()):
                raise DataError(f"data.ratings: no conversation of the training part is rated for {objective!r}")
            fit = fit_ridge((x_ND, y_NK[:, k]), (val_x_ND, val_y_NK[:, k]), intercept=self.config.intercept)
            probe = self.probes.probe(self.names[k])
            probe.weight.copy_(fit.weight_D[None])
            if self.config.intercept:
                probe.bias.fill_(fit.bias)
            predicted_N = val_x_ND.double() @ fit.weight_D + fit.bias
            told[objective] = {
                "train": fit.num_train,
                "val": fit.num_val,
                "alpha": fit.alpha,
                "train_mse": fit.train_mse,
                "val_mse": fit.val_mse,
                **_against_ratings(predicted_N, val_y_NK[:, k]),
            }
            if fit.val_mse is None:
                log.warning("%s: no held-out conversation is rated for it; alpha is %g unchosen", objective, fit.alpha)
        return told

    def _rated(self, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
        """`hidden_ND` and `ratings_NK` of all conversations."""
        backbone, hidden, ratings = self.probes.backbone, [], []
        for batch in batches:
            assert batch.ratings_NK is not None
            hidden.append(backbone(batch.ids_NT, batch.mask_NT))
            ratings.append(batch.ratings_NK)
        if not hidden:
            return torch.zeros(0, backbone.hidden_size), torch.zeros(0, len(self.names))
        return torch.cat(hidden), torch.cat(ratings)

    def solve_debias(self, train: Iterable[Batch], _: Iterable[Batch]) -> Mapping[str, Any]:
        """T on both responses of the training pairs: how much of the attribute goes off each objective."""
        config, backbone = self.config, self.probes.backbone
        read = [(self.probes.read(backbone(b.ids_NT, b.mask_NT)), response_length(b)) for b in train]
        reward_NK, length_N = (torch.cat(parts) for parts in zip(*read, strict=True))
        self.length_mean.copy_(length_N.mean())
        self.length_std.copy_(length_N.std(correction=0).clamp(min=1e-6))
        row = self.attributes.index(config.debias)
        attribute_N = (length_N - self.length_mean) / self.length_std if config.debias == LENGTH else reward_NK[:, row]
        told: dict[str, Any] = {}
        for k, objective in enumerate(self.objectives):
            if objective == config.debias:
                self.debias_AK[row, k] = 1 - config.debias_own
                continue
            found = amount_to_subtract(
                reward_NK[:, k].cpu().numpy(),
                attribute_N.cpu().numpy(),
                threshold=config.debias_threshold,
                limit=config.debias_limit,
            )
            self.debias_AK[row, k] = -found.amount
            told[objective] = asdict(found)
        if missed := [name for name, found in told.items() if not found["reached"]]:
            log.warning(
                "debias: %s still follow %s by more than %g at the limit of %g; raise system.debias_limit",
                ", ".join(missed), config.debias, config.debias_threshold, config.debias_limit,
            )  # fmt: skip
        return {"attribute": config.debias, "responses": len(length_N), "objectives": told}


def response_length(batch: Batch) -> Tensor:
    """`length_N` of the responses in tokens; what truncation cut off is not counted."""
    return (batch.mask_NT.sum(1) - batch.prompt_mask_PT.sum(1)[batch.prompt_of_N]).double()


def _against_ratings(predicted_N: Tensor, rating_N: Tensor) -> dict[str, float | None]:
    """How held-out predictions agree with the ratings; None where none is rated."""
    known_N = ~rating_N.isnan()
    if not bool(known_N.any()):
        return {"val_constant_mse": None, "val_spearman": None}
    rating_N = rating_N[known_N].double()
    return {
        "val_constant_mse": float((rating_N - rating_N.mean()).square().mean()),
        "val_spearman": spearman(predicted_N[known_N].cpu().numpy(), rating_N.cpu().numpy()),
    }
