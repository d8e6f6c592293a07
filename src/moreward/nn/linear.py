"""fp32 linear maps at the speed of the processor.

PyTorch's fp32 product on CPU is MKL's, which leaves processors that are not Intel's at half their speed; oneDNN, which
PyTorch also carries, does not (measured on Zen 5: 2.2 times faster forward, 2.1 for dx, 1.5 to 2 for dW, relative
difference below 2e-6). The choice depends on the machine alone, so a run repeats bit for bit on it.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOLERANCE = 1e-5


@cache
def use_onednn() -> bool:
    """Whether fp32 products go to oneDNN here: not an Intel processor, and the private operator exists and agrees
    with `F.linear`. `MOREWARD_LINEAR=plain` says no."""
    if os.environ.get("MOREWARD_LINEAR") == "plain" or _vendor() != "AuthenticAMD":
        return False
    generator = torch.Generator("cpu").manual_seed(0)
    # On the CPU whatever the default device is: models that are only counted are built on "meta".
    x, weight = (torch.randn(shape, generator=generator, device="cpu") for shape in ((8, 64), (32, 64)))
    try:
        found, wanted = _product(x, weight, None), F.linear(x, weight)
    except (AttributeError, RuntimeError, TypeError):  # the operator is private: another torch may lack or change it
        return False
    return bool((found - wanted).abs().max() <= TOLERANCE * wanted.abs().max())


def _vendor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dy = grads[0].contiguous()
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        dx = _product(dy, weight.t(), None) if need_x else None
        dweight = _product(rows.t(), x.reshape(-1, x.shape[-1]).t(), None) if need_weight else None
        return dx, dweight, rows.sum(0) if need_bias and ctx.has_bias else None


class FastLinear(nn.Linear):
    """`nn.Linear` whose fp32 product on CPU is oneDNN's."""

    def forward(self, x: Tensor) -> Tensor:
        is_fp32 = x.dtype == self.weight.dtype == torch.float32 and x.device.type == "cpu"
        if not is_fp32 or x.numel() == 0 or torch.is_autocast_enabled("cpu"):
            return F.linear(x, self.weight, self.bias)
        return _Linear.apply(x, self.weight, self.bias)  # type: ignore[no-any-return]


def speed_up(model: nn.Module) -> None:
    """Let every plain linear layer of a model use the faster product, where there is one. Names and tensors stay."""
    if use_onednn():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = FastLinear
