"""A gate fitted on kept vectors: it finds what can be told apart, and keeps its books over changes of domains."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moreward.nn.replay import Replay, fit_gate


def told(domain: list[int], *, size: int = 5, num_domains: int = 3, noise: float = 0.3, seed: int = 0) -> Replay:
    """Vectors around a centre of each domain, on an odd scale; every fourth is held out."""
    generator = torch.Generator().manual_seed(seed)
    domain_P = torch.tensor(domain, dtype=torch.long)
    centre_ED = torch.eye(num_domains, size) * 3
    hidden_PD = centre_ED[domain_P] + noise * torch.randn(len(domain), size, generator=generator)
    held_out_P = torch.arange(len(domain)) % 4 == 3
    return Replay(hidden_PD * 100 + 7, domain_P, held_out_P, tuple("abc"[:num_domains]))


def test_a_gate_finds_domains_that_lie_apart_however_few_prompts_one_of_them_has() -> None:
    replay = told([0] * 400 + [1] * 40 + [2] * 12)
    gate = nn.Linear(5, 3)
    said = fit_gate(gate, replay)
    right_P = gate(replay.hidden_PD).argmax(1) == replay.domain_P
    assert bool(right_P.all())
    assert said["held_out_router_accuracy"] == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert said["prompts"] == {"a": 400, "b": 40, "c": 12}


def test_without_held_out_prompts_it_is_fitted_and_judges_nothing() -> None:
    replay = told([0, 1, 2] * 20)
    all_known = Replay(replay.hidden_PD, replay.domain_P, torch.zeros(60, dtype=torch.bool), replay.domains)
    gate = nn.Linear(5, 3)
    assert fit_gate(gate, all_known)["held_out_router_accuracy"] == {}
    assert bool((gate(replay.hidden_PD).argmax(1) == replay.domain_P).all())


def test_where_domains_cannot_be_told_apart_the_large_ridge_wins_and_the_gate_is_nearly_even() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden_PD = torch.randn(240, 40, generator=generator)
    domain_P = torch.randint(0, 3, (240,), generator=generator)
    replay = Replay(hidden_PD, domain_P, torch.arange(240) % 3 == 0, ("a", "b", "c"))
    gate = nn.Linear(40, 3)
    assert fit_gate(gate, replay)["ridge"] >= 0.1
    assert float(gate(hidden_PD).softmax(1).max().detach()) < 0.75


@settings(max_examples=30)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.permutations(["a", "b", "c", "d"]))
def test_of_keeps_every_prompt_of_the_domains_that_stay_under_their_new_numbers(
    domain: list[int], order: list[str]
) -> None:
    replay = told(domain)
    for kept in (order, order[:2]):
        found = replay.of(kept)
        assert found.domains == tuple(kept)
        expected = [p for p, d in enumerate(domain) if "abc"[d] in kept]
        assert torch.equal(found.hidden_PD, replay.hidden_PD[expected])
        assert [kept[d] for d in found.domain_P] == ["abc"[domain[p]] for p in expected]
        assert found.held_out_P.tolist() == replay.held_out_P[expected].tolist()


def test_two_of_the_same_domains_add_up_and_others_do_not() -> None:
    replay = told([0, 1, 2])
    assert (replay + replay).num_prompts() == {"a": 2, "b": 2, "c": 2}
    with pytest.raises(AssertionError):
        replay + replay.of(("a", "b"))
