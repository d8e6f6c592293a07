"""Fit one stage: the only training loop there is.

B pairs of a batch. Randomness of step s comes from (seed, stage, s, rank), so a checkpoint holds no generator and a
killed run repeats bit for bit from its step number.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moreward.checkpoint import Checkpoint, CheckpointStore
from moreward.config import TrainConfig
from moreward.data.batches import EncodedPair, EncodedRated, pair_batch, rated_batch
from moreward.errors import ConfigError, NonFiniteError
from moreward.nn.experts import Standardize
from moreward.nn.losses import Outcome, refuse_non_finite
from moreward.scoring import pick_device
from moreward.systems._base import Solve, Stage
from moreward.train.plan import epoch_batches, stable_seed
from moreward.train.track import MetricsFile, Reporter
from moreward.types import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator

STANDARDIZE_PAIRS = 512
LOG_EVERY = 10
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a stage needs beside itself."""

    accelerator: Accelerator
    config: TrainConfig
    seed: int
    pad_id: int
    domains: tuple[str, ...]
    metrics: MetricsFile
    reporter: Reporter


@dataclass
class Progress:
    """Where a stage stands; goes into its checkpoints as it is."""

    step: int = 0
    best_value: float | None = None
    best_step: int = 0
    num_stale: int = 0
    stopped: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)


class Fit:
    """One stage in training. `run()` leaves the stage's module with its best weights and its zero and unit."""

    def __init__(
        self,
        stage: Stage,
        names: dict[str, Tensor],
        train: Sequence[EncodedPair],
        val: Sequence[EncodedPair],
        around: Surroundings,
        store: CheckpointStore,
        rated: tuple[Sequence[EncodedRated], Sequence[EncodedRated]] = ((), ()),
    ) -> None:
        """`names` are the tensors that this stage may move, under the names of the whole system. A rated stage gets
        `rated`, training and held-out conversations, in place of the pairs."""
        self.stage, self.names, self.around, self.store = stage, names, around, store
        self.rated_train, self.rated_val = map(list, rated)
        by_steps = stage.rated and stage.solve is None  # then a step counts conversations as it else counts pairs
        self.train, self.val = (list[Any](rows) for rows in (rated if by_steps else (train, val)))
        self.config = around.config
        self.accelerator = around.accelerator
        self.batches_per_epoch = -(-len(self.train) // self.config.batch_size)
        limit = self.config.max_steps or math.inf
        self.num_steps = int(min(self.config.epochs * self.batches_per_epoch, limit))
        self.eval_steps = max(1, round(self.config.eval_every * self.batches_per_epoch))
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}

    def run(self) -> dict[str, Any]:
        """Train, or go on where the newest good checkpoint stands. Returns the stage's report."""
        checkpoint = self.store.newest()
        if checkpoint is not None and checkpoint.state["finished"]:
            self._copy_in(checkpoint.tensors("model"))
            return dict(checkpoint.state["report"])
        if self.stage.solve is not None:
            return self._solve(self.stage.solve)
        self.optimizer = self._make_optimizer()
        if checkpoint is not None:
            self._resume(checkpoint)
        elif self.stage.prepare is not None:
            self.stage.prepare()
        if self.accelerator.is_main_process:
            self.around.metrics.drop_after(self.stage.name, self.progress.step)
        model = self.accelerator.prepare_model(self.stage.module)
        started, first = time.monotonic(), self.progress.step
        self.around.reporter.start(self.stage.name, self.num_steps, first)
        while self.progress.step < self.num_steps and not self.progress.stopped:
            self._one_step(model)
        self.around.reporter.finish()
        if self.best:
            self._copy_in(self.best)
        self._standardize()
        report = self._report(time.monotonic() - started, first)
        self._save(finished=True, report=report)
        return report

    def _solve(self, solve: Solve) -> dict[str, Any]:
        """The stage's closed form in place of steps. Every process computes the same."""
        started = time.monotonic()
        self.around.reporter.start(self.stage.name, 1, 0)
        self.stage.module.eval()
        if self.stage.prepare is not None:
            self.stage.prepare()
        with torch.no_grad():
            if self.stage.rated:
                solved = solve(self._rated_chunks(self.rated_train), self._rated_chunks(self.rated_val))
            else:
                solved = solve(self._chunks(self.train), self._chunks(self.val))
        self.around.reporter.finish()
        self._standardize()
        report = {**self._report(time.monotonic() - started, first=0), "solved": dict(solved)}
        self._save(finished=True, report=report)
        return report

    def _chunks(self, pairs: Sequence[EncodedPair]) -> Iterator[Any]:
        for start in range(0, len(pairs), self.config.batch_size):
            yield self._batch(pairs[start : start + self.config.batch_size])

    def _rated_chunks(self, rows: Sequence[EncodedRated]) -> Iterator[Batch]:
        for start in range(0, len(rows), self.config.batch_size):
            chunk = rows[start : start + self.config.batch_size]
            yield rated_batch(chunk, self.around.pad_id).to(self.accelerator.device)

    def _one_step(self, model: nn.Module) -> None:
        step = self.progress.step
        seed = stable_seed(self.around.seed, self.stage.name, step, self.accelerator.process_index)
        torch.manual_seed(seed)
        rows = self._rows(step)
        model.train()
        learning_rate = self._set_learning_rate(step)
        loss, num_right, num_tied = self._backward(model, rows)
        norm = self._clip()
        if not math.isfinite(norm):
            names = [_name(self.train[i]) for i in rows]
            raise NonFiniteError(
                f"{self.stage.name}, step {step}: the gradient is not finite; weights are as before this step. "
                f"Rows of the batch: {', '.join(names[:10])}" + (f" and {len(names) - 10} more" if names[10:] else "")
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step = step + 1
        if step % LOG_EVERY == 0 or step + 1 == self.num_steps:
            record = {
                "train/loss": loss / len(rows),
                f"train/{self.stage.objective.name}": num_right / len(rows),
                "train/ties": num_tied,
                "train/grad_norm": norm,
                "train/learning_rate": learning_rate,
            }
            self._log(record)
            self.around.reporter.step(step + 1, f"loss {record['train/loss']:.3f}")
        self._after_step(model)

    def _clip(self) -> float:
        """Clip the gradient, that of each expert by itself where the stage holds several; returns the largest norm."""
        groups = self.stage.experts or (self.stage.learn,)
        norms = [self.accelerator.clip_grad_norm_(group, self.config.max_grad_norm) for group in groups]
        return float(torch.stack([torch.as_tensor(norm) for norm in norms]).max())  # NaN wherever one of them is

    def _weights(self, rows: Sequence[int], part: Sequence[int]) -> Tensor:
        """What each pair of `part` weighs in a sum that is divided by the number of the step's `rows`."""
        if not self.stage.experts:
            return torch.ones(len(part))
        of_expert = Counter(self._expert_of(self.train[r]) for r in rows)
        return torch.tensor([len(rows) / of_expert[self._expert_of(self.train[r])] for r in part])

    def _expert_of(self, pair: EncodedPair) -> int:
        """The number of the expert that a pair trains, where the stage holds several."""
        return pair.domain if self.stage.expert_of is None else self.stage.expert_of(pair.preference)

    def _after_step(self, model: nn.Module) -> None:
        step = self.progress.step
        last = step == self.num_steps
        if self.val and (step % self.eval_steps == 0 or last):
            self._evaluate(model)
        if step % self.config.checkpoint_every == 0 and not last:
            self._save(finished=False, report={})

    def _rows(self, step: int) -> list[int]:
        """The pairs of a step, over all processes."""
        epoch, place = divmod(step, self.batches_per_epoch)
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            self._batches = epoch_batches(
                [p.num_tokens for p in self.train],
                [p.domain for p in self.train],
                batch_size=self.config.batch_size,
                temperature=self.config.domain_temperature,
                seed=stable_seed(self.around.seed, self.stage.name, "epoch", epoch),
            )
        return self._batches[place]

    def _backward(self, model: nn.Module, rows: list[int]) -> tuple[float, int, int]:
        """Gradients of the mean loss over `rows`, whatever the number of processes and of backward passes."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        mine = rows[rank::world]
        # DDP averages over processes, the loss is a mean over all pairs of the step; a process left without a pair
        # still has to take part.
        weight = world / len(rows) if mine else 0.0
        mine = mine or rows[:1]
        size = -(-len(mine) // self.config.accumulate)
        parts = [mine[i : i + size] for i in range(0, len(mine), size)]
        total = torch.zeros(3, dtype=torch.float64)
        for i, part in enumerate(parts):
            batch = self._batch([self.train[r] for r in part])
            sync = nullcontext() if i + 1 == len(parts) else self.accelerator.no_sync(model)
            with sync:
                outcome = self._outcome(model, batch)
                refuse_non_finite(outcome, batch, f"{self.stage.name}, step {self.progress.step}")
                loss = (outcome.loss_B * self._weights(rows, part).to(outcome.loss_B.device)).sum() * weight
                if outcome.extra is not None:
                    loss = loss + outcome.extra * (len(part) * weight)
                self.accelerator.backward(loss)
            counts = (outcome.loss_B.detach(), outcome.right_B, outcome.tie_B)
            total += torch.stack([c.double().sum().cpu() for c in counts]) * (weight > 0)
        total = self._sum(total)
        return float(total[0]), int(total[1]), int(total[2])

    def _outcome(self, model: nn.Module, batch: Any) -> Outcome:
        device = self.accelerator.device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.config.dtype == "bf16"):
            output = model(batch)
        return self.stage.objective(output, batch)

    def _batch(self, pairs: Sequence[Any]) -> Any:
        if self.stage.rated:
            return rated_batch(pairs, self.around.pad_id).to(self.accelerator.device)
        batch = pair_batch(pairs, self.around.pad_id)
        if self.stage.experts:
            expert_B = torch.tensor([self._expert_of(pair) for pair in pairs])
            batch = replace(batch, expert_N=torch.cat([expert_B, expert_B]))
        return batch.to(self.accelerator.device)

    @torch.no_grad()
    def _evaluate(self, model: nn.Module) -> None:
        """Loss and accuracy on the held-out pairs, per domain; keeps the best weights; decides to stop."""
        was_training = model.training
        model.eval()
        num_domains = len(self.around.domains) + 1  # the last place: pairs of no known domain
        sums = torch.zeros(num_domains, 3, dtype=torch.float64)
        for chunk in self._eval_chunks():
            batch = self._batch(chunk)
            outcome = self._outcome(model, batch)
            refuse_non_finite(outcome, batch, f"{self.stage.name}, evaluation after step {self.progress.step}")
            domain_B = outcome.domain_B.cpu() % num_domains
            values = torch.stack([torch.ones(len(chunk)), outcome.right_B.cpu(), outcome.loss_B.cpu()], dim=1)
            sums.index_add_(0, domain_B, values.double())
        model.train(was_training)
        record = self._eval_record(self._sum(sums))
        value = self._watched(record)
        self.progress.history.append({"step": self.progress.step, **record})
        self._log(record)
        if self.progress.best_value is None or value > self.progress.best_value:
            self.progress.best_value, self.progress.best_step, self.progress.num_stale = value, self.progress.step, 0
            self.best = {k: v.detach().clone() for k, v in self.names.items()}
        else:
            self.progress.num_stale += 1
            self.progress.stopped = 0 < self.config.patience <= self.progress.num_stale
        self.around.reporter.step(self.progress.step, f"val {self.stage.objective.name} {record['eval/mean']:.3f}")

    def _eval_chunks(self) -> Iterator[list[EncodedPair]]:
        mine = self.val[self.accelerator.process_index :: self.accelerator.num_processes]
        mine = sorted(mine, key=lambda p: p.num_tokens)
        for start in range(0, len(mine), self.config.batch_size):
            yield mine[start : start + self.config.batch_size]

    def _eval_record(self, sums: Tensor) -> dict[str, float]:
        names = [*self.around.domains, "(unknown)"]
        seen = [i for i in range(len(names)) if sums[i, 0] > 0]
        record = {f"eval/{names[i]}/{self.stage.objective.name}": float(sums[i, 1] / sums[i, 0]) for i in seen}
        record["eval/mean"] = sum(record.values()) / max(len(record), 1)
        record["eval/micro"] = float(sums[:, 1].sum() / sums[:, 0].sum())
        record["eval/loss"] = float(sums[:, 2].sum() / sums[:, 0].sum())
        return record

    def _watched(self, record: dict[str, float]) -> float:
        metric = self.config.metric
        if metric == "loss":
            return -record["eval/loss"]
        key = f"eval/{metric}" if metric in ("mean", "micro") else f"eval/{metric}/{self.stage.objective.name}"
        if key not in record:
            # A stage that does not see the watched domain is judged by its own mean.
            return record["eval/mean"]
        return record[key]

    @torch.no_grad()
    def _standardize(self) -> None:
        """Fit the expert's zero and unit on the raw rewards of evenly spaced training pairs, both responses."""
        if self.stage.standardize is not None:
            self._fit_zero_and_unit(self.stage.standardize, self.train)
        for expert, standardize in enumerate(self.stage.standardizers):
            self._fit_zero_and_unit(standardize, [pair for pair in self.train if self._expert_of(pair) == expert])

    def _fit_zero_and_unit(self, standardize: Standardize, train: Sequence[EncodedPair]) -> None:
        standardize.reset()
        pairs = sorted(evenly_spaced(train, STANDARDIZE_PAIRS), key=lambda p: p.num_tokens)
        self.stage.module.eval()
        chunks = [pairs[start : start + 32] for start in range(0, len(pairs), 32)]
        rewards = [self.stage.module(self._batch(chunk)).reward_N.float().cpu() for chunk in chunks]
        standardize.fit(torch.cat(rewards).to(standardize.mean.device))

    def _make_optimizer(self) -> torch.optim.Optimizer:
        matrices = [p for p in self.stage.learn if p.dim() > 1]
        others = [p for p in self.stage.learn if p.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=self._learning_rate)

    @property
    def _learning_rate(self) -> float:
        own = self.stage.learning_rate
        return (self.config.learning_rate or 0.0) if own is None else own

    def _set_learning_rate(self, step: int) -> float:
        rate = self._learning_rate * schedule(self.config, step, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _sum(self, values: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return values
        return self.accelerator.reduce(values.to(self.accelerator.device), "sum").cpu()  # type: ignore[no-any-return]

    def _log(self, record: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            self.around.metrics.write({"stage": self.stage.name, "step": self.progress.step, **record})
        self.accelerator.log({f"{self.stage.name}/{k}": v for k, v in record.items()}, step=self.progress.step)

    def _report(self, seconds: float, first: int) -> dict[str, Any]:
        return {
            "stage": self.stage.name,
            "pairs": 0 if self.stage.rated else len(self.train),
            "val_pairs": 0 if self.stage.rated else len(self.val),
            **({"rated": len(self.rated_train), "val_rated": len(self.rated_val)} if self.stage.rated else {}),
            "steps": self.progress.step,
            "stopped_early": self.progress.stopped,
            "best_step": self.progress.best_step,
            "best_value": self.progress.best_value,
            "seconds": round(seconds, 1),
            "resumed_from_step": first,
            "parameters_trained": sum(p.numel() for p in self.stage.learn),
            "evals": self.progress.history,
        }

    def _copy_in(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in tensors.items():
                self.names[name].copy_(value)

    def _save(self, *, finished: bool, report: dict[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        tensors = {"model": {k: v.detach() for k, v in self.names.items()}}
        if not finished:
            tensors["optimizer"] = self._optimizer_tensors()
            if self.best:
                tensors["best"] = self.best
        state = {
            "finished": finished,
            "report": report,
            "progress": vars(self.progress),
        }
        # An early stop may come right after a checkpoint of the same step.
        self.store.save(self.progress.step + finished, tensors, state)

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        by_id = {id(v): k for k, v in self.names.items()}
        return {
            f"{by_id[id(p)]}|{key}": value for p in self.stage.learn for key, value in self.optimizer.state[p].items()
        }

    def _resume(self, checkpoint: Checkpoint) -> None:
        self._copy_in(checkpoint.tensors("model"))
        self.progress = Progress(**checkpoint.state["progress"])
        if self.progress.best_value is not None:
            self.best = checkpoint.tensors("best")
        stored = checkpoint.tensors("optimizer")
        for name, parameter in self.names.items():
            state = {k.split("|")[1]: v for k, v in stored.items() if k.split("|")[0] == name}
            if state:
                self.optimizer.state[parameter] = state
        self.around.reporter.say(f"{self.stage.name}: going on from step {self.progress.step}")


def _name(row: EncodedPair | EncodedRated) -> str:
    return row.preference.name if isinstance(row, EncodedPair) else row.rated.conversation.id or row.rated.source


def evenly_spaced(rows: Sequence[EncodedPair], limit: int) -> list[EncodedPair]:
    """At most `limit` rows from beginning to end."""
    num = min(len(rows), limit)
    return [rows[i * len(rows) // num] for i in range(num)]


def schedule(config: TrainConfig, step: int, num_steps: int) -> float:
    """Factor of the learning rate at a step: linear warm-up, then decay to 0 (or none)."""
    warmup = config.warmup * num_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    share = (step - warmup) / max(num_steps - warmup, 1)
    if config.schedule == "constant":
        return 1.0
    return 1 - share if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))


def make_accelerator(config: TrainConfig, folder: str) -> Accelerator:
    """The process group and device; refuses another number of processes than asked, and bf16 without hardware."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    device = _chosen_device(config.device)
    _meet_after_a_restart(on_cpu=device.type == "cpu")
    try:
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            log_with=list(config.trackers) or None,
            project_dir=folder,
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=True),
                InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT),
            ],
        )
    except ValueError as error:
        raise ConfigError(f"train.trackers: {list(config.trackers)}: {error}") from error
    if config.processes is not None and accelerator.num_processes != config.processes:
        raise ConfigError(
            f"train.processes: {config.processes} asked for, {accelerator.num_processes} running. "
            f"Start with: torchrun --nproc-per-node {config.processes} -m moreward train …"
        )
    if config.dtype == "bf16" and not has_bf16(accelerator.device):
        raise ConfigError(f"train.dtype: bf16 is not there on {accelerator.device}; use fp32")
    return accelerator


def _chosen_device(name: str) -> torch.device:
    """What `train.device` means in this process; `cuda:N` becomes what `cuda` means. ConfigError where it is not
    there, or another than this process has trained on, for accelerate settles the device once and stays with it."""
    from accelerate import PartialState

    settled = PartialState._shared_state.get("device")
    if name == "auto" and settled is not None:
        return settled  # type: ignore[no-any-return]
    device = pick_device(name, key="train.device")
    if settled is not None and settled.type != device.type:
        raise ConfigError(
            f"train.device: {name!r} is asked for, but this process has trained on {settled} already; "
            "start another process"
        )
    if device.index is not None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                f"train.device: {name!r} is for one process; with several each takes its own GPU: use train.device=cuda"
            )
        torch.cuda.set_device(device)
    return device


def _meet_after_a_restart(*, on_cpu: bool) -> None:
    """Join the other processes under names of this attempt. torchrun keeps one store over its restarts, so under the
    usual names a process may find the addresses of those that died."""
    told = os.environ
    attempt = told.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or told.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    size = int(told["WORLD_SIZE"])
    store = dist.TCPStore(  # type: ignore[attr-defined]
        told["MASTER_ADDR"], int(told["MASTER_PORT"]), size, is_master=False, timeout=COLLECTIVE_TIMEOUT
    )
    dist.init_process_group(
        "gloo" if on_cpu else "nccl",
        store=dist.PrefixStore(f"attempt-{attempt}", store),  # type: ignore[attr-defined]
        rank=int(told["RANK"]),
        world_size=size,
        timeout=COLLECTIVE_TIMEOUT,
    )


def has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
