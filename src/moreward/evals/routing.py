"""Where the router sends prompts: how often to the expert of their domain, and where else."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moreward.evals.accuracy import check_aligned
from moreward.types import Preference, RoutedReward, text_key


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingReport:
    """Counts are of distinct prompts, so a prompt with many pairs weighs as much as one with a single pair.

    `confusion[domain][expert]` is a number of prompts; a prompt whose responses went to several experts is divided
    among them by its share of responses. `accuracy` is over the prompts whose domain has an expert of its own name,
    None where there are none. `split_share` is the share of pairs whose two responses used different experts: 0 for
    a router that reads the prompt only. All is None or empty for a system without named experts.
    """

    experts: tuple[str, ...] = ()
    accuracy: float | None = None
    domain_accuracy: Mapping[str, float | None] = field(default_factory=dict)
    confusion: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    num_prompts: Mapping[str, int] = field(default_factory=dict)
    share: Mapping[str, float] = field(default_factory=dict)
    split_share: float | None = None
    domains_without_expert: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        lists = {"experts": list(self.experts), "domains_without_expert": list(self.domains_without_expert)}
        return asdict(self) | lists


def routing_report(
    preferences: Sequence[Preference],
    chosen: Sequence[RoutedReward],
    rejected: Sequence[RoutedReward],
    *,
    experts: Sequence[str],
) -> RoutingReport:
    """Compare the expert each response went to with its row's domain.

    Raises DataError without preferences, ValueError at an expert that is not in `experts`.
    """
    check_aligned(preferences, chosen, rejected)
    if not experts:
        return RoutingReport()
    _check_known({r.expert for r in (*chosen, *rejected)}, experts)
    confusion, num_prompts = _confusion(preferences, chosen, rejected, experts)
    at_home = {domain: row[domain] for domain, row in confusion.items() if domain in experts}
    total = sum(num_prompts.values())
    num_split = sum(c.expert != j.expert for c, j in zip(chosen, rejected, strict=True))
    return RoutingReport(
        experts=tuple(experts),
        accuracy=sum(at_home.values()) / sum(num_prompts[d] for d in at_home) if at_home else None,
        domain_accuracy={d: at_home[d] / num_prompts[d] if d in at_home else None for d in confusion},
        confusion=confusion,
        num_prompts=num_prompts,
        share={expert: sum(row[expert] for row in confusion.values()) / total for expert in experts},
        split_share=num_split / len(preferences),
        domains_without_expert=tuple(d for d in confusion if d not in experts),
    )


def _check_known(used: set[str], experts: Sequence[str]) -> None:
    if unknown := sorted(used - set(experts)):
        raise ValueError(f"Responses went to {unknown}, but the experts given are {list(experts)}: name them all.")


def _confusion(
    preferences: Sequence[Preference],
    chosen: Sequence[RoutedReward],
    rejected: Sequence[RoutedReward],
    experts: Sequence[str],
) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Prompts by domain and expert, and prompts by domain; domains sorted."""
    used_by_prompt: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for preference, c, j in zip(preferences, chosen, rejected, strict=True):
        used_by_prompt[preference.domain, text_key(preference.prompt)].update((c.expert, j.expert))
    num_prompts = Counter(domain for domain, _ in used_by_prompt)
    confusion = {domain: dict.fromkeys(experts, 0.0) for domain in sorted(num_prompts)}
    # Sorted, so that the order of the rows cannot change how the fractions round.
    for (domain, _), used in sorted(used_by_prompt.items(), key=lambda item: item[0]):
        for expert, count in used.items():
            confusion[domain][expert] += count / used.total()
    return confusion, {domain: num_prompts[domain] for domain in confusion}
