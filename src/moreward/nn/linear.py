"""fp32 linear maps at the speed of the processor.

PyTorch's fp32 product on CPU is MKL's, which leaves AMD's AVX-512 processors at half their speed; oneDNN, which
PyTorch also carries, does not (Zen 5: 2.2 times faster forward, 2.1 for dx, 1.5 to 2 for dW, relative difference below
2e-6). On AMD's AVX2 processors it is the other way round (Zen 3: oneDNN 0.8 to 1.0 forward, 0.55 to 0.7 for dW). So
the product is chosen by measurement, for each shape, when a model is loaded. The choice is kept on disk, for a run must
repeat bit for bit on its machine: see `measured`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moreward.nn.measured import Key, measure, seconds

CHOICES = "linear"
"""The kind of these measurements on disk."""
TOLERANCE = 1e-5
WORTH = 1.15
"""oneDNN must be this much faster: MKL is what everybody else computes with, and near equals should not flip."""
FEW, MANY = 32, 512
"""Rows at which a shape is measured; products of fewer than four times FEW rows go by the first."""
MAX_FLOP = 4e8

Kind = str  # "forward", "dx" or "dW"

_choices: dict[Key, bool] = {}
"""Whether oneDNN computes this shape: kind, rows (FEW or MANY), in, out. A shape that is not here is MKL's."""


def speed_up(model: nn.Module) -> None:
    """Let every plain linear layer of a model use the faster product for its shape. Names and tensors stay.

    `MOREWARD_LINEAR=plain` leaves the model as it is.
    """
    layers = [m for m in model.modules() if type(m) is nn.Linear]
    if os.environ.get("MOREWARD_LINEAR") == "plain" or any(m.weight.device.type != "cpu" for m in layers):
        return
    settle({(m.in_features, m.out_features) for m in layers})
    for layer in layers:
        layer.__class__ = FastLinear


def settle(sizes: set[tuple[int, int]]) -> None:
    """Measure, or read back, the products of layers of these (in, out) sizes."""
    wanted: list[Key] = [(kind, rows, i, o) for i, o in sorted(sizes) for kind in _MAPS for rows in (FEW, MANY)]
    _choices.update({shape: bool(wins) for shape, wins in measure(CHOICES, wanted, lambda s: _onednn_wins(*s)).items()})


def fingerprint(model: nn.Module) -> str:
    """What tells two choices for the layers of a model apart: it goes into the names of caches."""
    sizes = {(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)}
    taken = sorted(shape for shape, wins in _choices.items() if wins and shape[2:] in sizes)
    return hashlib.sha256(repr(taken).encode()).hexdigest()[:8]


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, by the product that is faster here."""
    is_fp32 = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    if not is_fp32 or x.numel() == 0 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    num_out, num_in = weight.shape
    rows = _rows(x)
    if not any(_choices.get((kind, rows, num_in, num_out), False) for kind in _MAPS):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias, rows)  # type: ignore[no-any-return]


def chosen(kind: Kind, x: Tensor, weight: Tensor) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """What computes one product of a layer with input x fastest, for those who write their own backward pass: of
    (x, weight) forward, of (dy, weight.t()) for dx, of (dy.t(), x.t()) for dW."""
    is_fp32 = weight.dtype == torch.float32 and weight.device.type == "cpu"
    return _by(kind, _rows(x), weight) if is_fp32 else F.linear


class FastLinear(nn.Linear):
    """`nn.Linear` by the faster product."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.rows = bias is not None, rows
        return _by("forward", rows, weight)(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dy = grads[0].contiguous()
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        flat_dy = dy.reshape(-1, dy.shape[-1])
        dx = _by("dx", ctx.rows, weight)(dy, weight.t(), None) if need_x else None
        dweight = None
        if need_weight:
            dweight = _by("dW", ctx.rows, weight)(flat_dy.t(), x.reshape(-1, x.shape[-1]).t(), None)
        return dx, dweight, flat_dy.sum(0) if need_bias and ctx.has_bias else None, None


def _by(kind: Kind, rows: int, weight: Tensor) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    num_out, num_in = weight.shape
    return onednn if _choices.get((kind, rows, num_in, num_out), False) else F.linear


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN's product, by an operator that is private to PyTorch."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def _rows(x: Tensor) -> int:
    return FEW if x.numel() < 4 * FEW * x.shape[-1] else MANY


# Measuring

_MAPS: dict[Kind, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "forward": lambda x, weight, dy: (x, weight),
    "dx": lambda x, weight, dy: (dy, weight.t()),
    "dW": lambda x, weight, dy: (dy.t(), x.t()),
}


def _onednn_wins(kind: Kind, rows: int, num_in: int, num_out: int) -> bool:
    rows = max(1, min(rows, int(MAX_FLOP / (2 * num_in * num_out))))
    generator = torch.Generator("cpu").manual_seed(0)
    shapes = ((rows, num_in), (num_out, num_in), (rows, num_out))
    # On the CPU whatever the default device is: models that are only counted are built on "meta".
    x, weight, dy = (torch.randn(shape, generator=generator, device="cpu") for shape in shapes)
    with torch.no_grad():
        a, b = _MAPS[kind](x, weight, dy)
        try:
            found, wanted = onednn(a, b, None), F.linear(a, b)
        except (AttributeError, RuntimeError, TypeError):  # another torch may lack or change the operator
            return False
        if not bool((found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()):
            return False
        flop = 2 * rows * num_in * num_out
        return seconds(lambda: F.linear(a, b), flop) > WORTH * seconds(lambda: onednn(a, b, None), flop)
