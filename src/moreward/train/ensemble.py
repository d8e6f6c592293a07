"""Finished runs as the members of one ensemble, each in the unit of one reference set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moreward.config import RunConfig, resolve
from moreward.data.batches import side
from moreward.errors import ConfigError, DataError
from moreward.nn.backbone import Backbone
from moreward.nn.experts import Standardized
from moreward.registry import find_recipe
from moreward.runs import load_backbone
from moreward.scoring import Scorer, load
from moreward.systems._base import System
from moreward.train.parents import TEXT_TO_TOKENS, Parent, read_parents, refuse_differences, write_child
from moreward.types import Conversation, Preference, text_key

RECIPE = "ensemble"
WHY = (
    "these runs cannot be one ensemble: a model directory holds one tokenizer and one backbone. "
    "Runs of different kinds can be set side by side: moreward compare"
)


@dataclass(frozen=True)
class Ensembled:
    """`units` has each parent's mean and standard deviation over the reference responses; `too_long` counts responses
    that were left out of them."""

    run: Path
    units: Mapping[str, tuple[float, float]]
    num_responses: int
    too_long: int


def ensemble(
    runs: Sequence[str | Path],
    reference: Sequence[Preference],
    *,
    out: str | Path,
    how: str = "mean",
    caution: float = 0.5,
    reference_name: str = "",
    backbone: str | None = None,
    truncate: bool = False,
) -> Ensembled:
    """Make a run of finished runs, of any recipes, on one backbone (under `tune=full` one architecture). Each member
    gets the mean and standard deviation of its rewards over all responses of `reference` as its zero and unit.

    Raises ConfigError naming every difference that stands in the way, RunError for a run that is damaged or whose
    backbone has moved (`backbone` says where it is), DataError where no reference response fits.
    """
    parents = read_parents(runs)
    tunes = {parent.config.tune for parent in parents}
    own_weights = tunes == {"full"}
    must_agree = {**TEXT_TO_TOKENS, **({} if own_weights else {"backbone": lambda p: p.backbone})}
    refuse_differences(parents, must_agree, WHY)
    config = _config(parents, tunes, how, caution, out, backbone)
    system = _built(config, parents, tunes, backbone)
    units: dict[str, tuple[float, float]] = {}
    for parent, name in zip(parents, system.names, strict=True):
        scorer = load(parent.run, backbone=backbone)
        items, too_long = _responses(scorer, reference, truncate)
        member = system.members.experts[name]
        assert isinstance(member, Standardized)
        _copy(scorer.system, member.model, parent)
        member.standardize.fit(torch.tensor([r.reward for r in scorer.score(items, on_long="truncate")]))
        units[str(parent.run)] = (float(member.standardize.mean), float(member.standardize.std))
    told = {
        "data": {
            "standardised_on": f"both responses of {reference_name or 'given pairs'}",
            "standardised_on_sha256": text_key(*(text for p in reference for text in (p.prompt, p.chosen, p.rejected))),
            "responses": len(items),
            "too_long": too_long,
            "units": {run: {"mean": mean, "std": std} for run, (mean, std) in units.items()},
        }
    }
    write_child(config, system, scorer.encoder, parents, told)
    return Ensembled(Path(config.out), units, len(items), too_long)


def _config(
    parents: Sequence[Parent], tunes: set[Any], how: str, caution: float, out: str | Path, backbone: str | None
) -> RunConfig:
    first = parents[0].card["config"]
    members = [{"recipe": p.config.recipe, "domains": p.card["domains"], "system": p.config.system} for p in parents]
    on_long = "truncate" if all(p.config.data.on_long == "truncate" for p in parents) else "drop"
    files = dict.fromkeys(path for p in parents for path in p.config.data.train)
    tune = next(t for t in ("full", "lora", "frozen") if t in tunes)
    return resolve(
        {
            "recipe": RECIPE,
            "tune": tune,
            "backbone": backbone or first["backbone"],
            "pooling": first["pooling"],
            "out": str(out),
            "seed": first["seed"],
            "data": {**first["data"], "train": list(files), "on_long": on_long},
            "system": {"num_members": len(parents), "how": how, "caution": caution, "runs": members},
        }
    )


def _built(config: RunConfig, parents: Sequence[Parent], tunes: set[Any], backbone: str | None) -> Any:
    """The ensemble before any weight is in it."""
    recipe = find_recipe(RECIPE)
    any_full = next((p for p in parents if p.config.tune == "full"), parents[0])
    domains = sorted({domain for parent in parents for domain in parent.card["domains"]})
    with torch.random.fork_rng(devices=[]):
        backbone_: Backbone = load_backbone(any_full.folder, any_full.card, backbone)
        return recipe(recipe.Config.model_validate(config.system), backbone_, domains)


def _responses(scorer: Scorer, reference: Sequence[Preference], truncate: bool) -> tuple[list[Conversation], int]:
    items = [side(p, which) for p in reference for which in ("chosen", "rejected")]
    fits = [truncate or not scorer.encoder.conversation(item).truncated for item in items]
    kept = [item for item, ok in zip(items, fits, strict=True) if ok]
    if len(kept) < 2:
        raise DataError(
            f"--reference: {len(kept)} of {len(items)} responses fit into {scorer.encoder.max_length} tokens; give "
            "more pairs, or cut them with --truncate"
        )
    return kept, len(items) - len(kept)


def _copy(trained: System, into: torch.nn.Module, parent: Parent) -> None:
    try:
        into.load_state_dict(trained.state_dict())
    except RuntimeError as error:
        raise ConfigError([WHY, f"{parent.run}: {str(error).splitlines()[-1].strip()}"]) from error
