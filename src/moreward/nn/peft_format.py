"""One adapter of a bank as a PEFT directory. `moreward.adapters` has the way back.

Format: `adapter_config.json` and `adapter_model.safetensors` of peft 0.21. A layer that is new at load (a pooler that
the pretrained weights lack) would be lost by PEFT: it travels whole in `modules_to_save`, the adapter's product
merged in, and is taken apart again on reading. `origin.json`, which peft does not read, has the hashes of the base and
the tokenizer that it was trained with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moreward.nn.backbone import Backbone
from moreward.nn.experts import RewardHead, Standardize
from moreward.nn.lora import LoRABank, parameter_key

PREFIX = "base_model.model."
CONFIG, WEIGHTS, HEAD, CALIBRATION, ORIGIN = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "reward_head.safetensors",
    "calibration.json",
    "origin.json",
)


def write_adapter(
    folder: Path,
    backbone: Backbone,
    name: str,
    head: RewardHead,
    standardize: Standardize,
    base_name: str,
    origin: Mapping[str, str] | None = None,
) -> None:
    """Write adapter `name` with its head, so that plain PEFT gives the expert's standardised reward.

    A linear head on the architecture's own pooling (`last` for decoders) is a sequence classifier's: mean and unit are
    folded into it, but for decoders, whose classifiers have no bias, the constant lies in `calibration.json` as
    `offset`. Everything else has no `*ForSequenceClassification`: then the directory adapts the bare transformer and
    the head lies beside it. `origin` has `base_sha256` and `tokenizer_sha256`, where they are known.
    """
    bank = backbone.bank
    assert bank is not None
    folder.mkdir(parents=True)
    is_classifier = pools_as_classifier(backbone) and len(head.layers) == 1
    whole = _whole_modules(backbone) if is_classifier else []
    kept = [m for m in bank.shapes if not any(m == w or m.startswith(f"{w}.") for w in whole)]
    path = path_in_file(backbone, is_classifier)
    tensors: dict[str, Tensor] = {}
    for module in kept:
        for which in ("A", "B"):
            weight = getattr(bank.adapters[name], which)[parameter_key(module)]
            tensors[f"{PREFIX}{path}{module}.lora_{which}.weight"] = weight
    if is_classifier:
        for module in whole:
            tensors |= _merged_module(backbone, bank, name, module)
        weight, bias = folded(head, standardize)
        tensors[f"{PREFIX}{backbone.last_linear}.weight"] = weight
        if not backbone.is_decoder:
            tensors[f"{PREFIX}{backbone.last_linear}.bias"] = bias
        _write_json(folder / CALIBRATION, {"offset": float(bias) if backbone.is_decoder else 0.0})
    else:
        own = {**head.state_dict(), **{f"standardize.{k}": v for k, v in standardize.state_dict().items()}}
        _save(own, folder / HEAD)
    _save(tensors, folder / WEIGHTS)
    saved = sorted({*whole, backbone.last_linear.split(".")[0]}) if is_classifier else None
    if origin:
        _write_json(folder / ORIGIN, dict(origin))
    _write_json(folder / CONFIG, _config(backbone, [path + m for m in kept], saved, base_name))


def folded(head: RewardHead, standardize: Standardize) -> tuple[Tensor, Tensor]:
    """Weight and bias of the linear layer whose output is the standardised reward: w/s and (b - μ)/s."""
    last = head.last
    mean, std = standardize.mean, standardize.std
    weight = last.weight.detach().double() / std
    bias = (last.bias.detach().double() - mean) / std
    return weight.float(), bias.float()


def pools_as_classifier(backbone: Backbone) -> bool:
    return backbone.pooling == ("last" if backbone.is_decoder else "own")


def path_in_file(backbone: Backbone, is_classifier: bool) -> str:
    """What stands before our module names in the class that PEFT loads the adapter on."""
    if is_classifier and backbone.pooling != "own":
        return f"{backbone.base_prefix}."
    return ""


def _whole_modules(backbone: Backbone) -> list[str]:
    """Modules that PEFT must store whole: those new at load, and the head's where it has more layers."""
    new = {k.rpartition(".")[0] for k in backbone.model.state_dict() if k not in backbone.pretrained}
    top = backbone.last_linear.split(".")[0]
    if top != backbone.last_linear:
        new = {m for m in new if not m.startswith(f"{top}.")} | {top}
    return sorted(new)


def _merged_module(backbone: Backbone, bank: LoRABank, name: str, module: str) -> dict[str, Tensor]:
    tensors = {}
    for key, value in backbone.model.get_submodule(module).state_dict().items():
        full = f"{module}.{key}"
        layer, _, kind = full.rpartition(".")
        if kind == "weight" and layer in bank.shapes:
            value = value + bank.merged_delta(name, layer)
        tensors[PREFIX + full] = value
    return tensors


def _config(backbone: Backbone, targets: list[str], saved: list[str] | None, base_name: str) -> dict[str, Any]:
    bank = backbone.bank
    assert bank is not None
    return {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION" if saved is None else "SEQ_CLS",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": bank.rank,
        "lora_alpha": bank.alpha,
        "lora_dropout": bank.dropout.p,
        "target_modules": sorted(targets),
        "modules_to_save": saved,
        "fan_in_fan_out": backbone.writes_conv1d,
        "bias": "none",
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, path, metadata={"format": "pt"})
