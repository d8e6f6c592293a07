"""Best of n: many responses to one prompt, on a small decoder and, for the router's share, on ARLISS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.harness import Aim, Case, Contestant, run

NAIVE, OURS = "HF, prompt repeated", "ours"
WHOLE, EXPERTS = "ours, ARLISS", "ours, ARLISS, route known"
ROUTER_SHARE = 0.05


def cases(quick: bool) -> Sequence[Case]:
    if quick:
        return [_decoder("qwen2-tiny", 32, 8, 4), _router("deberta-tiny", 16, 16, 4)]
    shape = "qwen2-512"
    return [
        _decoder(shape, 256, 64, 64, share=0.125),
        _decoder(shape, 768, 64, 16, share=0.067),
        _decoder(shape, 256, 64, 16),
        _decoder(shape, 256, 64, 4),
        _router("minilm", 64, 64, 16),
        _router("deberta-xsmall", 64, 64, 16),
    ]


def _decoder(shape: str, prompt: int, response: int, num: int, share: float = 0.0) -> Case:
    told: dict[str, Any] = {"shape": shape, "prompt": prompt, "response": response, "num": num}
    aims = [Aim(who=OURS, share=1e-5, of="error")]
    return Case(
        name=f"{shape}, prompt {prompt}, {num} responses of {response}",
        peer=NAIVE,
        contestants=[
            Contestant(name=NAIVE, make="benchmarks.peers:naive_best_of_n", arguments=told),
            Contestant(name=OURS, make="benchmarks.ours:best_of_n", arguments=told),
        ],
        aims=[*aims, *([Aim(who=OURS, peer=NAIVE, share=share)] if share else [])],
    )


def _router(shape: str, prompt: int, response: int, num: int) -> Case:
    """The router's share of the whole is s where the whole takes 1 / (1 - s) of the experts alone."""
    told: dict[str, Any] = {"shape": shape, "prompt": prompt, "response": response, "num": num}
    make = "benchmarks.ours:best_of_n_arliss"
    return Case(
        name=f"router's share: {shape}, prompt {prompt}, {num} responses of {response}",
        peer=EXPERTS,
        contestants=[
            Contestant(name=EXPERTS, make=make, arguments={**told, "route": False}),
            Contestant(name=WHOLE, make=make, arguments=told),
        ],
        aims=[Aim(who=WHOLE, peer=EXPERTS, share=round(1 / (1 - ROUTER_SHARE), 4))],
    )


if __name__ == "__main__":
    run("best_of_n", cases)
