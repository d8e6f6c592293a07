"""PEFT directories as adapters of a bank: everything that does not fit is said at once, and then nothing is read.

R rank, I in, O out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from moreward.checkpoint import MANIFEST, PICKLE_ENDINGS, verify_folder
from moreward.data.batches import tokenizer_sha256
from moreward.errors import BackboneError, RunError
from moreward.nn.backbone import TOKENIZER_FILES, Backbone, directory_sha256, linear_names, load_tokenizer
from moreward.nn.experts import RewardHead, Standardize
from moreward.nn.lora import LoRABank, parameter_key
from moreward.nn.peft_format import (
    CALIBRATION,
    CONFIG,
    HEAD,
    ORIGIN,
    PREFIX,
    WEIGHTS,
    folded,
    path_in_file,
    pools_as_classifier,
)

MOST_NAMED = 5
"""Layers or tensors that a fault names; of others it says how many there are."""
TASKS = ("SEQ_CLS", "FEATURE_EXTRACTION")
UNKNOWN_TO_THE_BANK: Mapping[str, Any] = {
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "trainable_token_indices": None,
    "target_parameters": None,
    "layer_replication": None,
    "use_qalora": False,
}
"""Settings of peft that change what is computed, with the value at which they do not."""
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq")
"""Starts of an adapter that also move the weights under it."""

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Base:
    """What adapters of a run must have been trained on. A hash that is empty is not known and not compared."""

    name: str
    sha256: str
    tokenizer_sha256: str = ""


def base_of(backbone: Backbone) -> Base:
    """The backbone's name and hashes as they are on disk now."""
    try:
        tokenizer = tokenizer_sha256(load_tokenizer(backbone.name)) if backbone.name else ""
    except BackboneError:
        tokenizer = ""
    return Base(backbone.name, directory_sha256(backbone.name) if backbone.name else "", tokenizer)


@dataclass(frozen=True)
class Adapters:
    """`heads` of the adapters that are in the bank now, by name; `refused` has all faults of each of the others."""

    heads: Mapping[str, RewardHead] = field(default_factory=dict)
    refused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def read_adapters(folder: Path, backbone: Backbone, base: Base | None = None) -> Adapters:
    """Add every adapter directory in `folder` to the bank under its own name. One that does not fit is left out with
    all its faults told, and keeps none of the others from being read. RunError where `folder` is no directory."""
    if not folder.is_dir():
        raise RunError(f"{folder}: there is no such directory")
    base = base or base_of(backbone)
    heads: dict[str, RewardHead] = {}
    refused: dict[str, tuple[str, ...]] = {}
    for one in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        faults = name_faults(one)
        if not faults:
            found = _Reading(one, backbone, base).read()
            faults = found.faults
        if faults:
            refused[one.name] = tuple(faults)
        else:
            heads[one.name] = _put(found, backbone, one.name)
    return Adapters(heads, refused)


def name_faults(folder: Path) -> list[str]:
    """What keeps the name of a directory from being an expert's, or the directory from being where it seems."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", folder.name) or folder.name in dir(nn.ModuleDict()):
        return [f"{folder}: cannot be an expert's name; give it lower case letters, digits, '-' and '_'"]
    outside = [path for path in (folder, *folder.rglob("*")) if not _is_inside(path, folder.parent)]
    return [f"{path}: leads out of {folder.parent}; copy the file itself there" for path in outside]


def _is_inside(path: Path, root: Path) -> bool:
    return path.resolve().is_relative_to(root.resolve())


def read_adapter(folder: Path, backbone: Backbone, name: str, base: Base | None = None) -> RewardHead:
    """Add the adapter in `folder` to the backbone's bank as `name` and return its head.

    RunError with all that does not fit, one fault a line, each beginning with the file: another base, tokenizer, rank
    or scale; layers that are declared and missing, or there and not declared; values that are not finite; a head that
    is missing or has several labels; damaged files, and kinds of files that can run code, which are never opened.
    """
    found = _Reading(folder, backbone, base or base_of(backbone)).read()
    if found.faults:
        raise RunError("\n".join(found.faults))
    return _put(found, backbone, name)


def _put(found: _Reading, backbone: Backbone, name: str) -> RewardHead:
    assert backbone.bank is not None
    adapter = backbone.bank.add(name)
    with torch.no_grad():
        for module, (A_RI, B_OR) in found.pairs.items():
            adapter.A[parameter_key(module)].copy_(A_RI)
            adapter.B[parameter_key(module)].copy_(B_OR)
    return found.head


class _Reading:
    """An adapter directory while it is read: what was found in it, and what is wrong."""

    bank: LoRABank

    def __init__(self, folder: Path, backbone: Backbone, base: Base) -> None:
        assert backbone.bank is not None
        self.folder, self.backbone, self.base = folder, backbone, base
        self.bank = backbone.bank
        self.faults: list[str] = []
        self.pairs: dict[str, Pair] = {}
        self.head = RewardHead(backbone.hidden_size, "linear")

    def fault(self, file: str, what: str) -> None:
        self.faults.append(f"{self.folder / file}: {what}")

    @torch.no_grad()
    def read(self) -> _Reading:
        self._check_files()
        config = self._json(CONFIG)
        if config is not None:
            self._check_config(config)
            self._check_origin(config)
        tensors = self._tensors(WEIGHTS)
        if config is None or tensors is None:
            return self
        task = config.get("task_type")
        is_classifier = task == "SEQ_CLS" or (task not in TASKS and not (self.folder / HEAD).exists())
        if is_classifier and not pools_as_classifier(self.backbone):
            self.fault(CONFIG, f"a sequence classifier, but the backbone's pooling is {self.backbone.pooling!r}")
        tensors = {k.removeprefix(PREFIX): v for k, v in tensors.items()}
        if is_classifier:
            self._read_head(tensors)
        else:
            self._read_head_beside()
        path = path_in_file(self.backbone, is_classifier)
        self._read_pairs(config, tensors, path)
        left = [k for k, value in tensors.items() if not self._is_unchanged(k.removeprefix(path), value)]
        if left:
            self.fault(WEIGHTS, f"tensors that this backbone and bank have no place for: {_some(left)}")
        return self

    def _check_files(self) -> None:
        if (self.folder / MANIFEST).is_file():
            self.faults += [f"{self.folder}: {fault}" for fault in verify_folder(self.folder)]
            return
        for path in sorted(self.folder.rglob("*")):
            if path.name.endswith(PICKLE_ENDINGS):
                self.fault(
                    path.relative_to(self.folder).as_posix(),
                    "refused, files of this kind can run code when loaded. Convert it to safetensors",
                )

    def _json(self, file: str) -> dict[str, Any] | None:
        path = self.folder / file
        if not path.is_file():
            self.fault(file, "missing")
            return None
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            self.fault(file, f"cannot be read as JSON ({error})")
            return None
        if not isinstance(value, dict):
            self.fault(file, "is no JSON object")
            return None
        return value

    def _tensors(self, file: str) -> dict[str, Tensor] | None:
        """All of a file, checked to be finite."""
        from safetensors.torch import load_file

        path = self.folder / file
        if not path.is_file():
            self.fault(file, "missing")
            return None
        try:
            tensors = load_file(path)
        except (OSError, ValueError, SafetensorError) as error:
            self.fault(
                file, f"cannot be read as safetensors, {path.stat().st_size} bytes; is it cut or damaged? ({error})"
            )
            return None
        bad = [k for k, v in tensors.items() if v.is_floating_point() and not bool(v.isfinite().all())]
        if bad:
            self.fault(file, f"NaN or Inf in {_some(bad)}")
        return dict(tensors)

    def _check_config(self, config: Mapping[str, Any]) -> None:
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if (rank, alpha) != (self.bank.rank, self.bank.alpha):
            self.fault(CONFIG, f"rank {rank} and alpha {alpha}, the bank has {self.bank.rank} and {self.bank.alpha}")
        if config.get("peft_type") != "LORA":
            self.fault(CONFIG, f"peft_type {config.get('peft_type')!r}; only 'LORA' is an adapter of a bank")
        if config.get("task_type") not in TASKS:
            self.fault(
                CONFIG,
                f"task_type {config.get('task_type')!r}; a reward needs 'SEQ_CLS', or 'FEATURE_EXTRACTION' with {HEAD}",
            )
        for key, harmless in UNKNOWN_TO_THE_BANK.items():
            if (config.get(key) or harmless) != harmless:
                self.fault(CONFIG, f"{key} {config[key]!r} changes what is computed and is not supported here")
        start = str(config.get("init_lora_weights"))
        if start.startswith(CHANGES_THE_BASE):
            self.fault(CONFIG, f"init_lora_weights {start!r} moves the weights of the base; convert it to plain LoRA")
        if bool(config.get("fan_in_fan_out")) != self.backbone.writes_conv1d:
            self.fault(
                CONFIG,
                f"fan_in_fan_out {config.get('fan_in_fan_out')!r}; this backbone needs {self.backbone.writes_conv1d}",
            )

    def _check_origin(self, config: Mapping[str, Any]) -> None:
        """The base by its name, and by hash together with the tokenizer's where the directory tells them."""
        origin = self._json(ORIGIN) if (self.folder / ORIGIN).exists() else None
        told = origin or {}
        for key, ours, what in (
            ("base_sha256", self.base.sha256, "base"),
            ("tokenizer_sha256", self.base.tokenizer_sha256, "tokenizer"),
        ):
            theirs = told.get(key)
            if theirs and ours and theirs != ours:
                self.fault(
                    ORIGIN, f"{key} {str(theirs)[:12]}…: trained with another {what} than this run's {ours[:12]}…"
                )
        if any(any(self.folder.glob(file)) for file in TOKENIZER_FILES) and self.base.tokenizer_sha256:
            self._check_tokenizer()
        name = config.get("base_model_name_or_path")
        if self.base.name and not self._is_our_base(name, told.get("base_sha256")):
            self.fault(CONFIG, f"base_model_name_or_path {name!r} is not this run's backbone {self.base.name!r}")

    def _check_tokenizer(self) -> None:
        """The tokenizer that lies in the directory."""
        try:
            theirs = tokenizer_sha256(load_tokenizer(str(self.folder)))
        except BackboneError as error:
            self.fault("tokenizer.json", str(error))
            return
        if theirs != self.base.tokenizer_sha256:
            self.fault(
                "tokenizer.json",
                f"is another tokenizer (SHA-256 of its vocabulary {theirs[:12]}…) than this run's "
                f"({self.base.tokenizer_sha256[:12]}…)",
            )

    def _is_our_base(self, name: Any, sha256: Any) -> bool:
        if not isinstance(name, str) or not name:
            return False
        if name == self.base.name:
            return True
        place = self.folder / name
        if place.is_dir():
            return bool(self.base.sha256) and directory_sha256(str(place)) == self.base.sha256
        # A path does not hold where the adapter was moved; then the directory's own name and the hash must do.
        is_path = name.startswith(("/", "."))
        same_end = Path(name).name == Path(self.base.name).name
        return is_path and same_end and bool(self.base.sha256) and sha256 == self.base.sha256

    def _read_head(self, tensors: dict[str, Tensor]) -> None:
        last, layer = self.head.last, self.backbone.last_linear
        weight = tensors.pop(f"{layer}.weight", None)
        bias = tensors.pop(f"{layer}.bias", torch.zeros(1))
        offset = self._offset()
        if weight is None:
            self.fault(WEIGHTS, f"the reward head {layer!r} is missing")
        elif weight.shape != last.weight.shape or bias.shape != last.bias.shape:
            self.fault(
                WEIGHTS,
                f"the head {layer!r} has {_size(weight, 0)} labels of width {_size(weight, 1)} and {_size(bias, 0)} "
                f"biases; a reward is one label of width {self.backbone.hidden_size}",
            )
        else:
            last.weight.copy_(weight)
            last.bias.copy_(bias + offset)

    def _offset(self) -> float:
        told = self._json(CALIBRATION) if (self.folder / CALIBRATION).exists() else {"offset": 0.0}
        if told is None:
            return 0.0
        offset = told.get("offset")
        if not isinstance(offset, int | float) or isinstance(offset, bool) or not math.isfinite(offset):
            self.fault(CALIBRATION, f"offset {offset!r} is no finite number")
            return 0.0
        return float(offset)

    def _read_head_beside(self) -> None:
        if not (self.folder / HEAD).is_file():
            self.fault(HEAD, "the reward head is missing")
            return
        stored = self._tensors(HEAD)
        if stored is None:
            return
        kind = "mlp" if len({k.split(".")[1] for k in stored if k.startswith("layers.")}) > 1 else "linear"
        head, standardize = RewardHead(self.backbone.hidden_size, kind), Standardize()
        own = {k.removeprefix("standardize."): stored.pop(k) for k in list(stored) if k.startswith("standardize.")}
        try:
            standardize.load_state_dict(own)
            head.load_state_dict(stored)
        except RuntimeError as error:
            self.fault(HEAD, f"is no head of width {self.backbone.hidden_size} with one label: {error}")
            return
        if not float(standardize.std) > 0:
            self.fault(HEAD, f"standardize.std is {float(standardize.std)}; a unit is more than nothing")
            return
        weight, bias = folded(head, standardize)
        head.last.weight.copy_(weight)
        head.last.bias.copy_(bias)
        self.head = head

    def _read_pairs(self, config: Mapping[str, Any], tensors: dict[str, Tensor], path: str) -> None:
        """A and B of every layer of the bank, taken out of `tensors`; zeros where the adapter leaves a layer alone."""
        saved = self._names(config, "modules_to_save")
        whole = [m for m in self.bank.shapes if _is_saved(path + m, saved)]
        declared = self._declared(config, path) - set(whole)
        empty, undeclared, misshapen = [], [], []
        for module in (*self.bank.shapes, *sorted(declared - set(self.bank.shapes))):
            names = [f"{path}{module}.lora_{which}.weight" for which in ("A", "B")]
            A_RI, B_OR = (tensors.pop(name, None) for name in names)
            num_in, num_out = self.bank.shapes.get(module, (0, 0))
            if module in whole and A_RI is None and B_OR is None:
                self.pairs[module] = self._taken_apart(tensors.pop(f"{path}{module}.weight", None), module)
            elif A_RI is None and B_OR is None:
                self.pairs[module] = torch.zeros(self.bank.rank, num_in), torch.zeros(num_out, self.bank.rank)
                empty += [module] if module in declared else []
            elif module not in declared:
                undeclared.append(module)
            elif module in self.bank.shapes:
                wanted = (self.bank.rank, num_in), (num_out, self.bank.rank)
                fits = A_RI is not None and B_OR is not None and (A_RI.shape, B_OR.shape) == wanted
                if fits:
                    self.pairs[module] = A_RI, B_OR  # type: ignore[assignment]
                else:
                    misshapen.append(module)
        if misshapen:
            num_in, num_out = self.bank.shapes[misshapen[0]]
            more = f" (and {len(misshapen) - 1} more)" if len(misshapen) > 1 else ""
            rank = self.bank.rank
            self.fault(WEIGHTS, f"layer {misshapen[0]!r} needs A of {rank}×{num_in} and B of {num_out}×{rank}{more}")
        if empty:
            self.fault(
                WEIGHTS, f"target_modules and layers_to_transform declare layers without weights: {_some(empty)}"
            )
        if undeclared:
            self.fault(CONFIG, f"target_modules leave out layers that have weights: {_some(undeclared)}")
        beyond = declared - set(self.bank.shapes)
        if beyond:
            self.fault(CONFIG, f"target_modules name layers that this run's adapters leave alone: {_some(beyond)}")

    def _declared(self, config: Mapping[str, Any], path: str) -> set[str]:
        """The layers that peft would put this adapter on, by our names."""
        names, told = linear_names(self.backbone.model), config.get("target_modules")
        if not told:
            self.fault(CONFIG, f"target_modules {told!r}: a list of names or a pattern is needed")
            return set()
        found: set[str] = set()
        unknown = []
        for target in self._names(config, "target_modules"):
            hits = {n for n in names if self._matches(path + n, target, is_pattern=isinstance(told, str))}
            found |= hits
            if not hits and target != self.backbone.last_linear:
                unknown.append(target)
        if unknown:
            ends = sorted({n.rsplit(".", 1)[-1] for n in names})
            self.fault(
                CONFIG,
                f"target_modules {_some(unknown)}: no such linear layer in the base, which has {', '.join(ends)}",
            )
        is_pattern = isinstance(config.get("exclude_modules"), str)
        for one in self._names(config, "exclude_modules"):
            found -= {n for n in found if self._matches(path + n, one, is_pattern=is_pattern)}
        layers = config.get("layers_to_transform")
        if layers is None:
            return found
        wanted = layers if isinstance(layers, list) else [layers]
        if not all(type(one) is int for one in wanted):
            self.fault(CONFIG, f"layers_to_transform {layers!r}: a number or a list of numbers is needed")
        return {n for n in found if (match := re.search(r"\.(\d+)\.", f".{n}")) and int(match[1]) in wanted}

    def _names(self, config: Mapping[str, Any], key: str) -> list[str]:
        """A setting that is a name, a pattern or a list of names; empty where it is not set."""
        value = config.get(key)
        each = [value] if isinstance(value, str) else value or []
        if not isinstance(each, list) or not all(isinstance(one, str) for one in each):
            self.fault(CONFIG, f"{key} {value!r}: a list of names is needed")
            return []
        return each

    def _matches(self, name: str, target: str, *, is_pattern: bool) -> bool:
        if target == "all-linear":
            return True
        if not is_pattern:
            return name == target or name.endswith(f".{target}")
        try:
            return re.fullmatch(target, name) is not None
        except re.error:  # matches nothing, which is told
            return False

    def _taken_apart(self, whole: Tensor | None, module: str) -> Pair:
        """A and B of a layer that travelled merged: its difference from ours, which has the adapter's rank."""
        num_in, num_out = self.bank.shapes[module]
        rank, scale = self.bank.rank, self.bank.scale
        nothing = torch.zeros(rank, num_in), torch.zeros(num_out, rank)
        if whole is None:
            self.fault(WEIGHTS, f"modules_to_save declares layer {module!r}, which has no weights")
            return nothing
        own: Tensor = self.backbone.model.get_submodule(module).weight  # type: ignore[assignment]
        if whole.shape != own.shape:
            self.fault(WEIGHTS, f"layer {module!r} has shape {tuple(whole.shape)}, not {tuple(own.shape)}")
            return nothing
        if not bool(whole.isfinite().all()):  # told already
            return nothing
        U, S, Vh = torch.linalg.svd((whole - own).double() / scale, full_matrices=False)
        if len(S) > rank and S[rank] > 1e-4 * S[0].clamp(min=1e-12) and S[0] * scale > 1e-5:
            self.fault(WEIGHTS, f"layer {module!r} was replaced by one that is not a rank {rank} change of ours")
        root = S[:rank].sqrt()
        A_RI, B_OR = root.unsqueeze(1) * Vh[:rank], U[:, :rank] * root
        missing = rank - len(root)
        return nn.functional.pad(A_RI, (0, 0, 0, missing)), nn.functional.pad(B_OR, (0, missing))

    def _is_unchanged(self, name: str, value: Tensor) -> bool:
        own = self.backbone.model.state_dict().get(name)
        return own is not None and torch.equal(own, value)


def _size(tensor: Tensor, axis: int) -> int:
    return tensor.shape[axis] if axis < tensor.dim() else 0


def _is_saved(name: str, saved: Iterable[str]) -> bool:
    """Whether a layer is one of the modules that travel whole, or in one."""
    return any(f".{name}.".find(f".{one}.") >= 0 for one in saved)


def _some(names: Iterable[str]) -> str:
    every = sorted(names)
    more = f" and {len(every) - MOST_NAMED} more" if len(every) > MOST_NAMED else ""
    return ", ".join(every[:MOST_NAMED]) + more
