"""`moreward data domains`. Heavy imports stand inside, as in `cli.py`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moreward.errors import ConfigError

if TYPE_CHECKING:
    from moreward.domains.discover import Discovered
    from moreward.types import Preference

BY = ("prompts", "preferences")

EPILOG = "The rule behind the advice is printed with it; --null measures how often it is wrong on your data."


def domains(
    data: Annotated[
        list[str], typer.Option("--data", metavar="PATH", help="Files, folders or globs of pairs; may be repeated.")
    ],
    backbone: Annotated[str, typer.Option("--backbone", help="A pretrained directory; it stays frozen.")] = "minilm",
    discover: Annotated[
        str | None, typer.Option("--discover", metavar="K|auto", help="Find domains instead of judging named ones.")
    ] = None,
    write: Annotated[
        Path | None, typer.Option("--write", help="With --discover: the pairs, each with a domain column.")
    ] = None,
    by: Annotated[
        str, typer.Option("--by", help="With --write: prompts (clusters) or preferences (latent groups).")
    ] = "prompts",
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
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write domains.html with figures, and domains.json.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say whether each domain deserves an expert of its own: transfer, conflict, advice with its evidence."""
    from moreward.data.load import load_preferences, of_whole_responses
    from moreward.domains.advice import advise, check_labels
    from moreward.domains.discover import discover as find_domains
    from moreward.domains.material import read_material
    from moreward.domains.null import simulate
    from moreward.domains.page import write_advice, write_discovered
    from moreward.domains.words import render, render_discovered
    from moreward.train.track import Console

    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device: {device!r} is neither cpu nor cuda")
    if out:
        from moreward.proof.figures import check_extra

        check_extra()
    num_parts = _check_discovery(discover, write, by, null)
    loaded = of_whole_responses(load_preferences(data, shape=shape, domain_key=domain_key, use_margin=False))
    if not discover:
        check_labels(loaded.preferences)
    console = Console()
    how: dict[str, Any] = {"truncate": truncate, "seed": seed, "device": device, "reporter": console}
    material = read_material(loaded.preferences, backbone, max_pairs=max_pairs, **how)
    _say_left_out(Counter(row.reason for row in loaded.quarantine), material.too_long, material.not_drawn)
    if discover:
        found = find_domains(material.pairs, num_parts, seed=seed)
        if write:
            _write(write, material.preferences, found[BY.index(by)])
        told_found = {one.kind: one.to_json() for one in found}
        if out:
            write_discovered(out, found, material.preferences, told_found)
        typer.echo(json.dumps(told_found, indent=1) if as_json else render_discovered(found, material.preferences))
        return
    findings = advise(material.pairs, seed=seed)
    rates = None
    if null:
        console.start("error rates", 3 * null)
        rates = simulate(material.pairs, num_draws=null, seed=seed, progress=lambda done, _: console.step(done))
        console.finish()
    told = findings.to_json() | {"error_rates": rates.to_json() if rates else None}
    told |= {"too_long": dict(material.too_long), "not_drawn": dict(material.not_drawn)}
    if out:
        write_advice(out, findings, rates, told)
    typer.echo(json.dumps(told, indent=1) if as_json else render(findings, rates))


def _check_discovery(discover: str | None, write: Path | None, by: str, null: int) -> int | None:
    """K of --discover. ConfigError with all faults at once."""
    from moreward.domains.discover import check_num_parts

    faults = []
    if by not in BY:
        faults.append(f"--by: {by!r} is neither {BY[0]} nor {BY[1]}")
    if write and not discover:
        faults.append("--write: needs --discover; named domains are in the rows already")
    if write and write.exists():
        faults.append(f"--write: {write} is there already; name another file or remove it")
    if null and discover:
        faults.append("--null: is of the rule for named domains; leave out --discover")
    num_parts = None
    try:
        num_parts = check_num_parts(discover) if discover else None
    except ConfigError as error:
        faults += error.faults
    if faults:
        raise ConfigError(faults)
    return num_parts


def _write(path: Path, preferences: Sequence[Preference], found: Discovered) -> None:
    """The pairs that were looked at, as rows with the domain that was found; whole or not at all."""
    lines = []
    for p, part in zip(preferences, found.part_B, strict=True):
        row = {"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected, "domain": f"{found.kind}-{part}"}
        row |= {name: value for name, value in (("id", p.id), ("group", p.group)) if value}
        lines.append(json.dumps(row, ensure_ascii=False, default=dict) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_text("".join(lines), encoding="utf-8", newline="\n")
    temporary.replace(path)
    typer.echo(f"{len(lines):,} pairs -> {path}", err=True)


def _say_left_out(reasons: Mapping[str, int], too_long: Mapping[str, int], not_drawn: Mapping[str, int]) -> None:
    for what, counts in (
        ("rows not used", reasons),
        ("left out, longer than the limit (allow them with --truncate)", too_long),
        ("left out by --max-pairs", not_drawn),
    ):
        if counts:
            typer.echo(f"{what}: {', '.join(f'{name} {n:,}' for name, n in sorted(counts.items()))}", err=True)
