"""The gate weighs objectives. Weighing chosen against rejected instead, as a published script does, learns nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moreward.nn.backbone import Backbone
from moreward.nn.gates import ObjectiveGate, read_with_prompts
from moreward.types import Batch

K, D = 19, 24


class BrokenGate(ObjectiveGate):
    """Softmax over the dimension of chosen and rejected: both read one prompt, so every weight is a half."""

    def forward(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.layers(hidden_ND) / self.temperature
        return logits, logits.softmax(-2)


def gate(kind: type[ObjectiveGate] = ObjectiveGate) -> ObjectiveGate:
    torch.manual_seed(0)
    return kind(D, K, width=64, num_layers=3, temperature=10.0, dropout=0.0)


def clusters(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """`prompt_B2D`, the same for both responses, and `reward_B2K`: cluster k prefers by objective k alone."""
    made = torch.Generator().manual_seed(seed)
    cluster_B = torch.randint(K, (num,), generator=made)
    prompt_BD = 4 * torch.eye(D)[cluster_B] + 0.3 * torch.randn(num, D, generator=made)
    reward_B2K = torch.randn(num, 2, K, generator=made)
    own_B2 = reward_B2K[torch.arange(num), :, cluster_B]
    better_B = own_B2.argmax(1)
    order_B2 = torch.stack([better_B, 1 - better_B], dim=1)
    return prompt_BD[:, None].expand(-1, 2, -1), reward_B2K.gather(1, order_B2[..., None].expand(-1, -1, K))


def gap(gate: ObjectiveGate, prompt_B2D: Tensor, reward_B2K: Tensor) -> Tensor:
    reward_B2 = (gate.scale * gate(prompt_B2D)[1] * reward_B2K).sum(-1)
    return reward_B2[:, 0] - reward_B2[:, 1]


def trained_accuracy(gate: ObjectiveGate) -> float:
    optimizer = torch.optim.AdamW(gate.parameters(), lr=5e-3, weight_decay=0.0)
    train, test = clusters(4000, 1), clusters(2000, 2)
    for step in range(240):
        rows = slice(step % 16 * 250, step % 16 * 250 + 250)
        loss = torch.nn.functional.softplus(-gap(gate, train[0][rows], train[1][rows])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float((gap(gate, *test) > 0).float().mean())


def test_ours_learns_the_prompt_clusters_and_the_broken_one_stays_uniform() -> None:
    _, reward = clusters(2000, 2)
    uniform = float((reward.mean(-1)[:, 0] > reward.mean(-1)[:, 1]).float().mean())
    assert uniform == pytest.approx(0.57, abs=0.03)
    assert trained_accuracy(gate(BrokenGate)) == pytest.approx(uniform, abs=0.02)
    assert trained_accuracy(gate()) > 0.95


@pytest.mark.parametrize("shape", [(4, D), (4, 2, D)])
def test_weights_sum_to_one_over_the_objectives(shape: tuple[int, ...]) -> None:
    _, weights = gate()(torch.randn(shape))
    torch.testing.assert_close(weights.sum(-1), torch.ones(shape[:-1]))


def test_the_gate_learns_where_both_responses_share_the_prompt() -> None:
    def largest(kind: type[ObjectiveGate]) -> float:
        one = gate(kind)
        torch.nn.functional.softplus(-gap(one, *clusters(64, 3))).mean().backward()
        return max(float(p.grad.abs().max()) for p in one.layers.parameters() if p.grad is not None)

    assert largest(ObjectiveGate) > 1e-5
    assert largest(BrokenGate) < 1e-8


def test_a_row_does_not_depend_on_its_batch_mates_in_training_either() -> None:
    one, hidden = gate().train(), torch.randn(5, D)
    torch.testing.assert_close(one(hidden)[1][:2], one(hidden[:2])[1])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_decoders_prompt_end_is_the_state_inside_the_conversations_own_pass(
    kind: str, tiny_backbone: Callable[[str], Path]
) -> None:
    backbone = Backbone.load(str(tiny_backbone(kind))).eval()
    prompt = list(range(20, 40))
    texts = [[*prompt, 50, 51, 52], [*prompt, 60]]
    ids_NT = torch.tensor([text + [0] * (23 - len(text)) for text in texts])
    mask_NT = torch.tensor([[1] * len(text) + [0] * (23 - len(text)) for text in texts])
    batch = Batch(
        ids_NT=ids_NT, mask_NT=mask_NT, prompt_ids_PT=torch.tensor([prompt]), prompt_mask_PT=torch.ones(1, 20).long(),
        prompt_of_N=torch.zeros(2).long(), domain_N=torch.zeros(2).long(),
    )  # fmt: skip
    with torch.no_grad():
        hidden_ND, prompt_PD = read_with_prompts(backbone, batch)
        states_NTD = backbone.model(input_ids=ids_NT, attention_mask=mask_NT).last_hidden_state
    for n, text in enumerate(texts):
        torch.testing.assert_close(prompt_PD[0], states_NTD[n, 19], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(hidden_ND[n], states_NTD[n, len(text) - 1], rtol=1e-4, atol=1e-5)
