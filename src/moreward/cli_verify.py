"""`moreward verify`: is this still what was trained?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from moreward.verify.checks import Check, Verified


def verify(
    path: Annotated[
        str, typer.Argument(metavar="PATH|URL", help="A run, an exported folder, or a server.", show_default=False)
    ],
    against: Annotated[
        Path | None, typer.Option("--against", metavar="RUN", help="What it must agree with; a server needs it.")
    ] = None,
    route: Annotated[
        str, typer.Option("--route", help="Of a server: native, predict (TEI) or classify (vLLM).")
    ] = "native",
    backbone: Annotated[str | None, typer.Option("--backbone", help="Where the pretrained weights are now.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Recompute the golden rewards and check every hash; exit code 1 where anything does not match."""
    found = _verified(path, against, route, backbone)
    if as_json:
        typer.echo(json.dumps([_as_json(one) for one in found], indent=2))
    else:
        for one in found:
            _say(one)
    if not all(one.holds for one in found):
        raise typer.Exit(1)


def _verified(path: str, against: Path | None, route: str, backbone: str | None) -> list[Verified]:
    if path.startswith(("http://", "https://")):
        from moreward.verify.live import verify_live

        return [verify_live(path, against=against, route=route, backbone=backbone)]
    from moreward.verify.exported import exported_folders, verify_exported
    from moreward.verify.run import verify_run

    if folders := exported_folders(Path(path)):
        return [verify_exported(folder, backbone=backbone, against=against) for folder in folders]
    return [verify_run(Path(path), backbone=backbone, against=against)]


def _say(one: Verified) -> None:
    typer.echo(f"{one.what} ({one.kind})")
    for name, value in one.hashes.items():
        typer.echo(f"  {value[:16]}…  {name}")
    for check in one.checks:
        measured = (
            ""
            if check.difference is None
            else f"; largest difference {check.difference:.2g}, allowed {check.allowed:.2g}"
        )
        typer.echo(f"  {_word(check)} {check.name}: {check.said}{measured}")
    for fault in one.faults:
        typer.echo(fault, err=True)
    typer.echo("  It is what was written." if one.holds else f"  It is not what was written. Faults: {len(one.faults)}")


def _word(check: Check) -> str:
    if not check.holds:
        return "WRONG"
    return "ok   " if check.done else "-    "


def _as_json(one: Verified) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(one), "holds": one.holds}
