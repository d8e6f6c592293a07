"""Training one model: all of MiniLM on 64 pairs of real lengths, eight a step, one epoch. Peer: TRL's RewardTrainer.

TRL in fp32 without gradient checkpointing, and as it comes (bf16, checkpointing). A third TRL run gets the batches
that our loop makes: the losses of ours are compared with its, step by step. Where the processor has no bf16 of its
own (no avx512_bf16 in the machine's line), TRL's default is slower than its fp32, and an aim that
is met against it says little.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.harness import Aim, Case, Contestant, run

TRL, TRL_OURS, DEFAULT, OURS = "TRL fp32", "TRL fp32, our batches", "TRL default", "ours"


def cases(quick: bool) -> Sequence[Case]:
    return [_case("deberta-tiny", 8, 4) if quick else _case("minilm", 64, 8)]


def _case(shape: str, num_pairs: int, batch_size: int) -> Case:
    told: dict[str, Any] = {"shape": shape, "num_pairs": num_pairs, "batch_size": batch_size}
    return Case(
        name=f"{shape}, {num_pairs} pairs, {batch_size} a step",
        peer=TRL,
        reference=TRL_OURS,
        contestants=[
            _trl(TRL, told, compared=False),
            _trl(TRL_OURS, {**told, "ours": True}),
            _trl(DEFAULT, {**told, "fp32": False}, compared=False),
            Contestant(name=OURS, make="benchmarks.training:ours_full", arguments=told),
        ],
        aims=[
            Aim(who=OURS, share=1e-6, of="error"),
            Aim(who=OURS, peer=TRL, share=0.20),
            Aim(who=OURS, peer=DEFAULT, share=0.33),
        ],
    )


def _trl(name: str, told: dict[str, Any], *, compared: bool = True) -> Contestant:
    return Contestant(
        name=name, make="benchmarks.training:trl_full", arguments=told, needs=("trl", "datasets"), compared=compared
    )


if __name__ == "__main__":
    run("train", cases)
