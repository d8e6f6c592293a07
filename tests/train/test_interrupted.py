"""A run that is killed, or meets a full disk or a damaged checkpoint, ends with the bits of one that did not."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from killing import ENVIRONMENT, Forks
from moreward.checkpoint import verify_folder
from moreward.types import Preference
from trained import card, digests, metrics, write_pairs

Tiny = Callable[[str], Path]
COMMAND = """
import sys
import accelerate, torch
from transformers import AutoConfig, AutoTokenizer, BertForSequenceClassification, PreTrainedTokenizerFast
import moreward.train.runner
from moreward.cli import main

def work(*words):
    sys.argv = ["moreward", *words]
    main()
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, pairs: Sequence[Preference]) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", pairs)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(COMMAND, log=tmp_path_factory.mktemp("log") / "log") as commands:
        yield commands


class Killable:
    """The same training, once undisturbed and then with interruptions."""

    def __init__(self, commands: Forks, backbone: Path, data: Path, folder: Path) -> None:
        self.commands, self.folder = commands, folder
        self.words = [
            "train", "recipe=arliss", f"backbone={backbone}", f"data.train={data}", "data.max_length=96",
            "data.val_fraction=0.2", "train.batch_size=4", "train.epochs=2", "train.eval_every=0.5", "train.patience=0",
            "train.checkpoint_every=3", "system.dropout=0.1",
        ]  # fmt: skip
        assert commands.run("--help") == 0  # the libraries are loaded now
        started = time.monotonic()
        assert self.run("whole") == 0, commands.said()
        self.seconds = time.monotonic() - started

    def run(self, name: str, **interruption: Any) -> int:
        return self.commands.run(*self.words, f"out={self.folder / name}", **interruption)

    def said(self) -> str:
        return self.commands.said()

    def finish(self, name: str) -> None:
        code = self.run(name)
        finished = code == 2 and "holds a finished run" in self.said()
        assert code == 0 or finished, self.said()

    def check(self, name: str) -> None:
        """The run is what the undisturbed one is: every tensor, every metric, no file more or less."""
        whole, killed = self.folder / "whole", self.folder / name
        # Times, the folder's own name, and what names these by their hash.
        differs = {"moreward.json", "manifest.json", "calibration/manifest.json"}
        models = [{k: v for k, v in digests(r / "model").items() if k not in differs} for r in (whole, killed)]
        assert models[0] == models[1]
        assert any(k.startswith("experts/long/") for k in models[0])
        assert metrics(whole) == metrics(killed)
        assert verify_folder(killed / "model") == []
        assert set(os.listdir(whole)) == set(os.listdir(killed)) - {"checkpoints"}
        assert card(whole)["golden"] == card(killed)["golden"]
        shutil.rmtree(killed)


@pytest.fixture(scope="module")
def killable(commands: Forks, tiny_backbone: Tiny, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Killable:
    return Killable(commands, tiny_backbone("bert"), data, tmp_path_factory.mktemp("killable"))


def kill_until_done(killable: Killable, name: str, drawn: random.Random) -> int:
    """kill -9 after a random time, each start going on with the last, until one ends first; how many were killed."""
    number = 0
    while (code := killable.run(name, kill_after=drawn.uniform(0.1, 0.6) * killable.seconds)) == -signal.SIGKILL:
        number += 1
    assert code == 0 or "holds a finished run" in killable.said(), killable.said()
    killable.check(name)
    return number


def test_a_run_killed_at_random_instants_ends_with_the_same_bits(killable: Killable) -> None:
    drawn, killed = random.Random(1), 0
    while killed < 6:
        killed += kill_until_done(killable, "killed", drawn)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fifty_kills_lose_nothing(killable: Killable) -> None:
    drawn, killed = random.Random(2), 0
    while killed < 50:
        killed += kill_until_done(killable, "killed", drawn)


def crash_in_turn(killable: Killable, name: str, crashes: Sequence[int]) -> None:
    """One chain of starts, each ended at the given one of its calls that change the disk."""
    for number in crashes:
        code = killable.run(name, crash_at=number)
        assert code in (0, 9) or "holds a finished run" in killable.said(), (number, killable.said())
    killable.finish(name)
    killable.check(name)


def test_a_run_that_dies_while_it_writes_ends_with_the_same_bits(killable: Killable) -> None:
    crash_in_turn(killable, "crashed", [1, 2, 3, 5, 20, 36, 61])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(10))
def test_a_run_that_dies_at_any_write_ends_with_the_same_bits(seed: int, killable: Killable) -> None:
    drawn = random.Random(seed)
    crash_in_turn(killable, f"crashed-{seed}", [drawn.randrange(1, 260) for _ in range(8)])


def test_a_damaged_newest_checkpoint_costs_only_time(killable: Killable) -> None:
    folder = killable.folder / "damaged"
    assert killable.run("damaged", crash_at=200) == 9
    newest, older = sorted(folder.glob("checkpoints/*/step-*"), reverse=True)[:2]
    assert newest.parent == older.parent, "the older one is of the same stage"
    model = newest / "model.safetensors"
    raw = bytearray(model.read_bytes())
    raw[-3] ^= 1
    model.write_bytes(raw)
    killable.finish("damaged")
    said = " ".join(killable.said().split())
    assert f"{newest.name}: model.safetensors: content changed" in said
    assert f"going on from step {int(older.name.removeprefix('step-'))}" in said
    killable.check("damaged")


# ---------------------------------------------------------------- the disk is full


@pytest.mark.parametrize(("full_at", "num_kept"), [(3, 0), (20, 0), (60, 2), (200, 6)])
def test_a_run_on_a_disk_that_fills_up_says_so_and_goes_on_once_there_is_space(
    full_at: int, num_kept: int, killable: Killable
) -> None:
    """From one of its calls that need space on, nothing more fits: the first file, a checkpoint, the model."""
    name = f"full-{full_at}"
    folder = killable.folder / name
    assert killable.run(name, full_at=full_at) == 4, killable.said()
    assert_says_so_and_keeps_what_was_complete(killable.said(), folder, num_kept)
    assert killable.run(name) == 0, killable.said()
    killable.check(name)


def assert_says_so_and_keeps_what_was_complete(said: str, run: Path, num_kept: int) -> None:
    assert "error: no space: " in said
    assert "Traceback" not in said
    assert [p for p in run.rglob("*") if "tmp" in p.name or p.name.startswith(".model-")] == []
    kept = sorted(run.glob("checkpoints/*/step-*"))
    assert len(kept) == num_kept
    assert all(verify_folder(p) == [] for p in kept)


def test_a_real_disk_that_fills_up_during_training_costs_only_time(killable: Killable) -> None:
    """A tmpfs that another file fills but for 700 kB, in a mount namespace of its own that ends with the process."""
    disk, full, kept = (killable.folder / name for name in ("small-disk", "when-full", "small-disk-at-the-end"))
    mount = f'mount -t tmpfs -o size=4m tmpfs "{disk}"'
    train = f'"{sys.executable}" -m moreward {" ".join(killable.words)} out="{disk}"'
    script = f"""
        {mount} && head -c 3400000 /dev/zero > "{disk}/other"
        {train}; test $? -eq 4 && cp -r "{disk}" "{full}" && rm "{disk}/other" &&
        echo "now there is space" >&2 && {train} && cp -r "{disk}" "{kept}"
    """
    disk.mkdir()
    if not shutil.which("unshare") or in_a_namespace(mount).returncode:
        pytest.skip("no mount namespaces here")
    child = in_a_namespace(script)
    assert child.returncode == 0, child.stderr
    before, after = child.stderr.split("now there is space")
    assert re.search(r"no space: need 0\.\d MB have 0\.\d MB in .*checkpoints.*older checkpoints are kept", before)
    assert_says_so_and_keeps_what_was_complete(before, full, 4)
    assert "going on from step" in after
    killable.check(kept.name)


def in_a_namespace(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, env=ENVIRONMENT, timeout=110
    )
