"""What a smaller run costs: the same pairs, sizes from the files, times from a clock that is given."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from moreward import cli
from moreward.errors import ConfigError, DataError
from moreward.evals.price import Prices, price, speeds, timed_items
from moreward.report import markdown_price, render_price
from moreward.scoring import Scorer, load
from moreward.types import Preference
from trained import write_pairs

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def runs(make: Make) -> dict[str, Path]:
    return {"teacher": make("arliss", "bert"), "small": make("baseline", "bert", "tune=frozen")}


@pytest.fixture(scope="module")
def scorers(runs: dict[str, Path]) -> dict[str, Scorer]:
    return {name: load(run) for name, run in runs.items()}


@pytest.fixture(scope="module")
def prices(scorers: dict[str, Scorer], pairs: Sequence[Preference]) -> Prices:
    return price(scorers, pairs, against="teacher", rounds=2)


def test_accuracy_is_paired_with_the_run_measured_against(prices: Prices, pairs: Sequence[Preference]) -> None:
    assert set(prices.evaluations) == {"teacher", "small"}
    for domain in ("long", "short"):
        apart = prices.comparison.domains["small"][domain]
        accuracy = {name: one.domains[domain].accuracy for name, one in prices.evaluations.items()}
        assert apart.difference == pytest.approx(accuracy["small"] - accuracy["teacher"])
        assert apart.num_pairs == 20
    assert prices.left_out == 0


def test_sizes_are_those_of_the_files_and_of_what_they_need_beside(
    prices: Prices, runs: dict[str, Path], tiny_backbone: Callable[[str], Path]
) -> None:
    pretrained = (tiny_backbone("bert") / "model.safetensors").stat().st_size
    for name, run in runs.items():
        held = sum(path.stat().st_size for path in (run / "model").rglob("*") if path.is_file())
        assert (prices.sizes[name].bytes_model, prices.sizes[name].bytes_backbone) == (held, pretrained)
    assert prices.sizes["small"].parameters_stored < prices.sizes["teacher"].parameters_stored
    assert prices.sizes["teacher"].parameters_active < prices.sizes["teacher"].parameters_stored


class Slow:
    """A scorer that takes so many seconds of a clock."""

    def __init__(self, clock: Clock, seconds: Sequence[float], order: list[str], name: str) -> None:
        self.clock, self.seconds, self.order, self.name = clock, iter(seconds), order, name

    def score(self, items: Sequence[object]) -> None:
        self.order.append(self.name)
        self.clock.now += next(self.seconds)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_times_are_taken_in_turn_and_the_first_round_is_not_counted() -> None:
    clock, order = Clock(), list[str]()
    slow = {"a": Slow(clock, [99, 4, 8, 8], order, "a"), "b": Slow(clock, [77, 2, 2, 1], order, "b")}
    found = speeds(slow, [None] * 8, "a", 3, clock)  # type: ignore[arg-type, list-item]
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert (found["a"].per_second, found["a"].ratio) == (2, 1)
    assert (found["b"].per_second, found["b"].ratio, found["b"].ratio_least, found["b"].ratio_most) == (8, 4, 2, 8)


def test_what_is_timed_comes_from_all_of_the_data(pairs: Sequence[Preference]) -> None:
    items = timed_items([*pairs] * 10)
    assert len(items) == 128
    assert {item.domain for item in items} == {"long", "short"}


def test_what_was_lost_is_said_in_words(prices: Prices) -> None:
    said = " ".join(render_price(prices).split())
    for part in (
        "small:",
        "teacher in the mean of domains",
        "of the parameters",
        "times as fast",
        "MB on disk",
        "40 pairs",
    ):
        assert part in said, part
    lost = {d for d, one in prices.comparison.domains["small"].items() if one.verdict == "worse"}
    sentence = next((line for line in prices.words() if "Lost" in line), "")
    assert all(domain in sentence for domain in lost)
    assert bool(lost) == bool(sentence)
    assert "| small |" in markdown_price(prices)
    told = prices.to_json()
    assert told["words"] == prices.words()
    assert told["sizes"]["small"]["bytes"] == prices.sizes["small"].bytes


def test_runs_and_pairs_that_cannot_be_compared_are_refused(
    scorers: dict[str, Scorer], pairs: Sequence[Preference]
) -> None:
    with pytest.raises(ConfigError) as refused:
        price({"teacher": scorers["teacher"]}, pairs, against="teacher", rounds=0)
    assert len(refused.value.faults) == 2
    with pytest.raises(DataError, match="no pair"):
        price(scorers, [], against="teacher")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    monkeypatch.setenv("COLUMNS", "120")

    def run(*words: object) -> str:
        monkeypatch.setattr("sys.argv", ["moreward", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert not ended.value.code, err
        return out

    return run


def test_fold_distil_and_price_work_one_after_another(
    runs: dict[str, Path], pairs: Sequence[Preference], tmp_path: Path, said: Callable[..., str]
) -> None:
    data, teacher = write_pairs(tmp_path / "pairs.jsonl", pairs), runs["teacher"]
    folded = said("fold", teacher, "--data", data, "--out", tmp_path / "folded", "--steps", 2)
    assert "learned" in folded
    assert f"moreward eval {tmp_path / 'folded'} --data" in folded
    words = ["--layers", 1, "train.epochs=1"]
    distilled = said("distil", teacher, "--texts", data, "--out", tmp_path / "small", *words)
    assert "same order" in distilled
    priced = said(
        "price", tmp_path / "folded", tmp_path / "small", "--against", teacher, "--data", data, "--rounds", 1, "--json"
    )
    told = json.loads(priced)
    assert set(told["sizes"]) == {teacher.name, "folded", "small"}
    assert told["sizes"]["small"]["bytes_backbone"] == 0
