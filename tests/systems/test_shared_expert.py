"""A shared expert and own experts that are added: the sum is that of its parts, and no part disturbs another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from moreward.data.batches import Encoder, conversation_batch, encode_pairs, pair_batch
from moreward.growth.change import extend
from moreward.nn.backbone import Backbone, load_tokenizer
from moreward.nn.losses import PairwiseLoss
from moreward.scoring import load
from moreward.systems import baseline
from moreward.systems._base import Stage, SystemConfig
from moreward.systems.shared_expert import (
    RIDGES,
    SHARED,
    SHARES,
    Differences,
    Recipe,
    Residuals,
    SharedExpertConfig,
    best_shares,
    fit_ridge,
    parts_of,
    solve_own,
)
from moreward.types import Batch, Conversation, Preference, Rewards
from trained import card, trained, weights, write_pairs

DOMAINS = ("long", "short")
Tiny = Callable[[str], Path]


def system_of(folder: Path, *, untrained: bool = False, **settings: Any) -> Recipe:
    """With own experts that say something, unless `untrained`."""
    torch.manual_seed(0)
    config = SharedExpertConfig(rank=4, dropout=0.0, **settings)
    system = Recipe(config, Backbone.load(str(folder), pooling="mean"), DOMAINS)
    parts = system.routed.experts.parts
    for name in (*system.expert_names, SHARED):
        if parts.backbone.bank is not None:
            for matrix in parts.backbone.bank.adapters[name].B.values():
                torch.nn.init.normal_(matrix, std=0.05)
        if name == SHARED or not untrained:
            torch.nn.init.normal_(parts.head(name).last.weight, std=0.5)
    torch.nn.init.normal_(system.routed.router.router.gate.weight, std=2.0)
    return system.eval()


def batch_of(folder: Path, some: Sequence[Preference]) -> Batch:
    encoder = Encoder(load_tokenizer(str(folder)), 96)
    return pair_batch(encode_pairs(encoder, some, DOMAINS, on_long="truncate").pairs, encoder.pad_id)


@pytest.fixture(scope="module")
def few(pairs: Sequence[Preference]) -> list[Preference]:
    """Seven of the one domain and four of the other."""
    return [*[p for p in pairs if p.domain == "long"][:7], *[p for p in pairs if p.domain == "short"][:4]]


@torch.no_grad()
@pytest.mark.parametrize("tune", ["lora", "frozen"])
def test_the_reward_is_the_shared_one_and_the_gated_own_ones_each_computed_alone(
    tune: str, tiny_backbone: Tiny, few: list[Preference]
) -> None:
    system, batch = system_of(tiny_backbone("bert"), tune=tune), batch_of(tiny_backbone("bert"), few)
    experts = system.routed.experts
    experts.share_E.copy_(torch.tensor([0.25, 0.75]))
    routing = system.route(batch)
    gate_NE = routing.logits_NE.softmax(1)
    alone = [experts.parts(batch, torch.full((len(batch),), part)) for part in range(3)]
    expected_N = alone[2] + 0.25 * gate_NE[:, 0] * alone[0] + 0.75 * gate_NE[:, 1] * alone[1]
    torch.testing.assert_close(system(batch).reward_N, expected_N, rtol=1e-5, atol=1e-5)
    judged_NE = system.judge(batch, torch.tensor([[0, 1]]).expand(len(batch), -1))
    torch.testing.assert_close((judged_NE * gate_NE).sum(1), expected_N, rtol=1e-5, atol=1e-5)
    assert float(gate_NE.min()) > 0
    assert not torch.allclose(expected_N, alone[2])


@torch.no_grad()
@pytest.mark.parametrize("tune", ["lora", "frozen"])
def test_at_share_0_the_reward_is_the_shared_one_exactly(tune: str, tiny_backbone: Tiny, few: list[Preference]) -> None:
    system, batch = system_of(tiny_backbone("bert"), tune=tune, top_k=1), batch_of(tiny_backbone("bert"), few)
    shared_N = system.routed.experts(batch, torch.full((len(batch),), -1))
    assert not torch.equal(system(batch).reward_N, shared_N)
    system.routed.experts.share_E.zero_()
    assert torch.equal(system(batch).reward_N, shared_N)


@torch.no_grad()
def test_own_experts_that_have_learned_nothing_leave_the_baseline(tiny_backbone: Tiny, few: list[Preference]) -> None:
    folder = tiny_backbone("bert")
    system, batch = system_of(folder, tune="frozen", untrained=True, top_k=1), batch_of(folder, few)
    torch.manual_seed(0)
    single = baseline.Recipe(SystemConfig(tune="frozen"), Backbone.load(str(folder), pooling="mean"), DOMAINS)
    single.expert.head.load_state_dict(system.routed.experts.parts.head(SHARED).state_dict())
    assert torch.equal(system(batch).reward_N, single.eval()(batch).reward_N)


def gradients(stage: Stage, batch: Batch, weight_B: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Of the mean loss over the pairs, those of weight 0 not counted."""
    outcome = stage.objective(stage.module(batch), batch)
    weight_B = torch.ones(len(outcome.loss_B)) if weight_B is None else weight_B
    return list(torch.autograd.grad((outcome.loss_B * weight_B).sum() / weight_B.sum(), stage.learn))


@pytest.mark.parametrize("kind", ["bert", "deberta-v2", "gpt2"])
def test_one_pass_over_a_mixed_batch_gives_each_own_expert_the_gradient_of_its_own_pairs(
    kind: str, tiny_backbone: Tiny, few: list[Preference]
) -> None:
    system = system_of(tiny_backbone(kind))
    own = next(stage for stage in system.stages(PairwiseLoss()) if stage.name == "own")
    batch = batch_of(tiny_backbone(kind), few)
    batch = replace(batch, expert_N=batch.domain_N)  # as the loop gives it
    domain_B = batch.domain_N[: len(few)]
    for index, domain in enumerate(DOMAINS):
        weight_B = (domain_B == index).float()
        together = dict(zip(map(id, own.learn), gradients(own, batch, weight_B), strict=True))
        stage = system.expert_stage(domain, PairwiseLoss())
        assert stage.solve is None
        alone = gradients(stage, batch_of(tiny_backbone(kind), [p for p in few if p.domain == domain]))
        largest = max(float(g.abs().max()) for g in alone)
        assert largest > 0
        assert {id(p) for p in own.experts[index]} == {id(p) for p in stage.learn}
        for parameter, expected in zip(stage.learn, alone, strict=True):
            assert float((together[id(parameter)] - expected).abs().max()) <= 5e-5 * largest
        others = [together[id(p)] for p in own.experts[1 - index]]
        assert not any(bool(g.any()) for g in others), "no gradient from the pairs of another domain"


@torch.no_grad()
def test_the_gate_sees_the_prompt_and_nothing_of_the_response(tiny_backbone: Tiny) -> None:
    encoder, system = Encoder(load_tokenizer(str(tiny_backbone("bert"))), 96), system_of(tiny_backbone("bert"))

    def logits(prompt: str, response: str) -> torch.Tensor:
        encoded = encoder.conversation(Conversation(prompt=prompt, response=response))
        return system(conversation_batch([encoded], [-1], encoder.pad_id)).routing.logits_NE  # type: ignore[union-attr]

    first = logits("What is the sea?", "It is calm.")
    assert torch.equal(first, logits("What is the sea?", "A longer answer that takes its time."))
    assert not torch.equal(first, logits("How do I write a function?", "It is calm."))


# ---- shares


def made_up(seed: int, *, num: int = 60) -> Differences:
    """Own expert 0 is right about its domain, own expert 1 says the opposite of what is right."""
    generator = torch.Generator().manual_seed(seed)
    domain_B = torch.arange(num) % 2
    own_BE = torch.randn(num, 2, generator=generator) * 0.3
    own_BE[domain_B == 0, 0] += 0.4
    own_BE[domain_B == 1, 1] -= 1.0
    return Differences(shared_B=torch.randn(num, generator=generator), own_BE=own_BE, domain_B=domain_B)


@pytest.mark.parametrize("seed", range(3))
def test_shares_are_those_of_the_least_held_out_loss(seed: int) -> None:
    parts = made_up(seed)
    found_E = best_shares(parts, torch.ones(2), [0, 1])
    least = min(parts.loss(torch.tensor(shares)) for shares in product(SHARES.tolist(), repeat=2))
    assert parts.loss(found_E) == pytest.approx(least, abs=1e-4)
    assert float(found_E[0]) > 0.5
    assert float(found_E[1]) == 0


def test_a_domain_weighs_the_same_however_many_held_out_pairs_it_has() -> None:
    parts = made_up(0)
    rows = torch.cat([torch.arange(60), *[(parts.domain_B == 0).nonzero().flatten()] * 5])
    more = Differences(parts.shared_B[rows], parts.own_BE[rows], parts.domain_B[rows])
    share_E = torch.tensor([0.3, 0.6])
    assert more.loss(share_E) == pytest.approx(parts.loss(share_E), rel=1e-5)


def test_only_the_named_shares_move_and_only_where_pairs_are_held_out() -> None:
    parts = made_up(1)
    start_E = torch.tensor([0.9, 0.9])
    assert best_shares(parts, start_E, [1]).tolist() == pytest.approx([0.9, 0.0])
    only = Differences(*(t[parts.domain_B == 0] for t in (parts.shared_B, parts.own_BE, parts.domain_B)))
    assert float(best_shares(only, start_E, [0, 1])[1]) == pytest.approx(0.9)
    assert start_E.tolist() == pytest.approx([0.9, 0.9]), "what was given stays as it was"


@torch.no_grad()
def test_what_the_shares_are_chosen_by_is_the_reward_difference(tiny_backbone: Tiny, few: list[Preference]) -> None:
    system, batch = system_of(tiny_backbone("bert")), batch_of(tiny_backbone("bert"), few)
    system.routed.experts.share_E.copy_(torch.tensor([0.3, 0.8]))
    parts, output = parts_of(system, batch), system(batch)
    delta_B = parts.shared_B + parts.own_BE @ system.routed.experts.share_E
    torch.testing.assert_close(delta_B, output.chosen_B - output.rejected_B, rtol=1e-5, atol=1e-5)


# ---- solved own experts


def residuals_of(seed: int, num: int, *, signal: float) -> Residuals:
    generator = torch.Generator().manual_seed(seed)
    x_BD = torch.randn(num, 20, generator=generator)
    x_BD[:, 0] += signal
    return Residuals(x_BD, torch.randn(num, generator=generator), torch.ones(num))


@pytest.mark.parametrize("ridge", [1e-3, 1e-1])
def test_the_ridge_solution_is_that_of_scipy(ridge: float) -> None:
    pairs = residuals_of(0, 200, signal=0.5)
    x_BD, given_B = pairs.x_BD.double().numpy(), pairs.given_B.double().numpy()

    def objective(w: np.ndarray) -> float:
        return float(np.logaddexp(0, -(given_B + x_BD @ w)).mean() + ridge * w @ w)

    wanted = minimize(objective, np.zeros(20), method="BFGS").x
    np.testing.assert_allclose(fit_ridge(pairs, ridge).numpy(), wanted, atol=2e-3)


def test_a_pair_of_weight_0_is_not_learned_from() -> None:
    pairs = residuals_of(0, 60, signal=0.5)
    pairs.weight_B[30:] = 0
    half = Residuals(*(t[:30] for t in (pairs.x_BD, pairs.given_B, pairs.weight_B)))
    # The mean is over all pairs, so half of them weigh half against the ridge.
    torch.testing.assert_close(fit_ridge(pairs, 0.1), fit_ridge(half, 0.2), rtol=1e-2, atol=1e-3)


@torch.no_grad()
def test_what_is_solved_sees_the_shared_expert(tiny_backbone: Tiny, few: list[Preference]) -> None:
    system = system_of(tiny_backbone("bert"), tune="frozen")
    experts = system.routed.experts
    mine = batch_of(tiny_backbone("bert"), [p for p in few if p.domain == "long"])
    before_B = Rewards(reward_N=experts(mine, torch.full((len(mine),), -1)))
    solve_own(experts, 0, [mine], [])
    after = Rewards(reward_N=experts(mine, mine.domain_N))
    loss = [-torch.nn.functional.logsigmoid(r.chosen_B - r.rejected_B).mean() for r in (before_B, after)]
    assert loss[1] < loss[0]


@torch.no_grad()
def test_an_own_expert_that_only_overfits_gets_the_largest_ridge(tiny_backbone: Tiny, few: list[Preference]) -> None:
    system = system_of(tiny_backbone("bert"), tune="frozen")
    batch = batch_of(tiny_backbone("bert"), few)
    opposite = batch_of(tiny_backbone("bert"), [p.swapped() for p in few])
    assert solve_own(system.routed.experts, 0, [batch], [opposite])["ridge"] == max(RIDGES)
    assert solve_own(system.routed.experts, 0, [batch], [batch])["ridge"] == min(RIDGES)


# ---- whole runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Tiny, pairs: Sequence[Preference]) -> Path:
    return trained(tmp_path_factory.mktemp("shared"), tiny_backbone, pairs, "shared_expert")


def test_a_run_has_its_four_stages_and_tells_the_shares(run: Path) -> None:
    told = card(run)
    assert [stage["stage"] for stage in told["stages"]] == ["shared", "own", "router", "shares"]
    shares = told["stages"][-1]["solved"]["shares"]
    assert set(shares) == set(DOMAINS)
    assert all(0 <= share <= 1 for share in shares.values())
    assert weights(run)["routed.experts.share_E"].tolist() == pytest.approx([shares[d] for d in DOMAINS])
    assert int(weights(run)["standardize.num"]) > 0
    parameters = told["parameters"]
    assert parameters["stored"] == parameters["active"], "unless top_k is set every own expert is used"


def test_a_reward_tells_what_each_expert_would_say(run: Path) -> None:
    reward = load(run).score([{"prompt": "Tell me of the sea.", "response": "It is calm."}], explain=True)[0]
    assert set(reward.expert_rewards) == set(reward.weights) == set(DOMAINS)
    mixed = sum(reward.weights[d] * reward.expert_rewards[d] for d in DOMAINS)
    assert reward.reward == pytest.approx(mixed, abs=1e-5)


@pytest.mark.parametrize("tune", ["lora", "frozen"])
def test_a_domain_is_added_and_nothing_old_moves_by_a_bit(
    tune: str, tiny_backbone: Tiny, pairs: Sequence[Preference], tmp_path: Path
) -> None:
    words = () if tune == "lora" else ("tune=frozen",)
    run = trained(tmp_path / "run", tiny_backbone, pairs, "shared_expert", "bert", *words)
    asking = [replace(p, prompt=f"A question! {p.prompt}", domain="asking", id=f"q-{i}") for i, p in enumerate(pairs)]
    data = write_pairs(tmp_path / "asking.jsonl", asking[:20])
    extension = extend(run, "asking", [str(data)], out=tmp_path / "extended")
    assert extension.golden_difference == 0
    assert extension.num_golden == 2 * len(card(run)["golden"])
    old, new = weights(run), weights(extension.run)
    gate = "routed.router.router.gate."
    moved = {k for k in old if not torch.equal(old[k], new[k][: len(old[k])] if old[k].dim() else new[k])}
    assert all(k.startswith(gate) or "@router" in k for k in moved), sorted(moved)[:3]
    assert {k for k in new if k not in old} == {k for k in new if ".asking." in k}
    assert bool(new["routed.experts.parts.heads.asking.layers.0.weight"].any())
    stages = [stage["stage"] for stage in card(extension.run)["stages"]]
    assert stages == ["expert/asking", "router", "shares"]


@pytest.mark.parametrize("words", [("system.shrink=false",), ("system.top_k=1", "system.own_head=mlp")])
def test_its_settings_can_be_trained(
    words: tuple[str, ...], tiny_backbone: Tiny, pairs: Sequence[Preference], tmp_path: Path
) -> None:
    told = card(trained(tmp_path, tiny_backbone, pairs, "shared_expert", "bert", "tune=frozen", *words))
    if "system.shrink=false" in words:
        assert told["stages"][-1]["solved"]["shares"] == dict.fromkeys(DOMAINS, 1.0)
    else:
        assert told["parameters"]["stored"] - told["parameters"]["active"] == 32 * 32 + 32 + 32 + 1
