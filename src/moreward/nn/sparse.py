"""Feed-forward experts used sparsely, all of them as one step of autograd.

The assignments of rows to experts are sorted by expert, so that each expert works on one segment of rows. A weight's
gradient is written once, at its own size: the time grows with the experts that are used, not with the square of those
that exist. The first layer's outputs are kept for the backward pass; the activation is computed again, which costs no
more than keeping it.

N rows, D hidden, W width of an expert, K experts used by a row, S = N · K assignments, R rows of one segment.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moreward.nn.linear import chosen

DTYPES = (torch.float32, torch.float64)


class Weights(NamedTuple):
    """The parameters of one expert, Linear(D, W) → GELU → Linear(W, D); or their gradients."""

    up_WD: Tensor
    up_bias_W: Tensor
    down_DW: Tensor
    down_bias_D: Tensor


@dataclass(frozen=True)
class Order:
    """The assignments sorted by expert: their places among all S, the rows they belong to, how many each expert has."""

    place_S: Tensor
    row_S: Tensor
    sizes: list[int]

    @classmethod
    def of(cls, experts_NK: Tensor, num_experts: int) -> Order:
        expert_S, place_S = experts_NK.reshape(-1).sort(stable=True)
        row_S = place_S.div(experts_NK.shape[1], rounding_mode="floor")
        return cls(place_S, row_S, torch.bincount(expert_S, minlength=num_experts).tolist())

    @property
    def used(self) -> list[int]:
        """The experts that have a row."""
        return [e for e, size in enumerate(self.sizes) if size]

    def split(self, x_SD: Tensor) -> tuple[Tensor, ...]:
        """One segment per expert used."""
        return torch.split(x_SD, [size for size in self.sizes if size])

    def weight_S1(self, weights_NK: Tensor) -> Tensor:
        return weights_NK.reshape(-1, 1).index_select(0, self.place_S)

    def add_up(self, x_SD: Tensor, num_rows: int) -> Tensor:
        """Per row the sum over its assignments, taken in one order always."""
        return x_SD.new_zeros(num_rows, x_SD.shape[1]).index_add_(0, self.row_S, x_SD)


def mix(experts: nn.ModuleList, hidden_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """Σ_k weights_NK[:, k] · expert(hidden), each expert a `Sequential` of Linear, GELU, Linear.

    On the CPU in float32 or float64 the experts' parameters are read and their modules not called: hooks on them do
    not run, and the gradient cannot be differentiated again. An expert without a row gets no gradient (None).
    """
    parameters = [p for expert in experts for p in _weights(expert)]
    tensors = (hidden_ND, weights_NK, parameters[0])  # the parameters of a bank are of one kind
    is_plain = any(t.device.type != "cpu" or t.dtype not in DTYPES or t.dtype != hidden_ND.dtype for t in tensors)
    if is_plain or hidden_ND.numel() == 0 or torch.is_autocast_enabled("cpu"):
        return mix_plain(experts, hidden_ND, experts_NK, weights_NK)
    if torch.is_grad_enabled():
        return cast(Tensor, _Mix.apply(experts_NK, hidden_ND, weights_NK, *parameters))
    return _forward(experts_NK, hidden_ND, weights_NK, parameters, keep=False)[0]


def mix_plain(experts: nn.ModuleList, hidden_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """The same for any experts, device and type, one expert after another: what `mix` is compared with."""
    mixed_ND = torch.zeros_like(hidden_ND)
    for e, expert in enumerate(experts):
        row_R, place_R = (experts_NK == e).nonzero(as_tuple=True)
        if len(row_R):
            weighted_RD = expert(hidden_ND[row_R]) * weights_NK[row_R, place_R].unsqueeze(-1)
            mixed_ND = mixed_ND.index_add(0, row_R, weighted_RD)
    return mixed_ND


def _weights(expert: nn.Module) -> Weights:
    up, _, down = cast(Iterable[nn.Linear], expert)
    return Weights(up.weight, up.bias, down.weight, down.bias)


def _by_expert(parameters: Sequence[Tensor]) -> list[Weights]:
    return [Weights(*parameters[i : i + 4]) for i in range(0, len(parameters), 4)]


def _forward(
    experts_NK: Tensor, hidden_ND: Tensor, weights_NK: Tensor, parameters: Sequence[Tensor], *, keep: bool
) -> tuple[Tensor, Order, list[Tensor], list[Tensor]]:
    """The mixture, and per expert used its first layer's output (where kept) and its last layer's."""
    experts = _by_expert(parameters)
    order = Order.of(experts_NK, len(experts))
    buffer_SD = hidden_ND.index_select(0, order.row_S)
    ups, outs = [], []
    for e, hidden_RD in zip(order.used, order.split(buffer_SD), strict=True):
        up_WD, up_bias_W, down_DW, down_bias_D = experts[e]
        up_RW = chosen("forward", hidden_RD, up_WD)(hidden_RD, up_WD, up_bias_W)
        act_RW = F.gelu(up_RW)
        outs.append(chosen("forward", act_RW, down_DW)(act_RW, down_DW, down_bias_D))
        if keep:
            ups.append(up_RW)
    # Fresh memory costs more than the arithmetic on it, so the inputs' is written over.
    weighted_SD = torch.cat(outs, out=buffer_SD).mul_(order.weight_S1(weights_NK))
    return order.add_up(weighted_SD, len(hidden_ND)), order, ups, outs


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, experts_NK: Tensor, hidden_ND: Tensor, weights_NK: Tensor, *parameters: Tensor) -> Tensor:
        mixed_ND, ctx.order, ups, outs = _forward(experts_NK, hidden_ND, weights_NK, parameters, keep=True)
        ctx.save_for_backward(hidden_ND, weights_NK, *ups, *outs, *parameters)
        return mixed_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmixed_ND: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weights_NK, *rest = ctx.saved_tensors
        order, num = ctx.order, len(ctx.order.used)
        ups, outs, experts = rest[:num], rest[num : 2 * num], _by_expert(rest[2 * num :])

        dout_SD, buffer_SD = dmixed_ND.index_select(0, order.row_S), torch.cat(outs)
        dweight_S = weights_NK.new_empty(weights_NK.numel())
        dweight_S[order.place_S] = torch.linalg.vecdot(dout_SD, buffer_SD)
        dout_SD.mul_(order.weight_S1(weights_NK))
        hidden_SD = torch.index_select(hidden_ND, 0, order.row_S, out=buffer_SD)

        grads: list[Tensor | None] = [None] * (4 * len(experts))
        dhiddens = []
        segments = zip(order.used, order.split(hidden_SD), ups, order.split(dout_SD), strict=True)
        for e, hidden_RD, up_RW, dout_RD in segments:
            dhidden_RD, grads[4 * e : 4 * e + 4] = _backward(experts[e], hidden_RD, up_RW, dout_RD)
            dhiddens.append(dhidden_RD)
        dhidden_SD = torch.cat(dhiddens, out=buffer_SD)
        return None, order.add_up(dhidden_SD, len(hidden_ND)), dweight_S.view(weights_NK.shape), *grads


def _backward(expert: Weights, hidden_RD: Tensor, up_RW: Tensor, dout_RD: Tensor) -> tuple[Tensor, Weights]:
    """One expert's gradients: of its rows and of its parameters."""
    act_RW = F.gelu(up_RW)
    ddown_DW = chosen("dW", act_RW, expert.down_DW)(dout_RD.t(), act_RW.t(), None)
    dact_RW = chosen("dx", act_RW, expert.down_DW)(dout_RD, expert.down_DW.t(), None)
    dup_RW = torch.ops.aten.gelu_backward.grad_input(dact_RW, up_RW, grad_input=dact_RW)
    dup_WD = chosen("dW", hidden_RD, expert.up_WD)(dup_RW.t(), hidden_RD.t(), None)
    dhidden_RD = chosen("dx", hidden_RD, expert.up_WD)(dup_RW, expert.up_WD.t(), None)
    return dhidden_RD, Weights(dup_WD, dup_RW.sum(0), ddown_DW, dout_RD.sum(0))
