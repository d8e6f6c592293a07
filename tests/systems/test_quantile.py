"""Quantile heads: rising, mixed over objectives and not over quantiles, learnt as quantiles, read as told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moreward.config import resolve
from moreward.nn.backbone import Backbone
from moreward.registry import find_recipe
from moreward.types import Batch

Tiny = Callable[[str], Path]
DOMAINS = ("a", "b", "c")


@pytest.fixture
def system(tiny_backbone: Tiny) -> Any:
    return built(tiny_backbone, num_quantiles=5)


def built(tiny_backbone: Tiny, **settings: Any) -> Any:
    config = resolve({"recipe": "quantile", "tune": "frozen", "system": settings})
    recipe = find_recipe("quantile")
    torch.manual_seed(0)
    backbone = Backbone.load(str(tiny_backbone("bert")), pooling="mean")
    return recipe(recipe.Config.model_validate(config.system), backbone, DOMAINS).eval()


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(1)
    ids_NT, prompt_PT = torch.randint(5, 200, (4, 9)), torch.randint(5, 200, (2, 4))
    return Batch(
        ids_NT=ids_NT,
        mask_NT=torch.ones_like(ids_NT),
        prompt_ids_PT=prompt_PT,
        prompt_mask_PT=torch.ones_like(prompt_PT),
        prompt_of_N=torch.tensor([0, 1, 0, 1]),
        domain_N=torch.tensor([0, 2, 0, 2]),
        is_pairs=True,
    )


@pytest.mark.parametrize("num", [2, 3, 19])
def test_the_reward_is_the_gated_mean_of_quantiles_whatever_their_number(
    num: int, tiny_backbone: Tiny, batch: Batch
) -> None:
    system = built(tiny_backbone, num_quantiles=num)
    with torch.no_grad():
        gate_NK, quantile_NKQ = system.gated(batch), system.each_objective(batch)
        assert quantile_NKQ.shape == (4, 3, num)
        wanted = [sum(float(gate_NK[n, k] * quantile_NKQ[n, k].mean()) for k in range(3)) for n in range(4)]
        found = system(batch)
    assert found.reward_N.tolist() == pytest.approx(wanted, abs=1e-5)
    assert (quantile_NKQ.diff(dim=-1) > 0).all(), "quantiles rise"
    mixed_N = (found.routing.weights_NK * found.expert_reward_NK).sum(1)
    torch.testing.assert_close(mixed_N, found.reward_N)


def test_the_distribution_has_the_reward_as_its_mean_and_its_unit(system: Any, batch: Batch) -> None:
    system.standardize.mean.fill_(2.0)
    system.standardize.std.fill_(4.0)
    with torch.no_grad():
        torch.testing.assert_close(system.distribution(batch).mean(1), system(batch).reward_N)


def test_cautious_readouts_are_the_low_quantile_and_the_mean_up_to_it(tiny_backbone: Tiny, batch: Batch) -> None:
    settings = {"num_quantiles": 9, "level": 0.3, "head": "linear"}  # levels .1 to .9: the third
    rewards = {}
    for readout in ("mean", "lower", "cvar"):
        system = built(tiny_backbone, readout=readout, **settings)
        with torch.no_grad():
            rewards[readout], of_all = system(batch).reward_N, system.distribution(batch)
            in_training = system.train()(batch).reward_N
        torch.testing.assert_close(in_training, of_all.mean(1), msg="training reads the mean")
    torch.testing.assert_close(rewards["lower"], of_all[:, 2])
    torch.testing.assert_close(rewards["cvar"], of_all[:, :3].mean(1))
    assert (rewards["cvar"] < rewards["lower"]).all()
    assert (rewards["lower"] < rewards["mean"]).all()


def test_the_regression_finds_the_quantiles_of_its_targets(tiny_backbone: Tiny) -> None:
    """Minimise the loss over free quantiles for one text that is chosen by many margins: they must be the margins'
    own quantiles, which a wrong sign of the pinball loss would turn round."""
    system = built(tiny_backbone, num_quantiles=3)
    half = torch.linspace(1, 2, 101)
    num = 2 * len(half)
    zeros = torch.zeros(num, dtype=torch.long)
    ids = torch.ones(num, 1, dtype=torch.long)
    batch = Batch(
        ids_NT=ids,
        mask_NT=ids,
        prompt_ids_PT=ids,
        prompt_mask_PT=ids,
        prompt_of_N=zeros,
        domain_N=zeros,
        margin_B=2 * half,
        is_pairs=True,
    )
    free_2Q = nn.Parameter(torch.zeros(2, 3))  # chosen, rejected
    optimizer = torch.optim.Adam([free_2Q], lr=0.02)
    for _ in range(500):
        quantile_NKQ = free_2Q.repeat_interleave(len(half), 0)[:, None, :].expand(-1, 3, -1)
        loss = system._regression(quantile_NKQ, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert free_2Q[0].tolist() == pytest.approx([1.25, 1.5, 1.75], abs=0.03)
    assert free_2Q[1].tolist() == pytest.approx([-1.75, -1.5, -1.25], abs=0.03)


def test_a_pair_regresses_its_own_domain_and_one_of_no_known_domain_nothing(system: Any, batch: Batch) -> None:
    quantile_NKQ = torch.zeros(4, 3, 5, requires_grad=True)
    system._regression(quantile_NKQ, batch).backward()
    touched = quantile_NKQ.grad.abs().sum(-1) > 0
    assert touched.tolist() == [[True, False, False], [False, False, True]] * 2
    unknown = replace(batch, domain_N=torch.full((4,), -1))
    assert system._regression(torch.randn(4, 3, 5), unknown).item() == 0.0


def test_in_training_too_a_row_does_not_depend_on_its_batch_mates(system: Any, batch: Batch) -> None:
    """LayerNorm in the gate: BatchNorm would look at the others. Dropout of the body is left out of this."""
    system.train()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in system.modules())
    with torch.no_grad():
        together = system.gated(batch)
        alone = torch.cat([system.gated(batch.rows(torch.tensor([n]))) for n in range(4)])
    torch.testing.assert_close(together, alone)


def test_the_gate_reads_the_prompt_only(system: Any, batch: Batch) -> None:
    with torch.no_grad():
        other = replace(batch, ids_NT=batch.ids_NT.flip(0))
        assert torch.equal(system.gated(batch), system.gated(other))
        assert not torch.equal(system.gated(batch)[0], system.gated(batch)[1])
