"""BERT (arXiv 1810.04805) and MiniLM: learnt positions, attention to the whole text, norm after each block.

T tokens, L leaves, D hidden, H heads.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from moreward.nn.attention import attend
from moreward.nn.families import Linear
from moreward.nn.packing import Stream


class Family:
    model_types: ClassVar[frozenset[str]] = frozenset({"bert"})
    causal = False

    def __init__(self, base: Any, classifier: Any) -> None:
        self.base, self.classifier = base, classifier
        self.num_layers = len(base.encoder.layer)

    @staticmethod
    def fits(config: Any) -> bool:
        return not config.is_decoder and not config.add_cross_attention

    def embed(self, stream: Stream, linear: Linear) -> Tensor:
        table = self.base.embeddings
        x_TD = table.word_embeddings(stream.ids_T) + table.token_type_embeddings.weight[0]
        x_TD = x_TD + table.position_embeddings(stream.position_T)
        return table.dropout(table.LayerNorm(x_TD))  # type: ignore[no-any-return]

    def layer(self, i: int, x_TD: Tensor, stream: Stream, linear: Linear, keep_L: Tensor | None) -> Tensor:
        layer = self.base.encoder.layer[i]
        attention = layer.attention.self
        q_THd, k_THd, v_THd = (
            linear(part, x_TD).unflatten(1, (attention.num_attention_heads, -1))
            for part in (attention.query, attention.key, attention.value)
        )
        dropout = attention.dropout.p if attention.training else 0.0
        context_TD = attend(q_THd, k_THd, v_THd, stream, scale=attention.scaling, causal=False, dropout=dropout)
        return after_attention(layer, context_TD, x_TD, linear, keep_L)

    def final(self, x_TD: Tensor) -> Tensor:
        return x_TD

    def pooled(self, first_LD: Tensor, linear: Linear) -> Tensor:
        pooler = self.base.pooler
        return self.classifier.dropout(pooler.activation(linear.leaves(pooler.dense, first_LD)))  # type: ignore[no-any-return]


def after_attention(layer: Any, context_TD: Tensor, x_TD: Tensor, linear: Linear, keep_L: Tensor | None) -> Tensor:
    """The rest of a layer as BERT and DeBERTa write it, of the tokens `keep_L` where those are all that is read."""
    if keep_L is not None:
        context_TD, x_TD = context_TD[keep_L], x_TD[keep_L]
    project = linear if keep_L is None else linear.leaves
    x_TD = _add_and_norm(layer.attention.output, project, context_TD, x_TD)
    inner_TF = layer.intermediate.intermediate_act_fn(project(layer.intermediate.dense, x_TD))
    return _add_and_norm(layer.output, project, inner_TF, x_TD)


def _add_and_norm(output: Any, project: Any, x: Tensor, residual: Tensor) -> Tensor:
    """The end of a block: project, drop, add, norm."""
    y = output.dropout(project(output.dense, x))
    # In place where no gradient can need the sum's terms: one pass over memory less.
    in_place = not torch.is_grad_enabled() and y.dtype == residual.dtype
    total = y.add_(residual) if in_place else y + residual
    return output.LayerNorm(total)  # type: ignore[no-any-return]
