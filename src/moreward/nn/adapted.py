"""The linear layers of one forward over a packed stream: the layer's product, and for each adapter what it adds.

An adapter's rows are one slice, so its product is two small matrix products on that slice; in a stream without
gradients a large slice meets the merged weight instead, which costs nothing beyond the layer's own product: see
`merging` for what is large. Merged weights are kept in a bounded memory. On a GPU, where launches are dearer than
products of this size, adapters without gradients are stacked instead: one product for many of them, in which each row
keeps what its own adapter gives. T rows of the stream (or L of its leaves), R rank, K columns of a stack.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moreward.nn.linear import chosen, product
from moreward.nn.merging import add_delta, merged
from moreward.nn.packing import Group, Stream

if TYPE_CHECKING:
    from moreward.nn.lora import LoRABank

KEPT_BYTES = 2 << 30
"""Memory for merged weights and position tables of one backbone."""

STACKED = 128
"""Columns of a stack: of every row's products with it all but R are thrown away."""

Pair = tuple[Tensor, Tensor]
"""A (R, in) and B (out, R) of one layer."""


class Kept:
    """Tensors that can be computed again, the least recently used dropped first."""

    def __init__(self, num_bytes: int = KEPT_BYTES) -> None:
        self.num_bytes = num_bytes
        self.used = 0
        self._entries: OrderedDict[Any, _Entry] = OrderedDict()

    def __deepcopy__(self, memo: Any) -> Kept:
        return Kept(self.num_bytes)

    def get(self, key: Any, sources: Sequence[Tensor], make: Callable[[], Tensor]) -> Tensor:
        """What `make()` gave for this key, as long as no source has been written to since."""
        known = self._entries.get(key)
        if known is not None and known.is_of(sources):
            self._entries.move_to_end(key)
            return known.value
        with torch.autocast(sources[0].device.type, enabled=False) if sources else nullcontext():
            value = make()  # in full precision, whoever asks first
        if known is not None:
            self.used -= known.value.nbytes
        self._entries[key] = _Entry(value, tuple(sources), tuple(map(_state, sources)))
        self._entries.move_to_end(key)
        self.used += value.nbytes
        while self.used > self.num_bytes and len(self._entries) > 1:
            _, dropped = self._entries.popitem(last=False)
            self.used -= dropped.value.nbytes
        return value


class _Entry(NamedTuple):
    """A value with what it was made of. The sources are held, so that no later tensor can be taken for one of them."""

    value: Tensor
    sources: tuple[Tensor, ...]
    states: tuple[tuple[int, int], ...]

    def is_of(self, sources: Sequence[Tensor]) -> bool:
        same = len(sources) == len(self.sources) and all(a is b for a, b in zip(sources, self.sources, strict=True))
        return same and self.states == tuple(map(_state, sources))


def _state(source: Tensor) -> tuple[int, int]:
    """What changes when a tensor is written to, or its memory exchanged."""
    return source.data_ptr(), source._version


class StreamLinear:
    """See `families.Linear`. `names` are the modules' names in the bank; `merges` says whether merged weights may be
    used where no gradient is asked for."""

    def __init__(
        self, stream: Stream, names: Mapping[nn.Module, str], bank: LoRABank | None, kept: Kept, *, merges: bool
    ) -> None:
        self.stream, self.names, self.bank, self.kept_ones = stream, names, bank, kept
        present = {group.adapter for group in stream.groups}
        self.weights = {} if bank is None else {adapter: bank.weights(adapter) for adapter in present}
        self.merge_from = bank.merge_from(kept.num_bytes) if bank is not None and merges else {}

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        return self._adapted(module, x, self.stream.groups)

    def leaves(self, module: nn.Module, x: Tensor) -> Tensor:
        return self._adapted(module, x, self.stream.leaf_groups)

    def others(self, module: nn.Module, x: Tensor) -> list[Tensor]:
        return [self._adapted(module, x, [Group(g.adapter, 0, len(x))]) for g in self.stream.groups]

    def kept(self, module: nn.Module, make: Callable[[], Tensor], sources: Sequence[Tensor]) -> list[Tensor]:
        if self.bank is not None and self.bank.training:  # adapters drop out: nothing to keep
            return self.others(module, make())
        told = [*sources, *module.parameters()]
        values = []
        for group in self.stream.groups:
            pair = self._pair(module, group.adapter)
            adapter = group.adapter if pair is not None else None

            def table(adapter: int = group.adapter) -> Tensor:
                x = make()
                return self._adapted(module, x, [Group(adapter, 0, len(x))])

            values.append(self.kept_ones.get(("table", module, adapter), [*told, *(pair or ())], table))
        return values

    def _pair(self, module: nn.Module, adapter: int) -> Pair | None:
        return self.weights[adapter].get(self.names[module]) if self.bank is not None else None

    def _adapted(self, module: Any, x: Tensor, groups: Sequence[Group]) -> Tensor:
        pairs = [self._pair(module, group.adapter) for group in groups]
        if all(pair is None for pair in pairs):
            return product(x, module.weight, module.bias)
        assert self.bank is not None
        given = [(group, pair) for group, pair in zip(groups, pairs, strict=True) if pair is not None]
        if torch.is_autocast_enabled(x.device.type) or torch.is_grad_enabled() or self.bank.training:
            return with_adapters(x, self.bank.dropout(x), module.weight, module.bias, self.bank.scale, given)
        return self._without_gradients(module, x, given)

    def _without_gradients(self, module: Any, x: Tensor, given: Sequence[tuple[Group, Pair]]) -> Tensor:
        assert self.bank is not None
        if len(given) > 1 and stacks(x):
            return self._stacked(module, x, given)
        rows = self.merge_from.get(self.names[module])
        large = [(g, p) for g, p in given if rows is not None and g.stop - g.start >= rows]
        if not large:
            y = product(x, module.weight, module.bias)
            _add_deltas(y, x, given, self.bank.scale)
            return y
        y = x.new_empty(len(x), module.weight.shape[0])
        place = 0
        for group, pair in large:
            if group.start > place:
                y[place : group.start] = product(x[place : group.start], module.weight, module.bias)
            weight = self._merged(module, group.adapter, pair)
            y[group.start : group.stop] = product(x[group.start : group.stop], weight, module.bias)
            place = group.stop
        if place < len(x):
            y[place:] = product(x[place:], module.weight, module.bias)
        _add_deltas(y, x, [one for one in given if one not in large], self.bank.scale)
        return y

    def _stacked(self, module: Any, x: Tensor, given: Sequence[tuple[Group, Pair]]) -> Tensor:
        assert self.bank is not None
        y = product(x, module.weight, module.bias)
        many = max(1, STACKED // self.bank.rank)
        for first in range(0, len(given), many):
            part = given[first : first + many]
            groups = tuple(group for group, _ in part)
            matrices = [matrix for _, pair in part for matrix in pair]
            adapters = tuple(group.adapter for group in groups)
            A_KI = self.kept_ones.get(("A", module, adapters), matrices, lambda m=matrices: torch.cat(m[::2]))  # type: ignore[misc]
            B_KO = self.kept_ones.get(
                ("B", module, adapters),
                matrices,
                lambda m=matrices: torch.cat([B_OR.mT for B_OR in m[1::2]]),  # type: ignore[misc]
            )
            here = slice(groups[0].start, groups[-1].stop)
            inner_TK = (x[here] @ A_KI.mT).masked_fill_(self._others_TK(groups, x.device), 0)
            y[here].addmm_(inner_TK, B_KO, alpha=self.bank.scale)
        return y

    def _others_TK(self, groups: tuple[Group, ...], device: torch.device) -> Tensor:
        """Which columns of a stack are not of a row's own adapter."""
        if ("others", groups) not in self.stream.memo:
            assert self.bank is not None
            place_T = torch.full((groups[-1].stop - groups[0].start,), -1)
            for place, group in enumerate(groups):
                place_T[group.start - groups[0].start : group.stop - groups[0].start] = place
            place_K = torch.arange(len(groups)).repeat_interleave(self.bank.rank)
            self.stream.memo["others", groups] = place_T.to(device)[:, None] != place_K.to(device)
        return self.stream.memo["others", groups]  # type: ignore[no-any-return]

    def _merged(self, module: Any, adapter: int, pair: Pair) -> Tensor:
        A_RI, B_OR = pair
        assert self.bank is not None
        scale = self.bank.scale
        return self.kept_ones.get(
            ("merged", module, adapter),
            [module.weight, A_RI, B_OR],
            lambda: merged(module.weight, A_RI, B_OR, scale),
        )


def stacks(x: Tensor) -> bool:
    """Whether fewer launches are worth products that are thrown away."""
    return x.device.type != "cpu"


def _add_deltas(y: Tensor, x: Tensor, given: Sequence[tuple[Group, Pair]], scale: float) -> None:
    for group, (A_RI, B_OR) in given:
        here = slice(group.start, group.stop)
        add_delta(y[here], x[here], A_RI, B_OR, scale)


def with_adapters(
    x: Tensor,
    dropped: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    given: Sequence[tuple[Group, Pair]],
) -> Tensor:
    """x Wᵀ + b, and in each group's rows scale · dropped Aᵀ Bᵀ; differentiable. `dropped` is what the adapters read:
    `x` itself, or `x` after dropout."""
    if torch.is_autocast_enabled(x.device.type):
        return composed(x, dropped, weight, bias, scale, given)
    flat = [matrix for _, pair in given for matrix in pair]
    groups = [group for group, _ in given]
    return _WithAdapters.apply(x, None if dropped is x else dropped, weight, bias, scale, groups, *flat)  # type: ignore[no-any-return]


def composed(
    x: Tensor,
    dropped: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    given: Sequence[tuple[Group, Pair]],
) -> Tensor:
    """As `with_adapters`, written plainly."""
    y = F.linear(x, weight, bias)
    for group, (A_RI, B_OR) in given:
        here = torch.arange(group.start, group.stop, device=x.device)
        delta = F.linear(F.linear(dropped[here], A_RI), B_OR) * scale
        y = y.index_add(0, here, delta.to(y.dtype))
    return y


class _WithAdapters(torch.autograd.Function):
    """One node, so that a slice costs no copy of the whole and the adapters' share of dx is added in place."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        groups: Sequence[Group],
        *flat: Tensor,
    ) -> Tensor:
        y = product(x, weight, bias)
        read = x if dropped is None else dropped
        inner = []
        for group, A_RI, B_OR in zip(groups, flat[::2], flat[1::2], strict=True):
            here = slice(group.start, group.stop)
            inner.append(read[here] @ A_RI.mT)
            y[here].addmm_(inner[-1], B_OR.mT, alpha=scale)
        ctx.save_for_backward(x, dropped, weight, *flat, *inner)
        ctx.scale, ctx.groups, ctx.has_bias = scale, groups, bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, dropped, weight, *rest = ctx.saved_tensors
        num = len(ctx.groups)
        flat, inner = rest[: 2 * num], rest[2 * num :]
        dy = grads[0].contiguous()
        need_x, need_dropped, need_weight, need_bias = ctx.needs_input_grad[:4]
        dx = chosen("dx", x, weight)(dy, weight.mT, None) if need_x else None
        ddropped = torch.zeros_like(dropped) if need_dropped else None
        read, dread = (x, dx) if dropped is None else (dropped, ddropped)
        pairs: list[Tensor] = []
        for group, A_RI, B_OR, inner_MR in zip(ctx.groups, flat[::2], flat[1::2], inner, strict=True):
            here = slice(group.start, group.stop)
            dinner = (dy[here] @ B_OR).mul_(ctx.scale)
            pairs += [dinner.mT @ read[here], (dy[here].mT @ inner_MR).mul_(ctx.scale)]
            if dread is not None:
                dread[here].addmm_(dinner, A_RI)
        dweight = chosen("dW", x, weight)(dy.mT, x.mT, None) if need_weight else None
        dbias = dy.sum(0) if need_bias and ctx.has_bias else None
        return dx, ddropped, dweight, dbias, None, None, *pairs
