"""DMoERM: a router picks the task, and one expert per capability of that task speaks before a network fuses what they
read (arXiv 2403.01197).

N conversations, E tasks, K points of a task, D hidden.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import nn

from moreward.data.points import load_points
from moreward.data.split import split_by_group
from moreward.errors import ConfigError, DataError
from moreward.nn.backbone import Backbone
from moreward.nn.experts import (
    AdapterExperts,
    HeadedExperts,
    OneExpert,
    OwnBackbones,
    OwnExperts,
    RewardHead,
    Standardize,
)
from moreward.nn.fusion import Fusion, TaskMixtures
from moreward.nn.losses import Objective
from moreward.nn.mixture import Routed
from moreward.nn.routers import PromptRouter, TopKRouter
from moreward.systems._base import (
    ROUTER,
    Axis,
    Kind,
    LoRAConfig,
    Presets,
    RoutedSystem,
    Stage,
    SystemConfig,
    expert_names,
    learnable,
    new_head,
    own_copy,
    prepare_backbone,
)
from moreward.types import Batch, Explanation, Preference, Rewards

BASELINE = "(baseline)"
"""The part of a reward that no point gave: what the fusion says of the mean states."""


class DmoermConfig(LoRAConfig):
    points: str | dict[str, Any] | None = Field(
        None, description="tasks and their points: a YAML file, `dmoerm` or a mapping; None: those in the data"
    )
    capabilities: dict[str, tuple[str, ...]] | None = Field(
        None, description="the points of each task; a run sets it from `points` and the data"
    )
    fuse: Literal["states", "rewards"] = Field("states", description="what the fusion reads of each capability expert")
    task_share: float = Field(0.6, gt=0, lt=1, description="of a task's pairs for phase 1; phase 3 has the others")
    train_together: bool = Field(False, description="all capability experts in one pass over mixed batches")
    task_learning_rate: float | None = Field(None, gt=0, le=1, description="phase 1; None: the run's")
    point_learning_rate: float | None = Field(None, gt=0, le=1, description="phase 2; None: the run's, 1e-4 for full")
    fusion_learning_rate: float | None = Field(1e-3, gt=0, le=1, description="phase 3; None: the run's")
    router_learning_rate: float | None = Field(None, gt=0, le=1, description="the router; None: the run's")

    @model_validator(mode="after")
    def _states_differ(self) -> Self:
        if self.tune == "frozen" and self.head_kind == "linear" and self.fuse == "states":
            raise ValueError(
                "fuse=states on a frozen backbone needs head=mlp, else all states are one; or fuse=rewards"
            )
        return self

    @property
    def point_rate(self) -> float | None:
        return self.point_learning_rate or (1e-4 if self.tune == "full" else None)


class FusionOf(OneExpert[TaskMixtures]):
    """What phase 3 trains: the experts below the fusion stand still, their dropout included."""

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.experts.members.eval()
        return self


@dataclass(frozen=True)
class _Point:
    """A capability expert: its task and its name in the data, its number among the members, its own name."""

    task: int
    capability: str
    member: int
    name: str


@dataclass(frozen=True)
class _Shares:
    """A task's pairs by phase, and what stands against training it. The pairs are kept for their identity."""

    first: dict[int, Preference]
    third: dict[int, Preference]
    faults: list[str]


class Recipe(RoutedSystem):
    """Per task: a task model, capability experts that start from it, and a fusion of what these read.

    `tune=full` is the paper's: a model per task and LoRA experts on it. With `lora`, our own variant, all tasks share
    one frozen backbone, phase 1 trains an adapter and each capability expert starts as a copy of it. With `frozen`
    experts are heads.
    """

    Config = DmoermConfig
    paper = "arXiv:2403.01197"
    presets: ClassVar[Presets] = {
        "paper": {
            # From the text and the public repository. One step there is one prompt with all its pairs; evaluations are
            # every 100 steps: neither can be said here. Its router rate, 3e-8, moves nothing in a run of any length.
            "tune": "full",
            "pooling": "own",
            "system.points": "dmoerm",
            "system.rank": 32,
            "system.alpha": 32.0,
            "system.dropout": 0.05,
            "system.targets": ["q_proj", "v_proj"],
            "system.fuse": "states",
            "system.head": "linear",
            "system.task_share": 0.6,
            "system.task_learning_rate": 1e-7,
            "system.point_learning_rate": 5e-5,
            "system.fusion_learning_rate": 1e-6,
            "system.router_learning_rate": 1e-5,
            "train.schedule": "constant",
            "train.warmup": 0.0,
            "train.weight_decay": 0.0,
            "train.patience": 20,
            "data.val_fraction": 0.3,
        },
        "practical": {},
    }
    uses_capabilities = True
    config: DmoermConfig
    routed: Routed[TaskMixtures]

    @classmethod
    def settle(cls, config: SystemConfig, preferences: Sequence[Preference]) -> SystemConfig:
        """The points of every task: those configured, else those that its pairs name."""
        assert isinstance(config, DmoermConfig)
        configured = {} if config.points is None else load_points(config.points)
        found: dict[str, set[str]] = {p.domain: set() for p in preferences}
        for p in preferences:
            found[p.domain] |= {p.capability} - {""}
        new = {task: tuple(configured.get(task) or sorted(names)) for task, names in sorted(found.items())}
        return config.model_copy(update={"capabilities": {**new, **(config.capabilities or {})}})

    # ---- changes: of a task with its points, or of one point, `task/point`, and the fusion that reads it

    @classmethod
    def grows_by(cls, settings: Mapping[str, Any], label: str) -> Axis:
        return "capability" if label.rpartition("/")[0] in (settings.get("capabilities") or {}) else "domain"

    @classmethod
    def changed(cls, settings: Mapping[str, Any], kind: Kind, label: str) -> dict[str, Any]:
        known = settings.get("capabilities") or {}
        if cls.grows_by(settings, label) == "domain":  # the points of the task may be others
            return {**settings, "capabilities": {task: names for task, names in known.items() if task != label}}
        task, _, point = label.rpartition("/")
        left = [name for name in known[task] if kind == "replace" or name != point]
        left += [point] if kind == "extend" else []
        if not left or (kind == "extend" and len(left) == 1):
            raise ConfigError(f"task {task!r} has no other point than {point!r}: replace the whole task")
        return {**settings, "capabilities": {**known, task: left}}

    def part_labels(self, axis: Axis) -> tuple[str, ...]:
        if axis == "domain":
            return self.domains
        return tuple(self._label(point) for point in self.points)

    def _label(self, point: _Point) -> str:
        return f"{self.domains[point.task]}/{point.capability}"

    def names_of(self, label: str) -> tuple[str, ...]:
        if label not in self.domains:
            return tuple(point.name for point in self.points if self._label(point) == label)
        task = self.domains.index(label)
        return (self.expert_names[task], *(point.name for point in self._of(task)))

    def own_tensors(self, label: str) -> set[str]:
        """All that stands under the names of the task and its points, or of the point."""
        return {k for k in self.saved_tensors() for name in self.names_of(label) if f".{name}." in k}

    def anew(self, label: str) -> set[str]:
        """The fusion that reads a point reads others afterwards."""
        domain = label.rpartition("/")[0]
        if label in self.domains or domain not in self.domains:
            return set()
        name = self.expert_names[self.domains.index(domain)]
        mixture = self.routed.experts
        theirs = [*mixture.fusions[name].parameters(), *mixture.fusions[name].buffers()]
        mine = {id(t) for t in (*theirs, *mixture.standardize[name].buffers())}
        return {k for k, v in self.saved_tensors().items() if id(v) in mine}

    def moved_by(self, label: str) -> set[str]:
        if label not in self.domains:
            return {label, label.rpartition("/")[0]}
        task = self.domains.index(label)
        return {label, *(self._label(point) for point in self._of(task))}

    def change_stages(self, kind: Kind, label: str, pairwise: Objective) -> list[Stage]:
        task, _, name = label.rpartition("/")
        if label in self.domains or task not in self.domains:
            return super().change_stages(kind, label, pairwise)
        self._check([task])
        number = self.domains.index(task)
        new = [point for point in self._of(number) if point.capability == name]
        return [*(self.point_stage(point, pairwise) for point in new), self.fusion_stage(number, pairwise)]

    def each_part(self, batch: Batch) -> dict[str, float]:
        """The tasks, and every point by itself."""
        alone = {self._label(point): torch.tensor([point.member], device=batch.ids_NT.device) for point in self.points}
        points = {label: float(self.members(batch, member_1)) for label, member_1 in alone.items()}
        return {**super().each_part(batch), **points}

    def __init__(self, config: DmoermConfig, backbone: Backbone, domains: Sequence[str]) -> None:
        super().__init__(config, backbone, domains)
        self.seed = torch.initial_seed()
        self.points = self._points()
        self.shares: dict[str, _Shares] = {}
        names = [*self.expert_names, *(point.name for point in self.points)]
        size = backbone.hidden_size
        heads = {name: new_head(backbone, config) for name in names}
        members: HeadedExperts
        if config.tune == "full":
            members = OwnBackbones(self._own_backbones(backbone), heads, self._places())
        else:
            prepare_backbone(backbone, config, adapters=[*names, ROUTER])
            members = AdapterExperts(backbone, heads)
        adapter = len(names) if backbone.bank is not None else None
        router = PromptRouter(backbone, TopKRouter(size, len(domains)), adapter)
        by_task = {n: [p.member for p in self._of(t)] for t, n in enumerate(self.expert_names)}
        fusions = {name: self._fusion(len(points), size) for name, points in by_task.items() if points}
        self.routed = Routed(router, TaskMixtures(members, by_task, fusions))

    def _points(self) -> list[_Point]:
        points: list[_Point] = []
        for task, domain in enumerate(self.domains):
            capabilities = (self.config.capabilities or {}).get(domain, ())
            for capability, name in zip(capabilities, expert_names(capabilities), strict=True):
                # No name of a task holds two dashes, so these cannot meet.
                member = len(self.domains) + len(points)
                points.append(_Point(task, capability, member, f"{self.expert_names[task]}--{name}"))
        return points

    def _of(self, task: int) -> list[_Point]:
        return [point for point in self.points if point.task == task]

    def _places(self) -> list[tuple[int, int]]:
        of_points = [(t, a) for t in range(len(self.domains)) for a in range(len(self._of(t)))]
        return [*((t, -1) for t in range(len(self.domains))), *of_points]

    def _own_backbones(self, backbone: Backbone) -> dict[str, Backbone]:
        backbones = {name: own_copy(backbone, "full") for name in self.expert_names}
        for task, one in enumerate(backbones.values()):
            if points := self._of(task):
                adapters = self.config.model_copy(update={"tune": "lora"})
                prepare_backbone(one, adapters, adapters=[point.name for point in points])
        return backbones

    def _fusion(self, num_points: int, size: int) -> Fusion:
        if self.config.fuse == "rewards":
            return Fusion(num_points, 1, num_points, starts_as_mean=True)
        return Fusion(num_points, size, size)

    @property
    def members(self) -> HeadedExperts:
        return self.routed.experts.members

    def meet(self, preferences: Sequence[Preference]) -> list[str]:
        """Divide each task's pairs between phases 1 and 3, by prompt, and see which points have none."""
        remarks = []
        for task, domain in enumerate(self.domains):
            mine = [p for p in preferences if p.domain == domain]
            self.shares[domain] = self._share([p.capability for p in self._of(task)], mine, domain)
            known = {"", *(p.capability for p in self._of(task))}
            unknown = Counter(p.capability for p in mine if p.capability not in known)
            remarks += [f"{domain}: {n} pairs not used: {c} is none of its points" for c, n in sorted(unknown.items())]
        return remarks

    def _share(self, points: Sequence[str], mine: Sequence[Preference], domain: str) -> _Shares:
        whole = [p for p in mine if not p.capability]
        if not points:
            faults = [] if whole else [f"domain {domain}: no pair judges a response as a whole"]
            return _Shares({id(p): p for p in whole}, {}, faults)
        labelled = {p.capability for p in mine}
        faults = [f"domain {domain}: no pair judges its point {name}" for name in points if name not in labelled]
        share = self.config.task_share
        sides = split_by_group(whole, {"first": share, "third": 1 - share}, seed=self.seed)
        faults += [f"domain {domain}: no pair of the whole response is left for phase 1 or 3"] * (
            not all(sides.values())
        )
        first, third = ({id(p): p for p in sides[side]} for side in ("first", "third"))
        return _Shares(first, third, faults)

    def stages(self, pairwise: Objective) -> list[Stage]:
        self._check(self.domains)
        if not (self.config.train_together and self.points):
            return super().stages(pairwise)
        tasks = [self.expert_stage(domain, pairwise) for domain in self.domains]
        fusions = [self.fusion_stage(t, pairwise) for t in range(len(self.domains)) if self._of(t)]
        return [*tasks, self.points_stage(pairwise), *fusions, self.router_stage()]

    def expert_stages(self, domain: str, pairwise: Objective) -> list[Stage]:
        self._check([domain])
        task = self.domains.index(domain)
        points = self._of(task)
        inner = [self.point_stage(point, pairwise) for point in points]
        return [
            self.expert_stage(domain, pairwise),
            *inner,
            *([self.fusion_stage(task, pairwise)] if points else []),
        ]

    def _check(self, domains: Sequence[str]) -> None:
        assert self.shares.keys() >= set(domains), "meet comes before stages"
        if faults := [fault for domain in domains for fault in self.shares[domain].faults]:
            raise DataError("\n".join([*faults, "Label such pairs, or name other points in system.points."]))

    def expert_stage(self, domain: str, pairwise: Objective) -> Stage:
        """Phase 1."""
        task = self.domains.index(domain)
        name, later = self.expert_names[task], self.shares[domain].third
        return Stage(
            name=f"expert/{name}",
            module=OneExpert(self.members, task),
            learn=tuple(self.expert_parameters(name)),
            objective=pairwise,
            select=lambda p: p.domain == domain and not p.capability and id(p) not in later,
            standardize=self.members.standardizer(name),
            learning_rate=self.config.task_learning_rate,
        )

    def point_stage(self, point: _Point, pairwise: Objective) -> Stage:
        """Phase 2 of one point."""
        judged = (self.domains[point.task], point.capability)
        return Stage(
            name=f"point/{point.name}",
            module=OneExpert(self.members, point.member),
            learn=tuple(self.expert_parameters(point.name)),
            objective=pairwise,
            select=lambda p: (p.domain, p.capability) == judged,
            standardize=self.members.standardizer(point.name),
            prepare=lambda: self._start(point),
            learning_rate=self.config.point_rate,
        )

    def points_stage(self, pairwise: Objective) -> Stage:
        """Phase 2 of all points."""
        number_of = {(self.domains[p.task], p.capability): n for n, p in enumerate(self.points)}
        experts = tuple(tuple(self.expert_parameters(point.name)) for point in self.points)
        return Stage(
            name="points",
            module=OwnExperts(self.members, first=len(self.domains)),
            learn=tuple(parameter for expert in experts for parameter in expert),
            objective=pairwise,
            select=lambda p: (p.domain, p.capability) in number_of,
            prepare=lambda: self._start(*self.points),
            learning_rate=self.config.point_rate,
            experts=experts,
            expert_of=lambda p: number_of[p.domain, p.capability],
            standardizers=tuple(self.members.standardizer(point.name) for point in self.points),
        )

    def fusion_stage(self, task: int, pairwise: Objective) -> Stage:
        """Phase 3."""
        name, domain = self.expert_names[task], self.domains[task]
        earlier = self.shares[domain].first
        fusion = cast(Fusion, self.routed.experts.fusions[name])
        return Stage(
            name=f"fusion/{name}",
            module=FusionOf(self.routed.experts, task),
            learn=tuple(fusion.parameters()),
            objective=pairwise,
            select=lambda p: p.domain == domain and not p.capability and id(p) not in earlier,
            standardize=self.standardizer(name),
            keep=tuple(fusion.buffers()),
            learning_rate=self.config.fusion_learning_rate,
        )

    def router_stage(self) -> Stage:
        return replace(super().router_stage(), learning_rate=self.config.router_learning_rate)

    @torch.no_grad()
    def _start(self, *points: _Point) -> None:
        """As their task's model stands: a copy of its head, and of its adapter where it is one."""
        bank = self.routed.router.backbone.bank
        for point in points:
            task = self.expert_names[point.task]
            self.members.head(point.name).load_state_dict(self.members.head(task).state_dict())
            if bank is not None:
                bank.adapters[point.name].load_state_dict(bank.adapters[task].state_dict())

    def expert_parameters(self, name: str) -> list[nn.Parameter]:
        """Of a task's own model, or of one capability expert: what phase 1 or 2 moves."""
        head = list(self.members.head(name).parameters())
        if not isinstance(self.members, OwnBackbones):
            return [*learnable(self.routed.router.backbone, self.config, name), *head]
        number = list(self.members.heads).index(name)
        backbone = self.members.backbone(int(self.members.task_E[number]))
        bank = [] if backbone.bank is None else list(backbone.bank.parameters())
        if int(self.members.adapter_E[number]) >= 0:
            assert backbone.bank is not None
            return [*backbone.bank.adapters[name].parameters(), *head]
        adapted = {id(p) for p in bank}
        return [*(p for p in backbone.parameters() if id(p) not in adapted), *head]

    def standardizer(self, name: str) -> Standardize:
        """Of a task's reward as it is given."""
        fused = self.routed.experts.standardize
        return cast(Standardize, fused[name]) if name in fused else self.members.standardizer(name)

    def router_parameters(self) -> list[nn.Parameter]:
        router = self.routed.router
        return [*learnable(router.backbone, self.config, ROUTER), *router.router.parameters()]

    def explained(self, batch: Batch, output: Rewards) -> list[Explanation]:
        assert output.routing is not None
        task_N = output.routing.experts_NK[:, 0]
        told = [Explanation()] * len(batch)
        for index, blocks_NKD, point_reward_NK in self.routed.experts.explained(batch, task_N)[1]:
            task = int(task_N[index[0]])
            fusion = cast(Fusion, self.routed.experts.fusions[self.expert_names[task]])
            unit = self.standardizer(self.expert_names[task]).std
            names = [point.capability for point in self._of(task)]
            rows = zip(
                index.tolist(), (fusion.parts(blocks_NKD) / unit).tolist(), point_reward_NK.tolist(), strict=True
            )
            for row, parts, rewards in rows:
                rest = float(output.reward_N[row]) - sum(parts)
                told[row] = Explanation(
                    parts={**dict(zip(names, parts, strict=True)), BASELINE: rest},
                    part_rewards=dict(zip(names, rewards, strict=True)),
                )
        return told

    def adapter_experts(self) -> dict[str, tuple[RewardHead, Standardize]]:
        """The capability experts, and the models of tasks without points. With `full` none: what they adapt is no
        pretrained model."""
        if not isinstance(self.members, AdapterExperts):
            return {}
        return self.members.adapter_experts()

    def num_active_parameters(self) -> int:
        """Of the largest task: a conversation meets the experts of one."""
        mixtures = self.routed.experts
        own = [self._task_parameters(task) for task in range(len(self.domains))]
        idle = sum(p.numel() for one in own for p in one) - max(sum(p.numel() for p in one) for one in own)
        unread = [n for t, n in enumerate(self.expert_names) if mixtures.points[t] and self.config.tune != "full"]
        largest = max(range(len(own)), key=lambda t: sum(p.numel() for p in own[t]))
        if self.expert_names[largest] in unread:
            idle += sum(p.numel() for p in self.expert_parameters(self.expert_names[largest]))
        return self.num_parameters() - idle

    def _task_parameters(self, task: int) -> list[nn.Parameter]:
        name = self.expert_names[task]
        fusion = list(self.routed.experts.fusions[name].parameters()) if self._of(task) else []
        members = [name, *(point.name for point in self._of(task))]
        return [*(p for one in members for p in self.expert_parameters(one)), *fusion]
