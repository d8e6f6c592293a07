"""A mixture as one dense model: its experts' weights, averaged by shares that pairs have chosen.

P experts that are folded, R rank. After "upcycle and merge" (UMM-RM, arXiv 2512.00724): W = Σ a_p W_p, a = softmax(α),
α started from how the router divides its prompts and fitted by the preference loss. The mixture's rewards are not those
of its fold, except where experts are linear heads on one frozen vector and the router always gives the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moreward.config import RunConfig, resolve
from moreward.data.batches import EncodedPair, encode_pairs, pair_batch
from moreward.data.split import split_by_group
from moreward.errors import ConfigError, DataError
from moreward.nn.backbone import Backbone
from moreward.nn.experts import (
    AdapterExperts,
    OneExpert,
    RewardHead,
    SeparateExperts,
    SoloExpert,
    Standardize,
    fold,
    standardised_heads,
)
from moreward.nn.losses import PairwiseLoss
from moreward.registry import find_recipe
from moreward.runs import load_backbone, read_model
from moreward.systems._base import GatedSystem, System
from moreward.systems.shared_expert import SHARED, SharedAndOwn
from moreward.train.merge import bank_of, joined
from moreward.train.parents import read_parent, write_child
from moreward.train.plan import stable_seed
from moreward.types import Preference

Tensors = dict[str, Tensor]
Start = Literal["learned", "uniform", "routed"]
STARTS: tuple[Start, ...] = ("learned", "uniform", "routed")
HELD_OUT = 0.2
LEARNING_RATE = 0.1
SHARED_ALONE = "(shared alone)"
FEWEST = 1e-3
"""The least share at the start: softmax cannot begin at 0."""
SUPPORTED = "arliss, rodos and shared_expert"


@dataclass(frozen=True)
class Shares:
    """One way to weigh the experts, and the preference loss and accuracy of its fold on pairs that chose nothing."""

    how: str
    weights: tuple[float, ...]
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Folded:
    """`tried` has every way to weigh; `how` names the one that was kept. `rank` and `error` as in `merge.Merged`."""

    run: Path
    experts: tuple[str, ...]
    how: str
    tried: tuple[Shares, ...]
    num_pairs: int
    num_held_out: int
    left_out: int
    rank: int | None
    error: float

    @property
    def weights(self) -> tuple[float, ...]:
        return next(one.weights for one in self.tried if one.how == self.how)


def fold_run(
    run: str | Path,
    preferences: Sequence[Preference],
    *,
    out: str | Path,
    how: Start = "learned",
    steps: int = 60,
    batch_size: int = 32,
    rank: int | None = None,
    truncate: bool = False,
    backbone: str | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda said: None,
) -> Folded:
    """Fold the experts of a mixture into one model, a run of `baseline` or `base_lora`, and write it as a new run.

    Shares of the experts are fitted by `steps` of Adam on four fifths of the pairs, by prompt group; the rest measures
    the learned shares beside equal ones and beside the router's own. Adapters are joined, so the rank is the sum of the
    ranks, or `rank` at most.

    Raises ConfigError with every fault of run and options, DataError where too few pairs fit, RunError for a damaged
    run or an `out` that holds one.
    """
    parent = read_parent(run)
    faults = [] if preferences else ["--data: has no pair; the experts' shares are fitted on pairs"]
    if how not in STARTS:
        faults.append(f"--weights: {how!r} is not there; use {', '.join(STARTS)}")
    if steps < 1:
        faults.append(f"--steps: at least 1 (got {steps})")
    system, encoder, _ = read_model(run, backbone=backbone)
    try:
        recipe = Foldable(system, parent.config.recipe)
        if rank is not None and not (recipe.full_rank and 1 <= rank <= recipe.full_rank):
            limit = f"the ranks together are {recipe.full_rank}" if recipe.full_rank else "there are no adapters"
            faults.append(f"--rank: {limit} (got {rank})")
    except ConfigError as error:
        raise ConfigError([*faults, *error.faults]) from None
    if faults:
        raise ConfigError(faults)
    config = recipe.config(parent.card["config"], out, backbone, rank)
    domains: Sequence[str] = parent.card["domains"]
    dense = recipe.dense(load_backbone(parent.folder, parent.card, backbone), domains)
    on_long = "truncate" if truncate else parent.config.data.on_long
    encoded = encode_pairs(encoder, preferences, domains, on_long=on_long)
    fitted, held_out = _divided(encoded.pairs, seed)
    routed = recipe.routed_shares(fitted, encoder.pad_id)
    blend = Blend(dense, recipe.tensors)
    learned = fit_shares(
        blend, fitted, routed, steps=steps, batch_size=batch_size, pad_id=encoder.pad_id, seed=seed, say=say
    )
    uniform = torch.full((recipe.num,), 1 / recipe.num, dtype=torch.float64)
    ways: dict[str, Tensor] = {"learned": learned, "uniform": uniform, "routed": routed}
    tried = tuple(
        Shares(name, tuple(share_P.tolist()), *blend.measure(share_P, held_out, batch_size, encoder.pad_id))
        for name, share_P in ways.items()
    )
    blend.set(ways[how])
    final, lost = recipe.cut(dense, blend, ways[how], rank, parent, backbone)
    told: dict[str, Any] = {
        "folded": {
            "experts": list(recipe.names),
            "how": how,
            "tried": {
                one.how: {"weights": list(one.weights), "loss": one.loss, "accuracy": one.accuracy} for one in tried
            },
            "pairs": len(fitted),
            "held_out_pairs": len(held_out),
            "rank": config.system.get("rank"),
            "error": lost,
        }
    }
    write_child(config, final, encoder, [parent], told)
    return Folded(
        Path(config.out),
        recipe.names,
        how,
        tried,
        len(fitted),
        len(held_out),
        len(preferences) - len(encoded.pairs),
        config.system.get("rank"),
        lost,
    )


def _divided(pairs: Sequence[EncodedPair], seed: int) -> tuple[list[EncodedPair], list[EncodedPair]]:
    """Pairs to fit on and pairs to judge by. DataError where one of them would be empty."""
    by_id = {id(pair.preference): pair for pair in pairs}
    sides = (
        split_by_group([p.preference for p in pairs], {"fit": 1 - HELD_OUT, "judge": HELD_OUT}, seed) if pairs else {}
    )
    fit, judge = ([by_id[id(p)] for p in sides.get(side, [])] for side in ("fit", "judge"))
    if not fit or not judge:
        raise DataError(
            f"--data: {len(pairs)} pairs fit into the limit, too few to fit shares on some and judge by others. "
            "Give more, of several prompts, or cut long ones (--truncate)."
        )
    return fit, judge


class Foldable:
    """The experts of a mixture as tensors of one dense model, whose values are linear in the experts' shares.

    Expert p of a shared expert's run is the shared one with own expert p; one more is the shared one alone.
    """

    def __init__(self, system: System, recipe: str) -> None:
        """ConfigError with every reason why this run has no fold."""
        self.system, self.recipe = system, recipe
        experts = system.routed.experts if isinstance(system, GatedSystem) else None
        plain = type(experts) is AdapterExperts or type(experts) is SeparateExperts
        if not (plain or isinstance(experts, SharedAndOwn)):
            raise ConfigError(
                f"fold: recipe {recipe!r} has no experts whose weights could be added; it takes {SUPPORTED}"
            )
        assert isinstance(system, GatedSystem)
        self.experts = experts
        self.backbone: Backbone = system.backbones()[0]
        self.bank = bank_of(system)
        self.names: tuple[str, ...] = system.expert_labels
        if isinstance(experts, SharedAndOwn):
            self.names = (*self.names, SHARED_ALONE)
            kinds = {len(head.layers) for head, _ in standardised_parts(experts.parts)}
            if len(kinds) > 1:
                raise ConfigError(
                    "fold: the shared expert's head is an mlp and the own ones are linear: they cannot be added; "
                    "train with system.head=linear"
                )
        elif isinstance(experts, SeparateExperts) and not all(
            isinstance(one, SoloExpert) for one in experts.experts.values()
        ):
            raise ConfigError("fold: these experts are finished models of their own, which may differ in shape")
        if len(self.names) < 2:
            raise ConfigError(f"fold: one expert ({', '.join(self.names)}) is one model already")
        if isinstance(experts, AdapterExperts | SeparateExperts):
            for head, standardize in standardised_heads(experts):
                fold(head, standardize)

    @property
    def num(self) -> int:
        return len(self.names)

    @property
    def full_rank(self) -> int | None:
        return self.bank.rank * len(self._adapters) if self.bank is not None else None

    @property
    def _adapters(self) -> tuple[str, ...]:
        """Adapters that are part of some reward: not the router's."""
        assert isinstance(self.system, GatedSystem)
        shared = (SHARED,) if isinstance(self.experts, SharedAndOwn) else ()
        return (*self.system.expert_names, *shared)

    def config(self, told: Mapping[str, Any], out: str | Path, backbone: str | None, rank: int | None) -> RunConfig:
        name = "base_lora" if self.bank is not None else "baseline"
        known = find_recipe(name).Config.model_fields
        return resolve(
            {
                **told,
                "recipe": name,
                "preset": "practical",
                "out": str(out),
                "backbone": backbone or told["backbone"],
                "system": {**{k: v for k, v in told["system"].items() if k in known}, **self._adapter_settings(rank)},
            }
        )

    def _adapter_settings(self, rank: int | None) -> dict[str, Any]:
        full = self.full_rank
        return {"rank": rank or full, "alpha": float(rank or full or 0)} if full else {}  # alpha / rank = 1

    def dense(self, backbone: Backbone, domains: Sequence[str], rank: int | None = None) -> System:
        """The single model that takes the experts in."""
        name = "base_lora" if self.bank is not None else "baseline"
        recipe = find_recipe(name)
        known = recipe.Config.model_fields
        told = {k: v for k, v in self.system.config.model_dump().items() if k in known}
        with torch.random.fork_rng(devices=[]):
            made: System = recipe(
                recipe.Config.model_validate({**told, **self._adapter_settings(rank)}), backbone, domains
            )
        self._copy_backbone(made)
        return made.eval()

    @torch.no_grad()
    def _copy_backbone(self, dense: System) -> None:
        """What of the backbone is in no pretrained directory and no adapter: scales, a pooler that was new."""
        own = dict(self.backbone.named_parameters()) | dict(self.backbone.named_buffers())
        into = dense.backbones()[0]
        for name, value in {**dict(into.named_parameters()), **dict(into.named_buffers())}.items():
            if name in own and not name.startswith("bank."):
                value.copy_(own[name])

    def tensors(self, share_P: Tensor, dense: System) -> Tensors:
        """What the dense model's tensors are under these shares, differentiable in them, by the model's names."""
        names = {id(p): name for name, p in dense.named_parameters()}
        made: Tensors = {}
        for parameter, value in [*self._head(share_P, dense), *self._body(share_P, dense)]:
            made[names[id(parameter)]] = value.to(parameter.dtype)
        return made

    def _head(self, share_P: Tensor, dense: System) -> list[tuple[nn.Parameter, Tensor]]:
        target = _only_head(dense)
        if isinstance(self.experts, SharedAndOwn):
            zero_and_unit = self.system.standardize
            assert isinstance(zero_and_unit, Standardize)
            *own, shared = [head for head, _ in standardised_parts(self.experts.parts)]
            weigh_P = torch.cat([share_P[:-1] * self.experts.share_E.detach().double(), share_P.new_ones(1)])
            values = _summed([*own, shared], weigh_P)
            std, mean = zero_and_unit.std.double(), zero_and_unit.mean.double()
            last = len(values) - 2
            values[last], values[last + 1] = values[last] / std, (values[last + 1] - mean) / std
        else:
            assert self.experts is not None
            values = _summed([head for head, _ in standardised_heads(self.experts)], share_P)
        return list(zip(target.parameters(), values, strict=True))

    def _body(self, share_P: Tensor, dense: System) -> list[tuple[nn.Parameter, Tensor]]:
        if self.bank is not None:
            return self._joined(share_P, dense)
        if not (isinstance(self.experts, SeparateExperts) and self.system.config.tune == "full"):
            return []
        bodies = [dict(one.backbone.named_parameters()) for one in _solo(self.experts)]
        into = dict(dense.backbones()[0].named_parameters())
        return [(p, _weighted([body[name] for body in bodies], share_P)) for name, p in into.items()]

    def _joined(self, share_P: Tensor, dense: System) -> list[tuple[nn.Parameter, Tensor]]:
        """Ranks side by side: A as they are, each expert's columns of B times its share."""
        assert self.bank is not None
        bank, into = self.bank, bank_of(dense)
        assert into is not None
        weigh_A = (
            share_P if not isinstance(self.experts, SharedAndOwn) else torch.cat([share_P[:-1], share_P.new_ones(1)])
        )
        columns_R = weigh_A.repeat_interleave(bank.rank) * (bank.scale / into.scale)
        numbers = [bank.names.index(name) for name in self._adapters]
        weights = [bank.weights(number) for number in numbers]
        made: list[tuple[nn.Parameter, Tensor]] = []
        for module, (A_RI, B_OR) in into.weights(0).items():
            assert isinstance(A_RI, nn.Parameter)
            assert isinstance(B_OR, nn.Parameter)
            made.append((A_RI, torch.cat([w[module][0].detach() for w in weights])))
            made.append((B_OR, torch.cat([w[module][1].detach() for w in weights], dim=1).double() * columns_R))
        return made

    @torch.no_grad()
    def routed_shares(self, pairs: Sequence[EncodedPair], pad_id: int) -> Tensor:
        """`share_P`: the mean weight that the router gives each expert, over prompts; at least a little for each."""
        assert isinstance(self.system, GatedSystem)
        total_E = torch.zeros(len(self.system.domains), dtype=torch.float64)
        for chunk in _chunks(sorted(pairs, key=lambda p: p.num_tokens), 32):
            routing = self.system.route_prompts(pair_batch(chunk, pad_id))
            weights = torch.zeros_like(routing.logits_NE).scatter(1, routing.experts_NK, routing.weights_NK)
            total_E += weights.double().sum(0)
        share_P = total_E / total_E.sum()
        if isinstance(self.experts, SharedAndOwn):
            share_P = torch.cat([share_P, share_P.new_zeros(1)])
        share_P = share_P.clamp(min=FEWEST)
        return share_P / share_P.sum()

    @torch.no_grad()
    def cut(
        self, dense: System, blend: Blend, share_P: Tensor, rank: int | None, parent: Any, backbone: str | None
    ) -> tuple[System, float]:
        """The dense model at this rank, and the relative error of its products."""
        if rank is None or rank == self.full_rank:
            return dense, 0.0
        made = self.dense(load_backbone(parent.folder, parent.card, backbone), parent.card["domains"], rank)
        whole, small = bank_of(dense), bank_of(made)
        assert whole is not None
        assert small is not None
        lost = total = 0.0
        for module, (A_RI, B_OR) in whole.weights(0).items():
            new_A, new_B, dropped, size = joined([(A_RI, B_OR)], [whole.scale], rank)
            for old, new in zip(small.weights(0)[module], (new_A, new_B / small.scale), strict=True):
                old.copy_(new)
            lost, total = lost + dropped, total + size
        _only_head(made).load_state_dict(_only_head(dense).state_dict())
        return made, math.sqrt(lost / total) if total else 0.0


def standardised_parts(parts: AdapterExperts) -> list[tuple[RewardHead, str]]:
    """The heads of a bank in their order, with their names."""
    return [(parts.head(name), name) for name in parts.heads]


def _solo(experts: SeparateExperts) -> list[SoloExpert]:
    return [experts.expert(name) for name in experts.experts]


def _only_head(dense: System) -> RewardHead:
    one = dense.expert
    bank = one.experts if isinstance(one, OneExpert) else one
    if isinstance(bank, AdapterExperts):
        return bank.head(next(iter(bank.heads)))
    assert isinstance(bank, SoloExpert)
    assert isinstance(bank.head, RewardHead)
    return bank.head


def _summed(heads: Sequence[RewardHead], share_P: Tensor) -> list[Tensor]:
    """Each parameter of the heads, weighted: what a linear head then says is the weighted sum of what they say."""
    return [_weighted(values, share_P) for values in zip(*(head.parameters() for head in heads), strict=True)]


def _weighted(values: Sequence[Tensor], share_P: Tensor) -> Tensor:
    total = sum(share * value.detach().double() for share, value in zip(share_P, values, strict=True))
    assert isinstance(total, Tensor)
    return total


def _chunks(pairs: Sequence[EncodedPair], size: int) -> Iterator[Sequence[EncodedPair]]:
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]


class Blend:
    """A dense model at given shares, and the gradient of its loss by them.

    The tensors are linear in the shares, so the model's own gradient by its tensors, taken once, gives that by the
    shares: no graph from shares to tensors is held while the model runs.
    """

    def __init__(self, dense: System, tensors: Callable[[Tensor, System], Tensors]) -> None:
        self.dense, self.tensors = dense, tensors
        self.parameters = dict(dense.named_parameters())
        self.objective = PairwiseLoss()

    @torch.no_grad()
    def set(self, share_P: Tensor) -> None:
        for name, value in self.tensors(share_P.detach(), self.dense).items():
            self.parameters[name].copy_(value)

    def gradient(self, share_P: Tensor, pairs: Sequence[EncodedPair], pad_id: int) -> tuple[float, Tensor]:
        """Mean loss over `pairs` and its gradient by `share_P`, as if the shares were free."""
        self.set(share_P)
        free_P = share_P.detach().clone().requires_grad_()
        made = self.tensors(free_P, self.dense)
        moving = {name: value for name, value in made.items() if value.requires_grad}
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in moving)
            parameter.grad = None
        loss = self.objective(self.dense.eval()(pair_batch(pairs, pad_id)), pair_batch(pairs, pad_id)).loss_B.mean()
        found = torch.autograd.grad(loss, [self.parameters[name] for name in moving], allow_unused=True)
        used = [(value, grad) for value, grad in zip(moving.values(), found, strict=True) if grad is not None]
        (grad_P,) = torch.autograd.grad([value for value, _ in used], [free_P], [grad for _, grad in used])
        return float(loss.detach()), grad_P

    @torch.no_grad()
    def measure(
        self, share_P: Tensor, pairs: Sequence[EncodedPair], batch_size: int, pad_id: int
    ) -> tuple[float, float]:
        """Mean loss and accuracy over pairs."""
        self.set(share_P)
        loss = right = 0.0
        for chunk in _chunks(sorted(pairs, key=lambda p: p.num_tokens), batch_size):
            batch = pair_batch(chunk, pad_id)
            outcome = self.objective(self.dense.eval()(batch), batch)
            loss, right = loss + float(outcome.loss_B.sum()), right + float(outcome.right_B.sum())
        return loss / len(pairs), right / len(pairs)


def fit_shares(
    blend: Blend,
    pairs: Sequence[EncodedPair],
    start_P: Tensor,
    *,
    steps: int,
    batch_size: int,
    pad_id: int,
    seed: int = 0,
    say: Callable[[str], None] = lambda said: None,
) -> Tensor:
    """`share_P` = softmax(α) after Adam on the preference loss of `pairs`, a batch a step in an order drawn by `seed`.

    The mean over the last half of the steps is returned: single steps follow their batch."""
    alpha_P = start_P.double().log().clone().requires_grad_()
    optimizer = torch.optim.Adam([alpha_P], lr=LEARNING_RATE)
    order: list[int] = []
    mean_P, num = torch.zeros_like(start_P, dtype=torch.float64), 0
    for step in range(steps):
        if len(order) < min(batch_size, len(pairs)):
            generator = torch.Generator().manual_seed(stable_seed(seed, "fold", step, 0))
            order += torch.randperm(len(pairs), generator=generator).tolist()
        batch, order = order[:batch_size], order[batch_size:]
        share_P = alpha_P.softmax(0)
        loss, grad_P = blend.gradient(share_P, [pairs[i] for i in batch], pad_id)
        optimizer.zero_grad()
        share_P.backward(grad_P)  # type: ignore[no-untyped-call]
        optimizer.step()
        if step >= steps // 2:
            mean_P, num = mean_P + alpha_P.detach().softmax(0), num + 1
        if step % 10 == 0 or step + 1 == steps:
            say(f"step {step + 1} of {steps}: loss {loss:.3f}")
    return mean_P / num
