"""Train what an experiment lacks and reward the same test pairs with every run. Started again, it goes on.

A finished run is recognised by its configuration, its data and its backbone; one of another is refused and the
difference named. What a run says of the test pairs is kept beside it under the hashes of the model and of the pairs.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moreward.checkpoint import write_json
from moreward.config import RunConfig, read_config
from moreward.data.batches import side
from moreward.data.load import assert_no_leak, load_preferences, of_whole_responses
from moreward.data.synthetic import generate_splits, write_pairs
from moreward.errors import BackboneError, ConfigError, DataError, RunError
from moreward.nn.backbone import directory_sha256, load_tokenizer
from moreward.proof.controls import Plan, Planned, hollow, plan
from moreward.proof.experiment import Experiment, config_of, domain_map, paths_of, slug
from moreward.registry import find_recipe
from moreward.runs import identity, model_folder, read_card
from moreward.scoring import Scorer, load
from moreward.systems._base import GatedSystem
from moreward.train.runner import (
    Pairs,
    complete,
    differences,
    feature_store,
    read_pairs,
    train_on,
    with_objectives,
)
from moreward.train.track import Reporter, Silent
from moreward.types import Preference, RoutedReward

FORMAT = 1
MEMBER_STEP = 100_003
"""Between the seeds of an ensemble's members: seed, seed + 100003, and so on; the first is the plain run's own."""
NUM_TIMED = 48
EXPLAINED_PER_DOMAIN = 100

State = str
"""Of a run: `finished`, `unfinished` or `missing`."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training: a configuration with its seed and folder."""

    config: RunConfig
    folder: Path

    @property
    def is_finished(self) -> bool:
        return (self.folder / "model" / "moreward.json").is_file()

    @property
    def state(self) -> State:
        if self.is_finished:
            return "finished"
        return "unfinished" if (self.folder / "checkpoints").exists() else "missing"


@dataclass(frozen=True, kw_only=True)
class Told:
    """What one system with one seed says of the test pairs, and what that and its training took.

    `rewards[i]` are chosen and rejected of pair i. `expert_margins` are over `explained` pairs, by expert.
    `seconds_per_pair` was measured on single pairs' texts that had not been computed before.
    """

    rewards: tuple[tuple[RoutedReward, RoutedReward], ...]
    experts: tuple[str, ...]
    expert_margins: Mapping[str, tuple[float, ...]]
    explained: tuple[int, ...]
    seconds_per_pair: float
    training: Mapping[str, Any] = field(default_factory=dict)


class Trials:
    """An experiment in its folder: its plan, its runs, what they say."""

    def __init__(self, experiment: Experiment, *, reporter: Reporter | None = None) -> None:
        self.experiment, self.folder = experiment, experiment.folder
        self.reporter = reporter or Silent()
        self.data = self._data_settings()
        self.configs = {label: config_of(experiment, label, self.data) for label in experiment.labels}
        _check_backbones(experiment, self.configs)
        self._pairs: dict[str, Pairs] = {}

    # ---- data ------------------------------------------------------------------------------------------------------

    def _data_settings(self) -> dict[str, Any]:
        """`data` of every run's configuration: where training and held-out pairs are."""
        told = self.experiment.data
        if told.synthetic is not None:
            made = told.synthetic
            splits = generate_splits(
                made.train, made.val, made.test, seed=made.seed, noise=made.noise, domains=made.domains
            )
            folder = self.folder / "data"
            files = {name: write_pairs(folder / f"{name}.jsonl", rows) for name, rows in splits.items()}
            return {"train": [files["train"]], "val": [files["val"]]}
        found: dict[str, Any] = {"train": paths_of(told.train), "val": paths_of(told.val)}
        if mapped := domain_map(told.train, told.val, told.test):
            found["domain_map"] = mapped
        return found

    @cached_property
    def test(self) -> list[Preference]:
        """The test pairs, read as the training pairs are. DataError where one of them stands among those too, or their
        domains are others."""
        told, first = self.experiment.data, next(iter(self.configs.values())).data
        places = [str(self.folder / "data" / "test.jsonl")] if told.synthetic else paths_of(told.test)
        read = load_preferences(
            places,
            shape=first.shape,
            domain=first.domain,
            domain_key=first.domain_key,
            domain_map=first.domain_map,
            tags=first.tags,
            max_bad_share=first.max_bad_share,
            use_margin=False,
        )
        loaded = of_whole_responses(read)
        if loaded.quarantine:
            self.reporter.say(f"{len(loaded.quarantine)} test rows not used; see: moreward data check")
        known = {p.domain for p in self.train_pairs}
        if strange := sorted({p.domain for p in loaded.preferences} ^ known):
            raise DataError(f"domains {strange} stand in the training pairs or in the test pairs only, not in both")
        everything = self.pairs(next(iter(self.configs.values())))
        assert_no_leak([*everything.train, *everything.val], loaded.preferences)
        return loaded.preferences

    @property
    def train_pairs(self) -> list[Preference]:
        return self.pairs(next(iter(self.configs.values()))).train

    def pairs(self, config: RunConfig) -> Pairs:
        """Training and held-out pairs of a configuration, read once; held-out ones are split off by the run's seed."""
        told = [config.data.model_dump(mode="json"), config.data.val or config.seed]
        key = json.dumps([*told, find_recipe(config.recipe).uses_capabilities], sort_keys=True)
        if key not in self._pairs:
            self._pairs[key] = read_pairs(config)
        return self._pairs[key]

    # ---- the plan ----------------------------------------------------------------------------------------------------

    @cached_property
    def plan(self) -> Plan:
        return plan(self.experiment, self.configs, self.pairs)

    def runs_of(self, planned: Planned, seed: int) -> list[Run]:
        """The trainings behind a system with a seed; one that another system needs too is the same run."""
        return [self._run(planned, seed, member) for member in range(planned.members)]

    def _run(self, planned: Planned, seed: int, member: int) -> Run:
        owner = next(p for p in self.plan.systems if p.config == planned.config)
        own_seed = seed + member * MEMBER_STEP
        folder = self.folder / "runs" / f"{slug(owner.label)}-seed{own_seed}"
        return Run(config=planned.config.model_copy(update={"seed": own_seed, "out": str(folder)}), folder=folder)

    def runs(self) -> Iterator[Run]:
        """Every training of the experiment, once."""
        seen = set()
        for seed in self.experiment.seeds:
            for planned in self.plan.systems:
                for run in self.runs_of(planned, seed):
                    if run.folder not in seen:
                        seen.add(run.folder)
                        yield run

    # ---- training ----------------------------------------------------------------------------------------------------

    def train(self) -> int:
        """Train what is missing or unfinished; returns how many runs that were.

        Before anything is trained it raises DataError where the test pairs are not fit, and RunError where runs of the
        same names are of another configuration, data or backbone, all of them at once.
        """
        runs = list(self.runs())
        if faults := [fault for run in runs for fault in self.changed(run)]:
            raise RunError("\n".join(faults))
        assert self.test
        missing = [run for run in runs if not run.is_finished]
        for number, run in enumerate(missing, start=1):
            self.reporter.say(f"[{number}/{len(missing)}] {run.folder.name}")
            train_on(run.config, self.pairs(run.config), reporter=self.reporter)
        return len(missing)

    def changed(self, run: Run) -> list[str]:
        """What the run that is there has not in common with the one that is wanted."""
        if run.state == "missing":
            return []
        differs = self._differences(run)
        if not differs:
            return []
        return [
            f"{run.folder}: {run.state}, but of another configuration ({'; '.join(differs)}). "
            "Choose another out, or remove the folder to train it again."
        ]

    def _differences(self, run: Run) -> list[str]:
        pairs = self.pairs(run.config)
        if not run.is_finished:
            stored = read_config(run.folder / "config.yaml")
            return differences(stored, with_objectives(run.config, pairs.ratings))
        card = read_card(model_folder(run.folder))
        differs = differences(card["config"], complete(run.config, pairs))
        if card["data"]["data_sha256"] != pairs.sha256():
            differs.append("the training pairs have changed")
        if card["backbone"]["sha256"] != directory_sha256(run.config.backbone):
            differs.append("the backbone's files have changed")
        return differs

    # ---- rewards -----------------------------------------------------------------------------------------------------

    def told(self, planned: Planned, seed: int) -> Told:
        """What a system with a seed says of all test pairs, from disk where it has been asked before."""
        members = [self._told(run, explain=seed == self.experiment.seeds[0]) for run in self.runs_of(planned, seed)]
        return members[0] if len(members) == 1 else averaged(members)

    def _told(self, run: Run, *, explain: bool) -> Told:
        file = self.folder / "rewards" / f"{run.folder.name}.json"
        key = {
            "format": FORMAT,
            "model": identity(model_folder(run.folder)),
            "pairs": self._test_sha256,
            "seed": run.config.seed,
            "explained": explain,
        }
        training = _training(read_card(model_folder(run.folder)))
        if file.is_file() and (kept := json.loads(file.read_text(encoding="utf-8")))["key"] == key:
            return _from_json(kept, training)
        self.reporter.say(f"rewards of {run.folder.name}")
        told = replace(ask(load(run.folder), self.test, seed=run.config.seed, explain=explain), training=training)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"key": key, **_to_json(told)})
        return told

    @cached_property
    def _test_sha256(self) -> str:
        texts = [[p.prompt, p.chosen, p.rejected, p.domain, p.group] for p in self.test]
        return hashlib.sha256(json.dumps(texts, default=dict).encode()).hexdigest()


def _check_backbones(experiment: Experiment, configs: Mapping[str, RunConfig]) -> None:
    """Raise ConfigError naming every backbone that is not to be had, and how to say where it is."""
    short = {place: name for name, place in experiment.backbones.items()}
    faults = []
    for name in dict.fromkeys(config.backbone for config in configs.values()):
        try:
            load_tokenizer(name)
            hollow(next(c for c in configs.values() if c.backbone == name), ["a", "b"])
        except BackboneError as error:
            key = f"backbones.{short[name]}" if name in short else "backbone"
            faults.append(f"{key}: {error} Say where it is: {key}=DIRECTORY")
    if faults:
        raise ConfigError(faults)


def ask(scorer: Scorer, preferences: Sequence[Preference], *, seed: int, explain: bool) -> Told:
    """Rewards of every pair under the system's own, the oracle and a random router. Long texts are cut and marked:
    whether such pairs count is for all systems together to say."""
    scorer.on_long = "truncate"
    seconds = _seconds_per_pair(scorer, preferences)
    store = None
    if scorer.system.config.tune == "frozen":
        store = feature_store(scorer.card["config"]["backbone"], scorer.system.backbones()[0])
        scorer.keep_features(store)
    items = [side(p, which) for p in preferences for which in ("chosen", "rejected")]
    routed = scorer.score_routes(items, seed=seed)
    explained = _some_of_each_domain(preferences) if explain and isinstance(scorer.system, GatedSystem) else ()
    margins = _expert_margins(scorer, [preferences[i] for i in explained])
    if store is not None:
        store.save()
    return Told(
        rewards=tuple(zip(routed[::2], routed[1::2], strict=True)),
        experts=scorer.experts,
        expert_margins=margins,
        explained=explained,
        seconds_per_pair=seconds,
    )


def _seconds_per_pair(scorer: Scorer, preferences: Sequence[Preference]) -> float:
    """Median over single pairs, evenly drawn; the first ones warm up."""
    chosen = [
        preferences[i] for i in np.linspace(0, len(preferences) - 1, min(NUM_TIMED, len(preferences))).astype(int)
    ]
    found = []
    for preference in [*chosen[:3], *chosen]:
        started = time.perf_counter()
        scorer.score([side(preference, "chosen"), side(preference, "rejected")])
        found.append(time.perf_counter() - started)
    return float(np.median(found[3:] or found))


def _some_of_each_domain(preferences: Sequence[Preference]) -> tuple[int, ...]:
    rows: dict[str, list[int]] = {}
    for i, preference in enumerate(preferences):
        rows.setdefault(preference.domain, []).append(i)
    return tuple(sorted(i for some in rows.values() for i in some[:EXPLAINED_PER_DOMAIN]))


def _expert_margins(scorer: Scorer, preferences: Sequence[Preference]) -> dict[str, tuple[float, ...]]:
    items = [side(p, which) for p in preferences for which in ("chosen", "rejected")]
    rewards = scorer.score(items, explain=True) if items else []
    margins: dict[str, list[float]] = {}
    for chosen, rejected in zip(rewards[::2], rewards[1::2], strict=True):
        for expert, reward in chosen.expert_rewards.items():
            margins.setdefault(expert, []).append(reward - rejected.expert_rewards[expert])
    return {expert: tuple(values) for expert, values in margins.items()}


def _training(card: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds and pairs of a run and of each stage, from its card."""
    stages = [_stage(stage, card["config"]["train"]) for stage in card["stages"]]
    return {
        "seconds": card["seconds"],
        "steps": sum(stage["steps"] for stage in stages),
        "pairs_seen": sum(stage["pairs_seen"] for stage in stages),
        "stages": stages,
    }


def _stage(report: Mapping[str, Any], train: Mapping[str, Any]) -> dict[str, Any]:
    """`epoch_seconds` is one pass over what the stage sees, None where none was made. A closed form makes one pass, and
    two rated conversations are as much as a pair."""
    pairs = report["rated"] // 2 if "rated" in report else report["pairs"]
    made = (report["steps"] - report["resumed_from_step"]) * train["batch_size"] / max(pairs, 1)
    epochs = 1.0 if "solved" in report else made
    seen = pairs if "solved" in report else min(report["steps"] * train["batch_size"], pairs * train["epochs"])
    return {
        "stage": report["stage"],
        "seconds": report["seconds"],
        "steps": report["steps"],
        "pairs": pairs,
        "pairs_seen": seen,
        "epoch_seconds": report["seconds"] / epochs if epochs else None,
    }


def averaged(members: Sequence[Told]) -> Told:
    """An ensemble: the mean of its members' standardised rewards. What they took is added up."""
    rewards = [
        (_mean([m.rewards[i][0] for m in members]), _mean([m.rewards[i][1] for m in members]))
        for i in range(len(members[0].rewards))
    ]
    training = {key: sum(m.training[key] for m in members) for key in ("seconds", "steps", "pairs_seen")}
    return Told(
        rewards=tuple(rewards),
        experts=(),
        expert_margins={},
        explained=(),
        seconds_per_pair=sum(m.seconds_per_pair for m in members),
        training={**training, "stages": [stage for m in members for stage in m.training["stages"]]},
    )


def _mean(rewards: Sequence[RoutedReward]) -> RoutedReward:
    value = sum(r.reward for r in rewards) / len(rewards)
    return replace(
        rewards[0], reward=value, expert="", oracle=None, random=None, truncated=any(r.truncated for r in rewards)
    )


_FIELDS = ("reward", "expert", "oracle", "random", "num_tokens", "truncated")


def _to_json(told: Told) -> dict[str, Any]:
    plain = {k: v for k, v in asdict(replace(told, rewards=())).items() if k not in ("rewards", "training")}
    return {**plain, "rewards": [[[getattr(r, f) for f in _FIELDS] for r in pair] for pair in told.rewards]}


def _from_json(kept: Mapping[str, Any], training: Mapping[str, Any]) -> Told:
    pairs = [[RoutedReward(**dict(zip(_FIELDS, r, strict=True))) for r in pair] for pair in kept["rewards"]]
    return Told(
        rewards=tuple((chosen, rejected) for chosen, rejected in pairs),
        experts=tuple(kept["experts"]),
        expert_margins={k: tuple(v) for k, v in kept["expert_margins"].items()},
        explained=tuple(kept["explained"]),
        seconds_per_pair=kept["seconds_per_pair"],
        training=training,
    )


def describe(trials: Trials) -> list[str]:
    """What would be trained, for `--dry-run`: systems with budgets, opponents, and the state of every run."""
    chosen = trials.plan
    lines = [
        f"{len(trials.train_pairs):,} training pairs, {len(trials.test):,} test pairs; "
        f"seeds {', '.join(map(str, trials.experiment.seeds))}"
    ]
    for planned in chosen.systems:
        budget = chosen.budgets[planned.label]
        what = "single" if planned.is_single else "mixture"
        lines.append(
            f"{planned.label}: {what}, recipe {planned.config.recipe}, {budget.total:,} parameters, {budget.active:,} "
            f"active, {budget.trained:,} trained, {budget.training:,} pairs seen"
        )
    for mixture, told in chosen.controls.items():
        lines.append(
            f"{mixture} is compared with: " + "; ".join(f"equal {kind}: {label}" for kind, label in told.items())
        )
    runs = list(trials.runs())
    for state in ("missing", "unfinished", "finished"):
        names = [run.folder.name for run in runs if run.state == state]
        lines.append(f"{state}: {len(names)}{': ' if names else ''}{', '.join(names)}")
    return lines
