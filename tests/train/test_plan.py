"""The order of pairs: nothing lost, nothing doubled, a function of the seed."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moreward.train import plan
from moreward.train.plan import BUCKET_BATCHES, epoch_batches, epoch_order, stable_seed

rows = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 3)), min_size=1, max_size=120)
sizes = st.integers(1, 9)
seeds = st.integers(0, 2**50)
temperatures = st.floats(1.0, 50.0)


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


@given(rows, sizes, seeds)
def test_at_temperature_one_every_row_stands_once_in_an_epoch(
    rows: list[tuple[int, int]], batch_size: int, seed: int
) -> None:
    lengths, domains = zip(*rows, strict=True)
    batches = epoch_batches(lengths, domains, batch_size=batch_size, temperature=1.0, seed=seed)
    assert sorted(flat(batches)) == list(range(len(rows)))
    assert len(batches) == -(-len(rows) // batch_size)
    assert sum(len(batch) < batch_size for batch in batches) <= 1


@given(rows, sizes, seeds, temperatures)
def test_an_epoch_has_as_many_rows_and_batches_at_any_temperature(
    rows: list[tuple[int, int]], batch_size: int, seed: int, temperature: float
) -> None:
    lengths, domains = zip(*rows, strict=True)
    batches = epoch_batches(lengths, domains, batch_size=batch_size, temperature=temperature, seed=seed)
    assert len(flat(batches)) == len(rows)
    assert len(batches) == -(-len(rows) // batch_size)


@given(rows, sizes, seeds, temperatures)
def test_the_same_seed_gives_the_same_batches(
    rows: list[tuple[int, int]], batch_size: int, seed: int, temperature: float
) -> None:
    lengths, domains = zip(*rows, strict=True)
    once, again = (
        epoch_batches(lengths, domains, batch_size=batch_size, temperature=temperature, seed=seed) for _ in range(2)
    )
    assert once == again


def test_another_seed_gives_another_order() -> None:
    orders = {str(epoch_batches([1] * 40, [0] * 40, batch_size=4, temperature=1.0, seed=s)) for s in range(20)}
    assert len(orders) == 20


@given(st.lists(st.integers(1, 60), min_size=2, max_size=5), seeds, temperatures)
def test_each_domain_gets_its_share_and_its_rows_repeat_evenly(
    counts: list[int], seed: int, temperature: float
) -> None:
    domains = [d for d, n in enumerate(counts) for _ in range(n)]
    order = epoch_order(domains, temperature, np.random.default_rng(seed))
    drawn = Counter(domains[row] for row in order)
    power = [n ** (1 / temperature) for n in counts]
    for domain, count in enumerate(counts):
        assert abs(drawn[domain] - power[domain] / sum(power) * len(domains)) <= 1, "the stated share"
        times = Counter(row for row in order if domains[row] == domain)
        each = [times[row] for row in range(len(domains)) if domains[row] == domain]
        assert max(each) - min(each) <= 1, f"{count} rows of one domain are used equally often"


def test_a_high_temperature_evens_the_domains_out() -> None:
    domains = [0] * 900 + [1] * 90 + [2] * 10
    drawn = {t: Counter(domains[r] for r in epoch_order(domains, t, np.random.default_rng(0))) for t in (1.0, 2.0, 1e6)}
    assert drawn[1.0] == {0: 900, 1: 90, 2: 10}
    assert drawn[1e6] == {0: 333, 1: 333, 2: 333} | {max(drawn[1e6], key=drawn[1e6].__getitem__): 334}
    assert drawn[1.0][2] < drawn[2.0][2] < drawn[1e6][2]


def test_a_batch_holds_rows_of_similar_length() -> None:
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 512, size=4 * BUCKET_BATCHES * 8).tolist()
    batches = epoch_batches(lengths, [0] * len(lengths), batch_size=8, temperature=1.0, seed=3)
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    shuffled = [lengths[r] for r in rng.permutation(len(lengths))]
    unsorted = sum(8 * max(shuffled[i : i + 8]) for i in range(0, len(lengths), 8))
    assert padded < 1.1 * sum(lengths) < 1.5 * sum(lengths) < unsorted


def test_short_batches_do_not_come_first() -> None:
    lengths = list(range(256))
    firsts = {min(epoch_batches(lengths, [0] * 256, batch_size=8, temperature=1.0, seed=s)[0]) // 64 for s in range(40)}
    assert firsts == {0, 1, 2, 3}


def test_a_seed_is_the_same_in_every_process() -> None:
    assert stable_seed(0, "router", 3, 1) == 38183360122660452
    code = "from moreward.train.plan import stable_seed; print(stable_seed('a', 1, 'b'))"
    source = str(Path(plan.__file__).resolve().parents[2])
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": source, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert said == {f"{stable_seed('a', 1, 'b')}\n"}


@pytest.mark.parametrize("parts", [(0, "a", 1, 2), (0, "a", 12), (1, "a", 1, 2), (0, "b", 1, 2), (0, "a", 2, 1)])
def test_seeds_of_different_places_differ(parts: tuple[object, ...]) -> None:
    others = [(0, "a", 1, 2), (0, "a", 12), (1, "a", 1, 2), (0, "b", 1, 2), (0, "a", 2, 1)]
    assert [stable_seed(*o) == stable_seed(*parts) for o in others].count(True) == 1
