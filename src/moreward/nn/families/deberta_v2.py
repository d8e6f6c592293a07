"""DeBERTa-v2 and v3 (arXiv 2006.03654, 2111.09543): scores from content and from relative positions.

score[i, j] = (q_i·k_j + q_i·K[δ(i − j)] + k_j·Q[δ(i − j)]) / sqrt(3d), where K and Q are the table of relative
positions through the key and query layers. The stock code projects all of the table in every layer of every call,
repeats it over the batch and gathers a score at a time. Here a table is projected once for each adapter, only the
distances that occur are taken from it, and scores are read through shifted views.

On a GPU, where each of many small products waits for its launch, segments of similar length are padded to one.

T tokens, L leaves, D hidden, H heads, d head size, n segments of S tokens, W = 2S − 1 distances, M tokens of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from moreward.nn.attention import by_segment
from moreward.nn.families import Linear
from moreward.nn.families.bert import after_attention
from moreward.nn.packing import Run, Stream

BLOCK = {"cpu": 64, "cuda": 512}
"""Tokens of a block: products left out against launches."""


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
        rows = stream.memo["distances"][0]
        keys, queries = (
            [t.unflatten(1, (attention.num_attention_heads, -1)) for t in tables]
            for tables in self._tables(attention, rows, linear)
        )
        scale = (3 * q_THd.shape[-1]) ** -0.5
        dropout = attention.dropout.p if attention.training else 0.0
        if pads(q_THd):
            return self._attend_padded(q_THd, k_THd, v_THd, keys, queries, stream, scale, dropout)
        outs = []
        for key_KHd, query_KHd, runs in zip(keys, queries, stream.runs_of_groups, strict=True):
            for run in runs:
                here = slice(run.start, run.stop)
                q, k, v = (by_segment(x[here], run) for x in (q_THd, k_THd, v_THd))
                key_HWd, query_HWd = _met(key_KHd, query_KHd, stream, run.length)
                out = _disentangled(q, k, v, key_HWd, query_HWd, scale, dropout)
                outs.append(out.transpose(1, 2).flatten(0, 1))
        return (outs[0] if len(outs) == 1 else torch.cat(outs)).flatten(1)

    def _attend_padded(
        self,
        q_THd: Tensor,
        k_THd: Tensor,
        v_THd: Tensor,
        keys: list[Tensor],
        queries: list[Tensor],
        stream: Stream,
        scale: float,
        dropout: float,
    ) -> Tensor:
        """As on CPU, by segments of similar length."""
        if "padded" not in stream.memo:
            stream.memo["padded"] = _padded(stream.runs_of_groups, q_THd.device)
        buckets_of_groups, place_T = stream.memo["padded"]
        outs = []
        for key_KHd, query_KHd, buckets in zip(keys, queries, buckets_of_groups, strict=True):
            for bucket in buckets:
                q, k, v = (x[bucket.place_nS].transpose(1, 2) for x in (q_THd, k_THd, v_THd))
                key_HWd, query_HWd = _met(key_KHd, query_KHd, stream, bucket.place_nS.shape[1])
                out = _disentangled(q, k, v, key_HWd, query_HWd, scale, dropout, bucket.padding_nS)
                outs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outs)[place_T].flatten(1)

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


def pads(q_THd: Tensor) -> bool:
    """Whether fewer launches are worth more than no padding."""
    return q_THd.device.type != "cpu"


@dataclass(frozen=True)
class Bucket:
    """Segments of similar length. `place_nS` is each token's place in the stream; a segment's first token stands for
    its padding, which `padding_nS` tells; None where nothing is padded."""

    place_nS: Tensor
    padding_nS: Tensor | None


def _padded(runs_of_groups: list[list[Run]], device: torch.device) -> tuple[list[list[Bucket]], Tensor]:
    """The buckets of each adapter group, and where in their joint rows each token of the stream is."""
    places: list[Tensor] = []
    buckets_of_groups = []
    num_rows = 0
    for runs in runs_of_groups:
        buckets = []
        for members in _of_similar_length(runs):
            longest = members[-1].length
            starts = torch.cat([run.start + run.length * torch.arange(run.count) for run in members])
            lengths = torch.cat([torch.full((run.count,), run.length) for run in members])
            column_S = torch.arange(longest)
            padding_nS = column_S >= lengths[:, None]
            place_nS = starts[:, None] + column_S.where(~padding_nS, 0)
            row_nS = num_rows + torch.arange(place_nS.numel()).view_as(place_nS)
            places.append(torch.stack([place_nS[~padding_nS], row_nS[~padding_nS]]))
            num_rows += place_nS.numel()
            padded = padding_nS.to(device) if bool(padding_nS.any()) else None
            buckets.append(Bucket(place_nS.to(device), padded))
        buckets_of_groups.append(buckets)
    token_T, row_T = torch.cat(places, 1)
    return buckets_of_groups, row_T[token_T.argsort()].to(device)


def _of_similar_length(runs: list[Run]) -> Iterator[list[Run]]:
    """From short to long; no segment of more than 32 tokens is padded by more than a third."""
    members: list[Run] = []
    for run in sorted(runs, key=lambda run: run.length):
        if members and run.length > max(32, members[0].length * 4 // 3):
            yield members
            members = []
        members.append(run)
    yield members


def _met(key_KHd: Tensor, query_KHd: Tensor, stream: Stream, length: int) -> tuple[Tensor, Tensor]:
    """The rows of both tables for the distances within a segment, (H, W, d)."""
    _, to_key, to_query = stream.memo["distances"]
    middle = stream.max_length - 1
    seen = slice(middle - length + 1, middle + length)
    return key_KHd[to_key[seen]].transpose(0, 1), query_KHd[to_query[seen]].transpose(0, 1)


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


def _shifted(x_HnMW: Tensor) -> Tensor:
    """View of column M − 1 − i + j of row i at [i, j], for M rows whose W = S + M − 1 columns run from the distance of
    the last row to the first token down to that of the first row to the last token: (H, n, M, S)."""
    heads, n, rows, width = x_HnMW.shape
    a, b, _, _ = x_HnMW.stride()
    return x_HnMW.as_strided(
        (heads, n, rows, width - rows + 1), (a, b, width - 1, 1), x_HnMW.storage_offset() + rows - 1
    )


def _disentangled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_HWd: Tensor,
    query_HWd: Tensor,
    scale: float,
    dropout: float,
    padding_nS: Tensor | None = None,
) -> Tensor:
    """Context (n, H, S, d) of segments of one length; q, k, v are (n, H, S, d). The table of keys runs from distance
    S − 1 down, that of queries from 1 − S up. No token attends to `padding_nS`."""
    # Heads first: the positions of a head are one product for all segments.
    q, k, v = (x.transpose(0, 1).contiguous() for x in (q, k, v))
    if dropout or torch.is_autocast_enabled(q.device.type):
        scores = (q @ k.mT + _shifted(_with_table(q, key_HWd)) + _shifted(_with_table(k, query_HWd)).mT) * scale
        if padding_nS is not None:
            scores = scores.masked_fill(padding_nS[:, None], -torch.inf)
        return (torch.nn.functional.dropout(scores.softmax(-1), dropout) @ v).transpose(0, 1)
    context: Tensor = _Disentangled.apply(q, k, v, key_HWd, query_HWd, scale, padding_nS)
    return context.transpose(0, 1)


def _with_table(x_HnMd: Tensor, table_HWd: Tensor) -> Tensor:
    """Each vector with each row of its head's table, (H, n, M, W)."""
    rows_HMW = x_HnMd.flatten(1, 2) @ table_HWd.mT
    return rows_HMW.view(*x_HnMd.shape[:3], -1)


def _blocks(x_HnSd: Tensor) -> Iterator[tuple[slice, slice]]:
    """A segment's tokens, some at a time, and the rows of a table that these meet: a token meets only S of the 2S − 1
    distances, so that small blocks leave nearly half of the products out."""
    length, size = x_HnSd.shape[2], BLOCK.get(x_HnSd.device.type, 512)
    for start in range(0, length, size):
        stop = min(start + size, length)
        yield slice(start, stop), slice(length - stop, 2 * length - 1 - start)


class _Disentangled(torch.autograd.Function):
    """softmax(scale · (q kᵀ + shift(q Kᵀ) + shift(k Qᵀ)ᵀ)) v as one node, heads first, blocks of tokens at a time:
    gradients of shifted views are written through the same views."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_HWd: Tensor,
        query_HWd: Tensor,
        scale: float,
        padding_nS: Tensor | None,
    ) -> Tensor:
        scores = q @ k.mT
        for tokens, met in _blocks(q):
            scores[:, :, tokens] += _shifted(_with_table(q[:, :, tokens], key_HWd[:, met]))
            scores[..., tokens] += _shifted(_with_table(k[:, :, tokens], query_HWd[:, met])).mT
        if padding_nS is not None:
            scores.masked_fill_(padding_nS[:, None], -torch.inf)
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
        dq, dk = dscores @ k, dscores.mT @ q
        dkey, dquery = torch.zeros_like(key_HWd), torch.zeros_like(query_HWd)
        for tokens, met in _blocks(q):
            _add_gradients(dscores[:, :, tokens], q, key_HWd, dq, dkey, tokens, met)
            _add_gradients(dscores[..., tokens].mT, k, query_HWd, dk, dquery, tokens, met)
        return dq, dk, dv, dkey, dquery, None, None


def _add_gradients(
    dscores: Tensor, x: Tensor, table: Tensor, dx: Tensor, dtable: Tensor, tokens: slice, met: slice
) -> None:
    """Of shift(x tableᵀ) in a block: to the gradients of its tokens and of the rows of the table that they meet."""
    rows = met.stop - met.start
    dproduct = dscores.new_zeros((*dscores.shape[:3], rows))
    _shifted(dproduct).copy_(dscores)
    flat_HMW = dproduct.flatten(1, 2)
    x_HnMd = x[:, :, tokens]
    dx[:, :, tokens] += (flat_HMW @ table[:, met]).view_as(x_HnMd)
    dtable[:, met] += flat_HMW.mT @ x_HnMd.flatten(1, 2)
