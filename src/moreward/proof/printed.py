"""Published tables with our numbers beside theirs. A system that was not run has none of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moreward.proof.experiment import Printed
from moreward.proof.findings import Findings, SystemFinding
from moreward.proof.words import MISSING
from moreward.report import Column, Table

MEAN, TOTAL, ROUTER = "Average", "total", "router"
_PER_TABLE = 2


def printed_tables(findings: Findings, printed: Sequence[Printed]) -> list[tuple[str, Table]]:
    """Each published table, in parts of two columns so that ours fits beside theirs."""
    found = []
    for one in printed:
        for i in range(0, len(one.columns), _PER_TABLE):
            part = one.columns[i : i + _PER_TABLE]
            found.append((f"{one.title} (ours | printed)", _table(findings, one, part)))
    return found


def _table(findings: Findings, printed: Printed, columns: Sequence[str]) -> Table:
    labels = list(printed.rows)
    shown = [Column("system", labels, is_words=True)]
    for column in columns:
        ours = [_ours(findings.systems.get(label), printed.measure, column) for label in labels]
        theirs = [_cell(printed.rows[label].get(column), printed.measure) for label in labels]
        shown += [Column(f"{column}\nours", ours), Column("printed", theirs)]
    return Table(shown, num_domains=len(labels))


def _ours(system: SystemFinding | None, measure: str, column: str) -> str:
    if system is None:
        return MISSING
    if measure == "accuracy":
        one = system.mean if column == MEAN else system.accuracy.get(column)
        return MISSING if one is None else _cell((one.mean, one.spread), measure)
    if measure == "input_seconds":
        return _cell(system.seconds_per_pair / 2, measure)
    return _cell(_epoch_seconds(system.stages, column), measure)


def _epoch_seconds(stages: Sequence[Mapping[str, Any]], column: str) -> float | None:
    """Seconds of one pass: over everything, over one expert's domain, or of the router. None where it is not known."""
    times: dict[str, float | None] = {str(stage["stage"]): stage["epoch_seconds"] for stage in stages}
    if column == TOTAL:
        known = [seconds for seconds in times.values() if seconds is not None]
        return sum(known) if len(known) == len(times) else None
    if column == ROUTER:
        return times.get("router")
    return times.get(f"expert/{column.lower()}")


def _cell(value: float | Sequence[float | None] | None, measure: str) -> str:
    if value is None:
        return MISSING
    if measure == "accuracy":
        mean, spread = (value, None) if isinstance(value, int | float) else value
        text = f"{mean:.4f}".lstrip("0")
        return text if spread is None else f"{text} ±{spread:.4f}".replace("±0.", "±.")
    assert isinstance(value, int | float)
    return f"{value:,.2f}" if measure == "input_seconds" or value < 100 else f"{value:,.0f}"
