"""DMoERM's inner experts: five adapters judge every text. Peer: PEFT, one adapter after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.harness import Aim, Case, Contestant, run

PEFT, OURS = "PEFT, one after another", "ours, one call"
TOP, BASE, ACTIVE = "ours, adapters in the top 2 layers", "ours, one bare pass", "ours, active on the last 16 tokens"


def cases(quick: bool) -> Sequence[Case]:
    if quick:
        return [_case("deberta-tiny", 2, 16)]
    return [
        _case("minilm", 1, 128),
        _case("minilm", 8, 128),
        _case("deberta-xsmall", 8, 128),
        _activated("qwen2-512", 4, 320),
    ]


def _case(shape: str, rows: int, tokens: int) -> Case:
    told: dict[str, Any] = {"shape": shape, "num_experts": 5, "num_rows": rows, "tokens": tokens}
    return Case(
        name=f"{shape}, 5 experts, batch {rows}, {tokens} tokens",
        peer=PEFT,
        contestants=[
            Contestant(name=PEFT, make="benchmarks.peers:peft_dmoerm", arguments=told, needs=("peft",)),
            Contestant(name=OURS, make="benchmarks.ours:dmoerm", arguments=told),
            Contestant(name=TOP, make="benchmarks.ours:dmoerm", arguments={**told, "top_layers": 2}, compared=False),
        ],
        aims=[
            Aim(who=OURS, share=1e-5, of="error"),
            Aim(who=OURS, peer=PEFT, share=0.38),
            Aim(who=TOP, peer=PEFT, share=0.18),
        ],
    )


def _activated(shape: str, rows: int, tokens: int) -> Case:
    """Experts that act on a text's end only, which changes what they are: beside one bare pass of the same model."""
    told: dict[str, Any] = {"shape": shape, "num_rows": rows, "tokens": tokens}
    ours = "benchmarks.ours:dmoerm"
    return Case(
        name=f"{shape}, 5 activated experts, batch {rows}, {tokens} tokens",
        peer=BASE,
        contestants=[
            Contestant(name=BASE, make=ours, arguments={**told, "num_experts": 0}, compared=False),
            Contestant(name=OURS, make=ours, arguments={**told, "num_experts": 5}, compared=False),
            Contestant(
                name=ACTIVE, make=ours, arguments={**told, "num_experts": 5, "active_tokens": 16}, compared=False
            ),
        ],
        aims=[Aim(who=ACTIVE, peer=BASE, share=1.25)],
    )


if __name__ == "__main__":
    run("dmoerm_inner", cases)
