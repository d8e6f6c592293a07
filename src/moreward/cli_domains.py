"""`moreward data domains`. Heavy imports stand inside, as in `cli.py`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from moreward.errors import ConfigError

EPILOG = "The rule behind the advice is printed with it, and stands in docs/domains.md with its error rates."


def domains(
    data: Annotated[
        list[str], typer.Option("--data", metavar="PATH", help="Files, folders or globs of pairs; may be repeated.")
    ],
    backbone: Annotated[str, typer.Option("--backbone", help="A pretrained directory; it stays frozen.")] = "minilm",
    null: Annotated[
        int, typer.Option("--null", min=0, metavar="N", help="Measure the rule's errors on N random divisions.")
    ] = 0,
    max_pairs: Annotated[
        int, typer.Option("--max-pairs", min=1, help="Of each domain, from all its prompt groups in turn.")
    ] = 1000,
    shape: Annotated[str | None, typer.Option("--format", help="Row shape, when it cannot be told.")] = None,
    domain_key: Annotated[str | None, typer.Option("--domain-key", help="The column that names the domain.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of folds, drawn pairs and divisions.")] = 0,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut what is too long instead of leaving it out.")
    ] = False,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say whether each domain deserves an expert of its own: transfer, conflict, advice with its evidence."""
    from moreward.data.load import load_preferences, of_whole_responses
    from moreward.domains.advice import advise, check_labels
    from moreward.domains.material import read_material
    from moreward.domains.null import simulate
    from moreward.domains.words import render
    from moreward.train.track import Console

    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device: {device!r} is neither cpu nor cuda")
    loaded = of_whole_responses(load_preferences(data, shape=shape, domain_key=domain_key, use_margin=False))
    check_labels(loaded.preferences)
    console = Console()
    how: dict[str, Any] = {"truncate": truncate, "seed": seed, "device": device, "reporter": console}
    material = read_material(loaded.preferences, backbone, max_pairs=max_pairs, **how)
    findings = advise(material.pairs, seed=seed)
    rates = None
    if null:
        console.start("error rates", 3 * null)
        rates = simulate(material.pairs, num_draws=null, seed=seed, progress=lambda done, _: console.step(done))
        console.finish()
    _say_left_out(Counter(row.reason for row in loaded.quarantine), material.too_long, material.not_drawn)
    told = findings.to_json() | {"error_rates": rates.to_json() if rates else None}
    told |= {"too_long": dict(material.too_long), "not_drawn": dict(material.not_drawn)}
    typer.echo(json.dumps(told, indent=1) if as_json else render(findings, rates))


def _say_left_out(reasons: Mapping[str, int], too_long: Mapping[str, int], not_drawn: Mapping[str, int]) -> None:
    for what, counts in (
        ("rows not used", reasons),
        ("left out, longer than the limit (allow them with --truncate)", too_long),
        ("left out by --max-pairs", not_drawn),
    ):
        if counts:
            typer.echo(f"{what}: {', '.join(f'{name} {n:,}' for name, n in sorted(counts.items()))}", err=True)
