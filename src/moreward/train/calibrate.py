"""Fit what uncertainty needs, on pairs that the system was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moreward.calibration import (
    EVERYONE,
    MIN_PAIRS,
    Calibration,
    before_and_after,
    fit_space,
    fit_temperatures,
    out_of_fold,
    write_calibration,
)
from moreward.data.batches import EncodedPair, encode_pairs, side
from moreward.data.split import linked_groups, split_by_group
from moreward.errors import DataError
from moreward.runs import identity, model_folder
from moreward.scoring import Scorer
from moreward.types import Preference

PROMPTS_PER_DOMAIN = 512
"""At most this many prompts of a domain, evenly spaced, say where it lies."""


def calibrate(
    scorer: Scorer, *, known: Sequence[EncodedPair], usual: Sequence[EncodedPair], judged: Sequence[EncodedPair]
) -> Calibration | None:
    """Temperatures from `judged`, the place of each domain from the prompts of `known`, the scale of distances from
    those of `usual`. None where there is nothing to fit one of them on.

    Pairs that judge one capability say nothing of the whole reward, and pairs of token ids cannot be scored: they are
    left out of the temperatures and counted."""
    pairs = [p.preference for p in judged if p.preference.token_ids is None and not p.preference.capability]
    if not (known and usual and pairs):
        return None
    margin_B, expert_B = _margins(scorer, pairs)
    temperatures = fit_temperatures(margin_B, expert_B)
    tempered_B = out_of_fold(margin_B, expert_B, linked_groups(pairs))
    known_prompts, domain_P = spaced_prompts(known)
    usual_prompts, _ = spaced_prompts(usual)
    report: dict[str, Any] = {
        "pairs": len(pairs),
        "pairs_left_out": len(judged) - len(pairs),
        "temperatures": {name or "all": t for name, t in temperatures.items()},
        "too_few_pairs_for_their_own": _too_few(expert_B),
        "quality": before_and_after(margin_B, tempered_B, expert_B),
        "measured": "out of fold: no pair had a part in the temperature that it is judged with",
        "prompts": {"known": len(known_prompts), "held_out": len(usual_prompts)},
    }
    space = fit_space(scorer.read_prompts(known_prompts), domain_P, scorer.read_prompts(usual_prompts))
    return Calibration(temperatures=temperatures, space=space, report=report)


def _margins(scorer: Scorer, pairs: Sequence[Preference]) -> tuple[np.ndarray[Any, Any], list[str]]:
    """What the system says of each pair, and the expert that spoke; EVERYONE where two did."""
    items = [side(p, which) for p in pairs for which in ("chosen", "rejected")]
    rewards = scorer.score(items, on_long="truncate")
    both = list(zip(rewards[::2], rewards[1::2], strict=True))
    margin_B = np.array([a.number - b.number for a, b in both], dtype=np.float64)
    return margin_B, [a.expert if a.expert == b.expert else EVERYONE for a, b in both]


def _too_few(expert_B: Sequence[str]) -> list[str]:
    return [e for e in sorted(set(expert_B) - {EVERYONE}) if expert_B.count(e) < MIN_PAIRS]


def spaced_prompts(
    pairs: Sequence[EncodedPair], limit: int = PROMPTS_PER_DOMAIN
) -> tuple[list[tuple[int, ...]], list[str]]:
    """Distinct prompts with their domains, `limit` of a domain, in an order that is not that of the pairs."""
    by_domain: dict[str, set[tuple[int, ...]]] = {}
    for pair in pairs:
        by_domain.setdefault(pair.preference.domain, set()).add(tuple(pair.chosen.prompt_ids))
    chosen = [(ids, domain) for domain in sorted(by_domain) for ids in _spaced(sorted(by_domain[domain]), limit)]
    return [ids for ids, _ in chosen], [domain for _, domain in chosen]


def _spaced(prompts: list[tuple[int, ...]], limit: int) -> list[tuple[int, ...]]:
    keep = np.linspace(0, len(prompts) - 1, min(len(prompts), limit)).round().astype(int)
    return [prompts[i] for i in keep]


def calibrate_run(scorer: Scorer, run: Path, preferences: Sequence[Preference], *, seed: int = 0) -> Calibration:
    """Fit on pairs of the user's choice and store it beside the model, in the place of an earlier one.

    Temperatures come from all pairs; half of the prompt groups say where the domains lie, the others how far is usual.
    DataError where a half is empty, or no pair fits the model's limit."""
    encoded = encode_pairs(scorer.encoder, preferences, scorer.domains, on_long=scorer.on_long)
    sides = split_by_group([p.preference for p in encoded.pairs], {"known": 0.5, "usual": 0.5}, seed=seed)
    places = {id(p) for p in sides["known"]}
    known, usual = ([p for p in encoded.pairs if (id(p.preference) in places) is wanted] for wanted in (True, False))
    found = calibrate(scorer, known=known, usual=usual, judged=encoded.pairs)
    if found is None:
        raise DataError(
            f"{len(encoded.pairs)} pairs are not enough: needed are two different prompts at least, better a hundred "
            "a domain, and pairs of texts that judge the whole response"
        )
    lost = {"pairs_not_used": len(encoded.refused), "truncated": encoded.num_truncated}
    result = replace(found, report={**found.report, **lost})
    folder = model_folder(run)
    write_calibration(folder, result, model=identity(folder))
    return result
