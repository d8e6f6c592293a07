"""`moreward serve`: a run behind HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a trained run.", show_default=False)]


def serve(
    run: Run,
    host: Annotated[str, typer.Option(help="Other than this machine alone needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any that is free.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Keys, one a line; else $MOREWARD_API_KEY. Every route then needs one.")
    ] = None,
    admin_key_file: Annotated[
        Path | None, typer.Option(help="Keys of the routes under /admin/, one a line; without it they are not there.")
    ] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="What requests call the model; may be repeated. By default the folder.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16; the price is shown by eval --dtype-check.")] = "fp32",
    backbone: Annotated[str | None, typer.Option(help="Where the pretrained weights are now.")] = None,
    free_batches: Annotated[
        bool, typer.Option("--free-batches", help="Faster; a reward's last digits then depend on what else is scored.")
    ] = False,
    queue_items: Annotated[int, typer.Option(min=1, help="Beyond so many that wait, 503.")] = 8192,
    insecure: Annotated[bool, typer.Option("--insecure", help="Let other machines in without a key.")] = False,
    metrics_public: Annotated[bool, typer.Option("--metrics-public", help="/metrics needs no key.")] = False,
    retemplate: Annotated[
        bool,
        typer.Option("--retemplate", help="/get_reward: judge the response in the model's own template."),
    ] = False,
) -> None:
    """Serve rewards over HTTP, in the formats of OpenRLHF, verl, vLLM, SGLang, TEI and others."""
    from moreward.errors import MissingExtraError
    from moreward.serve.settings import Limits, Settings, read_keys

    settings = Settings(
        run=run,
        host=host,
        port=port,
        names=tuple(served_model_name or ()),
        keys=read_keys(api_key_file),
        admin_keys=() if admin_key_file is None else read_keys(admin_key_file, "--admin-key-file"),
        insecure=insecure,
        metrics_public=metrics_public,
        retemplate=retemplate,
        device=device,
        dtype=dtype,
        backbone=backbone,
        free_batches=free_batches,
        limits=Limits(queue_items=queue_items),
    )
    try:
        from moreward.serve.run import serve as serve_run
    except ImportError as error:
        raise MissingExtraError(f"moreward serve ({error.name} is not installed)", "serve") from error
    serve_run(settings, typer.echo)
