"""`moreward export`: a run in the forms of other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moreward.errors import ConfigError

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a trained run.", show_default=False)]


def export(
    run: Run,
    out: Annotated[Path, typer.Option("--out", help="A new folder.", show_default=False)],
    to: Annotated[
        Literal["merged", "peft", "hf", "onnx"],
        typer.Option(
            "--to", help="merged: a plain classifier per expert; peft: an adapter each; hf, onnx: the mixture."
        ),
    ] = "merged",
    with_code: Annotated[
        bool, typer.Option("--with-code", help="hf: put the model's code beside it, for trust_remote_code=True.")
    ] = False,
    evaluation: Annotated[
        Path | None, typer.Option("--evaluation", help="What `moreward eval --json` printed, for the model card.")
    ] = None,
    backbone: Annotated[str | None, typer.Option("--backbone", help="Where the pretrained weights are now.")] = None,
) -> None:
    """Write a run in the form of another library, which must give the golden rewards again before it is kept."""
    from moreward.export.adapters import export_peft
    from moreward.export.card import read_evaluation
    from moreward.export.merged import export_merged
    from moreward.export.mixture import export_hf
    from moreward.export.onnx_graph import export_onnx
    from moreward.scoring import load

    if with_code and to != "hf":
        raise ConfigError(f"--with-code: only --to hf has code of its own (got --to {to})")
    scorer = load(run, backbone=backbone, device="cpu")
    measured = read_evaluation(evaluation, scorer.identity) if evaluation else None
    library = {"peft": "peft", "onnx": "onnxruntime"}.get(to, "transformers")
    if to == "onnx":
        done = export_onnx(scorer, out, evaluation=measured)
    elif to == "hf":
        done = export_hf(scorer, out, with_code=with_code, evaluation=measured)
    else:
        done = (export_merged if to == "merged" else export_peft)(scorer, out, evaluation=measured)
    for one in done:
        typer.echo(f"{one.folder}: golden rewards differ by at most {one.difference:.2g} in {library}")
        if one.offset:
            typer.echo(f"  add {one.offset:.6g} to its logit for the standardised reward: decoders' heads have no bias")
    if len(done) > 1:
        typer.echo("The router is not in these directories: each gives the rewards of its own expert.")
