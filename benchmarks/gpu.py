"""On a GPU: conversations of varied lengths, each under an adapter of its own, by 5, 20 and 100 adapters of rank 12.

Ours in fp32, in bf16 and `deterministic` (a text a forward), our engine without adapters (the floor), the Hugging Face
model padded, PEFT with `set_adapter` before each group of rows and with `adapter_names`; then the recipe ARLISS with
its router. All in one process, taking turns in every round; TF32 is off.

python -m benchmarks.gpu --out DIR [--seconds 240] [--rounds 5] [--case bert] [--quick] [--device cuda]

Adds one JSON line a case to DIR/gpu.jsonl. It ends after about `--seconds`: slow contestants get fewer conversations,
and cases and contestants that there was no time for are written down as such.
"""

from __future__ import annotations

import argparse
import gc
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import shapes
from benchmarks.harness import append, exactness, spread
from benchmarks.machine import PACKAGES, commit, installed
from benchmarks.ours import in_precision
from benchmarks.peers import gate_of
from moreward.errors import ConfigError
from moreward.nn.backbone import Backbone
from moreward.scoring import TOKENS_PER_FORWARD, pick_device
from moreward.systems.arliss import ArlissConfig, Recipe
from moreward.types import Batch

RANK = 12
BUDGET = TOKENS_PER_FORWARD["cuda"]
FEWEST = 8
"""Conversations of a round at least."""
HF, HF_BF16 = "HF, no adapters", "HF, no adapters, bf16"
GROUP, MIXED = "PEFT set_adapter per group", "PEFT adapter_names"
OURS, BF16, ONE = "ours", "ours, bf16", "ours, deterministic"
FLOOR, FLOOR_BF16 = "ours, no adapters", "ours, no adapters, bf16"

REFUSED = "does not run: PEFT wants a row of every adapted layer's input for each text; DeBERTa's positions have none"

Run = Callable[[int], Tensor]
"""Rewards of the first so many conversations, in their order."""


@dataclass(frozen=True)
class Work:
    """Conversations with an adapter each."""

    rows: list[list[int]]
    adapters: list[int]

    @classmethod
    def drawn(cls, num_rows: int, num_adapters: int) -> Work:
        generator = torch.Generator().manual_seed(1)
        adapters = torch.randint(num_adapters, (num_rows,), generator=generator).tolist()
        return cls(shapes.texts(shapes.lognormal_lengths(num_rows)), adapters)

    def in_order(self, num_rows: int, *, one_by_one: bool = False) -> list[list[int]]:
        """Neighbours, up to the scorer's number of tokens in a forward."""
        batches: list[list[int]] = [[]]
        num_tokens = 0
        for row, tokens in enumerate(self.rows[:num_rows]):
            if batches[-1] and (one_by_one or num_tokens + len(tokens) > BUDGET):
                batches.append([])
                num_tokens = 0
            batches[-1].append(row)
            num_tokens += len(tokens)
        return batches

    def by_length(self, rows: Sequence[int]) -> list[list[int]]:
        """As many rows of similar length as keep the padded tokens within the same number."""
        batches = shapes.budget_batches([len(self.rows[row]) for row in rows], BUDGET)
        return [[rows[place] for place in batch] for batch in batches]

    def by_adapter(self, num_rows: int) -> list[tuple[int, list[int]]]:
        order = sorted(range(num_rows), key=lambda row: self.adapters[row])
        return [(adapter, list(rows)) for adapter, rows in groupby(order, key=lambda row: self.adapters[row])]


@dataclass
class Contestant:
    name: str
    make: Callable[[], Run]
    reference: str = ""
    needs: str = ""
    status: str = ""
    run: Run | None = None
    num_rows: int = 0
    outputs: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_mb: float = 0.0


class Models:
    """The models of one shape on a device, each made when it is first asked for; adapters are added as cases need
    them."""

    def __init__(self, shape: str, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self._engines: dict[bool, Backbone] = {}
        self._plain: dict[bool, nn.Module] = {}
        self._peft: Any = None
        self.head: nn.Linear | None = None

    def engine(self, num_adapters: int, *, bf16: bool) -> Backbone:
        if bf16 not in self._engines:
            backbone = shapes.backbone(self.shape)
            shapes.bank(backbone, self.shape, num_adapters=0, rank=RANK)
            self._engines[bf16] = backbone.to(self.device)
        backbone = self._engines[bf16]
        assert backbone.bank is not None
        with torch.random.fork_rng(devices=[]):
            for number in range(len(backbone.bank.names), num_adapters):
                torch.manual_seed(number)
                for matrix in backbone.bank.add(str(number)).B.values():
                    nn.init.normal_(matrix, std=0.02)
        in_precision(backbone.to(self.device), bf16=bf16)
        self.head = self.head or shapes.head(backbone.hidden_size, 0).to(self.device)
        return backbone

    def ours(self, work: Work, num_adapters: int, *, bf16: bool = False, one_by_one: bool = False) -> Run:
        """`num_adapters` 0: the bare model."""
        backbone, head = self.engine(num_adapters, bf16=bf16), self.head
        assert head is not None

        def run(num_rows: int) -> Tensor:
            rewards = []
            for rows in work.in_order(num_rows, one_by_one=one_by_one):
                ids_NT, mask_NT = self._padded(work, rows)
                adapter_N = torch.tensor([work.adapters[r] for r in rows], device=self.device) if num_adapters else None
                rewards.append(head(backbone(ids_NT, mask_NT, adapter_N))[:, 0])
            return torch.cat(rewards)

        return run

    def hf(self, work: Work, *, bf16: bool = False) -> Run:
        if bf16 not in self._plain:
            model = shapes.headless(shapes.classifier(self.shape))
            self._plain[bf16] = model.to(device=self.device, dtype=torch.bfloat16 if bf16 else torch.float32)
        return self._padded_run(work, self._plain[bf16], lambda num_rows: [([*range(num_rows)], {})])

    def peft(self, work: Work, num_adapters: int, how: str) -> Run:
        model = self._peft_model(num_adapters)
        if how == MIXED:
            return self._padded_run(work, model, lambda num_rows: [([*range(num_rows)], {"mixed": True})])
        return self._padded_run(
            work, model, lambda num_rows: [(rows, {"adapter": adapter}) for adapter, rows in work.by_adapter(num_rows)]
        )

    def _padded_run(
        self, work: Work, model: Any, parts: Callable[[int], list[tuple[list[int], dict[str, Any]]]]
    ) -> Run:
        """Each part of the rows sorted by length under the budget, after `set_adapter` where one is named."""
        size = model.config.hidden_size
        head = self.head = self.head or shapes.head(size, 0).to(self.device)

        def run(num_rows: int) -> Tensor:
            reward_N = torch.empty(num_rows, device=self.device)
            for members, how in parts(num_rows):
                if "adapter" in how:
                    model.set_adapter(str(how["adapter"]))
                for rows in work.by_length(members):
                    ids_NT, mask_NT = self._padded(work, rows)
                    more = {"adapter_names": [str(work.adapters[r]) for r in rows]} if "mixed" in how else {}
                    if getattr(model.config, "use_cache", False):
                        more["use_cache"] = False
                    hidden_ND = model(input_ids=ids_NT, attention_mask=mask_NT, **more).logits
                    reward_N[rows] = head(hidden_ND.float())[:, 0]
            return reward_N

        return run

    def _peft_model(self, num_adapters: int) -> Any:
        """PEFT with the adapters that ours has."""
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(
            r=RANK, lora_alpha=shapes.ALPHA_PER_RANK * RANK, target_modules=shapes.targets(self.shape), lora_dropout=0.0
        )
        ours = self.engine(num_adapters, bf16=False)
        bank = ours.bank
        assert bank is not None
        inside = "" if ours.pooling == "own" else f"{ours.base_prefix}."
        model = None if self._peft else shapes.headless(shapes.classifier(self.shape).to(self.device))
        with torch.device(self.device):
            if model is not None:
                self._peft = get_peft_model(model, settings, adapter_name="0").eval()
            for number in range(len(self._peft.peft_config), num_adapters):
                self._peft.add_adapter(str(number), settings)
        with torch.no_grad():
            for number in range(num_adapters):
                for name, (A_RI, B_OR) in bank.weights(number).items():
                    layer = self._peft.get_submodule(f"base_model.model.{inside}{name}")
                    layer.lora_A[str(number)].weight.copy_(A_RI)
                    layer.lora_B[str(number)].weight.copy_(B_OR)
        return self._peft.eval()

    def _padded(self, work: Work, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        ids_NT, mask_NT = shapes.padded([work.rows[row] for row in rows])
        return ids_NT.to(self.device), mask_NT.to(self.device)


def adapters(models: Models, num_rows: int, num_adapters: int) -> list[Contestant]:
    work = Work.drawn(num_rows, num_adapters)
    return [
        Contestant(OURS, lambda: models.ours(work, num_adapters)),
        Contestant(BF16, lambda: models.ours(work, num_adapters, bf16=True), reference=OURS),
        Contestant(ONE, lambda: models.ours(work, num_adapters, one_by_one=True), reference=OURS),
        Contestant(FLOOR, lambda: models.ours(work, 0)),
        Contestant(FLOOR_BF16, lambda: models.ours(work, 0, bf16=True), reference=FLOOR),
        Contestant(HF, lambda: models.hf(work), reference=FLOOR),
        Contestant(HF_BF16, lambda: models.hf(work, bf16=True), reference=FLOOR),
        Contestant(GROUP, lambda: models.peft(work, num_adapters, GROUP), reference=OURS, needs="peft"),
        Contestant(
            MIXED,
            lambda: models.peft(work, num_adapters, MIXED),
            reference=OURS,
            needs="peft",
            status=REFUSED if models.shape.startswith("deberta") else "",
        ),
    ]


def arliss(shape: str, device: torch.device, num_rows: int, num: int) -> list[Contestant]:
    """The recipe as the scorer runs it: each prompt, half of its conversation, is routed, then judged."""
    work = Work.drawn(num_rows, num)
    made: dict[bool, Recipe] = {}

    def system(bf16: bool) -> Recipe:
        if bf16 not in made:
            made[bf16] = _arliss(shape, device, work, num, bf16=bf16)
        return made[bf16]

    def ours(*, bf16: bool = False, one_by_one: bool = False) -> Run:
        recipe = system(bf16)

        def run(num_rows: int) -> Tensor:
            batches = work.in_order(num_rows, one_by_one=one_by_one)
            return torch.cat([recipe(_batch(work, rows).to(device)).reward_N for rows in batches])

        return run

    plain = Models(shape, device)
    return [
        Contestant(OURS, ours),
        Contestant(BF16, lambda: ours(bf16=True), reference=OURS),
        Contestant(ONE, lambda: ours(one_by_one=True), reference=OURS),
        Contestant(HF, lambda: plain.hf(work)),
        Contestant(HF_BF16, lambda: plain.hf(work, bf16=True), reference=HF),
    ]


def _arliss(shape: str, device: torch.device, work: Work, num: int, *, bf16: bool) -> Recipe:
    settings = ArlissConfig(
        rank=RANK, alpha=shapes.ALPHA_PER_RANK * RANK, dropout=0.0, targets=tuple(shapes.targets(shape))
    )
    backbone = shapes.backbone(shape)
    system = Recipe(settings, backbone, [f"domain-{i}" for i in range(num)]).to(device).eval()
    assert backbone.bank is not None
    torch.manual_seed(0)
    for adapter in backbone.bank.adapters.values():
        for matrix in adapter.B.values():
            nn.init.normal_(matrix, std=0.02)
    batch = _batch(work, range(num)).to(device)
    router = torch.full((num,), num, device=device)
    weight, bias = gate_of(backbone(batch.prompt_ids_PT, batch.prompt_mask_PT, router))
    gate = system.routed.router.router.gate
    gate.weight.copy_(weight)
    gate.bias.copy_(bias)
    in_precision(backbone, bf16=bf16)
    return system


def _batch(work: Work, rows: Sequence[int]) -> Batch:
    ids_NT, mask_NT = shapes.padded([work.rows[row] for row in rows])
    prompt_ids_PT, prompt_mask_PT = shapes.padded([work.rows[row][: len(work.rows[row]) // 2] for row in rows])
    return Batch(
        ids_NT=ids_NT,
        mask_NT=mask_NT,
        prompt_ids_PT=prompt_ids_PT,
        prompt_mask_PT=prompt_mask_PT,
        prompt_of_N=torch.arange(len(rows)),
        domain_N=torch.full((len(rows),), -1),
    )


class Clock:
    """Measures on a device, and knows when to end."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device = device
        self.ends = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.ends - time.monotonic()

    def timed(self, run: Run, num_rows: int) -> tuple[float, Tensor, float]:
        """Seconds, rewards, and the most memory beyond what stood there before, in MB."""
        before = self._memory(reset=True)
        started = time.perf_counter()
        rewards = run(num_rows)
        self._wait()
        seconds = time.perf_counter() - started
        return seconds, rewards, (self._memory() - before) / 1e6

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _memory(self, *, reset: bool = False) -> int:
        if self.device.type != "cuda":
            return 0
        self._wait()
        if reset:
            torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.max_memory_allocated(self.device)


@torch.no_grad()
def run_case(
    contestants: Sequence[Contestant], clock: Clock, *, num_rows: int, rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """Each is built and warmed up, then all take turns. `seconds` is what the case may take."""
    ends = clock.left - seconds
    for place, one in enumerate(contestants):
        share = (clock.left - ends) / (len(contestants) - place)
        _prepare(one, clock, num_rows=num_rows, rounds=rounds, seconds=share)
    for _ in range(rounds):
        for one in contestants:
            if one.run is not None and clock.left > 0:
                took, _, peak_mb = clock.timed(one.run, one.num_rows)
                one.seconds.append(took)
                one.peak_mb = max(one.peak_mb, peak_mb)
    by_name = {one.name: one for one in contestants}
    return [_result(one, by_name.get(one.reference)) for one in contestants]


def _prepare(one: Contestant, clock: Clock, *, num_rows: int, rounds: int, seconds: float) -> None:
    if one.status:
        return
    if one.needs and find_spec(one.needs) is None:
        one.status = f"not installed: {one.needs}"
        return
    if seconds <= 0:
        one.status = "not measured: out of time"
        return
    try:
        ends = time.monotonic() + seconds
        run = one.make()
        few = min(FEWEST, num_rows)
        clock.timed(run, few)
        took = clock.timed(run, few)[0] / few
        # A whole run warms up at its own shapes; its time is at most what the first rows' tells.
        left = ends - time.monotonic()
        one.num_rows = max(few, min(num_rows, int(0.8 * left / (rounds + 2) / took)))
        one.outputs = clock.timed(run, one.num_rows)[1].float().tolist()
    except Exception as error:  # noqa: BLE001  a peer that fails is a result like any other
        one.status = f"failed: {type(error).__name__}: {re.sub(r'/[^ ]*/', '', str(error))[:300]}"
        return
    one.run = run


def _result(one: Contestant, reference: Contestant | None) -> dict[str, Any]:
    if not one.seconds:
        return {"name": one.name, "status": one.status or "not measured: out of time"}
    told: dict[str, Any] = {
        "name": one.name,
        "status": "ok",
        "rounds": len(one.seconds),
        "num_rows": one.num_rows,
        "per_second": spread([one.num_rows / s for s in one.seconds]),
        "peak_mb": round(one.peak_mb),
    }
    if reference is not None and reference.outputs:
        common = min(one.num_rows, reference.num_rows)
        told["reference"] = reference.name
        told["exactness"] = exactness(one.outputs[:common], reference.outputs[:common])
    return told


def all_cases(*, quick: bool, device: torch.device) -> list[tuple[str, int, Callable[[int], list[Contestant]]]]:
    """Name, number of conversations, and what makes the contestants of so many."""
    names = ("bert-tiny", "deberta-tiny", "qwen2-tiny") if quick else ("bert-base", "deberta-base", "qwen2-0.5b")
    bert, *others = names
    numbers, sizes = ((2,), (16, 16)) if quick else ((5, 20, 100), (256, 128))
    experts = 3 if quick else 5
    models = {shape: Models(shape, device) for shape in others}
    found: list[tuple[str, int, Callable[[int], list[Contestant]]]] = [
        (f"ARLISS on {bert}, {experts} experts", sizes[0], lambda rows: arliss(bert, device, rows, experts))
    ]
    for number in numbers:
        for shape, num_rows in zip(others, sizes, strict=True):
            found.append(
                (
                    f"{shape}, {number} adapters",
                    num_rows,
                    lambda rows, shape=shape, number=number: adapters(models[shape], rows, number),  # type: ignore[misc]
                )
            )
    return found


def about(device: torch.device) -> dict[str, Any]:
    told: dict[str, Any] = {
        "device": "cpu",
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in PACKAGES},
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        told |= {
            "device": card.name,
            "capability": f"{card.major}.{card.minor}",
            "memory_gb": round(card.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _driver(),
        }
    return told


def _driver() -> str:
    try:
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def show(case: Mapping[str, Any]) -> None:
    print(f"\n{case['case']}: {case['num_rows']} conversations\n")
    print(
        "| contestant | conversations/s | least to most | rounds × rows | peak MB | error |\n|---|---|---|---|---|---|"
    )
    for one in case["contestants"]:
        if one["status"] != "ok":
            print(f"| {one['name']} | {one['status']} | | | | |")
            continue
        speed, error = one["per_second"], one.get("exactness", {}).get("max_relative_error")
        print(
            f"| {one['name']} | {speed['median']:.1f} | {speed['min']:.1f} to {speed['max']:.1f} | "
            f"{one['rounds']} × {one['num_rows']} | {one['peak_mb']} | {'' if error is None else f'{error:.0e}'} |"
        )
    sys.stdout.flush()


def main(words: Sequence[str] | None = None) -> int:
    options = _options(words)
    try:
        device = pick_device(options.device, key="--device")
    except ConfigError as error:
        print(f"benchmarks.gpu: {error}. To try the benchmark out: --device cpu --quick", file=sys.stderr)
        return 2
    if device.type == "cpu" and not options.quick:
        print("benchmarks.gpu: on a CPU only with --quick, to try the benchmark out", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    warnings.filterwarnings("ignore")
    clock = Clock(device, options.seconds)
    common = {
        "benchmark": "gpu",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": options.quick,
        **({"commit": options.commit, "dirty": None} if options.commit else commit()),
        "machine": about(device),
    }
    print(f"{common['machine']}; commit {common['commit']}")
    chosen = [case for case in all_cases(quick=options.quick, device=device) if options.case in case[0]]
    for place, (name, num_rows, make) in enumerate(chosen):
        seconds = clock.left / (len(chosen) - place)
        results = run_case(make(num_rows), clock, num_rows=num_rows, rounds=options.rounds, seconds=seconds)
        gc.collect()
        record = {**common, "case": name, "num_rows": num_rows, "rounds": options.rounds, "contestants": results}
        show(record)
        if options.out is not None:
            append(record, options.out)
    return 0


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder of gpu.jsonl; without it nothing is written")
    parser.add_argument("--seconds", type=float, default=240, help="about when to end")
    parser.add_argument("--rounds", type=int, help="default 5 (quick: 2)")
    parser.add_argument("--case", default="", help="only cases whose name holds this")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu together with --quick")
    parser.add_argument("--commit", default="", help="said in the records where the tree has no history beside it")
    options = parser.parse_args(words)
    options.rounds = options.rounds or (2 if options.quick else 5)
    return options


if __name__ == "__main__":
    sys.exit(main())
