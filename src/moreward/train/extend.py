"""Add a domain: train its expert and refit the router; every other expert stays as it is, to the bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moreward.config import RunConfig, resolve
from moreward.data.batches import side
from moreward.data.load import assert_no_leak, check_domains, load_preferences
from moreward.data.split import not_held_out, split_by_group
from moreward.errors import ConfigError, RunError
from moreward.items import as_text
from moreward.nn.backbone import Backbone
from moreward.registry import find_recipe
from moreward.scoring import Scorer, load
from moreward.systems._base import GatedSystem, expert_names
from moreward.train.runner import Pairs, Work, left_to, make_encoder, open_run, read_pairs, settled
from moreward.train.track import Reporter, Silent
from moreward.types import Preference

EVEN = 100.0
"""A domain temperature at which the refitted router sees every domain about equally often: drawn as the data is, a
small new domain would hardly be seen."""


@dataclass(frozen=True)
class Extension:
    """A new run made from an old one. `old_pairs` are held-out pairs of the old domains, `golden_difference` the
    largest change of any old expert's golden reward (0 means not a bit moved), over `num_golden` rewards."""

    run: Path
    parent: Path
    domain: str
    old_val: list[Preference]
    new_val: list[Preference]
    golden_difference: float
    num_golden: int


def extend(
    run: str | Path,
    domain: str,
    data: Sequence[str],
    *,
    out: str | Path | None = None,
    shape: str | None = None,
    old_data: Sequence[str] = (),
    backbone: str | None = None,
    truncate: bool = False,
    changes: Mapping[str, Any] | None = None,
    reporter: Reporter | None = None,
) -> Extension:
    """Train an expert for `domain` on `data` and refit the router over all domains, into a new run folder.

    The router needs prompts of the old domains: they are read again from where the run was trained, or from
    `old_data`. `changes` are `train` settings for the new stages. Raises ConfigError where the recipe has no expert
    per domain or the domain exists, RunError where the old data is not what it was. `truncate` cuts what is too long
    from now on.
    """
    parent = Path(run)
    before = load(parent, backbone=backbone)
    card = before.card
    old = RunConfig.model_validate(card["config"])
    recipe = find_recipe(old.recipe)
    if not issubclass(recipe, GatedSystem):
        raise ConfigError(f"recipe {old.recipe!r} has no expert per domain, so it cannot be extended: train it again")
    if not domain.strip():
        raise ConfigError("--domain: is empty; give the new domain a name")
    if domain in card["domains"]:
        raise ConfigError(f"domain {domain!r} exists. The run has: {', '.join(card['domains'])}.")
    config = _config(old, out or f"{parent}+{expert_names([domain])[0]}", backbone, changes or {})
    if truncate:
        config = config.model_copy(update={"data": config.data.model_copy(update={"on_long": "truncate"})})
    additions = [*card.get("additions", []), {"domain": domain, "data": list(data), "shape": shape}]
    old_pairs = _old_pairs(old, card, old_data)
    pairs = _with_addition(old_pairs, old, additions[-1])
    with open_run(config):
        work = _work(before, config, [*card["domains"], domain], pairs, reporter or Silent())
        assert isinstance(work.system, GatedSystem)
        reports = work.fit(work.system.new_domain_stages(domain, work.pairwise))
        work.write(reports, parent={"run": str(parent), "model": before.identity}, additions=additions)
    difference, num_golden = _golden_difference(before, load(config.out, backbone=backbone))
    new_val = [p for p in pairs.val if p.domain == domain and p.token_ids is None and not p.capability]
    old_val = [] if old_data and not old.data.val else old_pairs.val  # without files of their own, they were trained on
    old_val = [p for p in old_val if p.token_ids is None and not p.capability]
    return Extension(Path(config.out), parent, domain, old_val, new_val, difference, num_golden)


def _config(old: RunConfig, out: str | Path, backbone: str | None, changes: Mapping[str, Any]) -> RunConfig:
    told = old.model_dump(mode="json")
    told["out"] = str(out)
    told["backbone"] = backbone or old.backbone
    told["train"] = {**told["train"], "domain_temperature": EVEN, **changes}
    return resolve(told)


def _old_pairs(old: RunConfig, card: Mapping[str, Any], old_data: Sequence[str]) -> Pairs:
    """The pairs that the old run was trained on, its own extensions included, as they were then."""
    told = old.data.model_copy(update={"train": tuple(old_data)} if old_data else {})
    pairs = read_pairs(old.model_copy(update={"data": told}))
    if old_data:
        check_domains(pairs.train, card["domains"])
    else:
        for addition in card.get("additions", []):
            pairs = _with_addition(pairs, old, addition)
        if pairs.sha256() != card["data"]["data_sha256"]:
            raise RunError(
                f"the data that this run was trained on has changed since ({', '.join(old.data.train)}). "
                "Say with --old-data which pairs of the old domains the router should learn from."
            )
    missing = sorted(set(card["domains"]) - {p.domain for p in pairs.train})
    if missing:
        raise RunError(f"--old-data: no pair of domain {', '.join(missing)}; the router would forget it")
    return pairs


def _with_addition(pairs: Pairs, old: RunConfig, addition: Mapping[str, Any]) -> Pairs:
    """`pairs` and those of one more domain, a share of them held out."""
    domain = addition["domain"]
    loaded = load_preferences(
        addition["data"],
        domain_map={"*": domain},
        tags=old.data.tags,
        allow_token_ids=bool(old.data.tokenizer_sha256),
        max_bad_share=old.data.max_bad_share,
        contradiction_weight=old.data.contradiction_weight,
        shape=addition["shape"],
    )
    loaded = left_to(old.recipe, loaded)
    if others := sorted({p.domain for p in loaded.preferences} - {domain}):
        raise ConfigError(f"--data holds rows of domain {', '.join(others)}; give the pairs of {domain!r} alone")
    share = old.data.val_fraction
    sides = split_by_group(loaded.preferences, {"train": 1 - share, "val": share}, seed=old.seed)
    assert_no_leak(pairs.train, sides["val"])
    assert_no_leak(sides["train"], pairs.val)
    quarantine = [*pairs.quarantine, *loaded.quarantine]
    missing = not_held_out(loaded.preferences, sides["val"])
    report = {**pairs.report, "not_held_out": [*pairs.report.get("not_held_out", []), *missing]}
    return Pairs([*pairs.train, *sides["train"]], [*pairs.val, *sides["val"]], report, quarantine)


def _work(before: Scorer, config: RunConfig, domains: Sequence[str], pairs: Pairs, reporter: Reporter) -> Work:
    backbone = Backbone.load(config.backbone, pooling=before.card["backbone"]["pooling"])
    encoder = make_encoder(config, backbone)
    config = settled(config, pairs.train)
    recipe = find_recipe(config.recipe)
    torch.manual_seed(config.seed)
    system = recipe(recipe.Config.model_validate(config.system), backbone, domains)
    grow_into(system.saved_tensors(), before.system.saved_tensors())
    return Work(config, Path(config.out), system, encoder, pairs, domains, reporter)


def grow_into(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> None:
    """Copy every old tensor into the new system; a gate that has more rows now keeps its old ones."""
    with torch.no_grad():
        for name, value in old.items():
            target = new[name]
            if target.shape[1:] != value.shape[1:] or len(target.shape) != len(value.shape):
                raise RunError(f"tensor {name!r} has shape {tuple(value.shape)}, not {tuple(target.shape)}")
            (target if target.dim() == 0 else target[: len(value)]).copy_(value)


def _golden_difference(before: Scorer, after: Scorer) -> tuple[float, int]:
    items = [_item(g) for g in before.card["golden"]]
    pairs = [
        (then["experts"][e], now["experts"][e])
        for then, now in zip(before.golden(items), after.golden(items), strict=True)
        for e in then["experts"]
    ]
    return max((abs(a - b) for a, b in pairs), default=0.0), len(pairs)


def _item(golden: Mapping[str, Any]) -> Any:
    preference = Preference(prompt=as_text(golden["prompt"]), chosen=as_text(golden["response"]), rejected="")
    return side(preference, "chosen")
