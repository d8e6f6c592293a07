"""Findings as tables and sentences for the terminal. Shares in per cent, differences in points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moreward.domains.advice import LEAVE, MERGE, RULE, SPLIT, Advice, Findings, Gain, Share
from moreward.domains.discover import Discovered
from moreward.domains.null import WORDS, ErrorRates
from moreward.report import Column, Table, terminal_table, terminal_text
from moreward.types import Preference

NULL_WORDS = {
    "shuffled": "labels shuffled over prompt groups",
    "halves": "one domain halved by chance",
    "opposed": "the same, one half with chosen and rejected swapped",
}


def render(findings: Findings, rates: ErrorRates | None = None) -> str:
    """The report for the terminal, 100 columns wide."""
    parts = [terminal_text([], [], [sentence(one) for one in findings.advice]).strip()]
    parts += [f"{title}\n\n{terminal_table(table)}" for title, table in tables(findings, rates)]
    return "\n\n".join([*parts, terminal_text([], [], notes(findings)).strip()]) + "\n"


def tables(findings: Findings, rates: ErrorRates | None = None) -> list[tuple[str, Table]]:
    """All tables with their titles."""
    found = [
        ("Held-out accuracy of the probes, % (95 % intervals)", advice_table(findings)),
        ("What the own probe wins, points; p after Holm's correction", gain_table(findings)),
        (
            "Trained on a row's domain, tested on a column's: held-out accuracy (95 % intervals)",
            transfer_table(findings),
        ),
        ("Do directions conflict? Cosine, and where labels mean nothing", conflict_table(findings)),
    ]
    return [*found, ("How often the rule is wrong", null_table(rates))] if rates else found


def sentence(one: Advice) -> str:
    """The advice for one domain and its evidence."""
    partners = ", ".join(one.partners)
    said = {
        SPLIT: "split" + (f" (an expert shared with {partners} would do)" if partners else ""),
        MERGE: f"merge with {next(iter(one.partners), '')}"
        + (f" (or {', '.join([*one.partners][1:])})" if len(one.partners) > 1 else ""),
        LEAVE: "leave with the others",
    }.get(one.word, one.word)
    return (
        f"{one.domain}: {said}. Its own probe is right in {_share(one.own)} % of held-out pairs, "
        f"{_gain(one.over_pooled)} points over the pooled probe and {_gain(one.over_control)} over the pooled control."
    )


def render_discovered(found: Sequence[Discovered], preferences: Sequence[Preference]) -> str:
    """What was found, with pairs of each part to look at."""
    parts = []
    for one in found:
        parts.append(terminal_text([discovered_words(one)], [discovered_table(one)], []).strip())
        for part in one.parts:
            lines = [f"{part.name}, to look at:"]
            for how, places in (("nearest", part.nearest), ("at random", part.random)):
                lines += [f"    {how}: {example(preferences[i])}" for i in places]
            parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def discovered_words(one: Discovered) -> str:
    """How far to believe it."""
    what = "Clusters of prompts" if one.kind == "cluster" else "Latent preference groups"
    hidden = "" if one.agreement is None else f" With the data's own labels, which were hidden: {one.agreement:.3f}."
    return f"{what}. Normalised mutual information of two seeds: {one.stability:.3f}.{hidden}"


def discovered_table(one: Discovered) -> Table:
    """A row for each part."""
    columns = [
        Column("part", [p.name for p in one.parts], is_words=True),
        Column("pairs", [f"{p.num_pairs:,}" for p in one.parts]),
        Column("the data's own labels", [_counts(p.labels) for p in one.parts], is_words=True),
    ]
    return Table(columns, num_domains=len(one.parts))


def example(preference: Preference, width: int = 78) -> str:
    """The prompt in one line of printable text."""
    prompt = preference.prompt
    text = prompt if isinstance(prompt, str) else " / ".join(str(turn.get("content") or "") for turn in prompt)
    plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return plain if len(plain) <= width else plain[: width - 3] + "..."


def _counts(labels: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in labels.items())


def advice_table(findings: Findings) -> Table:
    rows = findings.advice
    columns = [
        Column("domain", [one.domain for one in rows], is_words=True),
        Column("advice", [advice_words(one) for one in rows], is_words=True),
        Column("pairs", [f"{one.num_pairs:,}" for one in rows]),
        Column("groups", [f"{one.num_groups:,}" for one in rows]),
        Column("own", [_share(one.own) for one in rows]),
        Column("pooled", [_share(one.pooled) for one in rows]),
        Column("control", [_share(one.control) for one in rows]),
    ]
    return Table(columns, num_domains=len(rows))


def gain_table(findings: Findings) -> Table:
    rows = findings.advice
    columns = [
        Column("domain", [one.domain for one in rows], is_words=True),
        Column("over pooled", [_gain(one.over_pooled) for one in rows]),
        Column("over control", [_gain(one.over_control) for one in rows]),
        Column("p split", [_p(one.p_split) for one in rows]),
        Column("p leave", [_p(one.p_leave) for one in rows]),
    ]
    return Table(columns, num_domains=len(rows))


def transfer_table(findings: Findings) -> Table:
    names = [*findings.transfer]
    columns = [Column("trained on", names, is_words=True)]
    columns += [Column(b, [_with_interval(findings.transfer[a][b]) for a in names]) for b in names]
    return Table(columns, num_domains=len(names))


def conflict_table(findings: Findings) -> Table:
    rows = sorted(findings.conflicts, key=lambda c: c.cosine)
    columns = [
        Column("domains", [" / ".join(c.domains) for c in rows], is_words=True),
        Column("cosine", [f"{c.cosine:+.2f}" for c in rows]),
        Column("chance:\nmiddle", [f"{c.null_median:+.2f}" for c in rows]),
        Column("chance:\nlowest 5 %", [f"{c.null_low:+.2f}" for c in rows]),
        Column("p, Holm", [_p(c.p_holm) for c in rows]),
        Column("found", [c.word for c in rows], is_words=True),
    ]
    return Table(columns, num_domains=len(rows))


def null_table(rates: ErrorRates) -> Table:
    rows = rates.rates.values()
    total = [sum(rate.words.values()) for rate in rows]
    columns = [
        Column("labels", [NULL_WORDS[kind] for kind in rates.rates], is_words=True),
        Column("draws", [f"{rate.num_draws:,}" for rate in rows]),
        Column(
            "draws with\na split",
            [
                f"{rate.num_with_split} ({100 * rate.interval.low:.1f}-{100 * rate.interval.high:.1f} %)"
                for rate in rows
            ],
        ),
    ]
    columns += [
        Column(word, [f"{100 * rate.words[word] / n:.1f}" for rate, n in zip(rows, total, strict=True)])
        for word in WORDS
    ]
    return Table(columns, num_domains=len(total))


def notes(findings: Findings) -> list[str]:
    parameters = findings.num_parameters
    return [
        "The rule. " + " ".join(RULE),
        f"Probes read {findings.num_inputs} directions of frozen vectors. Parameters: all own probes together "
        f"{parameters['own']:,}, the pooled probe {parameters['pooled']:,}, the pooled control "
        f"{parameters['control']:,}. Probes are weak: where one learns nothing, an expert may still.",
        "Conflict: a cosine smaller than random labels make it, after Holm over all pairs of domains; `differ` where "
        "it is small but not negative.",
    ]


def advice_words(one: Advice) -> str:
    """The advice in a word or three."""
    if one.word == MERGE:
        return f"merge with {next(iter(one.partners))}"
    return one.word


def _share(share: Share) -> str:
    return f"{_percent(share.value)} ({_percent(share.interval.low)}-{_percent(share.interval.high)})"


def _with_interval(share: Share) -> str:
    return f"{100 * share.value:.0f}\n{100 * share.interval.low:.0f}-{100 * share.interval.high:.0f}"


def _gain(gain: Gain) -> str:
    return f"{100 * gain.value:+.1f} ({100 * gain.interval.low:+.1f} to {100 * gain.interval.high:+.1f})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _p(p_value: float) -> str:
    return "<.001" if p_value < 0.001 else f"{p_value:.3f}".removeprefix("0")
