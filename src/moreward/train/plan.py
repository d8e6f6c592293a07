"""Which pairs stand in which step: a function of the seed alone, so that a resumed run needs no cursor but a number."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

BUCKET_BATCHES = 32


def stable_seed(*parts: object) -> int:
    """A seed from anything printable, the same in every process and version."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=7).digest(), "big")


def epoch_order(domains: Sequence[int], temperature: float, rng: np.random.Generator) -> np.ndarray:
    """Row numbers of one epoch. Domain d is drawn n_d^(1/temperature) / Σ of the time: at 1 every row stands once;
    above 1 small domains repeat and large ones are cut, the number of rows staying the same."""
    domain_of = np.asarray(domains)
    if temperature == 1.0:
        return rng.permutation(len(domain_of))
    names, counts = np.unique(domain_of, return_counts=True)
    share = counts ** (1 / temperature)
    wanted = _round_to_sum(share / share.sum() * len(domain_of))
    drawn = []
    for name, count, want in zip(names, counts, wanted, strict=True):
        rows = np.flatnonzero(domain_of == name)
        passes = [rng.permutation(rows) for _ in range(-(-want // count))]
        drawn.append(np.concatenate(passes)[:want] if passes else rows[:0])
    return rng.permutation(np.concatenate(drawn))


def epoch_batches(
    lengths: Sequence[int], domains: Sequence[int], *, batch_size: int, temperature: float, seed: int
) -> list[list[int]]:
    """Shuffled batches of rows of similar length: sorted within windows, windows and batches in random order."""
    rng = np.random.default_rng(seed)
    order = epoch_order(domains, temperature, rng)
    window = batch_size * BUCKET_BATCHES
    length_of = np.asarray(lengths)
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        rows = order[start : start + window]
        rows = rows[np.argsort(length_of[rows], kind="stable")]
        batches += [rows[i : i + batch_size].tolist() for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def _round_to_sum(values: np.ndarray) -> list[int]:
    """Integers next to `values` with the same sum (largest remainders)."""
    floors = np.floor(values).astype(int)
    missing = round(float(values.sum())) - int(floors.sum())
    floors[np.argsort(values - floors)[::-1][:missing]] += 1
    return [int(f) for f in floors]
