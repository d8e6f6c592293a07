"""A mixture of reward models as one sequence classifier of transformers.

This file needs torch and transformers only: it is also copied into exported directories, for those who load them with
`trust_remote_code=True`.

N rows, P prompts, T tokens, D hidden, E experts, K experts used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import ModelOutput


class MorewardConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """`base` is the configuration of the pretrained classifier as a dict. `separate`: every expert and the router have
    weights of their own (RODOS); else they share one transformer, with an adapter each where `targets` are named
    (ARLISS). `prompt_end` is the token that ends the prompt: an encoder's separator, or for decoders one of our own,
    which is taken out again (`drops_prompt_end`)."""

    model_type = "moreward-mixture"

    def __init__(
        self,
        base: dict[str, Any] | None = None,
        experts: tuple[str, ...] | list[str] = (),
        separate: bool = False,
        pooling: str = "own",
        last_linear: str = "score",
        heads: tuple[int, ...] | list[int] = (),
        targets: tuple[str, ...] | list[str] = (),
        rank: int = 0,
        scale: float = 1.0,
        experts_per_prompt: int = 1,
        position_offset: int = 0,
        max_tokens: int = 0,
        prompt_end: int = -1,
        drops_prompt_end: bool = False,
        **kwargs: Any,
    ) -> None:
        self.base = dict(base or {})
        self.experts = list(experts)
        self.separate = separate
        self.pooling = pooling
        self.last_linear = last_linear
        self.heads = list(heads)
        self.targets = list(targets)
        self.rank = rank
        self.scale = scale
        self.experts_per_prompt = experts_per_prompt
        self.position_offset = position_offset
        self.max_tokens = max_tokens
        self.prompt_end = prompt_end
        self.drops_prompt_end = drops_prompt_end
        super().__init__(**kwargs)


@dataclass
class MorewardOutput(ModelOutput):
    """`logits` (N, 1) are the rewards. `experts` (N, K) and `weights` (N, K) say where each row went, `rewards` (N, K)
    what these experts said, `gating_output` (N, E) what the router said of all."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    rewards: Tensor | None = None
    experts: Tensor | None = None
    weights: Tensor | None = None
    gating_output: Tensor | None = None


class Adapter(nn.Module):
    """Low-rank changes of linear layers: `A` (R, in) and `B` (out, R) of each."""

    def __init__(self, shapes: dict[str, tuple[int, int]], rank: int) -> None:
        super().__init__()
        self.A = nn.ParameterDict({k: nn.Parameter(torch.zeros(rank, num_in)) for k, (num_in, _) in shapes.items()})
        self.B = nn.ParameterDict({k: nn.Parameter(torch.zeros(num_out, rank)) for k, (_, num_out) in shapes.items()})


class MorewardForSequenceClassification(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Routes each row by its prompt to its experts; `logits[:, 0]` is the reward, higher is better."""

    config_class = MorewardConfig
    base_model_prefix = "moreward"
    config: Any

    def __init__(self, config: MorewardConfig) -> None:
        super().__init__(config)
        from transformers import AutoConfig, AutoModelForSequenceClassification

        kept = {k: v for k, v in config.base.items() if k not in ("model_type", "transformers_version")}
        base = AutoConfig.for_model(config.base["model_type"], **kept)
        base.num_labels = 1
        count = len(config.experts) + 1 if config.separate else 1
        auto: Any = AutoModelForSequenceClassification
        models = [auto.from_config(base) for _ in range(count)]
        for model in models:
            model.set_submodule(config.last_linear, nn.Identity())
        self.models = nn.ModuleList(models)
        size = int(base.hidden_size)
        self.heads = nn.ModuleList(_head(size, width) for width in config.heads)
        self.gate = nn.Linear(size, len(config.experts))
        modules = dict(models[0].named_modules())
        shapes = {key_of(name): _shape(modules[name]) for name in config.targets}
        num_adapters = len(config.experts) + 1 if config.targets else 0
        self.adapters = nn.ModuleList(Adapter(shapes, config.rank) for _ in range(num_adapters))
        self._adapter: int | None = None
        for name in config.targets:
            modules[name].register_forward_hook(self._adds(key_of(name)))
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Every weight comes from the file."""

    def _adds(self, key: str) -> Any:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self._adapter is None:
                return output
            adapter: Any = self.adapters[self._adapter]
            x = inputs[0] @ adapter.A[key].T
            delta: Tensor = (x @ adapter.B[key].T) * self.config.scale
            return output + delta

        return add

    @contextmanager
    def _using(self, number: int) -> Iterator[None]:
        self._adapter = number if len(self.adapters) else None
        try:
            yield
        finally:
            self._adapter = None

    def read(self, number: int, ids_NT: Tensor, mask_NT: Tensor) -> Tensor:
        """`hidden_ND` as part `number` reads the rows: an expert, or behind the last of them the router. Padding stands
        at the end."""
        model: Any = self.models[number if self.config.separate else 0]
        inputs: dict[str, Any] = {"input_ids": ids_NT, "attention_mask": mask_NT}
        if self.config.position_offset:
            inputs["position_ids"] = (mask_NT.cumsum(1) - 1).clamp(min=0) + self.config.position_offset
        with self._using(number):
            if self.config.pooling == "own":
                return model(**inputs).logits.float()  # type: ignore[no-any-return]
            hidden_NTD = model.base_model(**inputs).last_hidden_state.float()
        if self.config.pooling == "mean":
            weight_NT1 = mask_NT.unsqueeze(-1).to(hidden_NTD.dtype)
            return (hidden_NTD * weight_NT1).sum(1) / weight_NT1.sum(1)  # type: ignore[no-any-return]
        if self.config.pooling == "first":
            return hidden_NTD[:, 0]  # type: ignore[no-any-return]
        last_N = mask_NT.sum(1) - 1
        return hidden_NTD[torch.arange(len(last_N), device=last_N.device), last_N]  # type: ignore[no-any-return]

    def judge(self, expert: int, ids_NT: Tensor, mask_NT: Tensor) -> Tensor:
        """Standardised `reward_N` of one expert for every row."""
        head: Any = self.heads[expert]
        return head(self.read(expert, ids_NT, mask_NT).to(head[-1].weight.dtype)).squeeze(-1)  # type: ignore[no-any-return]

    def route(self, ids_PT: Tensor, mask_PT: Tensor) -> Tensor:
        """`logits_PE` of prompts."""
        hidden_PD = self.read(len(self.config.experts), ids_PT, mask_PT)
        return self.gate(hidden_PD.to(self.gate.weight.dtype))  # type: ignore[no-any-return]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        prompt_input_ids: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MorewardOutput | tuple[Tensor]:
        """`input_ids` and the mask (N, T), padded on either side. The prompts are found in them (see `prompts`) unless
        `prompt_input_ids` and their mask give them. ValueError for rows that are too long or have no prompt."""
        if input_ids is None:
            raise ValueError("input_ids: needed; this model reads tokens, not embeddings")
        mask_NT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        texts = [ids[keep.bool()].tolist() for ids, keep in zip(input_ids, mask_NT, strict=True)]
        if prompt_input_ids is None:
            found = [self._divided(n, text) for n, text in enumerate(texts)]
            prompts, texts = [prompt for prompt, _ in found], [text for _, text in found]
        else:
            kept = torch.ones_like(prompt_input_ids) if prompt_attention_mask is None else prompt_attention_mask
            prompts = [ids[keep.bool()].tolist() for ids, keep in zip(prompt_input_ids, kept, strict=True)]
        self._check(texts)
        logits_NE = self.route(*self._padded(prompts)).float()
        kept_NK, experts_NK = logits_NE.topk(self.config.experts_per_prompt, dim=-1)
        weights_NK = kept_NK.softmax(-1)
        rewards_NK = torch.zeros_like(weights_NK)
        for expert in sorted({*experts_NK.flatten().tolist()}):
            rows_N, places_N = (experts_NK == expert).nonzero(as_tuple=True)
            said = self.judge(expert, *self._padded([texts[n] for n in rows_N.tolist()]))
            rewards_NK = rewards_NK.index_put((rows_N, places_N), said.to(rewards_NK.dtype))
        logits = (rewards_NK * weights_NK).sum(1, keepdim=True)
        if return_dict is False:
            return (logits,)
        return MorewardOutput(
            logits=logits, rewards=rewards_NK, experts=experts_NK, weights=weights_NK, gating_output=logits_NE
        )

    def _padded(self, texts: list[list[int]]) -> tuple[Tensor, Tensor]:
        device, longest = self.gate.weight.device, max(len(text) for text in texts)
        ids_NT = torch.zeros(len(texts), longest, dtype=torch.long, device=device)
        mask_NT = torch.zeros_like(ids_NT)
        for n, text in enumerate(texts):
            ids_NT[n, : len(text)] = torch.tensor(text, device=device)
            mask_NT[n, : len(text)] = 1
        return ids_NT, mask_NT

    def _divided(self, row: int, text: list[int]) -> tuple[list[int], list[int]]:
        """The prompt of a text, and the text as experts read it."""
        end = self.config.prompt_end
        if end not in text:
            raise ValueError(
                f"row {row}: no token {end} that ends the prompt, so it cannot be routed. Give encoders prompt and "
                "response as a pair; for decoders write the tokenizer's `prompt_end` token between prompt and "
                "response, or pass prompt_input_ids and prompt_attention_mask."
            )
        place = text.index(end)
        if not self.config.drops_prompt_end:
            return text[: place + 1], text
        return text[:place], [*text[:place], *text[place + 1 :]]

    def _check(self, texts: list[list[int]]) -> None:
        for row, text in enumerate(texts):
            if not text:
                raise ValueError(f"row {row}: no token; the attention mask is zero everywhere")
            if len(text) > self.config.max_tokens:
                raise ValueError(
                    f"row {row}: {len(text)} tokens, the limit is {self.config.max_tokens}. Shorten it, or "
                    "pass truncation=True to the tokenizer."
                )


def _head(size: int, width: int) -> nn.Sequential:
    """A linear head (`width` 0), or one with a hidden layer."""
    if not width:
        return nn.Sequential(nn.Linear(size, 1))
    return nn.Sequential(nn.Linear(size, width), nn.GELU(), nn.Dropout(0.1), nn.Linear(width, 1))


def _shape(linear: Any) -> tuple[int, int]:
    """Numbers in and out; GPT-2's Conv1D has its weight the other way round."""
    if hasattr(linear, "in_features"):
        return linear.in_features, linear.out_features
    return linear.weight.shape[0], linear.weight.shape[1]


def key_of(module: str) -> str:
    return module.replace(".", "__")
