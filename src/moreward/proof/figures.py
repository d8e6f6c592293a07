"""Findings as pictures: SVG that takes the colour of the text around it, and PNG.

Every figure is drawn by a function of the findings, which returns None where there is nothing to draw.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from moreward.errors import MissingExtraError
from moreward.proof.findings import Findings, SystemFinding, Versus

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bb5588", "#997700", "#44aa99", "#888888")
"""Paul Tol's bright and muted schemes: told apart by readers who do not see all colours."""
GREY = "#888888"
STYLE: Mapping[str, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "svg.fonttype": "path",
    "svg.hashsalt": "moreward",
    "text.parse_math": False,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Picture:
    """`name` is fit for a file; `caption` says what is seen and how to read it."""

    name: str
    title: str
    caption: str
    svg: str
    png: bytes


def check_extra() -> None:
    """MissingExtraError where there is nothing to draw with."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError("a report's figures", "report") from None


def pictures(findings: Findings) -> list[Picture]:
    """All that there is to draw, in the order of a report."""
    import matplotlib as mpl

    found = []
    with mpl.rc_context(cast(Any, dict(STYLE))):
        for draw in (gains, accuracies, confusions, reliability, error_correlations):
            found += draw(findings)
    return found


def gains(findings: Findings) -> list[Picture]:
    """A forest of differences for each mixture: one row a domain, a mark for each single model."""
    found = []
    for mixture in findings.mixtures:
        tests = [v for v in findings.versus if v.mixture == mixture]
        singles = list(dict.fromkeys(v.single for v in tests))
        rows = [*findings.domains, None]
        figure, axes = new_figure(7.2, 0.9 + 0.22 * len(rows) * (len(singles) + 0.6))
        for s, single in enumerate(singles):
            mine = {v.domain: v for v in tests if v.single == single}
            _forest(axes, [mine[d] for d in rows], s, len(singles))
        axes.axvline(0, color=GREY, linewidth=1)
        _name_rows(axes, [d or "mean of domains" for d in rows])
        axes.set_xlabel(f"points that {mixture} wins over the single model")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.32 / figure.get_figheight() * 2.2), ncols=2, fontsize=8)
        caption = (
            "Lines are 95 % intervals of this one comparison, over prompt groups. A filled mark stands after Holm's "
            "correction over all tests of the report; a hollow one does not. Right of the line the mixture is better."
        )
        found.append(picture_of(figure, f"gain-{_slug(mixture)}", f"What {mixture} gains", caption))
    return found


def _forest(axes: Axes, tests: Sequence[Versus], place: int, of: int) -> None:
    colour = COLOURS[place % len(COLOURS)]
    for row, test in enumerate(tests):
        y = row + (place - (of - 1) / 2) * 0.8 / max(of, 2)
        axes.plot([100 * test.interval.low, 100 * test.interval.high], [y, y], color=colour, linewidth=1.4)
        stands = test.verdict != "no difference shown"
        axes.plot(
            *(100 * test.difference, y),
            marker="o",
            markersize=5,
            color=colour,
            markerfacecolor=colour if stands else "none",
            linestyle="",
            label=_with_kinds(test) if row == 0 else None,
        )


def _with_kinds(test: Versus) -> str:
    return f"{test.single} ({'equal ' + ', '.join(test.kinds) if test.kinds else 'not of equal budget'})"


def accuracies(findings: Findings) -> list[Picture]:
    rows = [*findings.domains, None]
    systems = list(findings.systems.values())
    figure, axes = new_figure(7.2, 1.0 + 0.16 * len(rows) * (len(systems) + 1))
    for s, system in enumerate(systems):
        for row, domain in enumerate(rows):
            one = system.mean if domain is None else system.accuracy[domain]
            y = row + (s - (len(systems) - 1) / 2) * 0.8 / max(len(systems), 2)
            colour = COLOURS[s % len(COLOURS)]
            axes.plot([100 * one.interval.low, 100 * one.interval.high], [y, y], color=colour, linewidth=1.2)
            axes.plot(
                *(100 * one.mean, y),
                marker="s" if system.is_single else "o",
                markersize=4.5,
                color=colour,
                linestyle="",
                label=system.label if row == 0 else None,
            )
    axes.axvline(50, color=GREY, linewidth=1, linestyle=":")
    _name_rows(axes, [d or "mean of domains" for d in rows])
    axes.set_xlabel("accuracy on test pairs, %")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    caption = (
        "Mean of seeds with 95 % intervals over prompt groups. Squares are single models, circles mixtures. The dotted "
        "line is a coin. Intervals of two systems may overlap where their paired difference is shown all the same."
    )
    return [picture_of(figure, "accuracy", "Accuracy by domain", caption)]


def confusions(findings: Findings) -> list[Picture]:
    found = []
    for system in findings.systems.values():
        if system.router_accuracy is None or len(findings.domains) < 2:
            continue
        experts = list(next(iter(system.confusion.values())))
        shares = [[system.confusion[d].get(e, 0.0) for e in experts] for d in findings.domains]
        caption = "Rows: the prompt's domain. Columns: the expert with the largest weight. Shares of prompts, %."
        title = f"Where {system.label} sends prompts"
        figure = heat(shares, list(findings.domains), experts, low=0.0, high=1.0, colours="Blues")
        found.append(picture_of(figure, f"router-{_slug(system.label)}", title, caption))
    return found


def error_correlations(findings: Findings) -> list[Picture]:
    found = []
    for system in findings.systems.values():
        experts = list(system.expert_errors)
        if len(experts) < 2:
            continue
        rows = [[system.expert_errors[a][b] for b in experts] for a in experts]
        caption = (
            "Correlation of two experts' errors on the same pairs, × 100. Near 100 they are one expert twice; near 0 a "
            "mixture of them has most to win."
        )
        figure = heat(rows, experts, experts, low=-1.0, high=1.0, colours="RdBu_r")
        title = f"Do {system.label}'s experts err together?"
        found.append(picture_of(figure, f"errors-{_slug(system.label)}", title, caption))
    return found


def reliability(findings: Findings) -> list[Picture]:
    figure, axes = new_figure(4.6, 4.2)
    axes.plot([50, 100], [50, 100], color=GREY, linewidth=1, linestyle=":")
    for s, system in enumerate(findings.systems.values()):
        x = [100 * b.confidence for b in system.reliability]
        y = [100 * b.accuracy for b in system.reliability]
        axes.plot(x, y, marker=".", linewidth=1.2, color=COLOURS[s % len(COLOURS)], label=_with_ece(system))
    axes.set_xlabel("how sure: σ(|difference of rewards|), %")
    axes.set_ylabel("how often right, %")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    caption = (
        "A calibrated model lies on the dotted line; below it a model is too sure. In the legend the mean distance "
        "from the line by domain (ECE), before any temperature."
    )
    return [picture_of(figure, "reliability", "How sure, and how right", caption)]


def _with_ece(system: SystemFinding) -> str:
    return f"{system.label}  {100 * system.ece:.1f}"


def heat(
    rows: Sequence[Sequence[float | None]],
    row_names: Sequence[str],
    names: Sequence[str],
    *,
    low: float,
    high: float,
    colours: str,
) -> Figure:
    """A matrix with each value in per cent; None stays empty. `colours` is the name of a colour map."""
    import numpy as np

    values = np.array([[np.nan if v is None else v for v in row] for row in rows], dtype=float)
    figure, axes = new_figure(1.9 + 0.55 * len(names), 1.2 + 0.42 * len(row_names))
    axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
    axes.grid(visible=False)
    for r, row in enumerate(values):
        for c, value in enumerate(row):
            if not np.isnan(value):
                is_dark = abs(value) > 0.6 * high
                axes.text(c, r, f"{100 * value:.0f}", ha="center", va="center", color="w" if is_dark else "#222222")
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
    axes.set_yticks(range(len(row_names)), row_names)
    return figure


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.axhline(len(names) - 1.5, color=GREY, linewidth=0.6)


def picture_of(figure: Figure, name: str, title: str, caption: str) -> Picture:
    """The figure as SVG for a page and as PNG."""
    svg, png = io.BytesIO(), io.BytesIO()
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    figure.savefig(png, format="png", dpi=150, facecolor="white")
    return Picture(name, title, caption, _inline(svg.getvalue().decode()), png.getvalue())


def _inline(svg: str) -> str:
    """Fit to stand in a page: black becomes the colour of the text, sizes give way to the width that there is."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[a-z0-9.]+_\d+"', "", svg)  # names of groups, the same in every figure of a page
    svg = svg.replace("#000000", "currentColor").replace("#262626", "currentColor")
    svg = re.sub(r"(fill|stroke): black", r"\1: currentColor", svg)
    found = re.search(r'width="([\d.]+)pt"', svg)
    assert found is not None
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    style = f"width:100%;max-width:{float(found[1]) * 4 / 3:.0f}px;color:inherit"
    return svg.replace("<svg ", f'<svg style="{style}" role="img" fill="currentColor" ', 1)


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
