"""A pretrained transformer with fewer layers: some of its own, evenly spaced, as a model directory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from moreward.errors import BackboneError
from moreward.nn.backbone import load_tokenizer, quiet, resolve_backbone


def depth_of(name: str) -> int:
    """How many layers a pretrained directory has, by its configuration. Raises BackboneError."""
    from transformers import AutoConfig

    try:
        with quiet():
            config = AutoConfig.from_pretrained(resolve_backbone(name))
        return int(config.num_hidden_layers)
    except (OSError, ValueError, AttributeError) as error:
        line = str(error).strip().split("\n")[0]
        raise BackboneError(f"backbone {name!r}: its number of layers cannot be read: {line}") from error


def kept_layers(num_layers: int, num_kept: int) -> list[int]:
    """Which layers stay, from the lowest up: the first, the last and what lies evenly between; of one the first."""
    if num_kept == 1:
        return [0]
    return [round(i * (num_layers - 1) / (num_kept - 1)) for i in range(num_kept)]


def cut_backbone(name: str, num_kept: int, folder: Path) -> Path:
    """Write the backbone `name` with `num_kept` of its layers, and its tokenizer, into `folder`; what is there already
    is left. Raises BackboneError."""
    from transformers import AutoModelForSequenceClassification

    if folder.exists():
        return folder
    import torch

    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # parts that are new at load (a pooler) are the same in every run
        model = AutoModelForSequenceClassification.from_pretrained(
            resolve_backbone(name),
            num_labels=1,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
        )
    num_layers = int(model.config.num_hidden_layers)
    if not 1 <= num_kept <= num_layers:
        raise BackboneError(
            f"layers: backbone {name!r} has {num_layers} layers; keep 1 to {num_layers} (got {num_kept})"
        )
    stays = kept_layers(num_layers, num_kept)
    path, layers = _layers_of(model.base_model, num_layers, name)
    model.base_model.set_submodule(path, nn.ModuleList(layers[i] for i in stays))
    _cut_config(model.config, num_layers, stays)
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}")
    for left in folder.parent.glob(f".{folder.name}-*"):  # of writes that were cut short
        shutil.rmtree(left)
    temporary.mkdir(parents=True)
    with quiet():
        model.save_pretrained(temporary)
    load_tokenizer(name).save_pretrained(temporary)
    temporary.rename(folder)
    return folder


def _layers_of(base: nn.Module, num_layers: int, name: str) -> tuple[str, nn.ModuleList]:
    """The list of the transformer's layers. BackboneError where there is not exactly one of that length."""
    found = [(path, m) for path, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    if len(found) != 1:
        raise BackboneError(
            f"layers: backbone {name!r} has {len(found)} lists of {num_layers} layers; it cannot be told which to cut. "
            "Give a smaller backbone directory instead."
        )
    return found[0]


def _cut_config(config: Any, num_layers: int, stays: list[int]) -> None:
    """Say the new depth, also in lists that have an entry for each layer (kinds of attention)."""
    for key, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == num_layers and key.startswith("layer"):
            setattr(config, key, [value[i] for i in stays])
    config.num_hidden_layers = len(stays)
