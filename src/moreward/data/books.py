"""What became of every row and of every pair: used, or put aside with a reason.

A row is used when at least one of its pairs is. A row of several pairs may lose some of them to the limit of tokens or
to the chat template and still be used: it counts among the rows used, its lost pairs among the pairs not used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from moreward.data.batches import EncodedSet
from moreward.data.load import Quarantined
from moreward.types import Preference

Reasons: TypeAlias = dict[str, dict[str, int]]
"""Counts by domain, then by reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Books:
    """`rows_read` = `rows_used` + those of `rows_not_used`; `pairs_made` = `pairs_used` + those of `pairs_not_used`.

    Ties and dropped duplicates make no pair. `rows_partly_used` are among `rows_used`.
    """

    rows_read: int
    rows_used: int
    rows_partly_used: int
    rows_not_used: Reasons
    pairs_made: int
    pairs_used: int
    pairs_not_used: Reasons

    def to_json(self) -> dict[str, Any]:
        """As the run's card holds it."""
        return {
            "rows_read": self.rows_read,
            "rows_used": self.rows_used,
            "rows_partly_used": self.rows_partly_used,
            "not_used": self.rows_not_used,
            "pairs_made": self.pairs_made,
            "pairs_used": self.pairs_used,
            "pairs_not_used": self.pairs_not_used,
        }


def account(put_aside: Sequence[Quarantined], sets: Sequence[EncodedSet]) -> Books:
    """The books of rows put aside when they were read, and of what the others became as tokens.

    A row of which every pair is refused has the reason of the first.
    """
    used = [_row(pair.preference) for one in sets for pair in one.pairs]
    refused = [
        (_row(preference), why) for one in sets for preference, why in zip(one.refused, one.quarantine, strict=True)
    ]
    used_rows, refused_rows = set(used), {row for row, _ in refused}
    lost = {row: why for row, why in reversed(refused) if row not in used_rows}
    return Books(
        rows_read=len(put_aside) + len(used_rows | refused_rows),
        rows_used=len(used_rows),
        rows_partly_used=len(used_rows & refused_rows),
        rows_not_used=_reasons([*put_aside, *lost.values()]),
        pairs_made=len(used) + len(refused),
        pairs_used=len(used),
        pairs_not_used=_reasons(why for _, why in refused),
    )


def _row(preference: Preference) -> str:
    """Where the pair was read; pairs without a place, such as those of message trees, are rows of their own."""
    return preference.source or preference.name


def _reasons(rows: Iterable[Quarantined]) -> Reasons:
    reasons: dict[str, Counter[str]] = {}
    for row in rows:
        reasons.setdefault(row.domain, Counter())[row.reason] += 1
    return {domain: dict(counts) for domain, counts in sorted(reasons.items())}
