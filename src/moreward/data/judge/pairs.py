"""What is judged: every unordered pair of the responses in a row, once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moreward.types import Preference, Text, text_key


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two responses to one prompt. `given` is the one that the data prefers on the whole: 1, 2, or 0 for a tie.

    `id` names the row and, where the row has several pairs, which two of its responses these are.
    """

    prompt: Text
    first: Text
    second: Text
    domain: str
    id: str
    source: str = ""
    group: str = ""
    given: int = 0
    tools: Sequence[Mapping[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs to judge, and how many were left out because an equal one stands among them, or because the row is a
    label of one capability itself."""

    pairs: list[Pair]
    num_repeated: int = 0
    num_capability: int = 0


def pairs_of(preferences: Iterable[Preference]) -> Pairs:
    """All C(m, 2) pairs of each row's m responses, tied ones too. A row whose responses are all tied is no preference,
    so the loader does not hand it on."""
    rows: dict[tuple[str, ...], list[Preference]] = {}
    num_capability = 0
    for p in preferences:
        if p.capability:
            num_capability += 1
        else:
            rows.setdefault((p.source, p.domain, text_key(p.prompt)), []).append(p)
    every = [pair for row in rows.values() for pair in _pairs_of_row(row)]
    once: dict[tuple[str, ...], Pair] = {}
    for pair in every:
        once.setdefault((pair.domain, text_key(pair.prompt), *sorted(map(text_key, (pair.first, pair.second)))), pair)
    return Pairs(list(once.values()), len(every) - len(once), num_capability)


def _pairs_of_row(row: Sequence[Preference]) -> list[Pair]:
    known = row[0]
    responses: dict[str, Text] = {}
    better: set[tuple[str, str]] = set()
    for p in row:
        chosen, rejected = text_key(p.chosen), text_key(p.rejected)
        responses.setdefault(chosen, p.chosen)
        responses.setdefault(rejected, p.rejected)
        better.add((chosen, rejected))
    number = {key: i for i, key in enumerate(responses, 1)}
    name = known.name.rpartition("#")[0] or known.name if len(row) > 1 else known.name
    several = len(responses) > 2
    return [
        Pair(
            prompt=known.prompt,
            first=responses[a],
            second=responses[b],
            domain=known.domain,
            id=f"{name}#{number[a]}-{number[b]}" if several else name,
            source=known.source,
            group=known.group,
            given=_preferred((a, b) in better, (b, a) in better),
            tools=known.tools,
            chat_template_kwargs=known.chat_template_kwargs,
        )
        for a, b in itertools.combinations(responses, 2)
    ]


def _preferred(first: bool, second: bool) -> int:
    return 0 if first == second else (1 if first else 2)
