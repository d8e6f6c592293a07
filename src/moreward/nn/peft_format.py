"""One adapter of a bank as a PEFT directory, and back.

Format: `adapter_config.json` and `adapter_model.safetensors` of peft 0.21. A layer that is new at load (a pooler that
the pretrained weights lack) would be lost by PEFT: it travels whole in `modules_to_save`, the adapter's product
merged in, and is taken apart again on reading.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moreward.errors import RunError
from moreward.nn.backbone import Backbone
from moreward.nn.experts import RewardHead, Standardize
from moreward.nn.lora import LoRABank, parameter_key

PREFIX = "base_model.model."
CONFIG, WEIGHTS, HEAD, CALIBRATION = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "reward_head.safetensors",
    "calibration.json",
)


def write_adapter(
    folder: Path, backbone: Backbone, name: str, head: RewardHead, standardize: Standardize, base_name: str
) -> None:
    """Write adapter `name` with its head, so that plain PEFT gives the expert's standardised reward.

    A linear head on the architecture's own pooling (`last` for decoders) is a sequence classifier's: mean and unit are
    folded into it, but for decoders, whose classifiers have no bias, the constant lies in `calibration.json` as
    `offset`. Everything else has no `*ForSequenceClassification`: then the directory adapts the bare transformer and
    the head lies beside it.
    """
    bank = backbone.bank
    assert bank is not None
    folder.mkdir(parents=True)
    is_classifier = pools_as_classifier(backbone) and len(head.layers) == 1
    whole = _whole_modules(backbone) if is_classifier else []
    kept = [m for m in bank.shapes if not any(m == w or m.startswith(f"{w}.") for w in whole)]
    path = _path_in_file(backbone, is_classifier)
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
    _write_json(folder / CONFIG, _config(backbone, [path + m for m in kept], saved, base_name))


def folded(head: RewardHead, standardize: Standardize) -> tuple[Tensor, Tensor]:
    """Weight and bias of the linear layer whose output is the standardised reward: w/s and (b - μ)/s."""
    last = head.last
    mean, std = standardize.mean, standardize.std
    weight = last.weight.detach().double() / std
    bias = (last.bias.detach().double() - mean) / std
    return weight.float(), bias.float()


def read_adapter(folder: Path, backbone: Backbone, name: str) -> RewardHead:
    """Add the adapter in `folder` to the backbone's bank as `name` and return its head. RunError says what does not
    fit: another rank or scale, tensors of another model, a head that is missing."""
    from safetensors.torch import load_file

    bank = backbone.bank
    assert bank is not None
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if (config["r"], float(config["lora_alpha"])) != (bank.rank, float(bank.alpha)):
        raise RunError(
            f"{folder}: rank {config['r']} and alpha {config['lora_alpha']}, the bank has {bank.rank} and {bank.alpha}"
        )
    is_classifier = config["task_type"] == "SEQ_CLS"
    if is_classifier and not pools_as_classifier(backbone):
        raise RunError(f"{folder}: a sequence classifier, but the backbone's pooling is {backbone.pooling!r}")
    path = _path_in_file(backbone, is_classifier)
    tensors = {k.removeprefix(PREFIX): v for k, v in load_file(folder / WEIGHTS).items()}
    head = RewardHead(backbone.hidden_size, "linear")
    with torch.no_grad():
        if is_classifier:
            _read_head(folder, head, backbone, tensors)
        pairs = {module: _read_pair(folder, backbone, tensors, path, module) for module in bank.shapes}
    left = [k for k in tensors if not _is_unchanged(backbone, k.removeprefix(path), tensors[k])]
    if left:
        raise RunError(
            f"{folder}: tensors that this backbone and bank have no place for: {', '.join(sorted(left)[:5])}"
        )
    head = head if is_classifier else _beside(folder, head, backbone)
    adapter = bank.add(name)
    with torch.no_grad():
        for module, (A_RI, B_OR) in pairs.items():
            adapter.A[parameter_key(module)].copy_(A_RI)
            adapter.B[parameter_key(module)].copy_(B_OR)
    return head


def _read_pair(
    folder: Path, backbone: Backbone, tensors: dict[str, Tensor], path: str, module: str
) -> tuple[Tensor, Tensor]:
    """Take A and B of a layer out of `tensors`; zeros where the adapter leaves the layer alone."""
    bank = backbone.bank
    assert bank is not None
    A_RI, B_OR = (tensors.pop(f"{path}{module}.lora_{which}.weight", None) for which in ("A", "B"))
    if A_RI is None and B_OR is None:
        return _taken_apart(folder, backbone, bank, tensors.pop(f"{path}{module}.weight", None), module)
    num_in, num_out = bank.shapes[module]
    if A_RI is None or B_OR is None or (A_RI.shape, B_OR.shape) != ((bank.rank, num_in), (num_out, bank.rank)):
        raise RunError(f"{folder}: layer {module!r} needs A of {bank.rank}×{num_in} and B of {num_out}×{bank.rank}")
    return A_RI, B_OR


def _read_head(folder: Path, head: RewardHead, backbone: Backbone, tensors: dict[str, Tensor]) -> None:
    weight = tensors.pop(f"{backbone.last_linear}.weight", None)
    if weight is None:
        raise RunError(f"{folder}: the reward head {backbone.last_linear!r} is missing")
    last = head.last
    last.weight.copy_(weight)
    calibration = folder / CALIBRATION
    offset = json.loads(calibration.read_text(encoding="utf-8"))["offset"] if calibration.exists() else 0.0
    last.bias.copy_(tensors.pop(f"{backbone.last_linear}.bias", torch.zeros(1)) + offset)


def _beside(folder: Path, head: RewardHead, backbone: Backbone) -> RewardHead:
    from safetensors.torch import load_file

    if not (folder / HEAD).is_file():
        raise RunError(f"{folder}: the reward head is missing: no {HEAD}")
    stored = load_file(folder / HEAD)
    if len({k.split(".")[1] for k in stored if k.startswith("layers.")}) > 1:
        head = RewardHead(backbone.hidden_size, "mlp")
    standardize = Standardize()
    standardize.load_state_dict({k.split(".")[1]: stored.pop(k) for k in list(stored) if k.startswith("standardize.")})
    head.load_state_dict(stored)
    weight, bias = folded(head, standardize)
    with torch.no_grad():
        head.last.weight.copy_(weight)
        head.last.bias.copy_(bias)
    return head


def _taken_apart(
    folder: Path, backbone: Backbone, bank: LoRABank, whole: Tensor | None, module: str
) -> tuple[Tensor, Tensor]:
    """A and B of a layer that travelled merged: its difference from the backbone's, which has the adapter's rank."""
    num_in, num_out = bank.shapes[module]
    if whole is None:
        return torch.zeros(bank.rank, num_in), torch.zeros(num_out, bank.rank)
    delta = (whole - backbone.model.get_submodule(module).weight).double() / bank.scale  # type: ignore[operator]
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    if len(S) > bank.rank and S[bank.rank] > 1e-4 * S[0].clamp(min=1e-12) and S[0] * bank.scale > 1e-5:
        raise RunError(f"{folder}: layer {module!r} was replaced by one that is not a rank {bank.rank} change of ours")
    root = S[: bank.rank].sqrt()
    A_RI, B_OR = root.unsqueeze(1) * Vh[: bank.rank], U[:, : bank.rank] * root
    missing = bank.rank - len(root)
    return nn.functional.pad(A_RI, (0, 0, 0, missing)), nn.functional.pad(B_OR, (0, missing))


def _is_unchanged(backbone: Backbone, name: str, value: Tensor) -> bool:
    own = backbone.model.state_dict().get(name)
    return own is not None and torch.equal(own, value)


def pools_as_classifier(backbone: Backbone) -> bool:
    return backbone.pooling == ("last" if backbone.is_decoder else "own")


def _path_in_file(backbone: Backbone, is_classifier: bool) -> str:
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
