"""What all exports share: the experts they are made of, golden rewards, and how a folder comes into being.

N texts, T tokens.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moreward.checkpoint import fsync_path, space_errors
from moreward.data.batches import Encoded
from moreward.errors import ConfigError, RunError
from moreward.items import as_text
from moreward.nn.backbone import Backbone
from moreward.nn.experts import AdapterExperts, RewardHead, SoloExpert, Standardize, standardised_heads
from moreward.scoring import Scorer
from moreward.systems._base import GatedSystem, System
from moreward.types import Conversation

NOTE = "moreward.json"
TOLERANCE = 1e-5
"""Relative to the largest of the golden rewards, or to 1 where they are smaller."""


@dataclass(frozen=True)
class Part:
    """A whole reward model: `name` is its folder, `expert` what the scorer calls it (empty for the only one), `adapter`
    its adapter in the backbone's bank."""

    name: str
    expert: str
    backbone: Backbone
    adapter: str | None
    head: RewardHead
    standardize: Standardize


def parts_of(system: System) -> list[Part]:
    """Every expert that is a reward model by itself; the only one of a single model is named `model`.

    ConfigError where the reward is not that of single heads, as in recipes whose experts are parts of one model.
    """
    heads = {id(head) for head, _ in standardised_heads(system)}
    names = system.expert_names if isinstance(system, GatedSystem) else ("model",)
    labels = system.expert_labels or ("",)
    found: list[tuple[Backbone, str | None, RewardHead, Standardize]] = []
    for module in system.modules():
        if isinstance(module, SoloExpert) and isinstance(module.head, RewardHead):
            found.append((module.backbone, None, module.head, module.standardize))
        elif isinstance(module, AdapterExperts):
            has_bank = module.backbone.bank is not None
            found += [
                (module.backbone, name if has_bank else None, module.head(name), module.standardizer(name))
                for name in module.heads
            ]
    if not (len(found) == len(names) == len(labels) == len(heads)):
        raise ConfigError(
            f"export: this run has {len(names)} experts that can be named and {len(found)} that are reward models by "
            "themselves. Runs of baseline, base_lora, rodos and arliss can be exported."
        )
    return [Part(name, label, *one) for name, label, one in zip(names, labels, found, strict=True)]


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write beside `out`, which takes that name once the block has ended without an error. ConfigError
    where `out` exists."""
    if out.exists():
        raise ConfigError(f"--out: {out} exists already. Give a new folder, or remove it first.")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with space_errors(out.parent):
            temporary.mkdir()
            yield temporary
            temporary.rename(out)
            fsync_path(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def need_golden(scorer: Scorer) -> None:
    if not scorer.card["golden"]:
        raise RunError("export: this run has no golden rewards, so nothing could be compared; train it on texts")


def note(scorer: Scorer, part: Part, kind: str, offset: float) -> dict[str, Any]:
    """What `moreward.json` of an expert's directory holds: where it comes from, its golden rewards, and the
    `tolerance`, by which rounding may move them."""
    rewards = [one["experts"][part.expert] if part.expert else one["reward"] for one in scorer.card["golden"]]
    golden = [
        {"prompt": one["prompt"], "response": one["response"], "ids": list(encoded(scorer, one).ids), "reward": reward}
        for one, reward in zip(scorer.card["golden"], rewards, strict=True)
    ]
    return {
        "kind": kind,
        "recipe": scorer.card["recipe"],
        "expert": part.expert,
        "run": scorer.identity,
        "offset": offset,
        "max_length": scorer.encoder.max_length,
        "tolerance": allowed(rewards, rounding(part)),
        "golden": golden,
    }


def allowed(rewards: list[float], unit: float) -> float:
    """What rounding may do to rewards; `unit` is the size of a raw reward in units of the reward."""
    return TOLERANCE * max(1.0, *map(abs, rewards), unit)


def encoded(scorer: Scorer, stored: dict[str, Any]) -> Encoded:
    """The tokens of a golden text."""
    item = Conversation(prompt=as_text(stored["prompt"]), response=as_text(stored["response"]))
    return scorer.encoder.conversation(item)


def compare(found_N: Tensor, told: dict[str, Any], library: str) -> float:
    """The largest difference of what `library` found from the golden rewards of a note. RunError beyond rounding."""
    wanted_N = torch.tensor([one["reward"] for one in told["golden"]], dtype=torch.float64)
    difference = float((found_N.double() + told["offset"] - wanted_N).abs().max())
    if not difference <= told["tolerance"]:
        raise RunError(
            f"{told['expert'] or 'the model'}: {library} gives other rewards than this run (largest difference "
            f"{difference:.2g}); nothing was exported. The architecture may compute them in another way."
        )
    return difference


def rounding(part: Part) -> float:
    """The size of a raw reward in units of the expert."""
    return max(1.0, abs(float(part.standardize.mean))) / float(part.standardize.std)


def padded(texts: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """`ids_NT` padded at the end, and the mask."""
    longest = max(len(ids) for ids in texts)
    ids_NT = torch.full((len(texts), longest), pad_id)
    mask_NT = torch.zeros_like(ids_NT)
    for n, ids in enumerate(texts):
        ids_NT[n, : len(ids)] = torch.tensor(ids)
        mask_NT[n, : len(ids)] = 1
    return ids_NT, mask_NT
