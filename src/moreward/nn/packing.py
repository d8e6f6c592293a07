"""Texts back to back in one stream of tokens: no padding, and a common prefix once.

N rows (texts, each with an adapter), S segments (contiguous tokens of one text), L leaves (segments that end a text),
T tokens of the whole stream, D hidden. Without sharing, segments and leaves are the distinct rows.

Tokens stand ordered by adapter, so that an adapter's tokens are one slice, and within it by length, so that texts of
one length are attended to in one call. `leaf_of_N` brings the answers back into the order of arrival.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

MIN_SHARED = 16
"""Tokens that a common prefix must have to be worth a segment of its own."""

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """`tokens` of a text from `position` on, behind the segment `parent` (None where the text begins here)."""

    tokens: Tokens
    adapter: int
    parent: int | None = None
    position: int = 0


@dataclass(frozen=True)
class Run:
    """`count` neighbouring segments of `length` tokens each, from token `start` on."""

    start: int
    count: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.count * self.length


@dataclass(frozen=True)
class Branch:
    """Tokens `start..stop` whose text begins with the prefix at tokens `prefix_start..prefix_stop`."""

    prefix_start: int
    prefix_stop: int
    start: int
    stop: int


@dataclass(frozen=True)
class Group:
    """Neighbouring tokens (or leaves) `start..stop` that meet the same adapter."""

    adapter: int
    start: int
    stop: int


class Stream:
    """The tokens of a forward and how they belong together. Immutable."""

    def __init__(
        self,
        segments: Sequence[Segment],
        leaf_segments: Sequence[int],
        leaf_of_N: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        """`leaf_segments` are the segments that end a text, in order; row n ends in leaf `leaf_of_N[n]`."""
        self.segments = list(segments)
        self.leaf_segments = list(leaf_segments)
        self.leaf_of_N = list(leaf_of_N)
        self.device = device
        self.memo: dict[Any, Any] = {}
        """What a family needs in every layer of this stream and computes once."""
        self.starts: list[int] = []
        num_tokens = 0
        for segment in self.segments:
            self.starts.append(num_tokens)
            num_tokens += len(segment.tokens)
        self.num_tokens = num_tokens

    @cached_property
    def ids_T(self) -> Tensor:
        tokens = [token for segment in self.segments for token in segment.tokens]
        return torch.tensor(tokens, dtype=torch.long, device=self.device)

    @cached_property
    def position_T(self) -> Tensor:
        ranges = [torch.arange(s.position, s.position + len(s.tokens)) for s in self.segments]
        return torch.cat(ranges).to(self.device)

    @cached_property
    def cuts_S1(self) -> Tensor:
        """Where each segment begins, and where the last ends; int32."""
        return torch.tensor([*self.starts, self.num_tokens], dtype=torch.int32, device=self.device)

    @cached_property
    def _read(self) -> list[Tensor]:
        return [self.places(segment) for segment in range(len(self.segments))]

    @cached_property
    def read_M(self) -> Tensor:
        """For one segment after another the places of all of its text up to there."""
        return torch.cat(self._read).to(self.device)

    @cached_property
    def read_cuts_S1(self) -> Tensor:
        """As `cuts_S1`, of `read_M`."""
        stops = torch.tensor([0, *map(len, self._read)]).cumsum(0)
        return stops.to(device=self.device, dtype=torch.int32)

    @cached_property
    def runs(self) -> list[Run]:
        """Neighbours of one length, whatever their adapters."""
        return self._runs(range(len(self.segments)))

    @cached_property
    def runs_of_groups(self) -> list[list[Run]]:
        """As `runs`, within each adapter group."""
        by_adapter = groupby(range(len(self.segments)), key=lambda s: self.segments[s].adapter)
        return [self._runs(list(same)) for _, same in by_adapter]

    def _runs(self, segments: Sequence[int]) -> list[Run]:
        runs = []
        for length, same in groupby(segments, key=lambda s: len(self.segments[s].tokens)):
            members = list(same)
            runs.append(Run(self.starts[members[0]], len(members), length))
        return runs

    @cached_property
    def branches(self) -> list[Branch]:
        """Every segment with each of the segments that stand before it in its text."""
        ancestors = [self._ancestors(s) for s in range(len(self.segments))]
        branches = []
        for depth in range(max(map(len, ancestors))):
            place = 0
            for prefix, same in groupby(ancestors, key=lambda chain: chain[depth] if depth < len(chain) else None):
                first, place = place, place + len(list(same))
                if prefix is not None:
                    span = (self.starts[prefix], self._stop(prefix), self.starts[first], self._stop(place - 1))
                    branches.append(Branch(*span))
        return branches

    def _ancestors(self, segment: int) -> list[int]:
        parent = self.segments[segment].parent
        return [] if parent is None else [parent, *self._ancestors(parent)]

    @cached_property
    def groups(self) -> list[Group]:
        """Tokens by adapter."""
        return _groups([s.adapter for s in self.segments], [len(s.tokens) for s in self.segments])

    @cached_property
    def leaf_groups(self) -> list[Group]:
        """Leaves by adapter."""
        return _groups([self.segments[s].adapter for s in self.leaf_segments], [1] * len(self.leaf_segments))

    @cached_property
    def first_L(self) -> Tensor:
        """The token that each leaf's segment begins with."""
        return torch.tensor([self.starts[s] for s in self.leaf_segments], device=self.device)

    @cached_property
    def last_L(self) -> Tensor:
        """The token that each leaf ends with."""
        return torch.tensor([self._stop(s) - 1 for s in self.leaf_segments], device=self.device)

    @cached_property
    def max_length(self) -> int:
        """Tokens of the longest text."""
        return max(s.position + len(s.tokens) for s in self.segments)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest segment."""
        return max(len(s.tokens) for s in self.segments)

    def _stop(self, segment: int) -> int:
        return self.starts[segment] + len(self.segments[segment].tokens)

    def without_adapters(self, *, share_prefixes: bool) -> tuple[Stream, Tensor]:
        """The same texts, each once whatever adapters it meets, and for each token of this stream its place there."""
        rows = [self.text_of(s) for s in self.leaf_segments]
        lower = pack(rows, [-1] * len(rows), share_prefixes=share_prefixes, device=self.device)
        place_T = torch.empty(self.num_tokens, dtype=torch.long)
        for leaf, segment in enumerate(self.leaf_segments):
            there = lower.places(lower.leaf_segments[lower.leaf_of_N[leaf]])
            here = self.places(segment)
            place_T[here] = there
        return lower, place_T.to(self.device)

    def places(self, segment: int) -> Tensor:
        """Where the tokens of the whole text that ends in `segment` stand in the stream."""
        own = torch.arange(self.starts[segment], self._stop(segment))
        parent = self.segments[segment].parent
        return own if parent is None else torch.cat([self.places(parent), own])

    def text_of(self, segment: int) -> Tokens:
        """All the tokens of the text that ends in `segment`."""
        parent = self.segments[segment].parent
        return (() if parent is None else self.text_of(parent)) + self.segments[segment].tokens


def pack(
    texts: Sequence[Tokens],
    adapters: Sequence[int],
    *,
    share_prefixes: bool = False,
    active_tokens: int | None = None,
    device: torch.device | str = "cpu",
) -> Stream:
    """Row n is `texts[n]` under adapter `adapters[n]` (-1 is none); equal rows stand in the stream once.

    For causal attention, where a token's state depends only on what stands before it: `share_prefixes` lets common
    beginnings stand once, and with `active_tokens` an adapter acts on that many tokens at the end of a text only, all
    before them being shared by every adapter.
    """
    assert all(texts), "every text has a token"
    rows = list(zip(adapters, texts, strict=True))
    builder = _Builder(share_prefixes)
    if active_tokens is None:
        for adapter, same in groupby(sorted(set(rows)), key=lambda row: row[0]):
            builder.add(adapter, {tokens for _, tokens in same})
    else:
        bare = {tokens for adapter, tokens in rows if adapter < 0}
        cut = {row: (row[1][:-active_tokens], row[1][-active_tokens:]) for row in rows if row[0] >= 0}
        builder.add(-1, bare | {base for base, _ in cut.values() if base})
        builder.add_behind(cut)
    order = sorted({builder.segment_of[row] for row in rows})
    leaf_of = {segment: leaf for leaf, segment in enumerate(order)}
    return Stream(builder.segments, order, [leaf_of[builder.segment_of[row]] for row in rows], device)


class _Builder:
    """Collects segments, an adapter's after each other; `segment_of` is where a (adapter, text) ends."""

    def __init__(self, share_prefixes: bool) -> None:
        self.share_prefixes = share_prefixes
        self.segments: list[Segment] = []
        self.segment_of: dict[tuple[int, Tokens], int] = {}

    def add(self, adapter: int, texts: set[Tokens]) -> None:
        """Whole texts under one adapter."""
        families = _families(sorted(texts)) if self.share_prefixes else [(0, sorted(texts))]
        for num_shared, members in sorted(families, key=lambda family: family[0]):
            parent = None
            if num_shared:
                parent = len(self.segments)
                self.segments.append(Segment(members[0][:num_shared], adapter))
            for tokens in sorted(members, key=len):
                self.segment_of[adapter, tokens] = len(self.segments)
                self.segments.append(Segment(tokens[num_shared:], adapter, parent, num_shared))

    def add_behind(self, ends: Mapping[tuple[int, Tokens], tuple[Tokens, Tokens]]) -> None:
        """The ends of texts whose beginnings stand already under no adapter."""
        for (adapter, tokens), (base, end) in sorted(ends.items(), key=lambda one: (one[0][0], len(one[1][1]), one[0])):
            parent = self.segment_of[-1, base] if base else None
            self.segment_of[adapter, tokens] = len(self.segments)
            self.segments.append(Segment(end, adapter, parent, len(base)))


def _families(texts: list[Tokens]) -> list[tuple[int, list[Tokens]]]:
    """Sorted texts in families with the number of tokens that all members begin with; 0 for those that stay alone.

    A text joins while the family keeps at least half of what it shares: a template that all prompts begin with does
    not break up the families of each prompt.
    """
    if not texts:
        return []
    alone: list[Tokens] = []
    families: list[tuple[int, list[Tokens]]] = []
    members, num_shared = texts[:1], 0
    for text in texts[1:]:
        common = _num_common(members[0], text)
        if common >= max(MIN_SHARED, num_shared // 2):
            num_shared = common if len(members) == 1 else min(num_shared, common)
            members.append(text)
        else:
            _close(families, alone, members, num_shared)
            members, num_shared = [text], 0
    _close(families, alone, members, num_shared)
    return [(0, alone), *families] if alone else families


def _close(
    families: list[tuple[int, list[Tokens]]], alone: list[Tokens], members: list[Tokens], num_shared: int
) -> None:
    if len(members) > 1:
        families.append((num_shared, members))
    else:
        alone += members


def _num_common(a: Tokens, b: Tokens) -> int:
    """Length of the common beginning, at least one token of each text left over."""
    limit = min(len(a), len(b)) - 1
    if a[:limit] == b[:limit]:
        return limit
    low, high = 0, limit  # a[:low] is common, a[:high] is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low


def _groups(adapters: Sequence[int], sizes: Sequence[int]) -> list[Group]:
    groups, start = [], 0
    for adapter, same in groupby(zip(adapters, sizes, strict=True), key=lambda pair: pair[0]):
        stop = start + sum(size for _, size in same)
        groups.append(Group(adapter, start, stop))
        start = stop
    return groups
