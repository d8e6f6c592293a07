"""Pairs in numbers whose true preferences are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moreward.domains.material import Pairs

SIZE = 12


def planted(
    directions: Sequence[np.ndarray], num_pairs: int, *, noise: float = 0.5, seed: int = 0, per_group: int = 2
) -> Pairs:
    """`num_pairs` of each domain; in domain m chosen is what has more of `directions[m]`, with logistic noise.

    Prompts of domain m lie about a centre of their own.
    """
    generator = np.random.default_rng(seed)
    sides, prompts = [], []
    for m, direction_D in enumerate(directions):
        both_2BD = generator.normal(size=(2, num_pairs, SIZE))
        margin_B = (both_2BD[0] - both_2BD[1]) @ direction_D + noise * generator.logistic(size=num_pairs)
        both_2BD[:, margin_B < 0] = both_2BD[::-1, margin_B < 0]
        sides.append(both_2BD)
        prompts.append(generator.normal(size=(num_pairs, SIZE)) + 6 * np.eye(SIZE)[m])
    chosen_BD, rejected_BD = np.concatenate(sides, 1)
    num_domains = len(directions)
    return Pairs(
        names=tuple("abcdefg"[:num_domains]),
        domain_B=np.repeat(np.arange(num_domains), num_pairs),
        group_B=np.arange(num_domains * num_pairs) // per_group,
        chosen_BD=chosen_BD,
        rejected_BD=rejected_BD,
        prompt_BD=np.concatenate(prompts),
    )


def axis(i: int) -> np.ndarray:
    return 2 * np.eye(SIZE)[i]
