"""What a stage may do beside stepping: prepare, solve in closed form, keep buffers, have a rate of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ranks
from bags import Fitting, fitting
from killing import ENVIRONMENT
from moreward.data.batches import EncodedPair, Encoder, encode_pairs
from moreward.nn.backbone import load_tokenizer
from moreward.train.runner import Work, train
from moreward.types import Batch, Preference
from trained import card, given, weights, write_pairs

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def encoded(pairs: Sequence[Preference], tiny_backbone: Tiny) -> list[EncodedPair]:
    encoder = Encoder(load_tokenizer(str(tiny_backbone("bert"))), 96)
    return encode_pairs(encoder, pairs, ("long", "short"), on_long="drop").pairs


class Solver:
    """Sets the head to the mean difference of token vectors; remembers how it was called."""

    def __init__(self, made: Fitting) -> None:
        self.bag, self.calls = made.bag, 0
        self.bag.register_buffer("matrix", torch.zeros(2, 2))

    def __call__(self, train: Iterable[Batch], val: Iterable[Batch]) -> Mapping[str, Any]:
        self.calls += 1
        assert not torch.is_grad_enabled()
        assert not self.bag.training
        names = [[name for batch in side for name in batch.names] for side in (train, val)]
        self.bag.head.weight.fill_(0.5)
        self.bag.matrix.copy_(torch.eye(2))
        return {"train": names[0], "val": names[1]}


def solving(folder: Path, train: Sequence[EncodedPair], val: Sequence[EncodedPair]) -> tuple[Fitting, Solver]:
    made = fitting(folder, train, val)
    solver = Solver(made)
    made.fit.stage = replace(
        made.fit.stage, learn=(made.bag.head.weight,), solve=solver, keep=(made.bag.get_buffer("matrix"),)
    )
    made.fit.names["matrix"] = made.bag.get_buffer("matrix")
    return made, solver


def test_a_closed_form_takes_the_place_of_the_steps(encoded: list[EncodedPair], tmp_path: Path) -> None:
    made, solver = solving(tmp_path, encoded[:20], encoded[20:30])
    report = made.run()
    assert (solver.calls, made.bag.num_steps(), report["steps"]) == (1, 0, 0)
    told = report["solved"]
    assert told["train"] == [p.preference.name for p in encoded[:20]], "each pair once, in order"
    assert told["val"] == [p.preference.name for p in encoded[20:30]]
    assert int(made.bag.standardize.num) == 40, "zero and unit are fitted on what it found"
    assert (report["pairs"], report["val_pairs"]) == (20, 10)


def test_what_was_solved_is_read_back_and_not_solved_again(encoded: list[EncodedPair], tmp_path: Path) -> None:
    first, _ = solving(tmp_path, encoded[:20], encoded[20:30])
    report = first.run()
    again, solver = solving(tmp_path, encoded[:20], encoded[20:30])
    assert again.run() == report
    assert solver.calls == 0
    for name, tensor in first.fit.names.items():
        assert torch.equal(tensor, again.fit.names[name]), name
    assert torch.equal(again.bag.get_buffer("matrix"), torch.eye(2)), "buffers named in keep are in the checkpoint"


def test_a_closed_form_that_fails_leaves_nothing_that_looks_finished(
    encoded: list[EncodedPair], tmp_path: Path
) -> None:
    made, _ = solving(tmp_path, encoded[:20], [])

    def failing(_: Iterable[Batch], __: Iterable[Batch]) -> Mapping[str, Any]:
        raise RuntimeError("killed")

    made.fit.stage = replace(made.fit.stage, solve=failing)
    with pytest.raises(RuntimeError, match="killed"):
        made.run()
    again, solver = solving(tmp_path, encoded[:20], [])
    again.run()
    assert solver.calls == 1


def preparing(folder: Path, train: Sequence[EncodedPair], log: list[float]) -> Fitting:
    """`prepare` sets the head, and notes what it was."""
    made = fitting(folder, train, epochs=2, checkpoint_every=2)

    def prepare() -> None:
        log.append(float(made.bag.head.weight.detach().sum()))
        with torch.no_grad():
            made.bag.head.weight.fill_(0.25)

    made.fit.stage = replace(made.fit.stage, prepare=prepare)
    return made


def test_prepare_runs_once_before_the_first_step_and_not_when_going_on(
    encoded: list[EncodedPair], tmp_path: Path
) -> None:
    seen: list[float] = []
    undisturbed = preparing(tmp_path / "one", encoded[:32], seen)
    before = float(undisturbed.bag.head.weight.detach().sum())
    first: list[float] = []

    def note() -> None:
        first.extend([float(undisturbed.bag.head.weight.detach().sum())] if not first else [])

    undisturbed.bag.before = note
    undisturbed.run()
    assert seen == [before]
    assert first == [pytest.approx(0.25 * 8)]
    calls: list[float] = []
    cut = preparing(tmp_path / "two", encoded[:32], calls)

    def kill() -> None:
        if cut.fit.progress.step == 3:
            raise KeyboardInterrupt

    cut.bag.before = kill
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    again = preparing(tmp_path / "two", encoded[:32], calls)
    report = again.run()
    assert len(calls) == 1, "the weights of the checkpoint are not prepared a second time"
    assert report["resumed_from_step"] == 2
    for name, tensor in undisturbed.fit.names.items():
        assert torch.equal(tensor, again.fit.names[name]), name


@pytest.mark.parametrize(("own", "used"), [(None, 0.02), (0.5, 0.5)])
def test_a_stage_may_have_a_learning_rate_of_its_own(
    own: float | None, used: float, encoded: list[EncodedPair], tmp_path: Path
) -> None:
    made = fitting(tmp_path, encoded[:16], epochs=1, schedule="constant", warmup=0.0)
    made.fit.stage = replace(made.fit.stage, learning_rate=own)
    made.run()
    assert [line["train/learning_rate"] for line in made.metrics()] == [used] * len(made.metrics())


# ---------------------------------------------------------------- in a run of several stages


def rated(path: Path, pairs: Sequence[Preference]) -> Path:
    rows = [
        {"prompt": p.prompt, "response": text, "ratings": {"size": min(len(text), 120), "calm": int("calm" in text)},
         "scale": [0, 120]}
        for p in pairs for text in (p.chosen, p.rejected)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def armorm(tiny_backbone: Tiny, pairs: Sequence[Preference], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("data")
    data, ratings = write_pairs(folder / "pairs.jsonl", pairs), rated(folder / "ratings.jsonl", pairs)

    def configured(out: Path, *words: str) -> dict[str, Any]:
        own = (f"data.ratings={ratings}", "system.debias=size", "system.gate_width=8", "pooling=mean", "train.epochs=2")
        return given("armorm", tiny_backbone("bert"), data, out, *own, *words)

    return configured


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_killed_between_stages_goes_on_and_ends_with_the_same_bits(
    stage: int, armorm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(armorm(tmp_path / "whole"))
    fit_stage, done = Work._fit_stage, []

    def cut(work: Work, one: Any, *args: Any) -> dict[str, Any]:
        if len(done) == stage:
            raise KeyboardInterrupt
        done.append(one.name)
        return fit_stage(work, one, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Work, "_fit_stage", cut)
        with pytest.raises(KeyboardInterrupt):
            train(armorm(tmp_path / "cut"))
    again = train(armorm(tmp_path / "cut"))
    assert done == ["objectives", "debias"][:stage]
    files = [run / "model" / "model.safetensors" for run in (whole, again)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [s.get("solved") for s in card(whole)["stages"]] == [s.get("solved") for s in card(again)["stages"]]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_solve_what_one_does(armorm: Any, tmp_path: Path) -> None:
    common = ("train.device=cpu", "train.keep_checkpoints=true", "system.gate_dropout=0", "train.warmup=0")
    told = tmp_path / "runs.json"
    told.write_text(json.dumps([armorm(tmp_path / "two", "train.processes=2", *common)]))
    launched = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    ended = subprocess.run(
        [*launched, ranks.__file__, str(told)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    one = train(armorm(tmp_path / "one", "train.processes=1", *common))
    solved = [[s["solved"] for s in card(run)["stages"][:2]] for run in (one, tmp_path / "two")]
    assert solved[0] == solved[1]
    first, second = weights(one), weights(tmp_path / "two")
    for name, value in first.items():
        exact = name.startswith("probes") or name == "debias_AK"
        torch.testing.assert_close(second[name], value, rtol=0, atol=0 if exact else 1e-4, msg=name)
