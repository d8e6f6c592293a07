"""Merged weights: heads in one unit, adapters in the product, and parents that do not fit together refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moreward import cli
from moreward.data.batches import side
from moreward.errors import ConfigError, RunError
from moreward.runs import read_model
from moreward.scoring import load
from moreward.train.merge import Merged, Point, averaged_tensor, bank_of, joined, merge
from moreward.types import Conversation, Preference
from trained import card, digests, weights, write_pairs

Tiny = Callable[[str], Path]
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def adapters(make: Make) -> list[Path]:
    """Two runs of one start whose adapters differ in rank and scale."""
    return [
        make("base_lora", "bert", "system.rank=2", "system.alpha=4"),
        make("base_lora", "bert", "system.rank=3", "system.alpha=9", "train.learning_rate=0.01"),
    ]


@pytest.fixture(scope="module")
def whole(make: Make) -> list[Path]:
    rates = ("0.002", "0.001")
    return [make("baseline", "bert", "tune=full", f"train.learning_rate={rate}") for rate in rates]


def sides(preferences: Sequence[Preference]) -> list[Conversation]:
    return [side(p, which) for p in preferences for which in ("chosen", "rejected")]


def products(run: Path) -> dict[str, Tensor]:
    """ΔW of every adapter and layer."""
    bank = bank_of(read_model(run)[0])
    assert bank is not None
    return {
        f"{name}/{module}": bank.merged_delta(name, module).detach() for name in bank.names for module in bank.shapes
    }


# ---- adapters


@pytest.mark.parametrize("shares", [None, (0.25, 0.75), (1.0, 0.0)])
def test_the_merged_product_is_the_weighted_sum_of_the_parents_products(
    shares: tuple[float, float] | None, adapters: list[Path], tmp_path: Path
) -> None:
    made = merge(adapters, out=tmp_path / "m", weights=shares)
    assert (made.rank, made.error) == (5, 0.0)
    first, second = map(products, adapters)
    a, b = shares or (0.5, 0.5)
    for name, found in products(made.run).items():
        torch.testing.assert_close(found, a * first[name] + b * second[name], rtol=1e-5, atol=1e-6)


def test_a_parent_whose_matrices_both_changed_sign_is_the_same_parent() -> None:
    """The average of one product written in two ways is that product; A and B averaged apart would be zero."""
    torch.manual_seed(0)
    A_RI, B_OR = torch.randn(2, 7), torch.randn(5, 2)
    found_A, found_B, _, _ = joined([(A_RI, B_OR), (-A_RI, -B_OR)], [0.5, 0.5], 4)
    torch.testing.assert_close(found_B @ found_A, B_OR @ A_RI)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(0, 9))
def test_a_rank_that_is_cut_leaves_the_nearest_product_and_says_what_is_lost(
    first: int, second: int, rank: int, seed: int
) -> None:
    torch.manual_seed(seed)
    rank = min(rank, first + second)
    pairs = [(torch.randn(r, 7), torch.randn(5, r)) for r in (first, second)]
    wanted = 0.3 * pairs[0][1] @ pairs[0][0] + 1.7 * pairs[1][1] @ pairs[1][0]
    A_RI, B_OR, lost, whole = joined(pairs, [0.3, 1.7], rank)
    assert (A_RI.shape, B_OR.shape) == ((rank, 7), (5, rank))
    values = torch.linalg.svdvals(wanted.double())
    best = float(values[rank:].square().sum())
    assert float((B_OR @ A_RI - wanted).double().square().sum()) == pytest.approx(best, abs=1e-4)
    assert lost == pytest.approx(0.0 if rank == first + second else best, abs=1e-4)
    assert whole == pytest.approx(float(values.square().sum()), rel=1e-4)


def test_a_merged_run_of_a_smaller_rank_reports_its_error(adapters: list[Path], tmp_path: Path) -> None:
    made = merge(adapters, out=tmp_path / "m", rank=2)
    first, second = map(products, adapters)
    found = products(made.run)
    wanted = {k: (first[k] + second[k]) / 2 for k in found}
    error, size = (
        sum(float(x.square().sum()) for x in xs) ** 0.5
        for xs in ([found[k] - wanted[k] for k in found], list(wanted.values()))
    )
    assert made.error == pytest.approx(error / size, rel=1e-3)
    assert 0 < made.error < 1
    assert card(made.run)["merged"] == {"weights": [0.5, 0.5], "rank": 2, "error": made.error}


def test_adapters_of_a_mixture_are_merged_expert_by_expert(make: Make, tmp_path: Path) -> None:
    runs = [make("arliss", "bert"), make("arliss", "bert", "train.learning_rate=0.01")]
    made = merge(runs, out=tmp_path / "m")
    first, second = map(products, runs)
    assert len({name.split("/")[0] for name in first}) == 3, "two experts and the router"
    for name, found in products(made.run).items():
        torch.testing.assert_close(found, (first[name] + second[name]) / 2, rtol=1e-5, atol=1e-6)
    assert load(made.run).experts == ("long", "short")


# ---- whole models and heads


def test_whole_models_are_averaged_tensor_by_tensor_with_heads_in_one_unit(whole: list[Path], tmp_path: Path) -> None:
    made = merge(whole, out=tmp_path / "m", weights=(0.25, 0.75))
    a, b, found = weights(whole[0]), weights(whole[1]), weights(made.run)
    assert found.keys() == a.keys()
    for name in (k for k in found if "backbone" in k):
        torch.testing.assert_close(found[name], 0.25 * a[name] + 0.75 * b[name])
    key = "expert.head.layers.0"
    unit = [w["expert.standardize.std"] for w in (a, b)]
    zero = [w["expert.standardize.mean"] for w in (a, b)]
    wanted = 0.25 * a[f"{key}.weight"] / unit[0] + 0.75 * b[f"{key}.weight"] / unit[1]
    torch.testing.assert_close(found[f"{key}.weight"], wanted.float(), rtol=1e-5, atol=1e-6)
    bias = 0.25 * (a[f"{key}.bias"] - zero[0]) / unit[0] + 0.75 * (b[f"{key}.bias"] - zero[1]) / unit[1]
    torch.testing.assert_close(found[f"{key}.bias"], bias.float(), rtol=1e-5, atol=1e-5)
    assert (float(found["expert.standardize.mean"]), float(found["expert.standardize.std"])) == (0.0, 1.0)


@pytest.mark.parametrize("kind", ["whole", "adapters"])
def test_the_average_of_a_run_with_itself_gives_its_own_rewards(
    kind: str, whole: list[Path], adapters: list[Path], pairs: Sequence[Preference], tmp_path: Path
) -> None:
    run = {"whole": whole, "adapters": adapters}[kind][0]
    made = merge([run, run, run], out=tmp_path / "m")
    wanted = [r.reward for r in load(run).score(sides(pairs[:6]))]
    assert [r.reward for r in load(made.run).score(sides(pairs[:6]))] == pytest.approx(wanted, abs=5e-3)


def test_the_new_run_names_its_parents_and_has_golden_rewards_of_its_own(adapters: list[Path], tmp_path: Path) -> None:
    before = [digests(run) for run in adapters]
    made = merge(adapters, out=tmp_path / "m")
    told = card(made.run)
    assert [p["run"] for p in told["parents"]] == [str(run) for run in adapters]
    assert all(len(p["model"]) == 64 for p in told["parents"])
    assert told["golden"]
    assert load(made.run).check_golden() < 1e-3
    assert [g["reward"] for g in told["golden"]] != [g["reward"] for g in card(adapters[0])["golden"]]
    assert [digests(run) for run in adapters] == before
    assert (made.run / "model" / "experts" / "shared").is_dir()


def test_counts_are_summed_and_halves_of_a_lower_precision_keep_it() -> None:
    assert averaged_tensor([torch.tensor(3), torch.tensor(4)], [0.5, 0.5]).item() == 7
    half = [torch.tensor([1.0, 2.0], dtype=torch.bfloat16), torch.tensor([3.0, 2.0], dtype=torch.bfloat16)]
    assert averaged_tensor(half, [0.5, 0.5]).dtype == torch.bfloat16


# ---- the way between the parents


def test_the_way_from_each_parent_is_measured_on_held_out_pairs(
    adapters: list[Path], pairs: Sequence[Preference], tmp_path: Path
) -> None:
    made = merge(adapters, out=tmp_path / "m", held_out=pairs)
    assert [(p.parent, p.share) for p in made.path] == [(str(r), s) for r in adapters for s in (0.0, 0.5, 1.0)]
    for run, start in zip(adapters, made.path[::3], strict=True):
        rewards = [r.reward for r in load(run).score(sides(pairs))]
        right = sum(c > j for c, j in zip(rewards[::2], rewards[1::2], strict=True))
        assert start.accuracy == pytest.approx(right / len(pairs), abs=0.03)
    assert made.path[2].accuracy == made.path[5].accuracy


def test_a_way_that_leads_below_both_ends_is_named() -> None:
    ways = {"a": (0.8, 0.6, 0.7), "b": (0.8, 0.75, 0.7), "c": (0.5, 0.9, 0.7)}
    path = tuple(Point(p, s, acc) for p, way in ways.items() for s, acc in zip((0.0, 0.5, 1.0), way, strict=True))
    assert Merged(Path("m"), (0.5, 0.5), None, 0.0, path).parents_below == ["a"]


# ---- what is refused


def test_every_difference_is_named(make: Make, adapters: list[Path], tmp_path: Path) -> None:
    other = make("arliss", "qwen2", "data.max_length=128")
    with pytest.raises(ConfigError) as refused:
        merge([adapters[0], other], out=tmp_path / "m")
    told = "\n".join(refused.value.faults)
    assert all(word in told for word in ("recipe", "backbone", "tokenizer", "pooling", "data.max_length", "system"))
    assert str(other) in told
    assert not (tmp_path / "m").exists()


def test_other_seeds_started_other_heads_and_are_taken_only_when_told(make: Make, tmp_path: Path) -> None:
    runs = [make("base_lora", "bert"), make("base_lora", "bert", "seed=1")]
    with pytest.raises(ConfigError, match="--different-starts"):
        merge(runs, out=tmp_path / "m")
    assert merge(runs, out=tmp_path / "m", different_starts=True).rank == 24


@pytest.mark.parametrize("bad", [(0.5,), (0.7, 0.7), (1.5, -0.5), (float("nan"), 1.0)])
def test_weights_that_are_no_average_are_refused(bad: Any, adapters: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--weights"):
        merge(adapters, out=tmp_path / "m", weights=bad)


def test_ranks_recipes_and_folders_that_do_not_fit_are_refused(
    make: Make, adapters: list[Path], whole: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="together are 5"):
        merge(adapters, out=tmp_path / "m", rank=6)
    with pytest.raises(ConfigError, match="no adapters"):
        merge(whole, out=tmp_path / "m", rank=6)
    more = make("more", "bert", "tune=frozen")
    with pytest.raises(ConfigError, match="single heads"):
        merge([more, more], out=tmp_path / "m")
    with pytest.raises(RunError, match="finished run"):
        merge(adapters, out=adapters[0])


# ---- the commands


def test_the_commands_make_runs_that_eval_takes(
    adapters: list[Path],
    pairs: Sequence[Preference],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def said(*words: object) -> str:
        monkeypatch.setattr("sys.argv", ["moreward", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert not ended.value.code, err
        return out

    monkeypatch.setenv("COLUMNS", "120")
    data = write_pairs(tmp_path / "pairs.jsonl", pairs)
    merged = said("merge", *adapters, "--out", tmp_path / "m", "--weights", "0.3,0.7", "--data", data)
    assert "weights: 0.3, 0.7" in merged
    assert "rank 5" in merged
    assert merged.count("of the way") == 6
    assert f"moreward eval {tmp_path / 'm'} --data" in merged
    made = said("ensemble", *adapters, "--out", tmp_path / "e", "--reference", data, "--how", "worst")
    assert "over 80 responses" in made
    evaluated = said("eval", tmp_path / "e", "--data", data, "--baseline", tmp_path / "m")
    assert "Diversity of 2: their errors correlate by" in evaluated
    assert "Diversity" not in said("eval", tmp_path / "m", "--data", data)
