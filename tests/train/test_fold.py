"""Mixtures folded into one dense model: what must be equal is, and shares follow the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moreward.data.batches import conversation_batch, encode_pairs, side
from moreward.errors import ConfigError, DataError, RunError
from moreward.runs import read_model
from moreward.scoring import load
from moreward.systems._base import System
from moreward.train.fold import Blend, Foldable, fit_shares, fold_run
from moreward.types import Preference
from trained import card, weights

Make = Callable[..., Path]
SOFT = ("system.rank=2", "system.alpha=4", "system.top_k=2")


@pytest.fixture(scope="module")
def mixtures(make: Make) -> dict[str, Path]:
    return {
        "arliss": make("arliss", "bert", *SOFT),
        "arliss frozen": make("arliss", "bert", "tune=frozen", "system.head=linear", "system.top_k=2"),
        "rodos": make("rodos", "bert", "tune=full", "train.learning_rate=0.002"),
        "shared_expert": make("shared_expert", "bert", "system.rank=2", "system.alpha=4"),
    }


KINDS = ("arliss", "arliss frozen", "rodos", "shared_expert")


def rewards(system: System, encoder, pairs: Sequence[Preference], expert: int | None = None) -> Tensor:
    encoded = [encoder.conversation(side(p, which)) for p in pairs[:8] for which in ("chosen", "rejected")]
    batch = conversation_batch(encoded, [0] * len(encoded), encoder.pad_id)
    for backbone in system.backbones():
        backbone.store = None
    with torch.no_grad():
        if expert is None:
            return system(batch).reward_N
        return system.judge(batch, torch.full((len(encoded), 1), expert))[:, 0]


def at(run: Path, share_P: Tensor) -> tuple[System, System, object]:
    """The mixture, its fold at these shares, the encoder."""
    untouched, encoder, told = read_model(run)
    system, _, _ = read_model(run)
    recipe = Foldable(system, told["recipe"])
    dense = recipe.dense(fresh(run), told["domains"])
    Blend(dense, recipe.tensors).set(share_P)
    return untouched, dense, encoder


def fresh(run: Path):
    from moreward.runs import load_backbone, model_folder, read_card

    folder = model_folder(run)
    return load_backbone(folder, read_card(folder), None)


@pytest.mark.parametrize("kind", KINDS[:-1])
@pytest.mark.parametrize("expert", [0, 1])
def test_the_fold_of_one_whole_share_is_that_expert(
    kind: str, expert: int, mixtures: dict[str, Path], pairs: Sequence[Preference]
) -> None:
    run = mixtures[kind]
    share_P = torch.zeros(2, dtype=torch.float64)
    share_P[expert] = 1
    system, dense, encoder = at(run, share_P)
    torch.testing.assert_close(
        rewards(dense, encoder, pairs), rewards(system, encoder, pairs, expert), rtol=1e-4, atol=1e-4
    )


def test_the_fold_of_a_shared_expert_alone_is_the_shared_expert(
    mixtures: dict[str, Path], pairs: Sequence[Preference]
) -> None:
    system, dense, encoder = at(mixtures["shared_expert"], torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    with torch.no_grad():
        system.routed.experts.share_E.zero_()
    torch.testing.assert_close(rewards(dense, encoder, pairs), rewards(system, encoder, pairs, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["arliss", "rodos"])
def test_identical_experts_fold_to_that_expert_whatever_the_shares(
    kind: str, mixtures: dict[str, Path], pairs: Sequence[Preference]
) -> None:
    run = mixtures[kind]
    system, encoder, told = read_model(run)
    one, other = system.expert_names
    tensors = dict(system.named_parameters()) | dict(system.named_buffers())
    with torch.no_grad():
        for name, value in tensors.items():
            if f".{one}." in name:
                tensors[name.replace(f".{one}.", f".{other}.")].copy_(value)
    wanted = rewards(system, encoder, pairs, 0)
    assert wanted.std() > 1e-3
    recipe = Foldable(system, told["recipe"])
    dense = recipe.dense(fresh(run), told["domains"])
    Blend(dense, recipe.tensors).set(torch.tensor([0.3, 0.7], dtype=torch.float64))
    torch.testing.assert_close(rewards(dense, encoder, pairs), wanted, rtol=1e-4, atol=1e-4)


def test_linear_heads_on_one_frozen_vector_fold_to_the_weighted_sum_of_their_rewards(
    mixtures: dict[str, Path], pairs: Sequence[Preference]
) -> None:
    system, dense, encoder = at(mixtures["arliss frozen"], torch.tensor([0.3, 0.7], dtype=torch.float64))
    wanted = 0.3 * rewards(system, encoder, pairs, 0) + 0.7 * rewards(system, encoder, pairs, 1)
    torch.testing.assert_close(rewards(dense, encoder, pairs), wanted, rtol=1e-4, atol=1e-4)


def test_whole_models_are_the_weighted_average_of_each_tensor(mixtures: dict[str, Path]) -> None:
    stored = weights(mixtures["rodos"])
    _, dense, _ = at(mixtures["rodos"], torch.tensor([0.3, 0.7], dtype=torch.float64))
    found = dict(dense.named_parameters())
    compared = 0
    for name, value in stored.items():
        if name.startswith("routed.experts.experts.long.backbone.") and value.is_floating_point():
            wanted = 0.3 * value + 0.7 * stored[name.replace(".long.", ".short.")]
            torch.testing.assert_close(found[name.replace("routed.experts.experts.long", "expert")], wanted)
            compared += 1
    assert compared > 20


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_by_the_shares_is_that_of_small_steps(
    kind: str, mixtures: dict[str, Path], pairs: Sequence[Preference]
) -> None:
    run = mixtures[kind]
    system, encoder, told = read_model(run)
    recipe = Foldable(system, told["recipe"])
    blend = Blend(recipe.dense(fresh(run), told["domains"]), recipe.tensors)
    blend.dense.backbones()[0].store = None
    encoded = encode_pairs(encoder, pairs[::4], told["domains"], on_long="drop").pairs
    share_P = torch.full((recipe.num,), 1 / recipe.num, dtype=torch.float64)
    _, grad_P = blend.gradient(share_P, encoded, encoder.pad_id)

    def slope(p: int, size: float) -> float:
        step = torch.zeros_like(share_P)
        step[p] = size
        losses = [blend.measure(share_P + sign * step, encoded, 64, encoder.pad_id)[0] for sign in (1, -1)]
        return (losses[0] - losses[1]) / (2 * size)

    for p in range(recipe.num):
        wanted = (4 * slope(p, 0.01) - slope(p, 0.02)) / 3  # without the curvature of the third order
        assert float(grad_P[p]) == pytest.approx(wanted, rel=0.02, abs=5e-4), p
    assert float(grad_P.abs().max()) > 5e-3, "large enough to be told from nothing"


def test_shares_go_to_the_expert_that_is_right(mixtures: dict[str, Path], pairs: Sequence[Preference]) -> None:
    """Pairs of the domain `long` only: its expert gets nearly all."""
    run = mixtures["arliss frozen"]
    system, encoder, told = read_model(run)
    recipe = Foldable(system, told["recipe"])
    blend = Blend(recipe.dense(fresh(run), told["domains"]), recipe.tensors)
    encoded = encode_pairs(encoder, [p for p in pairs if p.domain == "long"], told["domains"], on_long="drop").pairs
    even = torch.tensor([0.5, 0.5], dtype=torch.float64)
    options = {"steps": 30, "batch_size": 8, "pad_id": encoder.pad_id}
    share_P = fit_shares(blend, encoded, even, **options)
    assert float(share_P.sum()) == pytest.approx(1)
    assert recipe.names[int(share_P.argmax())] == "long"
    assert float(share_P.max()) > 0.8
    assert torch.equal(share_P, fit_shares(blend, encoded, even, **options)), "the same again"


@pytest.mark.parametrize("kind", KINDS)
def test_a_folded_run_is_an_ordinary_run(
    kind: str, mixtures: dict[str, Path], pairs: Sequence[Preference], tmp_path: Path
) -> None:
    made = fold_run(mixtures[kind], pairs, out=tmp_path / "f", steps=3, batch_size=8)
    told = card(made.run)
    assert told["recipe"] == ("baseline" if kind in ("rodos", "arliss frozen") else "base_lora")
    assert told["parents"][0]["run"] == str(mixtures[kind])
    assert [one.how for one in made.tried] == ["learned", "uniform", "routed"]
    assert sum(made.weights) == pytest.approx(1)
    assert {k: v["weights"] for k, v in told["folded"]["tried"].items()} == {o.how: list(o.weights) for o in made.tried}
    scorer = load(made.run)
    items = [side(p, "chosen") for p in pairs[:4]]
    _, dense, encoder = at(mixtures[kind], torch.tensor(made.weights, dtype=torch.float64))
    wanted = rewards(dense, encoder, pairs)[:8:2].tolist()
    assert [r.number for r in scorer.score(items)] == pytest.approx(wanted, abs=1e-4)
    assert made.rank == {"arliss": 4, "shared_expert": 6}.get(kind)


def test_a_smaller_rank_says_its_error(mixtures: dict[str, Path], pairs: Sequence[Preference], tmp_path: Path) -> None:
    made = fold_run(mixtures["arliss"], pairs, out=tmp_path / "f", steps=1, rank=2, how="uniform")
    assert made.rank == 2
    assert 0 < made.error < 1
    assert load(made.run).card["folded"]["error"] == made.error


def test_every_fault_is_named_at_once(
    make: Make, mixtures: dict[str, Path], pairs: Sequence[Preference], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        fold_run(make("base_lora", "bert"), [], out=tmp_path / "f", steps=0)
    assert len(refused.value.faults) == 3
    assert "has no experts" in str(refused.value)
    with pytest.raises(ConfigError, match="together are 4") as refused:
        fold_run(mixtures["arliss"], [], out=tmp_path / "f", rank=5, how="other")  # type: ignore[arg-type]
    assert len(refused.value.faults) == 3
    with pytest.raises(ConfigError, match="no adapters"):
        fold_run(mixtures["rodos"], pairs, out=tmp_path / "f", rank=2)
    with pytest.raises(DataError, match="too few"):
        fold_run(mixtures["arliss"], pairs[:1], out=tmp_path / "f")
    with pytest.raises(RunError, match="finished run"):
        fold_run(mixtures["arliss"], pairs, out=mixtures["arliss"], steps=1)
