"""Training one adapter of rank 12 in every linear layer, and a head: 32 pairs of real lengths, eight a step.

Peer: a plain loop over PEFT on the padded Hugging Face model. A second one gets the batches that our loop makes: the
losses of ours are compared with its, step by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.harness import Aim, Case, Contestant, run

PEFT, PEFT_OURS, OURS = "PEFT on HF, padded", "PEFT on HF, our batches", "ours, all layers"
TOP = "ours, top 2 layers, states below kept"


def cases(quick: bool) -> Sequence[Case]:
    if quick:
        return [_case("deberta-tiny", 8, 4)]
    return [_case("minilm", 32, 8), _case("deberta-xsmall", 16, 8)]


def _case(shape: str, num_pairs: int, batch_size: int) -> Case:
    told: dict[str, Any] = {"shape": shape, "num_pairs": num_pairs, "batch_size": batch_size}
    peer = "benchmarks.training:peft_lora"
    return Case(
        name=f"{shape}, {num_pairs} pairs, {batch_size} a step",
        peer=PEFT,
        reference=PEFT_OURS,
        contestants=[
            Contestant(name=PEFT, make=peer, arguments=told, needs=("peft",), compared=False),
            Contestant(name=PEFT_OURS, make=peer, arguments={**told, "ours": True}, needs=("peft",)),
            Contestant(name=OURS, make="benchmarks.training:ours_lora", arguments=told),
            Contestant(
                name=TOP, make="benchmarks.training:ours_lora", arguments={**told, "top_layers": 2}, compared=False
            ),
        ],
        aims=[
            Aim(who=OURS, share=1e-5, of="error"),
            Aim(who=OURS, peer=PEFT, share=0.20),
            Aim(who=TOP, peer=PEFT, share=0.067),
        ],
    )


if __name__ == "__main__":
    run("lora_train", cases)
