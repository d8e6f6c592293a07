"""Fusion: one reward from what several experts say of a text, and how much of it each of them gave.

N conversations, K experts (blocks), D numbers of each expert, W width, M = rows times the experts that read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from moreward.nn.experts import HeadedExperts, Standardize
from moreward.types import Batch


class Fusion(nn.Module):
    """Linear(KD, W) → PReLU → Linear(W, 1) over the K blocks side by side (DMoERM, arXiv 2403.01197, phase 3).

    The PReLU has one parameter. `starts_as_mean` (for D = 1) makes it begin as the mean of the blocks instead of at
    random. `mean_KD` is the mean block of all rows that it was trained on: what `parts` compares with.
    """

    mean_KD: Tensor
    num: Tensor

    def __init__(self, num_blocks: int, size: int, width: int, *, starts_as_mean: bool = False) -> None:
        super().__init__()
        self.reads_rewards = size == 1
        self.first = nn.Linear(num_blocks * size, width)
        self.activation = nn.PReLU()
        self.last = nn.Linear(width, 1)
        self.register_buffer("mean_KD", torch.zeros(num_blocks, size, dtype=torch.float64))
        self.register_buffer("num", torch.zeros((), dtype=torch.long))
        if starts_as_mean:
            self._start_as_mean(num_blocks)

    @torch.no_grad()
    def _start_as_mean(self, num_blocks: int) -> None:
        """Unit w is the w-th block, taken in turn, as it is; a PReLU of slope 1 changes nothing."""
        width = self.first.out_features
        nn.init.zeros_(self.first.weight)
        self.first.weight[torch.arange(width), torch.arange(width) % num_blocks] = 1.0
        nn.init.zeros_(self.first.bias)
        nn.init.ones_(self.activation.weight)
        nn.init.constant_(self.last.weight, 1.0 / width)
        nn.init.zeros_(self.last.bias)

    def forward(self, blocks_NKD: Tensor) -> Tensor:
        """`reward_N`. Always float32: bf16 rewards have too few digits to be subtracted."""
        if self.training:
            self._count(blocks_NKD.detach())
        with torch.autocast(blocks_NKD.device.type, enabled=False):
            hidden_NW = self.activation(self.first(blocks_NKD.float().flatten(1)))
            return cast(Tensor, self.last(hidden_NW)).squeeze(-1)

    @torch.no_grad()
    def _count(self, blocks_NKD: Tensor) -> None:
        self.num += len(blocks_NKD)
        self.mean_KD += (blocks_NKD.double() - self.mean_KD).sum(0) / self.num

    @torch.no_grad()
    def parts(self, blocks_NKD: Tensor) -> Tensor:
        """`part_NK`: what each block adds to the reward beside the reward of the mean blocks, in float64.

        Integrated gradients (arXiv 1703.01365) along the line from the mean blocks to these. On it a unit of the hidden
        layer goes from a to b, and the mean slope of the PReLU is (φ(b) - φ(a)) / (b - a); so the integral has a closed
        form, and Σ_k part_NK = forward(blocks) - forward(mean), but for rounding.
        """
        num_blocks, size = self.mean_KD.shape
        weight_WKD = self.first.weight.double().view(-1, num_blocks, size)
        mean_KD = self.mean_KD.double()
        step_NKW = torch.einsum("nkd,wkd->nkw", blocks_NKD.double() - mean_KD, weight_WKD)
        a_W = mean_KD.flatten() @ self.first.weight.double().T + self.first.bias.double()
        b_NW = a_W + step_NKW.sum(1)
        return torch.einsum("nkw,nw->nk", step_NKW, self._mean_slope(a_W, b_NW) * self.last.weight.double())

    def _mean_slope(self, a_W: Tensor, b_NW: Tensor) -> Tensor:
        """Of the PReLU between a and b: 1 on the share of the way that is above 0, its own slope on the rest."""
        low_NW, high_NW = torch.minimum(a_W, b_NW), torch.maximum(a_W, b_NW)
        way_NW = high_NW - low_NW
        above_NW = (high_NW.clamp(min=0) - low_NW.clamp(min=0)) / way_NW.clamp(min=1e-300)
        above_NW = torch.where(way_NW > 0, above_NW, (a_W > 0).double())
        slope = self.activation.weight.double()
        return above_NW + slope * (1 - above_NW)


class TaskMixtures(nn.Module):
    """The rewards of tasks: `mixtures(batch, task_N)`. A row meets all experts of its task in one call of `members`.

    A task without points is its phase-1 model.
    """

    def __init__(
        self, members: HeadedExperts, points: Mapping[str, Sequence[int]], fusions: Mapping[str, Fusion]
    ) -> None:
        """`points` has the numbers of the members that are points of each task; `fusions` is of tasks with points."""
        super().__init__()
        self.members = members
        self.tasks = list(points)
        self.points = [list(one) for one in points.values()]
        self.fusions = nn.ModuleDict(dict(fusions))
        self.standardize = nn.ModuleDict({name: Standardize() for name in fusions})

    def forward(self, batch: Batch, task_N: Tensor) -> Tensor:
        return self.explained(batch, task_N)[0]

    def explained(self, batch: Batch, task_N: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        """`reward_N`, and for each task with points that occurs: its rows, `blocks_NKD` and `point_reward_NK`."""
        sizes_N = torch.tensor([max(len(p), 1) for p in self.points], device=task_N.device)[task_N]
        row_M = torch.arange(len(task_N), device=task_N.device).repeat_interleave(sizes_N)
        member_M = torch.cat([self._read_by(task) for task in task_N.tolist()]).to(task_N.device)
        hidden_MD = self.members.read(batch.rows(row_M), member_M)
        reward_N = torch.zeros(len(task_N), device=hidden_MD.device)
        told = []
        for task in sorted(set(task_N.tolist())):
            index, mine_M = (task_N == task).nonzero().squeeze(-1), task_N[row_M] == task
            if self.points[task]:
                shape = (len(index), len(self.points[task]))
                blocks_NKD, point_reward_NK = self._blocks(task, hidden_MD[mine_M].view(*shape, -1))
                reward = self.fused(task, blocks_NKD)
                told.append((index, blocks_NKD, point_reward_NK))
            else:
                reward = self.members.judge(hidden_MD[mine_M], member_M[mine_M])
            reward_N = reward_N.index_put((index,), reward.to(reward_N.dtype))
        return reward_N, told

    def fused(self, task: int, blocks_NKD: Tensor) -> Tensor:
        name = self.tasks[task]
        return cast(Tensor, self.standardize[name](self.fusions[name](blocks_NKD)))

    def _read_by(self, task: int) -> Tensor:
        return torch.tensor(self.points[task] or [task])

    def _blocks(self, task: int, hidden_NKD: Tensor) -> tuple[Tensor, Tensor]:
        """What the fusion reads of each point, and the point's own standardised reward."""
        names = [list(self.members.heads)[m] for m in self.points[task]]
        heads = [self.members.head(name) for name in names]
        both = list(zip(names, heads, strict=True))
        states = [head.state(hidden_NKD[:, k]) for k, head in enumerate(heads)]
        rewards = [self.members.standardizer(name)(head(hidden_NKD[:, k])) for k, (name, head) in enumerate(both)]
        reward_NK = torch.stack(rewards, dim=1)
        fusion = cast(Fusion, self.fusions[self.tasks[task]])
        return (reward_NK.unsqueeze(-1) if fusion.reads_rewards else torch.stack(states, dim=1)), reward_NK
