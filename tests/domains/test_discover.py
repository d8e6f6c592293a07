"""Discovery finds what was planted, says how sure it is, and never reads the labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from domains.planted import axis, planted
from moreward.domains.discover import Discovered, check_num_parts, discover, nmi
from moreward.domains.material import Pairs
from moreward.errors import ConfigError


@pytest.fixture(scope="module")
def hidden() -> Pairs:
    """Three domains whose prompts lie apart; their preferences are opposite or crossed."""
    return planted([axis(0), -axis(0), axis(1)], 120, per_group=4)


@pytest.fixture(scope="module")
def found(hidden: Pairs) -> tuple[Discovered, Discovered]:
    return discover(hidden, None, seed=0)


def test_clusters_of_prompts_are_the_planted_ones_and_their_number_is_found(found: tuple[Discovered, ...]) -> None:
    clusters = found[0]
    assert len(clusters.parts) == 3
    assert clusters.agreement > 0.95
    assert clusters.stability > 0.95
    assert sum(part.num_pairs for part in clusters.parts) == 360


def test_latent_groups_are_the_planted_preferences() -> None:
    """The prompts say nothing here: only what is preferred tells the groups."""
    pairs = planted([2 * axis(0), -2 * axis(0)], 240, per_group=6)
    blind = replace(pairs, prompt_BD=np.random.default_rng(0).normal(size=pairs.prompt_BD.shape))
    clusters, latent = discover(blind, 2, seed=0)
    assert latent.agreement > 0.8
    assert clusters.agreement < 0.1


def test_the_labels_are_not_read(hidden: Pairs, found: tuple[Discovered, ...]) -> None:
    blind = discover(replace(hidden, names=("default",), domain_B=np.zeros(360, dtype=np.int64)), 3, seed=0)
    assert np.array_equal(blind[0].part_B, found[0].part_B)
    assert [one.agreement for one in blind] == [None, None]


def test_examples_are_of_their_part_and_of_different_prompts(hidden: Pairs, found: tuple[Discovered, ...]) -> None:
    for one in found:
        for k, part in enumerate(one.parts):
            for places in (part.nearest, part.random):
                assert set(one.part_B[list(places)]) == {k}
                assert len({hidden.group_B[i] for i in places}) == len(places) == 3


def test_mutual_information_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    for size in (2, 3, 7):
        one, other = generator.integers(size, size=(2, 200))
        mixed = np.where(generator.random(200) < 0.5, one, other)
        for a, b in ((one, other), (one, mixed), (one, one)):
            assert nmi(a, b) == pytest.approx(normalized_mutual_info_score(a, b), abs=1e-12)
    assert nmi(np.zeros(5, dtype=int), np.zeros(5, dtype=int)) == 1


@pytest.mark.parametrize("given", ["1", "0", "-3", "many", "2.5"])
def test_a_number_of_domains_that_makes_no_sense_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match=r"--discover.*auto nor a number from 2 on"):
        check_num_parts(given)
    assert (check_num_parts("auto"), check_num_parts("4")) == (None, 4)


def test_more_domains_than_prompts_are_refused() -> None:
    with pytest.raises(ConfigError, match="too few for 5 domains"):
        discover(planted([axis(0)], 8, per_group=2), 5)
