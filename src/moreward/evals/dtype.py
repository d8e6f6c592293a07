"""What bf16 costs: the same run on the same pairs in fp32 and in bf16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moreward.types import Preference

if TYPE_CHECKING:
    from moreward.scoring import Scorer


@dataclass(frozen=True, kw_only=True)
class DtypePrice:
    """One domain, or all. Shares and accuracies are between 0 and 1.

    `flipped` is the share of pairs whose order changed; `rerouted` that of pairs whose chosen or rejected response
    went to another expert; `margin_error` the root mean square change of the margin, in standard deviations of the
    fp32 margin.
    """

    domain: str
    num_pairs: int
    accuracy_fp32: float
    accuracy_bf16: float
    flipped: float
    rerouted: float
    margin_error: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def dtype_check(fp32: Scorer, bf16: Scorer, preferences: Sequence[Preference]) -> list[DtypePrice]:
    """The price per domain, and at the end over all pairs, under the name `all`."""
    from moreward.data.batches import side
    from moreward.evals.run import within_limit  # loads torch, which a report does not need

    kept, _ = within_limit(fp32, preferences)
    items = [side(p, which) for p in kept for which in ("chosen", "rejected")]
    before, after = fp32.score(items), bf16.score(items)
    margins = [np.array([a.number - b.number for a, b in zip(r[::2], r[1::2], strict=True)]) for r in (before, after)]
    moved = np.array([a.expert != b.expert for a, b in zip(before, after, strict=True)], dtype=bool)
    moved = moved[::2] | moved[1::2]
    domain_of = np.array([p.domain for p in kept])
    domains = sorted(set(domain_of.tolist()))
    rows = [(d, domain_of == d) for d in domains]
    if len(domains) > 1:
        rows.append(("all", np.ones(len(kept), dtype=bool)))
    return [_price(name, margins[0][where], margins[1][where], moved[where]) for name, where in rows]


def _price(domain: str, before: np.ndarray, after: np.ndarray, moved: np.ndarray) -> DtypePrice:
    spread = float(before.std()) or 1.0
    return DtypePrice(
        domain=domain,
        num_pairs=len(before),
        accuracy_fp32=float((before > 0).mean()),
        accuracy_bf16=float((after > 0).mean()),
        flipped=float(((before > 0) != (after > 0)).mean()),
        rerouted=float(moved.mean()),
        margin_error=float(np.sqrt(np.square(after - before).mean())) / spread,
    )
