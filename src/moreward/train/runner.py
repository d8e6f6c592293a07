"""A run from configuration to model: data, stages in order, the run folder. Started again, it goes on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml
from torch import Tensor

from moreward.calibration import Calibration, how_to_get_it
from moreward.checkpoint import CheckpointStore, space_errors
from moreward.config import RunConfig, deviations, resolve
from moreward.data.batches import (
    Encoded,
    EncodedPair,
    EncodedRated,
    EncodedSet,
    Encoder,
    conversation_batch,
    encode_pairs,
    encode_rated,
    side,
    tokenizer_sha256,
)
from moreward.data.books import account
from moreward.data.load import (
    Loaded,
    Quarantined,
    assert_no_leak,
    check_domains,
    load_preferences,
    of_whole_responses,
    write_quarantine,
)
from moreward.data.ratings import Ratings, divided, load_ratings
from moreward.data.reasons import CAPABILITY
from moreward.data.split import not_held_out, split_by_group
from moreward.errors import BackboneError, ConfigError, RunError
from moreward.nn.backbone import Backbone, directory_sha256, load_tokenizer
from moreward.nn.features import FeatureStore, cache_folder
from moreward.nn.linear import fingerprint
from moreward.nn.losses import PairwiseLoss
from moreward.nn.replay import Replay, read_batches
from moreward.nn.trunk import TrunkStore
from moreward.registry import find_recipe, near
from moreward.runs import write_model
from moreward.scoring import Scorer
from moreward.systems._base import Stage, System, gate_of
from moreward.train.calibrate import calibrate, spaced_prompts
from moreward.train.loop import Fit, Surroundings, make_accelerator
from moreward.train.track import MetricsFile, Reporter, Silent
from moreward.types import Batch, Conversation, Preference

log = logging.getLogger(__name__)

NUM_GOLDEN = 16
NOT_OF_THE_RESULT = (
    "out",
    "train.device",
    "train.processes",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.trackers",
)


@dataclass(frozen=True)
class Pairs:
    """What a run learns from and is watched on, as text, and the rows that were not usable."""

    train: list[Preference]
    val: list[Preference]
    report: dict[str, Any] = field(default_factory=dict)
    quarantine: list[Quarantined] = field(default_factory=list)
    ratings: Ratings = field(default_factory=Ratings)

    def sha256(self) -> str:
        """One hash over what is learned from, in order."""
        rated = [
            [r.conversation.prompt, r.conversation.response, dict(r.ratings)]
            for r in (*self.ratings.train, *self.ratings.val)
        ]
        # Without what is rare, so that older runs keep their hash.
        return _sha256([*(_learned(p) for p in (*self.train, *self.val)), *([rated] if rated else [])])


def _learned(preference: Preference) -> list[Any]:
    """What of a pair decides what is learned. Without what is rare, so that older runs keep their hash."""
    p = preference
    rare = [
        *([p.capability] if p.capability else []),
        *([p.weight] if p.weight != 1 else []),
        *([asdict(p.token_ids)] if p.token_ids else []),
    ]
    return [p.prompt, p.chosen, p.rejected, p.domain, p.margin, *rare]


def left_to(recipe: str, loaded: Loaded) -> Loaded:
    """What is for this recipe: pairs that judge one capability are put aside where it has no use for them."""
    return loaded if find_recipe(recipe).uses_capabilities else of_whole_responses(loaded)


def train(given: RunConfig | Mapping[str, Any], *, reporter: Reporter | None = None) -> Path:
    """Train a run; returns its folder. Given the folder of a run that was cut short, goes on with it.

    Raises ConfigError, DataError, BackboneError, RunError, NonFiniteError or SpaceError; what was complete on disk
    stays.
    """
    config = given if isinstance(given, RunConfig) else resolve(given)
    if not config.data.train:
        raise ConfigError("data.train: is required: files, folders or globs of preference pairs")
    reporter = reporter or Silent()
    pairs = read_pairs(config)
    for name in pairs.report["train"]["skipped_files"]:
        reporter.say(f"not read: {name} (not a kind of data file that is known)")
    return train_on(config, pairs, reporter=reporter)


def train_on(config: RunConfig, pairs: Pairs, *, reporter: Reporter | None = None) -> Path:
    """As `train`, on pairs already in memory."""
    config = with_objectives(config, pairs.ratings)
    with open_run(config) as run:
        return _train_in(run, config, pairs, reporter or Silent())


def _train_in(run: Path, config: RunConfig, pairs: Pairs, reporter: Reporter) -> Path:
    domains = sorted({p.domain for p in pairs.train})
    check_domains(pairs.val, domains)
    backbone = Backbone.load(config.backbone, pooling=config.pooling)
    recipe = find_recipe(config.recipe)
    encoder = recipe.reads_with(recipe.Config.model_validate(config.system), make_encoder(config, backbone), None)
    config = settled(config, pairs.train)
    torch.manual_seed(config.seed)
    system = recipe(recipe.Config.model_validate(config.system), backbone, domains)
    work = Work(config, run, system, encoder, pairs, domains, reporter)
    stages = system.stages(work.pairwise)
    reports = work.fit(stages)
    work.write(reports)
    return run


def complete(config: RunConfig, pairs: Pairs) -> RunConfig:
    """The configuration as a run's card has it: with everything that the data decide filled in."""
    return settled(with_objectives(config, pairs.ratings), pairs.train)


def settled(config: RunConfig, preferences: Sequence[Preference]) -> RunConfig:
    """The configuration with what the recipe takes from the training pairs."""
    recipe = find_recipe(config.recipe)
    system = recipe.settle(recipe.Config.model_validate(config.system), preferences)
    return config.model_copy(update={"system": system.model_dump(mode="json")})


def read_pairs(config: RunConfig) -> Pairs:
    """Load training and held-out pairs; without `data.val`, split off a share of every domain by prompt group."""
    told = config.data
    options: dict[str, Any] = {
        "shape": told.shape,
        "domain": told.domain,
        "domain_key": told.domain_key,
        "domain_map": told.domain_map,
        "tags": told.tags,
        "allow_token_ids": bool(told.tokenizer_sha256),
        "max_bad_share": told.max_bad_share,
        "contradiction_weight": told.contradiction_weight,
        "use_margin": config.train.use_margin,
    }
    loaded = left_to(config.recipe, load_preferences(list(told.train), **options))
    report: dict[str, Any] = {"train": _told(loaded)}
    if told.val:
        held_out = left_to(config.recipe, load_preferences(list(told.val), **options))
        assert_no_leak(loaded.preferences, held_out.preferences)
        report["val"] = _told(held_out)
        sides = {"train": loaded.preferences, "val": held_out.preferences}
        quarantine = [*loaded.quarantine, *held_out.quarantine]
    else:
        share = told.val_fraction
        sides = split_by_group(loaded.preferences, {"train": 1 - share, "val": share}, seed=config.seed)
        quarantine = loaded.quarantine
        report["not_held_out"] = not_held_out(loaded.preferences, sides["val"])
    ratings = Ratings()
    if told.ratings:
        ratings = divided(load_ratings(list(told.ratings), max_bad_share=told.max_bad_share), sides["val"])
        report["ratings"] = ratings.report()
    return Pairs(sides["train"], sides["val"], report, quarantine, ratings)


def with_objectives(config: RunConfig, ratings: Ratings) -> RunConfig:
    """The configuration with every rated objective filled in, where it names none. ConfigError where the recipe has
    no use for ratings, or names an objective that nobody rated."""
    found = ratings.objectives
    if found and "objectives" not in find_recipe(config.recipe).Config.model_fields:
        raise ConfigError(f"data.ratings: recipe {config.recipe!r} learns from pairs only; leave them out")
    wanted = config.system.get("objectives") or ()
    if missing := [name for name in wanted if name not in found]:
        there = f"it has {', '.join(found)}" if found else "there is none"
        raise ConfigError(f"system.objectives: {', '.join(missing)}: not rated in data.ratings ({there})")
    if wanted or not found:
        return config
    return resolve({**config.model_dump(), "system": {**config.system, "objectives": list(found)}})


def _told(loaded: Loaded) -> dict[str, Any]:
    return {
        "rows": loaded.num_rows,
        "pairs": len(loaded.preferences),
        "ties": loaded.num_ties,
        "duplicates": loaded.duplicates,
        "contradictions": len(loaded.contradictions),
        "skipped_files": list(map(str, loaded.skipped_files)),
    }


@contextmanager
def open_run(config: RunConfig) -> Iterator[Path]:
    """Make the run folder, or enter it again for the same configuration; no second process may enter meanwhile.

    SpaceError when the disk fills up, whatever is being written.
    """
    if not config.out:
        raise ConfigError("out: is required: the folder of the run, e.g. out=runs/a")
    run = Path(config.out)
    refuse_taken(config)
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / ".lock").open("w")
    except OSError as error:
        raise RunError(f"out: {run} cannot be made or written: {error.strerror}") from error
    with lock, space_errors(run):
        if is_main_process():
            _hold(lock, run)
            _settle_config(config, run)
        yield run


def refuse_taken(config: RunConfig) -> None:
    """RunError where the run folder holds a finished run, or an unfinished one of another configuration."""
    run = Path(config.out)
    if (run / "model" / "moreward.json").exists():
        raise RunError(f"{run}: holds a finished run. Choose another out, or remove the folder to train it again.")
    if (stored := _begun_with(run)) and (differs := differences(stored, config)):
        raise RunError(
            f"{run}: an unfinished run of another configuration ({'; '.join(differs)}). "
            "Start it with the old one, choose another out, or remove the folder."
        )


def _begun_with(run: Path) -> dict[str, Any] | None:
    """The configuration of a run that goes on; None where nothing is trained yet: a kill may have cut the file."""
    stored = run / "config.yaml"
    if not (stored.exists() and (run / "checkpoints").exists()):
        return None
    return dict(yaml.safe_load(stored.read_text(encoding="utf-8")))


def is_main_process() -> bool:
    """Whether this is the first of the processes that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def _hold(lock: TextIO, run: Path) -> None:
    """The lock goes with the process, however it ends."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(f"{run}: is being trained by another process") from None


def _settle_config(config: RunConfig, run: Path) -> None:
    if _begun_with(run) is None:
        told = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        (run / "config.yaml").write_text(told, encoding="utf-8")
    else:
        refuse_taken(config)  # another process may have begun it since


def differences(stored: Mapping[str, Any], config: RunConfig) -> list[str]:
    """What decides the result and is not the same in two configurations, a phrase for each key."""
    before, now = RunConfig.model_validate(stored).flat(), config.flat()
    keys = sorted({*before, *now} - set(NOT_OF_THE_RESULT))
    return [f"{k}: {before.get(k)!r} then, {now.get(k)!r} now" for k in keys if before.get(k) != now.get(k)]


def make_encoder(config: RunConfig, backbone: Backbone) -> Encoder:
    limit = backbone.max_positions
    if limit is not None and config.data.max_length > limit:
        raise BackboneError(
            f"data.max_length: {config.data.max_length} tokens, but backbone {config.backbone!r} has {limit} positions"
        )
    tokenizer = load_tokenizer(config.backbone)
    declared, found = config.data.tokenizer_sha256, tokenizer_sha256(tokenizer)
    if declared and declared != found:
        raise BackboneError(
            f"data.tokenizer_sha256: {declared} is declared, but the tokenizer of backbone {config.backbone!r} has "
            f"{found}, so token ids would mean other tokens. Take the backbone that they were made for, or the texts."
        )
    return Encoder(tokenizer, config.data.max_length, config.data.input_template)


class Work:
    """One system being trained in one run folder."""

    def __init__(
        self,
        config: RunConfig,
        run: Path,
        system: System,
        encoder: Encoder,
        pairs: Pairs,
        domains: Sequence[str],
        reporter: Reporter,
    ) -> None:
        self.config, self.run, self.system, self.encoder = config, run, system, encoder
        self.pairs, self.domains, self.reporter = pairs, tuple(domains), reporter
        told = config.train
        _check_metric(told.metric, self.domains)
        self.pairwise = PairwiseLoss(label_smoothing=told.label_smoothing, centering=told.centering)
        self.accelerator = make_accelerator(told, str(run))
        self.started = time.monotonic()
        if not told.dropout:
            for backbone in system.backbones():
                backbone.without_dropout()
        for sentence in pairs.report.get("not_held_out", ()):
            reporter.say(sentence)
        if put_aside := sum(row.reason == CAPABILITY for row in pairs.quarantine):
            reporter.say(f"{put_aside:,} rows judge one capability, not the whole response: put aside")
        self.train = self._encode(pairs.train)
        self.val = self._encode(pairs.val)
        self.rated, lost = self._encode_rated(pairs.ratings)
        self.remarks = system.meet([pair.preference for pair in self.train.pairs])
        for sentence in self.remarks:
            reporter.say(sentence)
        self.books = account(pairs.quarantine, [self.train, self.val])
        if self.accelerator.is_main_process:
            quarantine = [*pairs.quarantine, *self.train.quarantine, *self.val.quarantine]
            quarantine += [*pairs.ratings.quarantine, *lost]
            write_quarantine(quarantine, run / "quarantine.jsonl")

    def _encode(self, preferences: Sequence[Preference]) -> EncodedSet:
        return encode_pairs(self.encoder, preferences, self.domains, on_long=self.config.data.on_long)

    def _encode_rated(
        self, ratings: Ratings
    ) -> tuple[tuple[list[EncodedRated], list[EncodedRated]], list[Quarantined]]:
        objectives = tuple(self.config.system.get("objectives") or self.pairs.ratings.objectives)
        sides, lost = [], []
        for rows in (ratings.train, ratings.val):
            made, put_aside = encode_rated(
                self.encoder, rows, objectives, self.domains, on_long=self.config.data.on_long
            )
            sides.append(made)
            lost += put_aside
        if lost:
            self.reporter.say(f"{len(lost)} rated conversations are not used: see quarantine.jsonl")
        return (sides[0], sides[1]), lost

    def fit(self, stages: Sequence[Stage]) -> list[dict[str, Any]]:
        """Fit each stage in order, those that are finished already being read back."""
        self.system.to(self.accelerator.device)
        self._open_stores()
        self.accelerator.init_trackers("moreward", config={k: str(v) for k, v in self.config.flat().items()})
        around = Surroundings(
            accelerator=self.accelerator,
            config=self.config.train,
            seed=self.config.seed,
            pad_id=self.encoder.pad_id,
            domains=self.domains,
            metrics=MetricsFile(self.run / "metrics.jsonl"),
            reporter=self.reporter,
        )
        hashes = self._hashes()
        reports = []
        for number, stage in enumerate(stages):
            folder = self.run / "checkpoints" / f"{number:02d}-{stage.name.replace('/', '-')}"
            store = CheckpointStore(folder, hashes=hashes)
            for name in store.clean() if self.accelerator.is_main_process else []:
                self.reporter.say(f"removed {name}, left by a save that was cut short")
            reports.append(self._fit_stage(stage, around, store))
        for backbone in self.system.backbones():
            if backbone.trunk_store is not None:
                backbone.trunk_store.save()
        self.accelerator.end_training()
        return reports

    def _fit_stage(self, stage: Stage, around: Surroundings, store: CheckpointStore) -> dict[str, Any]:
        learn = {id(p) for p in stage.learn}
        for parameter in self.system.parameters():
            parameter.requires_grad_(id(parameter) in learn)
        names: dict[str, Tensor] = {k: p for k, p in self.system.named_parameters() if id(p) in learn}
        standardizers = [one for one in (stage.standardize, *stage.standardizers) if one is not None]
        mine = {id(b) for one in standardizers for b in one.buffers()} | {id(b) for b in stage.keep}
        if mine:
            names |= {k: b for k, b in self.system.named_buffers() if id(b) in mine}
        if stage.rated:
            return Fit(stage, names, [], [], around, store, self.rated).run()
        train, val = self._seen_by(stage, self.train), self._seen_by(stage, self.val)
        if not val and stage.solve is None:
            self.reporter.say(f"{stage.name}: no held-out pair; trained without evaluation, the last weights are kept")
        return Fit(stage, names, train, val, around, store).run()

    def _seen_by(self, stage: Stage, pairs: EncodedSet) -> list[EncodedPair]:
        return [p for p in pairs.pairs if stage.select(p.preference)]

    def _open_stores(self) -> None:
        """Keep what does not change while it is trained on: all that a frozen backbone says of a text, computed here
        before the first step, or the states below the adapters, as they are needed."""
        backbone = self.system.backbones()[0]
        if backbone.bank is not None and backbone.bank.num_trunk_layers and backbone.family is not None:
            backbone.trunk_store = trunk_store(self.config.backbone, backbone)
        if self.config.tune != "frozen":
            return
        store = feature_store(self.config.backbone, backbone)
        for one in self.system.backbones():
            one.store = store
        learned = [list(e.ids) for p in self.train.pairs for e in (p.chosen, p.rejected)]
        texts = [*learned, *(list(e.ids) for p in self.val.pairs for e in (p.chosen, p.rejected))]
        texts += [list(row.encoded.ids) for rows in self.rated for row in rows]
        texts += [list(ids) for ids in {p.chosen.prompt_ids for p in (*self.train.pairs, *self.val.pairs)}]
        self.reporter.start("features", len(texts))
        store.compute(backbone, texts, progress=lambda done, _: self.reporter.step(done))
        self.reporter.finish()
        store.save()
        for one in self.system.backbones():
            if one.scale is not None and not one.scale.num:  # an extended run keeps the scale it has
                one.scale.fit(store.vectors(learned))

    def _hashes(self) -> dict[str, str]:
        flat = {k: v for k, v in self.config.flat().items() if k not in NOT_OF_THE_RESULT}
        return {
            "config_sha256": _sha256(flat),
            "data_sha256": self.pairs.sha256(),
            "backbone_sha256": directory_sha256(self.config.backbone),
        }

    def write(
        self,
        reports: list[dict[str, Any]],
        *,
        earlier: Replay | None = None,
        golden: Sequence[Conversation] = (),
        **more: Any,
    ) -> None:
        """The model directory with its card, then the end of the checkpoints. `earlier` is what an earlier version kept
        of prompts that are not at hand now, `golden` are its golden texts."""
        if not self.accelerator.is_main_process:
            return
        card = {**self.card(reports), **more}
        store = self.system.backbones()[0].store
        device = self.accelerator.device
        place = str(device) if device.type == "cuda" else device.type  # several processes call their CPU cpu:0
        scorer = Scorer(self.system, self.encoder, card, device=place)
        texts = golden_items(self.pairs.val or self.pairs.train)[: NUM_GOLDEN // 4 if golden else None]
        card["golden"] = scorer.golden([*golden, *texts] or self._golden_rated())
        calibration = self._calibrate(scorer, store) if earlier is None else None
        card["calibration"] = calibration and calibration.report
        replay = self._replay(earlier)
        write_model(self.run, self.system.cpu(), self.encoder, card, calibration, replay)
        if not self.config.train.keep_checkpoints:
            shutil.rmtree(self.run / "checkpoints", ignore_errors=True)

    def _replay(self, earlier: Replay | None) -> Replay | None:
        """What the gate reads of some prompts of each domain, and `earlier`; None where there is no such gate."""
        limit, router = self.config.train.replay, gate_of(self.system)
        if not limit or router is None:
            return None
        known, held_out = (
            read_batches(router, self._prompt_batches(pairs, num), self.domains, held_out=is_held_out)
            for pairs, num, is_held_out in ((self.train.pairs, limit, False), (self.val.pairs, -(-limit // 4), True))
        )
        found = known + held_out
        return found if earlier is None else earlier.of(self.domains) + found

    def _prompt_batches(self, pairs: Sequence[EncodedPair], limit: int) -> Iterator[Batch]:
        """Some prompts of each domain, of like length together."""
        prompts, domains = spaced_prompts([p for p in pairs if p.domain >= 0 and p.chosen.prompt_ids], limit)
        rows = sorted(zip(prompts, domains, strict=True), key=lambda row: len(row[0]))
        for start in range(0, len(rows), self.config.train.batch_size):
            chunk = rows[start : start + self.config.train.batch_size]
            encoded = [Encoded(ids, ids, 0) for ids, _ in chunk]
            numbers = [self.domains.index(domain) for _, domain in chunk]
            yield conversation_batch(encoded, numbers, self.encoder.pad_id).to(self.accelerator.device)

    def _golden_rated(self) -> list[Conversation]:
        """For a run that learned from rated conversations alone."""
        rows = self.rated[1] or self.rated[0]
        num = min(len(rows), NUM_GOLDEN)
        chosen = [rows[i * len(rows) // num].rated.conversation for i in range(num)]
        return [Conversation(prompt=item.prompt, response=item.response) for item in chosen]

    def _calibrate(self, scorer: Scorer, store: FeatureStore | None) -> Calibration | None:
        """What uncertainty needs; a frozen backbone's vectors are looked up in `store`."""
        if store is not None:
            scorer.keep_features(store)
        judged = [pair for pair in self.val.pairs if not pair.preference.capability]
        found = calibrate(scorer, known=self.train.pairs, usual=self.val.pairs, judged=judged)
        if found is None:
            self.reporter.say(f"no calibration: no held-out pair to fit it on. {how_to_get_it()}")
        return found

    def card(self, reports: list[dict[str, Any]]) -> dict[str, Any]:
        """Everything about the run that is worth knowing later, as JSON."""
        backbone = self.system.backbones()[0]
        return {
            "recipe": self.config.recipe,
            "paper": self.system.paper,
            "domains": list(self.domains),
            "experts": list(self.system.expert_labels),
            "config": self.config.model_dump(mode="json"),
            "deviations_from_paper": deviations(self.config),
            "backbone": {
                "name": self.config.backbone,
                "sha256": directory_sha256(self.config.backbone),
                "pooling": backbone.pooling,
                "loaded": backbone.fingerprint(),
            },
            "parameters": {
                "stored": self.system.num_parameters(),
                "active": self.system.num_active_parameters(),
            },
            "data": {
                **self.pairs.report,
                **({"rated": {"train": len(self.rated[0]), "val": len(self.rated[1])}} if any(self.rated) else {}),
                **self._hashes(),
                "train_pairs": _by_domain(self.train.pairs),
                "val_pairs": _by_domain(self.val.pairs),
                **self.books.to_json(),
                "remarks": self.remarks,
                "truncated": {"train": self.train.num_truncated, "val": self.val.num_truncated},
                "standardised_on": "training pairs of each expert's stage, evenly spaced, both responses",
            },
            "stages": reports,
            "seconds": round(time.monotonic() - self.started, 1),
            "machine": {
                "processor": platform.processor() or platform.machine(),
                "threads": torch.get_num_threads(),
                "processes": self.accelerator.num_processes,
                "device": str(self.accelerator.device),
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "transformers", "accelerate", "safetensors")},
            },
        }


def feature_store(name: str, backbone: Backbone) -> FeatureStore:
    """Where the vectors of this frozen backbone are kept on disk; in memory only for a backbone without a hash."""
    folder = _folder_for(name, backbone)
    return FeatureStore(cache_folder() / "features" / folder if folder else None)


def trunk_store(name: str, backbone: Backbone) -> TrunkStore | None:
    """Where the states of this backbone's trunk are kept on disk; nowhere for a backbone without a hash."""
    assert backbone.bank is not None
    folder = _folder_for(name, backbone)
    return TrunkStore(cache_folder() / "trunk" / f"{folder}-{backbone.bank.num_trunk_layers}") if folder else None


def _folder_for(name: str, backbone: Backbone) -> str | None:
    """A name for everything that decides the bits of what a backbone says."""
    sha256 = directory_sha256(name)
    if not sha256:
        return None
    device = next(backbone.parameters()).device.type
    how = "packed" if backbone.family is not None else "padded"
    where = f"{device}{torch.get_num_threads()}-{fingerprint(backbone)}"
    return f"{sha256[:16]}-{backbone.pooling}-{how}-torch{version('torch')}-{where}"


def golden_items(preferences: Sequence[Preference]) -> list[Conversation]:
    """Pairs of every domain in turn that have texts, both sides; without tools, which are not stored with them."""
    by_domain: dict[str, list[Preference]] = {}
    for preference in sorted((p for p in preferences if p.token_ids is None), key=lambda p: (p.domain, p.name)):
        by_domain.setdefault(preference.domain, []).append(preference)
    in_turn = [p for row in zip_longest(*by_domain.values()) for p in row if p is not None]
    chosen = in_turn[: max(NUM_GOLDEN // 2, len(by_domain))]
    items = [side(p, which) for p in chosen for which in ("chosen", "rejected")]
    return [Conversation(prompt=item.prompt, response=item.response) for item in items]


def _check_metric(metric: str, domains: Sequence[str]) -> None:
    known = ["mean", "micro", "loss", *domains]
    if metric not in known:
        raise ConfigError(f"train.metric: {metric!r} is no measure and no domain of the data.{near(metric, known)}")


def _by_domain(pairs: Sequence[EncodedPair]) -> dict[str, int]:
    return dict(sorted(Counter(p.preference.domain for p in pairs).items()))


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=dict).encode()).hexdigest()
