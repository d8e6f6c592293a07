"""Findings as sentences and tables, for the terminal and as Markdown. Shares in per cent, differences in points."""

from __future__ import annotations

from collections.abc import Sequence

from moreward.evals.accuracy import Interval
from moreward.evals.statistics import FEW_GROUPS, POWER
from moreward.proof.findings import Conclusion, Estimate, Findings, SystemFinding, Versus
from moreward.report import Column, Table, markdown_table, terminal_table, terminal_text

MISSING = "-"
MANY = 1_000_000
MARKS = {"better": "▲", "worse": "▼", "no difference shown": " "}
_PER_TABLE = 3


def render(findings: Findings, more: Sequence[tuple[str, Table]] = ()) -> str:
    """The report for the terminal, 100 columns wide. `more` are published tables beside ours, with their titles."""
    parts = [f"# {findings.name}", terminal_text(headlines(findings), [], conclusions(findings)).strip()]
    parts += [f"{title}\n\n{terminal_table(table)}" for title, table in [*tables(findings), *more]]
    return "\n\n".join([*parts, terminal_text([], [], notes(findings)).strip()]) + "\n"


def markdown(findings: Findings, more: Sequence[tuple[str, Table]] = ()) -> str:
    """What `render` says, as Markdown."""
    points = ["\n".join(f"- {line}" for line in lines) for lines in (conclusions(findings), notes(findings))]
    parts = [f"# {findings.name}", *headlines(findings), points[0]]
    for title, table in [*tables(findings), *more]:
        parts += [f"## {title}", markdown_table(table)]
    return "\n\n".join([*parts, "## Notes", points[1]]) + "\n"


def tables(findings: Findings) -> list[tuple[str, Table]]:
    """All tables of a report with their titles."""
    found = [
        ("Accuracy: mean of seeds ± their standard deviation, 95 % interval", t) for t in accuracy_tables(findings)
    ]
    found += [
        (f"{m}: points won over each single model, 95 % interval", gain_table(findings, m)) for m in findings.mixtures
    ]
    found.append(("Budgets and cost", cost_table(findings)))
    routed = [s for s in findings.systems.values() if any(v is not None for v in s.oracle.values())]
    return found + ([("Routers", router_table(findings, routed))] if routed else [])


# ---- sentences -------------------------------------------------------------------------------------------------------


def headlines(findings: Findings) -> list[str]:
    """A paragraph for each mixture."""
    return [headline(findings, mixture) for mixture in findings.mixtures]


def headline(findings: Findings, mixture: str) -> str:
    own = [c for c in findings.conclusions if c.mixture == mixture and c.domain is not None]
    mean = next(c for c in findings.conclusions if c.mixture == mixture and c.domain is None)
    said = {
        "helps": f"{mixture} beats every single model of equal budget in the mean of domains, the nearest by",
        "hurts": f"{mixture} is worse than a single model of equal budget in the mean of domains:",
        "cannot be told": f"Whether {mixture} helps in the mean of domains cannot be told:",
    }
    helped, hurt, open_ = (
        [str(c.domain) for c in own if c.word == word] for word in ("helps", "hurts", "cannot be told")
    )
    return (
        f"{said[mean.word]} {against(mean.versus)}. It helps in {len(helped)} of {len(own)} domains{_named(helped)}, "
        f"hurts in {len(hurt)}{_named(hurt)}, and cannot be told in {len(open_)}."
    )


def _named(names: Sequence[str]) -> str:
    return f" ({', '.join(names)})" if names else ""


def conclusions(findings: Findings) -> list[str]:
    """A sentence for each mixture and domain."""
    return [sentence(one) for one in findings.conclusions]


def sentence(one: Conclusion) -> str:
    where = one.domain if one.domain is not None else "mean of domains"
    said = f"{one.mixture} on {where}: {one.word}. {against(one.versus)}."
    return said if one.word != "cannot be told" else f"{said} {more_needed(one.versus)}"


def against(versus: Versus) -> str:
    """The difference that decides, with its opponent."""
    kinds = f" (equal {', '.join(versus.kinds)})" if versus.kinds else ""
    return (
        f"{points(versus.difference)} points {bracket(versus.interval)} against {versus.single}{kinds}, "
        f"p {p_text(versus.p_holm)} after Holm"
    )


def more_needed(versus: Versus) -> str:
    """How many more pairs would tell the difference that was seen, and what these pairs could have told."""
    told = versus.power
    able = f"These {versus.num_pairs:,} pairs stand in {versus.num_groups:,} prompt groups"
    if told.detectable is None:
        able += f", too few to tell any difference: that takes {told.least_groups} at least"
    else:
        able = f"These {versus.num_pairs:,} pairs tell a difference of {100 * told.detectable:.1f} points"
    if told.more_pairs is None or told.more_groups is None:
        return f"{able}; of a difference of 0 no number of pairs would tell a direction."
    if told.more_pairs == 0:
        return f"{able}; the one seen is larger, but rests on few or uneven prompt groups."
    if told.more_pairs > MANY:
        return f"{able}; to tell one as small as was seen would take more than {MANY:,} more pairs."
    return (
        f"{able}; if the true difference is the one seen, {told.more_pairs:,} more pairs "
        f"({told.more_groups:,} more prompt groups) would tell."
    )


def notes(findings: Findings) -> list[str]:
    """What the numbers mean and what was left out."""
    lost = ", ".join(f"{d} {n:,}" for d, n in sorted(findings.too_long.items()))
    pairs = ", ".join(f"{d} {n:,} in {findings.num_groups[d]:,} groups" for d, n in findings.num_pairs.items())
    flagged = {d: f for d, f in findings.flags.items() if f}
    found = [
        f"Test pairs: {pairs}; the same for every system and seed.",
        f"Left out, longer than some system can read whole: {lost}." if lost else _cut_or_not(findings),
        f"Seeds: {', '.join(map(str, findings.seeds))}. A pair counts with the mean over its seeds; ± is the standard "
        "deviation over seeds, which the intervals do not hold."
        + ("" if len(findings.seeds) > 1 else " With one seed there is none: train several."),
        "Intervals: cluster bootstrap over prompt groups, 95 %. Tests: sign flips of whole groups, two-sided, Holm's "
        f"correction over all {findings.num_tests} of this report. Power: {POWER:.0%} for one test at the strictest "
        "level of that correction.",
        "A mixture helps where it is better than every single model of equal budget, and hurts where it is worse than "
        "one of them.",
    ]
    if few := {d: n for d, n in findings.num_groups.items() if n < FEW_GROUPS}:
        found.append(
            f"Few prompt groups: {', '.join(f'{d} {n}' for d, n in few.items())}. Their intervals are Student's; the "
            "bootstrap interval of a mean that holds them is too narrow. Go by the tests."
        )
    if flagged:
        named = ", ".join(f"{d} ({', '.join(f)})" for d, f in flagged.items())
        found.append(f"Domains that tell systems apart hardly or not: {named}. See the mean without them.")
    if short := _length_alone(findings):
        found.append(f"Always taking the longer, or the shorter, response does as well as the best system: {short}.")
    return found


def _cut_or_not(findings: Findings) -> str:
    settings = findings.configuration.get("settings", {}).get("data", {})
    if settings.get("on_long") == "truncate":
        return "Texts longer than the limit were cut at their start, for every system alike; none was left out."
    return "No test pair was too long."


def _length_alone(findings: Findings) -> str:
    best = {d: max(s.accuracy[d].mean for s in findings.systems.values()) for d in findings.domains}
    rule = {d: max(x, 1 - x) for d, x in findings.longer_rule.items()}
    return ", ".join(f"{d} ({percent(rule[d])})" for d in findings.domains if rule[d] >= best[d])


# ---- tables ----------------------------------------------------------------------------------------------------------


def accuracy_tables(findings: Findings) -> list[Table]:
    rows = _row_names(findings)
    labels = Column("domain", rows, is_words=True)
    pairs = [f"{findings.num_pairs[d]:,}" for d in findings.domains]
    rule = [percent(findings.longer_rule[d]) for d in findings.domains]
    mean_rule = percent(sum(findings.longer_rule.values()) / len(findings.domains))
    some = len(rows) - len(findings.domains) - 2
    fixed = [
        Column("pairs", [*pairs, *[MISSING] * some, MISSING, f"{sum(findings.num_pairs.values()):,}"]),
        Column("longer\nwins", [*rule, mean_rule, *[MISSING] * some, MISSING]),
    ]
    flags = Column(
        "notes", [*(", ".join(_marks(findings, d)) for d in findings.domains), *[""] * (some + 2)], is_words=True
    )
    shown = [Column(s.label, _accuracies(findings, s)) for s in findings.systems.values()]
    return [
        Table([labels, *fixed, *shown[i : i + _PER_TABLE], flags], num_domains=len(findings.domains))
        for i in range(0, len(shown), _PER_TABLE)
    ]


def _marks(findings: Findings, domain: str) -> list[str]:
    num_groups = findings.num_groups[domain]
    few = [f"{num_groups} group{'s' * (num_groups > 1)}"] if num_groups < FEW_GROUPS else []
    return [*findings.flags[domain], *few]


def _row_names(findings: Findings) -> list[str]:
    some = ["without flagged"] if _tells_flagged(findings) else []
    return [*findings.domains, "mean of domains", *some, "mean of pairs"]


def _tells_flagged(findings: Findings) -> bool:
    return 0 < len(findings.unflagged) < len(findings.domains)


def _accuracies(findings: Findings, system: SystemFinding) -> list[str]:
    cells = [estimate(system.accuracy[d]) for d in findings.domains] + [estimate(system.mean)]
    if _tells_flagged(findings) and system.unflagged is not None:
        cells.append(estimate(system.unflagged))
    return [*cells, percent(system.micro)]


def gain_table(findings: Findings, mixture: str) -> Table:
    """Rows are domains and their mean, columns the single models."""
    own = [v for v in findings.versus if v.mixture == mixture]
    singles = list(dict.fromkeys(v.single for v in own))
    columns = [Column("domain", [*findings.domains, "mean of domains"], is_words=True)]
    for single in singles:
        tests = {v.domain: v for v in own if v.single == single}
        kinds = next(iter(tests.values())).kinds
        title = f"{single}\n{'equal ' + ', '.join(kinds) if kinds else 'not of equal budget'}"
        columns.append(Column(title, [_gain(tests[d]) for d in (*findings.domains, None)]))
    return Table(columns, num_domains=len(findings.domains))


def _gain(versus: Versus) -> str:
    return f"{points(versus.difference)}{MARKS[versus.verdict]} {bracket(versus.interval)}"


def cost_table(findings: Findings) -> Table:
    """Parameters, training and scoring of every system."""
    systems = list(findings.systems.values())
    return Table(
        [
            Column("system", [s.label for s in systems], is_words=True),
            Column("stored", [size(s.budget.total) for s in systems]),
            Column("active", [size(s.budget.active) for s in systems]),
            Column("trained", [size(s.budget.trained) for s in systems]),
            Column("pairs\nseen", [f"{s.pairs_seen:,.0f}" for s in systems]),
            Column("training\nseconds", [f"{s.training_seconds:,.1f}" for s in systems]),
            Column("ms\na pair", [f"{1000 * s.seconds_per_pair:,.1f}" for s in systems]),
            Column("calibration\nerror", [percent(s.ece) for s in systems]),
            Column("ties", [f"{s.ties:,.1f}" for s in systems]),
            Column("length\nrank corr.", [f"{s.length:+.2f}" for s in systems]),
        ],
        num_domains=len(systems),
    )


def router_table(findings: Findings, systems: Sequence[SystemFinding]) -> Table:
    """How often the router was right, and what an oracle and a random one would give."""
    columns = [Column("domain", [*findings.domains, "all"], is_words=True)]
    for s in systems:
        columns += [
            Column(
                f"{s.label}\nrouter right",
                [*(percent(s.router[d]) for d in findings.domains), percent(s.router_accuracy)],
            ),
            Column("own\nrouter", [*(percent(s.accuracy[d].mean) for d in findings.domains), percent(s.mean.mean)]),
            Column("oracle", _with_mean([s.oracle[d] for d in findings.domains])),
            Column("random", _with_mean([s.random[d] for d in findings.domains])),
        ]
    return Table(columns, num_domains=len(findings.domains))


def _with_mean(values: Sequence[float | None]) -> list[str]:
    known = [v for v in values if v is not None]
    return [*map(percent, values), percent(sum(known) / len(known) if len(known) == len(values) else None)]


# ---- cells -----------------------------------------------------------------------------------------------------------


def estimate(one: Estimate) -> str:
    low, high = percent(one.interval.low), percent(one.interval.high)
    return f"{percent(one.mean)}{plus_minus(one.spread)} {low}-{high}"


def plus_minus(value: float | None) -> str:
    return "" if value is None else f" ±{100 * value:.1f}"


def percent(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.1f}"


def points(difference: float) -> str:
    return f"{100 * difference + 0.0:+.1f}".replace("-0.0", "+0.0")


def bracket(interval: Interval) -> str:
    return f"[{points(interval.low)}, {points(interval.high)}]"


def p_text(p_value: float) -> str:
    return "< .001" if p_value < 0.001 else f"= {p_value:.3f}".replace("0.", ".")


def size(number: int) -> str:
    for scale, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= scale:
            return f"{number / scale:,.1f} {unit}"
    return str(number)
