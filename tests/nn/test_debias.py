"""The least amount of an attribute that must go."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from moreward.nn.debias import amount_to_subtract, spearman


def drawn(share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    attribute_N = rng.normal(size=300)
    return share * attribute_N + rng.normal(size=300), attribute_N


@given(seed=st.integers(0, 50), ties=st.booleans())
def test_rank_correlation_is_scipys(seed: int, ties: bool) -> None:
    x_N, y_N = drawn(0.5, seed)
    x_N = x_N.round() if ties else x_N
    assert spearman(x_N, y_N) == pytest.approx(float(spearmanr(x_N, y_N).statistic), abs=1e-12)
    assert spearman(np.ones(4), np.arange(4.0)) == 0.0


@given(seed=st.integers(0, 50), share=st.floats(-0.5, 0.9), threshold=st.sampled_from([0.0, 0.03, 0.2]))
def test_the_threshold_is_met_and_no_less_would_do(seed: int, share: float, threshold: float) -> None:
    reward_N, attribute_N = drawn(share, seed)
    found = amount_to_subtract(reward_N, attribute_N, threshold=threshold, limit=2.0)
    assert found.reached
    assert found.after <= threshold
    assert found.after == pytest.approx(spearman(reward_N - found.amount * attribute_N, attribute_N))
    if found.amount:
        assert found.before > threshold
        assert spearman(reward_N - 0.99 * found.amount * attribute_N, attribute_N) > threshold - 1e-9
    else:
        assert found.before <= threshold, "one-sided: what follows the attribute downwards is left as it is"


def test_a_limit_that_is_too_low_is_told() -> None:
    reward_N, attribute_N = drawn(3.0)
    found = amount_to_subtract(reward_N, attribute_N, threshold=0.03, limit=1.0)
    assert (found.reached, found.amount) == (False, 1.0)
    assert found.after > 0.03
