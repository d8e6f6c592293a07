"""Two processes train what one does: the same pairs in each step, the same weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import ranks
from killing import ENVIRONMENT
from moreward.checkpoint import verify_folder
from moreward.errors import ConfigError
from moreward.train.loop import Fit
from moreward.train.runner import train
from moreward.types import Preference
from trained import card, given, metrics, weights, write_pairs

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def without_dropout(tiny_backbone: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone whose steps do not depend on which process draws."""
    folder = Path(shutil.copytree(tiny_backbone("bert"), tmp_path_factory.mktemp("plain") / "bert"))
    file = folder / "config.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({**told, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}))
    return folder


def command(backbone: Path, data: Path, out: Path, *words: str) -> list[str]:
    return [
        "train", "recipe=arliss", f"backbone={backbone}", f"data.train={data}", f"out={out}", "data.max_length=96",
        "data.val_fraction=0.25", "train.learning_rate=0.0005", "train.batch_size=4", "train.epochs=4",
        "train.max_steps=20", "train.eval_every=1", "train.patience=0", "system.dropout=0", "train.device=cpu",
        "train.centering=0.01",  # without it nothing holds the bias of a head but rounding
        *words,
    ]  # fmt: skip


def run(launcher: Sequence[str], words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *launcher, *words],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, pairs: Sequence[Preference]) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", pairs)


@pytest.fixture(scope="module")
def of_two(without_dropout: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of two processes."""
    out = tmp_path_factory.mktemp("two") / "run"
    ended = run((*TORCHRUN, "-m", "moreward"), command(without_dropout, data, out, "train.processes=2"))
    assert ended.returncode == 0, ended.stderr
    return out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_end_with_the_weights_of_one(
    of_two: Path, without_dropout: Path, data: Path, tmp_path: Path
) -> None:
    one = run(("moreward",), command(without_dropout, data, tmp_path / "one", "train.processes=1"))
    assert one.returncode == 0, one.stderr
    assert card(of_two)["machine"]["processes"] == 2
    same_weights(weights(tmp_path / "one"), weights(of_two))
    same_metrics(metrics(tmp_path / "one"), metrics(of_two))
    steps = [s["steps"] for s in card(of_two)["stages"]]
    assert steps == [s["steps"] for s in card(tmp_path / "one")["stages"]]
    assert max(steps) == 20


OTHERS = {
    "baseline": ("tune=full", "train.learning_rate=0.0005"),
    "rodos": ("tune=full", "train.learning_rate=0.0005"),
    "more": ("tune=full", "train.learning_rate=0.0005", "system.balance=0.5"),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_kind_of_training_is_the_same_on_two_processes(
    without_dropout: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One start of two processes trains them all. A balance loss is the mean over the processes, so the one process
    takes as many backward passes, each over the pairs that a process would have."""

    def configured(where: str, *words: str) -> list[dict[str, Any]]:
        common = ("train.batch_size=4", "train.max_steps=10", "train.epochs=4", "train.patience=0", *words)
        return [
            given(recipe, without_dropout, data, tmp_path / where / recipe, *common, "train.centering=0.01", *own)
            for recipe, own in OTHERS.items()
        ]

    told = tmp_path / "runs.json"
    told.write_text(json.dumps(configured("two", "train.processes=2", "train.device=cpu")))
    two = run(TORCHRUN, (ranks.__file__, str(told)))
    assert two.returncode == 0, two.stderr
    rows = Fit._rows
    monkeypatch.setattr(Fit, "_rows", lambda fit, step: [*rows(fit, step)[0::2], *rows(fit, step)[1::2]])
    ranks.train_all(configured("one", "train.accumulate=2", "train.device=cpu"))
    for recipe in OTHERS:
        one, other = weights(tmp_path / "one" / recipe), weights(tmp_path / "two" / recipe)
        same_weights(one, other)
        assert max(s["steps"] for s in card(tmp_path / "two" / recipe)["stages"]) == 10


def same_weights(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        if "standardize" not in name:
            # Adam divides by the gradient's size: where that is nearly zero, rounding becomes a part of a step (0.02).
            torch.testing.assert_close(two[name], value, rtol=0, atol=5e-5, msg=lambda m, name=name: f"{name}: {m}")


# ---------------------------------------------------------------- a process dies


def rank_of(pid: int) -> str:
    """Which of a launcher's processes this is; empty for others and for one that is gone."""
    try:
        told = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return ""
    return next((entry[5:].decode() for entry in told if entry.startswith(b"RANK=")), "")


def processes_of(launcher: int) -> dict[str, int]:
    """Its living children by rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return {rank: int(pid) for pid in children if (rank := rank_of(int(pid)))}


def kill_rank_1(words: Sequence[str], out: Path, *options: str) -> tuple[int, float, set[int], str]:
    """Start two processes and kill the second when a checkpoint is there. How the launcher ended, after how many
    seconds from then, which processes there were at the kill, and what was said."""
    log = out.with_suffix(".log")
    with log.open("w") as said:
        launcher = subprocess.Popen(
            [sys.executable, "-m", *TORCHRUN, *options, "-m", "moreward", *words],
            env=ENVIRONMENT, stdout=said, stderr=said,
        )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (any(out.glob("checkpoints/*/step-*")) and "1" in processes_of(launcher.pid)):
        assert launcher.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    found = processes_of(launcher.pid)
    os.kill(found["1"], signal.SIGKILL)
    killed = time.monotonic()
    code = launcher.wait(timeout=120)
    return code, time.monotonic() - killed, set(found.values()), log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_when_a_process_dies_all_end_soon_and_the_next_start_goes_on(
    of_two: Path, without_dropout: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = command(without_dropout, data, out, "train.processes=2", "train.checkpoint_every=2")
    code, seconds, pids, said = kill_rank_1(words, out)
    assert code not in (0, None), said
    assert seconds < 15, said
    assert not [pid for pid in pids if rank_of(pid)], "no process is left"
    assert not (out / "model").exists(), "the kill must fall into the training"
    again = run((*TORCHRUN, "-m", "moreward"), words)
    assert again.returncode == 0, again.stderr
    same_run(out, of_two)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_launcher_that_restarts_the_processes_ends_with_the_same_weights(
    of_two: Path, without_dropout: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = command(without_dropout, data, out, "train.processes=2", "train.checkpoint_every=2")
    code, _, _, said = kill_rank_1(words, out, "--max-restarts", "1")
    assert code == 0, said
    assert "going on from step" in said
    same_run(out, of_two)


def same_run(run: Path, undisturbed: Path) -> None:
    """To the bit, and nothing is left of what was cut short."""
    one, two = weights(run), weights(undisturbed)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert metrics(run) == metrics(undisturbed)
    assert verify_folder(run / "model") == []
    assert sorted(os.listdir(run)) == sorted(os.listdir(undisturbed))


def same_metrics(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
    assert len(one) == len(two)
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        for key, value in first.items():
            if isinstance(value, float):
                assert second[key] == pytest.approx(value, abs=1e-4), (key, first, second)
            else:
                assert second[key] == value, (key, first, second)


def test_fewer_processes_than_asked_for_are_refused(
    tiny_backbone: Tiny, pairs: Sequence[Preference], tmp_path: Path
) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", pairs)
    with pytest.raises(ConfigError, match=r"train\.processes: 2 asked for, 1 running\. Start with: torchrun"):
        train(given("arliss", tiny_backbone("bert"), data, tmp_path / "run", "train.processes=2"))
    assert not (tmp_path / "run" / "model").exists()
