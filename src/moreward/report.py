"""Evaluations as tables and sentences, for the terminal and as Markdown.

Both forms come from one `Table` and one list of sentences, so they cannot tell different stories. Shares are in per
cent, differences in points.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any, Protocol

from moreward.evals.accuracy import CHANCE, SATURATED, Cost, Evaluation, Measures
from moreward.evals.compare import Comparison, Difference
from moreward.evals.dtype import DtypePrice
from moreward.evals.routing import RoutingReport
from moreward.evals.statistics import Gain

if TYPE_CHECKING:
    from moreward.evals.price import Prices

WIDTH = 100
FEW_GROUPS = 10
_MISSING = "-"
_SYSTEMS_PER_TABLE = 4
_EXPERTS_PER_LINE = 4
_CELL_WIDTH = 16


class ExtensionSide(Protocol):
    """One side of a before-and-after table."""

    @property
    def evaluation(self) -> Evaluation: ...
    @property
    def routing(self) -> RoutingReport: ...


@dataclass(frozen=True, slots=True)
class Column:
    """A title, where `\\n` breaks the line, and one cell per row; words stand left and may fold."""

    title: str
    cells: Sequence[str]
    is_words: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Columns of equal length. The rows from `num_domains` on are means."""

    columns: Sequence[Column]
    num_domains: int

    @property
    def rows(self) -> list[tuple[str, ...]]:
        return list(zip(*(column.cells for column in self.columns), strict=True))


# ---- one system ------------------------------------------------------------------------------------------------


def render_evaluation(
    evaluation: Evaluation, routing: RoutingReport, comparison: Comparison | None = None, *, name: str = ""
) -> str:
    """One system for the terminal, 100 columns wide: the verdict, the table, then what lies behind it.

    The baseline of `comparison` should be a single model of the same budget: the caller answers for that, and its
    name is printed. Without a comparison the report says that it cannot tell whether the system helps. `name` says
    which system of `comparison` this is; it may be left out where there is only one. Raises ValueError if the
    comparison is not of these rows.
    """
    table = evaluation_table(evaluation, routing, comparison, name=name)
    return terminal_text([verdict(comparison, name=name)], [table], notes(evaluation, routing))


def markdown_evaluation(
    evaluation: Evaluation, routing: RoutingReport, comparison: Comparison | None = None, *, name: str = ""
) -> str:
    """What `render_evaluation` says, as Markdown."""
    table = evaluation_table(evaluation, routing, comparison, name=name)
    return markdown_text([verdict(comparison, name=name)], [table], notes(evaluation, routing))


def evaluation_table(
    evaluation: Evaluation, routing: RoutingReport, comparison: Comparison | None = None, *, name: str = ""
) -> Table:
    """A row per domain, then the means over domains, over domains without a flag, and over pairs."""
    rows = _rows(evaluation, routing, comparison, name)
    columns = [
        Column("domain", [row.label for row in rows], is_words=True),
        Column("pairs", [f"{row.measures.num_pairs:,}" for row in rows]),
        Column("accuracy, 95%", [_with_interval(row.measures) for row in rows]),
        Column("single\nmodel", [_percent(row.single) for row in rows]),
        Column("gain", [_points(row.measures.accuracy, row.single) for row in rows]),
        Column("longer\nrule", [_percent(row.measures.longer_rule) for row in rows]),
        Column("router\nright", [_percent(row.router) for row in rows]),
        Column("oracle\nrouter", [_percent(row.measures.oracle) for row in rows]),
        Column("random\nrouter", [_percent(row.measures.random) for row in rows]),
        Column("notes", [", ".join((*_found(row.test), *row.measures.flags)) for row in rows], is_words=True),
    ]
    told = [column for column in columns if set(column.cells) - {_MISSING, ""}]
    return Table(told, num_domains=len(evaluation.domains))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """A line of the table: `single` is the baseline's accuracy, `router` how often the router was right."""

    label: str
    measures: Measures
    single: float | None
    router: float | None
    test: Difference | None = None


def _rows(evaluation: Evaluation, routing: RoutingReport, comparison: Comparison | None, name: str) -> list[_Row]:
    name = _name_in(comparison, name)
    _check_same_rows(evaluation, comparison, name)
    single = comparison.accuracy[comparison.baseline] if comparison else {}
    tests = comparison.domains[name] if comparison else {}
    right = routing.domain_accuracy
    rows = [
        _Row(label=_plain(d), measures=m, single=single.get(d), router=right.get(d), test=tests.get(d))
        for d, m in evaluation.domains.items()
    ]
    every = dict.fromkeys(evaluation.domains, 1)
    kept = {d: 1 for d, m in evaluation.domains.items() if not m.flags}
    pairs = {d: m.num_pairs for d, m in evaluation.domains.items()}
    rows.append(
        _Row(
            label="mean of domains",
            measures=evaluation.macro,
            single=_mean(single, every),
            router=_mean(right, every),
            test=comparison.macro[name] if comparison else None,
        )
    )
    if evaluation.unflagged is not None and len(kept) < len(every):
        found = _mean(single, kept), _mean(right, kept)
        rows.append(_Row(label="without flagged", measures=evaluation.unflagged, single=found[0], router=found[1]))
    return [*rows, _Row(label="mean of pairs", measures=evaluation.micro, single=_mean(single, pairs), router=None)]


def _mean(values: Mapping[str, float | None], weights: Mapping[str, int]) -> float | None:
    """None as soon as a domain has no value."""
    parts = [(values.get(domain), weight) for domain, weight in weights.items()]
    known = [value * weight for value, weight in parts if value is not None]
    return sum(known) / sum(weights.values()) if len(known) == len(parts) else None


# ---- the verdict -----------------------------------------------------------------------------------------------


def verdict(comparison: Comparison | None, *, name: str = "") -> str:
    """In plain words: does the system beat the baseline, where, and in the mean?"""
    if comparison is None:
        return (
            "No verdict: no single model of the same budget was given, so nothing here shows that a mixture helps. "
            "Train one on the same pairs and compare."
        )
    name = _name_in(comparison, name)
    by_domain, mean = comparison.domains[name], comparison.macro[name]
    better = [domain for domain, one in by_domain.items() if one.verdict == "better"]
    worse = [domain for domain, one in by_domain.items() if one.verdict == "worse"]
    return (
        f"{_plain(name)} is better than {_plain(comparison.baseline)} in "
        f"{len(better)} of {_count(len(by_domain), 'domain')}{_listed(better)}, worse in {len(worse)}{_listed(worse)}, "
        f"no difference shown in {len(by_domain) - len(better) - len(worse)}. "
        f"{_mean_words(mean)} {_bottom_line(mean, better, worse, comparison.baseline)}"
    )


def _mean_words(mean: Difference) -> str:
    found = "no difference shown" if mean.verdict == "no difference shown" else f"it is {mean.verdict}"
    low, high = 100 * mean.interval.low, 100 * mean.interval.high
    return (
        f"On the mean of domains {found}: {100 * mean.difference:+.1f} points [{low:+.1f}, {high:+.1f}], "
        f"p {_p(mean.p_holm)} after Holm's correction."
    )


def _bottom_line(mean: Difference, better: Sequence[str], worse: Sequence[str], baseline: str) -> str:
    if mean.verdict == "worse":
        return f"Overall {_plain(baseline)} is the better choice."
    if mean.verdict == "better":
        return "Overall it helps, though not everywhere." if worse else "Overall it helps."
    if better and worse:
        return "It helps in some domains and hurts in others; overall neither is shown."
    if better:
        return "It helps in some domains; overall that is not shown."
    return "So these pairs do not show that it helps; the interval says how large a gain they could have missed."


# ---- what stands below the table -------------------------------------------------------------------------------


def notes(evaluation: Evaluation, routing: RoutingReport) -> list[str]:
    """Cost, router, ties, truncation, calibration and the meaning of flags; four spaces open a line of detail."""
    micro, macro = evaluation.micro, evaluation.macro
    tied = [f"{domain} {m.num_ties:,}" for domain, m in evaluation.domains.items() if m.num_ties]
    cut = [f"{domain} {m.num_truncated:,}" for domain, m in evaluation.domains.items() if m.num_truncated]
    num_pairs = _count(micro.num_pairs, "pair")
    return [
        _cost_words(evaluation.cost),
        *_router_words(routing),
        f"Ties: equal rewards in {micro.num_ties:,} of {num_pairs}, counted as wrong{_listed(tied)}.",
        f"Truncated: a response cut short in {micro.num_truncated:,} of {num_pairs}{_listed(cut)}.",
        f"Calibration, mean of domains: Brier {macro.brier:.3f} (0.250 for always saying .5), calibration error "
        f"{100 * macro.ece:.1f} points; margin {macro.margin:.2f}, spread {macro.margin_spread:.2f}.",
        f"Intervals: 95%, clustered by prompt ({_count(micro.num_groups, 'group')}, {num_pairs}).",
        *_length_words(evaluation),
        *_flag_words(evaluation),
    ]


def _cost_words(cost: Cost | None) -> str:
    if cost is None:
        return "Cost: not measured."
    return (
        f"Cost: {_size(cost.parameters_stored)} parameters stored, {_size(cost.parameters_active)} active; "
        f"{1000 * cost.seconds / cost.num_pairs:,.1f} ms a pair ({cost.num_pairs:,} pairs in {cost.seconds:,.1f} s)."
    )


def _router_words(routing: RoutingReport) -> list[str]:
    if not routing.experts:
        return ["Router: the system has no named experts."]
    homeless = routing.domains_without_expert
    num_prompts = sum(number for domain, number in routing.num_prompts.items() if domain not in homeless)
    right = "no domain has an expert of its name"
    if routing.accuracy is not None:
        right = f"{_percent(routing.accuracy)}% of {_count(num_prompts, 'prompt')} went to the expert of their domain"
    split = f"the two responses went to different experts in {_percent(routing.split_share)}% of pairs"
    found = [f"Router: {right}; {split}. Where the prompts went:"]
    found += [f"    {_plain(domain)}: to {_shares(row)}" for domain, row in routing.confusion.items()]
    found.append(f"    all domains: to {_shares(routing.share)}")
    if homeless and routing.accuracy is not None:
        found.append(f"No expert of their own: {', '.join(map(_plain, homeless))}.")
    return found


def _shares(weight: Mapping[str, float]) -> str:
    """The most used experts in per cent, the others together."""
    total = sum(weight.values())
    used = sorted(((-w / total, expert) for expert, w in weight.items() if w > 0))
    parts = [f"{_plain(expert)} {_percent(-share)}%" for share, expert in used[:_EXPERTS_PER_LINE]]
    if rest := used[_EXPERTS_PER_LINE:]:
        parts.append(f"{_count(len(rest), 'other')} {_percent(-sum(share for share, _ in rest))}%")
    return ", ".join(parts)


def _length_words(evaluation: Evaluation) -> list[str]:
    beaten = [d for d, m in evaluation.domains.items() if max(m.longer_rule, 1 - m.longer_rule) >= m.accuracy]
    if not beaten:
        return []
    return [f"Length alone does as well: always taking the longer, or the shorter, response{_listed(beaten)}."]


def _flag_words(evaluation: Evaluation) -> list[str]:
    raised = {flag for measures in evaluation.domains.values() for flag in measures.flags}
    meaning = {CHANCE: "the interval contains 50%", SATURATED: "99% or more are right"}
    found = [f"{flag}: {what}" for flag, what in meaning.items() if flag in raised]
    few = [f"{name} {m.num_groups}" for name, m in evaluation.domains.items() if m.num_groups < FEW_GROUPS]
    told = [f"Few prompt groups: {', '.join(map(_plain, few))}. So wide an interval says little."] if few else []
    if not found:
        return told
    words = f"Flags: {'; '.join(found)}. Such domains hardly tell one system from another."
    return [*told, words if evaluation.unflagged else f"{words} Every domain is flagged."]


def calibration_words(calibration: Mapping[str, Any] | None) -> str:
    """What the run's temperatures do to its probabilities on these pairs: ECE in points, Brier score."""
    if calibration is None:
        return "Calibrated probabilities: not available for this run. Fit them: moreward calibrate RUN --data PAIRS"
    every = calibration["all"]
    before, after = every["before"], every["after"]
    domains = [
        f"{_plain(name)} {100 * one['before']['ece']:.1f} to {100 * one['after']['ece']:.1f}"
        for name, one in calibration.items()
        if name != "all"
    ]
    return (
        f"Calibrated with the run's temperatures, over pairs: calibration error {100 * before['ece']:.1f} to "
        f"{100 * after['ece']:.1f} points, Brier {before['brier']:.3f} to {after['brier']:.3f}{_listed(domains)}."
    )


# ---- several systems -------------------------------------------------------------------------------------------


def render_systems(evaluations: Mapping[str, Evaluation], comparison: Comparison | None = None) -> str:
    """Several systems side by side for the terminal; more than four stand in several tables.

    With a `comparison`, `▲` marks a system that is better than its baseline and `▼` one that is worse; no mark means
    no difference shown. Raises ValueError if the systems were not evaluated on the same domains.
    """
    return terminal_text([], systems_tables(evaluations, comparison), _systems_words(evaluations, comparison))


def markdown_systems(evaluations: Mapping[str, Evaluation], comparison: Comparison | None = None) -> str:
    """What `render_systems` says, as Markdown."""
    return markdown_text([], systems_tables(evaluations, comparison), _systems_words(evaluations, comparison))


def systems_tables(evaluations: Mapping[str, Evaluation], comparison: Comparison | None = None) -> list[Table]:
    """Accuracy with its interval, a row per domain, a column per system."""
    domains = list(next(iter(evaluations.values())).domains)
    for name, evaluation in evaluations.items():
        _check_same_rows(evaluation, comparison, name)
        if list(evaluation.domains) != domains:
            raise ValueError(
                f"{name!r} was evaluated on {list(evaluation.domains)}, others on {domains}: evaluate alike."
            )
    labels = Column("domain", [*map(_plain, domains), "mean of domains", "mean of pairs"], is_words=True)
    flags = Column("notes", _shared_flags(list(evaluations.values())), is_words=True)
    shown = [_system_column(one, comparison, name) for name, one in evaluations.items()]
    return [
        Table([labels, *shown[start : start + _SYSTEMS_PER_TABLE], flags], num_domains=len(domains))
        for start in range(0, len(shown), _SYSTEMS_PER_TABLE)
    ]


def _system_column(evaluation: Evaluation, comparison: Comparison | None, name: str) -> Column:
    tests = comparison.domains.get(name, {}) if comparison else {}
    mean = comparison.macro.get(name) if comparison else None
    rows = [(measures, tests.get(domain)) for domain, measures in evaluation.domains.items()]
    rows += [(evaluation.macro, mean), (evaluation.micro, None)]
    marks = {(): " ", ("better",): "▲", ("worse",): "▼"}
    return Column(_plain(name), [_with_interval(measures, mark=marks[_found(test)]) for measures, test in rows])


def _shared_flags(evaluations: Sequence[Evaluation]) -> list[str]:
    """What every system raises: then it lies with the domain, not with a system."""
    raised = [[set(m.flags) for m in (*e.domains.values(), e.macro, e.micro)] for e in evaluations]
    return [", ".join(sorted(set.intersection(*flags))) for flags in zip(*raised, strict=True)]


def _systems_words(evaluations: Mapping[str, Evaluation], comparison: Comparison | None) -> list[str]:
    found = [f"{_plain(name)}: {_cost_words(evaluation.cost)}" for name, evaluation in evaluations.items()]
    if comparison is None:
        return [*found, verdict(None)]
    marks = (
        f"Marks: ▲ better, ▼ worse than {_plain(comparison.baseline)}, after Holm's correction over all comparisons."
    )
    return [marks, *(verdict(comparison, name=name) for name in comparison.macro if name in evaluations), *found]


# ---- the two forms ---------------------------------------------------------------------------------------------


def terminal_text(above: Sequence[str], tables: Sequence[Table], below: Sequence[str]) -> str:
    """Paragraphs, tables, paragraphs, at most `WIDTH` columns wide, without colour."""
    details = [textwrap.fill(line, WIDTH, subsequent_indent=" " * 4) for line in below]
    blocks = [*(textwrap.fill(line, WIDTH) for line in above), *map(terminal_table, tables), "\n".join(details)]
    return "\n\n".join(blocks) + "\n"


def terminal_table(table: Table) -> str:
    """The domain and the notes fold where 100 columns do not hold them; numbers never do."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    drawn = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for column in table.columns:
        title = "\n".join(line for part in column.title.split("\n") for line in textwrap.wrap(part, _CELL_WIDTH))
        if column.is_words:
            drawn.add_column(title, overflow="fold")
        else:
            drawn.add_column(title, justify="right", no_wrap=True)
    for number, row in enumerate(table.rows, start=1):
        drawn.add_row(*row, end_section=number == table.num_domains)
    console = Console(file=StringIO(), width=WIDTH, color_system=None, markup=False, emoji=False, highlight=False)
    with console.capture() as capture:
        console.print(drawn)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n")


def markdown_text(above: Sequence[str], tables: Sequence[Table], below: Sequence[str]) -> str:
    """Paragraphs, tables, a list."""
    points = "\n".join(f"    - {_escaped(x.strip())}" if x[0] == " " else f"- {_escaped(x)}" for x in below)
    return "\n\n".join([*map(_escaped, above), *map(markdown_table, tables), points]) + "\n"


def markdown_table(table: Table) -> str:
    """A table of GitHub's Markdown; the means are bold."""
    titles = [_escaped(column.title.replace("\n", " ")) for column in table.columns]
    lines = [titles, ["---" if column.is_words else "---:" for column in table.columns]]
    for number, row in enumerate(table.rows):
        label, *cells = (_escaped(" ".join(cell.split())) for cell in row)
        lines.append([label if number < table.num_domains else f"**{label}**", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- words and cells -------------------------------------------------------------------------------------------


def _name_in(comparison: Comparison | None, name: str) -> str:
    if comparison is None or name in comparison.macro:
        return name
    if name or len(comparison.macro) != 1:
        raise ValueError(f"name={name!r} is not one of the systems compared: {sorted(comparison.macro)}. Name one.")
    return next(iter(comparison.macro))


def _check_same_rows(evaluation: Evaluation, comparison: Comparison | None, name: str) -> None:
    if comparison is None:
        return
    evaluated = {domain: measures.accuracy for domain, measures in evaluation.domains.items()}
    if comparison.accuracy.get(name) != evaluated:
        raise ValueError(
            f"{name!r} has accuracies {evaluated} in its evaluation, but {comparison.accuracy.get(name)} in the "
            "comparison: make both from the same rewards."
        )


def _found(test: Difference | None) -> tuple[str, ...]:
    return () if test is None or test.verdict == "no difference shown" else (test.verdict,)


def _with_interval(measures: Measures, *, mark: str = "") -> str:
    low, high = _percent(measures.interval.low), _percent(measures.interval.high)
    return f"{_percent(measures.accuracy)}{mark} {low}-{high}"


def _percent(share: float | None) -> str:
    return _MISSING if share is None else f"{100 * share:.1f}"


def _points(share: float, other: float | None) -> str:
    return _MISSING if other is None else f"{100 * (share - other):+.1f}"


def _gain(gain: Gain) -> str:
    low, high = gain.interval.low, gain.interval.high
    return f"{100 * gain.difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _p(p_value: float) -> str:
    return "< .001" if p_value < 0.001 else f"= {p_value:.3f}".replace("0.", ".")


def _size(number: int) -> str:
    for scale, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= scale:
            return f"{number / scale:,.1f} {unit}"
    return str(number)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _listed(names: Sequence[str]) -> str:
    return f" ({', '.join(map(_plain, names))})" if names else ""


def _plain(name: str) -> str:
    """A name from data in one line without control characters."""
    return "".join(c if c.isprintable() else " " for c in name)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


# ---- before and after --------------------------------------------------------------------------------------------


def render_change(
    before: ExtensionSide, after: ExtensionSide, gains: Mapping[str, Gain], domain: str, *, word: str, mixes: str
) -> str:
    """The regression table of a changed run: every old domain before and after, and the `word` one, `domain`.

    `before` may know nothing of the new domain's expert; its accuracy there is what the old mixture gave it. `gains`
    are the paired differences by domain; `mixes` says how old domains can have changed.
    """
    rows = [*after.evaluation.domains]
    was, now = before.evaluation.domains, after.evaluation.domains
    told = [("before", before.routing), ("after", after.routing)]
    table = Table(
        [
            Column("domain", [f"{name} ({word})" if name == domain else name for name in rows], is_words=True),
            Column("pairs", [f"{now[name].num_pairs:,}" for name in rows]),
            Column("accuracy\nbefore", [_with_interval(was[name]) for name in rows]),
            Column("accuracy\nafter", [_with_interval(now[name]) for name in rows]),
            Column("change, paired\n95% interval", [_gain(gains[name]) for name in rows]),
            *(
                Column(f"router\n{when}", [_percent(routing.domain_accuracy.get(name)) for name in rows])
                for when, routing in told
            ),
        ],
        num_domains=len(rows),
    )
    lost = [name for name in rows if name != domain and gains[name].difference < 0]
    beyond = [name for name in lost if gains[name].interval.high < 0]
    words = "No old domain lost accuracy on these pairs."
    if not set(rows) - {domain}:
        words = "Of the old domains nothing is known here."
    if lost:
        doubt = f"beyond the interval{_listed(beyond)}" if beyond else "none of them beyond its interval"
        words = f"Old domains that lost accuracy{_listed(lost)}: {doubt}. Their experts are the same; it comes {mixes}."
    routers = ["Before:", *_router_words(before.routing), "After:", *_router_words(after.routing)]
    return terminal_text([], [table], [words, *routers])


def render_price(prices: Prices) -> str:
    """Accuracy per domain beside the run measured against, then size and speed, then what was lost in words."""
    names = [prices.against, *(name for name in prices.sizes if name != prices.against)]
    return terminal_text(*_price_parts(prices, names))


def markdown_price(prices: Prices) -> str:
    names = [prices.against, *(name for name in prices.sizes if name != prices.against)]
    return markdown_text(*_price_parts(prices, names))


def _price_parts(prices: Prices, names: Sequence[str]) -> tuple[list[str], list[Table], list[str]]:
    domains = list(prices.comparison.accuracy[prices.against])
    tables = []
    for start in range(0, len(names), _SYSTEMS_PER_TABLE - 1):
        columns = [Column("domain", [*domains, "mean of domains"], is_words=True)]
        for name in names[start : start + _SYSTEMS_PER_TABLE - 1]:
            cells = [*(prices.evaluations[name].domains[d] for d in domains), prices.evaluations[name].macro]
            columns.append(Column(name, [_percent(one.accuracy) for one in cells]))
            if name != prices.against:
                apart = [*(prices.comparison.domains[name][d] for d in domains), prices.comparison.macro[name]]
                shown = [
                    f"{100 * one.difference:+.1f} [{100 * one.interval.low:+.1f}, {100 * one.interval.high:+.1f}]"
                    for one in apart
                ]
                columns.append(Column("points apart", shown))
        tables.append(Table(columns, len(domains)))
    sizes, speeds = [prices.sizes[n] for n in names], [prices.speeds[n] for n in names]
    tables.append(
        Table(
            [
                Column("run", names, is_words=True),
                Column("parameters", [f"{one.parameters_stored:,}" for one in sizes]),
                Column("active", [f"{one.parameters_active:,}" for one in sizes]),
                Column("MB on disk", [f"{one.bytes / 1e6:.1f}" for one in sizes]),
                Column("conversations per second", [f"{one.per_second:.1f}" for one in speeds]),
                Column("times as fast", [f"{one.ratio:.2f}" for one in speeds]),
            ],
            len(names),
        )
    )
    measures = prices.evaluations[prices.against]
    above = [
        f"{measures.micro.num_pairs:,} pairs; accuracy in per cent, differences to {prices.against} in points with "
        "95 % intervals."
    ]
    below = [
        *prices.words(),
        f"Speed: {prices.num_timed} conversations a pass, {prices.rounds} rounds side by side, seconds {prices.clock}. "
        "MB on disk hold the pretrained weights that a run needs beside it.",
    ]
    if prices.left_out:
        below.append(f"{prices.left_out:,} pairs left out, longer than some run's limit (--truncate allows them).")
    return above, tables, below


def render_dtype(prices: Sequence[DtypePrice]) -> str:
    """What bf16 costs, per domain and over all pairs."""
    columns = [
        Column("domain", [p.domain for p in prices], is_words=True),
        Column("pairs", [f"{p.num_pairs:,}" for p in prices]),
        Column("accuracy\nfp32", [_percent(p.accuracy_fp32) for p in prices]),
        Column("accuracy\nbf16", [_percent(p.accuracy_bf16) for p in prices]),
        Column("pairs\nflipped", [f"{100 * p.flipped:.2f}" for p in prices]),
        Column("other\nexpert", [f"{100 * p.rerouted:.2f}" for p in prices]),
        Column("margin error\n/ spread", [f"{p.margin_error:.4f}" for p in prices]),
    ]
    table = Table(columns, len(prices) - (prices[-1].domain == "all"))
    words = "margin error: root mean square change of the margin, in standard deviations of the fp32 margin"
    return terminal_text(["The price of bf16, in per cent of pairs:"], [table], [words])
