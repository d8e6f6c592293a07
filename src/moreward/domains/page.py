"""Findings as one HTML file that needs no other, with its figures; light and dark."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import jinja2

from moreward.checkpoint import write_json
from moreward.domains.advice import Findings
from moreward.domains.discover import Discovered
from moreward.domains.null import ErrorRates
from moreward.domains.words import advice_words, discovered_table, discovered_words, example, notes, sentence, tables
from moreward.proof.figures import COLOURS, GREY, STYLE, Picture, heat, new_figure, picture_of
from moreward.proof.report import made, style_sheet
from moreward.types import Preference

TITLE = "Does this data deserve its own expert?"


def write_advice(folder: Path, findings: Findings, rates: ErrorRates | None, told: Mapping[str, Any]) -> None:
    """`domains.html` and `domains.json` in `folder`. The extra `report` must be there (`proof.figures.check_extra`)."""
    counts = Counter(one.word for one in findings.advice)
    lead = ", ".join(f"{word}: {n}" for word, n in counts.items())
    cards = [
        {"domain": a.domain, "word": advice_words(a), "css": a.word.split()[0], "why": sentence(a).split(". ", 1)[1]}
        for a in findings.advice
    ]
    text = _render(
        title=TITLE,
        lead=f"Of {len(findings.advice)} domains, {lead}. By one rule, fixed before it met any data.",
        cards=cards,
        pictures=advice_pictures(findings),
        tables=tables(findings, rates),
        parts=[],
        notes=notes(findings),
    )
    _write(folder, text, told)


def write_discovered(
    folder: Path, found: Sequence[Discovered], preferences: Sequence[Preference], told: Mapping[str, Any]
) -> None:
    """As `write_advice`, of domains that nobody named."""
    parts = [
        {
            "name": part.name,
            "pairs": f"{part.num_pairs:,}",
            "lines": [
                f"{how}: {example(preferences[i], 240)}"
                for how, places in (("nearest", part.nearest), ("at random", part.random))
                for i in places
            ],
        }
        for one in found
        for part in one.parts
    ]
    text = _render(
        title="Domains that nobody named",
        lead=" ".join(discovered_words(one) for one in found),
        cards=[],
        pictures=[],
        tables=[(f"What each {one.kind} holds", discovered_table(one)) for one in found],
        parts=parts,
        notes=["A cluster is where prompts lie, not what people want: ask the rule about it before training experts."],
    )
    _write(folder, text, told)


def advice_pictures(findings: Findings) -> list[Picture]:
    """Gains, transfer and conflict."""
    import matplotlib as mpl

    with mpl.rc_context(cast(Any, dict(STYLE))):
        return [_gains(findings), _transfer(findings), _conflict(findings)]


def _gains(findings: Findings) -> Picture:
    names = [one.domain for one in findings.advice]
    figure, axes = new_figure(7.2, 1.1 + 0.5 * len(names))
    for s, (label, over) in enumerate((("pooled probe", "over_pooled"), ("pooled control", "over_control"))):
        for row, one in enumerate(findings.advice):
            gain, y = getattr(one, over), row + (s - 0.5) * 0.3
            axes.plot([100 * gain.interval.low, 100 * gain.interval.high], [y, y], color=COLOURS[s], linewidth=1.4)
            stands = one.p_split < 0.05
            axes.plot(
                *(100 * gain.value, y),
                marker="o",
                markersize=5,
                color=COLOURS[s],
                markerfacecolor=COLOURS[s] if stands else "none",
                linestyle="",
                label=f"over the {label}" if row == 0 else None,
            )
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("points that the domain's own probe wins on held-out pairs")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    caption = (
        "95 % intervals over prompt groups. Filled: both gains stand after Holm's correction, and the domain is split."
    )
    return picture_of(figure, "gains", "What an own probe wins", caption)


def _transfer(findings: Findings) -> Picture:
    names = [*findings.transfer]
    rows = [[findings.transfer[a][b].value for b in names] for a in names]
    figure = _matrix(rows, names, low=0.0, high=1.0, middle=0.5)
    figure.axes[0].set_ylabel("trained on")
    figure.axes[0].set_xlabel("tested on held-out pairs of")
    caption = (
        "Held-out accuracy, %. Blue: what helps there helps here too. Red, below 50: the two want opposite things."
    )
    return picture_of(figure, "transfer", "What one domain's probe is worth in another", caption)


def _conflict(findings: Findings) -> Picture:
    names = [*findings.transfer]
    cosine_of = {c.domains: c.cosine for c in findings.conflicts}
    rows = [[cosine_of.get((a, b), cosine_of.get((b, a))) for b in names] for a in names]
    figure = _matrix(rows, names, low=-1.0, high=1.0, middle=0.0)
    caption = "Cosine of the domains' directions, × 100. The table says which lie below what chance makes."
    return picture_of(figure, "conflict", "Do directions conflict?", caption)


def _matrix(
    rows: Sequence[Sequence[float | None]], names: Sequence[str], *, low: float, high: float, middle: float
) -> Any:
    """A matrix whose numbers are dark on pale and white on strong colours, wherever the middle of the scale lies."""
    figure = heat(rows, names, names, low=low, high=high, colours="RdBu")
    for text in figure.axes[0].texts:
        value = float(text.get_text()) / 100
        text.set_color("w" if abs(value - middle) > 0.65 * (high - middle) else "#222222")
    return figure


def _render(**values: Any) -> str:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(files("moreward.domains").joinpath("page.html.j2").read_text(encoding="utf-8"))
    return template.render(css=style_sheet(), made=[f"{name}: {value}" for name, value in made().items()], **values)


def _write(folder: Path, text: str, told: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "domains.html").write_text(text, encoding="utf-8")
    write_json(folder / "domains.json", dict(told))
