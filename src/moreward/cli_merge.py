"""Runs made of what is finished: `moreward ensemble`, `merge`, `fold`, `distil`, `adopt`, and `price`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from moreward.cli_common import load_pairs, load_scorer

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a trained run.", show_default=False)]
Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs.", show_default=False)]
NewRun = Annotated[Path, typer.Option("--out", help="The new run.", show_default=False)]
Data = Annotated[
    list[str], typer.Option("--data", metavar="PATH", help="Files, folders or globs of pairs; may be repeated.")
]
BackboneDir = Annotated[str | None, typer.Option("--backbone", help="Where the pretrained weights are now.")]
Truncate = Annotated[bool, typer.Option("--truncate", help="Cut what is too long, and say so, instead of refusing.")]


def add_commands(app: typer.Typer) -> None:
    for command in (ensemble, merge, fold, distil, adopt, price):
        app.command()(command)


def ensemble(
    runs: Runs,
    reference: Annotated[
        list[str],
        typer.Option("--reference", metavar="PATH", help="Pairs whose responses give each member its zero and unit."),
    ],
    out: NewRun,
    how: Annotated[str, typer.Option(help="mean, median, worst, uncertainty or deviation.")] = "mean",
    caution: Annotated[float, typer.Option(min=0, help="λ of uncertainty and deviation.")] = 0.5,
    truncate: Truncate = False,
    backbone: BackboneDir = None,
) -> None:
    """Make one cautious reward of finished runs, of any recipes on one backbone. Nothing is trained."""
    from moreward.train.ensemble import ensemble as ensemble_runs

    made = ensemble_runs(
        runs,
        load_pairs(reference, runs[0]),
        out=out,
        how=how,
        caution=caution,
        reference_name=", ".join(reference),
        backbone=backbone,
        truncate=truncate,
    )
    for run, (mean, std) in made.units.items():
        typer.echo(f"{run}: zero {mean:+.3f}, unit {std:.3f} over {made.num_responses:,} responses")
    if made.too_long:
        typer.echo(f"{made.too_long:,} responses left out, longer than the limit (--truncate allows them)", err=True)
    typer.echo(f"ensemble: {made.run}\nnext:     moreward eval {made.run} --data TEST.jsonl --baseline {runs[0]}")


def merge(
    runs: Runs,
    out: NewRun,
    weights: Annotated[str | None, typer.Option(help="One for each run, as 0.3,0.7; equal by default.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Cut the merged adapters to this rank.")] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="PATH", help="Held-out pairs: accuracy on the way.")
    ] = None,
    different_starts: Annotated[
        bool, typer.Option("--different-starts", help="Also runs of different seeds, whose heads started apart.")
    ] = False,
    truncate: Truncate = False,
    backbone: BackboneDir = None,
) -> None:
    """Average the weights of finished runs into one model of the cost of one (WARM)."""
    from moreward.evals.run import within_limit
    from moreward.train.merge import merge as merge_runs

    held_out = load_pairs(data, runs[0]) if data else []
    if held_out and not truncate:
        held_out, too_long = within_limit(load_scorer(runs[0], truncate=False, backbone=backbone), held_out)
        if too_long:
            typer.echo(f"left out, longer than the limit: {sum(too_long.values())} pairs", err=True)
    made = merge_runs(
        runs,
        out=out,
        weights=_numbers(weights, "--weights"),
        rank=rank,
        different_starts=different_starts,
        backbone=backbone,
        held_out=held_out,
    )
    typer.echo(f"weights: {', '.join(f'{w:.3g}' for w in made.weights)}")
    if made.rank:
        typer.echo(f"adapters: rank {made.rank}, relative error of the products {made.error:.2g}")
    for point in made.path:
        typer.echo(f"    {point.parent} {'-' * 3}> merged, {point.share:.0%} of the way: {point.accuracy:.1%}")
    for parent in made.parents_below:
        typer.echo(f"warning: half way from {parent} is worse than both ends: these weights do not average", err=True)
    typer.echo(f"merged: {made.run}\nnext:   moreward eval {made.run} --data TEST.jsonl --baseline {runs[0]}")


def adopt(
    run: Run,
    folder: Annotated[
        Path,
        typer.Argument(metavar="ADAPTERS", help="A folder of PEFT adapters, named as experts.", show_default=False),
    ],
    out: NewRun,
    backbone: BackboneDir = None,
) -> None:
    """Give experts the adapters of a folder, in a new run; what does not fit is refused and the old expert stays."""
    from moreward.growth.adopt import adopt as adopt_adapters

    made = adopt_adapters(run, folder, out=out, backbone=backbone)
    for name, faults in sorted(made.refused.items()):
        typer.echo("\n".join([f"refused: {name}", *(f"    {fault}" for fault in faults)]), err=True)
    typer.echo(f"adopted: {', '.join(made.experts)}; every other expert and the router stay as they were")
    typer.echo(
        f"run:     {made.run}  (the old run is untouched)\nnext:    moreward calibrate {made.run} --data VAL.jsonl"
    )
    if made.refused:
        raise typer.Exit(1)


def fold(
    run: Run,
    data: Data,
    out: NewRun,
    weights: Annotated[
        Literal["learned", "uniform", "routed"],
        typer.Option(help="learned on the pairs; uniform; routed: as the router divides the prompts."),
    ] = "learned",
    steps: Annotated[int, typer.Option(help="Of learning the weights.")] = 60,
    rank: Annotated[int | None, typer.Option(min=1, help="Cut the joined adapters to this rank.")] = None,
    truncate: Truncate = False,
    backbone: BackboneDir = None,
    seed: Annotated[int, typer.Option(help="Of the division of pairs and their order.")] = 0,
) -> None:
    """Fold a mixture's experts into one dense model by weights learned on pairs (UMM-RM)."""
    from moreward.train.fold import fold_run

    made = fold_run(
        run,
        load_pairs(data, run),
        out=out,
        how=weights,
        steps=steps,
        rank=rank,
        truncate=truncate,
        backbone=backbone,
        seed=seed,
        say=lambda said: typer.echo(said, err=True),
    )
    if made.left_out:
        typer.echo(f"left out: {made.left_out:,} pairs that are too long, or the same once they are cut", err=True)
    typer.echo(
        f"weights fitted on {made.num_pairs:,} pairs; loss and accuracy of the fold on {made.num_held_out:,} others"
    )
    for one in made.tried:
        shares = ", ".join(f"{name} {w:.3f}" for name, w in zip(made.experts, one.weights, strict=True))
        typer.echo(f"  {one.how:<8} loss {one.loss:.3f}  accuracy {one.accuracy:6.1%}  {shares}")
    kept = next(one for one in made.tried if one.how == made.how)
    best = min(made.tried, key=lambda one: one.loss)
    if best.loss < kept.loss:
        typer.echo(f"warning: --weights {best.how} loses less on these pairs than {kept.how}, which was kept", err=True)
    if made.rank:
        typer.echo(f"adapters: rank {made.rank}, relative error of the products {made.error:.2g}")
    typer.echo(f"folded: {made.run}\nnext:   moreward eval {made.run} --data TEST.jsonl --baseline {run}")


def distil(
    run: Run,
    out: NewRun,
    texts: Annotated[
        list[str],
        typer.Option("--texts", metavar="PATH", help="Files of prompt and response(s), or of pairs; may be repeated."),
    ],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings: train.epochs=3, seed=1.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Keep this many layers, evenly spaced.")] = None,
    student: Annotated[str | None, typer.Option(help="The student's backbone; by default the teacher's.")] = None,
    max_length: Annotated[int | None, typer.Option(min=8, help="The student's limit in tokens.")] = None,
    other_tokenizer: Annotated[
        bool, typer.Option("--other-tokenizer", help="Also a student of another tokenizer.")
    ] = False,
    domain_key: Annotated[str | None, typer.Option(help="The column that names the domain.")] = None,
    shape: Annotated[str | None, typer.Option("--format", help="Row shape of pairs, when it cannot be told.")] = None,
    truncate: Truncate = False,
    backbone: BackboneDir = None,
) -> None:
    """Teach one small model what a run says of unlabelled texts. Started again, it goes on."""
    from moreward.config import parse_assignments
    from moreward.train.distil import distil as distil_run
    from moreward.train.track import Console

    made = distil_run(
        run,
        texts,
        out=out,
        layers=layers,
        student=student,
        max_length=max_length,
        other_tokenizer=other_tokenizer,
        truncate=truncate,
        backbone=backbone,
        domain_key=domain_key,
        shape=shape,
        settings=parse_assignments(words or ()),
        reporter=Console(),
    )
    if made.num_bad_rows:
        typer.echo(f"{made.num_bad_rows:,} rows not used: see quarantine.jsonl", err=True)
    if made.too_long:
        typer.echo(f"{made.too_long:,} texts left out, longer than the limit (--truncate allows them)", err=True)
    typer.echo(f"held-out texts, of {made.num_texts:,}: student beside teacher")
    for one in made.agreement:
        same = "-" if one.same_order is None else f"{one.same_order:.1%} of {one.num_pairs:,}"
        pearson, spearman = ("-" if r is None else f"{r:.3f}" for r in (one.pearson, one.spearman))
        typer.echo(
            f"  {one.domain}: {one.num_texts:,} texts, correlation {pearson} (ranks {spearman}), "
            f"error {one.error:.3f}, same order {same}"
        )
    typer.echo(f"parameters: {made.parameters[0]:,} in the teacher, {made.parameters[1]:,} in the student")
    typer.echo(f"distilled: {made.run}\nnext:      moreward eval {made.run} --data TEST.jsonl --baseline {run}")


def price(
    runs: Runs,
    against: Annotated[Path, typer.Option("--against", help="The run that these were made of.", show_default=False)],
    data: Data,
    rounds: Annotated[int, typer.Option(help="Of timing, every run once in each.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    truncate: Truncate = False,
    backbone: BackboneDir = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Say what smaller runs lost in accuracy, and won in size and speed, beside the one they were made of."""
    from moreward.evals.price import price as price_of
    from moreward.report import markdown_price, render_price

    given = [against, *(run for run in dict.fromkeys(runs) if run != against)]
    named = {path.name: path for path in given}
    if len(named) < len(given):  # folders of one name
        named = {str(path): path for path in given}
    scorers = {
        name: load_scorer(path, truncate=truncate, backbone=backbone, device=device) for name, path in named.items()
    }
    found = price_of(scorers, load_pairs(data, against), against=next(iter(named)), rounds=rounds)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
        return
    typer.echo((markdown_price if markdown else render_price)(found))


def _numbers(text: str | None, option: str) -> list[float] | None:
    try:
        return None if text is None else [float(word) for word in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not numbers with commas between them", param_hint=option) from None
