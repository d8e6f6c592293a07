"""Attention within the segments of a stream.

T tokens of the stream, H query heads, G key and value heads (H is a multiple of G), d head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moreward.nn.packing import Run, Stream
from moreward.nn.varlen import attend_whole, takes

FLASH: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
FLASH_BACKWARD: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
"""Private to PyTorch: another version may lack them."""


def attend(
    q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, stream: Stream, *, scale: float, causal: bool, dropout: float = 0.0
) -> Tensor:
    """Softmax attention of each token to its own text, shape (T, H·d). `causal`: only to itself and what is before
    it, the prefix that it shares with other texts included. `dropout` is the probability that applies now."""
    if takes(q_THd, dropout):
        return attend_whole(q_THd, k_TGd, v_TGd, stream, scale=scale, causal=causal)
    if stream.branches:
        assert causal
        flash = FLASH is not None and FLASH_BACKWARD is not None and q_THd.device.type == "cpu"
        if dropout or not flash or torch.is_autocast_enabled("cpu"):
            return plainly(q_THd, k_TGd, v_TGd, stream, scale=scale, dropout=dropout)
        tree_THd: Tensor = _Tree.apply(q_THd, k_TGd, v_TGd, stream, scale)
        return tree_THd.flatten(1)
    groups = q_THd.shape[1] // k_TGd.shape[1]
    sizes = [run.stop - run.start for run in stream.runs]
    outs = [
        F.scaled_dot_product_attention(
            by_segment(q, run),
            by_segment(k, run),
            by_segment(v, run),
            dropout_p=dropout,
            is_causal=causal,
            scale=scale,
            enable_gqa=groups > 1,
        )
        .transpose(1, 2)
        .flatten(0, 1)
        for run, q, k, v in zip(stream.runs, q_THd.split(sizes), k_TGd.split(sizes), v_TGd.split(sizes), strict=True)
    ]
    return (outs[0] if len(outs) == 1 else torch.cat(outs)).flatten(1)


def by_segment(x_THd: Tensor, run: Run) -> Tensor:
    """(count, H, length, d) of a run's tokens."""
    return x_THd.view(run.count, run.length, *x_THd.shape[1:]).transpose(1, 2)


def plainly(
    q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, stream: Stream, *, scale: float, dropout: float = 0.0
) -> Tensor:
    """Causal attention written plainly, on any device: each segment against all of its text up to there."""
    outs = []
    for segment, start in enumerate(stream.starts):
        place = stream.places(segment).to(q_THd.device)
        num_own = len(stream.segments[segment].tokens)
        q = q_THd[start : start + num_own].transpose(0, 1)
        k, v = (x[place].transpose(0, 1) for x in (k_TGd, v_TGd))
        seen = torch.ones(num_own, len(place), dtype=torch.bool, device=q.device).tril(len(place) - num_own)
        out = F.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=seen, dropout_p=dropout, scale=scale, enable_gqa=len(q) != len(k)
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs).flatten(1)


class _Tree(torch.autograd.Function):
    """Causal attention over texts that share prefixes.

    A token attends to its own segment, causally, and to the segments before it, wholly. The softmaxes are brought
    together by their log-sum-exp: out = Σ_i exp(lse_i − lse) out_i with lse = log Σ_i exp(lse_i). With the joint out
    and lse, each part's own backward formula gives its exact share of the gradients.
    """

    @staticmethod
    def forward(ctx: Any, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, stream: Stream, scale: float) -> Tensor:
        out_THd, lse_TH = _own(q_THd, k_TGd, v_TGd, stream, scale)
        for branch in stream.branches:
            here, prefix = slice(branch.start, branch.stop), slice(branch.prefix_start, branch.prefix_stop)
            out, lse = _prefix_flash(q_THd[here], k_TGd[prefix], v_TGd[prefix], scale)
            joint_TH = torch.logaddexp(lse_TH[here], lse)
            own_share, prefix_share = (lse_TH[here] - joint_TH).exp(), (lse - joint_TH).exp()
            out_THd[here] = out_THd[here] * own_share.unsqueeze(-1) + out * prefix_share.unsqueeze(-1)
            lse_TH[here] = joint_TH
        ctx.save_for_backward(q_THd, k_TGd, v_TGd, out_THd, lse_TH)
        ctx.stream, ctx.scale = stream, scale
        return out_THd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_THd, k_TGd, v_TGd, out_THd, lse_TH = ctx.saved_tensors
        dout_THd = grads[0].contiguous()
        groups = q_THd.shape[1] // k_TGd.shape[1]
        dq_THd, dk_TGd, dv_TGd = torch.empty_like(q_THd), torch.empty_like(k_TGd), torch.empty_like(v_TGd)
        for run in ctx.stream.runs:
            here = slice(run.start, run.stop)
            k, v = (_repeated(x[here], groups) for x in (k_TGd, v_TGd))
            parts = [by_segment(x, run) for x in (dout_THd[here], q_THd[here], k, v, out_THd[here])]
            lse = lse_TH[here].unflatten(0, (run.count, run.length)).transpose(1, 2).contiguous()
            dq, dk, dv = FLASH_BACKWARD(*parts, lse, 0.0, True, scale=ctx.scale)
            dq_THd[here] = dq.transpose(1, 2).flatten(0, 1)
            dk_TGd[here] = _summed(dk.transpose(1, 2).flatten(0, 1), groups)
            dv_TGd[here] = _summed(dv.transpose(1, 2).flatten(0, 1), groups)
        for branch in ctx.stream.branches:
            here, prefix = slice(branch.start, branch.stop), slice(branch.prefix_start, branch.prefix_stop)
            num_kv = k_TGd.shape[1]
            dout, q, out = (_folded(x[here], num_kv) for x in (dout_THd, q_THd, out_THd))
            lse = _folded(lse_TH[here].unsqueeze(-1), num_kv).squeeze(-1).contiguous()
            k, v = (x[prefix].transpose(0, 1).unsqueeze(0) for x in (k_TGd, v_TGd))
            dq, dk, dv = FLASH_BACKWARD(dout, q, k, v, out, lse, 0.0, False, scale=ctx.scale)
            dq_THd[here] += _unfolded(dq, branch.stop - branch.start)
            dk_TGd[prefix] += dk[0].transpose(0, 1)
            dv_TGd[prefix] += dv[0].transpose(0, 1)
        return dq_THd, dk_TGd, dv_TGd, None, None


def _own(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, stream: Stream, scale: float) -> tuple[Tensor, Tensor]:
    """Each segment's causal attention to itself: out_THd and lse_TH."""
    groups = q_THd.shape[1] // k_TGd.shape[1]
    out_THd = torch.empty_like(q_THd)
    lse_TH = q_THd.new_empty(q_THd.shape[:2], dtype=torch.float32)
    for run in stream.runs:
        here = slice(run.start, run.stop)
        q, k, v = q_THd[here], _repeated(k_TGd[here], groups), _repeated(v_TGd[here], groups)
        out, lse = FLASH(*(by_segment(x, run) for x in (q, k, v)), 0.0, True, scale=scale)
        out_THd[here] = out.transpose(1, 2).flatten(0, 1)
        lse_TH[here] = lse.transpose(1, 2).flatten(0, 1)
    return out_THd, lse_TH


def _prefix_flash(q_THd: Tensor, k_PGd: Tensor, v_PGd: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """All tokens of a branch against all of its prefix. Query heads of one key head become rows: nothing is masked."""
    q = _folded(q_THd, k_PGd.shape[1])
    k, v = (x.transpose(0, 1).unsqueeze(0) for x in (k_PGd, v_PGd))
    out, lse = FLASH(q, k, v, 0.0, False, scale=scale)
    return _unfolded(out, len(q_THd)), _unfolded(lse.unsqueeze(-1), len(q_THd)).squeeze(-1)


def _folded(x_THd: Tensor, num_kv: int) -> Tensor:
    """(1, G, T·H/G, d): the query heads that share a key head, one after the other."""
    num_tokens, num_heads, size = x_THd.shape
    x = x_THd.view(num_tokens, num_kv, num_heads // num_kv, size)
    return x.permute(1, 2, 0, 3).reshape(1, num_kv, -1, size)


def _unfolded(x_1GMd: Tensor, num_tokens: int) -> Tensor:
    _, num_kv, num_rows, size = x_1GMd.shape
    x = x_1GMd.view(num_kv, num_rows // num_tokens, num_tokens, size)
    return x.permute(2, 0, 1, 3).reshape(num_tokens, -1, size)


def _repeated(x_TGd: Tensor, groups: int) -> Tensor:
    return x_TGd if groups == 1 else x_TGd.repeat_interleave(groups, dim=1)


def _summed(x_THd: Tensor, groups: int) -> Tensor:
    return x_THd if groups == 1 else x_THd.unflatten(1, (-1, groups)).sum(2)
