"""A whole mixture: five experts and the router of ARLISS, one epoch over 40 pairs of five domains.

Peer: TRL with a LoRA adapter for each domain, one run after another, then a router by PEFT on the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.harness import Aim, Case, Contestant, run

TRL, OURS = "TRL LoRA runs, one by one", "ours"


def cases(quick: bool) -> Sequence[Case]:
    return [_case("deberta-tiny", 10, 2) if quick else _case("minilm", 40, 8)]


def _case(shape: str, num_pairs: int, batch_size: int) -> Case:
    told: dict[str, Any] = {"shape": shape, "num_pairs": num_pairs, "batch_size": batch_size}
    peer, needs = "benchmarks.training:trl_lora_runs", ("trl", "datasets", "peft")
    return Case(
        name=f"{shape}, 5 experts and a router, {num_pairs} pairs, {batch_size} a step",
        peer=TRL,
        contestants=[
            Contestant(name=TRL, make=peer, arguments=told, needs=needs),
            Contestant(name=OURS, make="benchmarks.training:ours_mixture", arguments=told, compared=False),
        ],
        aims=[Aim(who=OURS, peer=TRL, share=0.25)],
    )


if __name__ == "__main__":
    run("mixture_train", cases)
