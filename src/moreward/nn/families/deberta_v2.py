"""DeBERTa-v2 and v3 (arXiv 2006.03654, 2111.09543): scores from content and from relative positions.

score[i, j] = (q_i·k_j + q_i·K[δ(i − j)] + k_j·Q[δ(i − j)]) / sqrt(3d), where K and Q are the table of relative
positions through the key and query layers. The stock code projects all of the table in every layer of every call,
repeats it over the batch and gathers a score at a time. Here a table is projected once for each adapter, only the
distances that occur are taken from it, and scores are read through shifted views.

T tokens, L leaves, D hidden, H heads, d head size, n segments of S tokens, W = 2S − 1 distances.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from moreward.nn.attention import by_segment
from moreward.nn.families import Linear
from moreward.nn.families.bert import after_attention
from moreward.nn.packing import Stream


class Family:
    model_types: ClassVar[frozenset[str]] = frozenset({"deberta-v2"})
    causal = False

    def __init__(self, base: Any, classifier: Any) -> None:
        self.base, self.classifier = base, classifier
        self.num_layers = len(base.encoder.layer)

    @staticmethod
    def fits(config: Any) -> bool:
        relative = getattr(config, "relative_attention", False)
        whole = set(config.pos_att_type or ()) == {"c2p", "p2c"} and getattr(config, "share_att_key", False)
        return bool(relative and whole and not getattr(config, "conv_kernel_size", 0))

    def embed(self, stream: Stream, linear: Linear) -> Tensor:
        table = self.base.embeddings
        x_TD = table.word_embeddings(stream.ids_T)
        if table.position_biased_input:
            x_TD = x_TD + table.position_embeddings(stream.position_T)
        if table.token_type_embeddings is not None:
            x_TD = x_TD + table.token_type_embeddings.weight[0]
        if table.embed_proj is not None:
            x_TD = linear(table.embed_proj, x_TD)
        return table.dropout(table.LayerNorm(x_TD))  # type: ignore[no-any-return]

    def layer(self, i: int, x_TD: Tensor, stream: Stream, linear: Linear, keep_L: Tensor | None) -> Tensor:
        layer = self.base.encoder.layer[i]
        attention = layer.attention.self
        q_THd, k_THd, v_THd = (
            linear(part, x_TD).unflatten(1, (attention.num_attention_heads, -1))
            for part in (attention.query_proj, attention.key_proj, attention.value_proj)
        )
        context_TD = self._attend(attention, q_THd, k_THd, v_THd, stream, linear)
        return after_attention(layer, context_TD, x_TD, linear, keep_L)

    def final(self, x_TD: Tensor) -> Tensor:
        return x_TD

    def pooled(self, first_LD: Tensor, linear: Linear) -> Tensor:
        pooler = self.classifier.pooler
        x_LD = linear.leaves(pooler.dense, pooler.dropout(first_LD))
        return self.classifier.dropout(ACT2FN[pooler.config.pooler_hidden_act](x_LD))  # type: ignore[no-any-return]

    def _attend(
        self, attention: Any, q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, stream: Stream, linear: Linear
    ) -> Tensor:
        """Context of every token, (T, H·d)."""
        if "distances" not in stream.memo:
            stream.memo["distances"] = _distances(attention, stream.max_length, q_THd.device)
        rows, to_key, to_query = stream.memo["distances"]
        keys, queries = (
            [t.unflatten(1, (attention.num_attention_heads, -1)) for t in tables]
            for tables in self._tables(attention, rows, linear)
        )
        scale = (3 * q_THd.shape[-1]) ** -0.5
        dropout = attention.dropout.p if attention.training else 0.0
        middle = stream.max_length - 1
        outs = []
        for key_KHd, query_KHd, runs in zip(keys, queries, stream.runs_of_groups, strict=True):
            for run in runs:
                seen = slice(middle - run.length + 1, middle + run.length)
                here = slice(run.start, run.stop)
                q, k, v = (by_segment(x[here], run) for x in (q_THd, k_THd, v_THd))
                out = _disentangled(
                    q,
                    k,
                    v,
                    key_KHd[to_key[seen]].transpose(0, 1),
                    query_KHd[to_query[seen]].transpose(0, 1),
                    scale,
                    dropout,
                )
                outs.append(out.transpose(1, 2).flatten(0, 1))
        return (outs[0] if len(outs) == 1 else torch.cat(outs)).flatten(1)

    def _tables(self, attention: Any, rows: slice, linear: Linear) -> list[list[Tensor]]:
        """The rows of the position table that occur, as keys and as queries of each adapter group."""
        encoder = self.base.encoder
        parts = (attention.key_proj, attention.query_proj)
        if torch.is_grad_enabled():
            table_KD = attention.pos_dropout(encoder.get_rel_embedding())[rows]
            return [linear.others(part, table_KD) for part in parts]
        sources = [
            p
            for module in (encoder.rel_embeddings, getattr(encoder, "LayerNorm", None))
            if module is not None
            for p in module.parameters()
        ]
        whole = slice(0, 2 * attention.pos_ebd_size)
        tables = [linear.kept(part, lambda: encoder.get_rel_embedding()[whole], sources) for part in parts]
        return [[table[rows] for table in one] for one in tables]


def _distances(attention: Any, length: int, device: torch.device) -> tuple[slice, Tensor, Tensor]:
    """Which rows of the table occur; among these, the row for each i − j from length − 1 down that meets a query, and
    for each i − j from 1 − length up that meets a key."""
    span, most = attention.pos_ebd_size, attention.max_relative_positions
    distance_W = torch.arange(length - 1, -length, -1, device=device)

    def bucket(distance: Tensor) -> Tensor:
        if attention.position_buckets > 0:
            distance = make_log_bucket_position(distance, attention.position_buckets, most).long()
        return distance

    to_key = (bucket(distance_W) + span).clamp(0, 2 * span - 1)
    to_query = (span - bucket(-distance_W)).clamp(0, 2 * span - 1).flip(0)
    low = int(torch.minimum(to_key, to_query).min())
    high = int(torch.maximum(to_key, to_query).max()) + 1
    return slice(low, high), to_key - low, to_query - low


def _shifted(x_HnSW: Tensor) -> Tensor:
    """View of column S − 1 − i + j of row i at [i, j], for columns that run from distance S − 1 down."""
    heads, n, size, width = x_HnSW.shape
    a, b, _, _ = x_HnSW.stride()
    return x_HnSW.as_strided((heads, n, size, size), (a, b, width - 1, 1), x_HnSW.storage_offset() + size - 1)


def _disentangled(
    q: Tensor, k: Tensor, v: Tensor, key_HWd: Tensor, query_HWd: Tensor, scale: float, dropout: float
) -> Tensor:
    """Context (n, H, S, d) of segments of one length; q, k, v are (n, H, S, d)."""
    # Heads first: the positions of a head are one product for all segments.
    q, k, v = (x.transpose(0, 1).contiguous() for x in (q, k, v))
    if dropout or torch.is_autocast_enabled(q.device.type):
        scores = (q @ k.mT + _content_to_position(q, key_HWd) + _position_to_content(k, query_HWd)) * scale
        return (torch.nn.functional.dropout(scores.softmax(-1), dropout) @ v).transpose(0, 1)
    context: Tensor = _Disentangled.apply(q, k, v, key_HWd, query_HWd, scale)
    return context.transpose(0, 1)


def _content_to_position(q: Tensor, key_HWd: Tensor) -> Tensor:
    return _shifted(_with_table(q, key_HWd))


def _position_to_content(k: Tensor, query_HWd: Tensor) -> Tensor:
    """At [i, j]: k_j · Q[δ(i − j)], a shift of the keys' rows: so this table runs from distance 1 − S up."""
    return _shifted(_with_table(k, query_HWd)).mT


def _with_table(x_HnSd: Tensor, table_HWd: Tensor) -> Tensor:
    """Each vector with each row of its head's table, (H, n, S, W)."""
    rows_HMW = x_HnSd.flatten(1, 2) @ table_HWd.mT
    return rows_HMW.view(*x_HnSd.shape[:3], -1)


class _Disentangled(torch.autograd.Function):
    """softmax(scale · (q kᵀ + shift(q Kᵀ) + shift(k Qᵀ)ᵀ)) v as one node, heads first: gradients of shifted views are
    written through the same views."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, key_HWd: Tensor, query_HWd: Tensor, scale: float) -> Tensor:
        scores = _content_to_position(q, key_HWd) + _position_to_content(k, query_HWd)
        flat = scores.flatten(0, 1)
        torch.baddbmm(flat, q.flatten(0, 1), k.flatten(0, 1).mT, out=flat)
        probs = torch.softmax(scores.mul_(scale), -1)
        ctx.save_for_backward(q, k, v, key_HWd, query_HWd, probs)
        ctx.scale = scale
        return probs @ v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, key_HWd, query_HWd, probs = ctx.saved_tensors
        dout = grads[0]
        dv = probs.mT @ dout
        dprobs = dout @ v.mT
        dscores = probs * (dprobs - (dprobs * probs).sum(-1, keepdim=True)) * ctx.scale
        dc2p = dscores.new_zeros((*dscores.shape[:3], key_HWd.shape[1]))
        dp2c = torch.zeros_like(dc2p)
        _shifted(dc2p).copy_(dscores)
        _shifted(dp2c).copy_(dscores.mT)
        rows_c2p, rows_p2c = dc2p.flatten(1, 2), dp2c.flatten(1, 2)
        dq = dscores @ k + (rows_c2p @ key_HWd).view_as(q)
        dk = dscores.mT @ q + (rows_p2c @ query_HWd).view_as(k)
        dkey = rows_c2p.mT @ q.flatten(1, 2)
        dquery = rows_p2c.mT @ k.flatten(1, 2)
        return dq, dk, dv, dkey, dquery, None
