"""Auxiliary losses that keep a router from sending everything to one expert. E experts, N rows."""

from __future__ import annotations

from torch import Tensor


def squared_variation(load_E: Tensor) -> Tensor:
    """CV², the squared coefficient of variation: 0 when all are equal (Shazeer et al., arXiv 1701.06538, eq. 7)."""
    return load_E.float().var(correction=0) / (load_E.float().mean().square() + 1e-10)


def importance_and_load(gates_NE: Tensor, load_E: Tensor) -> Tensor:
    """CV²(Σ_n gates) + CV²(load), to be scaled by the caller (arXiv 1701.06538, eq. 6-11)."""
    return squared_variation(gates_NE.sum(0)) + squared_variation(load_E)
