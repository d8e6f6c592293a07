"""Each expert as a plain `*ForSequenceClassification` directory, which transformers loads by itself.

Adapters are merged into the weights, zero and unit into the head. N texts, T tokens, D hidden.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moreward.checkpoint import write_json, write_manifest
from moreward.errors import ConfigError
from moreward.export.card import write_card
from moreward.export.parts import NOTE, Part, compare, need_golden, new_folder, note, padded, parts_of
from moreward.nn.backbone import quiet
from moreward.nn.peft_format import folded, pools_as_classifier
from moreward.scoring import Scorer

KIND = "moreward-merged"
PAD = "<|moreward_pad|>"


@dataclass(frozen=True)
class Exported:
    """`difference` is the largest between golden rewards of this directory, reloaded by transformers, and our own.
    `offset` is what must be added to the logit: a decoder's classifier has no bias that could hold it."""

    folder: Path
    expert: str
    difference: float
    offset: float


def export_merged(scorer: Scorer, out: Path, *, evaluation: dict[str, Any] | None = None) -> list[Exported]:
    """Write a directory per expert, `out/NAME`; a single model is `out` itself.

    Nothing is left behind unless transformers, loading what was written, gives the golden rewards again. ConfigError
    for what the plain classes do not compute, before anything is written; RunError where rewards differ.
    """
    parts = parts_of(scorer.system)
    for part in parts:
        _check(part)
    need_golden(scorer)
    with new_folder(out) as temporary:
        alone = len(parts) == 1 and not parts[0].expert
        done = []
        for part in parts:
            name = "" if alone else part.name
            offset = _write(temporary / name, scorer, part)
            difference = _compare(temporary / name)
            write_card(temporary / name, scorer, KIND, part.expert, evaluation, offset)
            write_manifest(temporary / name, kind=KIND)
            done.append(Exported(out / name, part.expert, difference, offset))
    return done


def _check(part: Part) -> None:
    backbone, bank = part.backbone, part.backbone.bank
    if not pools_as_classifier(backbone):
        raise ConfigError(
            f"export: pooling {backbone.pooling!r} is computed by no plain classifier; a merged export needs "
            f"pooling={'last' if backbone.is_decoder else 'own'} when the run is trained."
        )
    if len(part.head.layers) > 1:
        raise ConfigError("export: the head is an mlp; a plain classifier has one linear layer. Train with head=linear")
    if bank is not None and bank.active_tokens is not None:
        raise ConfigError("export: adapters that act on the last tokens only (active_tokens) cannot be merged")


def _write(folder: Path, scorer: Scorer, part: Part) -> float:
    """Returns the offset."""
    folder.mkdir(exist_ok=True)
    tokenizer = copy.deepcopy(scorer.encoder.tokenizer)
    model, offset = merged_model(part)
    _set_pad(tokenizer, model)
    # The model was trained without token types, and pipelines would pass them.
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.model_max_length = scorer.encoder.max_length
    tokenizer.save_pretrained(folder)
    with quiet():
        model.save_pretrained(folder)
    write_json(folder / NOTE, note(scorer, part, KIND, offset))
    return offset


@torch.no_grad()
def merged_model(part: Part) -> tuple[Any, float]:
    """The plain model of an expert, and what must be added to its logit to give the standardised reward."""
    from transformers import AutoModelForSequenceClassification

    backbone = part.backbone
    config = copy.deepcopy(backbone.config)
    config.num_labels = 1
    config.id2label, config.label2id = {0: "REWARD"}, {"REWARD": 0}
    config.problem_type = "regression"
    config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
    config.dtype = "float32"
    weight_1D, bias_1 = folded(part.head, part.standardize)
    prefix = "" if backbone.pooling == "own" else f"{backbone.base_prefix}."
    tensors = {f"{prefix}{key}": value for key, value in _merged_tensors(part).items()}
    tensors[f"{backbone.last_linear}.weight"] = weight_1D
    if not backbone.is_decoder:
        tensors[f"{backbone.last_linear}.bias"] = bias_1
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
    model.load_state_dict({key: value.detach().cpu() for key, value in tensors.items()})
    _forget_token_types(model)
    return model.eval(), float(bias_1) if backbone.is_decoder else 0.0


def _merged_tensors(part: Part) -> dict[str, Tensor]:
    """The transformer's tensors with the adapter's products added."""
    from transformers.pytorch_utils import Conv1D

    backbone, bank = part.backbone, part.backbone.bank
    tensors = dict(backbone.model.state_dict())
    if bank is not None and part.adapter is not None:
        for module in bank.shapes:
            key, delta = f"{module}.weight", bank.merged_delta(part.adapter, module)
            is_transposed = isinstance(backbone.model.get_submodule(module), Conv1D)
            tensors[key] = tensors[key] + (delta.T if is_transposed else delta)
    return tensors


def _forget_token_types(model: nn.Module) -> None:
    """Give every token type the embedding of type 0, the only one that training saw: engines that pass types for the
    second text of a pair then compute the same reward."""
    for name, module in model.named_modules():
        if name.endswith("token_type_embeddings") and isinstance(module, nn.Embedding):
            module.weight.copy_(module.weight[:1].expand_as(module.weight))


def _set_pad(tokenizer: Any, model: Any) -> None:
    """A pad token that ends no text: where it is the end token, plain decoders read the reward one token early."""
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"pad_token": PAD})
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        with torch.random.fork_rng(devices=[]):
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def _compare(folder: Path) -> float:
    """The largest difference of golden rewards, in a batch as others make them: padded, with the pad token. RunError
    beyond rounding."""
    told = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    return compare(plain_rewards(folder, [one["ids"] for one in told["golden"]]), told, "transformers")


def plain_rewards(folder: Path, texts: list[list[int]]) -> Tensor:
    """`reward_N`: the logits that transformers gives to token ids, loaded anew from `folder`."""
    return opened(folder)(texts)


def opened(folder: Path) -> Callable[[list[list[int]]], Tensor]:
    """Token ids to `reward_N`, as transformers computes it: in one batch, padded with the pad token."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False
        ).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    @torch.no_grad()
    def rewards(texts: list[list[int]]) -> Tensor:
        ids_NT, mask_NT = padded(texts, tokenizer.pad_token_id)
        return model(input_ids=ids_NT, attention_mask=mask_NT).logits[:, 0]  # type: ignore[no-any-return]

    return rewards
