"""Many LoRA adapters on one backbone, a different one for each row of a batch.

N rows, T tokens, R rank. The backbone keeps its own modules and tensor names: the bank adds each adapter's product
to the output of the linear layers it targets. No switching, nothing to undo, differentiable.
LoRA: arXiv 2106.09685.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moreward.errors import ConfigError
from moreward.nn.backbone import Backbone, linear_names
from moreward.nn.merging import MergeFrom, merge_from

MANY = 16
"""Adapters whose merged weights should fit into the memory for them to be taken as kept."""


@dataclass(frozen=True)
class _Rows:
    adapters: list[str]
    slot_N: Tensor
    active_NT: Tensor | None


class Adapter(nn.Module):
    """One adapter: for each target module `A` (R, in) and `B` (out, R). `B` starts at zero."""

    def __init__(self, shapes: dict[str, tuple[int, int]], rank: int, seed: int) -> None:
        super().__init__()
        self.A = nn.ParameterDict()
        self.B = nn.ParameterDict()
        generator = torch.Generator().manual_seed(seed)
        for name, (num_in, num_out) in shapes.items():
            bound = 1 / math.sqrt(num_in)
            A_RI = (torch.rand(rank, num_in, generator=generator) * 2 - 1) * bound
            self.A[parameter_key(name)] = nn.Parameter(A_RI)
            self.B[parameter_key(name)] = nn.Parameter(torch.zeros(num_out, rank))


class LoRABank(nn.Module):
    """All the adapters of a backbone. `backbone(ids, mask, adapter_N)` uses adapter `adapter_N[n]` for row n.

    `targets` are suffixes of module names (`query_proj`), or None for every linear layer of the backbone;
    `top_layers` keeps only those in the last so many layers. With `active_tokens` an adapter acts on that many tokens
    at the end of a text only, so that all before them is the same for every adapter (activated LoRA, arXiv 2504.12397);
    that needs causal attention.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        targets: Sequence[str] | None = None,
        top_layers: int | None = None,
        active_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if active_tokens is not None and not (backbone.is_decoder and backbone.pooling == "last"):
            raise ConfigError(
                "system.active_tokens: needs a decoder that is read at its last token; elsewhere every token's state "
                "counts and none is the same for all adapters"
            )
        self.active_tokens = active_tokens
        self.rank, self.alpha, self.seed = rank, alpha, seed
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.adapters = nn.ModuleDict()
        self.shapes = _target_shapes(backbone, targets, top_layers)
        if not self.shapes:
            raise ConfigError("system.targets: none of these layers is among the top system.adapter_layers")
        self.num_trunk_layers = 0 if top_layers is None else num_layers(backbone) - top_layers
        self._merge_from: dict[tuple[int, int], MergeFrom] | None = None
        self._rows: ContextVar[_Rows | None] = ContextVar("rows", default=None)
        self.mixes_rows = _every_input_is_per_row(backbone, self.shapes)
        for name in self.shapes:
            backbone.model.get_submodule(name).register_forward_hook(self._hook(name))
        backbone.bank = self

    @property
    def names(self) -> list[str]:
        return list(self.adapters)

    def add(self, name: str) -> Adapter:
        """A new adapter. Its start depends on its name and the seed alone, not on which others exist."""
        if name in self.adapters:
            raise ConfigError(f"adapter {name!r} exists already")
        adapter = Adapter(self.shapes, self.rank, seed=zlib.crc32(f"{self.seed}/{name}".encode()))
        self.adapters[name] = adapter.to(next(iter(self.parameters()), torch.empty(0)).device)
        return adapter

    @contextmanager
    def using(self, adapter_N: Tensor, mask_NT: Tensor) -> Iterator[None]:
        """Within this context row n of every forward through the backbone meets adapter `adapter_N[n]`. `mask_NT`, its
        padding at the end, says which tokens are a row's last."""
        present, slot_N = adapter_N.unique(return_inverse=True)
        names = self.names
        active_NT = None
        if self.active_tokens is not None:
            place_NT = mask_NT.cumsum(1)
            active_NT = (place_NT > place_NT[:, -1:] - self.active_tokens) & mask_NT.bool()
        token = self._rows.set(_Rows([names[i] for i in present.tolist()], slot_N, active_NT))
        try:
            yield
        finally:
            self._rows.reset(token)

    def _hook(self, name: str):  # type: ignore[no-untyped-def]
        key = parameter_key(name)

        def add_delta(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            rows = self._rows.get()
            if rows is None:
                return output
            delta = self._delta(key, self.dropout(inputs[0]), rows)
            return output + (delta if rows.active_NT is None else delta * rows.active_NT.unsqueeze(-1))

        return add_delta

    def _delta(self, key: str, x: Tensor, rows: _Rows) -> Tensor:
        chosen = [self.adapters[name] for name in rows.adapters]
        if len(chosen) == 1:
            return F.linear(F.linear(x, chosen[0].A[key]), chosen[0].B[key]) * self.scale  # type: ignore[index]
        A_NRI = torch.stack([adapter.A[key] for adapter in chosen])[rows.slot_N]  # type: ignore[index]
        B_NOR = torch.stack([adapter.B[key] for adapter in chosen])[rows.slot_N]  # type: ignore[index]
        x_NTI = x.unsqueeze(1) if x.dim() == 2 else x
        delta_NTO = x_NTI @ A_NRI.mT @ B_NOR.mT * self.scale
        return delta_NTO.squeeze(1) if x.dim() == 2 else delta_NTO

    def weights(self, adapter: int) -> dict[str, tuple[Tensor, Tensor]]:
        """A (R, in) and B (out, R) of adapter number `adapter` by module; -1 is no adapter."""
        if adapter < 0:
            return {}
        chosen = self.adapters[self.names[adapter]]
        return {name: (chosen.A[parameter_key(name)], chosen.B[parameter_key(name)]) for name in self.shapes}  # type: ignore[index]

    def merge_from(self, num_bytes: int) -> dict[str, int]:
        """From how many rows on merged weights pay, by module: fewer, where those of many adapters fit into
        `num_bytes` and are computed once, than where they are merged anew. It depends on nothing that changes from one
        batch to the next, nor on how many adapters there are: a text gets the same bits after a domain was added."""
        if self._merge_from is None:
            self._merge_from = merge_from(set(self.shapes.values()), self.rank, next(self.parameters()).device)
        whole = sum(4 * num_in * num_out for num_in, num_out in self.shapes.values())
        fit = whole * MANY <= num_bytes
        rows = {size: found.kept if fit else found.anew for size, found in self._merge_from.items()}
        return {name: rows[size] for name, size in self.shapes.items()}

    def merged_delta(self, adapter: str, module: str) -> Tensor:
        """The product that `adapter` adds to the weight of `module`, shape (out, in): scale · B A."""
        weights = self.adapters[adapter]
        return self.scale * weights.B[parameter_key(module)] @ weights.A[parameter_key(module)]  # type: ignore[index]


def parameter_key(module_name: str) -> str:
    """The name under which an adapter keeps the matrices of a module."""
    return module_name.replace(".", "/")  # a dot may not stand in the name of a parameter


def _target_shapes(
    backbone: Backbone, targets: Sequence[str] | None, top_layers: int | None
) -> dict[str, tuple[int, int]]:
    """(in, out) of every targeted linear layer."""
    names = linear_names(backbone.model)
    if targets is not None:
        unknown = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in names)]
        if unknown:
            ends = sorted({n.rsplit(".", 1)[-1] for n in names})
            raise ConfigError(f"system.targets: {unknown} match no linear layer. This backbone has: {', '.join(ends)}.")
        names = [n for n in names if any(n == t or n.endswith(f".{t}") for t in targets)]
    if top_layers is not None:
        names = _in_top_layers(names, top_layers)
    return {n: _in_out(backbone.model.get_submodule(n)) for n in names}


def _in_top_layers(names: list[str], top_layers: int) -> list[str]:
    """Modules of the last `top_layers` numbered layers, and those above all layers (a pooler); not what stands before
    the layers (a projection of embeddings)."""
    number_of = _layer_numbers(names)
    names = names[next((i for i, n in enumerate(names) if n in number_of), 0) :]
    num = max(number_of.values(), default=-1) + 1
    if top_layers > num:
        raise ConfigError(f"system.adapter_layers: the backbone has {num} layers (got {top_layers})")
    return [n for n in names if number_of.get(n, num) >= num - top_layers]


def num_layers(backbone: Backbone) -> int:
    return max(_layer_numbers(linear_names(backbone.model)).values(), default=-1) + 1


def _layer_numbers(names: list[str]) -> dict[str, int]:
    return {n: int(match[1]) for n in names if (match := re.search(r"\.(\d+)\.", n))}


def _in_out(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    num_in, num_out = module.weight.shape  # type: ignore[misc]
    return int(num_in), int(num_out)


def _every_input_is_per_row(backbone: Backbone, shapes: dict[str, tuple[int, int]]) -> bool:
    """False for DeBERTa, whose position table goes through the same query and key layers once for the whole batch:
    there rows are grouped by adapter."""
    device = next(backbone.parameters()).device
    if device.type == "meta":
        return False
    num_rows, seen = 3, []
    hooks = [
        backbone.model.get_submodule(n).register_forward_pre_hook(lambda _m, x: seen.append(x[0].shape[0]))
        for n in shapes
    ]
    was_training = backbone.training
    ids_NT = torch.ones((num_rows, 5), dtype=torch.long, device=device)
    with torch.no_grad():
        backbone.eval()._pooled(ids_NT, torch.ones_like(ids_NT))
    backbone.train(was_training)
    for hook in hooks:
        hook.remove()
    return all(n == num_rows for n in seen)
