"""S12, S13, S17 in seconds; at length they are in tests/soak."""

from __future__ import annotations

from moreward.scoring import Scorer
from serving import Live
from soaking import both, compositions, many, mixed_up


def test_s12_shuffled_batches_change_no_bit(live: Live, scorer: Scorer) -> None:
    assert compositions(live, scorer, 12) == 0


def test_s13_threads_and_experts_are_not_mixed_up(live: Live, scorer: Scorer) -> None:
    assert mixed_up(live, scorer, 6) == (0, 96)


def test_s17_memory_is_flat(live: Live) -> None:
    many(live, 80)
    before = both(live)
    many(live, 160)
    assert all(after - before[name] < 20e6 for name, after in both(live).items())
