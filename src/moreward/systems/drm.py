"""DRM: directions of preference found in a frozen backbone, weighed by a handful of pairs (arXiv 2502.13131).

N conversations, B pairs, D hidden, K directions, H = 2K heads (each direction and its opposite).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from moreward.data.batches import Encoder, encode_pairs, pair_batch
from moreward.data.split import draw_shots
from moreward.errors import DataError
from moreward.nn.backbone import Backbone
from moreward.nn.experts import Standardize
from moreward.nn.losses import Objective
from moreward.systems._base import Presets, Stage, System, SystemConfig, Tune, prepare_backbone
from moreward.types import Batch, Preference, Rewards


class DRMConfig(SystemConfig):
    tune: Tune = "frozen"
    num_directions: int = Field(20, ge=1, description="principal directions, besides the mean one; at most hidden - 1")
    num_shots: int | None = Field(None, ge=2, description="pairs that weigh the heads; unset: all that it trains on")
    temperature: float = Field(1.0, gt=0, description="of the softmax over the heads' losses")


class Recipe(System):
    """Directions by uncentred principal components of h_chosen - h_rejected, the mean difference before them as a head
    of its own; then heads weighed by softmax(-loss / T) on few pairs. The mean direction is ours: plain PCA would
    subtract just what all preferences have in common."""

    Config = DRMConfig
    paper = "arXiv:2502.13131"
    presets: ClassVar[Presets] = {
        "paper": {"system.num_directions": 20, "system.num_shots": 15, "system.temperature": 1.0},
        "practical": {},
    }
    tunes = ("frozen",)
    config: DRMConfig

    def __init__(self, config: DRMConfig, backbone: Backbone, domains: Sequence[str]) -> None:
        super().__init__(config, backbone, domains)
        prepare_backbone(backbone, config, adapters=())
        size = backbone.hidden_size
        num = min(config.num_directions + 1, size)
        self.backbone = backbone
        # Parameters, though no gradient ever moves them: a stage may set what stands in its `learn`.
        self.directions_KD = nn.Parameter(torch.eye(num, size))
        self.zero_H = nn.Parameter(torch.zeros(2 * num))
        self.unit_H = nn.Parameter(torch.ones(2 * num))
        self.weights_H = nn.Parameter(torch.full((2 * num,), 1 / (2 * num)))
        self.standardize = Standardize()

    def forward(self, batch: Batch) -> Rewards:
        z_NH = (self.heads(batch) - self.zero_H) / self.unit_H
        return Rewards(reward_N=self.standardize(z_NH @ self.weights_H))

    def heads(self, batch: Batch) -> Tensor:
        """`score_NH`: each direction's, then each one's opposite's."""
        hidden_ND = self.backbone(batch.ids_NT, batch.mask_NT)
        score_NK = hidden_ND @ self.directions_KD.mT
        return torch.cat([score_NK, -score_NK], dim=1)

    def stages(self, pairwise: Objective) -> list[Stage]:
        return [
            Stage(
                name="directions",
                module=self,
                learn=(self.directions_KD,),
                objective=pairwise,
                solve=self._find_directions,
            ),
            Stage(
                name="weights",
                module=self,
                learn=(self.zero_H, self.unit_H, self.weights_H),
                objective=pairwise,
                solve=self._weigh,
                standardize=self.standardize,
            ),
        ]

    def _find_directions(self, train: Iterable[Batch], held_out: Iterable[Batch]) -> Mapping[str, Any]:
        difference_BD = torch.cat([_difference(self.backbone(b.ids_NT, b.mask_NT)) for b in train]).double()
        mean_1D = F.normalize(difference_BD.mean(0, keepdim=True))
        rest_BD = difference_BD - difference_BD @ mean_1D.mT @ mean_1D
        energy_D, vectors_DD = torch.linalg.eigh(rest_BD.mT @ rest_BD)  # ascending; the pairs may be many
        num = len(self.directions_KD)
        self.directions_KD.copy_(torch.cat([mean_1D, vectors_DD.mT.flip(0)])[:num])
        shares = energy_D.flip(0)[: num - 1] / difference_BD.square().sum()
        return {"pairs": len(difference_BD), "share_of_principal": shares.clamp(min=0).tolist()}

    def _weigh(self, train: Iterable[Batch], held_out: Iterable[Batch]) -> Mapping[str, Any]:
        batches = list(train)
        names = [name for batch in batches for name in batch.names]
        num = min(self.config.num_shots or len(names), len(names))
        rows = [i * len(names) // num for i in range(num)]
        score_NH = self._scores(batches)
        self.weigh(score_NH[[*rows, *(row + len(names) for row in rows)]])
        return {"pairs": num, "weighed_on": [names[row] for row in rows] if self.config.num_shots else "all"}

    @torch.no_grad()
    def weigh(self, score_NH: Tensor) -> None:
        """Set the heads' weights by their scores of a few pairs, chosen ones first: w = softmax(-loss / T), a head's
        loss being Σ -log σ of its margins in the unit of its own scores here."""
        score_NH = score_NH.double()
        unit_H = score_NH.std(0, correction=0).clamp(min=1e-6)
        chosen_BH, rejected_BH = score_NH.chunk(2)
        loss_H = -F.logsigmoid((chosen_BH - rejected_BH) / unit_H).sum(0)
        self.zero_H.copy_(score_NH.mean(0))
        self.unit_H.copy_(unit_H)
        self.weights_H.copy_((-loss_H / self.config.temperature).softmax(0))

    @torch.no_grad()
    def _scores(self, batches: Iterable[Batch]) -> Tensor:
        """`score_NH` of all pairs, all chosen ones first."""
        sides = [self.heads(batch).chunk(2) for batch in batches]
        return torch.cat([chosen_BH for chosen_BH, _ in sides] + [rejected_BH for _, rejected_BH in sides])

    @torch.no_grad()
    def adapt(
        self, encoder: Encoder, preferences: Sequence[Preference], *, num_shots: int = 15, seed: int = 0
    ) -> list[Preference]:
        """Weigh the heads anew by about `num_shots` of these pairs, drawn by prompt; the directions stay. Returns the
        other pairs, which have no prompt in common with those: evaluate on them. Raises DataError where none is left,
        or where a drawn pair does not fit into the limit.
        """
        shots, rest = draw_shots(preferences, num_shots, seed)
        encoded = encode_pairs(encoder, shots, self.domains, on_long="drop")
        if encoded.refused:
            names = ", ".join(p.name for p in encoded.refused)
            raise DataError(f"pairs to adapt on must fit into {encoder.max_length} tokens: leave out {names}")
        batch = pair_batch(encoded.pairs, encoder.pad_id).to(self.zero_H.device)
        self.eval().weigh(self._scores([batch]))
        self.standardize.reset()
        self.standardize.fit(self(batch).reward_N)
        return rest


def _difference(hidden_ND: Tensor) -> Tensor:
    chosen_BD, rejected_BD = hidden_ND.chunk(2)
    return chosen_BD - rejected_BD
