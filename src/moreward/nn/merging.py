"""From how many rows of one adapter its merged weight pays, by measurement.

Unmerged, each row costs two small products more. Merged, it costs nothing more, but the adapter's rows become a product
of their own, which is slow where they are few, and the weight has to be merged first, unless it is kept.
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from moreward.nn.linear import product
from moreward.nn.measured import Key, measure, seconds

KIND = "merging"
GRID = (16, 32, 64, 128, 256)
"""Numbers of rows that are measured. From the last one on a product of its own is as good as a part of a larger one."""

Size = tuple[int, int]  # in, out


class MergeFrom(NamedTuple):
    """Rows from which a merged weight pays: one that is kept, and one that has to be merged each time."""

    kept: int
    anew: int


def merge_from(sizes: set[Size], rank: int, device: torch.device) -> dict[Size, MergeFrom]:
    """For layers of these (in, out) sizes and adapters of this rank. Measured for the CPU; elsewhere, and with
    `MOREWARD_LINEAR=plain`, by the number of operations."""
    if device.type != "cpu" or os.environ.get("MOREWARD_LINEAR") == "plain":
        return {(i, o): MergeFrom(64, max(64, 2 * i * o // (i + o))) for i, o in sizes}
    keys: list[Key] = [(*size, rank) for size in sorted(sizes)]
    found = measure(KIND, keys, lambda key: list(_measured(*key)))
    return {(i, o): MergeFrom(*rows) for (i, o, _), rows in found.items()}


@torch.no_grad()
def _measured(num_in: int, num_out: int, rank: int) -> MergeFrom:
    generator = torch.Generator("cpu").manual_seed(0)
    most = GRID[-1]
    shapes = ((most, num_in), (num_out, num_in), (rank, num_in), (num_out, rank), (most, num_out))
    x, weight, A_RI, B_OR, y = (torch.randn(shape, generator=generator, device="cpu") for shape in shapes)

    def own(rows: int) -> float:
        return seconds(lambda: product(x[:rows], weight, None), 2 * rows * num_in * num_out)

    per_row = own(most) / most
    delta = seconds(lambda: add_delta(y, x, A_RI, B_OR, 1.0), 2 * most * rank * (num_in + num_out)) / most
    merge = seconds(lambda: merged(weight, A_RI, B_OR, 1.0), 2 * rank * num_in * num_out)
    return decide({rows: own(rows) for rows in GRID[:-1]}, per_row, delta, merge)


def decide(own: dict[int, float], per_row: float, delta: float, merge: float) -> MergeFrom:
    """From seconds: of a product of so many rows alone, of a row within a large one, of what an adapter adds to a
    row, of merging a weight."""
    slow = [rows for rows, alone in own.items() if alone > rows * (per_row + delta)]
    kept = GRID[GRID.index(max(slow)) + 1] if slow else GRID[0]
    return MergeFrom(kept, max(kept, math.ceil(merge / delta)))


def merged(weight: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float) -> Tensor:
    """W + scale · B A."""
    return torch.addmm(weight.detach(), B_OR, A_RI, alpha=scale)


def add_delta(y: Tensor, x: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float) -> None:
    """y += scale · x Aᵀ Bᵀ, in place."""
    y.addmm_(x @ A_RI.mT, B_OR.mT, alpha=scale)
