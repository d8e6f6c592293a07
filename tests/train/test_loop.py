"""One stage: what a step computes, when it stops, which weights it leaves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bags import DOMAINS, Bag, copied, fitting, same
from moreward.config import TrainConfig
from moreward.data.batches import EncodedPair, Encoder, encode_pairs, pair_batch
from moreward.errors import ConfigError
from moreward.nn.backbone import load_tokenizer
from moreward.nn.losses import Outcome, PairwiseLoss
from moreward.train.loop import STANDARDIZE_PAIRS, make_accelerator, schedule
from moreward.train.plan import epoch_batches, stable_seed
from moreward.types import Batch, Preference, Rewards


@pytest.fixture(scope="module")
def encoded(tiny_backbone: Callable[[str], Path], pairs: Sequence[Preference]) -> list[EncodedPair]:
    encoder = Encoder(load_tokenizer(str(tiny_backbone("bert"))), 96)
    return encode_pairs(encoder, pairs, DOMAINS, on_long="truncate").pairs


# ---------------------------------------------------------------- a step


def plain_training(pairs: Sequence[EncodedPair], config: TrainConfig, *, seed: int = 0) -> Bag:
    """The same training written out: one row at a time, the loss as a formula, AdamW by its definition."""
    bag = Bag()
    parameters = dict(bag.named_parameters())
    first = {k: torch.zeros_like(p) for k, p in parameters.items()}
    second = {k: torch.zeros_like(p) for k, p in parameters.items()}
    per_epoch = -(-len(pairs) // config.batch_size)
    num_steps = config.epochs * per_epoch
    for step in range(num_steps):
        rows = epoch_batches(
            [p.num_tokens for p in pairs],
            [p.domain for p in pairs],
            batch_size=config.batch_size,
            temperature=1.0,
            seed=stable_seed(seed, "expert/a", "epoch", step // per_epoch),
        )[step % per_epoch]
        bag.zero_grad()
        for row in rows:
            chosen, rejected = bag(pair_batch([pairs[row]], 0)).reward_N
            delta = chosen - rejected - (pairs[row].preference.margin or 0.0)
            eps = config.label_smoothing
            loss = -(1 - eps) * torch.sigmoid(delta).log() - eps * torch.sigmoid(-delta).log()
            loss = pairs[row].preference.weight * (loss + config.centering * (chosen + rejected) ** 2)
            (loss / len(rows)).backward()
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in parameters.values() if p.grad is not None))
        clip = min(1.0, config.max_grad_norm / norm)
        rate = (config.learning_rate or 0) * schedule(config, step, num_steps)
        with torch.no_grad():
            for name, p in parameters.items():
                assert p.grad is not None
                gradient = p.grad * clip
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                if p.dim() > 1:
                    p -= rate * config.weight_decay * p
                corrected = (second[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                p -= rate * first[name] / (1 - 0.9 ** (step + 1)) / corrected
    return bag


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"label_smoothing": 0.2, "schedule": "cosine"},
        {"centering": 0.1, "warmup": 0.3},
        {"max_grad_norm": 0.01, "weight_decay": 0.3, "schedule": "constant"},
        {"accumulate": 3, "batch_size": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize("margin", [None, 0.7])
def test_training_equals_the_formulas_written_out(
    settings: dict[str, Any], margin: float | None, encoded: list[EncodedPair], tmp_path: Path
) -> None:
    rows = [replace(p, preference=replace(p.preference, margin=margin)) for p in encoded[:20]]
    ours = fitting(tmp_path, rows, epochs=3, **settings)
    ours.run()
    plain = plain_training(rows, ours.fit.config)
    for name, value in plain.named_parameters():
        torch.testing.assert_close(ours.bag.get_parameter(name), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{"centering": 0.1, "label_smoothing": 0.2}, {"accumulate": 3}], ids=str)
def test_a_pair_moves_a_step_in_proportion_to_its_weight(
    settings: dict[str, Any], encoded: list[EncodedPair], tmp_path: Path
) -> None:
    weights = itertools.cycle([1.0, 0.25, 0.0])
    rows = [replace(p, preference=replace(p.preference, weight=next(weights))) for p in encoded[:20]]
    ours = fitting(tmp_path, rows, epochs=3, **settings)
    ours.run()
    plain = plain_training(rows, ours.fit.config)
    for name, value in plain.named_parameters():
        torch.testing.assert_close(ours.bag.get_parameter(name), value, rtol=1e-4, atol=1e-5)


def test_eight_pairs_at_once_equal_four_backward_passes_of_two(encoded: list[EncodedPair], tmp_path: Path) -> None:
    whole = fitting(tmp_path / "whole", encoded, encoded[:5], epochs=2)
    split = fitting(tmp_path / "split", encoded, encoded[:5], epochs=2, accumulate=4)
    whole.run(), split.run()
    assert len(split.bag.seen) > 2 * len(whole.bag.seen), "four forwards a step instead of one"
    for name, value in copied(whole.bag).items():
        torch.testing.assert_close(split.bag.get_parameter(name), value, rtol=1e-6, atol=1e-6)
    keys = ("train/accuracy", "train/ties", "eval/mean", "step")
    assert [[r.get(k) for k in keys] for r in whole.metrics()] == [[r.get(k) for k in keys] for r in split.metrics()]


def test_chosen_and_rejected_go_through_the_model_together(encoded: list[EncodedPair], tmp_path: Path) -> None:
    made = fitting(tmp_path, encoded[:16], epochs=1)
    made.run()
    steps = [names for training, names, _ in made.bag.seen if training]
    assert [len(names) for names in steps] == [8, 8]
    assert {n for names in steps for n in names} == {p.preference.name for p in encoded[:16]}


def test_weight_decay_leaves_biases_alone(encoded: list[EncodedPair], tmp_path: Path) -> None:
    made = fitting(tmp_path, encoded, epochs=2, weight_decay=0.5)
    start = copied(made.bag)
    made.run()
    # The gradients of `idle` and of a token that no text holds are zero, so nothing but decay could move them.
    assert torch.equal(made.bag.idle, start["idle"])
    unused = copied(made.bag)["tokens.weight"][319] / start["tokens.weight"][319]
    assert bool(((unused > 0.5) & (unused < 0.99)).all())


def test_nothing_outside_learn_moves(encoded: list[EncodedPair], tmp_path: Path) -> None:
    made = fitting(tmp_path, encoded, epochs=1)
    made.bag.tokens.weight.requires_grad_(False)
    made.fit.stage = replace(made.fit.stage, learn=tuple(made.bag.head.parameters()))
    start = copied(made.bag)
    made.run()
    assert torch.equal(made.bag.tokens.weight, start["tokens.weight"])
    assert not torch.equal(made.bag.head.weight, start["head.weight"])


class OneOfMany:
    """What one of several processes sees of the others: sums are taken by the test."""

    device = torch.device("cpu")

    def __init__(self, rank: int, world: int) -> None:
        self.process_index, self.num_processes = rank, world

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def no_sync(self, model: nn.Module) -> Any:
        return nullcontext()

    def reduce(self, values: Tensor, how: str) -> Tensor:
        return values


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 8])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_share_the_pairs_of_a_step_without_counting_one_twice(
    world: int, num_rows: int, accumulate: int, encoded: list[EncodedPair], tmp_path: Path
) -> None:
    rows = list(range(5, 5 + num_rows))
    alone = fitting(tmp_path / "alone", encoded)
    counts = torch.tensor(alone.fit._backward(alone.bag, rows))
    shared, gradients = torch.zeros(3), {k: torch.zeros_like(p) for k, p in alone.bag.named_parameters()}
    for rank in range(world):
        made = fitting(tmp_path / str(rank), encoded, accumulate=accumulate)
        made.fit.accelerator = OneOfMany(rank, world)  # type: ignore[assignment]
        shared += torch.tensor(made.fit._backward(made.bag, rows))
        for name, p in made.bag.named_parameters():
            assert p.grad is not None, "every process takes part in every step"
            gradients[name] += p.grad / world  # what DDP makes of them
    torch.testing.assert_close(shared, counts)
    for name, p in alone.bag.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad)


# ---------------------------------------------------------------- the learning rate


def test_the_learning_rate_warms_up_and_falls_to_its_values() -> None:
    config = TrainConfig(warmup=0.4, schedule="linear")
    factors = [schedule(config, step, 10) for step in range(10)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    flat = TrainConfig(warmup=0.4, schedule="constant")
    assert [schedule(flat, step, 10) for step in range(10)] == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1] * 6)
    cosine = TrainConfig(warmup=0, schedule="cosine")
    assert [schedule(cosine, step, 4) for step in range(4)] == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-5)


@given(st.floats(0, 0.95), st.sampled_from(["linear", "cosine", "constant"]), st.integers(1, 200))
def test_a_schedule_rises_then_never_rises_and_stays_in_bounds(warmup: float, kind: Any, steps: int) -> None:
    config = TrainConfig(warmup=warmup, schedule=kind)
    factors = [schedule(config, step, steps) for step in range(steps)]
    assert all(0 < f <= 1 for f in factors)
    top = next((i for i in range(steps) if i >= warmup * steps), steps)
    assert factors[:top] == sorted(factors[:top])
    assert factors[top:] == sorted(factors[top:], reverse=True)


def test_the_optimiser_runs_at_the_scheduled_rate(encoded: list[EncodedPair], tmp_path: Path) -> None:
    made = fitting(tmp_path, encoded, epochs=2, warmup=0.3, learning_rate=0.5)
    rates: list[set[float]] = []
    made.bag.before = lambda: (
        rates.append({g["lr"] for g in made.fit.optimizer.param_groups}) if made.bag.training else None
    )
    made.run()
    assert rates == [{0.5 * schedule(made.fit.config, step, 10)} for step in range(10)]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({"epochs": 3}, 15), ({"epochs": 3, "max_steps": 4}, 4), ({"max_steps": 99}, 10), ({"batch_size": 64}, 2)],
)
def test_a_stage_takes_its_epochs_but_never_more_than_max_steps(
    settings: dict[str, Any], steps: int, encoded: list[EncodedPair], tmp_path: Path
) -> None:
    made = fitting(tmp_path, encoded, **{"epochs": 2, **settings})
    assert (made.run()["steps"], made.bag.num_steps()) == (steps, steps)


# ---------------------------------------------------------------- evaluation


def test_dropout_is_off_while_evaluating_and_on_in_the_next_step(encoded: list[EncodedPair], tmp_path: Path) -> None:
    made = fitting(tmp_path, encoded, encoded[:6], dropout=0.5, epochs=2, eval_every=0.01, patience=0)
    made.bag.eval()  # as pretrained models arrive
    made.run()
    order = [training for training, _, _ in made.bag.seen][:20]
    assert order == [True, False] * 10, "an evaluation after every step"
    for training, _, num_cleared in made.bag.seen[:20]:
        assert (num_cleared > 0) == training


@pytest.mark.parametrize("was_training", [True, False])
def test_evaluating_leaves_the_mode_as_it_was(was_training: bool, encoded: list[EncodedPair], tmp_path: Path) -> None:
    made = fitting(tmp_path, encoded, encoded[:6])
    made.bag.train(was_training)
    made.fit._evaluate(made.bag)
    assert [m.training for m in made.bag.modules()] == [was_training] * len(list(made.bag.modules()))


class Scripted:
    """Training as usual; evaluation i has the share of right rows per domain, and the loss, that `script[i]` says."""

    name = "accuracy"

    def __init__(self, script: Sequence[tuple[float, float, float]]) -> None:
        self.script, self.learn = iter(script), PairwiseLoss()

    def __call__(self, output: Rewards, batch: Batch) -> Outcome:
        outcome = self.learn(output, batch)
        if torch.is_grad_enabled():
            return outcome
        *shares, loss = next(self.script)
        right_B = torch.zeros(len(outcome.loss_B), dtype=torch.bool)
        for domain, share in enumerate(shares):
            rows = (outcome.domain_B == domain).nonzero().flatten()
            right_B[rows[: round(share * len(rows))]] = True
        return replace(outcome, loss_B=torch.full_like(outcome.loss_B, loss), right_B=right_B)


# Held-out rows: 2 of "long", 6 of "short". Each column has its best in another place.
SCRIPT = [(0.0, 0.5, 0.9), (1.0, 0.0, 0.8), (0.5, 1.0, 0.7), (0.5, 5 / 6, 0.1), (0.0, 0.5, 0.9), (0.0, 0.5, 0.9)]


@pytest.mark.parametrize(("metric", "best"), [("mean", 3), ("micro", 3), ("loss", 4), ("long", 2), ("short", 3)])
def test_the_final_model_is_the_best_one_by_the_named_metric(
    metric: str, best: int, encoded: list[EncodedPair], tmp_path: Path
) -> None:
    long = [p for p in encoded if p.preference.domain == "long"]
    short = [p for p in encoded if p.preference.domain == "short"]
    val = [*long[:2], *short[:6]]
    made = fitting(
        tmp_path, encoded, val, objective=Scripted(SCRIPT), metric=metric, max_steps=6, eval_every=0.01, patience=0
    )
    after: list[dict[str, Tensor]] = []
    made.bag.before = lambda: None if made.bag.training else after.append(copied(made.bag))
    report = made.run()
    assert (report["best_step"], report["steps"], report["stopped_early"]) == (best, 6, False)
    assert same(copied(made.bag), after[best - 1])
    assert not same(after[best - 1], after[5])


@pytest.mark.parametrize(
    ("patience", "losses", "steps", "best"),
    [
        (1, (0.9, 0.5, 0.6, 0.1, 0.1, 0.1), 3, 2),
        (2, (0.9, 0.95, 0.5, 0.6, 0.5, 0.1), 5, 3),
        (3, (0.9, 0.5, 0.6, 0.7, 0.4, 0.5), 6, 5),
        (0, (0.1, 0.5, 0.6, 0.7, 0.4, 0.5), 6, 1),
    ],
)
def test_a_stage_stops_after_so_many_evaluations_without_gain(
    patience: int, losses: tuple[float, ...], steps: int, best: int, encoded: list[EncodedPair], tmp_path: Path
) -> None:
    objective = Scripted([(0.0, 0.0, loss) for loss in losses])
    settings: dict[str, Any] = {"metric": "loss", "max_steps": 6, "eval_every": 0.01, "patience": patience}
    made = fitting(tmp_path, encoded, encoded[:8], objective=objective, **settings)
    report = made.run()
    assert (report["steps"], report["best_step"], report["best_value"]) == (
        steps,
        best,
        pytest.approx(-min(losses[:steps])),
    )
    assert report["stopped_early"] == (steps < 6)


def test_evaluation_counts_every_held_out_pair_once(encoded: list[EncodedPair], tmp_path: Path) -> None:
    made = fitting(tmp_path, encoded[:20], encoded[3:40], max_steps=1, batch_size=6)
    made.run()
    names = [n for training, names, _ in made.bag.seen if not training for n in names][: 40 - 3]
    assert sorted(names) == sorted(p.preference.name for p in encoded[3:40])
    record = made.metrics()[-1]
    with torch.no_grad():
        made.bag.standardize.reset()
        right = [int(torch.diff(made.bag(pair_batch([p], 0)).reward_N) < 0) for p in encoded[3:40]]
    by_domain = {d: [r for r, p in zip(right, encoded[3:40], strict=True) if p.preference.domain == d] for d in DOMAINS}
    for domain, values in by_domain.items():
        assert record[f"eval/{domain}/accuracy"] == pytest.approx(sum(values) / len(values))
    assert record["eval/micro"] == pytest.approx(sum(right) / len(right))
    assert record["eval/mean"] == pytest.approx(sum(sum(v) / len(v) for v in by_domain.values()) / 2)


# ---------------------------------------------------------------- zero and unit


def test_rewards_over_the_training_pairs_have_mean_zero_and_unit_one(
    encoded: list[EncodedPair], tmp_path: Path
) -> None:
    made = fitting(tmp_path, encoded, encoded[:4], dropout=0.4)
    made.run()
    made.bag.eval()
    with torch.no_grad():
        reward_N = made.bag(pair_batch(encoded, 0)).reward_N.double()
    assert float(reward_N.mean()) == pytest.approx(0, abs=1e-5)
    assert float(reward_N.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert int(made.bag.standardize.num) == 80


def test_zero_and_unit_come_from_rows_of_the_whole_data(encoded: list[EncodedPair], tmp_path: Path) -> None:
    many = [p for p in encoded for _ in range(40)]
    made = fitting(tmp_path, many, max_steps=1)
    made.run()
    names = {n for training, names, _ in made.bag.seen if not training for n in names}
    assert int(made.bag.standardize.num) == 2 * STANDARDIZE_PAIRS
    assert len(names) > 30, "the first rows alone would be of half as many pairs"


def test_another_number_of_processes_than_asked_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.processes: 2 asked for, 1 running.*torchrun --nproc-per-node 2"):
        make_accelerator(TrainConfig(processes=2, device="cpu"), str(tmp_path))
    assert make_accelerator(TrainConfig(processes=1, device="cpu"), str(tmp_path)).num_processes == 1


def test_a_device_that_is_not_there_is_refused_by_the_name_of_its_setting(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError, match=rf"train\.device: '{name}' is not there; .*no CUDA device"):
            make_accelerator(TrainConfig(device=name), str(tmp_path))


def test_another_device_than_the_process_has_trained_on_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make_accelerator(TrainConfig(device="cpu"), str(tmp_path)).device.type == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"train\.device: 'cuda' is asked for, but this process has trained on cpu"):
        make_accelerator(TrainConfig(device="cuda"), str(tmp_path))
    assert make_accelerator(TrainConfig(device="auto"), str(tmp_path)).device.type == "cpu"
