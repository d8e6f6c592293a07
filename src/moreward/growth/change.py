"""One expert more, another or one less: what is new is trained and the router refitted; every other expert stays as it
is, to the bit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moreward.config import RunConfig, resolve
from moreward.data.batches import side
from moreward.data.load import assert_no_leak, check_domains, load_preferences
from moreward.data.ratings import divided, load_ratings
from moreward.data.split import not_held_out, split_by_group
from moreward.errors import ConfigError, MorewardError, RunError
from moreward.items import as_text
from moreward.nn.backbone import Backbone
from moreward.nn.losses import PairwiseLoss
from moreward.nn.replay import Replay
from moreward.registry import find_recipe
from moreward.runs import changes_of, read_replay
from moreward.scoring import Scorer, load
from moreward.systems._base import Axis, GatedSystem, GrowingSystem, Kind, Stage, System, expert_names
from moreward.train.runner import (
    Pairs,
    Work,
    left_to,
    make_encoder,
    open_run,
    read_pairs,
    refuse_taken,
    settled,
    with_objectives,
)
from moreward.train.track import Reporter, Silent
from moreward.types import Preference, text_key

EVEN = 100.0
"""A domain temperature at which the refitted router sees every domain about equally often: drawn as the data is, a
small new domain would hardly be seen."""


AXES: tuple[Axis, ...] = ("domain", "capability", "member", "objective")
DONE: Mapping[Kind, str] = {"extend": "extended", "replace": "given another expert", "remove": "parted from an expert"}
BETWEEN: Mapping[Kind, str] = {"extend": "+", "replace": "+new-", "remove": "-"}


@dataclass(frozen=True)
class Change:
    """A new run made from an old one. `old_val` are held-out pairs of the domains whose experts stay, `new_val` of the
    one that was trained, `golden_difference` the largest change of any golden reward of an expert that stays (0 means
    not a bit moved), over `num_golden` rewards; None where there are none, and nothing was compared. `mixes` says how
    a domain's rewards can move although its expert does not."""

    kind: Kind
    run: Path
    parent: Path
    domain: str
    old_val: list[Preference]
    new_val: list[Preference]
    golden_difference: float | None
    num_golden: int
    mixes: str
    replayed: Mapping[str, Any] | None
    """What the gate's fit says of itself where the old data was not at hand."""


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
    axis: Axis
    parts: tuple[str, ...]
    domains: tuple[str, ...]
    pairs: Pairs
    changes: list[dict[str, Any]]
    may_judge_old: bool
    replay: Replay | None
    why_replayed: str

    @property
    def knows_old_texts(self) -> bool:
        """Whether the old pairs are at hand, to take golden texts from."""
        return self.replay is None and self.axis in ("domain", "capability")

    def stages(self, system: GrowingSystem) -> list[Stage]:
        told = self.config.train
        pairwise = PairwiseLoss(label_smoothing=told.label_smoothing, centering=told.centering)
        stages = system.change_stages(self.kind, self.domain, pairwise)
        if self.replay is None:
            return stages
        assert isinstance(system, GatedSystem)
        return [system.replay_stage(self.replay) if stage.name == "router" else stage for stage in stages]


def extend(run: str | Path, domain: str, data: Sequence[str], **options: Any) -> Change:
    """Train an expert for `domain` on `data` and refit the router over all domains, into a new run folder `out`.

    The router needs prompts of the old domains: they are read again from where the run was trained, or from
    `old_data`. Where they are gone, the gate alone is refitted, on the vectors that the run keeps of them. `changes`
    are `train` settings for the new stages. Raises ConfigError where the recipe has no expert per domain or the domain
    exists, RunError where the old data is not what it was and no vectors are kept. `truncate` cuts what is too long
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
        steps = 0 if stage.solve is not None else steps
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
    recipe = find_recipe(old.recipe)
    if not issubclass(recipe, GrowingSystem):
        raise ConfigError(
            f"recipe {old.recipe!r} has no expert per domain, so it cannot be {DONE[kind]}: train it again"
        )
    if made_by := recipe.made_by:
        raise ConfigError(f"recipe {old.recipe!r} cannot be {DONE[kind]}: make a new run by {made_by}")
    assert isinstance(before.system, GrowingSystem)
    axis = recipe.grows_by(old.system, domain)
    parts = _parts_after(kind, domain, before.system.part_labels(axis), axis)
    config = _config(
        old, kind, domain, out or f"{parent}{BETWEEN[kind]}{expert_names([domain])[0]}", backbone, changes or {}
    )
    if truncate:
        config = config.model_copy(update={"data": config.data.model_copy(update={"on_long": "truncate"})})
    refuse_taken(config)
    change = {"kind": kind, "domain": domain, "data": list(data), "shape": shape, "axis": axis}
    replay, why = None, ""
    if axis == "member":
        if old_data:
            raise ConfigError("--old-data: nothing of an ensemble is refitted when a member changes; leave it out")
        pairs = _of_a_member(old, card, data, shape)
    elif axis == "objective":
        pairs, config = _with_ratings(_old_pairs(old, card, old_data, ()), config, data)
    elif axis == "capability":
        pairs = _changed(_old_pairs(old, card, old_data, card["domains"]), old, change)
    else:
        needed = [d for d in card["domains"] if kind == "extend" or d != domain]
        old_pairs, replay, why = _old_pairs_or_replay(parent, old, card, old_data, needed)
        pairs = _changed(old_pairs, old, change)
        if replay is not None and kind != "extend":
            replay = replay.of(needed)  # what replaces an expert also says anew where its prompts lie
    return _Begun(
        kind=kind,
        domain=domain,
        before=before,
        parent=parent,
        config=config,
        axis=axis,
        parts=parts,
        domains=parts if axis == "domain" else tuple(card["domains"]),
        pairs=pairs,
        changes=[*changes_of(card), change],
        may_judge_old=not old_data or bool(old.data.val),  # without files of their own, they were trained on
        replay=replay,
        why_replayed=why,
    )


def _of_a_member(old: RunConfig, card: Mapping[str, Any], data: Sequence[str], shape: str | None) -> Pairs:
    """What a new member learns from; a removed one leaves nothing to be learned."""
    if not data:
        return Pairs([], [])
    told = old.data.model_copy(update={"train": tuple(data), "val": (), "shape": shape or old.data.shape})
    pairs = read_pairs(old.model_copy(update={"data": told}))
    check_domains([*pairs.train, *pairs.val], card["domains"])
    return pairs


def _with_ratings(pairs: Pairs, config: RunConfig, data: Sequence[str]) -> tuple[Pairs, RunConfig]:
    """The old pairs with the old ratings and those of `data`; the configuration names them all."""
    files = (*config.data.ratings, *data)
    told = config.data.model_copy(update={"ratings": files})
    ratings = divided(load_ratings(list(files), max_bad_share=told.max_bad_share), pairs.val)
    config = with_objectives(config.model_copy(update={"data": told}), ratings)
    report = {**pairs.report, "ratings": ratings.report()}
    return Pairs(pairs.train, pairs.val, report, pairs.quarantine, ratings), config


def _parts_after(kind: Kind, domain: str, domains: Sequence[str], axis: Axis = "domain") -> tuple[str, ...]:
    if not domain.strip():
        raise ConfigError("--domain: is empty; give the domain a name")
    told = ", ".join(domains)
    if kind == "extend":
        if domain in domains:
            raise ConfigError(f"{axis} {domain!r} exists. The run has: {told}.")
        return (*domains, domain)
    if domain not in domains:
        raise ConfigError(f"{axis} {domain!r} does not exist. The run has: {told}.")
    if kind == "replace":
        return tuple(domains)
    left = tuple(d for d in domains if d != domain)
    if len(left) < 2:
        raise ConfigError(f"--domain {domain}: {left[0]!r} would be alone, and a mixture has two experts or more")
    if axis in ("member", "capability"):
        return left
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
        if begun.replay is not None:
            work.pairs.report["replayed"] = {"why": begun.why_replayed, "prompts": begun.replay.num_prompts()}
            reporter.say(
                f"the old domains' pairs are not used ({begun.why_replayed}): the gate is refitted on the vectors that "
                "the run keeps of their prompts, and no calibration is fitted (moreward calibrate fits one)"
            )
        reports = work.fit(begun.stages(system))
        work.write(
            reports,
            earlier=begun.replay,
            golden=() if begun.knows_old_texts else [_item(g) for g in before.card["golden"]],
            parent={"run": str(begun.parent), "model": before.identity},
            changes=begun.changes,
        )
    after = load(config.out, backbone=options.get("backbone"))
    difference, num_golden = _golden_difference(before, after, domain)
    val = [p for p in begun.pairs.val if p.token_ids is None and not p.capability]
    new_val = [p for p in val if p.domain == domain]
    old_val = [p for p in val if p.domain != domain] if begun.may_judge_old else []
    return Change(
        kind=begun.kind,
        run=Path(config.out),
        parent=begun.parent,
        domain=domain,
        old_val=old_val,
        new_val=new_val,
        golden_difference=difference,
        num_golden=num_golden,
        mixes=system.mixes,
        replayed=next((r["solved"] for r in reports if r["stage"] == "gate"), None)
        if begun.replay is not None
        else None,
    )


def _system(begun: _Begun, backbone: Backbone) -> GrowingSystem:
    """The new system with all that stays; what is to be trained stands where every expert starts."""
    config = settled(begun.config, begun.pairs.train)
    recipe = find_recipe(config.recipe)
    torch.manual_seed(config.seed)
    system = recipe(recipe.Config.model_validate(config.system), backbone, begun.domains)
    old_system = begun.before.system
    assert isinstance(system, GrowingSystem)
    assert isinstance(old_system, GrowingSystem)
    kept = [i for i, d in enumerate(old_system.expert_labels) if d in (*begun.parts, *begun.domains)]
    old = old_system.saved_tensors()
    new = system.saved_tensors()
    gone = set() if begun.kind == "extend" else old_system.own_tensors(begun.domain)
    if begun.kind == "remove":  # what is kept under the expert's name, whoever shares it
        names = old_system.names_of(begun.domain)
        gone |= {k for k in old for name in names if k not in new and f".{name}." in k}
    gone |= old_system.anew(begun.domain)
    carry_over(new, {k: v for k, v in old.items() if k not in gone}, kept)
    return system


def _config(
    old: RunConfig, kind: Kind, domain: str, out: str | Path, backbone: str | None, changes: Mapping[str, Any]
) -> RunConfig:
    told = old.model_dump(mode="json")
    told["out"] = str(out)
    recipe = find_recipe(old.recipe)
    assert issubclass(recipe, GrowingSystem)
    told["system"] = recipe.changed(told["system"], kind, domain)
    told["backbone"] = backbone or old.backbone
    told["train"] = {**told["train"], "domain_temperature": EVEN, **changes}
    return resolve(told)


def _old_pairs_or_replay(
    parent: Path, old: RunConfig, card: Mapping[str, Any], old_data: Sequence[str], needed: Sequence[str]
) -> tuple[Pairs, Replay | None, str]:
    """The old pairs; where they cannot be had, none, what the run keeps of their prompts, and why."""
    try:
        return _old_pairs(old, card, old_data, needed), None, ""
    except MorewardError as error:
        replay = None if old_data else read_replay(parent)
        if replay is None or set(needed) - replay.num_prompts().keys():
            raise
        return Pairs([], []), replay, str(error).splitlines()[0]


def _old_pairs(old: RunConfig, card: Mapping[str, Any], old_data: Sequence[str], needed: Sequence[str]) -> Pairs:
    """The pairs that the old run was trained on, its own changes included, as they were then."""
    if card["data"].get("replayed") and not old_data:
        raise RunError("an earlier change was made without the old domains' data")
    told = old.data.model_copy(update={"train": tuple(old_data)} if old_data else {})
    pairs = read_pairs(old.model_copy(update={"data": told}))
    if old_data:
        check_domains(pairs.train, card["domains"])
    else:
        for change in changes_of(card):
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
    """`pairs` after a change: those of its domain or capability are others now, or none. Of objectives the ratings
    change, which the configuration names, and members have no part in it."""
    if change.get("axis") == "capability":
        return _with_capability(pairs, old, change)
    if change.get("axis", "domain") != "domain":
        return pairs
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


def _with_capability(pairs: Pairs, old: RunConfig, change: Mapping[str, Any]) -> Pairs:
    """`pairs` with others that judge one point of a task, or none. A prompt stays on its side."""
    domain, _, capability = change["domain"].rpartition("/")
    train, val = (
        [p for p in side if change["kind"] == "extend" or (p.domain, p.capability) != (domain, capability)]
        for side in (pairs.train, pairs.val)
    )
    if change["kind"] == "remove":
        return Pairs(train, val, pairs.report, pairs.quarantine)
    loaded = load_preferences(
        change["data"],
        domain_map={"*": domain},
        tags=old.data.tags,
        max_bad_share=old.data.max_bad_share,
        contradiction_weight=old.data.contradiction_weight,
        shape=change["shape"],
    )
    if others := sorted({p.capability for p in loaded.preferences} - {"", capability}):
        raise ConfigError(f"--data judges {', '.join(others)}; give the pairs that judge {capability!r} alone")
    judged = [replace(p, domain=domain, capability=capability) for p in loaded.preferences]
    held_out, learned = ({text_key(p.prompt) for p in side} for side in (val, train))
    fresh = [p for p in judged if text_key(p.prompt) not in held_out | learned]
    share = old.data.val_fraction
    sides = (
        split_by_group(fresh, {"train": 1 - share, "val": share}, seed=old.seed) if fresh else {"train": [], "val": []}
    )
    train += [*(p for p in judged if text_key(p.prompt) in learned), *sides["train"]]
    val += [*(p for p in judged if text_key(p.prompt) in held_out - learned), *sides["val"]]
    assert_no_leak(train, val)
    return Pairs(train, val, pairs.report, [*pairs.quarantine, *loaded.quarantine])


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


def _golden_difference(before: Scorer, after: Scorer, label: str) -> tuple[float | None, int]:
    """Over all golden texts and all experts that are in both and that a change of `label` must not move."""
    moved = {name for scorer in (before, after) for name in _moved_by(scorer.system, label)}
    items = [_item(g) for g in before.card["golden"]]
    pairs = [
        (then[e], now[e])
        for then, now in ((before.each_part(item), after.each_part(item)) for item in items)
        for e in then.keys() & now.keys() - moved
    ]
    return max((abs(a - b) for a, b in pairs), default=None), len(pairs)


def _moved_by(system: System, label: str) -> set[str]:
    assert isinstance(system, GrowingSystem)
    labels = {one for axis in AXES for one in system.part_labels(axis)}
    return system.moved_by(label) if label in labels else {label}


def _item(golden: Mapping[str, Any]) -> Any:
    preference = Preference(prompt=as_text(golden["prompt"]), chosen=as_text(golden["response"]), rejected="")
    return side(preference, "chosen")
