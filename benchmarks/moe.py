"""The sparse expert layer, forward and backward: 8 experts of width 1536 or 64 of width 384, the best two per token.

Peers: transformers' `grouped_mm` experts and its eager loop. Then how the time grows with the number of experts at
one width: eight times the experts may take eight times as long, no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.harness import Aim, Case, Contestant, run

GROUPED, EAGER, OURS = "HF grouped_mm", "HF eager", "ours"


def cases(quick: bool) -> Sequence[Case]:
    if quick:
        return [_case(32, 4, 64, 1.0)]
    large = [_case(4096, experts, width, 0.50) for experts, width in ((8, 1536), (64, 384))]
    small = [_case(32, experts, width, 1.0) for experts, width in ((8, 1536), (64, 384))]
    return [*large, *small, _growth(4096, 384), _growth(32, 384)]


def _case(tokens: int, num_experts: int, width: int, share: float) -> Case:
    told: dict[str, Any] = {"tokens": tokens, "num_experts": num_experts, "width": width}
    return Case(
        name=f"{tokens} tokens, {num_experts} experts of width {width}",
        peer=GROUPED,
        contestants=[
            Contestant(name=GROUPED, make="benchmarks.sparse:hf", arguments={**told, "implementation": "grouped_mm"}),
            Contestant(name=EAGER, make="benchmarks.sparse:hf", arguments={**told, "implementation": "eager"}),
            Contestant(name=OURS, make="benchmarks.sparse:ours", arguments=told),
        ],
        aims=[Aim(who=OURS, share=1e-5, of="error"), Aim(who=OURS, peer=GROUPED, share=share)],
    )


def _growth(tokens: int, width: int) -> Case:
    def ours(num: int) -> Contestant:
        told = {"tokens": tokens, "num_experts": num, "width": width}
        return Contestant(name=f"ours, {num} experts", make="benchmarks.sparse:ours", arguments=told, compared=False)

    return Case(
        name=f"growth with the experts: {tokens} tokens, width {width}",
        peer="ours, 8 experts",
        contestants=[ours(8), ours(16), ours(32), ours(64)],
        aims=[Aim(who="ours, 64 experts", peer="ours, 8 experts", share=8.0)],
    )


if __name__ == "__main__":
    run("moe", cases)
