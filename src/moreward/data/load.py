"""Preference files to `Preference`s, with every row accounted for.

The row is the unit: it is kept (at least one of its pairs is) or it stands in the quarantine with one reason,
so `num_rows == num_kept_rows + len(quarantine)` always. A row that holds several pairs is quarantined whole when
one of its pairs is faulty; its duplicate pairs are dropped one by one, and it is a `duplicate` when none is left.
A pair that already stands in another domain is a fault of its row, `duplicate_in_other_domain`: only the user can
say which of the two is right.

The domain of a row, first that applies:

1. its `domain` column, or the column named by `domain_key`;
2. `domain=`;
3. the first `domain_map` pattern that matches the file's name or path;
4. the domain of a benchmark format (`shp`, `hellaswag`, ...);
5. the file's name without its suffix, split words (train, val, test, ...), plain words (data, pairs, ...) and shard
   numbers at either end: `code.train.jsonl.zst` is `code`, `train-00000-of-00002.parquet` has none;
6. `default`.

Then `domain_map` may rename it: its keys are also domain values.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from moreward.data.benchmarks import BENCHMARKS, oasst
from moreward.data.formats import Converted, convert_row, find_shape
from moreward.data.reasons import CAPABILITY, NOT_BAD
from moreward.data.rows import BadRow, Item, RawRow
from moreward.data.shapes import SHAPES, Shape
from moreward.data.sources import READERS, files_of, find_sources, read_rows, retagged
from moreward.data.split import linked_groups
from moreward.data.values import Row, RowError, optional_text
from moreward.errors import DataError
from moreward.types import NO_DOMAIN, Preference, text_key

FORMATS: Mapping[str, Shape] = {**SHAPES, **BENCHMARKS}
"""What `--format` and `shape=` may name, beside `oasst`."""

OASST = "oasst"
_OASST_FIELDS = frozenset(["message_id", "parent_id", "message_tree_id", "text", "role", "lang"])

_NOTHING: Mapping[str, str] = MappingProxyType({})
_SPLIT_WORDS = ("train", "training", "val", "valid", "validation", "dev", "eval", "test")
_PLAIN_WORDS = ("data", "dataset", "pairs", "preference", "preferences", "rows", "of")
_NUM_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Quarantined:
    """One row that is not trained on, and why."""

    file: str
    line: int
    domain: str
    reason: str
    field: str
    detail: str

    def __str__(self) -> str:
        what = f"{self.field}: {self.detail}" if self.field else self.detail
        return f"{self.file}:{self.line}: {what}"


@dataclass(frozen=True, slots=True)
class Loaded:
    """What `load_preferences` read. `duplicates` and `num_ties` count pairs, `contradictions` holds pairs of
    preferences that are both kept: the second prefers what the first rejects. `skipped_files` stand among the data
    and may be data, but cannot be read."""

    preferences: list[Preference]
    quarantine: list[Quarantined]
    num_rows: int
    num_kept_rows: int
    num_ties: int = 0
    duplicates: int = 0
    contradictions: list[tuple[Preference, Preference]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    skipped_files: list[str] = field(default_factory=list)


def without_capabilities(preferences: Sequence[Preference]) -> tuple[list[Preference], list[Quarantined]]:
    """The pairs that judge a response as a whole, and the rows of the others, put aside: nobody may lose them without a
    word.

    DataError where there are only others."""
    kept = [p for p in preferences if not p.capability]
    aside = {_place(p): p for p in preferences if p.capability}
    if aside and not kept:
        raise DataError(
            f"All {len(aside):,} rows judge one capability (the column `capability`) and none the whole response. "
            "Give pairs that do, or take the column out."
        )
    return kept, [_put_aside(row) for row in aside.values()]


def _put_aside(preference: Preference) -> Quarantined:
    file, _, line = preference.source.rpartition(":")
    number = int(line) if line.isdigit() else 0
    detail = f"judges {preference.capability!r} only, not the whole response"
    return Quarantined(file or preference.source, number, preference.domain, CAPABILITY, "capability", detail)


def write_quarantine(rows: Iterable[Quarantined], path: str | Path) -> None:
    """One JSON object a line: file, line, domain, reason, field, detail."""
    lines = [json.dumps(asdict(row)) + "\n" for row in rows]
    Path(path).write_text("".join(lines), encoding="utf-8", newline="\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rules:
    """How rows are read: the arguments of `load_preferences`."""

    shape: Shape | None
    fields: Mapping[str, str]
    domain: str
    domain_key: str
    domain_map: Mapping[str, str]
    tags: Mapping[str, str]
    allow_empty_prompt: bool
    allow_token_ids: bool

    def convert(self, raw: RawRow) -> Converted:
        return convert_row(
            retagged(raw.row, self.tags) if self.tags else raw.row,
            shape=self.shape,
            fields=self.fields,
            domain=self.named(raw.row) or self.of_file(raw.file),
            source=f"{raw.file}:{raw.line}",
            allow_empty_prompt=self.allow_empty_prompt,
            allow_token_ids=self.allow_token_ids,
        )

    def named(self, row: Row) -> str:
        """The domain in the `domain_key` column."""
        return optional_text(row, self.domain_key) if self.domain_key else ""

    def stated(self, row: Row) -> str:
        """The domain that a row states in any way, for a row that could not be converted."""
        own = "" if self.shape and self.shape.domain else row.get("domain")
        keyed = row.get(self.domain_key) if self.domain_key else ""
        return next((value for value in (own, keyed) if isinstance(value, str) and value), "")

    def of_file(self, file: str) -> str:
        """The domain of rows that state none; empty if the file says nothing either."""
        patterns = (
            domain
            for pattern, domain in self.domain_map.items()
            if fnmatch.fnmatchcase(Path(file).name, pattern) or fnmatch.fnmatchcase(file, pattern)
        )
        return self.domain or next(patterns, "") or (self.shape.domain if self.shape else "") or domain_of_file(file)

    def renamed(self, domain: str) -> str:
        return self.domain_map.get(domain, domain)


class _Intake:
    """Takes rows one by one and keeps the books."""

    def __init__(self, rules: _Rules) -> None:
        self.rules = rules
        self.preferences: list[Preference] = []
        self.quarantine: list[Quarantined] = []
        self.contradictions: list[tuple[Preference, Preference]] = []
        self.num_rows = self.num_kept = self.num_ties = self.num_duplicates = 0
        self.first_with: dict[str, Preference] = {}
        self.stated_domains: set[str] = set()
        self.kept_files: set[str] = set()

    def take_all(self, items: Iterable[Item]) -> Loaded:
        for item in items:
            self.take(item)
        return self.loaded()

    def take(self, item: Item) -> None:
        self.num_rows += 1
        if isinstance(item, BadRow):
            place = "" if item.offset is None else f" at byte {item.offset}"
            self._refuse(item, "", item.reason, "", item.detail + place)
            return
        stated = self.rules.stated(item.row)
        try:
            converted = self.rules.convert(item)
        except RowError as error:
            if error.code == "ambiguous_shape":
                raise DataError(f"{item.file}:{item.line}: {error.detail}") from error
            self._refuse(item, stated, error.code, error.field, error.detail)
        else:
            self._settle(item, stated, converted)

    def _settle(self, item: RawRow, stated: str, converted: Converted) -> None:
        """Keep what is new of a sound row; with nothing new it is a tie or a duplicate."""
        self.num_ties += converted.num_ties
        if not converted.preferences:
            self._refuse(item, stated, "tie", "", "all responses have the same rank")
            return
        pairs = [replace(p, domain=self.rules.renamed(p.domain)) for p in converted.preferences]
        for pair in pairs:
            first = self.first_with.get(_key(pair), pair)
            if first.domain != pair.domain:
                detail = f"same as {first.source} of domain {first.domain}"
                self._refuse(item, stated, "duplicate_in_other_domain", "", detail)
                return
        fresh = [pair for pair in pairs if self._is_new(pair)]
        if fresh:
            self.num_kept += 1
            self.kept_files.add(item.file)
            self.preferences += fresh
        else:
            self._refuse(item, stated, "duplicate", "", f"same as {self.first_with[_key(pairs[0])].source}")

    def _is_new(self, preference: Preference) -> bool:
        key = _key(preference)
        if key in self.first_with:
            self.num_duplicates += 1
            return False
        self.first_with[key] = preference
        opposite = self.first_with.get(_key(preference.swapped()))
        if opposite is not None:
            self.contradictions.append((opposite, preference))
        return True

    def _refuse(self, item: RawRow | BadRow, stated: str, reason: str, field: str, detail: str) -> None:
        domain = self.rules.renamed(stated or self.rules.of_file(item.file) or NO_DOMAIN)
        if stated:
            self.stated_domains.add(domain)
        self.quarantine.append(Quarantined(item.file, item.line, domain, reason, field, detail))

    def lost_domains(self) -> list[str]:
        """Domains that rows or whole files were of, and of which nothing is left."""
        silent = {row.domain for row in self.quarantine if row.file not in self.kept_files}
        return sorted((self.stated_domains | silent) - {p.domain for p in self.preferences})

    def loaded(self) -> Loaded:
        return Loaded(
            self.preferences,
            self.quarantine,
            self.num_rows,
            self.num_kept,
            self.num_ties,
            self.num_duplicates,
            self.contradictions,
        )


def load_preferences(
    patterns: str | Path | Sequence[str | Path],
    *,
    shape: str | None = None,
    fields: Mapping[str, str] = _NOTHING,
    domain: str | None = None,
    domain_key: str | None = None,
    domain_map: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
    max_bad_share: float = 0.01,
    contradiction_weight: float = 1.0,
    allow_empty_prompt: bool = False,
    allow_token_ids: bool = False,
    use_margin: bool = True,
    strict: bool = True,
) -> Loaded:
    """Read preferences of any known shape from files, folders, globs and data sets.

    Args:
        patterns: see `sources.find_sources`.
        shape: a name in `FORMATS`, or `oasst`; by default every row's shape is detected.
        fields: our column names to the files' own, such as `{"prompt": "question"}`.
        domain: the domain of rows that name none.
        domain_key: a column that names the domain where `domain` does not.
        domain_map: a file-name pattern, or a domain as the data spells it, to a domain.
        tags: how sharegpt rows spell the keys and roles of turns, under LLaMA-Factory's names (`role_tag`, ...).
        max_bad_share: the share of rows that may be quarantined; see `reasons.NOT_BAD` for what does not count.
        contradiction_weight: of both pairs of a contradiction within one domain; all others weigh 1.
        allow_empty_prompt: keep rows whose prompt is there but blank.
        allow_token_ids: keep rows that are tokens already; whoever asks for them has checked the tokenizer.
        use_margin: keep margins, and refuse data in which only some rows have one.
        strict: raise what makes the data unfit as a whole (a file without rows, too many bad rows, a domain of which
            no row is left, a margin in some rows only); otherwise it stands in `Loaded.problems`.

    Raises:
        DataError: nothing to read, or a file that ends early; if strict, also what else would stand in `problems`.
    """
    rules = _Rules(
        shape=find_shape(shape, FORMATS) if shape and shape != OASST else None,
        fields=fields,
        domain=domain or "",
        domain_key=domain_key or "",
        domain_map=domain_map or {},
        tags=tags or {},
        allow_empty_prompt=allow_empty_prompt,
        allow_token_ids=allow_token_ids,
    )
    found, intake, empty = find_sources(patterns), _Intake(rules), list[Path]()
    items = _items(found.sources, empty)
    loaded = _load_oasst(list(items), domain or OASST) if shape == OASST else intake.take_all(items)
    loaded = _weighted(loaded, contradiction_weight)
    if not use_margin:
        loaded = replace(loaded, preferences=[replace(p, margin=None) for p in loaded.preferences])
    problems = [*_no_rows(empty), *(_problems(loaded, intake, max_bad_share) if shape != OASST else [])]
    if problems and strict:
        raise problems[0]
    return replace(loaded, problems=list(map(str, problems)), skipped_files=list(map(str, found.skipped)))


def _weighted(loaded: Loaded, weight: float) -> Loaded:
    """The same, both of each contradiction within a domain with that weight. That two domains judge a pair
    differently is no fault of either: it is what a mixture is for."""
    within = [both for both in loaded.contradictions if both[0].domain == both[1].domain]
    opposed = {id(p) for both in within for p in both}
    weighted = [replace(p, weight=weight) if id(p) in opposed else p for p in loaded.preferences]
    return replace(loaded, preferences=weighted)


def _items(sources: Iterable[Path], empty: list[Path]) -> Iterator[Item]:
    """The rows of all sources; a file that has none is added to `empty`."""
    for path in sources:
        seen: set[str] = set()
        for item in read_rows(path):
            seen.add(item.file)
            yield item
        empty += [file for file in files_of(path) if str(file) not in seen]


def _no_rows(empty: Sequence[Path]) -> list[DataError]:
    return [DataError(f"The data has no rows in {', '.join(map(str, empty))}.")] if empty else []


def _problems(loaded: Loaded, intake: _Intake, max_bad_share: float) -> Iterator[DataError]:
    """What makes rows that were read unfit as a whole."""
    if loaded.num_rows:
        yield from _bad_share(loaded, max_bad_share)
    if lost := intake.lost_domains():
        yield DataError(f"No row is left of domain {', '.join(lost)}.{_examples(loaded.quarantine, lost)}")
    for is_part in (False, True):  # labels of a capability come from elsewhere than those of the whole
        yield from _margins([p for p in loaded.preferences if bool(p.capability) == is_part])


def _load_oasst(items: Sequence[Item], domain: str) -> Loaded:
    """Message trees: the one format whose rows make pairs only together. A message that stands in no pair is in the
    quarantine with its fate, which says nothing against the file."""
    rows = [item for item in items if isinstance(item, RawRow)]
    for row in rows:
        if missing := sorted(_OASST_FIELDS - set(row.row)):
            raise DataError(f"{row.file}:{row.line}: not an OpenAssistant message: {', '.join(missing)} missing")
    made = oasst(row.row for row in rows)
    quarantine = [
        Quarantined(bad.file, bad.line, domain, bad.reason, "", bad.detail) for bad in items if isinstance(bad, BadRow)
    ]
    unused = [(row, made.fate[row.row["message_id"]]) for row in rows]
    quarantine += [Quarantined(row.file, row.line, domain, fate, "", "") for row, fate in unused if fate != "used"]
    preferences = [replace(p, domain=domain) for p in made.preferences]
    return Loaded(preferences, quarantine, len(items), len(items) - len(quarantine), made.num_ties)


def _key(preference: Preference) -> str:
    ids = preference.token_ids and asdict(preference.token_ids)
    beside = json.dumps([preference.tools, preference.chat_template_kwargs, ids], default=dict, sort_keys=True)
    judged = [preference.capability] if preference.capability else []  # of the same texts, another judgement
    return text_key(preference.prompt, preference.chosen, preference.rejected, beside, *judged)


def domain_of_file(file: str) -> str:
    """The domain in a file's name, or an empty string: see rule 5 atop this module."""
    name = Path(file).name
    suffix = max((suffix for suffix in READERS if name.endswith(suffix)), key=len, default="")
    parts = re.split(r"([._:-])", name.removesuffix(suffix))
    while parts and _is_edge(parts[0]):
        parts = parts[2:]
    while parts and _is_edge(parts[-1]):
        parts = parts[:-2]
    return "".join(parts)


def _is_edge(part: str) -> bool:
    return not part or part.isdigit() or part.lower() in _SPLIT_WORDS + _PLAIN_WORDS


def _bad_share(loaded: Loaded, max_bad_share: float) -> Iterator[DataError]:
    bad = [row for row in loaded.quarantine if row.reason not in NOT_BAD]
    if len(bad) > max_bad_share * loaded.num_rows or not loaded.preferences:
        counts = ", ".join(f"{reason} {n}" for reason, n in Counter(r.reason for r in loaded.quarantine).most_common())
        yield DataError(
            f"{len(bad)} of {loaded.num_rows} rows are bad ({len(bad) / loaded.num_rows:.1%}) and"
            f" {loaded.num_kept_rows} can be used; max_bad_share allows {max_bad_share:.1%}. Not used: {counts}."
            f"{_listed(map(str, bad or loaded.quarantine))}"
        )


def _examples(quarantine: Sequence[Quarantined], domains: Sequence[str]) -> str:
    return _listed(str(row) for row in quarantine if row.domain in domains)


def _listed(lines: Iterable[str]) -> str:
    """The first few, one a line, and how many more there are."""
    every = list(lines)
    more = [f"... and {len(every) - _NUM_SHOWN} more"] if len(every) > _NUM_SHOWN else []
    return "".join(f"\n  {line}" for line in every[:_NUM_SHOWN] + more)


def _margins(preferences: Sequence[Preference]) -> Iterator[DataError]:
    without = [p.source for p in preferences if p.margin is None]
    if without and len(without) < len(preferences):
        yield DataError(
            f"{len(preferences) - len(without)} pairs have a margin and {len(without)} have none."
            " Give every row a margin, or none, or leave margins out with train.use_margin=false."
            f" Without:{_listed(without)}"
        )


def check_domains(preferences: Iterable[Preference], known: Sequence[str]) -> None:
    """Raise a `DataError` that names rows of domains not in `known`."""
    strangers = [p for p in preferences if p.domain not in known]
    if strangers:
        names = ", ".join(sorted({p.domain for p in strangers}))
        raise DataError(f"Unknown domain {names}. Known: {', '.join(known)}.{_listed(p.name for p in strangers)}")


def assert_no_leak(train: Sequence[Preference], other: Sequence[Preference]) -> None:
    """Raise a `DataError` if a pair, or a prompt group, stands on both sides; the rows are named."""
    pairs = {_key(p): p for p in train}
    labels = linked_groups([*train, *other])
    groups = dict(zip(labels, train, strict=False))
    leaks = []
    for row, label in zip(other, labels[len(train) :], strict=True):
        if (same := pairs.get(_key(row))) is not None:
            leaks.append(f"{_place(row)} is the same pair as {_place(same)}")
        elif (kin := groups.get(label)) is not None:
            leaks.append(f"{_place(row)} has the prompt or group of {_place(kin)}")
    if leaks:
        raise DataError(f"{len(leaks)} rows stand on two sides of a split. Split by group again.{_listed(leaks)}")


def _place(preference: Preference) -> str:
    return preference.source or preference.name
