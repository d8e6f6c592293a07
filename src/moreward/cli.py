"""The `moreward` command. Heavy imports stand inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moreward.cli_common import (
    check_same_pairs,
    evaluated,
    load_pairs,
    load_scorer,
    remote_scorer,
    say_too_long,
)
from moreward.cli_compare import EPILOG as COMPARE_EPILOG
from moreward.cli_compare import compare
from moreward.cli_domains import EPILOG as DOMAINS_EPILOG
from moreward.cli_domains import domains
from moreward.cli_export import export
from moreward.cli_grow import add_commands as add_grow_commands
from moreward.cli_import import import_command
from moreward.cli_label import EPILOG, label
from moreward.cli_merge import add_commands
from moreward.cli_serve import serve
from moreward.cli_verify import verify
from moreward.errors import ConfigError, MorewardError

if TYPE_CHECKING:
    from moreward.client import Client
    from moreward.evals.run import Result
    from moreward.scoring import Scorer
    from moreward.types import Preference

app = typer.Typer(
    help="Mixture-of-experts reward models: train, evaluate, extend, score.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Look at preference data; make labels of capabilities.", no_args_is_help=True)
data_app.command("label", epilog=EPILOG)(label)
data_app.command("domains", epilog=DOMAINS_EPILOG)(domains)
app.add_typer(data_app, name="data")
app.command(epilog=COMPARE_EPILOG)(compare)
app.command()(serve)
app.command()(export)
app.command("import")(import_command)
add_grow_commands(app)
app.command()(verify)
add_commands(app)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a trained run.", show_default=False)]
Data = Annotated[
    list[str], typer.Option("--data", metavar="PATH", help="Files, folders or globs of pairs; may be repeated.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
BackboneDir = Annotated[str | None, typer.Option("--backbone", help="Where the pretrained weights are now.")]
Truncate = Annotated[bool, typer.Option("--truncate", help="Cut what is too long, and say so, instead of refusing.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option("--dtype", help="fp32 or bf16; the price of bf16 is shown by eval --dtype-check.")]
Uncertain = Annotated[bool, typer.Option("--uncertainty", help="Say what speaks against trusting each reward.")]
Conservative = Annotated[float, typer.Option("--conservative", min=0, help="λ of mean - λ · experts' disagreement.")]
Abstain = Annotated[
    list[str] | None,
    typer.Option(
        "--abstain",
        metavar="NAME=LIMIT",
        help="Give no reward beyond: out_of_domain, router_entropy, disagreement. May be repeated.",
    ),
]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="A reward depends on its own text alone, to the last bit; slower.")
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="The folder to write.")] = Path("runs/demo"),
    pairs: Annotated[int, typer.Option("--pairs", min=20, help="Training pairs per domain.")] = 120,
    noise: Annotated[float, typer.Option("--noise", min=0, max=0.5, help="Share of flipped training labels.")] = 0.1,
    seed: Annotated[int, typer.Option("--seed")] = 0,
) -> None:
    """Train one model and a mixture on generated preferences that conflict, and compare them."""
    from moreward.demo import run_demo

    run_demo(out, pairs=pairs, noise=noise, seed=seed, say=typer.echo)


@app.command(
    epilog="Keys: recipe, backbone, data.train, data.val, tune, out, seed, preset, train.*, system.*. "
    "`moreward list` shows the recipes and every key."
)
def train(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[CONFIG.yaml] [key=value]...", help="A file (or the folder of a run), and keys on top of it."
        ),
    ],
) -> None:
    """Train a run. Given the folder of one that was cut short, go on with it."""
    from moreward.config import merge, parse_assignments, read_config
    from moreward.train.runner import is_main_process
    from moreward.train.runner import train as train_run
    from moreward.train.track import Console, Silent

    first = Path(words[0])
    stored = first / "config.yaml" if first.is_dir() else first
    given = {} if "=" in words[0] else read_config(stored)
    given = merge(given, parse_assignments(words[1:] if given else words))
    is_main = is_main_process()
    run = train_run(given, reporter=Console() if is_main else Silent())
    if is_main:
        typer.echo(f"trained: {run}\nnext:    moreward eval {run} --data TEST.jsonl")


@app.command("eval")
def evaluate(
    run: Run,
    data: Data,
    baseline: Annotated[Path | None, typer.Option(help="A single model of the same budget, to test against.")] = None,
    as_json: AsJson = False,
    truncate: Truncate = False,
    backbone: BackboneDir = None,
    device: Device = "auto",
    domain_key: Annotated[str | None, typer.Option(help="The column that names the domain.")] = None,
    shape: Annotated[str | None, typer.Option("--format", help="Row shape; auto detects. Default: as trained.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random router.")] = 0,
    dtype_check: Annotated[bool, typer.Option("--dtype-check", help="Say what bf16 costs instead.")] = False,
    diversity: Annotated[bool, typer.Option("--diversity", help="Ask every expert: do they err together?")] = False,
) -> None:
    """Say per domain how good a run is, with intervals, and whether it beats a single model."""
    from moreward.data.split import linked_groups
    from moreward.evals.compare import compare as compare_systems
    from moreward.report import calibration_words, render_evaluation

    preferences = load_pairs(data, run, domain_key=domain_key, shape=shape)
    if dtype_check:
        _say_price_of_bf16(run, preferences, as_json=as_json, truncate=truncate, backbone=backbone, device=device)
        return
    base = f"{baseline.name} (baseline)" if baseline else ""
    runs = {run.name: run, **({base: baseline} if baseline else {})}
    how: dict[str, Any] = {"truncate": truncate, "backbone": backbone, "device": device, "seed": seed}
    results = {
        name: evaluated(path, preferences, **how, every_expert=diversity and path == run) for name, path in runs.items()
    }
    result = results[run.name]
    comparison = None
    if baseline:
        check_same_pairs(results)
        groups, domains = linked_groups(result.preferences), [p.domain for p in result.preferences]
        correct = {name: r.correct for name, r in results.items()}
        comparison = compare_systems(correct, groups, domains, baseline=base)
    if as_json:
        from moreward.runs import identity, model_folder

        told: dict[str, Any] = {"run": {"folder": str(run), "model": identity(model_folder(run))}}
        told |= {"evaluation": result.evaluation.to_json(), "routing": result.routing.to_json()}
        told |= {"too_long": dict(result.too_long), "calibration": result.calibration}
        told |= {"comparison": comparison.to_json()} if comparison else {}
        told |= {"diversity": result.diversity.to_json()} if result.diversity else {}
        typer.echo(json.dumps(told, indent=1))
        return
    typer.echo(render_evaluation(result.evaluation, result.routing, comparison, name=run.name if baseline else ""))
    typer.echo(calibration_words(result.calibration))
    if baseline:
        typer.echo(_budgets(results))
    if result.diversity:
        typer.echo(result.diversity.to_text())
    elif diversity:
        typer.echo(f"{run}: has neither experts nor members that could be told apart", err=True)
    say_too_long(result)


@app.command()
def score(
    words: Annotated[
        list[str],
        typer.Argument(metavar="RUN IN.jsonl", help="A run, and rows with prompt and response, or messages."),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Where the rewards go.")],
    server: Annotated[str | None, typer.Option("--server", metavar="URL", help="Ask a server in place of RUN.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Add every expert's reward.")] = False,
    uncertainty: Uncertain = False,
    conservative: Conservative = 0.0,
    abstain: Abstain = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    truncate: Truncate = False,
    max_bad_share: Annotated[float, typer.Option(min=0, max=1, help="Stop when more rows than this are bad.")] = 0.01,
    backbone: BackboneDir = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    deterministic: Deterministic = False,
) -> None:
    """Give every row of a file its reward. Killed and started again, it goes on where it was."""
    from moreward.bulk import score_file
    from moreward.train.track import Console
    from moreward.uncertainty import parse_limits

    wanted = 1 if server else 2
    if len(words) != wanted:
        needed = "IN.jsonl alone with --server" if server else "RUN and IN.jsonl"
        raise ConfigError(f"score: give {needed} (got {' '.join(words)})")
    source = Path(words[-1])
    console = Console()
    local = {"--backbone": backbone, "--conservative": conservative, "--abstain": abstain, "--dtype": dtype != "fp32"}
    if server and (given := [name for name, value in local.items() if value]):
        raise ConfigError(f"{', '.join(given)}: of a run; a server decides it where it is started")
    remote = remote_scorer(server, truncate=truncate) if server else None
    scorer: Scorer | Client
    if remote:
        scorer = remote
    else:
        how: dict[str, Any] = {"conservative": conservative, "abstain": parse_limits(abstain or [])}
        how |= {"device": device, "dtype": dtype, "deterministic": deterministic}
        scorer = load_scorer(Path(words[0]), truncate=truncate, backbone=backbone, **how)
        if uncertainty:
            scorer.calibration()
    started = False

    def progress(done: int, total: int | None) -> None:
        nonlocal started
        if not started:
            console.start("score", total or 0, done)
            started = True
        console.step(done)

    try:
        report = score_file(
            scorer,
            source,
            out,
            explain=explain,
            uncertainty=uncertainty,
            overwrite=overwrite,
            max_bad_share=max_bad_share,
            progress=progress,
        )
    finally:
        if remote:
            remote.close()
    console.finish()
    resumed = f", {report.resumed_from:,} of them before" if report.resumed_from else ""
    typer.echo(f"{report.rows:,} rows: {report.scored:,} rewards, {report.bad:,} bad{resumed} -> {out}", err=True)
    if report.abstained:
        counts = ", ".join(f"{domain} {n:,}" for domain, n in report.abstained.items())
        typer.echo(f"no reward was given in {sum(report.abstained.values()):,} of these rows: {counts}", err=True)
    for line in report.bad_rows:
        typer.echo(line, err=True)
    raise typer.Exit(report.exit_code)


@app.command()
def calibrate(
    run: Run,
    data: Data,
    as_json: AsJson = False,
    truncate: Truncate = False,
    backbone: BackboneDir = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Of the division into halves.")] = 0,
) -> None:
    """Fit a finished run's probabilities and out-of-domain scores on pairs that it was not trained on."""
    from moreward.report import calibration_words
    from moreward.train.calibrate import calibrate_run

    scorer = load_scorer(run, truncate=truncate, backbone=backbone, device=device)
    report = calibrate_run(scorer, run, load_pairs(data, run), seed=seed).report
    if as_json:
        typer.echo(json.dumps(report, indent=1))
        return
    typer.echo(f"{report['pairs']:,} pairs, {report['pairs_left_out'] + report['pairs_not_used']:,} not used")
    for name, temperature in report["temperatures"].items():
        typer.echo(f"    temperature of {name}: {temperature:.3f}")
    if few := report["too_few_pairs_for_their_own"]:
        typer.echo(f"    that of all pairs, for too few of their own: {', '.join(few)}")
    typer.echo(calibration_words(report["quality"]))


@app.command("list")
def list_recipes() -> None:
    """Show the recipes and every configuration key with its default."""
    from moreward.config import RunConfig
    from moreward.registry import find_recipe, recipe_names

    for name in recipe_names():
        recipe = find_recipe(name)
        module = sys.modules[recipe.__module__].__doc__ or ""
        typer.echo((module.strip() or name).splitlines()[0])
        typer.echo(f"  recipe={name}  tune: {', '.join(recipe.tunes)}  {recipe.paper}")
        for key, info in recipe.Config.model_fields.items():
            if key != "tune":
                typer.echo(f"    system.{key:<18} {_default(info)}")
        typer.echo("")
    typer.echo("Every recipe:")
    for line in _keys(RunConfig, ""):
        typer.echo(f"    {line}")


@data_app.command("check")
def data_check(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Files, folders or globs.")],
    as_json: AsJson = False,
    shape: Annotated[str | None, typer.Option("--format", help="Row shape, when it cannot be told.")] = None,
    domain_key: Annotated[str | None, typer.Option(help="The column that names the domain.")] = None,
    backbone: Annotated[
        str, typer.Option(help="Count tokens with this backbone's tokenizer; none counts characters.")
    ] = "minilm",
    max_length: Annotated[int, typer.Option(min=8, help="The limit in tokens.")] = 512,
) -> None:
    """Say per domain what is in the data and what is wrong with it; exit code 1 on errors."""
    from moreward.data.audit import audit, render
    from moreward.data.load import load_preferences

    loaded = load_preferences(paths, shape=shape, domain_key=domain_key, max_bad_share=1.0, strict=False)
    if backbone == "none":
        found = audit(loaded)
    else:
        from moreward.data.batches import Encoder
        from moreward.nn.backbone import load_tokenizer

        encoder = Encoder(load_tokenizer(backbone), max_length)
        with encoder.reading_ahead(loaded.preferences):
            found = audit(loaded, measure=encoder.measure, marks=encoder.marks)
    typer.echo(json.dumps(found.to_json(), indent=1) if as_json else render(found))
    raise typer.Exit(1 if found.has_errors else 0)


def main() -> None:
    """Entry point. A MorewardError is printed without a traceback; anything else is our bug and keeps it."""
    try:
        app()
    except MorewardError as error:
        for line in str(error).splitlines():
            typer.echo(f"error: {line}" if not line.startswith(" ") else line, err=True)
        sys.exit(error.exit_code)
    except SystemExit as ended:
        if ended.code == 130:  # what typer makes of Ctrl-C
            typer.echo("stopped; start the same command again to go on", err=True)
        raise


def _say_price_of_bf16(
    run: Path, preferences: list[Preference], *, as_json: bool, truncate: bool, backbone: str | None, device: str
) -> None:
    from moreward.evals.dtype import dtype_check
    from moreward.report import render_dtype

    both = [load_scorer(run, truncate=truncate, backbone=backbone, device=device, dtype=d) for d in ("fp32", "bf16")]
    prices = dtype_check(both[0], both[1], preferences)
    typer.echo(json.dumps([p.to_json() for p in prices], indent=1) if as_json else render_dtype(prices))


def _budgets(results: dict[str, Result]) -> str:
    """The parameters of each side: whether the comparison is a fair one is for the reader to see."""
    costs = {name: r.evaluation.cost for name, r in results.items()}
    told = [f"{name} {c.parameters_stored:,} ({c.parameters_active:,} active)" for name, c in costs.items() if c]
    return f"Parameters stored: {', '.join(told)}."


def _keys(model: Any, prefix: str) -> list[str]:
    from pydantic import BaseModel

    lines = []
    for name, info in model.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            lines += _keys(inner, f"{name}.")
        elif name != "system":
            lines.append(f"{prefix + name:<28} {_default(info)}")
    return lines


def _default(info: Any) -> str:
    default = "required" if info.is_required() else info.get_default(call_default_factory=True)
    shown = "" if default in (None, (), "") else f"{default}"
    return f"{shown:<12} {info.description or ''}".rstrip()
