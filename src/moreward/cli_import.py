"""`moreward import`: other projects' reward models as the experts of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moreward.errors import ConfigError

if TYPE_CHECKING:
    from moreward.nn.foreign import Stranger
    from moreward.train.strangers import Imported


def import_command(
    models: Annotated[
        list[str],
        typer.Argument(metavar="NAME=DIR...", help="An expert's name and its model's directory.", show_default=False),
    ],
    pairs: Annotated[
        list[str] | None,
        typer.Option("--pairs", metavar="PATH", help="Pairs for units and router; may be repeated."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The new run.")] = None,
    router: Annotated[
        str, typer.Option("--router", help="The backbone that the router reads prompts with.")
    ] = "minilm",
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=8, help="Longest conversation, in each expert's own tokens.")
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Experts used for a prompt.")] = 1,
    words: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of training; may be repeated.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what each directory is; write nothing.")] = False,
) -> None:
    """Take reward models of other projects as experts, as they are, and learn on pairs which of them is right."""
    from moreward.config import parse_assignments
    from moreward.train.strangers import import_models, look_at
    from moreward.train.track import Console

    folders = _folders(models)
    if dry_run:
        for stranger in look_at(folders, max_length=max_length):
            _say_what(stranger)
        return
    if missing := [option for option, value in (("--pairs", pairs), ("--out", out)) if not value]:
        raise ConfigError([f"{option}: is required without --dry-run" for option in missing])
    assert pairs is not None
    assert out is not None
    made = import_models(
        folders,
        pairs,
        out=out,
        router=router,
        max_length=max_length,
        top_k=top_k,
        settings=parse_assignments(words or ()),
        reporter=Console(),
    )
    for expert in made.experts:
        _say_what(expert.stranger)
    _say_measured(made, pairs)


def _folders(models: list[str]) -> dict[str, str]:
    parted = [word.partition("=") for word in models]
    faults = [
        f"{word!r} is not NAME=DIR"
        for word, (name, _, folder) in zip(models, parted, strict=True)
        if not (name and folder)
    ]
    names = [name for name, _, _ in parted]
    faults += [f"{name!r} names two directories" for name in sorted({n for n in names if names.count(n) > 1})]
    if faults:
        raise ConfigError(faults)
    return {name: folder for name, _, folder in parted}


def _say_what(stranger: Stranger) -> None:
    kind = {
        "classifier": "classifier of one label",
        "value_head": "language model with a LLaMA-Factory value head",
        "openrlhf": f"OpenRLHF reward model, head {stranger.head}",
    }[stranger.kind]
    typer.echo(f"{stranger.name}: {stranger.folder}")
    typer.echo(
        f"  {stranger.architecture or stranger.shape['model_type']}, {kind}, {stranger.num_parameters:,} parameters"
    )
    typer.echo(f"  reads {stranger.max_length:,} of its own tokens; {stranger.reads_turns}")
    if stranger.kind == "openrlhf" and (stranger.mean, stranger.std) != (0.0, 1.0):
        typer.echo(f"  normalised by its makers: mean {stranger.mean:.4g}, standard deviation {stranger.std:.4g}")
    for note in stranger.notes:
        typer.echo(f"  {note}")


def _say_measured(made: Imported, pairs: list[str]) -> None:
    typer.echo(f"on {made.num_held_out:,} held-out pairs, ranked right:")
    for expert in made.experts:
        share = "-" if expert.val_accuracy is None else f"{expert.val_accuracy:.1%}"
        typer.echo(f"  {expert.name}: {share}; zero {expert.mean:+.3f}, unit {expert.std:.3f}")
    if made.routed is not None:
        typer.echo(f"  routed: {made.routed:.1%}")
        if made.routed <= (made.best.val_accuracy or 0.0):
            typer.echo(f"warning: {made.best.name} alone is as good as the router on these pairs", err=True)
    typer.echo(f"imported: {made.run}\nnext:     moreward eval {made.run} --data TEST.jsonl")
