"""`moreward demo`: generated preferences that conflict, one model, a mixture of the same budget, the difference."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moreward.config import resolve
from moreward.data.split import linked_groups
from moreward.data.synthetic import DOMAINS, generate_splits, write_pairs
from moreward.errors import RunError
from moreward.evals.compare import compare
from moreward.evals.run import Result, evaluate_run
from moreward.report import render_evaluation
from moreward.scoring import Scorer, load
from moreward.train.runner import train
from moreward.train.track import Console
from moreward.types import Preference

RANK = 8
DEMO_DOMAINS = DOMAINS[:4]
SINGLE = "one model"


def run_demo(out: Path, *, pairs: int, noise: float, seed: int, say: Callable[[str], Any]) -> None:
    """Write `out/data`, train `out/single` and `out/mixture`, print the comparison and a few explained rewards."""
    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out}: is not empty. Choose another folder with --out, or remove it.")
    started = time.monotonic()
    splits = generate_splits(pairs, pairs // 8, 100, seed=seed, noise=noise, domains=DEMO_DOMAINS)
    say(
        f"{len(DEMO_DOMAINS)} domains whose preferences conflict ({', '.join(DEMO_DOMAINS)}), {pairs} training pairs "
        f"each, {noise:.0%} of their labels flipped.\n"
    )
    files = {name: write_pairs(out / "data" / f"{name}.jsonl", rows) for name, rows in splits.items()}
    single = train(
        _config("base_lora", out / "single", files, seed, rank=RANK * (len(DEMO_DOMAINS) + 1)), reporter=Console()
    )
    mixture = train(_config("arliss", out / "mixture", files, seed, rank=RANK), reporter=Console())
    scorers = {"mixture": load(mixture), SINGLE: load(single)}
    results = {name: evaluate_run(scorer, splits["test"], seed=seed) for name, scorer in scorers.items()}
    say("\n" + render(results))
    say(explain(scorers["mixture"], splits["test"]))
    say(f"\nDone in {time.monotonic() - started:.0f} s. In {out}: data, single, mixture. Next:")
    say(f"  moreward eval {mixture} --data {files['test']} --baseline {single}")
    say(f"  moreward score {mixture} YOUR.jsonl -o rewards.jsonl --explain")


def _config(recipe: str, out: Path, files: dict[str, str], seed: int, *, rank: int) -> Any:
    """Both get the same pairs, steps and adapter parameters: one adapter of rank (E + 1)·r against E + 1 of rank r,
    at the same scale alpha / rank."""
    return resolve(
        {
            "recipe": recipe,
            "backbone": "minilm",
            "out": str(out),
            "seed": seed,
            "data": {"train": files["train"], "val": files["val"], "max_length": 160, "on_long": "truncate"},
            "train": {"epochs": 2, "batch_size": 16, "learning_rate": 1e-3, "eval_every": 1, "patience": 0},
            "system": {"rank": rank, "alpha": 2.0 * rank, "adapter_layers": 2},
        }
    )


def render(results: dict[str, Result]) -> str:
    """The mixture's table, tested against the single model on the same pairs."""
    mixture = results["mixture"]
    groups, domains = linked_groups(mixture.preferences), [p.domain for p in mixture.preferences]
    comparison = compare({k: r.correct for k, r in results.items()}, groups, domains, baseline=SINGLE)
    return render_evaluation(mixture.evaluation, mixture.routing, comparison, name="mixture")


def explain(scorer: Scorer, test: Sequence[Preference]) -> str:
    """One pair of each domain: both responses, their rewards, and what every expert says."""
    lines = ["\nWhat the experts say (standardised rewards; * marks the expert that the router chose):"]
    for domain in scorer.domains:
        pair = next(p for p in test if p.domain == domain)
        found = scorer.compare(pair.prompt, [pair.chosen, pair.rejected], explain=True)
        lines += [f"\n{domain}: {pair.prompt}", *_explained("preferred", pair.chosen, found.rewards[0])]
        lines += _explained("rejected", pair.rejected, found.rewards[1])
    return "\n".join(lines)


def _explained(label: str, text: Any, reward: Any) -> list[str]:
    shown = f"{text[:88]}…" if len(text) > 88 else text
    said = "  ".join(f"{n}{'*' if n == reward.expert else ''} {r:+.2f}" for n, r in reward.expert_rewards.items())
    return [f"  {label:<9} {reward.reward:+.2f}  {shown}", f"  {'':<9} {'':>5}  {said}"]
