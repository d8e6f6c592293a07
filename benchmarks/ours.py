"""Ours, through the public classes. Each function builds one contestant and returns one run of it as a function.

N rows, T tokens, D hidden, P prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.peers import Run, adapter_draws, best_of_n_rows, gate_of, step_inputs
from moreward.nn.backbone import Backbone
from moreward.systems.arliss import ArlissConfig, Recipe
from moreward.types import Batch


def texts(shape: str, lengths: Sequence[int], *, one_by_one: bool = False, bf16: bool = False) -> Run:
    """One model on texts in order of arrival, all in one call; `one_by_one` is what `deterministic` does."""
    backbone = shapes.backbone(shape)
    head = shapes.head(backbone.hidden_size, 0)
    rows = shapes.texts(lengths)
    parts = [shapes.padded([row]) for row in rows] if one_by_one else [shapes.padded(rows)]
    in_precision(backbone, bf16=bf16)

    @torch.no_grad()
    def run() -> Tensor:
        return torch.cat([head(backbone(ids_NT, mask_NT))[:, 0] for ids_NT, mask_NT in parts])

    return run


def in_precision(backbone: Backbone, *, bf16: bool) -> None:
    """As `Scorer.load(dtype=...)` does: the backbone in bf16, heads and gate in fp32."""
    for parameter in backbone.parameters() if bf16 else ():
        parameter.data = parameter.data.to(torch.bfloat16)


def adapters(
    shape: str, *, num_adapters: int, num_rows: int, tokens: int, rank: int = 12, used: int | None = None
) -> Run:
    """An adapter per row; `num_adapters` 0 is our engine without any: the floor."""
    backbone = shapes.backbone(shape)
    head = shapes.head(backbone.hidden_size, 0)
    ids_NT, mask_NT = shapes.padded(shapes.texts([tokens] * num_rows))
    draws = cycle(adapter_draws(num_rows, max(num_adapters, 1), used))
    if num_adapters:
        shapes.bank(backbone, shape, num_adapters=num_adapters, rank=rank)

    @torch.no_grad()
    def run() -> Tensor:
        adapter_N = next(draws) if num_adapters else None
        return head(backbone(ids_NT, mask_NT, adapter_N))[:, 0]  # type: ignore[no-any-return]

    return run


def arliss_system(shape: str, *, num: int, prompt: int, tokens: int, rank: int) -> tuple[Recipe, Batch]:
    """The recipe with the peers' weights, and the paper's step as a batch."""
    settings = ArlissConfig(rank=rank, alpha=shapes.ALPHA_PER_RANK * rank, dropout=0.0, targets=shapes.targets(shape))
    backbone = shapes.backbone(shape)
    system = Recipe(settings, backbone, [f"domain-{i}" for i in range(num)])
    assert backbone.bank is not None
    shapes.fill_bank(backbone.bank)
    for e, name in enumerate(system.expert_names):
        shapes.fill_head(system.routed.experts.head(name).last, e)
    (prompt_ids_PT, prompt_mask_PT), (ids_NT, mask_NT) = step_inputs(num, prompt, tokens)
    router = torch.full((num,), num)
    with torch.no_grad():
        weight, bias = gate_of(backbone.eval()(prompt_ids_PT, prompt_mask_PT, router))
        gate = system.routed.router.router.gate
        gate.weight.copy_(weight)
        gate.bias.copy_(bias)
    batch = Batch(
        ids_NT=ids_NT,
        mask_NT=mask_NT,
        prompt_ids_PT=prompt_ids_PT,
        prompt_mask_PT=prompt_mask_PT,
        prompt_of_N=torch.arange(num),
        domain_N=torch.full((num,), -1),
    )
    return system.eval(), batch


def arliss(
    shape: str,
    *,
    num: int = 5,
    prompt: int = 64,
    tokens: int = 128,
    rank: int = 12,
    one_by_one: bool = False,
    bf16: bool = False,
) -> Run:
    """The paper's step through the recipe, all five conversations at once or one after another."""
    system, batch = arliss_system(shape, num=num, prompt=prompt, tokens=tokens, rank=rank)
    in_precision(system.routed.router.backbone, bf16=bf16)
    parts = [_one(batch, i) for i in range(num)] if one_by_one else [batch]

    @torch.no_grad()
    def run() -> Tensor:
        return torch.cat([system(part).reward_N for part in parts])

    return run


def _one(batch: Batch, row: int) -> Batch:
    """One conversation of a batch with its own prompt."""
    index = torch.tensor([row])
    return Batch(
        ids_NT=batch.ids_NT[index],
        mask_NT=batch.mask_NT[index],
        prompt_ids_PT=batch.prompt_ids_PT[index],
        prompt_mask_PT=batch.prompt_mask_PT[index],
        prompt_of_N=torch.zeros(1, dtype=torch.long),
        domain_N=batch.domain_N[index],
    )


def best_of_n_arliss(
    shape: str, *, prompt: int, response: int, num: int, route: bool = True, rank: int = 12, num_domains: int = 5
) -> Run:
    """ARLISS on `num` responses to one prompt. `route` False: the experts alone, as if the route were known."""
    system, _ = arliss_system(shape, num=num_domains, prompt=prompt, tokens=prompt + response, rank=rank)
    rows = best_of_n_rows(prompt, response, num)
    ids_NT, mask_NT = shapes.padded(rows)
    prompt_ids_PT, prompt_mask_PT = shapes.padded([rows[0][:prompt]])
    batch = Batch(
        ids_NT=ids_NT,
        mask_NT=mask_NT,
        prompt_ids_PT=prompt_ids_PT,
        prompt_mask_PT=prompt_mask_PT,
        prompt_of_N=torch.zeros(num, dtype=torch.long),
        domain_N=torch.full((num,), -1),
    )
    with torch.no_grad():
        experts_NK = system.route(batch).experts_NK

    @torch.no_grad()
    def run() -> Tensor:
        return system(batch).reward_N if route else system.judge(batch, experts_NK)[:, 0]  # type: ignore[no-any-return]

    return run


def best_of_n(shape: str, *, prompt: int, response: int, num: int) -> Run:
    """One model on `num` responses to one prompt."""
    backbone = shapes.backbone(shape)
    head = shapes.head(backbone.hidden_size, 0)
    ids_NT, mask_NT = shapes.padded(best_of_n_rows(prompt, response, num))

    @torch.no_grad()
    def run() -> Tensor:
        return head(backbone(ids_NT, mask_NT))[:, 0]  # type: ignore[no-any-return]

    return run


def dmoerm(
    shape: str,
    *,
    num_experts: int = 5,
    num_rows: int = 8,
    tokens: int = 128,
    rank: int = 12,
    top_layers: int | None = None,
    active_tokens: int | None = None,
) -> Run:
    """All inner experts judge every row, in one call: each row stands once per expert. `num_experts` 0 is one pass of
    the bare model."""
    backbone = shapes.backbone(shape)
    if not num_experts:
        return texts(shape, [tokens] * num_rows)
    shapes.bank(
        backbone, shape, num_adapters=num_experts, rank=rank, top_layers=top_layers, active_tokens=active_tokens
    )
    heads_ED = torch.stack([shapes.head(backbone.hidden_size, e).weight[0] for e in range(num_experts)]).detach()
    ids_NT, mask_NT = shapes.padded(shapes.texts([tokens] * num_rows))
    row_M = torch.arange(num_rows).repeat_interleave(num_experts)
    expert_M = torch.arange(num_experts).repeat(num_rows)

    @torch.no_grad()
    def run() -> Tensor:
        hidden_MD = backbone(ids_NT[row_M], mask_NT[row_M], expert_M)
        return (hidden_MD * heads_ED[expert_M]).sum(1)

    return run
