"""One stage that stops before its end: at a number that is none, or anywhere at all, which makes no difference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bags import DOMAINS, Bag, copied, fitting, same
from moreward.checkpoint import verify_folder
from moreward.data.batches import EncodedPair, Encoder, encode_pairs
from moreward.errors import NonFiniteError, RunError
from moreward.nn.backbone import load_tokenizer
from moreward.types import Preference


@pytest.fixture(scope="module")
def encoded(tiny_backbone: Callable[[str], Path], pairs: Sequence[Preference]) -> list[EncodedPair]:
    encoder = Encoder(load_tokenizer(str(tiny_backbone("bert"))), 96)
    return encode_pairs(encoder, pairs, DOMAINS, on_long="truncate").pairs


# ---------------------------------------------------------------- numbers that are none


def test_an_infinite_loss_stops_before_the_step_and_names_the_row(encoded: list[EncodedPair], tmp_path: Path) -> None:
    # 8 steps are an epoch, so the rows of step 7 are met there first.
    settings: dict[str, Any] = {"epochs": 3, "checkpoint_every": 2, "batch_size": 5}
    clean = fitting(tmp_path / "clean", encoded, **settings)
    before: list[dict[str, Tensor]] = []
    clean.bag.before = lambda: before.append(copied(clean.bag))
    clean.run()
    name = clean.bag.seen[7][1][2]
    poisoned = [
        replace(p, preference=replace(p.preference, margin=math.inf)) if p.preference.name == name else p
        for p in encoded
    ]
    made = fitting(tmp_path / "bad", poisoned, **settings)
    with pytest.raises(NonFiniteError, match=rf"expert/a, step 7: .*Rows: {name}$"):
        made.run()
    assert same(copied(made.bag), before[7]), "the weights that step 6 left"
    newest = made.fit.store.newest()
    assert newest is not None
    assert (newest.step, made.fit.store.skipped, verify_folder(newest.path)) == (6, [], [])
    assert same({k: v for k, v in newest.tensors("model").items() if k in before[6]}, before[6])


def test_a_gradient_that_is_not_finite_stops_before_the_step(encoded: list[EncodedPair], tmp_path: Path) -> None:
    made = fitting(tmp_path, encoded, epochs=2)
    weight = made.bag.head.weight
    calls = itertools.count()
    weight.register_hook(lambda g: g * math.nan if next(calls) == 3 else g)
    before: list[dict[str, Tensor]] = []
    made.bag.before = lambda: before.append(copied(made.bag))
    with pytest.raises(NonFiniteError, match="expert/a, step 3: the gradient is not finite") as caught:
        made.run()
    assert len(before) == 4
    assert same(copied(made.bag), before[3])
    assert all(name in str(caught.value) for name in made.bag.seen[3][1])


# ---------------------------------------------------------------- cut short


class Cut(BaseException):
    """Ends a run where it stands."""


RESUMED: list[dict[str, Any]] = [
    {"checkpoint_every": 1},
    {"checkpoint_every": 4, "dropout": 0.3, "accumulate": 2},
    {"checkpoint_every": 2, "dropout": 0.3, "domain_temperature": 4.0, "eval_every": 0.4, "patience": 0},
    {"checkpoint_every": 3, "dropout": 0.1, "metric": "loss", "patience": 1, "eval_every": 0.2, "learning_rate": 0.5},
]


@pytest.mark.parametrize("settings", RESUMED, ids=str)
def test_a_stage_cut_anywhere_ends_with_the_same_bits(
    settings: dict[str, Any], encoded: list[EncodedPair], tmp_path: Path
) -> None:
    sides = (encoded[:34], encoded[34:])
    whole = fitting(tmp_path / "whole", *sides, epochs=3, **settings)
    report = whole.run()
    num_forwards = len(whole.bag.seen)
    for cut in range(1, num_forwards, 1 + num_forwards // 16):
        folder = tmp_path / f"cut-{cut}"
        first = fitting(folder, *sides, epochs=3, **settings)
        first.bag.before = lambda first=first, cut=cut: _cut_at(first.bag, cut)
        with pytest.raises(Cut):
            first.run()
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"stage": "exp')
        second = fitting(folder, *sides, epochs=3, **settings)
        again = second.run()
        assert same(copied(second.bag), copied(whole.bag)), f"cut at forward {cut}"
        assert torch.equal(second.bag.standardize.mean, whole.bag.standardize.mean)
        assert second.metrics() == whole.metrics()
        assert {k: again[k] for k in ("best_step", "steps", "evals")} == {
            k: report[k] for k in ("best_step", "steps", "evals")
        }


def _cut_at(bag: Bag, number: int) -> None:
    if len(bag.seen) == number:
        raise Cut


def test_a_finished_stage_is_read_back_without_a_step(encoded: list[EncodedPair], tmp_path: Path) -> None:
    first = fitting(tmp_path, encoded, encoded[:8], epochs=2)
    report = first.run()
    second = fitting(tmp_path, encoded, encoded[:8], epochs=2)
    assert second.run() == report
    assert second.bag.seen == []
    assert same(copied(second.bag), copied(first.bag))
    assert torch.equal(second.bag.standardize.std, first.bag.standardize.std)


@pytest.mark.parametrize("damage", ["flip", "cut", "no optimizer", "empty folder"])
def test_a_damaged_newest_checkpoint_is_passed_over(damage: str, encoded: list[EncodedPair], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 2, "checkpoint_every": 2, "dropout": 0.2}
    whole = fitting(tmp_path / "whole", encoded, encoded[:6], **settings)
    whole.run()
    first = fitting(tmp_path / "cut", encoded, encoded[:6], **settings)
    first.bag.before = lambda: _cut_at(first.bag, len(whole.bag.seen) - 4)
    with pytest.raises(Cut):
        first.run()
    newest, older = sorted((tmp_path / "cut" / "checkpoints").iterdir(), reverse=True)
    _damage(newest, damage)
    second = fitting(tmp_path / "cut", encoded, encoded[:6], **settings)
    report = second.run()
    assert report["resumed_from_step"] == int(older.name.removeprefix("step-"))
    assert same(copied(second.bag), copied(whole.bag))
    assert second.metrics() == whole.metrics()


def _damage(folder: Path, how: str) -> None:
    model = folder / "model.safetensors"
    if how == "flip":
        raw = bytearray(model.read_bytes())
        raw[-5] ^= 1
        model.write_bytes(raw)
    elif how == "cut":
        model.write_bytes(model.read_bytes()[: model.stat().st_size // 2])
    elif how == "no optimizer":
        (folder / "optimizer.safetensors").unlink()
    else:
        for file in folder.iterdir():
            file.unlink()


def test_no_good_checkpoint_is_an_error_and_never_a_fresh_start(encoded: list[EncodedPair], tmp_path: Path) -> None:
    first = fitting(tmp_path, encoded, epochs=2, checkpoint_every=2)
    first.bag.before = lambda: _cut_at(first.bag, 7)
    with pytest.raises(Cut):
        first.run()
    for folder in (tmp_path / "checkpoints").iterdir():
        _damage(folder, "cut")
    second = fitting(tmp_path, encoded, epochs=2, checkpoint_every=2)
    with pytest.raises(RunError, match="no checkpoint is good"):
        second.run()
    assert second.bag.seen == []
