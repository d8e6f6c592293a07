"""Texts as long as they really are: 96 texts, lognormal lengths of median 160 from 16 to 512 tokens; and equal ones.

One model, no adapters. Ours takes the texts in the order in which they came, in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import shapes
from benchmarks.harness import Aim, Case, Contestant, run

OURS, ALONE, BF16 = "ours, in order of arrival", "ours, deterministic (each text alone)", "ours, bf16"
RANDOM, SORTED, ONE = "HF, dynamic padding, batches of 16", "HF, sorted, 2048 tokens", "HF, one by one"
ORT, OPENVINO = "onnxruntime, sorted, 2048 tokens", "OpenVINO, sorted, 2048 tokens"


def cases(quick: bool) -> Sequence[Case]:
    if quick:
        return [_lengths("deberta-tiny", 8), _equal("deberta-tiny", 4, 32)]
    equal = [_equal("minilm", rows, 128) for rows in (1, 8, 32)]
    return [_lengths("minilm", 96), _lengths("deberta-xsmall", 48), *equal]


def _lengths(shape: str, num: int) -> Case:
    told: dict[str, Any] = {"shape": shape, "lengths": shapes.lognormal_lengths(num)}
    budget = {**told, "budget": 2048}
    return Case(
        name=f"{shape}, {num} texts of lognormal lengths",
        peer=RANDOM,
        reference=ONE,
        contestants=[
            Contestant(name=RANDOM, make="benchmarks.peers:hf", arguments={**told, "batch_size": 16}),
            Contestant(name=SORTED, make="benchmarks.peers:hf", arguments=budget),
            Contestant(name=ONE, make="benchmarks.peers:hf", arguments={**told, "batch_size": 1}),
            _onnxruntime(ORT, budget),
            _openvino(OPENVINO, budget),
            Contestant(name=OURS, make="benchmarks.ours:texts", arguments=told),
            Contestant(name=ALONE, make="benchmarks.ours:texts", arguments={**told, "one_by_one": True}),
            Contestant(name=BF16, make="benchmarks.ours:texts", arguments={**told, "bf16": True}),
        ],
        aims=[
            Aim(who=OURS, share=1e-5, of="error"),
            Aim(who=OURS, peer=RANDOM, share=0.17),
            Aim(who=OURS, peer=SORTED, share=0.40),
        ],
    )


def _equal(shape: str, rows: int, tokens: int) -> Case:
    told: dict[str, Any] = {"shape": shape, "lengths": [tokens] * rows}
    batch = {**told, "batch_size": rows}
    return Case(
        name=f"{shape}, {rows} texts of {tokens} tokens",
        peer="HF",
        contestants=[
            Contestant(name="HF", make="benchmarks.peers:hf", arguments=batch),
            _onnxruntime("onnxruntime", batch),
            _openvino("OpenVINO", batch),
            Contestant(name="ours", make="benchmarks.ours:texts", arguments=told),
        ],
        aims=[Aim(who="ours", share=1e-5, of="error"), Aim(who="ours", peer="OpenVINO", share=1.0)],
    )


def _onnxruntime(name: str, told: dict[str, Any]) -> Contestant:
    needs = ("onnx", "onnxscript", "onnxruntime")
    return Contestant(name=name, make="benchmarks.peers:onnxruntime", arguments=told, needs=needs)


def _openvino(name: str, told: dict[str, Any]) -> Contestant:
    needs = ("onnx", "onnxscript", "openvino")
    return Contestant(name=name, make="benchmarks.peers:openvino", arguments=told, needs=needs)


if __name__ == "__main__":
    run("packing", cases)
