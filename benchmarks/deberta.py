"""DeBERTa-v3 alone, the shape of xsmall: 32, 128 and 400 tokens, one text and eight (four of 400), no padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.harness import Aim, Case, Contestant, run

AIMS = {32: 0.14, 128: 0.29, 400: 0.33}


def cases(quick: bool) -> Sequence[Case]:
    if quick:
        return [_case("deberta-tiny", 2, 32)]
    return [_case("deberta-xsmall", rows, tokens) for tokens in AIMS for rows in (1, 4 if tokens == 400 else 8)]


def _case(shape: str, rows: int, tokens: int) -> Case:
    told: dict[str, Any] = {"shape": shape, "lengths": [tokens] * rows}
    batch = {**told, "batch_size": rows}
    needs = ("onnx", "onnxscript")
    return Case(
        name=f"{shape}, batch {rows}, {tokens} tokens",
        peer="HF",
        contestants=[
            Contestant(name="HF", make="benchmarks.peers:hf", arguments=batch),
            Contestant(
                name="onnxruntime",
                make="benchmarks.peers:onnxruntime",
                arguments=batch,
                needs=(*needs, "onnxruntime"),
            ),
            Contestant(name="OpenVINO", make="benchmarks.peers:openvino", arguments=batch, needs=(*needs, "openvino")),
            Contestant(name="ours", make="benchmarks.ours:texts", arguments=told),
        ],
        aims=[Aim(who="ours", share=1e-5, of="error"), Aim(who="ours", peer="HF", share=AIMS[tokens])],
    )


if __name__ == "__main__":
    run("deberta", cases)
