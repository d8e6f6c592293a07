"""One model out of several that started alike: the average of their weights (WARM, arXiv 2401.12187).

M parents, R rank. Rewards of the average cost one pass, where an ensemble's cost M.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moreward.config import RunConfig, resolve
from moreward.data.batches import Encoder, side
from moreward.errors import ConfigError
from moreward.nn.experts import fold, standardised_heads
from moreward.nn.lora import LoRABank
from moreward.registry import find_recipe
from moreward.runs import load_backbone, read_model
from moreward.scoring import Scorer
from moreward.systems._base import System
from moreward.train.parents import TEXT_TO_TOKENS, Parent, Property, read_parents, refuse_differences, write_child
from moreward.types import Preference

FREE = ("rank", "alpha", "dropout")
"""Settings of adapters in which parents may differ: what is averaged is their product."""
MUST_AGREE: Mapping[str, Property] = {
    "recipe": lambda p: p.config.recipe,
    "backbone": lambda p: p.backbone,
    **TEXT_TO_TOKENS,
    "domains": lambda p: p.card["domains"],
    "system": lambda p: {k: v for k, v in p.config.system.items() if k not in FREE},
}
WHY = "the weights of these runs cannot be averaged: they must be of one recipe, backbone and tokenizer"
SEED_HINT = (
    "other seeds start other heads, and heads that started apart need not average to one that works. Train with one "
    "seed and vary train.learning_rate, train.epochs or system.dropout, or say --different-starts"
)


@dataclass(frozen=True)
class Point:
    """Accuracy on the way from a parent (share 0) to the merged model (share 1)."""

    parent: str
    share: float
    accuracy: float


@dataclass(frozen=True)
class Merged:
    """`error` is the relative Frobenius error of all adapter products together: 0 where no rank was cut off."""

    run: Path
    weights: tuple[float, ...]
    rank: int | None
    error: float
    path: tuple[Point, ...] = ()

    @property
    def parents_below(self) -> list[str]:
        """Parents whose way to the merged model leads below both of its ends: no linear mode connectivity there."""
        ways: dict[str, list[float]] = {}
        for point in self.path:
            ways.setdefault(point.parent, []).append(point.accuracy)
        return [parent for parent, way in ways.items() if min(way[1:-1]) < min(way[0], way[-1])]


def merge(
    runs: Sequence[str | Path],
    *,
    out: str | Path,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    different_starts: bool = False,
    backbone: str | None = None,
    held_out: Sequence[Preference] = (),
) -> Merged:
    """Average finished runs into a new run: θ = Σ w_i θ_i, equal weights unless given. Each parent's zero and unit are
    folded into its heads first. Adapters are averaged in the product, ΔW = Σ w_i s_i B_i A_i, by joining their ranks,
    or the nearest of `rank`. `held_out` pairs measure the way from each parent to the average.

    Raises ConfigError naming every difference between the parents, or what is wrong with weights and rank; RunError for
    a run that is damaged.
    """
    parents = read_parents(runs)
    seed: Mapping[str, Property] = {} if different_starts else {f"seed ({SEED_HINT})": lambda p: p.config.seed}
    refuse_differences(parents, {**MUST_AGREE, **seed}, WHY)
    shares = _checked_weights(weights, len(parents))
    family = Family(parents, backbone)
    config = family.config(out, rank)
    system, error = family.at(shares, rank)
    told = {"merged": {"weights": list(shares), "rank": config.system.get("rank"), "error": error}}
    path = family.path(shares, held_out) if held_out else ()
    write_child(config, system, family.encoder, parents, told)
    return Merged(Path(config.out), shares, config.system.get("rank"), error, path)


def _checked_weights(weights: Sequence[float] | None, num: int) -> tuple[float, ...]:
    if weights is None:
        return (1 / num,) * num
    is_average = all(w >= 0 for w in weights) and abs(sum(weights) - 1) <= 1e-6  # false for NaN
    if len(weights) != num or not is_average:
        given = ", ".join(f"{w:g}" for w in weights)
        raise ConfigError(f"--weights: one for each of the {num} runs, none negative, their sum 1 (got {given})")
    return tuple(float(w) for w in weights)


class Family:
    """The models between the parents: one for each choice of weights."""

    def __init__(self, parents: Sequence[Parent], backbone: str | None) -> None:
        self.parents, self.backbone = parents, backbone
        self.systems: list[System] = []
        for parent in parents:
            system, encoder, _ = read_model(parent.run, backbone=backbone)
            for head, standardize in standardised_heads(system):
                fold(head, standardize)
            self.systems.append(system)
        self.encoder: Encoder = encoder
        scales = [one.scale for system in self.systems for one in system.backbones() if one.scale is not None]
        if any(not torch.equal(one.scale_D, scales[0].scale_D) for one in scales):
            raise ConfigError([WHY, "pooling: spans: they were trained on other pairs, which scaled their inputs"])

    @property
    def full_rank(self) -> int | None:
        """The ranks of all parents together; None without adapters."""
        banks = [bank_of(system) for system in self.systems]
        return sum(bank.rank for bank in banks if bank is not None) or None

    def config(self, out: str | Path, rank: int | None) -> RunConfig:
        told = self.parents[0].card["config"]
        return resolve(
            {
                **told,
                "out": str(out),
                "backbone": self.backbone or told["backbone"],
                "system": {**told["system"], **self._adapter_settings(rank)},
            }
        )

    def _adapter_settings(self, rank: int | None) -> dict[str, Any]:
        full = self.full_rank
        if rank is not None and not (full and 1 <= rank <= full):
            raise ConfigError(
                f"--rank: the adapters' ranks together are {full}; give at most that (got {rank})"
                if full
                else "--rank: these runs have no adapters"
            )
        return {"rank": rank or full, "alpha": float(rank or full or 0)} if full else {}  # alpha / rank = 1

    @torch.no_grad()
    def at(self, weights: Sequence[float], rank: int | None = None) -> tuple[System, float]:
        """The model of these weights, and the relative error of its adapters."""
        first = self.parents[0]
        recipe = find_recipe(first.config.recipe)
        settings = recipe.Config.model_validate({**first.config.system, **self._adapter_settings(rank)})
        with torch.random.fork_rng(devices=[]):
            merged: System = recipe(
                settings, load_backbone(first.folder, first.card, self.backbone), first.card["domains"]
            )
        stored = [system.saved_tensors() for system in self.systems]
        products, error = self._products(merged, weights)
        averaged = {k: averaged_tensor([s[k] for s in stored], weights) for k in stored[0] if k not in products}
        if faults := merged.load_tensors({**averaged, **products}):
            raise ConfigError([WHY, *faults])
        for _, standardize in standardised_heads(merged):
            standardize.reset()
        return merged, error

    def _products(self, merged: System, weights: Sequence[float]) -> tuple[dict[str, Tensor], float]:
        """A and B of every adapter and layer, by the names of the whole system."""
        bank = bank_of(merged)
        if bank is None:
            return {}, 0.0
        names = {id(p): k for k, p in merged.named_parameters()}
        banks = [b for system in self.systems if (b := bank_of(system)) is not None]
        tensors: dict[str, Tensor] = {}
        lost = whole = 0.0
        for number in range(len(bank.names)):
            for module, (A_RI, B_OR) in bank.weights(number).items():
                pairs = [b.weights(number)[module] for b in banks]
                scales = [w * b.scale for w, b in zip(weights, banks, strict=True)]
                new_A, new_B, dropped, total = joined(pairs, scales, bank.rank)
                tensors |= {names[id(A_RI)]: new_A, names[id(B_OR)]: new_B / bank.scale}
                lost, whole = lost + dropped, whole + total
        return tensors, (lost / whole) ** 0.5 if whole else 0.0

    def path(self, weights: Sequence[float], held_out: Sequence[Preference]) -> tuple[Point, ...]:
        """Accuracy at a parent, half way and at the average, for each parent."""
        end = self._accuracy(weights, held_out)
        points = []
        for number, parent in enumerate(self.parents):
            alone = [float(i == number) for i in range(len(weights))]
            middle = [(a + w) / 2 for a, w in zip(alone, weights, strict=True)]
            found = [self._accuracy(alone, held_out), self._accuracy(middle, held_out), end]
            points += [Point(str(parent.run), s, a) for s, a in zip((0.0, 0.5, 1.0), found, strict=True)]
        return tuple(points)

    def _accuracy(self, weights: Sequence[float], held_out: Sequence[Preference]) -> float:
        scorer = Scorer(self.at(weights)[0], self.encoder, self.parents[0].card)
        items = [side(p, which) for p in held_out for which in ("chosen", "rejected")]
        rewards = [r.number for r in scorer.score(items)]
        return sum(c > j for c, j in zip(rewards[::2], rewards[1::2], strict=True)) / len(held_out)


def bank_of(system: nn.Module) -> LoRABank | None:
    """The adapters of a system: they all lie on one backbone."""
    return next((module for module in system.modules() if isinstance(module, LoRABank)), None)


def averaged_tensor(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w_i θ_i in double precision; a count becomes the sum of the counts."""
    if not tensors[0].is_floating_point():
        return torch.stack(list(tensors)).sum(0)
    total = sum(w * t.double() for w, t in zip(weights, tensors, strict=True))
    assert isinstance(total, Tensor)
    return total.to(tensors[0].dtype)


def joined(
    pairs: Sequence[tuple[Tensor, Tensor]], scales: Sequence[float], rank: int
) -> tuple[Tensor, Tensor, float, float]:
    """A (rank, in) and B (out, rank) with B A = Σ scale_i B_i A_i: the pairs side by side where `rank` is all of
    theirs, else the nearest of `rank` by singular values. Then the squared Frobenius norms of what was dropped, and of
    the whole. Averaging A and B apart would give products of one's A with another's B."""
    A_RI = torch.cat([A for A, _ in pairs]).double()
    B_OR = torch.cat([scale * B.double() for scale, (_, B) in zip(scales, pairs, strict=True)], dim=1)
    left, upper = torch.linalg.qr(B_OR)
    right, lower = torch.linalg.qr(A_RI.mT)
    U, values, Vh = torch.linalg.svd(upper @ lower.mT)
    total = float(values.square().sum())
    if rank == len(A_RI):
        return A_RI.float(), B_OR.float(), 0.0, total
    kept = min(rank, len(values))
    root = values[:kept].sqrt()
    A_new = A_RI.new_zeros(rank, A_RI.shape[1])
    B_new = B_OR.new_zeros(B_OR.shape[0], rank)
    A_new[:kept] = root[:, None] * (Vh[:kept] @ right.mT)
    B_new[:, :kept] = left @ U[:, :kept] * root
    return A_new.float(), B_new.float(), float(values[kept:].square().sum()), total
