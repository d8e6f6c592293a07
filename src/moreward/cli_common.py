"""What several commands do: load a run, read pairs as it does, evaluate it, say what was left out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moreward.errors import MorewardError

if TYPE_CHECKING:
    from moreward.client import Client
    from moreward.evals.run import Result
    from moreward.scoring import Scorer
    from moreward.types import Preference


def load_scorer(
    run: Path,
    *,
    truncate: bool,
    backbone: str | None,
    device: str = "auto",
    **more: Any,
) -> Scorer:
    """`more` are further arguments of `scoring.load`."""
    from moreward.scoring import load

    scorer = load(run, backbone=backbone, device=device, **more)
    if truncate:
        scorer.on_long = "truncate"
    return scorer


def load_pairs(
    data: list[str], run: Path, *, domain_key: str | None = None, shape: str | None = None
) -> list[Preference]:
    """Pairs read as the run's own training data was, unless an option says otherwise."""
    from moreward.data.load import load_preferences, of_whole_responses
    from moreward.runs import model_folder, read_card

    told = read_card(model_folder(run))["config"]["data"]
    shape = shape or told["shape"]
    loaded = load_preferences(
        data,
        shape=None if shape == "auto" else shape,
        domain=told["domain"],
        domain_key=domain_key or told["domain_key"],
        domain_map=told["domain_map"],
        tags=told.get("tags"),
        max_bad_share=told["max_bad_share"],
        use_margin=False,
    )
    loaded = of_whole_responses(loaded)
    if loaded.quarantine:
        told_why = Counter(row.reason for row in loaded.quarantine)
        why = ", ".join(f"{reason} {n:,}" for reason, n in sorted(told_why.items()))
        typer.echo(f"{len(loaded.quarantine)} rows not used ({why}); see: moreward data check", err=True)
    return loaded.preferences


def evaluated(
    run: Path,
    preferences: list[Preference],
    *,
    truncate: bool,
    backbone: str | None,
    device: str,
    seed: int = 0,
    every_expert: bool = False,
) -> Result:
    return measured(
        load_scorer(run, truncate=truncate, backbone=backbone, device=device), preferences, seed, every_expert
    )


def measured(scorer: Scorer, preferences: list[Preference], seed: int = 0, every_expert: bool = False) -> Result:
    """Evaluate; what a frozen backbone says of a text is looked up where it is known."""
    from moreward.evals.run import evaluate_run
    from moreward.train.runner import feature_store

    if scorer.system.config.tune != "frozen":
        return evaluate_run(scorer, preferences, seed=seed, every_expert=every_expert)
    store = feature_store(scorer.card["config"]["backbone"], scorer.system.backbones()[0])
    scorer.keep_features(store)
    result = evaluate_run(scorer, preferences, seed=seed, every_expert=every_expert)
    store.save()
    return result


def check_same_pairs(results: dict[str, Result]) -> None:
    first = next(iter(results.values())).preferences
    for name, result in results.items():
        if result.preferences != first:
            raise MorewardError(f"{name}: fits other pairs than the first run does; use --truncate for all of them")


def say_too_long(result: Result) -> None:
    if result.too_long:
        counts = ", ".join(f"{d} {n}" for d, n in sorted(result.too_long.items()))
        typer.echo(f"left out, longer than the model's limit: {counts} (allow them with --truncate)", err=True)


def remote_scorer(server: str, *, truncate: bool) -> Client:
    """A server as a scorer. Long answers are waited for: a job of hours should outlive a restart of the server."""
    from moreward.client import Client

    return Client(server, retries=10, on_long="truncate" if truncate else "error")
