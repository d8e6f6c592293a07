"""Domains that nobody named: clusters of prompts, and groups of prompts whose preferences agree.

Clusters are k-means on the unit vectors of distinct prompts. Latent groups are a mixture of K linear Bradley–Terry
probes with a softmax router that reads the prompt (after MiCRo, arXiv 2505.24846), fitted by expectation and
maximisation; all pairs of a prompt group share their latent group. Neither sees the data's own labels.

B pairs, P distinct prompts, G prompt groups, D numbers of a vector, K clusters or groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moreward.domains.material import Pairs
from moreward.domains.probes import fit, inputs
from moreward.errors import ConfigError
from moreward.evals.accuracy import Floats, Ints

NUM_SEEDS = 3
MOST_CLUSTERS = 10
NUM_SHOWN = 3
NUM_ROUNDS = 25
LATENT_DIRECTIONS = 32
_PENALTY = 1e-2
_ROUTER_PENALTY = 1e-3
Division = tuple[Ints, Floats, float]
"""`label_B`, `closeness_B` (larger is nearer to the centre), and how good the division is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One cluster or group. `nearest` and `random` are places of pairs to look at; `labels` counts the data's own."""

    name: str
    num_pairs: int
    nearest: tuple[int, ...]
    random: tuple[int, ...]
    labels: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Discovered:
    """`part_B` is each pair's place in `parts`. `stability` is the mean normalised mutual information (NMI) of two
    seeds; `agreement` that with the data's own labels, None where it has fewer than two."""

    kind: str
    parts: tuple[Part, ...]
    part_B: Ints
    stability: float
    agreement: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"part_B": self.part_B.tolist()}


def check_num_parts(given: str) -> int | None:
    """K of `--discover`, None for `auto`. ConfigError for anything else."""
    if given == "auto":
        return None
    if given.isdigit() and int(given) >= 2:
        return int(given)
    raise ConfigError(f"--discover: {given!r} is neither auto nor a number from 2 on")


def discover(pairs: Pairs, num_parts: int | None, *, seed: int = 0) -> tuple[Discovered, Discovered]:
    """Clusters of prompts, and as many latent preference groups. `num_parts` None: the number of clusters from 2 to
    10 that lie farthest apart for their size (simplified silhouette).

    ConfigError where there are fewer prompts, or prompt groups, than parts.
    """
    unit_BD = pairs.prompt_BD / np.maximum(np.linalg.norm(pairs.prompt_BD, axis=1, keepdims=True), 1e-12)
    unit_PD, prompt_B = np.unique(unit_BD, axis=0, return_inverse=True)
    prompt_B = prompt_B.reshape(-1)
    num_groups = len(np.unique(pairs.group_B))
    if min(len(unit_PD), num_groups) <= (num_parts or 2):
        raise ConfigError(
            f"--discover: {len(unit_PD)} distinct prompts in {num_groups} prompt groups are too few for "
            f"{num_parts or 2} domains; give more pairs or ask for fewer"
        )
    if num_parts is None:
        most = min(MOST_CLUSTERS, len(unit_PD) - 1)
        num_parts = max(range(2, most + 1), key=lambda k: silhouette(unit_PD, clusters(unit_PD, k, seed=seed)))

    def by_prompt(s: int) -> Division:
        centre_KD = clusters(unit_PD, num_parts, seed=s)
        distance_PK = _distances(unit_PD, centre_KD)
        label_P, nearest_P = distance_PK.argmin(1), distance_PK.min(1)
        return label_P[prompt_B], -nearest_P[prompt_B], -float(np.square(nearest_P).sum())

    x_BK = inputs(pairs, seed=seed, num_directions=LATENT_DIRECTIONS).linear_BK.astype(np.float64)
    by_preference = lambda s: latent_groups(x_BK, unit_BD, pairs.group_B, num_parts, seed=s)  # noqa: E731
    return (
        _described("cluster", by_prompt, pairs, num_parts, seed),
        _described("group", by_preference, pairs, num_parts, seed),
    )


def clusters(x_PD: Floats, num_parts: int, *, seed: int) -> Floats:
    """`centre_KD` of k-means from k-means++ starts, the best of three."""
    best: tuple[float, Floats] | None = None
    for start in range(3):
        centre_KD = _starts(x_PD, num_parts, np.random.default_rng([seed, 4, start]))
        for _ in range(100):
            label_P = _distances(x_PD, centre_KD).argmin(1)
            moved_KD = np.stack(
                [x_PD[label_P == k].mean(0) if (label_P == k).any() else centre_KD[k] for k in range(num_parts)]
            )
            if np.allclose(moved_KD, centre_KD):
                break
            centre_KD = moved_KD
        spread = float(np.square(_distances(x_PD, centre_KD).min(1)).sum())
        if best is None or spread < best[0]:
            best = spread, centre_KD
    assert best is not None
    return best[1]


def _starts(x_PD: Floats, num_parts: int, generator: np.random.Generator) -> Floats:
    centres = [x_PD[generator.integers(len(x_PD))]]
    while len(centres) < num_parts:
        square_P = np.square(_distances(x_PD, np.stack(centres)).min(1)) + 1e-12
        centres.append(x_PD[generator.choice(len(x_PD), p=square_P / square_P.sum())])
    return np.stack(centres)


def _distances(x_PD: Floats, centre_KD: Floats) -> Floats:
    square_PK = np.square(x_PD).sum(1)[:, None] - 2 * x_PD @ centre_KD.T + np.square(centre_KD).sum(1)
    distance_PK: Floats = np.sqrt(np.maximum(square_PK, 0))
    return distance_PK


def silhouette(x_PD: Floats, centre_KD: Floats) -> float:
    """Mean of (b - a) / b, a and b the distances to the nearest and to the next centre (Vendramin et al. 2010)."""
    two_P2 = np.sort(_distances(x_PD, centre_KD), axis=1)[:, :2]
    return float(((two_P2[:, 1] - two_P2[:, 0]) / np.maximum(two_P2[:, 1], 1e-12)).mean())


def latent_groups(x_BK: Floats, prompt_BD: Floats, group_B: Ints, num_parts: int, *, seed: int) -> Division:
    """EM from responsibilities drawn by chance; the best of three starts by likelihood. Returns each pair's group, its
    responsibility, and the mean log likelihood of a prompt group."""
    _, first_G, place_B = np.unique(group_B, return_index=True, return_inverse=True)
    place_B = place_B.reshape(-1)
    prompt_GD = np.stack([np.ones(len(first_G)), *prompt_BD[first_G].T], 1)
    best: tuple[float, Floats] | None = None
    for start in range(3):
        generator = np.random.default_rng([seed, 5, start])
        share_GK = generator.dirichlet(np.full(num_parts, 0.3), size=len(first_G))
        weight_KK = np.zeros((num_parts, x_BK.shape[1]))
        router_DK = np.zeros((prompt_GD.shape[1], num_parts))
        likelihood = -np.inf
        for _ in range(NUM_ROUNDS):
            for k in range(num_parts):
                weight_KK[k] = _weighted_fit(x_BK, share_GK[place_B, k], weight_KK[k])
            router_DK = _fit_router(prompt_GD, share_GK, router_DK)
            joint_GK = _log_softmax(prompt_GD @ router_DK)
            np.add.at(joint_GK, place_B, -np.logaddexp(0, -(x_BK @ weight_KK.T)))
            before, likelihood = likelihood, float(np.logaddexp.reduce(joint_GK, axis=1).mean())
            share_GK = np.exp(_log_softmax(joint_GK))
            if likelihood - before < 1e-5:
                break
        if best is None or likelihood > best[0]:
            best = likelihood, share_GK
    assert best is not None
    share_BK = best[1][place_B]
    return share_BK.argmax(1), share_BK.max(1), best[0]


def _weighted_fit(x_BK: Floats, share_B: Floats, start_K: Floats) -> Floats:
    """A probe of pairs of which each counts by its responsibility."""
    return fit(x_BK, _PENALTY, start_K, share_B=share_B)


def _fit_router(prompt_GD: Floats, share_GK: Floats, start_DK: Floats) -> Floats:
    """Softmax regression of responsibilities on prompts."""
    from scipy.optimize import minimize

    def loss_and_slope(flat: Floats) -> tuple[float, Floats]:
        router_DK = flat.reshape(start_DK.shape)
        log_GK = _log_softmax(prompt_GD @ router_DK)
        loss = -float((share_GK * log_GK).sum(1).mean()) + _ROUTER_PENALTY / 2 * float(flat @ flat)
        slope_DK = prompt_GD.T @ (np.exp(log_GK) - share_GK) / len(prompt_GD) + _ROUTER_PENALTY * router_DK
        return loss, slope_DK.reshape(-1)

    found = minimize(loss_and_slope, start_DK.reshape(-1), jac=True, method="L-BFGS-B", options={"maxiter": 30})
    router_DK: Floats = found.x.reshape(start_DK.shape)
    return router_DK


def _log_softmax(logit_GK: Floats) -> Floats:
    log_GK: Floats = logit_GK - np.logaddexp.reduce(logit_GK, axis=1)[:, None]
    return log_GK


def nmi(one_B: Ints, other_B: Ints) -> float:
    """Mutual information of two divisions over the mean of their entropies: 1 for the same division, near 0 for
    unrelated ones; 1 where both are of one part."""
    table = np.zeros((int(one_B.max()) + 1, int(other_B.max()) + 1))
    np.add.at(table, (one_B, other_B), 1 / len(one_B))
    row, column = table.sum(1), table.sum(0)
    seen = table > 0
    mutual = float((table[seen] * np.log(table[seen] / np.outer(row, column)[seen])).sum())
    entropies = [-float((p[p > 0] * np.log(p[p > 0])).sum()) for p in (row, column)]
    return 1.0 if not sum(entropies) else max(0.0, mutual / (sum(entropies) / 2))


def _described(kind: str, divide: Callable[[int], Division], pairs: Pairs, num_parts: int, seed: int) -> Discovered:
    """The best of several seeds, the largest part first, and how alike the seeds are."""
    found = [divide(seed + s) for s in range(NUM_SEEDS)]
    label_B, closeness_B, _ = max(found, key=lambda one: one[2])
    order = np.argsort(-np.bincount(label_B, minlength=num_parts), kind="stable")
    part_B = np.argsort(order)[label_B]
    alike = [nmi(a[0], b[0]) for i, a in enumerate(found) for b in found[i + 1 :]]
    generator = np.random.default_rng([seed, 6])
    parts = [_part(f"{kind}-{k}", np.flatnonzero(part_B == k), closeness_B, pairs, generator) for k in range(num_parts)]
    return Discovered(
        kind=kind,
        parts=tuple(part for part in parts if part.num_pairs),
        part_B=part_B,
        stability=float(np.mean(alike)),
        agreement=nmi(part_B, pairs.domain_B) if pairs.num_domains > 1 else None,
    )


def _part(name: str, here: Ints, closeness_B: Floats, pairs: Pairs, generator: np.random.Generator) -> Part:
    nearest = _of_distinct_groups(here[np.argsort(-closeness_B[here], kind="stable")], pairs.group_B)
    random = _of_distinct_groups(generator.permutation(here), pairs.group_B)
    counts = np.bincount(pairs.domain_B[here], minlength=pairs.num_domains)
    labels = {pairs.names[m]: int(counts[m]) for m in np.argsort(-counts, kind="stable") if counts[m]}
    return Part(name=name, num_pairs=len(here), nearest=nearest, random=random, labels=labels)


def _of_distinct_groups(order: Sequence[int] | Ints, group_B: Ints) -> tuple[int, ...]:
    taken: dict[int, int] = {}
    for i in order:
        taken.setdefault(int(group_B[i]), int(i))
        if len(taken) == NUM_SHOWN:
            break
    return tuple(taken.values())
