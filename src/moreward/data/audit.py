"""What is wrong with preference data, per domain, with the file and row of each finding."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from moreward.data.load import Loaded, Quarantined, domain_of_file
from moreward.data.reasons import NOT_BAD
from moreward.types import NO_DOMAIN, Preference, Text

PAIR_REMARKS = ("truncated", "identical_after_truncation", "special_tokens", "doubled_bos", "missing_eos")
_NUM_SHOWN = 5


@dataclass(frozen=True, slots=True)
class PairLengths:
    """What a tokenizer says of one pair. Tokens are those of prompt and response, before truncation.

    `truncated`: one of the two is over the limit. `special_tokens`: the text holds the spelling of one. `doubled_bos`,
    `missing_eos`: a conversation starts with two of the one, or does not end with the other. `refusal` is what the
    chat template says against the pair; then nothing else is known.
    """

    chosen_tokens: int
    rejected_tokens: int
    truncated: bool
    identical_after_truncation: bool
    special_tokens: bool
    doubled_bos: bool = False
    missing_eos: bool = False
    refusal: str = ""


Measure: TypeAlias = Callable[[Preference], PairLengths]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerMarks:
    """What a tokenizer puts before, after and beside texts; empty where it has no such token."""

    bos: str
    eos: str
    pad: str
    sha256: str = ""

    @property
    def pad_is_eos(self) -> bool:
        return bool(self.pad) and self.pad == self.eos


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault at one place (`file:line`, or a file)."""

    reason: str
    domain: str
    place: str
    detail: str
    is_error: bool


@dataclass(frozen=True, slots=True)
class CapabilityRows:
    """What of a domain judges one capability."""

    num_rows: int
    num_pairs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainAudit:
    """One domain's figures. Lengths are of responses in characters, or of conversations in tokens if measured.

    `chosen_longer` is the share of pairs whose chosen side is longer, equal lengths as half: 0.5 is no bias.
    `share` is of all kept pairs. `dropped` counts rows per reason; what follows it in pairs (`truncated` are over the
    length limit) is None when nothing measured it. `capabilities` has rows and pairs that judge one capability only.
    """

    num_rows: int
    num_pairs: int
    share: float
    dropped: dict[str, int]
    contradictions: int
    empty_prompts: int
    chosen_longer: float | None
    median_length: float | None
    p95_length: float | None
    truncated: int | None
    identical_after_truncation: int | None
    special_tokens: int | None
    doubled_bos: int | None
    missing_eos: int | None
    bad_template: int | None
    capabilities: dict[str, CapabilityRows] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What `audit` found. Errors are rows that cannot be used though they should be; the rest are remarks."""

    num_rows: int
    num_kept_rows: int
    num_pairs: int
    num_ties: int
    duplicates: int
    length_unit: str
    domains: dict[str, DomainAudit]
    tokenizer: TokenizerMarks | None = None
    findings: list[Finding] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def has_errors(self) -> bool:
        return bool(self.problems) or any(finding.is_error for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        marks = self.tokenizer and {**asdict(self.tokenizer), "pad_is_eos": self.tokenizer.pad_is_eos}
        return {**asdict(self), "tokenizer": marks, "has_errors": self.has_errors}


def audit(loaded: Loaded, *, measure: Measure | None = None, marks: TokenizerMarks | None = None) -> Audit:
    """Figures per domain and every finding. Load with `strict=False` to see all faults at once.

    `measure` and `marks` are those of the tokenizer that will read the pairs.
    """
    lengths = [measure(p) for p in loaded.preferences] if measure else None
    names = sorted({p.domain for p in loaded.preferences} | {row.domain for row in loaded.quarantine})
    return Audit(
        num_rows=loaded.num_rows,
        num_kept_rows=loaded.num_kept_rows,
        num_pairs=len(loaded.preferences),
        num_ties=loaded.num_ties,
        duplicates=loaded.duplicates,
        length_unit="tokens" if measure else "characters",
        domains={name: _domain_audit(name, loaded, lengths) for name in names},
        tokenizer=marks,
        findings=[
            *_file_findings(loaded),
            *_row_findings(loaded),
            *_pair_findings(loaded.preferences, lengths),
            *_pad_findings(names, marks),
        ],
        problems=loaded.problems,
    )


def _domain_audit(name: str, loaded: Loaded, lengths: Sequence[PairLengths] | None) -> DomainAudit:
    index = [i for i, p in enumerate(loaded.preferences) if p.domain == name]
    pairs = [loaded.preferences[i] for i in index]
    measured = [lengths[i] for i in index] if lengths is not None else None
    sizes = _characters(pairs)
    if measured is not None:
        sizes = [(m.chosen_tokens, m.rejected_tokens) for m in measured if not m.refusal]
    both = sorted(size for pair in sizes for size in pair)
    dropped = Counter(row.reason for row in loaded.quarantine if row.domain == name)
    return DomainAudit(
        num_rows=len({p.source or p.name for p in pairs}) + dropped.total(),
        num_pairs=len(pairs),
        share=len(pairs) / max(1, len(loaded.preferences)),
        dropped=dict(dropped.most_common()),
        contradictions=sum(second.domain == name for _, second in loaded.contradictions),
        empty_prompts=sum(not _num_characters(p.prompt) for p in pairs),
        chosen_longer=statistics.fmean((a > b) + (a == b) / 2 for a, b in sizes) if sizes else None,
        median_length=statistics.median(both) if both else None,
        p95_length=both[math.ceil(0.95 * len(both)) - 1] if both else None,
        truncated=_count(measured, lambda m: m.truncated),
        identical_after_truncation=_count(measured, lambda m: m.identical_after_truncation),
        special_tokens=_count(measured, lambda m: m.special_tokens),
        doubled_bos=_count(measured, lambda m: m.doubled_bos),
        missing_eos=_count(measured, lambda m: m.missing_eos),
        bad_template=_count(measured, lambda m: bool(m.refusal)),
        capabilities=_capabilities(pairs),
    )


def _capabilities(pairs: Sequence[Preference]) -> dict[str, CapabilityRows]:
    num_pairs = Counter(p.capability for p in pairs if p.capability)
    return {
        name: CapabilityRows(len({p.source or p.name for p in pairs if p.capability == name}), num_pairs[name])
        for name in sorted(num_pairs)
    }


def _count(measured: Sequence[PairLengths] | None, is_so: Callable[[PairLengths], bool]) -> int | None:
    return None if measured is None else sum(map(is_so, measured))


def _characters(pairs: Iterable[Preference]) -> list[tuple[int, int]]:
    return [(_num_characters(p.chosen), _num_characters(p.rejected)) for p in pairs]


def _num_characters(text: Text) -> int:
    return len(text.strip()) if isinstance(text, str) else sum(len(turn["content"].strip()) for turn in text)


def _file_findings(loaded: Loaded) -> list[Finding]:
    detail = "unknown kind of file, or a single JSON object"
    return [
        Finding("file_not_read", domain_of_file(Path(file).stem) or NO_DOMAIN, file, detail, False)
        for file in loaded.skipped_files
    ]


def _row_findings(loaded: Loaded) -> list[Finding]:
    dropped = [
        Finding(row.reason, row.domain, f"{row.file}:{row.line}", _said(row), row.reason not in NOT_BAD)
        for row in loaded.quarantine
    ]
    against = [
        Finding(
            "contradiction", second.domain, second.source or second.name, f"prefers what {first.name} rejects", False
        )
        for first, second in loaded.contradictions
    ]
    return dropped + against


def _said(row: Quarantined) -> str:
    return f"{row.field}: {row.detail}" if row.field else row.detail


def _pair_findings(pairs: Sequence[Preference], lengths: Sequence[PairLengths] | None) -> list[Finding]:
    found = [
        Finding("empty_prompt", p.domain, p.source or p.name, "nothing to route by", False)
        for p in pairs
        if not _num_characters(p.prompt)
    ]
    for pair, measured in zip(pairs, lengths or [], strict=bool(lengths)):
        place = pair.source or pair.name
        if measured.refusal:
            found.append(Finding("bad_template", pair.domain, place, measured.refusal, True))
        sizes = f"chosen {measured.chosen_tokens} tokens, rejected {measured.rejected_tokens}"
        found += [
            Finding(reason, pair.domain, place, sizes, False) for reason in PAIR_REMARKS if getattr(measured, reason)
        ]
    return found


def _pad_findings(domains: Sequence[str], marks: TokenizerMarks | None) -> list[Finding]:
    if marks is None or not marks.pad_is_eos:
        return []
    detail = f"{marks.pad} ends texts and pads them: a program that looks for the pad reads one token early; we do not"
    return [Finding("pad_is_eos", domain, "the tokenizer", detail, False) for domain in domains]


# For people


def render(audit: Audit, *, width: int = 120) -> str:
    """A table of domains and the first findings of each kind, as text for a terminal."""
    from io import StringIO

    from rich.console import Console

    console = Console(file=StringIO(), width=width, highlight=False)
    console.print(_table(audit))
    console.print(
        f"{audit.num_rows:,} rows = {audit.num_kept_rows:,} kept + {audit.num_rows - audit.num_kept_rows:,} not kept;"
        f" {audit.num_pairs:,} pairs, {audit.num_ties:,} ties, {audit.duplicates:,} duplicate pairs."
        f" Lengths in {audit.length_unit}.",
        markup=False,
    )
    for line in _capability_lines(audit):
        console.print(line, markup=False, soft_wrap=True)
    if marks := audit.tokenizer:
        words = [f"{name} {token or 'none'}" for name, token in (("BOS", marks.bos), ("EOS", marks.eos))]
        words.append(f"pad {marks.pad or 'none'}{' (the same as EOS)' if marks.pad_is_eos else ''}")
        words += [f"SHA-256 {marks.sha256}"] if marks.sha256 else []
        console.print(f"Tokenizer: {', '.join(words)}.", markup=False, soft_wrap=True)
    for problem in audit.problems:
        console.print(f"\nERROR {problem}", markup=False, soft_wrap=True)
    for line in _finding_lines(audit.findings):
        console.print(line, markup=False, soft_wrap=True)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def _table(audit: Audit) -> Any:
    from rich.table import Table
    from rich.text import Text as Plain

    table = Table(box=None, pad_edge=False)
    table.add_column("domain")
    is_measured = audit.length_unit == "tokens"
    extra = ["over limit", "special", "two BOS", "no EOS"] if is_measured else []
    for name in [
        "rows",
        "pairs",
        "share",
        "not kept",
        "contradict",
        "no prompt",
        "longer wins",
        "median",
        "95 %",
        *extra,
    ]:
        table.add_column(name, justify="right")
    for name, row in audit.domains.items():
        cells = [
            f"{row.num_rows:,}",
            f"{row.num_pairs:,}",
            f"{row.share:.1%}",
            f"{sum(row.dropped.values()):,}",
            f"{row.contradictions:,}",
            f"{row.empty_prompts:,}",
            _shown(row.chosen_longer, ".1%"),
            _shown(row.median_length, ",.0f"),
            _shown(row.p95_length, ",.0f"),
        ]
        counts = [row.truncated, row.special_tokens, row.doubled_bos, row.missing_eos] if is_measured else []
        table.add_row(Plain(name), *cells, *(f"{count:,}" for count in counts))
    return table


def _capability_lines(audit: Audit) -> list[str]:
    return [
        f"{name} judges one capability in "
        + ", ".join(f"{point}: {of.num_rows:,} rows ({of.num_pairs:,} pairs)" for point, of in row.capabilities.items())
        for name, row in audit.domains.items()
        if row.capabilities
    ]


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _finding_lines(findings: Sequence[Finding]) -> list[str]:
    """Errors first; of each reason the count and the first few places."""
    lines = []
    by_reason: dict[tuple[bool, str], list[Finding]] = {}
    for finding in findings:
        by_reason.setdefault((not finding.is_error, finding.reason), []).append(finding)
    for (is_remark, reason), group in sorted(by_reason.items()):
        counts = ", ".join(f"{name} {n:,}" for name, n in Counter(f.domain for f in group).most_common())
        lines.append(f"\n{'remark' if is_remark else 'ERROR'} {reason}: {len(group):,} ({counts})")
        lines += [f"  {f.place}: {f.detail}" for f in group[:_NUM_SHOWN]]
        if len(group) > _NUM_SHOWN:
            lines.append(f"  ... and {len(group) - _NUM_SHOWN:,} more")
    return lines
