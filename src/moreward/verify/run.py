"""A run, recomputed in this process."""

from __future__ import annotations

from pathlib import Path

from moreward.checkpoint import sha256_file
from moreward.errors import MorewardError
from moreward.items import as_text
from moreward.runs import identity, model_folder
from moreward.scoring import Scorer
from moreward.types import Conversation
from moreward.verify.checks import Check, Golden, Verified, compared, files_check

DECIDE = (
    "model.safetensors",
    "backbone/tokenizer.json",
    "backbone/tokenizer_config.json",
    "backbone/chat_template.jinja",
)


def verify_run(run: Path, *, backbone: str | None = None, against: Path | None = None) -> Verified:
    """All checks of a trained run. RunError where there is none; what does not match is told in the checks."""
    folder = model_folder(run)
    hashes = {name: sha256_file(folder / name) for name in DECIDE if (folder / name).is_file()}
    checks = [files_check(folder)]
    if against is not None:
        checks.append(same_model(folder, model_folder(against)))
    if not checks[0].holds:
        checks.append(Check("rewards", "not computed: a file is not what it was", done=False))
        return Verified(str(run), "run", tuple(checks), hashes)
    try:
        scorer = Scorer.load(run, device="cpu", backbone=backbone, deterministic=True, check=False)
        golden = golden_of(scorer)
    except MorewardError as error:
        checks.append(Check("rewards", "not computed: the run cannot be loaded", faults=(str(error),)))
        return Verified(str(run), "run", tuple(checks), hashes)
    checks += [tokens_check(scorer, golden), *golden_checks(scorer, golden), *company_checks(scorer, golden)]
    return Verified(str(run), "run", tuple(checks), hashes)


def golden_of(scorer: Scorer) -> list[Golden]:
    """The golden rewards that the run was written with."""
    return [
        Golden(
            prompt=as_text(told["prompt"]),
            response=as_text(told["response"]),
            reward=told["reward"],
            experts=told["experts"],
            ids=tuple(scorer.encoder.conversation(_conversation(told)).ids),
        )
        for told in scorer.card["golden"]
    ]


def same_model(folder: Path, other: Path) -> Check:
    """Every file of two trained models, and that they are the same."""
    here, there = identity(folder), identity(other)
    faults = () if here == there else (f"another model than {other}: SHA-256 {here[:12]}…, not {there[:12]}…",)
    return Check("model", f"is that of {other}", faults=faults)


def tokens_check(scorer: Scorer, golden: list[Golden]) -> Check:
    """That golden texts become tokens at all, and that there are some."""
    if not golden:
        return Check("golden", "none stored", faults=("no golden rewards are stored, so nothing can be compared",))
    longest = max(len(one.ids) for one in golden)
    return Check("golden", f"{len(golden)} texts of up to {longest} tokens, {len(scorer.experts)} experts")


def golden_checks(scorer: Scorer, golden: list[Golden]) -> list[Check]:
    """The reward of each golden text, and that of each expert, computed anew."""
    if not golden:
        return []
    items = [Conversation(prompt=one.prompt, response=one.response) for one in golden]
    now = scorer.golden(items)
    told = scorer.score(items, on_long="truncate")
    checks = [
        compared(
            "rewards",
            "golden rewards recomputed",
            [one["reward"] for one in now],
            [one.reward for one in golden],
            [scorer.allowed(reward.weights) for reward in told],
        )
    ]
    if all(not one.experts for one in golden):
        return checks
    names = list(golden[0].experts)
    rows = [(i, name) for i in range(len(golden)) for name in names]
    checks.append(
        compared(
            "experts",
            f"each of {len(names)} experts on every golden text",
            [now[i]["experts"].get(name, float("nan")) for i, name in rows],
            [golden[i].experts[name] for i, name in rows],
            [scorer.allowed([name]) for _, name in rows],
            [f"golden text {i}, expert {name}" for i, name in rows],
        )
    )
    return checks


def company_checks(scorer: Scorer, golden: list[Golden]) -> list[Check]:
    """What a text gets alone, with all others, in another order and beside a long text: the same bits where a reward
    is to depend on its text alone, else the same but for rounding."""
    if not golden:
        return []
    items = [Conversation(prompt=one.prompt, response=one.response) for one in golden]
    long = Conversation(prompt="A long one.", response="and more of it " * 2000)

    def scored(some: list[Conversation]) -> list[float]:
        return [reward.number for reward in scorer.score(some, on_long="truncate")]

    alone = [scored([item])[0] for item in items]
    limits = [scorer.allowed(reward.weights) for reward in scorer.score(items, on_long="truncate")]
    checks = []
    for name, deterministic in (("company", True), ("free batches", False)):
        scorer.deterministic = deterministic
        ways = {
            "together": scored(items),
            "in reverse": scored(items[::-1])[::-1],
            "beside a long text": scored([long, *items])[1:],
        }
        found = [value for way in ways.values() for value in way]
        checks.append(
            compared(
                name,
                "alone, together, reversed, beside a long text: "
                + ("the same bits (--deterministic)" if deterministic else "the same but for rounding"),
                found,
                alone * len(ways),
                0.0 if deterministic else limits * len(ways),
                [f"golden text {i} {way}" for way in ways for i in range(len(items))],
            )
        )
    scorer.deterministic = True
    return checks


def _conversation(told: dict[str, object]) -> Conversation:
    return Conversation(prompt=as_text(told["prompt"]), response=as_text(told["response"]))
