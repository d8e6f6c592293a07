"""`moreward extend`, `replace`, `remove`, `history`, `rollback`: a mixture that changes, expert by expert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moreward.cli_common import load_scorer, measured

if TYPE_CHECKING:
    from moreward.growth.change import Change
    from moreward.systems._base import Kind

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a trained run.", show_default=False)]
Domain = Annotated[
    str,
    typer.Option("--domain", "--expert", help="The domain whose expert it is; a member of an ensemble, an objective."),
]
Data = Annotated[
    list[str], typer.Option("--data", metavar="PATH", help="Files, folders or globs of its pairs; may be repeated.")
]
OldData = Annotated[
    list[str] | None, typer.Option("--old-data", help="Where the other domains' training pairs are now.")
]
Shape = Annotated[str | None, typer.Option("--format", help="Row shape of the new data.")]
Truncate = Annotated[bool, typer.Option("--truncate", help="Cut what is too long, and say so, instead of refusing.")]
BackboneDir = Annotated[str | None, typer.Option("--backbone", help="Where the pretrained weights are now.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be trained; train and write nothing.")]
WORDS = {"extend": "new", "replace": "replaced", "remove": ""}


def add_commands(app: typer.Typer) -> None:
    for command in (extend, replace, remove, history, rollback):
        app.command()(command)


def extend(
    run: Run,
    domain: Domain,
    data: Data,
    out: Annotated[Path | None, typer.Option("--out", help="The new run; by default RUN+DOMAIN.")] = None,
    old_data: OldData = None,
    shape: Shape = None,
    truncate: Truncate = False,
    backbone: BackboneDir = None,
    dry_run: DryRun = False,
) -> None:
    """Add a domain: one new expert and a refitted router; every old expert stays the same to the bit."""
    _change("extend", run, domain, data, out, old_data, shape, truncate, backbone, dry_run)


def replace(
    run: Run,
    domain: Domain,
    data: Data,
    out: Annotated[Path | None, typer.Option("--out", help="The new run; by default RUN+new-DOMAIN.")] = None,
    old_data: OldData = None,
    shape: Shape = None,
    truncate: Truncate = False,
    backbone: BackboneDir = None,
    dry_run: DryRun = False,
) -> None:
    """Train the expert of a domain anew, on other pairs; every other expert stays the same to the bit."""
    _change("replace", run, domain, data, out, old_data, shape, truncate, backbone, dry_run)


def remove(
    run: Run,
    domain: Domain,
    out: Annotated[Path | None, typer.Option("--out", help="The new run; by default RUN-DOMAIN.")] = None,
    old_data: OldData = None,
    truncate: Truncate = False,
    backbone: BackboneDir = None,
    dry_run: DryRun = False,
) -> None:
    """Leave an expert out and refit the router; every other expert stays the same to the bit."""
    _change("remove", run, domain, [], out, old_data, None, truncate, backbone, dry_run)


def history(run: Run, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show the versions that led to a run, the first one first."""
    from dataclasses import asdict

    from moreward.growth.history import history as versions_of

    versions = versions_of(run)
    if as_json:
        typer.echo(json.dumps([{**asdict(one), "run": str(one.run)} for one in versions], indent=2))
        return
    for one in versions:
        what = one.state or f"{one.change}; {len(one.domains)} domains: {', '.join(one.domains)}"
        typer.echo(f"{one.model[:12]}  {one.run}  {what}")


def rollback(
    run: Run, out: Annotated[Path | None, typer.Option("--out", help="A new folder; by default RUN-back.")] = None
) -> None:
    """Copy the version before this one, byte for byte, to a new folder; nothing is deleted."""
    from moreward.growth.history import roll_back
    from moreward.runs import identity, model_folder

    made = roll_back(run, out)
    typer.echo(f"rolled back: {made}  (model {identity(model_folder(made))[:12]}; {run} is untouched)")


def _change(
    kind: Kind,
    run: Path,
    domain: str,
    data: list[str],
    out: Path | None,
    old_data: list[str] | None,
    shape: str | None,
    truncate: bool,
    backbone: str | None,
    dry_run: bool,
) -> None:
    from moreward.growth import change
    from moreward.train.track import Console

    told: dict[str, Any] = {"out": out, "old_data": old_data or (), "truncate": truncate, "backbone": backbone}
    if kind != "remove":
        told["shape"] = shape
    if dry_run:
        for stage in change.plan(kind, run, domain, data, **told):
            about = "" if stage.seconds is None else f", about {stage.seconds:.0f} s if this machine is as fast as then"
            typer.echo(
                f"would train {stage.stage}: {stage.parameters:,} parameters, at most "
                f"{stage.pairs:,} pairs and {stage.steps:,} steps{about}"
            )
        return
    told["reporter"] = Console()
    if kind == "extend":
        made = change.extend(run, domain, data, **told)
    elif kind == "replace":
        made = change.replace_expert(run, domain, data, **told)
    else:
        made = change.remove_expert(run, domain, **told)
    _say(made, truncate, backbone)


def _say(made: Change, truncate: bool, backbone: str | None) -> None:
    from moreward.evals.statistics import gains_by_domain
    from moreward.growth.change import DONE
    from moreward.report import render_change

    typer.echo(_golden_words(made))
    if made.replayed is not None:
        right = ", ".join(f"{d} {100 * a:.1f}%" for d, a in made.replayed["held_out_router_accuracy"].items())
        typer.echo(f"gate refitted without the old data; right on held-out prompts: {right or 'none are kept'}")
    if not made.old_val:
        typer.echo("No held-out pairs of the old domains are at hand; they are not in the table.")
    if pairs := [*made.old_val, *made.new_val]:
        before, after = (
            measured(load_scorer(run, truncate=truncate, backbone=backbone), pairs) for run in (made.parent, made.run)
        )
        gains = gains_by_domain(before.correct, after.correct, after.preferences)
        typer.echo(render_change(before, after, gains, made.domain, word=WORDS[made.kind], mixes=made.mixes))
    typer.echo(f"{DONE[made.kind]}: {made.run}  (the old run is untouched)")
    if made.golden_difference is None:
        raise typer.Exit(2)
    if made.golden_difference:
        raise typer.Exit(1)


def _golden_words(made: Change) -> str:
    who = "golden rewards of the experts that stay"
    if made.golden_difference is None:
        return (
            f"{who}: NOTHING WAS COMPARED. The old run has no golden texts: its held-out pairs are token ids. A run "
            "whose data.val has pairs with texts stores some; train it so to have every change checked."
        )
    same = " (bit-identical)" if made.golden_difference == 0 else ""
    return f"{who}: {made.num_golden} recomputed, largest change {made.golden_difference:g}{same}"
