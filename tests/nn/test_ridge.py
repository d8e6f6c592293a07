"""Ridge in closed form equals scikit-learn's; missing ratings touch nothing but their own objective."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from moreward.nn.ridge import ALPHAS, fit_ridge, ridge_path


def data(num_rows: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(num_rows, size, generator=made, dtype=torch.float64) + 0.3
    return x_ND, x_ND @ torch.randn(size, generator=made, dtype=torch.float64) + 0.5


@settings(max_examples=20)
@given(num_rows=st.integers(2, 60), size=st.integers(1, 40), seed=st.integers(0, 99), intercept=st.booleans())
def test_every_alpha_equals_scikit_learn(num_rows: int, size: int, seed: int, intercept: bool) -> None:
    x_ND, y_N = data(num_rows, size, seed)
    weight_AD, bias_A = ridge_path(x_ND, y_N, ALPHAS, intercept=intercept)
    for alpha, weight_D, bias in zip(ALPHAS, weight_AD, bias_A, strict=True):
        theirs = Ridge(alpha=alpha, fit_intercept=intercept, solver="svd").fit(x_ND.numpy(), y_N.numpy())
        torch.testing.assert_close(weight_D, torch.from_numpy(theirs.coef_), rtol=0, atol=1e-8)
        assert float(bias) == pytest.approx(float(theirs.intercept_), abs=1e-8)


def test_alpha_is_the_best_on_the_held_out_rows_and_missing_rows_do_not_count() -> None:
    x_ND, y_N = data(80, 12)
    noisy_N = y_N + 2 * torch.randn(80, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    noisy_N[::3] = torch.nan
    train, val = (x_ND[:50], noisy_N[:50]), (x_ND[50:], noisy_N[50:])
    fit = fit_ridge(train, val)
    known = ~noisy_N.isnan()
    errors = []
    for alpha in ALPHAS:
        theirs = Ridge(alpha=alpha, fit_intercept=False).fit(x_ND[:50][known[:50]], noisy_N[:50][known[:50]])
        errors.append(float(((theirs.predict(x_ND[50:][known[50:]]) - noisy_N[50:][known[50:]].numpy()) ** 2).mean()))
    assert fit.alpha == ALPHAS[errors.index(min(errors))]
    assert fit.val_mse == pytest.approx(min(errors))
    assert (fit.num_train, fit.num_val) == (int(known[:50].sum()), int(known[50:].sum()))


def test_without_a_held_out_row_it_says_so() -> None:
    x_ND, y_N = data(10, 3)
    fit = fit_ridge((x_ND, y_N), (x_ND[:0], y_N[:0]))
    assert (fit.val_mse, fit.alpha, fit.num_val) == (None, 1.0, 0)
