"""Each expert as a PEFT `SEQ_CLS` adapter, which plain PEFT puts onto the stock pretrained weights.

N texts, T tokens.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moreward.checkpoint import write_json, write_manifest
from moreward.data.batches import tokenizer_sha256
from moreward.errors import ConfigError, MissingExtraError
from moreward.export.card import write_card
from moreward.export.merged import Exported
from moreward.export.parts import NOTE, Part, compare, need_golden, new_folder, note, padded, parts_of
from moreward.nn.backbone import quiet, resolve_backbone
from moreward.nn.peft_format import CALIBRATION, pools_as_classifier, write_adapter
from moreward.scoring import Scorer

KIND = "moreward-peft"


def export_peft(scorer: Scorer, out: Path, *, evaluation: dict[str, Any] | None = None) -> list[Exported]:
    """Write an adapter directory per expert, `out/NAME`; a single model's is `out` itself.

    Nothing is left behind unless peft, loading what was written onto the pretrained weights, gives the golden rewards
    again. ConfigError for what PEFT's classes do not compute and MissingExtraError without peft, before anything is
    written; RunError where rewards differ.
    """
    _need_peft()
    parts = parts_of(scorer.system)
    for part in parts:
        _check(part)
    need_golden(scorer)
    alone = len(parts) == 1 and not parts[0].expert
    done = []
    with new_folder(out) as temporary:
        for part in parts:
            name = "" if alone else part.name
            folder = temporary / name
            offset = _write(folder, out / name, scorer, part)
            difference = _compare(folder, part)
            write_card(folder, scorer, KIND, part.expert, evaluation, offset)
            write_manifest(folder, kind=KIND)
            done.append(Exported(out / name, part.expert, difference, offset))
    return done


def _need_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError:
        raise MissingExtraError("export --to peft", "peft") from None


def _check(part: Part) -> None:
    backbone, bank = part.backbone, part.backbone.bank
    if bank is None or part.adapter is None:
        raise ConfigError(
            "export: this run's experts are no adapters (tune=full or frozen), so there is nothing for PEFT. "
            "Use --to merged or --to hf, or train arliss or base_lora with tune=lora."
        )
    if not pools_as_classifier(backbone):
        raise ConfigError(
            f"export: pooling {backbone.pooling!r} is computed by no plain classifier; --to peft needs "
            f"pooling={'last' if backbone.is_decoder else 'own'} when the run is trained."
        )
    if len(part.head.layers) > 1:
        raise ConfigError("export: the head is an mlp; a plain classifier has one linear layer. Train with head=linear")
    if bank.active_tokens is not None:
        raise ConfigError("export: PEFT's adapters act on every token, not on the last ones only (active_tokens)")


def _write(folder: Path, final: Path, scorer: Scorer, part: Part) -> float:
    """Returns the offset. `final` is the name that the folder gets: the path to the base is seen from there."""
    assert part.adapter is not None
    name = resolve_backbone(part.backbone.name)
    base = os.path.relpath(Path(name).resolve(), final.resolve()) if Path(name).is_dir() else name
    if folder.is_dir():  # the only expert of a run has the whole folder, which is there already
        folder.rmdir()
    origin = {
        "base_sha256": scorer.card["backbone"]["sha256"],
        "tokenizer_sha256": tokenizer_sha256(scorer.encoder.tokenizer),
    }
    write_adapter(folder, part.backbone, part.adapter, part.head, part.standardize, base, origin)
    offset = float(json.loads((folder / CALIBRATION).read_text(encoding="utf-8"))["offset"])
    told = note(scorer, part, KIND, offset)
    told["base"] = {"name": base, "sha256": scorer.card["backbone"]["sha256"]}
    tokenizer = copy.deepcopy(scorer.encoder.tokenizer)
    if part.backbone.is_decoder:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(_safe_pad(tokenizer, told["golden"]))
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.model_max_length = scorer.encoder.max_length
    tokenizer.save_pretrained(folder)
    write_json(folder / NOTE, told)
    return offset


def _safe_pad(tokenizer: Any, golden: list[dict[str, Any]]) -> int:
    """A token that the base has an embedding of and that ends no text: a decoder's classifier reads the last token
    that is another one than the pad token."""
    endings = {tokenizer.eos_token_id, *(one["ids"][-1] for one in golden)}
    wanted = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id]
    usual = [token for token in wanted if token is not None and token not in endings]
    return int(next(iter([*usual, *(token for token in range(len(tokenizer)) if token not in endings)])))


def _compare(folder: Path, part: Part) -> float:
    told = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    return compare(adapted_rewards(folder, part.backbone.name, [one["ids"] for one in told["golden"]]), told, "peft")


def adapted_rewards(folder: Path, base: str, texts: list[list[int]]) -> Tensor:
    """`reward_N`: the logits that peft gives to token ids, the adapter in `folder` put onto `base` as it is."""
    return opened_adapter(folder, base)(texts)


def opened_adapter(folder: Path, base: str) -> Callable[[list[list[int]]], Tensor]:
    """Token ids to `reward_N`, as peft computes it."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with quiet(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that will go
        model = AutoModelForSequenceClassification.from_pretrained(
            resolve_backbone(base), num_labels=1, use_safetensors=True, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        adapted = PeftModel.from_pretrained(model, str(folder)).eval()

    @torch.no_grad()
    def rewards(texts: list[list[int]]) -> Tensor:
        ids_NT, mask_NT = padded(texts, tokenizer.pad_token_id)
        return adapted(input_ids=ids_NT, attention_mask=mask_NT).logits[:, 0]  # type: ignore[no-any-return]

    return rewards
