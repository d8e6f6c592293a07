"""A mixture, or a single model, as one ONNX graph: tokens in, the routed reward out, without torch or this package.

A row meets the router and its own experts only: inside the graph rows are gathered for each expert. N rows, T tokens,
E experts, K experts used.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moreward.checkpoint import write_json, write_manifest
from moreward.errors import ConfigError, MissingExtraError, RunError
from moreward.export.card import write_card
from moreward.export.merged import Exported
from moreward.export.mixture import check_parts, mixture_model, mixture_note, mixture_of
from moreward.export.parts import NOTE, Part, compare, need_golden, new_folder, padded, parts_of
from moreward.nn.routers import PromptRouter
from moreward.scoring import Scorer
from moreward.systems._base import GatedSystem

KIND = "moreward-onnx"
GRAPH = "model.onnx"
FAMILIES = ("bert", "roberta", "deberta-v2", "modernbert")
"""Architectures, by `model_type`, whose graphs the tests compare with ours."""
OPSET = 18
TEXT = ("input_ids", "attention_mask")
PROMPT = ("prompt_input_ids", "prompt_attention_mask")
EXPERT = "expert"
MIXTURE_OUTPUTS = ("logits", "rewards", "experts", "weights", "gating_output")
ROUTED = -1
"""The value of the input `expert` (N) with which the router decides about a row; a number names its only expert."""


def export_onnx(scorer: Scorer, out: Path, *, evaluation: dict[str, Any] | None = None) -> list[Exported]:
    """Write `out/model.onnx` with the tokenizer beside it.

    Nothing is left behind unless onnxruntime, loading what was written, gives the golden rewards again, the experts'
    own included. ConfigError for decoders and for recipes and settings that have no graph, MissingExtraError without
    onnx, before anything is written; RunError where rewards differ.
    """
    _need_onnx()
    parts, router = _model_of(scorer)
    need_golden(scorer)
    with new_folder(out) as temporary:
        model = mixture_model(scorer, parts, router, prompt_end=-1)
        for one in model.models:
            one.set_attn_implementation("eager")  # type: ignore[operator]
        _write_graph(_Mixture(model) if router is not None else _Single(model), temporary / GRAPH)
        tokenizer = copy.deepcopy(scorer.encoder.tokenizer)
        tokenizer.model_max_length = scorer.encoder.max_length
        tokenizer.save_pretrained(temporary)
        pad_id = int(scorer.encoder.pad_id)
        write_json(temporary / NOTE, {**mixture_note(scorer, parts, KIND), "pad_token_id": pad_id})
        difference = _compare(temporary)
        write_card(temporary, scorer, KIND, "", evaluation)
        write_manifest(temporary, kind=KIND)
    return [Exported(out, "", difference, 0.0)]


def _need_onnx() -> None:
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        raise MissingExtraError("export --to onnx", "onnx") from None


def _model_of(scorer: Scorer) -> tuple[list[Part], PromptRouter | None]:
    """The experts, and the router of a mixture."""
    backbone = scorer.system.backbones()[0]
    if backbone.is_decoder or backbone.config.model_type not in FAMILIES:
        raise ConfigError(
            f"export: --to onnx writes encoders ({', '.join(FAMILIES)}); this run's backbone is a "
            f"{backbone.config.model_type}. Use --to hf for the mixture or --to merged for its experts."
        )
    if isinstance(scorer.system, GatedSystem):
        return mixture_of(scorer, "onnx")
    parts = parts_of(scorer.system)
    check_parts(parts)
    return parts, None


class _Single(nn.Module):
    """`logits` (N, 1) of a model without a router."""

    inputs, outputs = TEXT, ("logits",)

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_NT: Tensor, mask_NT: Tensor) -> Tensor:
        return self.model.judge(0, ids_NT, mask_NT).unsqueeze(1)  # type: ignore[no-any-return]


class _Mixture(nn.Module):
    """The forward of `MorewardForSequenceClassification` on padded tensors, as a trace can hold it."""

    inputs, outputs = (*TEXT, *PROMPT, EXPERT), MIXTURE_OUTPUTS

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids_NT: Tensor, mask_NT: Tensor, prompt_ids_NT: Tensor, prompt_mask_NT: Tensor, expert_N: Tensor
    ) -> tuple[Tensor, ...]:
        config = self.model.config
        logits_NE = self.model.route(prompt_ids_NT, prompt_mask_NT)
        kept_NK, experts_NK = logits_NE.topk(config.experts_per_prompt, dim=-1)
        alone_NK = torch.zeros_like(kept_NK)
        alone_NK[:, 0] = 1.0
        is_named_N1 = expert_N.unsqueeze(1) >= 0
        experts_NK = torch.where(is_named_N1, expert_N.unsqueeze(1), experts_NK)
        weights_NK = torch.where(is_named_N1, alone_NK, kept_NK.softmax(-1))
        rewards_NK = torch.zeros_like(weights_NK)
        none_1 = torch.zeros(1, dtype=torch.long)
        for e in range(len(config.experts)):
            rows_M, places_M = (experts_NK == e).nonzero(as_tuple=True)
            # Row 0 goes along, so that no expert is ever given nothing, which runtimes do not compute alike.
            with_first = torch.cat([rows_M, none_1])
            said_M = self.model.judge(e, ids_NT[with_first], mask_NT[with_first])[:-1]
            rewards_NK = rewards_NK.index_put((rows_M, places_M), said_M)
        return (rewards_NK * weights_NK).sum(1, keepdim=True), rewards_NK, experts_NK, weights_NK, logits_NE


@torch.no_grad()
def _write_graph(module: _Single | _Mixture, file: Path) -> None:
    """Traced on rows of several lengths."""
    mask_NT = torch.tensor([[1] * 12, [1] * 7 + [0] * 5, [1] * 9 + [0] * 3])
    ids_NT = (torch.arange(36).view(3, 12) % 7 + 1) * mask_NT
    short = (ids_NT[:, :6], mask_NT[:, :6])
    given = {**dict(zip(TEXT, (ids_NT, mask_NT), strict=True)), **dict(zip(PROMPT, short, strict=True))}
    given[EXPERT] = torch.full((len(ids_NT),), ROUTED)
    axes: dict[str, dict[int, str]] = {name: {0: "rows", 1: "tokens"} for name in TEXT if name in module.inputs}
    axes |= {name: {0: "rows", 1: "prompt_tokens"} for name in PROMPT if name in module.inputs}
    axes |= {name: {0: "rows"} for name in (EXPERT, *module.outputs)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: what is fixed by it is what the tests vary
        torch.onnx.export(
            module.eval(),
            tuple(given[name] for name in module.inputs),
            str(file),
            input_names=list(module.inputs),
            output_names=list(module.outputs),
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )


def _compare(folder: Path) -> float:
    told = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    texts, prompts = ([one[key] for one in told["golden"]] for key in ("ids", "prompt_ids"))
    rewards = opened_graph(folder)
    differences = [compare(rewards(texts, prompts), told, "onnxruntime")]
    for number, name in enumerate(told["experts"] if len(told["experts"]) > 1 else ()):
        wanted = [{"reward": one["experts"][name]} for one in told["golden"]]
        size = max(1.0, *(abs(one["reward"]) for one in wanted))
        alone = {**told, "expert": name, "golden": wanted, "tolerance": told["tolerance"] * size}
        differences.append(compare(rewards(texts, prompts, number), alone, "onnxruntime"))
    return max(differences)


def opened_graph(folder: Path) -> Callable[..., Tensor]:
    """Token ids, those of the prompts, and the number of an expert or `ROUTED`, to `reward_N`, as onnxruntime computes
    it. RunError for a file that it cannot read."""
    _need_onnx()
    import onnxruntime

    pad_id = int(json.loads((folder / NOTE).read_text(encoding="utf-8"))["pad_token_id"])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(folder / GRAPH), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes have no common parent but this
        raise RunError(f"{folder / GRAPH}: onnxruntime cannot load it: {error}") from error
    names = {one.name for one in session.get_inputs()}

    def rewards(texts: list[list[int]], prompts: list[list[int]], expert: int = ROUTED) -> Tensor:
        given = dict(zip((*TEXT, *PROMPT), (*padded(texts, pad_id), *padded(prompts, pad_id)), strict=True))
        fed = {name: value.numpy() for name, value in given.items() if name in names}
        if EXPERT in names:
            fed[EXPERT] = np.full(len(texts), expert, dtype=np.int64)
        return torch.from_numpy(session.run(["logits"], fed)[0])[:, 0]

    return rewards
