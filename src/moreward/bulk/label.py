"""Capability labels for whole files: pairs in, one row out for every pair and point that the judge is clear about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from moreward.checkpoint import space_errors, write_json
from moreward.data.judge.cache import Cache
from moreward.data.judge.judges import Judge, Progress
from moreward.data.judge.labels import labels_of, write_rows
from moreward.data.judge.pairs import Pair, Pairs, pairs_of
from moreward.data.judge.show import render_estimate
from moreward.data.judge.tally import Report, warnings_of
from moreward.data.load import Loaded, load_preferences
from moreward.data.points import Points
from moreward.errors import ConfigError, DataError, RunError

Confirm = Callable[[str, int], None]
"""Told what the job would take, in words and as the number of calls to be made; raises to decline."""


@dataclass(frozen=True, slots=True)
class Material:
    """The pairs to judge, the points that there are pairs for, and what was left out, in sentences."""

    pairs: list[Pair]
    points: Points
    notes: list[str]


def read_material(
    paths: Sequence[str | Path],
    points: Points,
    *,
    shape: str | None = None,
    domain: str | None = None,
    domain_key: str | None = None,
    limit: int | None = None,
) -> Material:
    """Read pairs and ranked lists; `limit` keeps the first pairs of each task. ConfigError where no task has a pair."""
    loaded = load_preferences(paths, shape=shape, domain=domain, domain_key=domain_key, use_margin=False)
    found = pairs_of(loaded.preferences)
    known = [pair for pair in found.pairs if points.get(pair.domain)]
    if not known:
        domains = ", ".join(sorted({p.domain for p in loaded.preferences})) or "none"
        raise ConfigError(
            f"points: none of the data's domains ({domains}) is a task with points; tasks: {', '.join(points)}. Rename "
            "a task, or say what the domain is with --domain or --domain-key"
        )
    kept = [pair for pair, place in zip(known, _places(known), strict=True) if limit is None or place < limit]
    tasks = {pair.domain for pair in kept}
    notes = _notes(loaded, found, points) + _limited(len(known) - len(kept))
    return Material(kept, {task: named for task, named in points.items() if task in tasks}, notes)


def _places(pairs: Sequence[Pair]) -> list[int]:
    """How many pairs of its task stand before each."""
    seen: Counter[str] = Counter()
    places = []
    for pair in pairs:
        places.append(seen[pair.domain])
        seen[pair.domain] += 1
    return places


def _notes(loaded: Loaded, found: Pairs, points: Points) -> list[str]:
    strangers = Counter(pair.domain for pair in found.pairs if not points.get(pair.domain))
    empty = [task for task in points if task not in {pair.domain for pair in found.pairs}]
    reasons = Counter(row.reason for row in loaded.quarantine)
    told = [f"Left out, no points for this domain: {task} ({n:,} pairs)." for task, n in sorted(strangers.items())]
    told += [f"No pairs for the task {task}." for task in empty]
    told += [f"Rows not used, {reason}: {n:,} (see: moreward data check)." for reason, n in reasons.most_common()]
    told += [f"Pairs that stand in the data twice, judged once: {found.num_repeated:,}."] if found.num_repeated else []
    if found.num_capability:
        told.append(f"Left out, labels of one capability already: {found.num_capability:,} pairs.")
    return told


def _limited(num_left: int) -> list[str]:
    return [f"Left out by --limit: {num_left:,} pairs."] if num_left else []


def report_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.report.json")


def cache_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.cache.jsonl")


def estimate_job(material: Material, judge: Judge, out: Path, *, cache: Path | None = None) -> str:
    """What the job would take; nothing is sent and nothing written."""
    path = cache or cache_path(out)
    with Cache(path) if path.exists() else nullcontext(Cache(path)) as held:
        estimate = judge.estimate(material.pairs, material.points, held)
    return render_estimate(estimate, judge, material.pairs, material.points)


def label_file(
    material: Material,
    judge: Judge,
    out: Path,
    *,
    cache: Path | None = None,
    overwrite: bool = False,
    confirm: Confirm = lambda words, calls: None,
    progress: Progress = lambda done, total: None,
) -> Report:
    """Judge all pairs in all points of their task, and write the labels to `out` and the report beside it.

    What was said is kept in `cache` (by default beside `out`), whatever happens. Where no label is kept there is no
    output, only the report.

    Raises:
        RunError: `out` exists; the cache is in use or is none.
        JudgeError: the judge cannot be asked.
    """
    if out.exists() and not overwrite:
        raise RunError(f"{out}: exists already. Choose another output or pass --overwrite")
    out.parent.mkdir(parents=True, exist_ok=True)
    pairs, points = material.pairs, material.points
    with space_errors(out.parent), Cache(cache or cache_path(out)) as held:
        estimate = judge.estimate(pairs, points, held)
        confirm(render_estimate(estimate, judge, pairs, points), estimate.to_send)
        sent = judge.fill(pairs, points, held, progress)
        rows, tallies = labels_of(judge, pairs, points, held)
        damage = f"Lines of the cache that were damaged, and asked again: {held.num_damaged:,}."
        report = Report(
            judge=judge.name,
            tallies=tallies,
            sent=sent,
            cached=estimate.cached,
            notes=material.notes + ([damage] if held.num_damaged else []),
            warnings=warnings_of(tallies),
        )
        write_json(report_path(out), report.to_json())
        if rows:
            write_rows(out, rows)
    return report


def refuse_empty(report: Report, out: Path) -> None:
    """DataError where a job kept nothing, with the reasons."""
    if not report.num_kept:
        why = "".join(f"\n  {line}" for line in report.warnings)
        raise DataError(f"no label was kept, so {out} was not written; {report_path(out)} says why.{why}")
