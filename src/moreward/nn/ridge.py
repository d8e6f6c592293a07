"""Ridge regression in closed form, for many targets of which each may be missing in some rows.

N rows, D hidden, K targets, A values of alpha.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALPHAS: tuple[float, ...] = tuple(10.0**p for p in range(-4, 5))


@dataclass(frozen=True)
class Ridge:
    """One target's fit. `val_mse` None: there was no held-out row, and alpha is the middle one."""

    weight_D: Tensor
    bias: float
    alpha: float
    num_train: int
    num_val: int
    train_mse: float
    val_mse: float | None


def ridge_path(x_ND: Tensor, y_N: Tensor, alphas: Sequence[float], *, intercept: bool = False) -> tuple[Tensor, Tensor]:
    """`weight_AD` and `bias_A` that minimise |y - xw - b|² + alpha |w|², for every alpha from one eigendecomposition.

    In float64. The intercept, if any, is not penalised.
    """
    x_ND, y_N = x_ND.double(), y_N.double()
    mean_D = x_ND.mean(0) if intercept else x_ND.new_zeros(x_ND.shape[1])
    mean = y_N.mean() if intercept else y_N.new_zeros(())
    x_ND, y_N = x_ND - mean_D, y_N - mean
    value_D, vector_DD = torch.linalg.eigh(x_ND.T @ x_ND)
    along_D = vector_DD.T @ (x_ND.T @ y_N)
    alpha_A1 = torch.tensor(alphas, dtype=torch.float64, device=x_ND.device)[:, None]
    weight_AD = (along_D / (value_D.clamp(min=0) + alpha_A1)) @ vector_DD.T
    return weight_AD, mean - weight_AD @ mean_D


def fit_ridge(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    *,
    alphas: Sequence[float] = ALPHAS,
    intercept: bool = False,
) -> Ridge:
    """The fit on the training rows whose alpha has the least squared error on the held-out ones.

    `train` and `val` are `x_ND` and `y_N`; rows whose y is NaN are left out. There must be a training row.
    """
    (x_ND, y_N), (val_x_ND, val_y_N) = _rated(*train), _rated(*val)
    weight_AD, bias_A = ridge_path(x_ND, y_N, alphas, intercept=intercept)
    best, val_mse = len(alphas) // 2, None
    if len(val_y_N):
        mse_A = (val_x_ND @ weight_AD.T + bias_A - val_y_N[:, None]).square().mean(0)
        best = int(mse_A.argmin())
        val_mse = float(mse_A[best])
    weight_D, bias = weight_AD[best], bias_A[best]
    train_mse = float((x_ND @ weight_D + bias - y_N).square().mean())
    return Ridge(weight_D, float(bias), alphas[best], len(y_N), len(val_y_N), train_mse, val_mse)


def _rated(x_ND: Tensor, y_N: Tensor) -> tuple[Tensor, Tensor]:
    known_N = ~y_N.isnan()
    return x_ND[known_N].double(), y_N[known_N].double()
