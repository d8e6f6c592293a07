"""Train, validation and test sides such that no group and no prompt stands on two of them."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from moreward.errors import ConfigError, DataError
from moreward.types import Preference, text_key

Kind = TypeVar("Kind", bound=Hashable)


def split_by_group(
    preferences: Sequence[Preference], fractions: Mapping[str, float], seed: int
) -> dict[str, list[Preference]]:
    """Divide by `linked_groups`, every domain, and in it what judges each capability, as near to the fractions as
    whole groups allow.

    Groups come in an order drawn by `seed` and go where their domains lack most rows, so a side gets at most
    one group more than its share of a domain (groups of several domains or capabilities aside). Which side a
    group takes does not depend on the order of the rows, and rows keep their order within a side.

    Raises:
        ConfigError: fractions that are not positive or do not sum to 1.
    """
    _check(fractions)
    label_of = linked_groups(preferences)
    rows_of = _count(label_of, [(p.domain, p.capability) for p in preferences])
    groups = sorted(rows_of)
    random.Random(seed).shuffle(groups)
    totals = Counter((p.domain, p.capability) for p in preferences)
    lacking = {side: {d: share * n for d, n in totals.items()} for side, share in fractions.items()}
    side_of = {}
    for group in groups:
        side = max(fractions, key=lambda name: sum(n * lacking[name][d] for d, n in rows_of[group].items()))
        side_of[group] = side
        for judged, n in rows_of[group].items():
            lacking[side][judged] -= n
    sides: dict[str, list[Preference]] = {side: [] for side in fractions}
    for preference, label in zip(preferences, label_of, strict=True):
        sides[side_of[label]].append(preference)
    return sides


def linked_groups(preferences: Sequence[Preference]) -> list[str]:
    """A label for each row: rows that have a group or a prompt in common, directly or by way of others, share it.

    A group may be finer than the prompt (an annotator) or wider (a document), so neither alone keeps sides apart.
    """
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while (above := parent.setdefault(key, key)) != key:
            parent[key] = key = parent[above]  # halves the way for the next one
        return key

    keys = [_link_keys(preference) for preference in preferences]
    for first, *others in keys:
        for other in others:
            low, high = sorted((root(first), root(other)))
            parent[high] = low
    return [root(first) for first, *_ in keys]


def not_held_out(preferences: Sequence[Preference], held_out: Sequence[Preference]) -> list[str]:
    """A sentence for each domain that has no pair in `held_out`: how much of it hangs together, and what to do."""
    num_pairs = Counter(p.domain for p in preferences)
    missing = sorted(num_pairs.keys() - {p.domain for p in held_out})
    rows_of = _count(linked_groups(preferences), [p.domain for p in preferences]) if missing else {}
    largest = {domain: max(counts[domain] for counts in rows_of.values()) for domain in missing}
    return [
        f"domain {domain}: none of its {num_pairs[domain]:,} pairs is held out, so nothing watches how it is learned. "
        f"Pairs that share a prompt or a group stay on one side, and {largest[domain]:,} of them hang together so. "
        "Name held-out pairs with data.val, raise data.val_fraction, or leave out a `group` column that joins too much."
        for domain in missing
    ]


def _link_keys(preference: Preference) -> list[str]:
    if ids := preference.token_ids:
        known = ids.prompt or (min(ids.chosen, ids.rejected), max(ids.chosen, ids.rejected))
        return [*([f"group/{preference.group}"] if preference.group else []), f"tokens/{known}"]
    prompt = preference.prompt
    if len(prompt) == 1 and not isinstance(prompt, str) and prompt[0].get("role") == "user":
        prompt = str(prompt[0].get("content") or "")  # one user turn is the same prompt as its bare text
    is_blank = not (prompt.strip() if isinstance(prompt, str) else prompt)
    responses = sorted((preference.chosen, preference.rejected), key=text_key)
    by_text = text_key(*responses) if is_blank else text_key(prompt)
    return [*([f"group/{preference.group}"] if preference.group else []), f"prompt/{by_text}"]


def _check(fractions: Mapping[str, float]) -> None:
    shown = dict(fractions)
    if not all(share > 0 for share in fractions.values()):
        raise ConfigError(f"split: every fraction must be greater than 0 (got {shown})")
    if not math.isclose(sum(fractions.values()), 1.0, abs_tol=1e-6):
        raise ConfigError(f"split: fractions must sum to 1 (got {shown})")


def _count(label_of: Sequence[str], kinds: Sequence[Kind]) -> dict[str, Counter[Kind]]:
    """Rows of each kind by group."""
    rows_of: dict[str, Counter[Kind]] = {}
    for label, kind in zip(label_of, kinds, strict=True):
        rows_of.setdefault(label, Counter())[kind] += 1
    return rows_of


def draw_shots(
    preferences: Sequence[Preference], num_shots: int, seed: int
) -> tuple[list[Preference], list[Preference]]:
    """Whole prompt groups by chance until there are `num_shots` pairs, and the rest. DataError where none is left."""
    groups = linked_groups(preferences)
    order = sorted(set(groups), key=lambda group: text_key(str(seed), group))
    drawn: set[str] = set()
    for group in order:
        if sum(g in drawn for g in groups) < num_shots:
            drawn.add(group)
    shots = [p for p, group in zip(preferences, groups, strict=True) if group in drawn]
    rest = [p for p, group in zip(preferences, groups, strict=True) if group not in drawn]
    if not shots or not rest:
        raise DataError(f"{len(preferences)} pairs of {len(order)} prompts: {num_shots} shots leave none to evaluate")
    return shots, rest
