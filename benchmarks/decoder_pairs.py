"""Decoder pairs, forward and backward: both responses share a prompt. Peer: the prompt twice.

The aim is set against our own engine on prompts that differ, so that it says what sharing brings and nothing else:
at most 1.03 times the share of tokens that is left, (P + 2R) / (2P + 2R).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.harness import Aim, Case, Contestant, run

HF, TWICE, OURS = "HF, prompt twice", "ours, prompts that differ", "ours"


def cases(quick: bool) -> Sequence[Case]:
    if quick:
        return [_case("qwen2-tiny", 2, 16, 8)]
    return [_case("qwen2-512", 4, 256, 64), _case("qwen2-512", 4, 128, 128)]


def _case(shape: str, num_pairs: int, prompt: int, response: int) -> Case:
    told: dict[str, Any] = {"shape": shape, "num_pairs": num_pairs, "prompt": prompt, "response": response}
    make = "benchmarks.training:ours_decoder_pairs"
    tokens = (prompt + 2 * response) / (2 * prompt + 2 * response)
    return Case(
        name=f"{shape}, {num_pairs} pairs, prompt {prompt}, responses {response}",
        peer=HF,
        contestants=[
            Contestant(name=HF, make="benchmarks.training:hf_decoder_pairs", arguments=told),
            Contestant(name=TWICE, make=make, arguments={**told, "shared": False}, compared=False),
            Contestant(name=OURS, make=make, arguments=told),
        ],
        aims=[Aim(who=OURS, share=1e-5, of="error"), Aim(who=OURS, peer=TWICE, share=round(1.03 * tokens, 4))],
    )


if __name__ == "__main__":
    run("decoder_pairs", cases)
