"""Pairs as the vectors that a frozen backbone gives them, and where each pair stands.

B pairs, D numbers of a vector.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moreward.data.batches import Encoder, encode_pairs
from moreward.data.split import linked_groups
from moreward.errors import DataError
from moreward.evals.accuracy import Floats, Ints, numbered
from moreward.nn.backbone import Backbone, load_tokenizer
from moreward.train.runner import feature_store
from moreward.train.track import Reporter
from moreward.types import Preference, text_key

MAX_LENGTH = 512


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """B pairs in numbers: `chosen_BD`, `rejected_BD` and `prompt_BD` are what the backbone says of the texts.

    `domain_B` are places in `names`; `group_B` numbers prompt groups: pairs of one group stand and fall together.
    """

    names: tuple[str, ...]
    domain_B: Ints
    group_B: Ints
    chosen_BD: Floats
    rejected_BD: Floats
    prompt_BD: Floats

    def __len__(self) -> int:
        return len(self.domain_B)

    @property
    def num_domains(self) -> int:
        return len(self.names)


@dataclass(frozen=True, kw_only=True)
class Material:
    """`preferences[i]` is pair i. `too_long` and `not_drawn` count, by domain, pairs that were not taken."""

    preferences: Sequence[Preference]
    pairs: Pairs
    too_long: Mapping[str, int]
    not_drawn: Mapping[str, int]
    backbone: str
    pooling: str


def draw(preferences: Sequence[Preference], max_pairs: int | None, seed: int) -> list[Preference]:
    """Of each domain `max_pairs` by chance, from as many prompt groups as there are, in the order of the rows. What a
    smaller number draws is drawn by a larger one too."""
    if max_pairs is None:
        return list(preferences)
    groups = linked_groups(preferences)
    key_of = [text_key(str(seed), p.prompt, p.chosen, p.rejected) for p in preferences]
    turn: Counter[tuple[str, str]] = Counter()
    ranked: dict[str, list[tuple[int, str, int]]] = {}
    for i in sorted(range(len(preferences)), key=key_of.__getitem__):
        domain = preferences[i].domain
        ranked.setdefault(domain, []).append((turn[domain, groups[i]], key_of[i], i))
        turn[domain, groups[i]] += 1
    taken = {i for rows in ranked.values() for _, _, i in sorted(rows)[:max_pairs]}
    return [p for i, p in enumerate(preferences) if i in taken]


def read_material(
    preferences: Sequence[Preference],
    backbone_name: str,
    *,
    reporter: Reporter,
    max_pairs: int | None = None,
    truncate: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Material:
    """Vectors of the pairs that are drawn and fit, computed once and kept on disk (`nn/features.py`).

    Raises BackboneError for a backbone that cannot be loaded, DataError where nothing of a domain fits its limit or a
    pair came as token ids.
    """
    if given := [p.name for p in preferences if p.token_ids is not None]:
        raise DataError(f"{given[0]}: token ids without a text; {len(given)} such pairs. Give texts.")
    drawn = draw(preferences, max_pairs, seed)
    counted = Counter(p.domain for p in preferences)
    counted.subtract(Counter(p.domain for p in drawn))
    backbone = Backbone.load(backbone_name).to(device)
    backbone.requires_grad_(requires_grad=False)
    limit = min(MAX_LENGTH, backbone.max_positions or MAX_LENGTH)
    names = sorted({p.domain for p in drawn})
    encoder = Encoder(load_tokenizer(backbone_name), limit)
    encoded = encode_pairs(encoder, drawn, names, on_long="truncate" if truncate else "drop")
    kept = [pair.preference for pair in encoded.pairs]
    chosen = [list(pair.chosen.ids) for pair in encoded.pairs]
    rejected = [list(pair.rejected.ids) for pair in encoded.pairs]
    prompts = [list(pair.chosen.prompt_ids) for pair in encoded.pairs]
    store = feature_store(backbone_name, backbone)
    texts = {tuple(text): None for text in (*chosen, *rejected, *prompts)}
    reporter.start("features", len(texts))
    store.compute(backbone, map(list, texts), progress=lambda done, _: reporter.step(done))
    reporter.finish()
    store.save()
    names, domain_B = numbered([p.domain for p in kept])
    _, group_B = numbered(linked_groups(kept))
    chosen_BD, rejected_BD, prompt_BD = (_numbers(store.vectors(side)) for side in (chosen, rejected, prompts))
    pairs = Pairs(
        names=tuple(names),
        domain_B=domain_B,
        group_B=group_B,
        chosen_BD=chosen_BD,
        rejected_BD=rejected_BD,
        prompt_BD=prompt_BD,
    )
    too_long = Counter(p.domain for p in encoded.refused)
    return Material(
        preferences=kept,
        pairs=pairs,
        too_long=dict(sorted(too_long.items())),
        not_drawn={domain: n for domain, n in sorted(counted.items()) if n},
        backbone=backbone_name,
        pooling=backbone.pooling,
    )


def _numbers(hidden_BD: torch.Tensor) -> Floats:
    numbers: Floats = np.asarray(hidden_BD.double().numpy())
    return numbers
