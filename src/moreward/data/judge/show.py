"""The estimate before and the report after, as a terminal shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO

from moreward.data.judge.judges import Estimate, Judge
from moreward.data.judge.pairs import Pair
from moreward.data.judge.tally import OUTCOMES, Report, Tally
from moreward.data.points import Points

_COLUMNS = ("", "pairs", "asked", "agrees", "first", "unparsed", "discarded", "kept", "accuracy")
_LEGEND = (
    "agrees: both orders name the same response; first: the reply shown first is named (50 % without a bias); "
    "unparsed: answers without a verdict; accuracy: of the labels kept, if the judge errs independently in both orders."
)


def render_estimate(estimate: Estimate, judge: Judge, pairs: Sequence[Pair], points: Points) -> str:
    """What a job would take, task by task, and in all."""
    lines = []
    for task in dict.fromkeys(pair.domain for pair in pairs):
        num_pairs, num_points = sum(pair.domain == task for pair in pairs), len(points[task])
        needs = f" = {2 * num_points * num_pairs:,} questions (2 orders)" if judge.reads_order else ""
        lines.append(f"{task}: {num_pairs:,} pairs x {num_points} points{needs}")
    what = "questions" if judge.reads_order else "rewards"
    tokens = f", about {estimate.tokens_in:,} tokens to read and {estimate.tokens_out:,} or more to write"
    lines.append(
        f"{estimate.calls:,} {what} to {judge.name}, {estimate.cached:,} of them in the cache: {estimate.to_send:,} to "
        f"send{tokens if judge.reads_order else ''}"
    )
    return "\n".join(lines)


def render_report(report: Report, *, width: int = 120) -> str:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=StringIO(), width=width, record=True)
    table = Table(*_COLUMNS, box=None, header_style="", pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for task, points in report.tallies.items():
        for point, tally in points.items():
            table.add_row(f"{task}/{point}", *_cells(tally))
    console.print(table)
    for line in [_LEGEND, *_remarks(report), *_lost(report.tallies), *report.notes]:
        console.print(line, markup=False, highlight=False)
    for line in report.warnings:
        console.print(f"warning: {line}", markup=False, highlight=False)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


def _cells(tally: Tally) -> list[str]:
    told = tally.to_json()
    shares = ("agreement", "first_share", "discarded_share", "kept_share", "expected_accuracy")
    agrees, first, discarded, kept, accuracy = ("-" if told[n] is None else f"{told[n]:.1%}" for n in shares)
    return [f"{tally.num_pairs:,}", f"{told['asked']:,}", agrees, first, f"{told['parse_failures']:,}", discarded, kept,
            accuracy]  # fmt: skip


def _remarks(report: Report) -> list[str]:
    every = [tally for points in report.tallies.values() for tally in points.values()]
    if every and not every[0].reads_order:
        return ["A reward knows no order, so that it agrees with itself says nothing of its accuracy."]
    return []


def _lost(tallies: Mapping[str, Mapping[str, Tally]]) -> list[str]:
    """What discarded pairs, in all points together."""
    counts = {
        name: sum(tally.outcomes[name] for points in tallies.values() for tally in points.values())
        for name in OUTCOMES
        if name != "kept"
    }
    if not any(counts.values()):
        return []
    told = "; ".join(f"{n:,} {OUTCOMES[name]}" for name, n in counts.items() if n)
    return [f"Discarded: {told}."]
