"""Decoders of Llama's kind (arXiv 2302.13971), Mistral, Qwen2 and Qwen3: rotary positions, RMS norm before each block,
fewer key heads than query heads, gated feed-forward. A token sees what stands before it, so texts may share prefixes.

T tokens, L leaves, D hidden, H query heads, G key heads, d head size.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from moreward.nn.attention import attend
from moreward.nn.families import Linear
from moreward.nn.packing import Stream


class Family:
    model_types: ClassVar[frozenset[str]] = frozenset({"llama", "mistral", "qwen2", "qwen3"})
    causal = True

    def __init__(self, base: Any, classifier: Any) -> None:
        self.base = base
        self.norms_heads = base.config.model_type == "qwen3"
        self.num_layers = len(base.layers)

    @staticmethod
    def fits(config: Any) -> bool:
        """Sliding windows are left out, and rotary positions that change with the length."""
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        rope = getattr(config, "rope_parameters", None) or {}
        plain = rope.get("rope_type", "default") not in ("dynamic", "longrope")
        window = config.model_type == "mistral" and getattr(config, "sliding_window", None)
        return kinds == {"full_attention"} and plain and not window

    def embed(self, stream: Stream, linear: Linear) -> Tensor:
        return self.base.embed_tokens(stream.ids_T)  # type: ignore[no-any-return]

    def layer(self, i: int, x_TD: Tensor, stream: Stream, linear: Linear, keep_L: Tensor | None) -> Tensor:
        layer = self.base.layers[i]
        attention = layer.self_attn
        normed_TD = layer.input_layernorm(x_TD)
        q_THd, k_TGd, v_TGd = (
            linear(part, normed_TD).unflatten(1, (-1, attention.head_dim))
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if self.norms_heads:
            q_THd, k_TGd = attention.q_norm(q_THd), attention.k_norm(k_TGd)
        cos_T1d, sin_T1d = self._angles(stream, x_TD)
        q_THd, k_TGd = (x * cos_T1d + _rotated(x) * sin_T1d for x in (q_THd, k_TGd))
        dropout = attention.attention_dropout if attention.training else 0.0
        context_TD = attend(q_THd, k_TGd, v_TGd, stream, scale=attention.scaling, causal=True, dropout=dropout)
        if keep_L is not None:
            context_TD, x_TD = context_TD[keep_L], x_TD[keep_L]
        project = linear if keep_L is None else linear.leaves
        x_TD = x_TD + project(attention.o_proj, context_TD)
        mlp, normed_TD = layer.mlp, layer.post_attention_layernorm(x_TD)
        inner_TF = mlp.act_fn(project(mlp.gate_proj, normed_TD)) * project(mlp.up_proj, normed_TD)
        return x_TD + project(mlp.down_proj, inner_TF)

    def final(self, x_TD: Tensor) -> Tensor:
        return self.base.norm(x_TD)  # type: ignore[no-any-return]

    def pooled(self, first_LD: Tensor, linear: Linear) -> Tensor:
        raise NotImplementedError("a decoder is read at its last token")

    def _angles(self, stream: Stream, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every token's position, the same for all layers of a stream."""
        if "angles" not in stream.memo:
            cos_1Td, sin_1Td = self.base.rotary_emb(x_TD, stream.position_T.unsqueeze(0))
            stream.memo["angles"] = (cos_1Td[0].unsqueeze(1), sin_1Td[0].unsqueeze(1))
        return stream.memo["angles"]  # type: ignore[no-any-return]


def _rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)
