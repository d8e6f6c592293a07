"""Contestants that train. One run is an epoch from the same start; its outputs are the losses of the steps.

B pairs, N conversations (N = 2B, chosen first), D hidden. Constant learning rate, no dropout, so that the losses of
two programs that see the same batches must agree.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import shapes
from benchmarks.peers import Run
from moreward.checkpoint import CheckpointStore
from moreward.config import TrainConfig
from moreward.data.batches import Encoded, EncodedPair, pair_batch
from moreward.nn.losses import Objective, Outcome, PairwiseLoss
from moreward.nn.trunk import TrunkStore
from moreward.systems import arliss, base_lora, baseline
from moreward.systems._base import LoRAConfig, Stage, System, SystemConfig
from moreward.train.loop import Fit, Surroundings, make_accelerator
from moreward.train.plan import epoch_batches, stable_seed
from moreward.train.track import MetricsFile, Silent
from moreward.types import Batch, Preference

FULL_RATE, LORA_RATE, WEIGHT_DECAY, RANK = 3e-5, 5e-4, 0.01, 12


@dataclass
class Recorded:
    """An objective that keeps the mean loss of every step."""

    objective: Objective
    losses: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.objective.name

    def __call__(self, output: Any, batch: Batch) -> Outcome:
        outcome = self.objective(output, batch)
        self.losses.append(float(outcome.loss_B.mean()))
        return outcome


def make_pairs(num: int, *, num_domains: int = 1, seed: int = 0) -> list[EncodedPair]:
    """Pairs of real lengths; the first quarter of the chosen text is the prompt, and domains take turns."""
    rows = shapes.texts(shapes.lognormal_lengths(2 * num, seed), seed)
    made = []
    for i in range(num):
        chosen, rejected = rows[2 * i], rows[2 * i + 1]
        domain = i % num_domains
        name = Preference(prompt="", chosen="a", rejected="b", domain=f"domain-{domain}", id=str(i))
        prompt = tuple(chosen[: max(len(chosen) // 4, 4)])
        made.append(EncodedPair(name, Encoded(tuple(chosen), prompt), Encoded(tuple(rejected), prompt), domain))
    return made


def our_order(pairs: Sequence[EncodedPair], stage: str, batch_size: int) -> list[list[int]]:
    """The batches that `train.loop` makes of these pairs in its first epoch."""
    return epoch_batches(
        [p.num_tokens for p in pairs],
        [p.domain for p in pairs],
        batch_size=batch_size,
        temperature=1.0,
        seed=stable_seed(0, stage, "epoch", 0),
    )


def shuffled(num: int, batch_size: int) -> list[list[int]]:
    """Random batches, as a trainer makes them that knows nothing of lengths."""
    order = torch.randperm(num, generator=torch.Generator().manual_seed(0)).tolist()
    return [order[i : i + batch_size] for i in range(0, num, batch_size)]


def remember(module: nn.Module) -> Callable[[], None]:
    """A function that brings the module back to where it stands now."""
    start = {k: v.detach().clone() for k, v in module.state_dict().items()}
    return partial(module.load_state_dict, start)  # type: ignore[return-value]


def _fit(system: System, stages: Iterable[Stage], pairs: Sequence[EncodedPair], batch_size: int, rate: float) -> None:
    """Train through the product's own loop, as `moreward train` does, without evaluation."""
    config = TrainConfig(
        learning_rate=rate, batch_size=batch_size, epochs=1, warmup=0.0, schedule="constant", device="cpu"
    )
    with tempfile.TemporaryDirectory() as folder:
        domains = tuple(sorted({p.preference.domain for p in pairs}))
        around = Surroundings(
            accelerator=make_accelerator(config, folder),
            config=config,
            seed=0,
            pad_id=0,
            domains=domains,
            metrics=MetricsFile(Path(folder) / "metrics.jsonl"),
            reporter=Silent(),
        )
        for number, stage in enumerate(stages):
            learn = {id(p) for p in stage.learn}
            for parameter in system.parameters():
                parameter.requires_grad_(id(parameter) in learn)
            names: dict[str, Tensor] = {k: p for k, p in system.named_parameters() if id(p) in learn}
            seen = [p for p in pairs if stage.select(p.preference)]
            store = CheckpointStore(Path(folder) / str(number), hashes={})
            Fit(replace(stage, standardize=None), names, seen, [], around, store).run()


def _our_run(system: System, pairs: Sequence[EncodedPair], batch_size: int, rate: float) -> Run:
    objective = Recorded(PairwiseLoss())
    reset = remember(system)

    def run() -> list[float]:
        reset()
        objective.losses.clear()
        _fit(system, system.stages(objective), pairs, batch_size, rate)
        return list(objective.losses)

    return run


def ours_full(shape: str, *, num_pairs: int, batch_size: int) -> Run:
    """One model, all of its weights."""
    system = baseline.Recipe(SystemConfig(), shapes.backbone(shape), ["domain-0"])
    shapes.fill_head(system.expert.head.last, 0)
    return _our_run(system, make_pairs(num_pairs), batch_size, FULL_RATE)


def _lora_settings(shape: str, kind: type[LoRAConfig], **more: Any) -> Any:
    targets = tuple(shapes.targets(shape))
    return kind(rank=RANK, alpha=shapes.ALPHA_PER_RANK * RANK, dropout=0.0, targets=targets, **more)


def ours_lora(shape: str, *, num_pairs: int, batch_size: int, top_layers: int | None = None) -> Run:
    """One adapter in every linear layer, and a head; or in the `top_layers` only, the states below them being kept:
    all runs but the warm-up are then epochs from the second on."""
    backbone = shapes.backbone(shape)
    settings = _lora_settings(shape, LoRAConfig, adapter_layers=top_layers)
    system = base_lora.Recipe(settings, backbone, ["domain-0"])
    assert backbone.bank is not None
    if top_layers is not None:
        backbone.trunk_store = TrunkStore(Path(tempfile.mkdtemp(prefix="moreward-benchmark-")))
    shapes.fill_bank(backbone.bank, trained=False)
    shapes.fill_head(system.expert.experts.head("shared").last, 0)
    return _our_run(system, make_pairs(num_pairs), batch_size, LORA_RATE)


def ours_mixture(shape: str, *, num_pairs: int, batch_size: int, num_domains: int = 5) -> Run:
    """Five experts and the router of ARLISS, every pair once by its expert and once by the router."""
    domains = [f"domain-{d}" for d in range(num_domains)]
    backbone = shapes.backbone(shape)
    system = arliss.Recipe(_lora_settings(shape, arliss.ArlissConfig), backbone, domains)
    return _our_run(system, make_pairs(num_pairs, num_domains=num_domains), batch_size, LORA_RATE)


def _dataset(pairs: Sequence[EncodedPair], order: Sequence[int]) -> Any:
    from datasets import Dataset

    rows = [pairs[i] for i in order]
    return Dataset.from_dict(
        {"chosen_ids": [list(p.chosen.ids) for p in rows], "rejected_ids": [list(p.rejected.ids) for p in rows]}
    )


def _trl_trainer(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    order: Sequence[int],
    folder: str,
    losses: list[float],
    *,
    batch_size: int,
    rate: float,
    peft_config: Any = None,
    **settings: Any,
) -> Any:
    from trl import RewardConfig, RewardTrainer

    from moreward.nn.backbone import load_tokenizer

    class Recording(RewardTrainer):  # the log rounds
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            found = super().compute_loss(*args, **kwargs)
            losses.append(float(found[0] if isinstance(found, tuple) else found))
            return found

    arguments = RewardConfig(
        output_dir=folder,
        per_device_train_batch_size=batch_size,
        num_train_epochs=1,
        learning_rate=rate,
        lr_scheduler_type="constant",
        weight_decay=WEIGHT_DECAY,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        **settings,
    )
    return Recording(
        model=model,
        args=arguments,
        train_dataset=_dataset(pairs, order),
        processing_class=load_tokenizer("minilm"),
        peft_config=peft_config,
    )


def trl_full(shape: str, *, num_pairs: int, batch_size: int, ours: bool = False, fp32: bool = True) -> Run:
    """TRL's RewardTrainer. `ours`: on the batches that our loop makes; else in random order. `fp32`: without mixed
    precision and gradient checkpointing; else as it comes."""
    model = shapes.classifier(shape)
    pairs = make_pairs(num_pairs)
    order = our_order(pairs, "reward", batch_size) if ours else shuffled(num_pairs, batch_size)
    reset = remember(model)
    settings = {"bf16": False, "gradient_checkpointing": False} if fp32 else {}

    def run() -> list[float]:
        reset()
        losses: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            _trl_trainer(
                model, pairs, list(chain(*order)), folder, losses, batch_size=batch_size, rate=FULL_RATE, **settings
            ).train()
        return losses

    return run


def trl_lora_runs(shape: str, *, num_pairs: int, batch_size: int, num_domains: int = 5, router: bool = True) -> Run:
    """A TRL run with a LoRA adapter for every domain, one after another, then a router by PEFT on the prompts."""
    from peft import LoraConfig

    pairs = make_pairs(num_pairs, num_domains=num_domains)
    settings = LoraConfig(
        r=RANK,
        lora_alpha=shapes.ALPHA_PER_RANK * RANK,
        target_modules=shapes.targets(shape),
        modules_to_save=["classifier"],
        task_type="SEQ_CLS",
    )

    def run() -> list[float]:
        losses: list[float] = []
        for domain in range(num_domains):
            seen = [p for p in pairs if p.domain == domain]
            order = list(chain(*shuffled(len(seen), batch_size)))
            with tempfile.TemporaryDirectory() as folder:
                model = shapes.classifier(shape)
                options = {"bf16": False, "gradient_checkpointing": False, "peft_config": settings}
                _trl_trainer(
                    model, seen, order, folder, losses, batch_size=batch_size, rate=LORA_RATE, **options
                ).train()
        return losses + (_peft_router(shape, pairs, batch_size, num_domains) if router else [])

    return run


def _peft_router(shape: str, pairs: Sequence[EncodedPair], batch_size: int, num_domains: int) -> list[float]:
    model = shapes.headless(shapes.classifier(shape))
    gate = nn.Linear(model.config.hidden_size, num_domains)
    peft = shapes.peft_model(model, shape, num_adapters=1, rank=RANK, trained=False).train()

    def loss(rows: Sequence[int]) -> Tensor:
        ids_NT, mask_NT = shapes.padded([pairs[i].chosen.prompt_ids for i in rows])
        logits = gate(peft(input_ids=ids_NT, attention_mask=mask_NT).logits)
        return F.cross_entropy(logits, torch.tensor([pairs[i].domain for i in rows]))

    return _loop([*peft.parameters(), *gate.parameters()], loss, shuffled(len(pairs), batch_size), LORA_RATE)


def peft_lora(shape: str, *, num_pairs: int, batch_size: int, ours: bool = False) -> Run:
    """A plain loop over PEFT on the padded Hugging Face model. `ours`: on the batches that our loop makes."""
    model = shapes.headless(shapes.classifier(shape))
    head = shapes.head(model.config.hidden_size, 0)
    peft = shapes.peft_model(model, shape, num_adapters=1, rank=RANK, trained=False).train()
    both = nn.ModuleList([peft, head])
    reset = remember(both)
    pairs = make_pairs(num_pairs)
    order = our_order(pairs, "reward", batch_size) if ours else shuffled(num_pairs, batch_size)

    def loss(rows: Sequence[int]) -> Tensor:
        batch = pair_batch([pairs[i] for i in rows], 0)
        reward_N = head(peft(input_ids=batch.ids_NT, attention_mask=batch.mask_NT).logits)[:, 0]
        return -F.logsigmoid(reward_N[: len(rows)] - reward_N[len(rows) :]).mean()

    def run() -> list[float]:
        reset()
        return _loop(list(both.parameters()), loss, order, LORA_RATE)

    return run


def _loop(
    parameters: list[nn.Parameter], loss: Callable[[Sequence[int]], Tensor], order: list[list[int]], rate: float
) -> list[float]:
    """Steps of AdamW as trainers do them: matrices decay, gradients are clipped at norm 1."""
    learn = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in learn if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in learn if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    losses = []
    for rows in order:
        value = loss(rows)
        value.backward()
        torch.nn.utils.clip_grad_norm_(learn, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(value))
    return losses


def _decoder_pairs(num: int, prompt: int, response: int, *, shared: bool) -> list[EncodedPair]:
    rows = shapes.texts([prompt, response, response, prompt] * num)
    made = []
    for i in range(num):
        first, chosen, rejected, other = rows[4 * i : 4 * i + 4]
        second = first if shared else other
        name = Preference(prompt="", chosen="a", rejected="b", id=str(i))
        sides = [Encoded(tuple(p + r), tuple(p)) for p, r in ((first, chosen), (second, rejected))]
        made.append(EncodedPair(name, *sides, 0))
    return made


def hf_decoder_pairs(shape: str, *, num_pairs: int, prompt: int, response: int) -> Run:
    """Forward and backward over both sides of every pair, the prompt twice."""
    model = shapes.classifier(shape).train()
    batch = pair_batch(_decoder_pairs(num_pairs, prompt, response, shared=True), 0)

    def reward() -> Tensor:
        return model(input_ids=batch.ids_NT, attention_mask=batch.mask_NT, use_cache=False).logits[:, 0]  # type: ignore[no-any-return]

    return _pair_step(model, reward, num_pairs)


def ours_decoder_pairs(shape: str, *, num_pairs: int, prompt: int, response: int, shared: bool = True) -> Run:
    """The same through the recipe. `shared` False gives the two sides prompts that differ, so nothing is shared."""
    backbone = shapes.backbone(shape)
    system = baseline.Recipe(SystemConfig(), backbone, ["domain-0"]).train()
    shapes.fill_head(system.expert.head.last, 0)
    batch = pair_batch(_decoder_pairs(num_pairs, prompt, response, shared=shared), 0)
    return _pair_step(system, lambda: system(batch).reward_N, num_pairs)


def _pair_step(module: nn.Module, reward: Callable[[], Tensor], num_pairs: int) -> Run:
    def run() -> Tensor:
        module.zero_grad(set_to_none=True)
        reward_N = reward()
        loss = -F.logsigmoid(reward_N[:num_pairs] - reward_N[num_pairs:]).mean()
        loss.backward()
        return torch.cat([loss.detach().reshape(1), reward_N.detach()])

    return run
