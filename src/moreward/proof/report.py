"""An experiment from its file to its report: trained, rewarded, compared, written."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml

from moreward import __version__
from moreward.checkpoint import write_json
from moreward.proof.experiment import Experiment
from moreward.proof.figures import Picture, check_extra, pictures
from moreward.proof.findings import Findings, find
from moreward.proof.printed import printed_tables
from moreward.proof.trials import Trials
from moreward.proof.words import against, headlines, markdown, more_needed, notes, tables
from moreward.report import Table
from moreward.train.track import Reporter

CSS = {"helps": "helps", "hurts": "hurts", "cannot be told": "open"}


@dataclass(frozen=True)
class Report:
    """What was found, and where it was written: report.html, report.md, report.json and figures/ in `folder`."""

    findings: Findings
    folder: Path
    num_trained: int


def run_experiment(experiment: Experiment, *, reporter: Reporter, say: Callable[[str], None]) -> Report:
    """Train what is missing, reward the test pairs with all systems, write the report.

    Raises MissingExtraError before anything is trained where figures cannot be drawn, and what training, `Trials` and
    `find` raise.
    """
    check_extra()
    trials = Trials(experiment, reporter=reporter)
    num_trained = trials.train()
    findings = find(trials)
    say(f"{num_trained} runs trained; all {len(list(trials.runs()))} are there")
    write_report(findings, experiment, trials.folder)
    return Report(findings, trials.folder, num_trained)


def write_report(findings: Findings, experiment: Experiment, folder: Path) -> None:
    """The page, the Markdown, the numbers and the figures."""
    drawn = pictures(findings)
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for picture in drawn:
        (figures / f"{picture.name}.svg").write_text(_alone(picture), encoding="utf-8")
        (figures / f"{picture.name}.png").write_bytes(picture.png)
    more = printed_tables(findings, experiment.printed)
    (folder / "report.md").write_text(markdown(findings, more), encoding="utf-8")
    (folder / "report.html").write_text(page(findings, drawn, more), encoding="utf-8")
    write_json(folder / "report.json", {**findings.to_json(), "made": made()})


def page(findings: Findings, drawn: Sequence[Picture], more: Sequence[tuple[str, Table]] = ()) -> str:
    """One HTML file that needs no other."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(files("moreward.proof").joinpath("report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        css=style_sheet(),
        findings=findings,
        headlines=headlines(findings),
        conclusions=[(mixture, _cards(findings, mixture)) for mixture in findings.mixtures],
        pictures=drawn,
        tables=[*tables(findings), *more],
        notes=notes(findings),
        made=[f"{name}: {value}" for name, value in made().items()],
        configuration=yaml.safe_dump(dict(findings.configuration), sort_keys=False, allow_unicode=True),
    )


def style_sheet() -> str:
    """What all our pages look like, light and dark."""
    return files("moreward.proof").joinpath("page.css").read_text(encoding="utf-8")


def _cards(findings: Findings, mixture: str) -> list[Mapping[str, str]]:
    return [
        {
            "css": CSS[one.word],
            "word": one.word,
            "where": one.domain or "Mean of domains",
            "why": f"{against(one.versus)}." + (f" {more_needed(one.versus)}" if one.word == "cannot be told" else ""),
        }
        for one in findings.conclusions
        if one.mixture == mixture
    ]


def made() -> dict[str, Any]:
    """What made the numbers, beside the experiment itself."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "numpy", "scipy"))
    return {
        "moreward": __version__,
        "python": platform.python_version(),
        "packages": packages,
        "machine": platform.machine(),
    }


def _alone(picture: Picture) -> str:
    """The drawing as a file of its own, on white."""
    return picture.svg.replace("width:100%;", "background:#fff;", 1)
