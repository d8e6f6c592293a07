"""Do experts err together? An ensemble gains where they do not; shared blind spots no aggregate removes.

B pairs, K experts or members.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moreward.types import Preference

Floats = NDArray[np.float64]
_NAME_WIDTH = 14


@dataclass(frozen=True, kw_only=True)
class DomainDiversity:
    """One domain, or all. `accuracy` of each expert on these pairs. `correlation` is the mean, over pairs of experts,
    of the correlation of their errors: 1 where they err on the same pairs, 0 where independently; None where no two
    experts have both errors and hits. `disagreement` is the share of pairs that two experts order differently, the
    mean over pairs of experts; `split` the share of pairs on which not all experts agree. A tie is an error."""

    num_pairs: int
    accuracy: Mapping[str, float]
    correlation: float | None
    disagreement: float
    split: float


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """`correlation[a][b]` is that of the errors of two experts over all pairs, None where one of them has no error or
    nothing else."""

    experts: tuple[str, ...]
    correlation: Mapping[str, Mapping[str, float | None]]
    overall: DomainDiversity
    domains: Mapping[str, DomainDiversity]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"experts": list(self.experts)}

    def to_text(self) -> str:
        """Lines for the terminal: the means, each domain, the matrix."""
        mean = self.overall
        lines = [
            f"Diversity of {len(self.experts)}: their errors correlate by {_number(mean.correlation)} in the mean "
            f"(1: the same errors, 0: independent); two of them order {_percent(mean.disagreement)} of pairs "
            f"differently, not all agree on {_percent(mean.split)}."
        ]
        lines += [
            f"    {name}: correlation {_number(one.correlation)}, disagreement {_percent(one.disagreement)}, "
            f"accuracy {_percent(min(one.accuracy.values()))} to {_percent(max(one.accuracy.values()))}"
            for name, one in self.domains.items()
        ]
        short = [name[:_NAME_WIDTH] for name in self.experts]
        lines.append("    " + " " * _NAME_WIDTH + "".join(f" {name:>{_NAME_WIDTH}}" for name in short))
        for name, row in zip(short, self.correlation.values(), strict=True):
            lines.append(f"    {name:<{_NAME_WIDTH}}" + "".join(f" {_number(v):>{_NAME_WIDTH}}" for v in row.values()))
        return "\n".join(lines)


def diversity_report(
    preferences: Sequence[Preference], chosen: Sequence[Mapping[str, float]], rejected: Sequence[Mapping[str, float]]
) -> Diversity | None:
    """From what every expert said of both responses of each pair, by its name. None with fewer than two experts.

    Raises ValueError where the rows are not one for each preference or do not name the same experts.
    """
    if not len(preferences) == len(chosen) == len(rejected):
        raise ValueError(f"{len(preferences)} preferences, {len(chosen)} chosen and {len(rejected)} rejected rows")
    experts = tuple(chosen[0]) if chosen else ()
    if len(experts) < 2:
        return None
    if any(set(row) != set(experts) for row in (*chosen, *rejected)):
        raise ValueError(f"every row must hold the rewards of {', '.join(experts)}")
    margin_BK = np.array([[c[e] - j[e] for e in experts] for c, j in zip(chosen, rejected, strict=True)])
    domain_B = np.array([p.domain for p in preferences])
    matrix_KK = error_correlation(margin_BK)
    return Diversity(
        experts=experts,
        correlation={
            a: {b: _known(value) for b, value in zip(experts, row, strict=True)}
            for a, row in zip(experts, matrix_KK, strict=True)
        },
        overall=_measure(experts, margin_BK),
        domains={d: _measure(experts, margin_BK[domain_B == d]) for d in sorted(set(domain_B.tolist()))},
    )


def error_correlation(margin_BK: Floats) -> Floats:
    """Pearson correlation (K, K) of the errors, margin ≤ 0, of each two experts; NaN where one has no variance."""
    wrong_BK = (margin_BK <= 0).astype(np.float64)
    centred_BK = wrong_BK - wrong_BK.mean(0)
    length_K = np.sqrt(np.square(centred_BK).sum(0))
    length_KK = np.outer(length_K, length_K)
    unknown_KK: Floats = np.full_like(length_KK, np.nan)
    np.divide(centred_BK.T @ centred_BK, length_KK, out=unknown_KK, where=length_KK > 0)
    return unknown_KK


def _measure(experts: Sequence[str], margin_BK: Floats) -> DomainDiversity:
    above = np.triu_indices(len(experts), 1)
    correlation_M = error_correlation(margin_BK)[above]
    known_M = correlation_M[~np.isnan(correlation_M)]
    sign_BK = np.sign(margin_BK)
    differs_BM = sign_BK[:, above[0]] != sign_BK[:, above[1]]
    return DomainDiversity(
        num_pairs=len(margin_BK),
        accuracy=dict(zip(experts, (margin_BK > 0).mean(0).tolist(), strict=True)),
        correlation=float(known_M.mean()) if len(known_M) else None,
        disagreement=float(differs_BM.mean()),
        split=float(differs_BM.any(1).mean()),
    )


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
