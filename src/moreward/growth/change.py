"""One expert more, another or one less: what is new is trained and the router refitted; every other expert stays as it
is, to the bit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moreward.config import RunConfig, resolve
from moreward.data.batches import side
from moreward.data.load import assert_no_leak, check_domains, load_preferences
from moreward.data.split import not_held_out, split_by_group
from moreward.errors import ConfigError, RunError
from moreward.items import as_text
from moreward.nn.backbone import Backbone
from moreward.nn.losses import PairwiseLoss
from moreward.registry import find_recipe
from moreward.scoring import Scorer, load
from moreward.systems._base import GatedSystem, Stage, expert_names
from moreward.train.runner import Pairs, Work, left_to, make_encoder, open_run, read_pairs, settled
from moreward.train.track import Reporter, Silent
from moreward.types import Preference

EVEN = 100.0
"""A domain temperature at which the refitted router sees every domain about equally often: drawn as the data is, a
small new domain would hardly be seen."""


Kind = Literal["extend", "replace", "remove"]
DONE: Mapping[Kind, str] = {"extend": "extended", "replace": "given another expert", "remove": "parted from an expert"}
BETWEEN: Mapping[Kind, str] = {"extend": "+", "replace": "+new-", "remove": "-"}


@dataclass(frozen=True)
class Change:
    """A new run made from an old one. `old_val` are held-out pairs of the domains whose experts stay, `new_val` of the
    one that was trained, `golden_difference` the largest change of any golden reward of an expert that stays (0 means
    not a bit moved), over `num_golden` rewards."""

    kind: Kind
    run: Path
    parent: Path
    domain: str
    old_val: list[Preference]
    new_val: list[Preference]
    golden_difference: float
    num_golden: int


@dataclass(frozen=True)
class Planned:
    """A stage that a change would train. Pairs longer than allowed are among `pairs`.

    `seconds` is guessed from a like stage of the parent, None without one."""

    stage: str
    pairs: int
    parameters: int
    steps: int
    seconds: float | None


@dataclass(frozen=True)
class _Begun:
    kind: Kind
    domain: str
    before: Scorer
    parent: Path
    config: RunConfig
    domains: tuple[str, ...]
    pairs: Pairs
    changes: list[dict[str, Any]]
    may_judge_old: bool

    def stages(self, system: GatedSystem) -> list[Stage]:
        told = self.config.train
        pairwise = PairwiseLoss(label_smoothing=told.label_smoothing, centering=told.centering)
        return [system.router_stage()] if self.kind == "remove" else system.new_domain_stages(self.domain, pairwise)


def extend(run: str | Path, domain: str, data: Sequence[str], **options: Any) -> Change:
    """Train an expert for `domain` on `data` and refit the router over all domains, into a new run folder `out`.

    The router needs prompts of the old domains: they are read again from where the run was trained, or from
    `old_data`. `changes` are `train` settings for the new stages. Raises ConfigError where the recipe has no expert
    per domain or the domain exists, RunError where the old data is not what it was. `truncate` cuts what is too long
    from now on. Further options: `shape` of the rows, `backbone`, `reporter`.
    """
    return _carry_out(_begin("extend", run, domain, data, **_prepared(options)), options)


def replace_expert(run: str | Path, domain: str, data: Sequence[str], **options: Any) -> Change:
    """Train the expert of `domain` anew on `data`, from where an expert starts, and refit the router. As `extend`."""
    return _carry_out(_begin("replace", run, domain, data, **_prepared(options)), options)


def remove_expert(run: str | Path, domain: str, **options: Any) -> Change:
    """Leave the expert of `domain` out and refit the router over the others, two at least. As `extend`."""
    return _carry_out(_begin("remove", run, domain, (), **_prepared(options)), options)


def plan(kind: Kind, run: str | Path, domain: str, data: Sequence[str] = (), **options: Any) -> list[Planned]:
    """What a change would train. Everything is read and checked as for the change; nothing is trained or written."""
    begun = _begin(kind, run, domain, data, **_prepared(options))
    system = _system(begun, Backbone.load(begun.config.backbone, pooling=begun.before.card["backbone"]["pooling"]))
    told = begun.config.train
    planned = []
    for stage in begun.stages(system):
        num_pairs = sum(stage.select(p) for p in begun.pairs.train)
        steps = math.ceil(num_pairs / told.batch_size) * told.epochs
        steps = min(steps, told.max_steps) if told.max_steps else steps
        kind_of_stage = stage.name.partition("/")[0]
        like = [s for s in begun.before.card["stages"] if s["stage"].partition("/")[0] == kind_of_stage and s["steps"]]
        pace = sum(s["seconds"] for s in like) / sum(s["steps"] for s in like) if like else None
        num_parameters = sum(p.numel() for p in stage.learn)
        planned.append(Planned(stage.name, num_pairs, num_parameters, steps, None if pace is None else pace * steps))
    return planned


def _prepared(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "reporter"}


def _begin(
    kind: Kind,
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
) -> _Begun:
    """Everything read and checked, before anything is written."""
    parent = Path(run)
    before = load(parent, backbone=backbone)
    card = before.card
    old = RunConfig.model_validate(card["config"])
    if not issubclass(find_recipe(old.recipe), GatedSystem):
        raise ConfigError(
            f"recipe {old.recipe!r} has no expert per domain, so it cannot be {DONE[kind]}: train it again"
        )
    if made_by := find_recipe(old.recipe).made_by:
        raise ConfigError(f"recipe {old.recipe!r} cannot be {DONE[kind]}: make a new run by {made_by}")
    if kind != "extend" and find_recipe(old.recipe).uses_capabilities:
        raise ConfigError(f"recipe {old.recipe!r}: tasks can be added, but not replaced or removed: train it again")
    domains = _domains_after(kind, domain, card["domains"])
    config = _config(old, out or f"{parent}{BETWEEN[kind]}{expert_names([domain])[0]}", backbone, changes or {})
    if truncate:
        config = config.model_copy(update={"data": config.data.model_copy(update={"on_long": "truncate"})})
    change = {"kind": kind, "domain": domain, "data": list(data), "shape": shape}
    needed = [d for d in card["domains"] if kind == "extend" or d != domain]
    pairs = _changed(_old_pairs(old, card, old_data, needed), old, change)
    return _Begun(
        kind=kind,
        domain=domain,
        before=before,
        parent=parent,
        config=config,
        domains=domains,
        pairs=pairs,
        changes=[*card.get("changes", []), change],
        may_judge_old=not old_data or bool(old.data.val),  # without files of their own, they were trained on
    )


def _domains_after(kind: Kind, domain: str, domains: Sequence[str]) -> tuple[str, ...]:
    if not domain.strip():
        raise ConfigError("--domain: is empty; give the domain a name")
    told = ", ".join(domains)
    if kind == "extend":
        if domain in domains:
            raise ConfigError(f"domain {domain!r} exists. The run has: {told}.")
        return (*domains, domain)
    if domain not in domains:
        raise ConfigError(f"domain {domain!r} does not exist. The run has: {told}.")
    if kind == "replace":
        return tuple(domains)
    left = tuple(d for d in domains if d != domain)
    if len(left) < 2:
        raise ConfigError(f"--domain {domain}: {left[0]!r} would be alone, and a mixture has two experts or more")
    old_names = dict(zip(domains, expert_names(domains), strict=True))
    renamed = [d for d, name in zip(left, expert_names(left), strict=True) if old_names[d] != name]
    if renamed:
        raise ConfigError(f"--domain {domain}: without it the expert of {renamed[0]!r} would have another name")
    return left


def _carry_out(begun: _Begun, options: Mapping[str, Any]) -> Change:
    config, domain, before = begun.config, begun.domain, begun.before
    with open_run(config):
        backbone = Backbone.load(config.backbone, pooling=before.card["backbone"]["pooling"])
        encoder = make_encoder(config, backbone)
        reporter: Reporter = options.get("reporter") or Silent()
        system = _system(begun, backbone)
        config = settled(config, begun.pairs.train)
        work = Work(config, Path(config.out), system, encoder, begun.pairs, begun.domains, reporter)
        reports = work.fit(begun.stages(system))
        work.write(reports, parent={"run": str(begun.parent), "model": before.identity}, changes=begun.changes)
    stay = [d for d in before.experts if d in begun.domains and (begun.kind == "extend" or d != domain)]
    difference, num_golden = _golden_difference(before, load(config.out, backbone=options.get("backbone")), stay)
    val = [p for p in begun.pairs.val if p.token_ids is None and not p.capability]
    new_val = [p for p in val if p.domain == domain]
    old_val = [p for p in val if p.domain != domain] if begun.may_judge_old else []
    return Change(begun.kind, Path(config.out), begun.parent, domain, old_val, new_val, difference, num_golden)


def _system(begun: _Begun, backbone: Backbone) -> GatedSystem:
    """The new system with all that stays; what is to be trained stands where every expert starts."""
    config = settled(begun.config, begun.pairs.train)
    recipe = find_recipe(config.recipe)
    torch.manual_seed(config.seed)
    system = recipe(recipe.Config.model_validate(config.system), backbone, begun.domains)
    assert isinstance(system, GatedSystem)
    old_system = begun.before.system
    kept = [i for i, d in enumerate(old_system.domains) if d in begun.domains]
    old = old_system.saved_tensors()
    new = system.saved_tensors()
    gone = (
        set() if begun.kind == "extend" else _own_names(system if begun.kind == "replace" else old_system, begun.domain)
    )
    if begun.kind == "remove":  # what is kept under the expert's name, whoever shares it
        name = old_system.expert_names[old_system.domains.index(begun.domain)]
        gone |= {k for k in old if k not in new and f".{name}." in k}
    carry_over(new, {k: v for k, v in old.items() if k not in gone}, kept)
    return system


def _own_names(system: Any, domain: str) -> set[str]:
    """The names of the tensors that one expert alone has; a zero and unit that all share are not among them."""
    name = system.expert_names[system.domains.index(domain)]
    others = {id(system.standardizer(other)) for other in system.expert_names if other != name}
    unit = system.standardizer(name)
    mine = {id(p) for p in system.expert_parameters(name)}
    mine |= set() if id(unit) in others else {id(b) for b in unit.buffers()}
    named = [*system.named_parameters(remove_duplicate=False), *system.named_buffers(remove_duplicate=False)]
    return {k for k, v in named if id(v) in mine}


def _config(old: RunConfig, out: str | Path, backbone: str | None, changes: Mapping[str, Any]) -> RunConfig:
    told = old.model_dump(mode="json")
    told["out"] = str(out)
    told["backbone"] = backbone or old.backbone
    told["train"] = {**told["train"], "domain_temperature": EVEN, **changes}
    return resolve(told)


def _old_pairs(old: RunConfig, card: Mapping[str, Any], old_data: Sequence[str], needed: Sequence[str]) -> Pairs:
    """The pairs that the old run was trained on, its own changes included, as they were then."""
    told = old.data.model_copy(update={"train": tuple(old_data)} if old_data else {})
    pairs = read_pairs(old.model_copy(update={"data": told}))
    if old_data:
        check_domains(pairs.train, card["domains"])
    else:
        for change in card.get("changes", []):
            pairs = _changed(pairs, old, change)
        if pairs.sha256() != card["data"]["data_sha256"]:
            raise RunError(
                f"the data that this run was trained on has changed since ({', '.join(old.data.train)}). "
                "Say with --old-data which pairs of the old domains the router should learn from."
            )
    missing = sorted(set(needed) - {p.domain for p in pairs.train})
    if missing:
        raise RunError(f"--old-data: no pair of domain {', '.join(missing)}; the router would forget it")
    return pairs


def _changed(pairs: Pairs, old: RunConfig, change: Mapping[str, Any]) -> Pairs:
    """`pairs` after a change: those of its domain are others now, or none."""
    if change["kind"] != "extend":
        train = [p for p in pairs.train if p.domain != change["domain"]]
        val = [p for p in pairs.val if p.domain != change["domain"]]
        pairs = Pairs(train, val, pairs.report, pairs.quarantine)
    return pairs if change["kind"] == "remove" else _with_addition(pairs, old, change)


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


def carry_over(new: Mapping[str, Tensor], old: Mapping[str, Tensor], kept: Sequence[int]) -> None:
    """Copy every old tensor into the new system; a gate that has another number of rows now keeps those of the experts
    numbered `kept`."""
    with torch.no_grad():
        for name, value in old.items():
            if name not in new:
                raise RunError(f"tensor {name!r} has no place in the changed system")
            target = new[name]
            if target.shape[1:] != value.shape[1:] or len(target.shape) != len(value.shape):
                raise RunError(f"tensor {name!r} has shape {tuple(value.shape)}, not {tuple(target.shape)}")
            rows = value if target.shape == value.shape else value[list(kept)]
            (target if target.dim() == 0 else target[: len(rows)]).copy_(rows)


def _golden_difference(before: Scorer, after: Scorer, experts: Sequence[str]) -> tuple[float, int]:
    items = [_item(g) for g in before.card["golden"]]
    pairs = [
        (then["experts"][e], now["experts"][e])
        for then, now in zip(before.golden(items), after.golden(items), strict=True)
        for e in experts
    ]
    return max((abs(a - b) for a, b in pairs), default=0.0), len(pairs)


def _item(golden: Mapping[str, Any]) -> Any:
    preference = Preference(prompt=as_text(golden["prompt"]), chosen=as_text(golden["response"]), rejected="")
    return side(preference, "chosen")
