"""Attention of a whole stream in one kernel, on CUDA: the segments differ in length, and nothing is padded.

A kernel for each length, as on CPU, would leave a GPU waiting for the next launch; and in half precision on Hopper
PyTorch 2.10 and later give attention to cuDNN, which takes some 30 ms for a plan whenever it meets a shape that it
has not seen, and streams hardly meet one twice. PyTorch's memory-efficient kernel (arXiv 2112.05682) takes segments
of any lengths, in every precision.

T tokens of the stream, M tokens that segments read, H query heads, G key and value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moreward.nn.packing import Stream

FORWARD: Any = getattr(torch.ops.aten, "_efficient_attention_forward", None)
BACKWARD: Any = getattr(torch.ops.aten, "_efficient_attention_backward", None)
"""Private to PyTorch: another version may lack them."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EVERYTHING, CAUSAL = 0, 2
"""What a token may see: all keys of its segment, or those that do not stand behind it, the last query standing at
the last key."""


def takes(q_THd: Tensor, dropout: float) -> bool:
    """Whether the kernel computes attention for such queries."""
    if q_THd.device.type != "cuda" or dropout or FORWARD is None or BACKWARD is None or torch.version.cuda is None:
        return False
    too_old = torch.cuda.get_device_capability(q_THd.device) < (8, 0)
    return q_THd.dtype in DTYPES and q_THd.shape[-1] % 8 == 0 and not (too_old and q_THd.dtype == torch.bfloat16)


def attend_whole(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, stream: Stream, *, scale: float, causal: bool) -> Tensor:
    """Softmax attention of each token to its own text, the prefix it shares included; (T, H·d)."""
    device = q_THd.device.type
    if torch.is_autocast_enabled(device):
        q_THd, k_TGd, v_TGd = (x.to(torch.get_autocast_dtype(device)) for x in (q_THd, k_TGd, v_TGd))
    k_MHd, v_MHd = (_read(x, stream, q_THd.shape[1]) for x in (k_TGd, v_TGd))
    out_THd: Tensor = _Whole.apply(q_THd, k_MHd, v_MHd, stream, scale, CAUSAL if causal else EVERYTHING)
    return out_THd.flatten(1)


def _read(x_TGd: Tensor, stream: Stream, num_heads: int) -> Tensor:
    """What each segment reads, one after the other, a head for each query head: (M, H, d)."""
    x = x_TGd[stream.read_M] if stream.branches else x_TGd
    groups = num_heads // x.shape[1]
    return x if groups == 1 else x.unsqueeze(2).expand(-1, -1, groups, -1).flatten(1, 2)


class _Whole(torch.autograd.Function):
    """The kernel with its own backward pass, in one piece for all keys: then the sums have one order and a run
    repeats to the bit."""

    @staticmethod
    def forward(
        ctx: Any, q_THd: Tensor, k_MHd: Tensor, v_MHd: Tensor, stream: Stream, scale: float, sees: int
    ) -> Tensor:
        needs_lse = any(ctx.needs_input_grad)
        out, lse, seed, offset, _, _ = FORWARD(
            q_THd[None],
            k_MHd[None],
            v_MHd[None],
            None,
            *_lengths(stream),
            0.0,
            sees,
            needs_lse,
            scale=scale,
        )
        ctx.save_for_backward(q_THd, k_MHd, v_MHd, out, lse, seed, offset)
        ctx.stream, ctx.scale, ctx.sees = stream, scale, sees
        return out[0]  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_THd, k_MHd, v_MHd, out, lse, seed, offset = ctx.saved_tensors
        cuts_q, cuts_k, max_q, max_k = _lengths(ctx.stream)
        dq, dk, dv, _ = BACKWARD(
            grads[0].contiguous()[None],
            q_THd[None],
            k_MHd[None],
            v_MHd[None],
            None,
            out,
            cuts_q,
            cuts_k,
            max_q,
            max_k,
            lse,
            0.0,
            seed,
            offset,
            ctx.sees,
            False,
            scale=ctx.scale,
            num_splits_key=1,
        )
        return dq[0], dk[0], dv[0], None, None, None


def _lengths(stream: Stream) -> tuple[Tensor, Tensor, int, int]:
    """Where segments begin and end among queries and among keys, and how long the longest is."""
    if not stream.branches:
        return stream.cuts_S1, stream.cuts_S1, stream.longest, stream.longest
    return stream.cuts_S1, stream.read_cuts_S1, stream.longest, stream.max_length


@contextmanager
def without_plans(device: torch.device) -> Iterator[None]:
    """Within it PyTorch's attention does not go to cuDNN, whose plan for each new shape takes longer than most
    forwards. Does nothing elsewhere than on CUDA."""
    if device.type != "cuda" or not torch.backends.cuda.cudnn_sdp_enabled():
        yield
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
