"""Two processes train what one does: the same pairs in each step, the same weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import moreward
from moreward.errors import ConfigError
from moreward.train.runner import train
from moreward.types import Preference
from trained import card, given, metrics, weights, write_pairs

SOURCE = Path(moreward.__file__).resolve().parents[1]
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
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *launcher, *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moreward")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_end_with_the_weights_of_one(
    without_dropout: Path, pairs: Sequence[Preference], tmp_path: Path
) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", pairs)
    one = run(("moreward",), command(without_dropout, data, tmp_path / "one", "train.processes=1"))
    assert one.returncode == 0, one.stderr
    two = run(TORCHRUN, command(without_dropout, data, tmp_path / "two", "train.processes=2"))
    assert two.returncode == 0, two.stderr
    assert card(tmp_path / "two")["machine"]["processes"] == 2
    tensors = weights(tmp_path / "one")
    other = weights(tmp_path / "two")
    assert tensors.keys() == other.keys()
    for name, value in tensors.items():
        if "standardize" not in name:
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    same_metrics(metrics(tmp_path / "one"), metrics(tmp_path / "two"))
    steps = [s["steps"] for s in card(tmp_path / "two")["stages"]]
    assert steps == [s["steps"] for s in card(tmp_path / "one")["stages"]]
    assert max(steps) == 20


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
