"""`moreward data label`. Heavy imports stand inside, as in `cli.py`."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moreward.errors import ConfigError

if TYPE_CHECKING:
    from moreward.data.judge.endpoint import Endpoint
    from moreward.data.judge.judges import Judge

EPILOG = (
    "The key is read from OPENAI_API_KEY and written nowhere. OPENAI_BASE_URL and OPENAI_MODEL stand for --base-url "
    "and --model. Killed and started again, it goes on where it was. In docs/labels.md: --key-env, --body, --cache, "
    "--ask-above, --timeout, --tries, --longest-wait, --max-failed."
)


def label(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Pairs or ranked lists: files, globs.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Where the labels go; the report goes beside it.")],
    points: Annotated[
        str, typer.Option("--points", metavar="NAME|FILE", help="Tasks and their points: a shipped set, or your YAML.")
    ] = "dmoerm",
    base_url: Annotated[
        str, typer.Option("--base-url", envvar="OPENAI_BASE_URL", help="An OpenAI-compatible endpoint.")
    ] = "https://api.openai.com/v1",
    model: Annotated[str, typer.Option("--model", envvar="OPENAI_MODEL", help="The judge's name there.")] = "",
    key_env: Annotated[
        str, typer.Option("--key-env", hidden=True, help="The variable that holds the key.")
    ] = "OPENAI_API_KEY",
    body: Annotated[
        list[str] | None,
        typer.Option(
            "--body", metavar="KEY=VALUE", hidden=True, help="A further key of the request; null takes one away."
        ),
    ] = None,
    run: Annotated[Path | None, typer.Option("--run", help="Judge with a trained run instead.")] = None,
    expert: Annotated[
        str, typer.Option("--expert", help="Of the run: this expert; `point`: in each point the one of its name.")
    ] = "",
    classifier: Annotated[
        Path | None, typer.Option("--classifier", help="Judge with a Hugging Face reward model in a directory instead.")
    ] = None,
    template: Annotated[Path | None, typer.Option("--template", help="Your question: text, or YAML by point.")] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", hidden=True, help="What was said; by default OUT.cache.jsonl.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take; send and write nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before many questions.")] = False,
    ask_above: Annotated[
        int, typer.Option("--ask-above", min=0, hidden=True, help="How many questions are many.")
    ] = 1000,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first pairs of each task.")] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Questions under way at once.")] = 8,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.1, hidden=True, help="Seconds to wait for an answer.")
    ] = 60.0,
    tries: Annotated[
        int, typer.Option("--tries", min=1, hidden=True, help="How often a question is asked that fails.")
    ] = 6,
    longest_wait: Annotated[
        float, typer.Option("--longest-wait", min=0, hidden=True, help="Seconds between two tries.")
    ] = 120.0,
    max_failed: Annotated[
        float,
        typer.Option("--max-failed", min=0, max=1, hidden=True, help="Stop when more than this share gets no answer."),
    ] = 0.01,
    shape: Annotated[str | None, typer.Option("--format", help="Row shape, when it cannot be told.")] = None,
    domain: Annotated[str | None, typer.Option("--domain", help="The task of rows that name none.")] = None,
    domain_key: Annotated[str | None, typer.Option("--domain-key", help="The column that names the task.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="A reward model may read the end of long texts.")
    ] = False,
    backbone: Annotated[str | None, typer.Option("--backbone", help="Where the run's backbone is now.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Ask a judge, in both orders, which response is better in each capability; keep what it is sure of."""
    from moreward.bulk.judges import classifier_judge, run_judge
    from moreward.bulk.label import estimate_job, label_file, read_material, refuse_empty
    from moreward.data.judge.endpoint import Endpoint, parse_options
    from moreward.data.judge.show import render_report
    from moreward.data.points import load_points

    if run and classifier:
        raise ConfigError("give one judge: --run or --classifier")
    known = load_points(points)
    with ExitStack() as stack:
        if run:
            names = [name for of_task in known.values() for name in of_task]
            judge: Judge = run_judge(run, names, expert=expert, truncate=truncate, backbone=backbone, device=device)
        elif classifier:
            judge = classifier_judge(classifier, truncate=truncate, device=device)
        else:
            endpoint = Endpoint(
                base_url=base_url,
                model=model,
                key=os.environ.get(key_env, ""),
                timeout=timeout,
                tries=tries,
                longest_wait=longest_wait,
                options=parse_options(body or ()),
            )
            judge = _asked(stack, endpoint, template, concurrency=concurrency, max_failed=max_failed)
        material = read_material(paths, known, shape=shape, domain=domain, domain_key=domain_key, limit=limit)
        if dry_run:
            typer.echo(estimate_job(material, judge, out, cache=cache))
            return
        bar, consent = _Bar(), _Consent(ask_above, is_given=yes or not judge.reads_order)
        report = label_file(material, judge, out, cache=cache, overwrite=overwrite, confirm=consent, progress=bar)
    bar.finish()
    typer.echo(json.dumps(report.to_json(), indent=1) if as_json else render_report(report))
    refuse_empty(report, out)
    typer.echo(f"{report.num_kept:,} labels -> {out}", err=True)


def _asked(
    stack: ExitStack, endpoint: Endpoint, template: Path | None, *, concurrency: int, max_failed: float
) -> Judge:
    from moreward.data.judge.endpoint import Asker
    from moreward.data.judge.judges import ByQuestions
    from moreward.data.judge.prompts import Templates, load_templates

    if endpoint.is_exposed:
        typer.echo(f"warning: {endpoint.base_url} is not encrypted: the key can be read on the way", err=True)
    asker = stack.enter_context(Asker(endpoint))
    return ByQuestions(
        endpoint.name,
        asker.ask,
        asker.stop,
        templates=load_templates(template) if template else Templates(),
        concurrency=concurrency,
        max_failed_share=max_failed,
    )


@dataclass(frozen=True)
class _Consent:
    """Says what a job would take, and lets no large one begin unasked."""

    ask_above: int
    is_given: bool

    def __call__(self, estimate: str, calls: int) -> None:
        typer.echo(estimate, err=True)
        if self.is_given or calls <= self.ask_above:
            return
        if not sys.stdin.isatty():
            raise ConfigError(
                f"{calls:,} questions are more than {self.ask_above:,} (--ask-above) and nobody is there to be asked; "
                "pass --yes to send them"
            )
        typer.confirm("Send them?", abort=True, err=True)


class _Bar:
    def __init__(self) -> None:
        from moreward.train.track import Console

        self._console = Console()
        self._is_started = False

    def __call__(self, done: int, total: int) -> None:
        if not self._is_started:
            self._console.start("label", total)
            self._is_started = True
        self._console.step(done)

    def finish(self) -> None:
        self._console.finish()
