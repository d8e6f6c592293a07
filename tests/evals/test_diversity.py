"""Do experts err together: correlations against numpy's, shares against counting, and what has none."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moreward.evals.diversity import diversity_report, error_correlation
from moreward.evals.run import evaluate_run
from moreward.scoring import load
from moreward.types import Preference
from trained import trained

MARGINS = st.lists(st.tuples(*[st.sampled_from([-1.0, 0.0, 1.0])] * 3), min_size=2, max_size=12)


def told(margins: Sequence[Sequence[float]]) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    return [dict(zip("abc", row, strict=False)) for row in margins], [
        dict.fromkeys("abc"[: len(r)], 0.0) for r in margins
    ]


def preferences(domains: str) -> list[Preference]:
    return [Preference(prompt=str(i), chosen="c", rejected="r", domain=d) for i, d in enumerate(domains)]


@given(MARGINS)
def test_the_correlation_is_that_of_the_errors_and_shares_are_counted(margins: list[tuple[float, ...]]) -> None:
    found = diversity_report(preferences("x" * len(margins)), *told(margins))
    assert found is not None
    wrong_BK = np.array(margins) <= 0
    for i, a in enumerate("abc"):
        for j, b in enumerate("abc"):
            if 0 < wrong_BK[:, i].sum() < len(margins) and 0 < wrong_BK[:, j].sum() < len(margins):
                wanted = np.corrcoef(wrong_BK[:, i], wrong_BK[:, j])[0, 1]
                assert found.correlation[a][b] == pytest.approx(wanted)
            else:
                assert found.correlation[a][b] is None
    two = [(row[i], row[j]) for row in margins for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found.overall.disagreement == pytest.approx(np.mean([x != y for x, y in two]))
    assert found.overall.split == pytest.approx(np.mean([len(set(row)) > 1 for row in margins]))
    assert found.overall.accuracy["b"] == pytest.approx(np.mean([row[1] > 0 for row in margins]))
    assert json.loads(json.dumps(found.to_json()))["experts"] == ["a", "b", "c"]


def test_errors_on_the_same_pairs_and_on_opposite_pairs() -> None:
    margin_BK = np.array([[1.0, 2.0, -1.0], [-1.0, -0.1, 3.0]])
    assert error_correlation(margin_BK) == pytest.approx(np.array([[1, 1, -1], [1, 1, -1], [-1, -1, 1]]))


def test_domains_are_measured_apart() -> None:
    found = diversity_report(preferences("xxyy"), *told([(1, 1), (-1, -1), (1, -1), (-1, 1)]))
    assert found is not None
    assert (found.domains["x"].correlation, found.domains["y"].correlation) == pytest.approx((1.0, -1.0))
    assert (found.domains["x"].split, found.domains["y"].split, found.overall.split) == (0.0, 1.0, 0.5)
    said = found.to_text()
    assert "correlate by 0.00" in said
    assert "y: correlation -1.00, disagreement 100.0%" in said


def test_one_expert_has_no_diversity_and_rows_must_fit() -> None:
    assert diversity_report(preferences("x"), [{"a": 1.0}], [{"a": 0.0}]) is None
    assert diversity_report(preferences("x"), [{}], [{}]) is None
    with pytest.raises(ValueError, match="a, b"):
        diversity_report(preferences("x"), [{"a": 1.0, "b": 1.0}], [{"a": 0.0}])
    with pytest.raises(ValueError, match="1 chosen"):
        diversity_report(preferences("xx"), [{"a": 1.0}], [{"a": 0.0}])


def test_experts_of_a_mixture_are_asked_only_when_wanted(
    tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Callable[[str], Path], pairs: Sequence[Preference]
) -> None:
    scorer = load(trained(tmp_path_factory.mktemp("runs"), tiny_backbone, pairs))
    assert evaluate_run(scorer, pairs[:6]).diversity is None
    found = evaluate_run(scorer, pairs, every_expert=True)
    assert found.diversity is not None
    assert found.diversity.experts == ("long", "short")
    assert found.diversity.domains["long"].accuracy["long"] == found.evaluation.domains["long"].oracle
