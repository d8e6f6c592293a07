"""A gate that weighs objectives by the prompt (ArmoRM, arXiv 2406.12845, section 2.3).

N conversations, P prompts, T tokens, D hidden, K objectives.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from moreward.nn.backbone import Backbone
from moreward.types import Batch


class ObjectiveGate(nn.Module):
    """Linear → ReLU → dropout, several times, then Linear(width, K) and a softmax over the objectives.

    The weights are softmax(logits / temperature) and sum to 1; `scale`, which is learnt, multiplies all of them.
    """

    def __init__(
        self, size: int, num_objectives: int, *, width: int, num_layers: int, temperature: float, dropout: float
    ) -> None:
        super().__init__()
        sizes = [size, *([width] * num_layers)]
        hidden = [[nn.Linear(a, b), nn.ReLU(), nn.Dropout(dropout)] for a, b in pairwise(sizes)]
        self.layers = nn.Sequential(*(part for layer in hidden for part in layer), nn.Linear(sizes[-1], num_objectives))
        self.temperature = temperature
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        """`logits_NK`, already divided by the temperature, and `weights_NK`; N may be several dimensions."""
        with torch.autocast(hidden_ND.device.type, enabled=False):
            logits_NK = self.layers(hidden_ND.float()) / self.temperature
            return logits_NK, logits_NK.softmax(-1)  # over objectives, whatever stands before that dimension


def read_with_prompts(backbone: Backbone, batch: Batch) -> tuple[Tensor, Tensor]:
    """`hidden_ND` of the conversations and `prompt_PD` of their prompts alone, in one pass.

    A causal backbone that shares prefixes reads a prompt once for both: its last state is the one that the
    conversations go on from.
    """
    longest = max(batch.ids_NT.shape[1], batch.prompt_ids_PT.shape[1])
    ids = torch.cat([_widened(batch.ids_NT, longest), _widened(batch.prompt_ids_PT, longest)])
    mask = torch.cat([_widened(batch.mask_NT, longest), _widened(batch.prompt_mask_PT, longest)])
    hidden_ND, prompt_PD = backbone(ids, mask).split([len(batch), len(batch.prompt_ids_PT)])
    return hidden_ND, prompt_PD


def _widened(rows_NT: Tensor, longest: int) -> Tensor:
    return nn.functional.pad(rows_NT, (0, longest - rows_NT.shape[1]))
