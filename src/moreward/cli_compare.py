"""`moreward compare`: runs side by side, or a whole experiment from its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from moreward.errors import ConfigError

EPILOG = (
    "Runs: `moreward compare runs/a runs/b --data TEST.jsonl`. An experiment: `moreward compare EXPERIMENT.yaml "
    "KEY=VALUE ...`, or `paper` for the one that is shipped; what is trained already is not trained again."
)


def compare(
    words: Annotated[
        list[str],
        typer.Argument(metavar="RUN... | EXPERIMENT.yaml KEY=VALUE...", help="Runs to compare, or an experiment."),
    ],
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="PATH", help="Runs: the pairs to compare them on.")
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="Runs: the one to test against; by default the first.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    truncate: Annotated[bool, typer.Option("--truncate", help="Runs: cut what is too long.")] = False,
    backbone: Annotated[str | None, typer.Option("--backbone", help="Runs: where the pretrained weights are.")] = None,
    device: Annotated[str, typer.Option("--device", help="Runs: auto, cpu or cuda.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Experiment: only say what would be trained.")] = False,
) -> None:
    """Put runs side by side on the same pairs, or run an experiment: train, test, report whether a mixture helps."""
    from moreward.proof.experiment import is_experiment

    if is_experiment(words[0]):
        of_runs = {"--data": data, "--baseline": baseline, "--truncate": truncate, "--backbone": backbone}
        if given := [name for name, value in of_runs.items() if value]:
            raise ConfigError(f"{', '.join(given)}: of runs, not of an experiment; say it in the file or as key=value")
        _experiment(words[0], words[1:], markdown=markdown, as_json=as_json, dry_run=dry_run)
        return
    if not data:
        raise ConfigError("--data: is required: the pairs to compare the runs on")
    if dry_run:
        raise ConfigError("--dry-run: of an experiment; runs are there already")
    _runs([Path(word) for word in words], data, baseline, markdown, as_json, truncate, backbone, device)


def _experiment(source: str, words: list[str], *, markdown: bool, as_json: bool, dry_run: bool) -> None:
    from moreward.proof.experiment import read_experiment
    from moreward.proof.printed import printed_tables
    from moreward.proof.report import run_experiment
    from moreward.proof.trials import Trials, describe
    from moreward.proof.words import markdown as as_markdown
    from moreward.proof.words import render
    from moreward.train.track import Console

    experiment = read_experiment(source, words)
    if dry_run:
        typer.echo("\n".join(describe(Trials(experiment))))
        return
    report = run_experiment(experiment, reporter=Console(), say=lambda said: typer.echo(said, err=True))
    if as_json:
        typer.echo(json.dumps(report.findings.to_json(), indent=1))
        return
    more = printed_tables(report.findings, experiment.printed)
    typer.echo((as_markdown if markdown else render)(report.findings, more))
    typer.echo(f"report: {report.folder / 'report.html'}", err=True)


def _runs(
    runs: list[Path],
    data: list[str],
    baseline: str | None,
    markdown: bool,
    as_json: bool,
    truncate: bool,
    backbone: str | None,
    device: str,
) -> None:
    from moreward.cli_common import check_same_pairs, evaluated, load_pairs, say_too_long
    from moreward.data.split import linked_groups
    from moreward.evals.compare import compare as compare_systems
    from moreward.report import markdown_systems, render_systems

    preferences = load_pairs(data, runs[0])
    named = {path.name: path for path in runs}
    if len(named) < len(runs):  # folders of one name
        named = {str(path): path for path in runs}
    how: dict[str, Any] = {"truncate": truncate, "backbone": backbone, "device": device}
    results = {name: evaluated(path, preferences, **how) for name, path in named.items()}
    check_same_pairs(results)
    first = next(iter(results.values()))
    groups, domains = linked_groups(first.preferences), [p.domain for p in first.preferences]
    correct = {name: r.correct for name, r in results.items()}
    wanted = Path(baseline) if baseline else runs[0]
    base = next((name for name, path in named.items() if path == wanted or name == wanted.name), None)
    if base is None:
        raise typer.BadParameter(f"{baseline!r} is not among the runs {', '.join(correct)}", param_hint="--baseline")
    comparison = compare_systems(correct, groups, domains, baseline=base) if len(correct) > 1 else None
    evaluations = {name: r.evaluation for name, r in results.items()}
    if as_json:
        told: dict[str, Any] = {
            "evaluations": {k: v.to_json() for k, v in evaluations.items()},
            "routing": {k: r.routing.to_json() for k, r in results.items()},
            "comparison": comparison.to_json() if comparison else None,
        }
        typer.echo(json.dumps(told, indent=1))
        return
    typer.echo((markdown_systems if markdown else render_systems)(evaluations, comparison))
    say_too_long(first)
