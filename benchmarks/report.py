"""The newest results as Markdown, written into docs/benchmarks.md.

python -m benchmarks.report [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, told
from benchmarks.machine import ROOT
from benchmarks.tables import aim_line, markdown

PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- results: written by python -m benchmarks.report -->", "<!-- end of results -->"
ORDER = (
    "arliss",
    "adapters",
    "packing",
    "deberta",
    "best_of_n",
    "dmoerm_inner",
    "train",
    "lora_train",
    "mixture_train",
    "decoder_pairs",
    "moe",
)


def newest(folder: Path) -> list[dict[str, Any]]:
    """The last full record of each benchmark, in the order of the aims."""
    records = []
    for path in folder.glob("*.jsonl"):
        whole = [r for line in path.read_text(encoding="utf-8").splitlines() if not (r := json.loads(line))["quick"]]
        records += whole[-1:]
    place = {name: number for number, name in enumerate(ORDER)}
    return sorted(records, key=lambda r: place.get(r["benchmark"], len(ORDER)))


def render(folder: Path) -> str:
    """The section of results: first every aim, then the tables."""
    records = newest(folder)
    if not records:
        return "No results have been recorded yet. `make bench` records them."
    aims = [
        f"- {record['benchmark']}, {case['case']}: {aim_line(aim)}"
        for record in records
        for case in record["cases"]
        for aim in case["aims"]
    ]
    return "\n\n".join(["### Aims", "\n".join(aims), *map(_section, records)])


def _section(record: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in record["machine"]["versions"].items())
    parts = [
        f"### {record['benchmark']}",
        f"{record['started'][:10]}, {record['rounds']} rounds. {told(record)}. {versions}.",
    ]
    for case in record["cases"]:
        parts += [
            f"**{case['case']}** (share of: {case['peer']}; outputs against: {case['reference']})",
            markdown(case),
        ]
    return "\n\n".join(parts)


def fill(page: str, results: str) -> str:
    """The page with its results replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{results}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the page is what would be written")
    page = PAGE.read_text(encoding="utf-8")
    filled = fill(page, render(RESULTS))
    if parser.parse_args().check:
        sys.exit(page != filled)
    PAGE.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main()
