"""DRM: directions against numpy's, weights against a plain loop, and no pair adapted on that is evaluated too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moreward.data.batches import encode_pairs, pair_batch
from moreward.data.split import draw_shots
from moreward.errors import DataError
from moreward.scoring import Scorer, load
from moreward.types import Preference
from trained import card, trained

WORDS = ("tune=frozen", "pooling=mean", "system.num_directions=4", "system.num_shots=6")


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Callable[[str], Path], pairs: Sequence[Preference]
) -> Path:
    return trained(tmp_path_factory.mktemp("runs"), tiny_backbone, pairs, "drm", "bert", *WORDS)


def batch_of(scorer: Scorer, preferences: Sequence[Preference]) -> Any:
    encoded = encode_pairs(scorer.encoder, preferences, scorer.domains, on_long="drop").pairs
    return pair_batch(encoded, scorer.encoder.pad_id)


def test_directions_are_the_mean_difference_and_the_principal_ones_beside_it(
    run: Path, pairs: Sequence[Preference]
) -> None:
    scorer = load(run)
    system: Any = scorer.system
    batch = batch_of(scorer, pairs)
    with torch.no_grad():
        hidden_ND = system.backbone(batch.ids_NT, batch.mask_NT).double()
        found = system._find_directions([batch], [])
    difference_BD = (hidden_ND[:40] - hidden_ND[40:]).numpy()
    mean_D = difference_BD.mean(0) / np.linalg.norm(difference_BD.mean(0))
    rest_BD = difference_BD - np.outer(difference_BD @ mean_D, mean_D)
    _, values, right_DD = np.linalg.svd(rest_BD)
    directions_KD = system.directions_KD.detach().double().numpy()
    assert directions_KD[0] == pytest.approx(mean_D, abs=1e-4)
    for row, wanted in zip(directions_KD[1:], right_DD, strict=False):
        assert abs(row @ wanted) == pytest.approx(1.0, abs=1e-3)
    assert directions_KD @ directions_KD.T == pytest.approx(np.eye(5), abs=1e-5)
    assert found["share_of_principal"] == pytest.approx((values**2 / np.square(difference_BD).sum())[:4], abs=1e-4)


def test_weights_are_the_softmax_of_the_negative_losses_and_heads_come_in_opposite_pairs(run: Path) -> None:
    system: Any = load(run).system
    torch.manual_seed(0)
    score_NK = torch.randn(12, 5)
    score_NH = torch.cat([score_NK, -score_NK], dim=1)
    system.weigh(score_NH)
    losses = []
    for head in score_NH.numpy().astype(float).T:
        margin = (head[:6] - head[6:]) / head.std()
        losses.append(np.log1p(np.exp(-margin)).sum())
    wanted = np.exp(-np.array(losses))
    assert system.weights_H.detach().numpy() == pytest.approx(wanted / wanted.sum(), rel=1e-4)


def test_the_card_names_the_pairs_that_weighed_the_heads(run: Path) -> None:
    directions, weighing = (stage["solved"] for stage in card(run)["stages"])
    assert len(set(weighing["weighed_on"])) == 6
    assert directions["pairs"] > 6


@given(st.integers(1, 30), st.integers(0, 5))
def test_no_pair_and_no_prompt_is_on_both_sides(pairs: Sequence[Preference], num_shots: int, seed: int) -> None:
    shots, rest = draw_shots(pairs, num_shots, seed)
    assert {p.id for p in shots} & {p.id for p in rest} == set()
    assert {p.prompt for p in shots} & {p.prompt for p in rest} == set()
    assert len(shots) + len(rest) == len(pairs)
    assert num_shots <= len(shots) <= num_shots + 1, "two pairs a prompt"
    assert draw_shots(pairs, num_shots, seed) == (shots, rest)


def test_too_many_shots_are_refused(pairs: Sequence[Preference]) -> None:
    with pytest.raises(DataError, match="leave none to evaluate"):
        draw_shots(pairs, 40, 0)


def test_a_pair_that_does_not_fit_is_named_and_not_cut(run: Path, pairs: Sequence[Preference]) -> None:
    scorer = load(run)
    mine = [replace(p, chosen="long " * 200) if p.id == pairs[0].id else p for p in pairs[:20]]
    with pytest.raises(DataError, match=f"leave out {pairs[0].id}"):
        scorer.system.adapt(scorer.encoder, mine, num_shots=18)  # type: ignore[operator]


def test_a_run_adapts_to_a_user_and_back(run: Path, pairs: Sequence[Preference]) -> None:
    """Two users who want opposite things: the same directions, other weights."""
    scorer = load(run)
    system: Any = scorer.system
    directions = system.directions_KD.detach().clone()
    accuracy = {}
    for domain in ("short", "long"):
        mine = [p for p in pairs if p.domain == domain]
        rest = system.adapt(scorer.encoder, mine, num_shots=6)
        assert len(rest) == 14
        rewards = [scorer.score([(p.prompt, p.chosen), (p.prompt, p.rejected)]) for p in rest]
        accuracy[domain] = sum(c.reward > j.reward for c, j in rewards) / len(rest)
    assert accuracy == {"short": 1.0, "long": 1.0}
    assert torch.equal(system.directions_KD, directions)
