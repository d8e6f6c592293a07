"""Results as tables: for the console and, as Markdown, for the documentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

HEADINGS = (
    "contestant",
    "1 thread, CPU ms",
    "share",
    "2 threads, ms",
    "share",
    "GFLOP",
    "GFLOP/s",
    "peak MB",
    "error",
    "tau",
    "flipped",
)


def case_table(result: Mapping[str, Any]) -> Table:
    table = Table(title=f"{result['case']} (peer: {result['peer']})", title_justify="left")
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if number == 0 else "right", overflow="fold")
    for contestant in result["contestants"]:
        table.add_row(*cells(contestant))
    return table


def markdown(result: Mapping[str, Any]) -> str:
    rows = [HEADINGS, ("---", *["---:"] * (len(HEADINGS) - 1)), *map(cells, result["contestants"])]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows)


def cells(contestant: Mapping[str, Any]) -> tuple[str, ...]:
    """A contestant's row; one that has no times says why."""
    if contestant["status"] != "ok":
        return (contestant["name"], contestant["status"], *[""] * (len(HEADINGS) - 2))
    exact = contestant.get("exactness", {})
    return (
        contestant["name"],
        *_times(contestant.get("cpu_1")),
        *_times(contestant.get("wall_2")),
        *_work(contestant),
        f"{contestant['peak_mb']}",
        _number(exact.get("max_relative_error"), ".0e"),
        _number(exact.get("kendall_tau"), ".4g"),
        _number(exact.get("flipped_pairs"), ".2%"),
    )


def _times(found: Mapping[str, Any] | None) -> tuple[str, str]:
    if found is None:
        return "", ""
    share = found["share"]
    seconds = f"{milliseconds(found['median'])} ({milliseconds(found['min'])}-{milliseconds(found['max'])})"
    return seconds, "" if share is None else f"{share['median']:.3f}"


def _work(contestant: Mapping[str, Any]) -> tuple[str, str]:
    """Operations of the matrix products, and how many a second with one thread. Older records and foreign engines
    have none."""
    gflop, cpu = contestant.get("gflop", 0.0), contestant.get("cpu_1")
    if not gflop:
        return "", ""
    return f"{gflop:.3g}", "" if cpu is None else f"{gflop / cpu['median']:.0f}"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g}" if seconds < 1 else f"{seconds * 1000:.0f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def aim_line(aim: Mapping[str, Any]) -> str:
    """An aim and what came of it, in words."""
    if aim["of"] == "error":
        wanted = f"error of {aim['who']} at most {aim['share']:g}"
        reached = _number(aim["reached"], ".1e")
    else:
        wanted = f"{aim['who']} at most {aim['share']:g} of {aim['peer']}"
        reached = _number(aim["reached"], ".3f")
        if aim.get("spread"):
            reached += f" ({aim['spread']['min']:.3f}-{aim['spread']['max']:.3f})"
    if aim["met"] is None:
        return f"not measured: {wanted}"
    return f"{'met' if aim['met'] else 'MISSED'}: {wanted}; reached {reached}"
