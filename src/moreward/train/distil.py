"""A small model that says what a trained one says: taught by its rewards on unlabelled conversations.

The student is an ordinary single model (`baseline`, all weights trained) on a smaller backbone or on some layers of the
teacher's. Its targets are the teacher's standardised rewards, so it has the teacher's zero and unit. N conversations.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moreward.checkpoint import write_json
from moreward.config import RunConfig, merge, resolve
from moreward.data.batches import Encoder, tokenizer_sha256
from moreward.data.ratings import Ratings
from moreward.data.texts import Texts, divided_texts, load_texts, rated_by
from moreward.errors import BackboneError, ConfigError, DataError, MorewardError
from moreward.nn.backbone import Backbone, load_tokenizer, pools_by_mean, resolve_backbone
from moreward.nn.depth import cut_backbone, depth_of
from moreward.nn.losses import RewardLoss
from moreward.registry import find_recipe
from moreward.runs import identity
from moreward.scoring import Scorer, load
from moreward.train.parents import Parent, read_parent
from moreward.train.runner import Pairs, Work, make_encoder, open_run
from moreward.train.track import Reporter, Silent
from moreward.types import Rated

TEACHER = "teacher"
TARGETS = "teacher.json"
"""In the run's folder: what the teacher said, so that a run that is begun again need not ask it once more."""
PRACTICAL: Mapping[str, Any] = {
    "train": {"learning_rate": 1e-4, "epochs": 3, "metric": "loss", "eval_every": 0.5},
}


@dataclass(frozen=True)
class Agreement:
    """How near the student is to its teacher on held-out conversations. `pearson` and `spearman` of the rewards, None
    where one of them never changes; `same_order`: of two responses to one prompt, how often both put the same first,
    over `num_pairs`; `error`: root mean square, in the teacher's unit."""

    domain: str
    num_texts: int
    pearson: float | None
    spearman: float | None
    num_pairs: int
    same_order: float | None
    error: float


@dataclass(frozen=True)
class Distilled:
    """`agreement` by domain, the last one over all."""

    run: Path
    num_texts: int
    too_long: int
    num_bad_rows: int
    agreement: tuple[Agreement, ...]
    parameters: tuple[int, int]


def distil(
    run: str | Path,
    texts: Sequence[str],
    *,
    out: str | Path,
    layers: int | None = None,
    student: str | None = None,
    max_length: int | None = None,
    other_tokenizer: bool = False,
    truncate: bool = False,
    backbone: str | None = None,
    domain_key: str | None = None,
    shape: str | None = None,
    settings: Mapping[str, Any] | None = None,
    reporter: Reporter | None = None,
) -> Distilled:
    """Teach a student what the run `run` says of `texts`, and write it as a run. Begun again, it goes on to the same
    bits.

    `student` is a backbone directory, by default the teacher's; `layers` how many of its layers are kept.
    `max_length` the student's limit in tokens. `settings` are keys of a configuration (`train`, `seed`, `data`).

    Raises ConfigError with every fault, also where several processes were started; DataError for texts that are not
    usable; BackboneError, RunError as training does.
    """
    reporter = reporter or Silent()
    parent = read_parent(run)
    source = student or backbone or parent.card["config"]["backbone"]
    given = _config(parent, texts, out, source, layers, max_length, truncate, settings or {})
    found, config = _checked(parent, texts, given, source, layers, other_tokenizer, domain_key, shape)
    with open_run(config) as folder:
        teacher = load(run, backbone=backbone)
        kept, too_long = _that_fit(teacher, found, config.data.on_long)
        rows = _asked(teacher, kept, folder, reporter)
        train, val = divided_texts(rows, config.data.val_fraction, config.seed)
        parameters = teacher.system.num_parameters()
        del teacher
        if layers is not None:
            cut_backbone(source, layers, folder / "backbone")
        work = _work(config, folder, found, train, val, reporter)
        stage = replace(
            work.system.stages(work.pairwise)[0], name="distil", objective=RewardLoss(), rated=True, standardize=None
        )
        reports = work.fit([stage])
        agreement = _agreement(work, val)
        told: dict[str, Any] = {
            "distilled": {
                "texts": {"train": len(work.rated[0]), "val": len(work.rated[1]), "too_long_for_the_teacher": too_long},
                "layers": layers,
                "agreement": [asdict(one) for one in agreement],
            },
            "parents": [{"run": str(parent.run), "model": identity(parent.folder), "recipe": parent.config.recipe}],
        }
        work.write(reports, **told)
        return Distilled(
            folder,
            len(kept),
            too_long,
            len(found.quarantine),
            agreement,
            (parameters, work.system.num_parameters()),
        )


def _config(
    parent: Parent,
    texts: Sequence[str],
    out: str | Path,
    source: str,
    layers: int | None,
    max_length: int | None,
    truncate: bool,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The student's configuration, before it is checked."""
    told = parent.card["config"]
    pooling = parent.card["backbone"]["pooling"]
    if pooling == "spans" or source != told["backbone"]:  # spans are read from frozen backbones
        pooling = "mean" if pools_by_mean(resolve_backbone(source)) else "auto"
    base = {
        "recipe": "baseline",
        "tune": "full",
        "backbone": source if layers is None else str(Path(out) / "backbone"),
        "pooling": pooling,
        "out": str(out),
        "seed": told["seed"],
        "data": {
            "train": list(texts),
            "max_length": max_length or told["data"]["max_length"],
            "on_long": "truncate" if truncate else told["data"]["on_long"],
            "input_template": told["data"]["input_template"],
        },
        "system": {"head": "linear"},
    }
    return merge(merge(base, PRACTICAL), settings)


def _checked(
    parent: Parent,
    texts: Sequence[str],
    given: Mapping[str, Any],
    source: str,
    layers: int | None,
    other_tokenizer: bool,
    domain_key: str | None,
    shape: str | None,
) -> tuple[Texts, RunConfig]:
    """Everything that can be wrong, said at once. What is wrong with one thing alone keeps its own kind of error."""
    faults: list[MorewardError] = []
    found, config = Texts(), None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        told = f"got {os.environ['WORLD_SIZE']}, by torchrun or the like"
        faults.append(ConfigError(f"distil: runs in one process ({told}); start `moreward distil` by itself"))
    try:
        config = resolve(given)
        recipe_faults = [
            f"{key}: {value!r} is not for a student; it is a baseline that is trained whole. Leave it out"
            for key, value, allowed in (
                ("recipe", config.recipe, "baseline"),
                ("tune", config.tune, "full"),
            )
            if value != allowed
        ]
        faults += [ConfigError(fault) for fault in recipe_faults]
    except ConfigError as error:
        faults.append(error)
    try:
        depth = depth_of(source)
        if layers is not None and not 1 <= layers <= depth:
            faults.append(ConfigError(f"--layers: backbone {source!r} has {depth}; keep 1 to {depth} (got {layers})"))
        if not other_tokenizer and tokenizer_sha256(load_tokenizer(source)) != parent.tokenizer:
            faults.append(
                ConfigError(
                    f"--student: {source!r} has another tokenizer than the teacher, so other texts are too long and "
                    "other ends are cut. Say --other-tokenizer if that is meant"
                )
            )
    except BackboneError as error:
        faults.append(error)
    try:
        found = load_texts(list(texts), domain_key=domain_key, shape=shape)
    except DataError as error:
        faults.append(error)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise ConfigError([line for fault in faults for line in str(fault).splitlines()])
    assert config is not None
    return found, config


def _that_fit(teacher: Scorer, found: Texts, on_long: str) -> tuple[list[Rated], int]:
    """The conversations that the teacher reads whole, or all where they are cut. DataError where too few are left."""
    teacher.on_long = on_long
    kept = found.rows
    if on_long != "truncate":
        kept = [one for one in kept if not teacher.encoder.conversation(one.conversation).truncated]
    if len({one.group or str(one.conversation.prompt) for one in kept}) < 2:
        raise DataError(
            f"--texts: {len(kept)} of {len(found.rows)} conversations fit into the {teacher.encoder.max_length} tokens "
            "of the teacher, too few to learn from some and judge by others. Give more prompts, or say --truncate."
        )
    return kept, len(found.rows) - len(kept)


def _asked(teacher: Scorer, rows: Sequence[Rated], folder: Path, reporter: Reporter) -> list[Rated]:
    """The conversations with the teacher's rewards: those in the folder if they are of the same texts, else new."""
    texts = [[one.conversation.prompt, one.conversation.response] for one in rows]
    asked = hashlib.sha256(json.dumps([teacher.identity, teacher.on_long, texts], default=dict).encode()).hexdigest()
    path = folder / TARGETS
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["asked"] == asked:
            return rated_by(rows, TEACHER, kept["rewards"])
    reporter.start(TEACHER, len(rows), 0)
    rewards: list[float] = []
    for start in range(0, len(rows), 256):
        rewards += [r.number for r in teacher.score([one.conversation for one in rows[start : start + 256]])]
        reporter.step(len(rewards))
    reporter.finish()
    write_json(path, {"asked": asked, "rewards": rewards})
    return rated_by(rows, TEACHER, rewards)


def _work(
    config: RunConfig, folder: Path, found: Texts, train: list[Rated], val: list[Rated], reporter: Reporter
) -> Work:
    """The student in its folder, before any step."""
    domains = sorted({one.conversation.domain for one in train})
    backbone = Backbone.load(config.backbone, pooling=config.pooling)
    encoder: Encoder = make_encoder(config, backbone)
    recipe = find_recipe(config.recipe)
    torch.manual_seed(config.seed)
    system = recipe(recipe.Config.model_validate(config.system), backbone, domains)
    ratings = Ratings(train, val, found.quarantine, found.num_rows, found.num_repeated)
    return Work(config, folder, system, encoder, Pairs([], [], {}, [], ratings), domains, reporter)


@torch.no_grad()
def _agreement(work: Work, val: Sequence[Rated]) -> tuple[Agreement, ...]:
    """By domain, and over all, of the held-out conversations that fit."""
    scorer = Scorer(work.system, work.encoder, {"config": work.config.model_dump(mode="json")}, device="cpu")
    rows = [row.rated for row in work.rated[1]]
    student_N = np.array([r.number for r in scorer.score([one.conversation for one in rows])])
    teacher_N = np.array([one.ratings[TEACHER] for one in rows])
    domain_N = np.array([one.conversation.domain for one in rows])
    prompt_N = [str(one.conversation.prompt) for one in rows]
    made = [
        agreement_of(name, student_N[of], teacher_N[of], [p for p, ok in zip(prompt_N, of, strict=True) if ok])
        for name in sorted(set(domain_N.tolist()))
        for of in [domain_N == name]
    ]
    return (*made, agreement_of("all", student_N, teacher_N, prompt_N))


def agreement_of(domain: str, student_N: np.ndarray, teacher_N: np.ndarray, prompts: Sequence[str]) -> Agreement:
    """Of one set of conversations; `prompts` says which of them answer the same."""
    from scipy.stats import rankdata

    num = len(student_N)
    by_prompt: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt, []).append(i)
    same = [
        (student_N[a] - student_N[b]) * (teacher_N[a] - teacher_N[b]) > 0
        for rows in by_prompt.values()
        for i, a in enumerate(rows)
        for b in rows[i + 1 :]
        if teacher_N[a] != teacher_N[b]
    ]
    return Agreement(
        domain=domain,
        num_texts=num,
        pearson=_correlation(student_N, teacher_N),
        spearman=_correlation(rankdata(student_N), rankdata(teacher_N)) if num else None,
        num_pairs=len(same),
        same_order=float(np.mean(same)) if same else None,
        error=float(np.sqrt(np.mean((student_N - teacher_N) ** 2))) if num else 0.0,
    )


def _correlation(a_N: np.ndarray, b_N: np.ndarray) -> float | None:
    if len(a_N) < 2 or not (a_N.std() > 0 and b_N.std() > 0):
        return None
    return float(np.corrcoef(a_N, b_N)[0, 1])
